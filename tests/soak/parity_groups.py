"""Ranks that share samples, on every engine: 200 updates against one process, with two plain loops as the yardstick.

    python tests/soak/parity_groups.py FOLDER                             (172 cells; resumes where it was stopped)
    python tests/soak/parity_groups.py FOLDER --steps 10 --ranks 1,2           (a short form; writes no results)

Cells: every split of 1, 2 and 4 ranks into groups that share samples x {ZeRO 1, 2, 3, FSDP2, HSDP} x document mask on and off
x micro-batch sizes 3 and 5 of a batch of 12 (with 3 groups exchange by ulysses; with 5, which does not divide 12, by gather);
where every rank has its own samples also x dropout, which groups refuse. fp32, AdamW, clipping at 1, 2 layers of width 32.

Without dropout the one process is a plain loop over the whole batch, and the yardstick is the largest difference between two
plain loops that split the batch differently (all pairs of SPLITS). What dropout drops depends on the micro-batch, so there the
one process is a plain loop with the same micro-batches, and the yardstick the same loop that goes through them in other orders.
Finished cells are kept in FOLDER/cells.jsonl.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support"), str(PROJECT / "tests" / "soak")]

from parity import Weights, largest_difference, plain_optimizer, whole_weights  # noqa: E402
from ranks import run_ranks  # noqa: E402
from toy import ADAMW, DATASET, GLOBAL_BATCH_SIZE, MAX_STEPS, MODEL, at_step, make_engine  # noqa: E402

from megagpt.data.loader import step_batches  # noqa: E402
from megagpt.data.permutation import mix  # noqa: E402
from megagpt.data.sample_hash import HASH_MASK  # noqa: E402
from megagpt.distributed.mesh import with_context_parallel  # noqa: E402
from megagpt.distributed.world import World  # noqa: E402
from megagpt.engine.initial_weights import draw_weights  # noqa: E402
from megagpt.engine.optim import lr_at  # noqa: E402
from megagpt.measurement import write_results  # noqa: E402
from megagpt.model.context_parallel import ContextParallelMethod  # noqa: E402
from megagpt.model.gpt import GPT, ModelConfig, initialise  # noqa: E402

GROUPED = MODEL.model_copy(update={"num_heads": 4, "num_kv_heads": 2})
"""Four heads, so that four ranks can share samples by ulysses; fewer of keys and values, which are then repeated."""
DROPOUT = 0.1
ENGINES = ("zero1", "zero2", "zero3", "fsdp", "hsdp")
METHODS: dict[int, ContextParallelMethod] = {3: "ulysses", 5: "gather"}
"""How groups exchange, by micro-batch size."""
SPLITS = (12, 6, 5, 4, 3, 2, 1)
"""Micro-batch sizes of the plain loops; the first is the one process."""
ORDERS = ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1))
"""In which orders the plain loops with dropout go through the micro-batches."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to compute the same training."""

    ranks: int
    group: int
    engine: str
    micro_batch_size: int
    document_mask: bool
    dropout: float = 0.0


def all_cells(sizes: list[int]) -> list[Cell]:
    """The whole grid, cells of one engine and group size in a row."""
    found = []
    for size in sizes:
        for group in (n for n in (1, 2, 4) if n <= size):
            for engine in ENGINES:
                if engine == "hsdp" and size == 1:
                    continue
                for dropout in (0.0, DROPOUT) if group == 1 else (0.0,):
                    for document_mask, micro_batch_size in itertools.product((True, False), METHODS):
                        found.append(Cell(size, group, engine, micro_batch_size, document_mask, dropout))
    return found


def model_of(dropout: float) -> ModelConfig:
    """The model of a cell."""
    return GROUPED.model_copy(update={"dropout": dropout})


def seed_dropout(step: int, first_sample: int) -> None:
    """As megagpt.train.step does it: what is dropped follows from the step and the micro-batch's samples, not from the rank."""
    torch.manual_seed(mix(1, step, first_sample) & HASH_MASK)


@cache
def plain(
    steps: int, micro_batch_size: int, document_mask: bool, dropout: float, order: tuple[int, ...] = ORDERS[0]
) -> tuple[list[float], Weights]:
    """Losses and final weights of a plain torch loop on one process."""
    model = GPT(model_of(dropout))
    initialise(model, seed=1)
    optimizer, losses = plain_optimizer(model, ADAMW), []
    whole = {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": micro_batch_size, "rank": 0, "size": 1}
    for step in range(steps):
        batches, total = step_batches(DATASET, at_step(step), document_mask=document_mask, **whole), torch.zeros(())
        count = len(batches.micro_batches)
        for number in range(count) if count > len(order) else (n for n in order if n < count):
            batch = batches.micro_batches[number]
            seed_dropout(step, batch.first_sample)
            loss = model(batch.ids, batch.targets, batch.doc_lengths) / batches.num_targets
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(ADAMW, step, MAX_STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses, {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}


@cache
def yardstick(steps: int, micro_batch_size: int, document_mask: bool, dropout: float) -> tuple[float, float]:
    """The largest difference of losses and of weights between two plain loops that add the same gradients up differently."""
    if dropout:
        loops = [plain(steps, micro_batch_size, document_mask, dropout, order) for order in ORDERS]
    else:
        loops = [plain(steps, size, document_mask, 0.0) for size in SPLITS]
    pairs = [(largest_difference(a[0], b[0]), largest_of(a[1], b[1])) for a, b in itertools.combinations(loops, 2)]
    return max(loss for loss, _ in pairs), max(weight for _, weight in pairs)


def largest_of(weights: Weights, expected: Weights) -> float:
    """Largest absolute difference of a weight."""
    return max(float((weights[name] - theirs).abs().max()) for name, theirs in expected.items())


def run_cells(world: World, cells: list[Cell], steps: int) -> list[tuple[list[float], Weights]]:
    """Losses and final weights of cells of one number of ranks and group size, on these ranks."""
    shared, outcomes = with_context_parallel(world, cells[0].group), []
    for cell in cells:
        model = model_of(cell.dropout)
        options = {"micro_batch_size": cell.micro_batch_size, "method": METHODS[cell.micro_batch_size]}
        engine = make_engine(shared, cell.engine, ADAMW, model=model, **options)
        draw_weights(engine, model, seed=1)
        losses = [one_step(engine, shared, cell, step) for step in range(steps)]
        outcomes.append((losses, whole_weights(engine, world, model)))
    return outcomes


def one_step(engine: Any, world: World, cell: Cell, step: int) -> float:
    """One update; its loss, on every rank."""
    layout: dict[str, Any] = {"micro_batch_size": cell.micro_batch_size, "rank": world.dp_rank, "size": world.dp_size}
    batches = step_batches(
        DATASET, at_step(step), global_batch_size=GLOBAL_BATCH_SIZE, document_mask=cell.document_mask, **layout
    )
    (num_targets,), total = world.sum([world.counts * batches.num_targets]), torch.zeros(())
    for number, batch in enumerate(batches.micro_batches):
        seed_dropout(step, batch.first_sample)
        loss = engine.model(batch.ids, batch.targets, batch.doc_lengths) / num_targets
        engine.backward(loss, last=number == len(batches.micro_batches) - 1)
        total += loss.detach()
    assert engine.step(lr_at(ADAMW, step, MAX_STEPS), ADAMW.max_grad_norm).applied
    torch.distributed.all_reduce(total)
    return float(total)


def rows_of(cells: list[Cell], outcomes: list[tuple[list[float], Weights]], steps: int) -> Iterator[dict[str, Any]]:
    """Each cell with its differences, the yardstick's, and the larger of both ratios."""
    for cell, (losses, weights) in zip(cells, outcomes, strict=True):
        same_batches = cell.micro_batch_size if cell.dropout else SPLITS[0]
        expected, theirs = plain(steps, same_batches, cell.document_mask, cell.dropout)
        allowed = yardstick(steps, cell.micro_batch_size, cell.document_mask, cell.dropout)
        found = largest_difference(losses, expected), largest_of(weights, theirs)
        yield {
            **asdict(cell),
            "method": METHODS[cell.micro_batch_size] if cell.group > 1 else "-",
            "steps": steps,
            "loss_difference": found[0],
            "plain_loops_loss_difference": allowed[0],
            "weight_difference": found[1],
            "plain_loops_weight_difference": allowed[1],
            "ratio": max(ratio(ours, limit) for ours, limit in zip(found, allowed, strict=True)),
            "last_loss": losses[-1],
        }


def ratio(difference: float, limit: float) -> float:
    """One to the other; where the plain loops do not differ at all, any difference is infinitely much."""
    return difference / limit if limit else float("inf" if difference else 0)


def main() -> None:
    """The full form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", default="1,2,4")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kept = arguments.folder / "cells.jsonl"
    lines = kept.read_text().splitlines() if kept.exists() else []
    rows = [row for row in map(json.loads, lines) if row["steps"] == arguments.steps]
    done = {tuple(row[name] for name in Cell.__dataclass_fields__) for row in rows}
    cells = [c for c in all_cells([int(size) for size in arguments.ranks.split(",")]) if tuple(asdict(c).values()) not in done]
    for _, together in itertools.groupby(cells, lambda cell: (cell.ranks, cell.group, cell.engine)):
        part, began = list(together), time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = run_ranks(run_cells, part[0].ranks, Path(folder), part, arguments.steps, timeout_seconds=7200)[0]
        with kept.open("a") as file:
            for row in rows_of(part, outcomes, arguments.steps):
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
        print(f"{time.monotonic() - began:.0f} s", flush=True)
    if arguments.steps == 200 and arguments.ranks == "1,2,4":
        write(rows)


def write(cells: list[dict[str, Any]]) -> None:
    """The result: a row for each number of ranks, group size, documents and dropout, over all engines and splits."""
    keys = ("ranks", "group", "document_mask", "dropout")
    measures = ("loss_difference", "plain_loops_loss_difference", "weight_difference", "plain_loops_weight_difference")
    cells.sort(key=lambda cell: tuple(cell[key] for key in keys))
    rows = []
    for values, same in itertools.groupby(cells, lambda cell: tuple(cell[key] for key in keys)):
        of_it = list(same)
        largest = {f"max_{key}": max(cell[key] for cell in of_it) for key in (*measures, "ratio")}
        rows.append({**dict(zip(keys, values, strict=True)), "cells": len(of_it), **largest})
    above = [cell for cell in cells if cell["ratio"] > 2]
    results = {
        "title": "Ranks that share samples: every layout gives one loss",
        "about": " ".join((__doc__ or "").split("\n\n", 2)[2].split())
        + f" {len(cells)} cells of 200 updates: {len(cells) - len(above)} differ by at most twice the yardstick.",
        "rows": rows,
        "lost": f"{len(above)} cells differ by more than twice the yardstick." if above else "",
        "max_ratio": max(cell["ratio"] for cell in cells),
        "max_loss_difference": max(cell["loss_difference"] for cell in cells),
        "num_cells": len(cells),
        "all_cells": cells,
    }
    write_results("parity_groups", results, packages=("torch", "deepspeed"))


if __name__ == "__main__":
    main()
