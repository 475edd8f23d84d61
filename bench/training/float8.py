"""float8 products against bf16's, emulated on a CPU: the loss on held-out data. The phase `fp8` of bench/gpu/run.py, small.

    python -m bench.training.float8                about 5 minutes on one core
    python -m bench.training.float8 steps=40       to see that it works; writes nothing

The same Llama of 0.6M parameters over bytes of Python's own library as in optimizers.py, AdamW, bf16, through train()
with engine fsdp: float8=none, tensorwise and rowwise, each from three initial weights. What float8 costs in loss is to be
seen against what another seed costs. Its speed needs a GPU: bench/gpu/run.py phases=fp8.
"""

import os
import sys
import time
from collections.abc import Sequence
from statistics import mean
from typing import Any

from bench.gpu import run as gpu
from bench.training.optimizers import SMALL, STEPS
from megagpt.measurement import write_results

CONTENDERS = {"none": "fsdp", "tensorwise": "fsdp_tensorwise", "rowwise": "fsdp_rowwise"}
SEEDS = (1, 2, 3)


def main(words: Sequence[str]) -> None:
    """Run every recipe from every seed and write the tables."""
    options = dict(word.split("=", 1) for word in words)
    steps = int(options.get("steps", STEPS))
    os.environ["OMP_NUM_THREADS"] = "1"
    gpu.SIZES["small"] = SMALL
    timing = gpu.Timing("small", 128, 8, (), steps=steps, changes={"device": "cpu", "lr": 1e-3})
    how = gpu.How(dry=False, compile=False, only=None, deadline=time.monotonic() + 3600)
    curves: dict[tuple[str, int], dict[int, float]] = {}
    for seed in SEEDS:
        for recipe, contender in CONTENDERS.items():
            job = {**gpu.job_of(timing, contender, how), "seed": seed, "evaluate_every_steps": max(1, steps // 20)}
            outcome = gpu.run_contender(contender, {**job, "evaluate_max_samples": 64}, how.deadline)
            if "error" in outcome:
                raise SystemExit(f"float8={recipe}: {outcome['error']}")
            curves[recipe, seed] = {int(step): loss for step, loss in outcome["validation"]}
            print(recipe, seed, list(curves[recipe, seed].values())[-1], flush=True)
    if "steps" in options:
        return
    last = max(curves["none", SEEDS[0]])
    rows = [
        {"float8": recipe, **against([curves[recipe, seed] for seed in SEEDS], [curves["none", seed] for seed in SEEDS])}
        for recipe in CONTENDERS
    ]
    updates = sorted(curves["none", SEEDS[0]])
    points = [
        {"update": step, "validation_loss": mean(curves[recipe, seed][step] for seed in SEEDS), "run": recipe}
        for recipe in CONTENDERS for step in updates
    ]  # fmt: skip
    results = {
        "title": "float8 and bf16: the loss",
        "about": (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip(),
        "rows": rows,
        "tables": [{"title": f"Loss on held-out files, mean of {len(SEEDS)} seeds, to update {last}", "rows": points}],
        "lost": "",
    }
    write_results("float8", results, packages=("torch", "torchao"))


def against(mine: Sequence[dict[int, float]], plain: Sequence[dict[int, float]], name: str = "bf16") -> dict[str, Any]:
    """The losses at the end by seed, and how far the whole curve is from that of `name`, `plain`, of the same seed."""
    differences = [abs(curve[step] - other[step]) for curve, other in zip(mine, plain, strict=True) for step in curve]
    ends = [list(curve.values())[-1] for curve in mine]
    return {
        "loss_at_end": mean(ends),
        "least_of_seeds": min(ends),
        "most_of_seeds": max(ends),
        f"largest_difference_to_{name}": max(differences),
        "mean_difference_at_end": mean(a - list(b.values())[-1] for a, b in zip(ends, plain, strict=True)),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
