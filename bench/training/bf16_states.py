"""AdamW with its moments in bf16 against fp32's: the loss on held-out data, on a CPU.

    python -m bench.training.bf16_states                about 5 minutes on one core
    python -m bench.training.bf16_states steps=40       to see that it works; writes nothing

The same Llama of 0.6M parameters over bytes of Python's own library as in optimizers.py, in fp32 through train() with engine
fsdp: optim.kind=adamw and adamw_bf16_states, the same settings, each from three initial weights. What the rounding of the
moments costs in loss is to be seen against what another seed costs.
"""

import os
import sys
from collections.abc import Sequence
from statistics import mean

from bench.gpu import run as gpu
from bench.training.float8 import against
from bench.training.optimizers import DECAY, SEEDS, SMALL, STEPS, Settings, run
from megagpt.measurement import write_results

KINDS = ("adamw", "adamw_bf16_states")
LR = 5e-4


def main(words: Sequence[str]) -> None:
    """Run both from every seed and write the tables."""
    options = dict(word.split("=", 1) for word in words)
    steps = int(options.get("steps", STEPS))
    os.environ["OMP_NUM_THREADS"] = "1"
    gpu.SIZES["small"] = SMALL
    curves = {kind: [run(Settings(kind, LR, LR, DECAY), seed, steps).losses for seed in SEEDS] for kind in KINDS}
    if "steps" in options:
        return
    rows = [{"optimizer": kind, **against(curves[kind], curves["adamw"], name="adamw")} for kind in KINDS]
    points = [
        {"update": step, "validation_loss": mean(curve[step] for curve in found), "run": kind}
        for kind, found in curves.items() for step in found[0]
    ]  # fmt: skip
    results = {
        "title": "AdamW with moments in bf16: the loss",
        "about": (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip(),
        "rows": rows,
        "tables": [{"title": f"Loss on held-out files, mean of {len(SEEDS)} seeds", "rows": points}],
        "lost": "",
    }
    write_results("bf16_states", results, packages=("torch",))


if __name__ == "__main__":
    main(sys.argv[1:])
