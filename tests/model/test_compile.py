"""Compiled blocks have no graph break: not on the bare model (test_model.py), and not under FSDP2 and ZeRO 1 either.

Under ZeRO 3 DeepSpeed's hooks cut the graph of every module: 38 breaks on this model of two blocks (torch 2.13, DeepSpeed
0.19.8; put "zero3" into ENGINES to see them).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch._dynamo.utils import counters
from toy import MODEL, make_engine, train_steps

from megagpt.data.loader import MicroBatch, filled_up
from megagpt.distributed.world import World
from megagpt.documents import IGNORE
from megagpt.engine.initial_weights import draw_weights
from megagpt.evaluate.loss import evaluation_mode
from megagpt.model.gpt import GPT, initialise
from megagpt.train.between_steps import uncompiled

ENGINES = ["fsdp", "zero1"]


def breaks_and_losses(world: World, names: list[str]) -> dict[str, Any]:
    """By engine: graph breaks with their reasons, the losses compiled and not."""
    import warnings

    warnings.simplefilter("ignore")
    found = {}
    for name in names:
        losses = []
        for compiled in (False, True):
            counters.clear()
            engine = make_engine(world, name, compile_blocks=compiled)
            draw_weights(engine, MODEL, seed=1)
            losses.append(train_steps(engine, world, range(3)))
        found[name] = {"breaks": dict(counters["graph_break"]), "frames": dict(counters["frames"]), "losses": losses}
    return found


def rows(count: int, rows_of_targets: int | None = None) -> MicroBatch:
    """A micro-batch of `count` samples, of which some have no target."""
    ids = torch.randint(0, MODEL.vocab_size, (count, MODEL.seq_len), generator=torch.Generator().manual_seed(count))
    targets = ids.roll(-1, 1)
    targets[count if rows_of_targets is None else rows_of_targets :] = IGNORE
    return MicroBatch(ids, targets, None, 0, int((targets != IGNORE).sum()))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What was compiled before does not count, and what the test makes the compiler give up is compiled again after it."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of dynamo's own
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("full_rows", [True, False])
def test_a_run_has_one_graph_for_training_and_one_for_evaluation(full_rows: bool) -> None:
    """Over steps with a short last micro-batch and an empty one, an evaluation, a sample, and more steps."""
    model, plain = GPT(MODEL), GPT(MODEL)
    for one in (model, plain):
        initialise(one, seed=1)
    model.compile_blocks(backend="eager")

    def loss(module: GPT, batch: MicroBatch, *, fill: bool) -> torch.Tensor:
        batch = filled_up(batch, 4) if fill else batch
        return module(batch.ids, batch.targets)

    def train() -> None:
        for batch in (rows(4), rows(2), rows(1, 0)):
            found = loss(model, batch, fill=full_rows)
            found.backward()
            assert found.item() == pytest.approx(loss(plain, batch, fill=False).item(), rel=1e-5)

    train()
    with evaluation_mode(model):
        with torch.no_grad():
            for batch in (rows(4), rows(3)):
                loss(model, batch, fill=full_rows)
        with uncompiled() if full_rows else contextlib.nullcontext(), torch.no_grad():
            cache = model.new_cache(1)
            for length in (5, 1, 1):
                model(torch.zeros(1, length, dtype=torch.int64), cache=cache)
    train()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2 if full_rows else graphs > 3, graphs


@pytest.mark.slow
def test_engines_cut_no_graph(tmp_path: Path) -> None:
    found = run_ranks(breaks_and_losses, 2, tmp_path, ENGINES)[0]  # one rank alone is not sharded
    for name, result in found.items():
        print(name, result["frames"], sum(result["breaks"].values()), "graph breaks")
        plain, compiled = result["losses"]
        assert max(abs(a - b) for a, b in zip(plain, compiled, strict=True)) < 1e-4, name
        assert result["frames"]["ok"] > 0, name
        assert result["breaks"] == {}, name
