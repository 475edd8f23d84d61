"""Megatron Core's side of bench/data/loader.py; runs in an environment of its own.

    python -m bench.data.peers.megatron PREFIX CACHE_FOLDER SEQ_LEN MICRO_BATCH GLOBAL_BATCH STEPS

Opens PREFIX.bin and .idx with an empty cache of indices, builds them for one epoch, and reads batches, without attention masks.
"""

import json
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from bench.training.clock import peak_resident_bytes


def main(words: list[str]) -> None:
    """Print one JSON object."""
    prefix, cache, seq_len, micro_batch, global_batch, steps = words[0], words[1], *map(int, words[2:])
    shutil.rmtree(cache, ignore_errors=True)

    before, started, started_cpu = peak_resident_bytes(), time.perf_counter(), time.process_time()
    tokenizer = SimpleNamespace(vocab_size=50257, eod=50256, pad=50256, unique_identifiers={"name": "gpt2"})
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=seq_len, blend=([prefix], None), split="1,0,0", path_to_cache=cache, tokenizer=tokenizer,
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        allow_ambiguous_pad_tokens=True,
    )  # fmt: skip
    indexed = IndexedDataset(prefix, mmap=True)
    documents = np.arange(indexed.document_indices.shape[0] - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, prefix, documents, None, Split.train, config)
    _batch(dataset, 0, micro_batch)
    first = {
        "first_batch_s": time.perf_counter() - started,
        "first_batch_cpu_s": time.process_time() - started_cpu,
        "memory_bytes": peak_resident_bytes() - before,
    }
    started, started_cpu = time.perf_counter(), time.process_time()
    for start in range(0, steps * global_batch, micro_batch):
        _batch(dataset, start, micro_batch)
    tokens = steps * global_batch * seq_len
    cost = {
        "tokens_per_s": tokens / (time.perf_counter() - started),
        "tokens_per_cpu_s": tokens / (time.process_time() - started_cpu),
        "samples": len(dataset),
    }
    print(json.dumps(first | cost))


def _batch(dataset: GPTDataset, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    samples = [dataset[i] for i in range(start, start + count)]
    return torch.stack([sample["tokens"] for sample in samples]), torch.stack([sample["labels"] for sample in samples])


if __name__ == "__main__":
    main(sys.argv[1:])
