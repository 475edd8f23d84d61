"""float8 products: what they compute, where, on which engines, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, noop_context_fn
from toy import MODEL, make_engine, train_steps

from megagpt.config import UserError
from megagpt.distributed.world import World
from megagpt.engine.config import Precision
from megagpt.engine.initial_weights import draw_weights
from megagpt.model.float8 import Float8, refuse_float8, use_float8
from megagpt.model.gpt import GPT, ModelConfig, initialise, keep_products

RECIPES: tuple[Float8, ...] = ("tensorwise", "rowwise")


def rounded(values: Tensor, dtype: torch.dtype, along: int | None) -> Tensor:
    """What float8 keeps of a matrix: scaled so that its largest element (of each row or column: `along`) fits, and back.

    Scales of rows and columns are powers of two.
    """
    largest = values.abs().max() if along is None else values.abs().amax(along, keepdim=True)
    scale = torch.finfo(dtype).max / largest.double()
    if along is not None:
        scale = 2.0 ** torch.floor(torch.log2(scale))
    return (values.double() * scale).to(torch.float32).to(dtype).double() / scale


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_factors_rounded_to_eight_bits(recipe: Float8) -> None:
    """Forward and both gradients against the products of the rounded factors in fp64. Tensorwise gradients are e5m2."""
    torch.manual_seed(1)
    blocks = nn.ModuleList([nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)])
    use_float8(blocks, recipe, emulate=True)
    linear: Any = blocks[0]
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(32, 96, dtype=torch.bfloat16) * 1e-3
    y = linear(x)
    y.backward(gradient)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    across, down = (None, None) if recipe == "tensorwise" else (1, 0)
    of_gradient = e5m2 if recipe == "tensorwise" else e4m3
    weight, inputs = linear.weight.detach(), x.detach()
    expected = {
        "y": (y, rounded(inputs, e4m3, across) @ rounded(weight, e4m3, across).T),
        "x.grad": (x.grad, rounded(gradient, of_gradient, across) @ rounded(weight, e4m3, down)),
        "weight.grad": (linear.weight.grad, rounded(gradient, of_gradient, down).T @ rounded(inputs, e4m3, down)),
    }
    for name, (found, wanted) in expected.items():
        assert found is not None
        error = (found.detach().double() - wanted).abs().max() / wanted.abs().max()
        plain = {"y": inputs @ weight.T, "x.grad": gradient @ weight, "weight.grad": gradient.T @ inputs}[name].double()
        assert error < 0.005, (name, float(error))  # bf16's own rounding
        assert (plain - wanted).abs().max() / wanted.abs().max() > 0.01, name  # float8's


def test_only_the_blocks_are_converted_and_names_stay() -> None:
    model = GPT(MODEL)
    initialise(model, seed=1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    use_float8(model.blocks, "tensorwise", emulate=True)
    assert {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)} == {
        **{f"blocks.{i}.attention.{name}": "Float8Linear" for i in range(2) for name in ("query", "key", "value", "out")},
        **{f"blocks.{i}.mlp.{name}": "Float8Linear" for i in range(2) for name in ("gate", "up", "out")},
        "head": "Head",
    }
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def float8_losses(world: World, names: list[str]) -> dict[tuple[str, Float8], float]:
    """The loss after a few steps by engine and recipe; "NAME selective" checkpoints selectively, which must change nothing."""
    found: dict[tuple[str, Float8], float] = {}
    for name in names:
        for recipe in ("none", *RECIPES) if name == names[0] else RECIPES:
            kind, _, selective = name.partition(" ")
            options: dict[str, Any] = {"checkpoint_every": len(selective) and 1, "checkpoint_selectively": bool(selective)}
            engine = make_engine(world, kind, precision="bf16", float8=recipe, **options)
            draw_weights(engine, MODEL, seed=1)
            found[name, recipe] = train_steps(engine, world, range(6))[-1]
    return found


ALONE = ["fsdp", "fsdp selective", "zero1", "zero1 selective"]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "names"), [(1, ALONE), (2, ["zero2", "zero3 selective", "fsdp"])])
def test_every_engine_trains_in_float8(size: int, names: list[str], tmp_path: Path) -> None:
    found = run_ranks(float8_losses, size, tmp_path, names)[0]
    plain = found[names[0], "none"]
    for recipe in RECIPES:
        losses = [found[name, recipe] for name in names]
        assert max(losses) - min(losses) < 1e-4, found
        assert 0 < abs(losses[0] - plain) < 5e-3, found


@pytest.mark.parametrize(
    ("changes", "precision", "canonical", "message"),
    [
        ({}, "fp32", False, "float8=rowwise with precision=fp32: precision=bf16 is needed"),
        ({}, "bf16", True, "float8=rowwise with determinism=canonical is not covered"),
        ({"mlp_size": 100}, "bf16", False, "float8=rowwise: model.mlp_size is 100, a multiple of 16 is needed"),
        (
            {"hidden_size": 48, "num_heads": 6, "num_kv_heads": 1, "mlp_size": 96}, "bf16", False,
            "float8=rowwise: model.num_kv_heads x head size is 8, a multiple of 16 is needed",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(changes: dict[str, Any], precision: Precision, canonical: bool, message: str) -> None:
    model = ModelConfig.model_validate(MODEL.model_dump() | changes)
    with pytest.raises(UserError) as caught:
        refuse_float8("rowwise", model, precision, canonical=canonical, seq_len=1008)
    assert str(caught.value) == message
    refuse_float8("none", model, precision, canonical=canonical)


def test_samples_of_a_length_that_no_gpu_multiplies_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        refuse_float8("rowwise", MODEL, "bf16", canonical=False, seq_len=1000)
    assert str(caught.value) == "float8=rowwise: data.seq_len is 1000, a multiple of 16 is needed"


class CountsProducts(TorchDispatchMode):
    """Counts matrix products on the way to the device."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten.mm.default  # of float8 factors: a tensor class of torchao's
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("contexts", "products"), [(noop_context_fn, 4), (keep_products, 3)])
def test_selective_checkpointing_keeps_float8_products(contexts: Any, products: int) -> None:
    """A GPU's own products, on torch's meta device: forward, two gradients, and again the forward where it is not kept."""
    blocks = nn.ModuleList([nn.Linear(64, 96, bias=False, dtype=torch.bfloat16, device="meta")])
    use_float8(blocks, "tensorwise", emulate=False)
    x = torch.randn(32, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with CountsProducts() as count:
        checkpoint(blocks[0], x, use_reentrant=False, context_fn=contexts).sum().backward()
    assert count.calls == products


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"float8=tensorwise needs torchao: pip install -c constraints\.txt '\.\[float8\]'"):
        refuse_float8("tensorwise", MODEL, "bf16", canonical=False)


def test_a_gpu_without_float8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    with pytest.raises(UserError, match=r"float8=tensorwise: NVIDIA A100 has compute capability 8\.0, 8\.9 is needed"):
        refuse_float8("tensorwise", MODEL, "bf16", canonical=False)
