"""Every stage and rank count gives the losses of a plain torch loop on one process, and shards what it says it shards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from toy import ADABELIEF, ADAMW, ENGINES, MODEL, MUON, SGD, batch, make_engine, plain_losses, train_steps

from megagpt.engine import build_engine, draw_weights
from megagpt.model import GPT, ModelConfig, initialise
from megagpt.optim import OptimConfig
from megagpt.world import World

STEPS = 30
NAMES = ["zero0", "zero1", "zero2", "zero3", "fsdp", "fsdp_kept"]
BF16 = NAMES[1:]


def losses_of_cases(world: World, cases: list[tuple[str, OptimConfig, int]]) -> list[list[float]]:
    results = []
    for name, optim, checkpoint_every in cases:
        engine = make_engine(world, name, optim, checkpoint_every=checkpoint_every)
        draw_weights(engine, MODEL, seed=1)
        results.append(train_steps(engine, world, range(STEPS), optim))
    return results


CASES: dict[int, list[tuple[str, OptimConfig, int]]] = {
    1: [("zero0", SGD, 1), ("zero1", ADAMW, 0), ("zero3", ADAMW, 0), ("fsdp", SGD, 0)],
    2: [
        *((name, ADAMW, 0) for name in ENGINES),
        *((name, SGD, 1) for name in ENGINES if name != "fsdp_kept"),
        *((name, SGD, 2) for name in ("zero2", "fsdp_kept")),
        *((name, MUON, 0) for name in ("zero0", "fsdp")),
        *((name, ADABELIEF, 0) for name in ("zero0", "zero1", "zero2", "fsdp")),
    ],
}
"""By number of ranks: engine, optimizer (SGD shows clipping, which AdamW hides), checkpointing of every n-th block."""


@pytest.mark.slow
@pytest.mark.parametrize("size", CASES)
def test_every_engine_matches_the_plain_loop(size: int, tmp_path: Path) -> None:
    cases = CASES[size]
    results = run_ranks(losses_of_cases, size, tmp_path, cases)
    expected = {optim.kind: plain_losses(optim, STEPS) for optim in (ADAMW, SGD, MUON, ADABELIEF)}
    for (name, optim, every), losses in zip(cases, results[0], strict=True):
        difference = max(abs(a - b) for a, b in zip(losses, expected[optim.kind], strict=True))
        print(f"{size} ranks, {name}, {optim.kind}, checkpointing {every}: {difference:.2e}")
        # fp32 sums in another order move the loss by a few 1e-7; a mean of means or a wrong clip factor by 1e-3 and more
        # Muon orthogonalises in bf16 (torch.optim.Muon), where the last bits of a sum count for more
        assert difference < (5e-5 if optim is MUON else 1e-5), (size, name, optim.kind, every)


def bf16_losses(world: World, names: list[str]) -> list[tuple[list[float], set[str]]]:
    results = []
    for name in names:
        engine = make_engine(world, name, precision="bf16")
        draw_weights(engine, MODEL, seed=1)
        kinds = {str(piece.data.dtype) for piece in engine.state().values()}
        kinds |= {f"working {parameter.dtype}" for parameter in engine.module.parameters()}
        results.append((train_steps(engine, world, range(STEPS)), kinds))
    return results


@pytest.mark.slow
def test_bf16_keeps_fp32_masters_and_follows_the_fp32_loop(tmp_path: Path) -> None:
    results = run_ranks(bf16_losses, 2, tmp_path, BF16)
    expected = plain_losses(ADAMW, STEPS)
    for losses, dtypes in results[0]:
        assert dtypes in ({"torch.float32", "working torch.bfloat16"}, {"torch.float32", "working torch.float32"})
        # bf16 has 8 bits of mantissa: logits of size 1 are off by up to 4e-3, the mean loss by a few 1e-3
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-2


def held_elements(parameter: Any) -> int:
    """Elements of a working weight that this rank holds between steps."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def state_sizes(world: World, names: list[str]) -> list[dict[str, int]]:
    sizes = []
    for name in names:
        engine = make_engine(world, name)
        draw_weights(engine, MODEL, seed=1)
        flat: dict[str, int] = {"param": 0, "exp_avg": 0, "exp_avg_sq": 0}
        for key, piece in engine.state().items():
            flat[key.partition(".")[0]] += len(piece.data)
        flat["held"] = sum(held_elements(parameter) for parameter in engine.module.parameters())
        sizes.append(flat)
    return sizes


@pytest.mark.slow
def test_sharding_is_real(tmp_path: Path) -> None:
    """ZeRO 1 to 3 and FSDP: masters and moments of numel / ranks; ZeRO 3 and FSDP: the working weights too."""
    total = sum(parameter.numel() for parameter in GPT(MODEL).parameters())
    by_rank = run_ranks(state_sizes, 2, tmp_path, NAMES)
    for i, name in enumerate(NAMES):
        share = 1 if name == "zero0" else 2
        for key in ("param", "exp_avg", "exp_avg_sq"):
            held = [sizes[i][key] for sizes in by_rank]
            assert sum(held) == total * 2 // share
            assert max(held) - total / share <= 64, (name, key, held)  # partitions are aligned
        whole = name in ("zero0", "zero1", "zero2")
        assert by_rank[0][i]["held"] == (total if whole else total // 2), name


def nan_step(world: World, names: list[str]) -> list[tuple[bool, bool, bool]]:
    results = []
    for name in names:
        engine = make_engine(world, name)
        draw_weights(engine, MODEL, seed=1)
        before = {key: piece.data.clone() for key, piece in engine.state().items()}
        loss = engine.model(*batch(0, world.rank))
        engine.backward(loss * (float("nan") if world.rank == 1 else 1.0), last=True)
        result = engine.step(1e-3, 1.0)
        same = all(torch.equal(before[key], piece.data) for key, piece in engine.state().items())
        after = train_steps(engine, world, range(2))
        results.append((result.applied, same, all(value == value for value in after)))
    return results


@pytest.mark.slow
def test_a_non_finite_gradient_on_one_rank_is_applied_by_no_stage(tmp_path: Path) -> None:
    for rank in run_ranks(nan_step, 2, tmp_path, NAMES):
        assert rank == [(False, True, True)] * len(NAMES)


def test_checkpointing_saves_the_activations_it_should() -> None:
    """Bytes that autograd keeps for the backward pass: with full checkpointing each block keeps its input only."""
    kept = {}
    for every in (0, 1):
        model = GPT(MODEL, checkpoint_every=every)
        initialise(model, seed=1)
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*batch(0, 0))
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept[every] = sum(size for pointer, size in storages.items() if pointer not in weights)
        loss.backward()
    hidden = 2 * 32 * MODEL.hidden_size * len(NAMES)
    # per block at least: 2 norms' inputs, q, k, v, attention output, MLP gate, up, product: more than 10 x hidden
    assert kept[0] - kept[1] >= MODEL.num_layers * 9 * hidden
    assert kept[1] < 12 * hidden + 200_000


@pytest.mark.parametrize("value", [("bf16", 0)])
def test_what_is_inexact_is_refused(value: tuple[Any, int]) -> None:
    from megagpt.config import UserError
    from megagpt.engine import DeepSpeedConfig

    with pytest.raises(UserError, match="zero_stage=0 with precision=bf16"):
        build_engine(
            ModelConfig(vocab_size=8, seq_len=8, num_layers=1, num_heads=1, hidden_size=8),
            ADAMW,
            DeepSpeedConfig(zero_stage=0),
            None,  # type: ignore[arg-type]
            precision=value[0],
            micro_batch_size=1,
        )
