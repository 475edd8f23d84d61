"""How cost grows with size: loader start-up, deduplication, checkpoints, and what every rank does before and in a step.

    python -m bench.scale                                   every part, about half an hour, 20 GiB of memory, 20 GB of disk
    python -m bench.scale parts=loader,ranks,checkpoint most=200000000     sizes up to that: loader and checkpoint shorter
    python -m bench.scale short=true                        the smallest two sizes of each part

loader: a corpus of 10^6 to 10^9 documents (500 tokens each, in shards of 10^6; the files are sparse, as long as real ones) is
opened by open_data and its first step read. dedup: exact and near duplicates over 10^5 and more documents of 60 words drawn
by Zipf's law, 5 % of them near copies. checkpoint: AdamW's state of 10 M and more parameters, saved and loaded by engine fsdp.
ranks: an FSDP2 engine for 8 to 4,096 ranks on a fake process group, and one rank's samples of a step with 8 samples per rank.

The slope is d log(CPU seconds) / d log(size) between neighbours: 1 = linear, 0 = constant.
"""

import json
import math
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import run_once
from bench.training.clock import peak_resident_bytes
from bench.training.compare import earlier_tables
from megagpt.measurement import commit, write_results

DOCUMENT_TOKENS = 500
SHARD_DOCUMENTS = 1_000_000
SIZES: dict[str, list[int]] = {
    "loader": [10**6, 10**7, 10**8, 10**9],
    "dedup": [100_000, 300_000, 1_000_000, 3_000_000, 10_000_000],
    "checkpoint": [10_000_000, 50_000_000, 150_000_000, 350_000_000, 1_000_000_000],
    "ranks": [8, 64, 512, 4096],
}
UNITS = {"loader": "documents", "dedup": "documents", "checkpoint": "parameters", "ranks": "ranks"}
TITLES = {
    "loader": "Loader: open a corpus and read the first step",
    "dedup": "Deduplication of one corpus, two worker processes",
    "checkpoint": "Checkpoint of one process: save and load",
    "ranks": "One rank among many",
}

REASONS = {
    "dedup": "The keys of every band are sorted, n log n; everything else reads the text once per step.",
    "checkpoint": "Most of a save's CPU time is the kernel's (save_kernel_s), which writes, and makes room in the page cache, "
    "while the run saves. A checkpoint that does not fit into the page cache is read from disk twice (load_from_disk_gb): to "
    "be checked and to be used.",
}
"""Why a part grows faster than linearly."""


def main(words: Sequence[str]) -> None:
    """Run the parts, each size in a process of its own, and write the tables."""
    options = dict(word.split("=", 1) for word in words)
    if "child" in options:
        with tempfile.TemporaryDirectory(prefix="bench_scale_") as folder:
            result = PARTS[options["child"]](int(options["size"]), Path(folder))
        print(json.dumps({**result, "peak_rss_mib": peak_resident_bytes() / 2**20}))
        return
    parts = options.get("parts", ",".join(SIZES)).split(",")
    short, most = options.get("short") == "true", int(options.get("most", max(map(max, SIZES.values()))))
    measured = f"{datetime.now(UTC):%Y-%m-%d %H:%M}, {commit()}"
    for part in parts:
        rows = []
        for size in [size for size in SIZES[part] if size <= most][: 2 if short else None]:
            run = run_once(
                [sys.executable, "-m", "bench.scale", f"child={part}", f"size={size}"], environment={"OMP_NUM_THREADS": "1"}
            )
            rows.append({UNITS[part]: size, **run.output, "measured": measured})
            print(part, json.dumps(rows[-1]), flush=True)
        earlier = {} if short else earlier_tables("scale")
        rows = with_earlier(rows, earlier[part]["rows"] if part in earlier else [], UNITS[part])
        limit = f" most={most}" if "most" in options and most < max(SIZES[part]) else ""
        about = f"Measured by `python -m bench.scale parts={part}{limit}`."
        tables = earlier
        tables[part] = {
            "key": part, "title": TITLES[part], "about": about, "rows": with_slopes(rows, UNITS[part]),
        }  # fmt: skip
        if not short:
            write_tables([tables[part] for part in SIZES if part in tables])


def write_tables(tables: list[dict[str, Any]]) -> None:
    """The result file."""
    about = (__doc__ or "").split("\n\n", 2)[2].replace("\n", " ").strip()
    results = {"title": "How cost grows", "about": about, "tables": tables, "lost": explanation(tables)}
    write_results("scale", results, packages=("torch", "numpy"))


def with_earlier(rows: list[dict[str, Any]], earlier: list[dict[str, Any]], unit: str) -> list[dict[str, Any]]:
    """The rows, and those measured before of sizes that were not measured now; without slopes, in ascending order."""
    sizes = {row[unit] for row in rows}
    kept = [
        {key: value for key, value in row.items() if not key.endswith("slope")} for row in earlier if row[unit] not in sizes
    ]
    return sorted([*kept, *rows], key=lambda row: row[unit])


def with_slopes(rows: list[dict[str, Any]], unit: str) -> list[dict[str, Any]]:
    """Rows with a slope column behind every column of CPU seconds, empty between rows of different calls."""
    result = []
    for number, row in enumerate(rows):
        before, shown = rows[number - 1] if number else None, {}
        if before and before.get("measured") != row.get("measured"):
            before = None
        for name, value in row.items():
            shown[name] = value
            if name.endswith("cpu_s"):
                shown[f"{name.removesuffix('cpu_s')}slope"] = (
                    math.log(value / before[name]) / math.log(row[unit] / before[unit]) if before else None
                )
        result.append(shown)
    return result


def explanation(tables: list[dict[str, Any]]) -> str:
    """What grows faster than linearly between neighbouring sizes of one call, how it grows over all of them, and why."""
    sentences = []
    for table in tables:
        unit, rows = next(iter(table["rows"][0])), table["rows"]
        seen = [
            f"{part} {row[f'{part}_slope']:.2f} up to {row[unit]:,} {unit} ({whole_slope(rows, row, part):.2f} over all)"
            for row in rows
            for part in (name.removesuffix("_slope") for name in row if name.endswith("_slope"))
            if (row[f"{part}_slope"] or 0) > 1.1
        ]
        if seen:
            sentences.append(f"Above linear in {table['title']}: {'; '.join(seen)}. {REASONS.get(table['key'], '')}".strip())
    return " ".join([*sentences, "One run of each size, on shared cores."] if sentences else [])


def whole_slope(rows: list[dict[str, Any]], row: dict[str, Any], part: str) -> float:
    """The slope from the smallest to the largest size of the call that measured `row`."""
    of_call = [each for each in rows if each.get("measured") == row.get("measured")]
    (unit, smallest), largest = next(iter(of_call[0].items())), of_call[-1]
    timed = f"{part}_cpu_s"
    return math.log(largest[timed] / of_call[0][timed]) / math.log(largest[unit] / smallest)


def loader(documents: int, folder: Path) -> dict[str, float]:
    """Open a corpus of that many documents and read its first step of 64 samples of 2,048 tokens."""
    from megagpt.data.loader import Loader
    from megagpt.data.open_data import DataConfig, open_data
    from megagpt.data.state import TrainState

    make_sparse_source(folder, documents)
    values = {"seq_len": 2048, "sources": {"main": {"path": str(folder)}}}
    started, wall = time.process_time(), time.perf_counter()
    data = open_data(DataConfig.model_validate(values))
    opened = time.process_time() - started
    reader = Loader(data.train, global_batch_size=64, micro_batch_size=64, rank=0, size=1)
    reader.step(TrainState())
    result = {"open_cpu_s": opened, "first_step_cpu_s": time.process_time() - started}
    result["first_step_wall_s"] = time.perf_counter() - wall
    reader.close()
    return result


def make_sparse_source(folder: Path, documents: int) -> None:
    """A train split of shards as long as real ones, all zeros but for the index headers, and a matching manifest."""
    import xxhash

    from megagpt.data.shards import BLOCK_BYTES, MAGIC, Manifest, ShardInfo, write_manifest
    from megagpt.tokenizer.open_tokenizer import open_tokenizer

    train, tokenizer = folder / "train", open_tokenizer("bytes")
    train.mkdir(parents=True)
    infos, zeros = [], bytes(BLOCK_BYTES)
    whole = xxhash.xxh3_64_hexdigest(zeros)
    for number in range(-(-documents // SHARD_DOCUMENTS)):
        count = min(SHARD_DOCUMENTS, documents - number * SHARD_DOCUMENTS)
        name, size = f"shard_{number:05d}", count * DOCUMENT_TOKENS * 2
        index = MAGIC + struct.pack("<QBQQ", 1, 8, count, count + 1)
        index_bytes = len(index) + 12 * count + 8 * (count + 1)
        index_sha256 = _sha256_of_sparse(index, index_bytes)
        for suffix, head, length in ((".bin", b"", size), (".idx", index, index_bytes), (".docs.parquet", b"", 1)):
            with (train / f"{name}{suffix}").open("wb") as file:
                file.write(head)
                file.truncate(length)
        rest = size % BLOCK_BYTES
        blocks = whole * (size // BLOCK_BYTES) + (xxhash.xxh3_64_hexdigest(zeros[:rest]) if rest else "")
        infos.append(ShardInfo(name, count * DOCUMENT_TOKENS, count, size, size, index_bytes, 1, index_sha256, "", blocks))
    write_manifest(train, Manifest("train", "uint16", 257, tokenizer.eot_id, tokenizer.fingerprint, "", tuple(infos)))
    tokenizer.save(folder / "tokenizer")


_SPARSE_SHA256: dict[tuple[bytes, int], str] = {}


def _sha256_of_sparse(head: bytes, length: int) -> str:
    import hashlib

    key = (head, length)
    if key not in _SPARSE_SHA256:
        _SPARSE_SHA256[key] = hashlib.sha256(head + bytes(length - len(head))).hexdigest()
    return _SPARSE_SHA256[key]


def dedup(documents: int, folder: Path) -> dict[str, float]:
    """Deduplicate; the time to make the documents is not counted."""
    from megagpt.corpus.config import CorpusConfig
    from megagpt.corpus.dedup.dedup_documents import dedup_documents

    inputs = write_corpus(folder / "documents", documents)
    config = CorpusConfig.model_validate({"work_dir": str(folder / "work"), "num_workers": 2})
    before, wall = _cpu(), time.perf_counter()
    summary = dedup_documents(config.dedup, inputs, config.directory("dedup"), config)
    result = {"dedup_cpu_s": _cpu() - before, "dedup_wall_s": time.perf_counter() - wall}
    assert summary is not None
    return {**result, "documents_kept": summary.kept}


def write_corpus(folder: Path, documents: int) -> list[Path]:
    """Files of up to 50,000 documents of 60 words; every twentieth repeats its forerunner with two words changed."""
    from megagpt.documents import Document, write_documents

    rng = np.random.default_rng(0)
    words = np.array([f"w{number:x}" for number in range(50_000)])
    share = 1.0 / np.arange(1, len(words) + 1)
    cumulated = np.cumsum(share / share.sum())
    folder.mkdir(parents=True)
    paths = []
    for first in range(0, documents, 50_000):
        count = min(50_000, documents - first)
        chosen = np.searchsorted(cumulated, rng.random((count, 60))).clip(max=len(words) - 1)
        chosen[19::20] = chosen[18::20]
        chosen[19::20, 7], chosen[19::20, 41] = 1, 2
        texts = (" ".join(row) for row in words[chosen])
        paths.append(folder / f"part_{first // 50_000:05d}.jsonl.zst")
        write_documents(paths[-1], (Document(f"d{first + i}", text, "bench", None, {}) for i, text in enumerate(texts)))
    return paths


def checkpoint(parameters: int, folder: Path) -> dict[str, float]:
    """Save and load the state of the fsdp engine of one process; vocabulary and width fit the number of parameters."""
    import torch

    from megagpt.checkpoint import save_load as checkpoints
    from megagpt.data.state import TrainState
    from megagpt.distributed.world import close_world, init_world
    from megagpt.engine.build import build_engine
    from megagpt.engine.config import FSDPConfig
    from megagpt.engine.initial_weights import draw_weights
    from megagpt.engine.optim import OptimConfig
    from megagpt.files import write_json
    from megagpt.model.gpt import ModelConfig

    width = 64 * max(4, round((parameters / (12 * 12)) ** 0.5 / 64))
    layers = max(1, round((parameters - 8192 * width) / (12 * width * width)))
    model = ModelConfig(family="gpt2", vocab_size=8192, seq_len=64, num_layers=layers, num_heads=width // 64, hidden_size=width)
    world = init_world()
    try:
        engine = build_engine(model, OptimConfig(), FSDPConfig(), world, precision="fp32", micro_batch_size=1)
        draw_weights(engine, model, seed=0)
        found = sum(parameter.numel() for parameter in engine.module.parameters())
        write_json(folder / "owner.json", {"incarnation": 1})
        saver = checkpoints.Saver(folder, world, 1)
        times = {}
        for name, action in (
            ("save", lambda: saver.save(engine, TrainState(step=1), {})),
            ("load", lambda: checkpoints.restore(folder, engine, world)),
        ):
            before, wall, of_kernel, read = time.process_time(), time.perf_counter(), os.times().system, _bytes_from_disk()
            action()
            times |= {f"{name}_cpu_s": time.process_time() - before, f"{name}_kernel_s": os.times().system - of_kernel}
            times |= {f"{name}_wall_s": time.perf_counter() - wall}
        times["load_from_disk_gb"] = (_bytes_from_disk() - read) / 1e9
        written = sum(path.stat().st_size for path in folder.rglob("pieces_*"))
    finally:
        close_world()
    torch.set_num_threads(1)
    return {"parameters_built": found, "checkpoint_gb": written / 1e9, **times}


def ranks(size: int, folder: Path) -> dict[str, float]:
    """What rank 3 of so many does: build its engine (sharded over a fake process group), take its part of ten steps."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megagpt.data.loader import step_batches
    from megagpt.data.open_data import DataConfig, open_data
    from megagpt.data.state import TrainState
    from megagpt.distributed.world import World
    from megagpt.engine.build import build_engine
    from megagpt.engine.config import FSDPConfig
    from megagpt.engine.optim import OptimConfig
    from megagpt.model.gpt import ModelConfig

    make_sparse_source(folder, 10**6)
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=size)
    world = World(3, size, 0, torch.device("cpu"), "none", None)
    model = ModelConfig(vocab_size=32768, seq_len=64, num_layers=12, num_heads=8, hidden_size=512)
    before = time.process_time()
    engine = build_engine(model, OptimConfig(), FSDPConfig(), world, precision="bf16", micro_batch_size=8)
    build = time.process_time() - before
    held = sum(len(partition.data) for key, partition in engine.state().items() if key.startswith("param."))
    data = open_data(DataConfig.model_validate({"seq_len": 64, "sources": {"main": {"path": str(folder)}}}))
    layout: dict[str, Any] = {"global_batch_size": 8 * size, "micro_batch_size": 8, "rank": 3, "size": size}
    state = TrainState()
    step_batches(data.train, state, **layout)
    before = time.process_time()
    for _ in range(10):
        step_batches(data.train, state, **layout)
        state = state.advance(8 * size, 1)
    batches = (time.process_time() - before) / 10
    dist.destroy_process_group()
    return {"build_engine_cpu_s": build, "samples_of_a_step_cpu_s": batches, "parameters_held": held}


def _bytes_from_disk() -> int:
    """What this process has read and the page cache did not have."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def _cpu() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


PARTS: dict[str, Callable[[int, Path], dict[str, float]]] = {
    "loader": loader,
    "dedup": dedup,
    "checkpoint": checkpoint,
    "ranks": ranks,
}


if __name__ == "__main__":
    main(sys.argv[1:])
