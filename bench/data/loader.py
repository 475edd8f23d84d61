"""Start-up, memory and speed of the loader, beside Megatron Core's GPTDataset, which builds its indices first, and nanoGPT's.

    python -m bench.data.loader DATA_FOLDER [documents=20000000] [documents_alone=1000000000] [repetitions=3]

All read the same .bin, ours and Megatron's the .idx too (the format is the same): documents of lognormal length (median 400
tokens), one epoch of samples of 1,024 tokens, micro-batches of 8, one process. nanoGPT's get_batch takes random places of the
file, with repetition and without an epoch. A second corpus, ten to fifty times as large, is opened by ours alone.
The token files are sparse (all zeros): what is measured is the work around reading, block checksums of ours included, and not
the disk. Its clock starts after the imports, and so does the count of memory. Writes results/data_loader.json.
"""

import json
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.measure import peer_python, peer_versions, run_interleaved, run_once
from megagpt.measurement import PROJECT, write_results

FOLDER = PROJECT / "runs" / "bench" / "data" / "loader"
MEGATRON = ("megatron-core==0.16.1", "torch==2.13.*", "numpy", "transformers")
SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH, STEPS = 1024, 8, 64, 200
SHARD_DOCUMENTS = 250_000
"""Documents per shard of the corpus that ours opens alone."""


def make_corpus(folder: Path, gpt2: Path, *, documents: int, shards: int) -> dict[str, int]:
    """A split of `shards` equal shards in `folder`/train, with sparse token files, and the tokenizer; returns its size."""
    import xxhash

    from megagpt.data.shards import BLOCK_BYTES, MAGIC, Manifest, ShardInfo, read_manifest, write_manifest
    from megagpt.files import sha256_file
    from megagpt.tokenizer.open_tokenizer import open_tokenizer

    train = folder / "train"
    if not (train / "manifest.json").is_file():
        train.mkdir(parents=True, exist_ok=True)
        tokenizer = open_tokenizer(gpt2)
        tokenizer.save(folder / "tokenizer")
        per_shard = documents // shards
        lengths = np.minimum(np.random.default_rng(0).lognormal(np.log(400), 1, per_shard).astype(np.int64) + 1, 1 << 20)
        tokens, first = int(lengths.sum()), train / "shard_00000"
        with first.with_suffix(".idx").open("wb") as file:
            file.write(MAGIC + struct.pack("<QBQQ", 1, 8, per_shard, per_shard + 1))
            lengths.astype("<i4").tofile(file)
            (2 * np.concatenate([[0], np.cumsum(lengths)[:-1]])).astype("<i8").tofile(file)
            np.arange(per_shard + 1, dtype="<i8").tofile(file)
        with first.with_suffix(".bin").open("wb") as file:
            file.truncate(2 * tokens)
        Path(f"{first}.docs.parquet").write_bytes(b"")
        for number in range(1, shards):
            for suffix in (".bin", ".idx", ".docs.parquet"):
                os.link(f"{first}{suffix}", train / f"shard_{number:05d}{suffix}")
        whole = xxhash.xxh3_64_hexdigest(bytes(BLOCK_BYTES))
        rest = 2 * tokens % BLOCK_BYTES
        hashes = whole * (2 * tokens // BLOCK_BYTES) + (xxhash.xxh3_64_hexdigest(bytes(rest)) if rest else "")
        infos = tuple(
            ShardInfo(
                f"shard_{number:05d}", tokens, per_shard, 4 * tokens, 2 * tokens, first.with_suffix(".idx").stat().st_size, 0,
                sha256_file(first.with_suffix(".idx")), sha256_file(Path(f"{first}.docs.parquet")), hashes,
            )
            for number in range(shards)
        )  # fmt: skip
        values = ("train", "uint16", tokenizer.vocab_size, tokenizer.eot_id, tokenizer.fingerprint, "", infos)
        write_manifest(train, Manifest(*values))
    manifest = read_manifest(train)
    return {"documents": manifest.documents, "tokens": manifest.tokens, "shards": len(manifest.shards)}


def ours(folder: str, steps: int) -> dict[str, Any]:
    """One start of the loader and `steps` steps of it, measured in this process."""
    import time

    from bench.training.clock import peak_resident_bytes
    from megagpt.data.loader import Loader
    from megagpt.data.open_data import DataConfig, open_data
    from megagpt.data.state import TrainState

    before, started, started_cpu = peak_resident_bytes(), time.perf_counter(), time.process_time()
    data = open_data(DataConfig.model_validate({"sources": {"a": {"path": folder}}, "seq_len": SEQ_LEN}))
    loader = Loader(data.train, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, rank=0, size=1)
    state = TrainState()
    assert loader.step(state).micro_batches[0].ids.shape == (MICRO_BATCH, SEQ_LEN)
    first_batch = {
        "first_batch_s": time.perf_counter() - started,
        "first_batch_cpu_s": time.process_time() - started_cpu,
        "memory_bytes": peak_resident_bytes() - before,
    }
    started, started_cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        state = state.advance(GLOBAL_BATCH, 0)
        loader.step(state)
    loader.close()
    tokens = steps * GLOBAL_BATCH * SEQ_LEN
    return first_batch | {
        "tokens_per_s": tokens / (time.perf_counter() - started),
        "tokens_per_cpu_s": tokens / (time.process_time() - started_cpu),
        "samples": len(data.train),
    }


def main(words: Sequence[str]) -> None:
    """Measure, or be one of the measured processes (`ours FOLDER STEPS`)."""
    if words[0] == "ours":
        print(json.dumps(ours(words[1], int(words[2]))))
        return
    options = dict(word.split("=", 1) for word in words[1:])
    gpt2, repetitions = Path(words[0]).resolve() / "tokenizer/gpt2", int(options.get("repetitions", 3))
    count, alone = int(options.get("documents", 20_000_000)), int(options.get("documents_alone", 1_000_000_000))
    both, large = FOLDER / f"{count}", FOLDER / f"{alone}"
    sizes = make_corpus(both, gpt2, documents=count, shards=1)
    large_sizes = make_corpus(large, gpt2, documents=alone, shards=max(1, alone // SHARD_DOCUMENTS))
    python = peer_python("megatron", MEGATRON)
    me = [sys.executable, "-m", "bench.data.loader", "ours"]
    shape = [str(value) for value in (SEQ_LEN, MICRO_BATCH, GLOBAL_BATCH, STEPS)]
    commands = {
        "megagpt": [*me, str(both), str(STEPS)],
        "megatron-core": [
            str(python),
            "-m",
            "bench.data.peers.megatron",
            str(both / "train/shard_00000"),
            str(FOLDER / "cache"),
            *shape,
        ],
        "nanogpt": [sys.executable, "-m", "bench.data.peers.nanogpt", str(both / "train/shard_00000.bin"), *shape],
    }
    runs = run_interleaved(commands, repetitions, environment={"OMP_NUM_THREADS": "1"})
    figures = {name: _medians([run.output for run in found]) for name, found in runs.items()}
    results = {
        "corpus": sizes,
        "sides": figures,
        "ratios": {
            f"{key} to {peer}": round(ratio, 3)
            for peer in ("megatron-core", "nanogpt")
            for key, ratio in (
                ("first_batch", figures[peer]["first_batch_s"] / figures["megagpt"]["first_batch_s"]),
                ("tokens_per_cpu_s", figures["megagpt"]["tokens_per_cpu_s"] / figures[peer]["tokens_per_cpu_s"]),
            )
        },
        "large_corpus": large_sizes,
        "large_corpus_megagpt": _medians([run_once([*me, str(large), str(STEPS)]).output for _ in range(repetitions)]),
        "large_corpus_manifest_mib": round((large / "train/manifest.json").stat().st_size / 2**20, 1),
    }
    results["rows"] = [{"loader": name, **its} for name, its in figures.items()]
    ratios = [{"ratio": name, "value": value} for name, value in results["ratios"].items()]
    large = {**large_sizes, **results["large_corpus_megagpt"], "manifest_mib": results["large_corpus_manifest_mib"]}
    results["tables"] = [{"title": "Ratios", "rows": ratios}, {"title": "A larger corpus, by megagpt alone", "rows": [large]}]
    results["about"] = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    results["lost"] = lost(figures)
    print(json.dumps(results, indent=1))
    peers = peer_versions(python, ["megatron-core", "torch", "numpy"])
    write_results("data_loader", results, packages=["megagpt", "torch", "numpy"], peers=peers)


def lost(figures: dict[str, dict[str, float]]) -> str:
    """A sentence per figure in which a peer is ahead, and why."""
    mine, sentences = figures["megagpt"], []
    for peer, its in figures.items():
        if its["first_batch_s"] < mine["first_batch_s"]:
            sentences.append(
                f"{peer}'s first batch is there after {its['first_batch_s']:.3f} s, ours after {mine['first_batch_s']:.3f}."
            )
        if its["tokens_per_cpu_s"] > mine["tokens_per_cpu_s"]:
            sentences.append(
                f"{peer} reads {its['tokens_per_cpu_s'] / mine['tokens_per_cpu_s']:.1f} times our tokens per CPU second."
            )
    why = (
        "nanoGPT maps one file and copies from random places: it verifies no checksum, knows no documents, takes samples "
        "twice, leaves others out, and keeps no account of what it fed. Ours does each of these, and opens the index. Beside a "
        f"GPU that trains 124M parameters at 578,000 tokens/s, it needs {578_000 / mine['tokens_per_cpu_s']:.0%} of one core."
    )
    return " ".join([*sentences, why]) if sentences else ""


def _medians(outputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: float(f"{median(output[key] for output in outputs):.4g}") for key in outputs[0]}


if __name__ == "__main__":
    main(sys.argv[1:])
