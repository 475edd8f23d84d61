"""The same training on every layout, against a plain torch loop: largest differences of losses and weights.

    python tests/soak/parity.py [--ranks 1,2,4]                                         (about 20 minutes on two cores)
    python tests/soak/parity.py --steps 10 --bf16-steps 5 --canonical-steps 5           (a short form)

Cells: ranks x {ZeRO 0, 1, 2, 3, FSDP2 with both reshard policies, HSDP} x micro-batch sizes 2, 3 and 5 of a global batch of 12
(5 does not divide it; on 2 and 4 ranks some ranks then run empty micro-batches) x {fp32, bf16; ZeRO 0 is refused in bf16}.
The model has 2 layers of width 32 (toy.py); AdamW with two parameter groups, clipping at 1, peak learning rate 1e-3 after
5 steps of warm-up, then a cosine over 1,000 steps. Targets are masked so that micro-batches count differently many.

Training is chaotic: a difference in the last bit of one sum grows with every update, the faster the higher the learning rate.
How far two plain loops drift apart that only split the batch differently is measured too (`plain_split_*`): the yardstick.

With fewer than all rank counts the rows of the others stay as they are in the results.

ZeRO 1 and FSDP2 run again in canonical order: for one micro-batch size the sha256 of the final weights must be the same in all
of these cells, and the table counts how many there are.
In bf16 the plain loop has bf16 working weights and fp32 master weights, gradient sums and moments, as the engines have.
"""

import argparse
import copy
import hashlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]

from ranks import run_ranks  # noqa: E402
from toy import (  # noqa: E402
    ADAMW,
    DATASET,
    GLOBAL_BATCH_SIZE,
    MAX_STEPS,
    MODEL,
    OPTIMIZERS,
    at_step,
    engines_on,
    make_engine,
    train_steps,
)

from megagpt.data.loader import step_batches  # noqa: E402
from megagpt.distributed.world import World  # noqa: E402
from megagpt.engine.base import Engine  # noqa: E402
from megagpt.engine.build import whole_shapes  # noqa: E402
from megagpt.engine.config import Precision  # noqa: E402
from megagpt.engine.initial_weights import draw_weights  # noqa: E402
from megagpt.engine.optim import OptimConfig, build_optimizer, lr_at, parameter_groups  # noqa: E402
from megagpt.measurement import RESULTS, write_results  # noqa: E402
from megagpt.model.gpt import GPT, ModelConfig, initialise  # noqa: E402

MICRO_BATCH_SIZES = (2, 3, 5)
CANONICAL = ("zero1", "fsdp", "fsdp_kept")
"""Engines that offer canonical order; for one micro-batch size they must agree in every bit on any number of ranks."""
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to compute the same training."""

    engine: str
    micro_batch_size: int = 3
    precision: Precision = "fp32"
    optimizer: str = "adamw"
    checkpoint_every: int = 0
    canonical: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went: losses, the largest difference of a weight (absolute) from the plain loop's, sha256 of all final weights."""

    losses: list[float]
    weight_difference: float
    weights_sha256: str
    seconds: float


def plain_loop(
    optim: OptimConfig, steps: int, precision: Precision = "fp32", micro_batch_size: int = GLOBAL_BATCH_SIZE
) -> tuple[list[float], Weights]:
    """Losses and final weights of the obvious loop on one process, from fresh weights."""
    model = GPT(MODEL)
    initialise(model, seed=1)
    losses = plain_steps(model, plain_optimizer(model, optim), optim, range(steps), precision, micro_batch_size)
    return losses, {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}


def plain_steps(
    model: GPT,
    optimizer: Any,
    optim: OptimConfig,
    steps: range,
    precision: Precision = "fp32",
    micro_batch_size: int = GLOBAL_BATCH_SIZE,
) -> list[float]:
    """The loop itself, with torch's own clipping; the model's weights are the fp32 masters."""
    working = copy.deepcopy(model).bfloat16() if precision == "bf16" else model
    losses = []
    for step in steps:
        whole = {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": micro_batch_size, "rank": 0, "size": 1}
        batches = step_batches(DATASET, at_step(step), **whole)
        total = 0.0
        for batch in batches.micro_batches:
            loss = working(batch.ids, batch.targets) / batches.num_targets
            loss.backward()
            total += float(loss.detach())
            if working is not model:
                _move_gradients(working, model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, step, MAX_STEPS)
        optimizer.step()
        optimizer.zero_grad()
        if working is not model:
            working.load_state_dict(model.state_dict())
        losses.append(total)
    return losses


def _move_gradients(working: GPT, masters: GPT) -> None:
    """Add the bf16 gradients to the fp32 sums."""
    for master, parameter in zip(masters.parameters(), working.parameters(), strict=True):
        assert parameter.grad is not None
        master.grad = parameter.grad.float() + (0 if master.grad is None else master.grad)
        parameter.grad = None


def plain_optimizer(model: GPT, optim: OptimConfig) -> Any:
    """torch's own, two groups written out; the other kinds as the engines build them."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    if optim.kind == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.beta1)
    return build_optimizer(parameter_groups(model, optim), optim)


def run_cells(
    world: World, cells: list[Cell], steps: dict[Precision, int], weights: dict[tuple[str, str], Weights]
) -> list[Outcome]:
    """Train every cell on these ranks, for `steps` by precision; `weights` are the plain loop's by (precision, optimizer)."""
    outcomes = []
    for cell in cells:
        began, optim = time.perf_counter(), OPTIMIZERS[cell.optimizer]
        options = {"micro_batch_size": cell.micro_batch_size, "checkpoint_every": cell.checkpoint_every}
        engine = make_engine(world, cell.engine, optim, precision=cell.precision, canonical=cell.canonical, **options)
        draw_weights(engine, MODEL, seed=1)
        losses = train_steps(engine, world, range(steps[cell.precision]), optim, cell.micro_batch_size)
        found = whole_weights(engine, world)
        expected, digest = weights[cell.precision, cell.optimizer], hashlib.sha256()
        difference = max(float((found[name] - theirs).abs().max()) for name, theirs in expected.items())
        for name in sorted(found):
            digest.update(found[name].numpy().tobytes())
        outcomes.append(Outcome(losses, difference, digest.hexdigest(), time.perf_counter() - began))
    return outcomes


def whole_weights(engine: Engine, world: World, model: ModelConfig = MODEL) -> Weights:
    """The fp32 weights of all ranks put together, on every rank."""
    mine = {key: (partition.start, partition.data) for key, partition in engine.state().items() if key.startswith("param.")}
    whole = {name: torch.full((shape.numel(),), float("nan")) for name, shape in whole_shapes(model).items()}
    for part in world.gather(mine):
        for key, (start, data) in part.items():
            whole[key.removeprefix("param.")][start : start + len(data)] = data
    return whole


def largest_difference(losses: list[float], expected: list[float]) -> float:
    """Largest absolute difference over the steps."""
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


def all_cells(size: int) -> list[Cell]:
    """The whole table on `size` ranks."""
    return [
        Cell(engine, micro_batch_size, precision, canonical=canonical)
        for precision in ("fp32", "bf16")
        for engine in engines_on(size)
        for canonical in ((False, True) if engine in CANONICAL else (False,))
        for micro_batch_size in MICRO_BATCH_SIZES
        if not (engine == "zero0" and precision == "bf16")
    ]


def main() -> None:
    """The full form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bf16-steps", type=int, default=100)
    parser.add_argument("--canonical-steps", type=int, default=50)
    parser.add_argument("--ranks", default="1,2,4")
    arguments = parser.parse_args()
    steps: dict[Precision, int] = {"fp32": arguments.steps, "bf16": arguments.bf16_steps}
    sizes = [int(size) for size in arguments.ranks.split(",")]
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    plain: dict[tuple[Precision, int], tuple[list[float], Weights]] = {}
    for size in sizes:
        for canonical in (False, True):
            limits = {kind: min(count, arguments.canonical_steps) if canonical else count for kind, count in steps.items()}
            for kind, count in limits.items():
                if (kind, count) not in plain:
                    plain[kind, count] = plain_loop(ADAMW, count, kind)
            weights = {(kind, "adamw"): plain[kind, count][1] for kind, count in limits.items()}
            cells = [cell for cell in all_cells(size) if cell.canonical == canonical]
            with tempfile.TemporaryDirectory() as folder:
                outcomes = run_ranks(run_cells, size, Path(folder), cells, limits, weights, timeout_seconds=7200)[0]
            for cell, outcome in zip(cells, outcomes, strict=True):
                count = limits[cell.precision]
                rows.append(row_of(size, cell, outcome, count, plain[cell.precision, count][0]))
                print(rows[-1], flush=True)
    rows += [row for row in earlier_rows() if row["ranks"] not in sizes]
    rows.sort(key=lambda row: row["ranks"])
    write_results("parity", summary(rows, steps) | {"cells": rows}, packages=("torch", "deepspeed"))


def earlier_rows() -> list[dict[str, Any]]:
    """The table as it is."""
    path = RESULTS / "parity.json"
    return json.loads(path.read_text(encoding="utf-8"))["results"]["cells"] if path.exists() else []


def row_of(size: int, cell: Cell, outcome: Outcome, steps: int, expected: list[float]) -> dict[str, Any]:
    """One cell of the table."""
    return {
        "ranks": size,
        "engine": cell.engine,
        "micro_batch_size": cell.micro_batch_size,
        "precision": cell.precision,
        "order": "canonical" if cell.canonical else "any",
        "steps": steps,
        "max_loss_difference": largest_difference(outcome.losses, expected),
        "max_weight_difference": outcome.weight_difference,
        "weights_sha256": outcome.weights_sha256 if cell.canonical else None,
        "seconds": round(outcome.seconds, 2),
    }


def summary(rows: list[dict[str, Any]], steps: dict[Precision, int]) -> dict[str, Any]:
    """Largest differences by precision, and those of plain loops that split the batch differently."""
    result: dict[str, Any] = {"optimizer": ADAMW.model_dump(mode="json"), "model": MODEL.model_dump(mode="json")}
    for precision, count in steps.items():
        (losses, weights), *split = (
            plain_loop(ADAMW, count, precision, size) for size in (GLOBAL_BATCH_SIZE, *MICRO_BATCH_SIZES)
        )
        of_it = [row for row in rows if row["precision"] == precision]
        canonical = [row for row in of_it if row["order"] == "canonical"]
        result[f"{precision}_steps"], result[f"{precision}_cells"] = count, len(of_it) - len(canonical)
        for key in ("max_loss_difference", "max_weight_difference"):
            result[f"{precision}_{key}"] = max(row[key] for row in of_it if row["order"] == "any")
        result[f"{precision}_plain_split_max_loss_difference"] = max(largest_difference(other, losses) for other, _ in split)
        result[f"{precision}_plain_split_max_weight_difference"] = max(
            float((other[name] - weights[name]).abs().max()) for _, other in split for name in weights
        )
        result[f"{precision}_first_loss"], result[f"{precision}_last_loss"] = losses[0], losses[-1]
        result[f"{precision}_canonical_cells"] = len(canonical)
        result[f"{precision}_canonical_distinct_sha256_by_micro_batch_size"] = {
            size: len({row["weights_sha256"] for row in canonical if row["micro_batch_size"] == size})
            for size in MICRO_BATCH_SIZES
        }
    return result


if __name__ == "__main__":
    main()
