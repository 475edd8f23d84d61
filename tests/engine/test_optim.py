"""Learning rates at known steps, and which parameters are decayed by what."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import test_parity
import torch
import toy

from megagpt.config import UserError, describe, validate
from megagpt.engine.build import refuse_unsupported
from megagpt.engine.config import DeepSpeedConfig, FSDPConfig
from megagpt.engine.optim import (
    OPTIMIZERS,
    STATES,
    OptimConfig,
    ScheduleConfig,
    Together,
    build_optimizer,
    create_states,
    lr_at,
    parameter_groups,
    refuse_unmatched,
    set_lr,
    set_updates,
)
from megagpt.model.gpt import GPT, ModelConfig, initialise

MODEL = ModelConfig(family="gpt2", vocab_size=16, seq_len=8, num_layers=1, num_heads=2, hidden_size=8)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ({"kind": "constant"}, {0: 1.0, 99: 1.0}),
        ({"kind": "constant", "warmup_steps": 10}, {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0}),
        (
            {"kind": "cosine", "warmup_steps": 20},
            {19: 1.0, 20: 1.0, 60: 0.55, 99: 0.1 + 0.45 * (1 + math.cos(math.pi * 79 / 80))},
        ),
        ({"kind": "linear", "min_lr_ratio": 0.0}, {0: 1.0, 50: 0.5, 99: 0.01}),
        ({"kind": "wsd", "decay_steps": 20, "min_lr_ratio": 0.0}, {0: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
        ({"kind": "inverse_sqrt", "warmup_steps": 25}, {24: 1.0, 99: 0.5}),
    ],
)
def test_schedules(schedule: dict[str, object], values: dict[int, float]) -> None:
    config = OptimConfig(lr=2.0, schedule=ScheduleConfig.model_validate(schedule))
    assert {step: lr_at(config, step, 100) / 2 for step in values} == pytest.approx(values)


def test_wsd_needs_its_decay() -> None:
    with pytest.raises(UserError, match=r"decay_steps > 0"):
        validate(OptimConfig, {"schedule": {"kind": "wsd"}}, source="test")


def test_vectors_are_not_decayed() -> None:
    model = GPT(MODEL)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.3))
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(parameter.ndim >= 2 for parameter in groups[0]["params"])
    assert all(parameter.ndim == 1 for parameter in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    model = GPT(MODEL)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(parameter_groups(model, OptimConfig(kind="muon")), OptimConfig(kind="muon"))
    assert isinstance(optimizer, Together)
    by_kind = {kind: [names[p] for g in optimizer.param_groups if g["kind"] == kind for p in g["params"]] for kind in STATES}
    assert by_kind["muon"] == [
        n for n in names.values() if n.startswith("blocks.") and n.endswith("weight") and "norm" not in n
    ]
    assert "embedding.weight" in by_kind["adamw"]


def stepped(kind: str, steps: int, early: bool = False) -> tuple[GPT, Any]:
    """A small model and its optimizer after some updates."""
    model = GPT(MODEL)
    initialise(model, seed=0)
    config = OptimConfig.model_validate({"kind": kind, "lr": 0.01})
    optimizer = build_optimizer(parameter_groups(model, config), config)
    if early:
        create_states(optimizer, kinds_of(optimizer))
    for _ in range(steps):
        update(model, optimizer)
    return model, optimizer


def update(model: GPT, optimizer: Any) -> None:
    ids = torch.arange(8)[None] % 16
    model(ids, ids.flip(1)).backward()
    optimizer.step()
    optimizer.zero_grad()


def kinds_of(optimizer: Any) -> list[tuple[torch.Tensor, str]]:
    return [(p, group["kind"]) for group in optimizer.param_groups for p in group["params"]]


def assert_same(first: GPT, second: GPT) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_made_before_the_first_step_change_nothing(kind: str) -> None:
    """torch makes them in the first step; a checkpoint needs them before."""
    assert_same(stepped(kind, 3)[0], stepped(kind, 3, early=True)[0])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_checkpoint_keeps_every_state_of_every_optimizer(kind: str) -> None:
    model, optimizer = stepped(kind, 2)
    for parameter, group_kind in kinds_of(optimizer):
        spec, state = OPTIMIZERS[group_kind], optimizer.state[parameter]
        counted = {"step"} if spec.updates_in == "parameter" else set()
        tensors = {key for key, value in state.items() if torch.is_tensor(value) and value.shape == parameter.shape}
        assert {*state} == {*spec.states} | counted, f"optim.py: states of {group_kind}: a checkpoint would lose the others"
        assert tensors == {*spec.states}, f"optim.py: states of {group_kind}: one is no per-element tensor"
    other, restored = stepped(kind, 0, early=True)
    other.load_state_dict(model.state_dict())
    for (old, group_kind), (new, _) in zip(kinds_of(optimizer), kinds_of(restored), strict=True):
        for key in OPTIMIZERS[group_kind].states:
            restored.state[new][key].copy_(optimizer.state[old][key])
    set_updates(restored, 2)
    update(model, optimizer)
    update(other, restored)
    assert_same(model, other)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_is_documented_and_in_the_parity_tests(kind: str, project: Path) -> None:
    assert f"`{kind}`" in (project / "docs" / "training.md").read_text(encoding="utf-8"), f"docs/training.md: no {kind}"
    assert kind in toy.OPTIMIZERS, f"tests/support/toy.py: OPTIMIZERS has no settings for {kind}"
    cells = [cell for some in test_parity.CELLS.values() for cell in some]
    assert any(cell.optimizer == kind for cell in cells), f"test_parity.py: CELLS has none with {kind}"


def test_the_help_names_every_optimizer() -> None:
    (row,) = (row for row in describe(OptimConfig) if row[0] == "kind")
    assert all(kind in row[2] for kind in OPTIMIZERS)
    *first, last = (repr(kind) for kind in OPTIMIZERS)
    with pytest.raises(UserError, match=f"kind='adam': input should be {', '.join(first)} or {last}"):
        validate(OptimConfig, {"kind": "adam"}, source="test")


REFUSED = {"adabelief": (3,)}
"""ZeRO stages; an optimizer that is not here is offered on all."""


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_a_stage_cannot_compute_is_refused_by_name(kind: str) -> None:
    refused = REFUSED.get(kind, ())
    uncomputed = tuple(stage for stage in range(4) if not toy.offered_on(f"zero{stage}", kind))
    assert refused == uncomputed, f"{Path(__file__).name}: REFUSED needs {kind!r}: {uncomputed}"
    optim = OptimConfig.model_validate({"kind": kind})
    refuse_unsupported(FSDPConfig(), optim, "bf16")
    for stage in range(4):
        engine = DeepSpeedConfig.model_validate({"zero_stage": stage})
        if stage in refused:
            with pytest.raises(UserError, match=f"optim.kind={kind} with engine.zero_stage={stage}"):
                refuse_unsupported(engine, optim, "fp32")
        else:
            refuse_unsupported(engine, optim, "fp32")


def test_rates_are_multiplied_by_the_first_pattern_that_matches() -> None:
    model = GPT(MODEL)
    config = OptimConfig(kind="muon", lr_factors={"embedding.*": 0.0, "blocks.0.mlp.*": 0.5})
    optimizer = build_optimizer(parameter_groups(model, config), config)
    set_lr(optimizer, 2.0)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 0.0 if name == "embedding.weight" else 1.0 if name.startswith("blocks.0.mlp.") else 2.0
        assert rates[parameter] == expected, name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("factors", "match"),
    [
        ({"embeding.*": 0.1}, "lr_factors: 'embeding.*' matches no trained parameter; there are a.weight, b.weight"),
        ({"*": 0.1, "a.*": 2}, "lr_factors: 'a.*' has no effect: the patterns before it match all that it does"),
    ],
)
def test_patterns_of_rates_without_effect_are_refused(factors: dict[str, float], match: str) -> None:
    with pytest.raises(UserError, match=re.escape(match)):
        refuse_unmatched(OptimConfig(lr_factors=factors), ["a.weight", "b.weight"])
    with pytest.raises(UserError, match="greater than or equal to 0"):
        validate(OptimConfig, {"lr_factors": {"a": -1}}, source="test")


def bf16_weights(updates: int, *, kind: str = "adamw_bf16_states", cut: int = 1) -> torch.Tensor:
    """1,000 weights after updates with seeded gradients, held in `cut` tensors."""
    generator = torch.Generator().manual_seed(1)
    weights = [part.clone() for part in torch.randn(1000, generator=generator).split(1000 // cut)]
    parameters = [torch.nn.Parameter(part) for part in weights]
    config = OptimConfig(kind=kind, lr=1e-2)
    optimizer = build_optimizer([{"params": parameters, "weight_decay": 0.1, "kind": kind}], config)
    for _ in range(updates):
        gradients = torch.randn(1000, generator=generator).split(1000 // cut)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        assert all(optimizer.state[p]["exp_avg_sq"].dtype == OPTIMIZERS[kind].state_dtype for p in parameters)
    return torch.cat([parameter.detach() for parameter in parameters])


def test_bf16_moments_change_updates_by_their_rounding_alone() -> None:
    """8 bits: an update is off by half a percent or so; the first one, from moments not yet rounded, not at all."""
    assert torch.allclose(bf16_weights(1), bf16_weights(1, kind="adamw"), rtol=0, atol=1e-7)
    moved = (bf16_weights(60, kind="adamw") - bf16_weights(0)).abs().mean()
    error = (bf16_weights(60) - bf16_weights(60, kind="adamw")).abs().mean()
    assert 1e-6 < error < 0.01 * moved


def test_bf16_moments_do_not_depend_on_how_weights_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bf16_weights(5)
    assert torch.equal(whole, bf16_weights(5, cut=8))
    monkeypatch.setattr("megagpt.engine.adamw_bf16.SLICE", 7)
    assert torch.equal(whole, bf16_weights(5))


@pytest.mark.parametrize("name", ["beta1", "beta2"])
def test_averages_that_would_stand_still_in_bf16_are_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"kind=adamw_bf16_states needs {name} of at most 0.96875, not 0.999: .* kind=adamw keeps fp32"
    ):
        OptimConfig(kind="adamw_bf16_states", **{name: 0.999})
    OptimConfig(kind="adamw_bf16_states", **{name: 0.96875})
    OptimConfig(kind="adamw", **{name: 0.999})
