"""AdamW and Muon to the same loss on held-out data, on a CPU: updates and CPU seconds. As bench/gpu's phase `muon`, small.

    python -m bench.training.optimizers                              some 30 minutes on one core
    python -m bench.training.optimizers kept=runs/searched.jsonl     the same; finished runs are kept there and not done again
    python -m bench.training.optimizers steps=40                     to see that it works; writes nothing

A Llama of 0.6M parameters over bytes of Python's own library, 1,024 tokens per update, every tenth file held out; fp32,
clipping at 1, constant learning rate, both through train() with engine fsdp. Both optimizers get the same search from one seed:
three learning rates of the blocks' matrices by three of all other weights (optim.lr_factors) with a decay of 0.1; while the
best pair is at the edge of what was tried, the pairs beyond that edge; then decays of 0.01 and 0.5 at the best pair. What was
best is run from three other seeds. The goal is the mean loss on held-out files that AdamW has at the end. CPU seconds to the
goal are updates times the median CPU time of an update.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench.gpu import run as gpu
from megagpt.measurement import write_results

SMALL = {"family": "llama", "vocab_size": 320, "num_layers": 3, "num_heads": 4, "hidden_size": 128, "mlp_size": 352}
STEPS = 300
MATRICES = {"adamw": (5e-4, 1e-3, 2e-3), "muon": (1e-3, 2e-3, 4e-3)}
"""Learning rates of the blocks' matrices."""
OTHERS = (5e-4, 1e-3, 2e-3)
"""Learning rates of embeddings, head and norms; adamw updates them in both."""
DECAY, OTHER_DECAYS = 0.1, (0.01, 0.5)
SEARCH_SEED, SEEDS = 1, (2, 3, 4)
TIMED_AFTER = 8
"""Updates that are not timed."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is searched."""

    optimizer: str
    matrices: float
    others: float
    decay: float

    def row(self) -> dict[str, Any]:
        """Columns of a table."""
        return {
            "optimizer": self.optimizer,
            "learning_rate_of_matrices": self.matrices,
            "learning_rate_of_others": self.others,
            "weight_decay": self.decay,
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: losses on held-out files by update, and the median CPU seconds of an update."""

    losses: dict[int, float]
    update_s: float

    @property
    def end(self) -> float:
        """The last loss; one that is not finite counts as the worst."""
        last = list(self.losses.values())[-1]
        return last if math.isfinite(last) else math.inf


def main(words: Sequence[str]) -> None:
    """Search, run what was best from the other seeds, write the tables."""
    options = dict(word.split("=", 1) for word in words)
    steps = int(options.get("steps", STEPS))
    os.environ["OMP_NUM_THREADS"] = "1"
    gpu.SIZES["small"] = SMALL
    runner = Runner(steps, Path(options["kept"]) if "kept" in options else None)
    searches = {optimizer: search(optimizer, runner) for optimizer in MATRICES}
    best = {optimizer: min(found, key=lambda s: found[s].end) for optimizer, found in searches.items()}
    runs = {optimizer: [runner.run(settings, seed) for seed in SEEDS] for optimizer, settings in best.items()}
    goal = mean(outcome.end for outcome in runs["adamw"])
    rows = [{**best[optimizer].row(), **summary(outcomes, goal)} for optimizer, outcomes in runs.items()]
    print(json.dumps(rows, indent=1))
    if "steps" in options:
        return
    searched = [
        {**settings.row(), "validation_loss_at_end": outcome.end}
        for found in searches.values() for settings, outcome in found.items()
    ]  # fmt: skip
    curves = [
        {"update": step, "validation_loss": mean(outcome.losses[step] for outcome in outcomes), "run": optimizer}
        for optimizer, outcomes in runs.items() for step in outcomes[0].losses
    ]  # fmt: skip
    results = {
        "title": "AdamW and Muon to the same loss",
        "about": (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip(),
        "rows": rows,
        "tables": [
            {"title": "The search, one seed", "rows": searched},
            {"title": f"Loss on held-out files, mean of {len(SEEDS)} seeds", "rows": curves},
        ],
        "lost": "",
    }
    write_results("optimizers", results, packages=("torch",))


@dataclass(frozen=True, slots=True)
class Runner:
    """Trains, or finds in `kept` what it has trained before."""

    steps: int
    kept: Path | None

    def run(self, settings: Settings, seed: int) -> Outcome:
        """One run; its line is added to `kept`."""
        key = {**settings.row(), "seed": seed, "steps": self.steps}
        lines = self.kept.read_text().splitlines() if self.kept and self.kept.exists() else []
        for line in map(json.loads, lines):
            if line["run"] == key:
                return Outcome({int(step): loss for step, loss in line["losses"].items()}, line["update_s"])
        outcome = run(settings, seed, self.steps)
        if self.kept:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            with self.kept.open("a") as file:
                file.write(json.dumps({"run": key, "losses": outcome.losses, "update_s": outcome.update_s}) + "\n")
        return outcome


def search(optimizer: str, runner: Runner) -> dict[Settings, Outcome]:
    """The learning rates, wider while the best are at an edge, then the decays at the best pair."""
    axes, found = [list(MATRICES[optimizer]), list(OTHERS)], dict[Settings, Outcome]()
    while True:
        for matrices, others in itertools.product(*axes):
            settings = Settings(optimizer, matrices, others, DECAY)
            if settings not in found:
                found[settings] = runner.run(settings, SEARCH_SEED)
        pair = min(found, key=lambda s: found[s].end)
        wider = [with_more(axis, chosen) for axis, chosen in zip(axes, (pair.matrices, pair.others), strict=True)]
        if wider == axes:
            break
        axes = wider
    for decay in OTHER_DECAYS:
        settings = replace(pair, decay=decay)
        found[settings] = runner.run(settings, SEARCH_SEED)
    return found


def with_more(tried: list[float], best: float) -> list[float]:
    """The values, with half of the first or twice the last where that one was best."""
    return [tried[0] / 2, *tried] if best == tried[0] else [*tried, 2 * tried[-1]] if best == tried[-1] else tried


def run(settings: Settings, seed: int, steps: int) -> Outcome:
    """Train once."""
    timing = gpu.Timing("small", 128, 8, (), steps=steps, changes={"precision": "fp32", "device": "cpu"})
    how = gpu.How(dry=False, compile=False, only=None, deadline=time.monotonic() + 3600)
    job = {
        **gpu.job_of(timing, "fsdp", how),
        "optimizer": settings.optimizer,
        "lr": settings.others,
        "lr_factors": {"blocks.*norm*": 1.0, "blocks.*": settings.matrices / settings.others},
        "weight_decay": settings.decay,
        "seed": seed,
        "evaluate_every_steps": max(1, steps // 20),
        "evaluate_max_samples": 64,
    }
    outcome = gpu.run_contender("fsdp", job, how.deadline)
    if "error" in outcome:
        raise SystemExit(f"{settings}, seed {seed}: {outcome['error']}")
    ends = outcome["step_ends_cpu_s"]
    found = Outcome(
        {int(step): loss for step, loss in outcome["validation"]},
        median(b - a for a, b in itertools.pairwise(ends[TIMED_AFTER - 1 :])),
    )
    print(settings, f"seed {seed}:", found.end, flush=True)
    return found


def summary(outcomes: Sequence[Outcome], goal: float) -> dict[str, Any]:
    """Losses at the end over the seeds, and the way to the goal of their mean curve."""
    steps = list(outcomes[0].losses)
    reached = next((step for step in steps if mean(outcome.losses[step] for outcome in outcomes) <= goal), None)
    update_s = median(outcome.update_s for outcome in outcomes)
    return {
        "validation_loss_at_end": mean(outcome.end for outcome in outcomes),
        "least_of_seeds": min(outcome.end for outcome in outcomes),
        "most_of_seeds": max(outcome.end for outcome in outcomes),
        "goal": goal,
        "updates_to_goal": reached,
        "update_s": update_s,
        "seconds_to_goal": reached * update_s if reached else None,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
