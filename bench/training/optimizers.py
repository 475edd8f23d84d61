"""AdamW and Muon to the same loss on held-out data, on a CPU: updates and CPU seconds. As bench/gpu's phase `muon`, small.

    python -m bench.training.optimizers                about 5 minutes on one core
    python -m bench.training.optimizers steps=40       to see that it works; writes nothing

A Llama of 0.6M parameters over bytes of Python's own library, 1,024 tokens per update, every tenth file held out; fp32,
clipping at 1, constant learning rate, both through train() with engine fsdp. The goal is the loss on held-out files that
AdamW's best learning rate has at the end. CPU seconds to the goal are updates times the median CPU time of an update.
"""

import json
import os
import sys
import time
from collections.abc import Sequence

import gpu

from megagpt.measurement import write_results

SMALL = {"family": "llama", "vocab_size": 320, "num_layers": 3, "num_heads": 4, "hidden_size": 128, "mlp_size": 352}
LEARNING_RATES = {"adamw": (3e-4, 1e-3, 3e-3), "muon": (6e-4, 2e-3, 6e-3)}
STEPS = 300


def main(words: Sequence[str]) -> None:
    """Run all learning rates of both and write the tables."""
    options = dict(word.split("=", 1) for word in words)
    steps = int(options.get("steps", STEPS))
    os.environ["OMP_NUM_THREADS"] = "1"
    gpu.SIZES["small"] = SMALL
    timing = gpu.Timing("small", 128, 8, (), steps=steps, changes={"precision": "fp32", "device": "cpu"})
    how = gpu.How(dry=False, compile=False, only=None, deadline=time.monotonic() + 3600)
    found = gpu.time_to_loss(timing, how, LEARNING_RATES)
    print(json.dumps(found["rows"], indent=1), found["not_run"])
    if "steps" in options:
        return
    results = {
        "title": "AdamW and Muon to the same loss",
        "about": (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip(),
        "rows": found["rows"],
        "tables": [{"title": "Loss on held-out files", "rows": found["curves"]}],
        "lost": "",
    }
    write_results("optimizers", results, packages=("torch",))


if __name__ == "__main__":
    main(sys.argv[1:])
