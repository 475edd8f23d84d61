"""Rotary frequencies against transformers' own, and what rotation has to keep."""

import pytest
import torch

from megagpt.config import UserError, validate
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.model.rope import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling, rope_frequencies, rope_table, rotate

CPU = torch.device("cpu")
SHAPE = {"vocab_size": 8, "seq_len": 8, "num_layers": 1, "num_heads": 1, "hidden_size": 8}
# Every fourth of transformers' ROPE_INIT_FUNCTIONS for heads of 64, and its attention factor.
PUBLISHED: list[tuple[RopeScaling, float, list[float], float]] = [
    (LinearScaling(factor=4), 10_000.0, [
        2.5e-01, 7.905694e-02, 2.500000e-02, 7.905694e-03, 2.499999e-03, 7.905694e-04, 2.500000e-04, 7.905694e-05,
    ], 1.0),
    (Llama3Scaling(kind="llama3", factor=8, original_seq_len=512), 500_000.0, [
        1.0, 1.939227e-01, 2.734413e-02, 9.115831e-04, 1.767766e-04, 3.428102e-05, 6.647869e-06, 1.289173e-06,
    ], 1.0),
    (YarnScaling(kind="yarn", factor=4, original_seq_len=1024), 10_000.0, [
        1.0, 3.162277e-01, 8.269231e-02, 1.885204e-02, 3.653846e-03, 7.905694e-04, 2.500000e-04, 7.905694e-05,
    ], 1.138629436111989),
    (YarnScaling(kind="yarn", factor=16, original_seq_len=256, beta_fast=16, beta_slow=2), 10_000.0, [
        1.0, 2.791698e-01, 4.140625e-02, 1.976423e-03, 6.249999e-04, 1.976423e-04, 6.250000e-05, 1.976423e-05,
    ], 1.2772588722239782),
]  # fmt: skip


@pytest.mark.parametrize(("scaling", "theta", "expected", "sharpness"), PUBLISHED)
def test_frequencies_are_those_of_transformers(
    scaling: RopeScaling, theta: float, expected: list[float], sharpness: float
) -> None:
    frequencies, factor = rope_frequencies(64, theta, scaling, CPU)
    torch.testing.assert_close(frequencies[::4], torch.tensor(expected), rtol=3e-6, atol=0)
    assert factor == pytest.approx(sharpness)
    table = rope_table(64, theta, scaling, 3, 2, CPU)
    torch.testing.assert_close(table[0, 1], (4 * frequencies).cos() * sharpness)


SCALINGS: dict[str, dict[str, object]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 8.0, "original_seq_len": 512, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0, "original_seq_len": 1024, "beta_fast": 32.0, "beta_slow": 1.0},
    "yarn of equal ends": {"kind": "yarn", "factor": 2.0, "original_seq_len": 2, "beta_fast": 32.0, "beta_slow": 31.0},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
@pytest.mark.parametrize("head_size", [8, 64, 128])
def test_the_table_has_the_bits_of_transformers(name: str, theta: float, head_size: int) -> None:
    """Bit for bit: what differs in the last bit of a frequency is 1e-3 of a logit at position 2,000."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values = {"kind": name, **SCALINGS[name]}
    theirs = {key: value for key, value in values.items() if key not in ("kind", "original_seq_len")}
    if "original_seq_len" in values:
        theirs["original_max_position_embeddings"] = values["original_seq_len"]
    config = LlamaConfig(
        hidden_size=2 * head_size,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": values["kind"], "rope_theta": theta, **theirs},
    )
    scaling = None if name == "default" else validate(ModelConfig, {**SHAPE, "rope_scaling": values}, source="").rope_scaling
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(4096)[None])
    ours = rope_table(head_size, theta, scaling, 0, 4096, CPU)
    assert torch.equal(ours, torch.stack((cos[0, :, : head_size // 2], sin[0, :, : head_size // 2])))


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    x, y = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    at = [rotate(x, rope_table(16, 10_000.0, None, p, 1, CPU)) for p in (2, 7)]
    to = [rotate(y, rope_table(16, 10_000.0, None, p, 1, CPU)) for p in (5, 10)]
    torch.testing.assert_close(at[0].norm(), x.norm())
    torch.testing.assert_close((at[0] * to[0]).sum(), (at[1] * to[1]).sum())


def test_a_model_uses_them() -> None:
    """Halved frequencies at positions 0 to 7 are the plain ones at 0, 1/2 ... 7/2: other logits from the second token on."""
    logits = []
    for scaling in (None, LinearScaling(factor=2)):
        config = ModelConfig(
            vocab_size=8, seq_len=8, num_layers=1, num_heads=1, hidden_size=8, init_std=1, rope_scaling=scaling
        )
        model = GPT(config)
        initialise(model, seed=1)
        logits.append(model(torch.arange(8)[None]).detach())
    torch.testing.assert_close(logits[0][:, 0], logits[1][:, 0])
    assert not torch.allclose(logits[0][:, 7], logits[1][:, 7], atol=1e-2)


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"kind": "yarn", "factor": 4}, "original_seq_len"),
        ({"kind": "linear", "factor": 4, "beta_fast": 2}, "beta_fast"),
        ({"kind": "llama3", "factor": 8, "original_seq_len": 512, "low_freq_factor": 5}, "high_freq_factor=4.0 is not above"),
        ({"factor": 0.5}, "factor"),
    ],
)
def test_bad_sections_are_named(section: dict[str, object], what: str) -> None:
    with pytest.raises(UserError, match=what):
        validate(ModelConfig, {**SHAPE, "rope_scaling": section}, source="test")
