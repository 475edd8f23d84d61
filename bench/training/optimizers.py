"""AdamW and Muon to the same loss on held-out data, on a CPU: updates and CPU seconds. As bench/gpu's phase `muon`, small.

    python -m bench.training.optimizers                some 30 minutes on one core
    python -m bench.training.optimizers steps=40       to see that it works; writes nothing

A Llama of 0.6M parameters over bytes of Python's own library, 1,024 tokens per update, every tenth file held out; fp32,
clipping at 1, constant learning rate, both through train() with engine fsdp. Both optimizers get the same search from one seed:
three learning rates of the blocks' matrices by three of all other weights (optim.lr_factors) with a decay of 0.1, then
decays of 0.01 and 0.5 at the best pair. What was best is run from three other seeds. The goal is the mean loss on held-out
files that AdamW has at the end. CPU seconds to the goal are updates times the median CPU time of an update.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
    searched: dict[Settings, Outcome] = {}
    best: dict[str, Settings] = {}
    for optimizer in MATRICES:
        for matrices, others in itertools.product(MATRICES[optimizer], OTHERS):
            settings = Settings(optimizer, matrices, others, DECAY)
            searched[settings] = run(settings, SEARCH_SEED, steps)
        pair = min((s for s in searched if s.optimizer == optimizer), key=lambda s: searched[s].end)
        for decay in OTHER_DECAYS:
            settings = Settings(optimizer, pair.matrices, pair.others, decay)
            searched[settings] = run(settings, SEARCH_SEED, steps)
        best[optimizer] = min((s for s in searched if s.optimizer == optimizer), key=lambda s: searched[s].end)
    runs = {optimizer: [run(settings, seed, steps) for seed in SEEDS] for optimizer, settings in best.items()}
    goal = mean(outcome.end for outcome in runs["adamw"])
    rows = [{**best[optimizer].row(), **summary(outcomes, goal)} for optimizer, outcomes in runs.items()]
    print(json.dumps(rows, indent=1))
    if "steps" in options:
        return
    search = [{**settings.row(), "validation_loss_at_end": outcome.end} for settings, outcome in searched.items()]
    curves = [
        {"update": step, "validation_loss": mean(outcome.losses[step] for outcome in outcomes), "run": optimizer}
        for optimizer, outcomes in runs.items() for step in outcomes[0].losses
    ]  # fmt: skip
    results = {
        "title": "AdamW and Muon to the same loss",
        "about": (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip(),
        "rows": rows,
        "tables": [
            {"title": "The search, one seed", "rows": search},
            {"title": f"Loss on held-out files, mean of {len(SEEDS)} seeds", "rows": curves},
        ],
        "lost": "",
    }
    write_results("optimizers", results, packages=("torch",))


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
