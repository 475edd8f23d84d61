"""Data of the training benchmarks: text that every machine has (Python's own library), as bytes, in shards and plain rows."""

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.open_data import DataConfig, open_data
from megagpt.data.shards import Manifest, ShardWriter, write_manifest
from megagpt.tokenizer.open_tokenizer import open_tokenizer

MAX_ROWS = 8192
"""Rows written for contenders that read plain rows; they start again at the end."""


def write_data(folder: Path, job: dict[str, Any], *, ranks: int = 1) -> dict[str, Any]:
    """Write shards and rows for the job below `folder`; returns the job with their places."""
    needed = job["steps"] * job["micro_batch_size"] * job["micro_batches"] * ranks
    write_source(folder / "shards", max(needed + 8, 65) * job["seq_len"] + 1, validation=bool(job.get("evaluate_every_steps")))
    config = DataConfig.model_validate({"seq_len": job["seq_len"], "sources": {"main": {"path": str(folder / "shards")}}})
    train = open_data(config).train
    rows = np.empty((min(needed, MAX_ROWS), job["seq_len"] + 1), np.int64)
    for index in range(len(rows)):
        sample = train.sample(index)
        rows[index, :-1], rows[index, -1] = sample.inputs, sample.targets[-1]
    np.save(folder / "rows.npy", rows)
    return {**job, "shards": str(folder / "shards"), "rows": str(folder / "rows.npy")}


def write_source(folder: Path, tokens: int, *, validation: bool = False) -> None:
    """A source with a train split of at least `tokens` bytes of Python's library, repeated if need be; with `validation` every
    tenth file is in a split of its own and not trained on."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    held_out = files[::10] if validation else []
    _write_split(folder / "train", [path for path in files if path not in held_out], tokens)
    if held_out:
        _write_split(folder / "validation", held_out, sum(path.stat().st_size for path in held_out))
    open_tokenizer("bytes").save(folder / "tokenizer")


def _write_split(folder: Path, files: list[Path], tokens: int) -> None:
    texts = [path.read_bytes() for path in files]
    tokenizer, written = open_tokenizer("bytes"), 0
    with ShardWriter(folder, "shard_00000", np.dtype("uint16")) as writer:
        while written < tokens:
            for number, text in enumerate(texts):
                ids = np.append(np.frombuffer(text, np.uint8).astype(np.uint32), np.uint32(tokenizer.eot_id))
                writer.add(ids, id=f"library:{written}:{number}", source="library", text_bytes=len(text))
                written += len(ids)
                if written >= tokens:
                    break
        info = writer.close()
    write_manifest(folder, Manifest(folder.name, "uint16", 257, tokenizer.eot_id, tokenizer.fingerprint, "", (info,)))
