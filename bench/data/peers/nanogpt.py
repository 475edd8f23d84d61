"""nanoGPT's get_batch (github.com/karpathy/nanoGPT, train.py), for bench/data/loader.py.

    python -m bench.data.peers.nanogpt FILE.bin SEQ_LEN MICRO_BATCH GLOBAL_BATCH STEPS

The file is mapped anew for every batch, as there, so that the mapping does not grow.
"""

import json
import sys
import time

import numpy as np
import torch

from bench.training.clock import peak_resident_bytes


def main(words: list[str]) -> None:
    """Print one JSON object."""
    path, seq_len, micro_batch, global_batch, steps = words[0], *map(int, words[1:])

    def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - seq_len, (micro_batch,)).tolist()
        x = torch.stack([torch.from_numpy(data[i : i + seq_len].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in starts])
        return x, y

    before, started, started_cpu = peak_resident_bytes(), time.perf_counter(), time.process_time()
    get_batch()
    first = {
        "first_batch_s": time.perf_counter() - started,
        "first_batch_cpu_s": time.process_time() - started_cpu,
        "memory_bytes": peak_resident_bytes() - before,
    }
    started, started_cpu = time.perf_counter(), time.process_time()
    for _ in range(steps * global_batch // micro_batch):
        get_batch()
    tokens = steps * global_batch * seq_len
    cost = {
        "tokens_per_s": tokens / (time.perf_counter() - started),
        "tokens_per_cpu_s": tokens / (time.process_time() - started_cpu),
        "samples": 0,
    }
    print(json.dumps(first | cost))


if __name__ == "__main__":
    main(sys.argv[1:])
