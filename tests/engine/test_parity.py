"""Every engine, stage and rank count gives the losses of a plain torch loop, and shards what it says it shards.

The short form of tests/soak/parity.py, whose loop and cells these are.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import Cell, Weights, largest_difference, plain_loop, run_cells
from ranks import run_ranks
from toy import (
    ADAMW,
    DATASET,
    GLOBAL_BATCH_SIZE,
    MODEL,
    OPTIMIZERS,
    at_step,
    engines_on,
    make_engine,
    offered_on,
    train_steps,
)

from megagpt.config import UserError
from megagpt.data.loader import step_batches
from megagpt.distributed.world import World
from megagpt.engine.base import Engine
from megagpt.engine.build import build_engine
from megagpt.engine.config import DeepSpeedConfig, Precision
from megagpt.engine.initial_weights import draw_weights
from megagpt.model.gpt import GPT, ModelConfig, initialise

STEPS: dict[Precision, int] = {"fp32": 10, "bf16": 6}
CELLS: dict[int, list[Cell]] = {
    1: [
        Cell("zero0", 5, optimizer="sgd", checkpoint_every=1),
        Cell("zero1", 5),
        Cell("zero1", 5, "bf16"),
        Cell("zero2", 5, "bf16", checkpoint_every=1),
        Cell("zero3", 2),
        Cell("fsdp", optimizer="sgd"),
        Cell("fsdp", 5, "bf16"),
        Cell("fsdp", 5, "bf16", checkpoint_every=1),
    ],
    2: [
        *(Cell(name, 5) for name in engines_on(2)),
        *(Cell(name, 2, "bf16") for name in engines_on(2) if name != "zero0"),
        *(Cell("fsdp_sharded_sums", 2, precision) for precision in STEPS),
        *(Cell(name, 2, optimizer="sgd", checkpoint_every=1) for name in engines_on(2) if name != "fsdp_kept"),
        *(Cell(name, 3, optimizer="sgd", checkpoint_every=2) for name in ("zero2", "fsdp_kept")),
        *(
            Cell(name, 3, optimizer=kind)
            for kind in OPTIMIZERS
            for name in ("zero0", "zero1", "zero2", "zero3", "fsdp")
            if kind not in ("adamw", "sgd") and offered_on(name, kind)
        ),
    ],
    4: [
        *(Cell(name, 5) for name in engines_on(4)),
        *(Cell(name, 3, "bf16") for name in ("zero3", "hsdp")),
        *(Cell(name, 5, optimizer="muon") for name in ("zero1", "zero3")),
    ],
}
"""By number of ranks; each optimizer of optim.py where it is offered.

SGD shows wrong clipping and scaling, which AdamW hides; 5 does not divide the batch of 12."""

# fp32 sums in another order move the loss by a few 1e-7; a mean of means or a wrong clip factor by 1e-3 and more.
# Muon orthogonalises in bf16 (torch.optim.Muon), where the last bits of a sum count for more.
# bf16 has 8 bits of mantissa: another order of sums moves the logits by up to 4e-3, the mean loss by less than 1e-3.
TOLERANCE: dict[Precision, float] = {"fp32": 5e-6, "bf16": 2e-3}
WIDER = {("fp32", "muon"): 2e-5}


@pytest.mark.slow
@pytest.mark.parametrize("size", CELLS)
def test_every_engine_matches_the_plain_loop(size: int, tmp_path: Path) -> None:
    kinds = {(cell.precision, cell.optimizer) for cell in CELLS[size]}
    plain = {kind: plain_loop(OPTIMIZERS[kind[1]], STEPS[kind[0]], kind[0]) for kind in kinds}
    weights: dict[tuple[str, str], Weights] = {kind: found for kind, (_, found) in plain.items()}
    outcomes = run_ranks(run_cells, size, tmp_path, CELLS[size], STEPS, weights)[0]
    for cell, outcome in zip(CELLS[size], outcomes, strict=True):
        kind = (cell.precision, cell.optimizer)
        difference = largest_difference(outcome.losses, plain[kind][0])
        print(f"{size} ranks, {cell}: loss {difference:.2e}, weight {outcome.weight_difference:.2e}, {outcome.seconds:.1f} s")
        assert difference < WIDER.get(kind, TOLERANCE[cell.precision]), (size, cell)


def on_two_ranks(world: World) -> list[dict[str, Any]]:
    """For every engine what a rank holds, and what a NaN on one rank does."""
    results = []
    for name in engines_on(world.size):
        engine = make_engine(world, name)
        draw_weights(engine, MODEL, seed=1)
        held: dict[str, int] = {"param": 0, "exp_avg": 0, "exp_avg_sq": 0}
        for key, partition in engine.state().items():
            held[key.partition(".")[0]] += len(partition.data)
        held["working"] = sum(working_elements(parameter) for parameter in engine.module.parameters())
        kinds = {partition.data.dtype for partition in engine.state().values()}
        results.append({"held": held, "dtypes": kinds, "nan": nan_step(engine, world), "drawn": drawn_again(engine, world)})
    return results


def working_elements(parameter: Any) -> int:
    """Elements of a working weight that this rank holds between steps."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def nan_step(engine: Any, world: World) -> tuple[bool, bool, bool]:
    """(applied, state unchanged, the next losses are finite) of an update in which rank 1 has a NaN."""
    before = {key: partition.data.clone() for key, partition in engine.state().items()}
    (batch,) = one_batch(world).micro_batches
    loss = engine.model(batch.ids, batch.targets)
    engine.backward(loss * (float("nan") if world.rank == 1 else 1.0), last=True)
    result = engine.step(1e-3, 1.0)
    same = all(torch.equal(before[key], partition.data) for key, partition in engine.state().items())
    after = train_steps(engine, world, range(2))
    return result.applied, same, all(value == value for value in after)


def drawn_again(engine: Engine, world: World) -> tuple[bool, float, float]:
    """What an evaluation leaves: (the state is the same, the loss of weights drawn anew, the same after updates in between)."""
    (batch,) = one_batch(world).micro_batches

    @torch.no_grad()
    def evaluated() -> float:
        return float(engine.model(batch.ids, batch.targets))

    before = {key: partition.data.clone() for key, partition in engine.state().items()}
    evaluated()
    after = engine.state()
    same = before.keys() == after.keys() and all(torch.equal(before[key], partition.data) for key, partition in after.items())
    draw_weights(engine, MODEL, seed=1)
    first = evaluated()
    train_steps(engine, world, range(2))
    evaluated()
    draw_weights(engine, MODEL, seed=1)
    return same, first, evaluated()


def one_batch(world: World) -> Any:
    return step_batches(
        DATASET,
        at_step(0),
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=GLOBAL_BATCH_SIZE // world.size,
        rank=world.rank,
        size=world.size,
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return run_ranks(on_two_ranks, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
def test_sharding_is_real(two_ranks: list[list[dict[str, Any]]]) -> None:
    """ZeRO 1 to 3 and FSDP: masters and moments of numel / ranks; ZeRO 3 and FSDP: the working weights too."""
    total = sum(parameter.numel() for parameter in GPT(MODEL).parameters())
    for name, *by_rank in zip(engines_on(2), *two_ranks, strict=True):
        share = 1 if name in ("zero0", "hsdp") else 2  # HSDP on two ranks is two copies
        for key in ("param", "exp_avg", "exp_avg_sq"):
            held = [facts["held"][key] for facts in by_rank]
            assert sum(held) == total * 2 // share
            assert max(held) - total / share <= 64, (name, key, held)  # partitions are aligned
        whole = name in ("zero0", "zero1", "zero2", "hsdp")
        assert by_rank[0]["held"]["working"] == (total if whole else total // 2), name
        assert by_rank[0]["dtypes"] == {torch.float32}


@pytest.mark.slow
def test_a_non_finite_gradient_on_one_rank_is_applied_by_no_stage(two_ranks: list[list[dict[str, Any]]]) -> None:
    for facts in two_ranks:
        assert [fact["nan"] for fact in facts] == [(False, True, True)] * len(engines_on(2))


@pytest.mark.slow
def test_an_evaluation_leaves_no_weights_behind(two_ranks: list[list[dict[str, Any]]]) -> None:
    """Saved or loaded after an evaluation, which has no backward pass, the partitions are what the engine computes with."""
    for facts in two_ranks:
        for name, (same, first, again) in zip(engines_on(2), [fact["drawn"] for fact in facts], strict=True):
            assert same, name
            assert first == again == facts[0]["drawn"][1], name


def test_checkpointing_saves_the_activations_it_should() -> None:
    """Bytes that autograd keeps for the backward pass: with full checkpointing each block keeps its input only."""
    kept, model_config = {}, MODEL.model_copy(update={"num_layers": 4, "num_kv_heads": None})
    ids = torch.zeros((2, MODEL.seq_len), dtype=torch.int64)
    for every in (0, 1):
        model = GPT(model_config, checkpoint_every=every)
        initialise(model, seed=1)
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids, ids)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept[every] = sum(size for pointer, size in storages.items() if pointer not in weights)
        loss.backward()
    hidden_bytes = 4 * ids.numel() * model_config.hidden_size
    # per block at least: 2 norms' inputs, q, k, v, attention output, MLP gate, up, product: more than 10 x hidden
    assert kept[0] - kept[1] >= model_config.num_layers * 10 * hidden_bytes
    # kept: the inputs of the blocks and of the last norm, what the head keeps (its gradients), and little else
    assert kept[1] < (model_config.num_layers + 5) * hidden_bytes


def test_what_is_inexact_is_refused() -> None:
    with pytest.raises(UserError, match="zero_stage=0 with precision=bf16"):
        build_engine(
            ModelConfig(vocab_size=8, seq_len=8, num_layers=1, num_heads=1, hidden_size=8),
            ADAMW,
            DeepSpeedConfig(zero_stage=0),
            None,  # type: ignore[arg-type]
            precision="bf16",
            micro_batch_size=1,
        )
