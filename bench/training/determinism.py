"""What bitwise repeatable training costs, and that it is repeatable: determinism = none, strict, canonical.

    python -m bench.training.determinism                about 8 minutes on 2 cores
    python -m bench.training.determinism short=true     a tiny model, one repetition

Cost: CPU seconds per step of the real train() on 2 processes, 2 micro-batches each, the modes taking turns on the cores; ratios
to `none` of the same engine. Bits: the sha256 of all weights after the run, with dropout, on 1, 2 and 4 processes with the same
samples per step; `strict` is run twice on 2.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.training.compare import CELLS, Cell, contender, prepare_job
from bench.training.turns import Contender, Outcome, run_turn_about
from megagpt.checkpoint.on_disk import list_checkpoints
from megagpt.checkpoint.partitions import read_partitions
from megagpt.engine.base import Partition
from megagpt.measurement import spread, write_results
from megagpt.model.gpt import GPT, ModelConfig

ENGINES, MODES = ("zero1", "fsdp"), ("none", "strict", "canonical")
TINY = Cell("tiny", "fp32", {}, steps=8)


def main(words: Sequence[str]) -> None:
    """Run, print and write the tables."""
    short = "short=true" in words
    rows = costs(TINY if short else replace(CELLS["one_fp32"], steps=8), 1 if short else 2)
    for precision in ("fp32",) if short else ("fp32", "bf16"):
        rows += bits(replace(TINY, precision=precision), (1, 2) if short else (1, 2, 4))
    differing = [row for row in rows if row.get("same_bits") is False]
    results = {
        "title": "Deterministic training: cost and bits",
        "about": (__doc__ or "").split("\n\n", 2)[2].replace("\n", " ").strip(),
        "rows": rows,
        "lost": f"{len(differing)} runs differ in their bits." if differing else "",
    }
    if not short:
        write_results("determinism", results, packages=("torch", "deepspeed"))
    if differing:
        raise SystemExit(f"bits differ: {differing}")


def costs(cell: Cell, repetitions: int) -> list[dict[str, Any]]:
    """CPU seconds per step by engine and mode."""
    rows = []
    for engine in ENGINES:
        found: dict[str, list[Outcome]] = {mode: [] for mode in MODES}
        for _ in range(repetitions):
            with tempfile.TemporaryDirectory(prefix="bench_determinism_") as name:
                folder = Path(name)
                job = prepare_job(replace(cell, ranks=2), folder) | {"micro_batches": 2}
                runs = [_contender(mode, engine, 2, job | {"determinism": mode}, folder) for mode in MODES]
                for mode, outcome in turns(runs, folder).items():
                    found[mode].append(outcome)
        for mode in MODES:
            pairs = zip(found[mode], found["none"], strict=True)
            ratios = [median(ours.step_cpu_s()) / median(plain.step_cpu_s()) for ours, plain in pairs]
            rows.append({"engine": engine, "determinism": mode, "model": cell.model, "ratio_to_none": spread(ratios)})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def bits(cell: Cell, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The sha256 of the weights: canonical on every engine and number of processes, strict at two starts."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench_determinism_") as name:
        folder = Path(name)
        job = prepare_job(replace(cell, ranks=max(sizes)), folder)
        job["model"] |= {"dropout": 0.1}
        for mode, layouts in (
            ("canonical", [(engine, size, 0) for engine in ENGINES for size in sizes]),
            *((f"strict {engine}", [(engine, 2, start) for start in (1, 2)]) for engine in ENGINES),
        ):
            digests = []
            for engine, size, start in layouts:
                label = f"{mode}-{engine}-{size}-{start}".replace(" ", "-")
                one = job | {"determinism": mode.split()[0], "micro_batches": max(sizes) // size}
                turns([_contender(label, engine, size, one, folder)], folder)
                digests.append(weights_sha256(folder / "run" / label, job["model"]))
                rows.append({
                    "engine": engine, "determinism": mode.split()[0], "precision": cell.precision, "processes": size,
                    "weights_sha256": digests[-1][:16], "same_bits": digests[-1] == digests[0],
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
    return rows


def turns(runs: Sequence[Contender], folder: Path) -> dict[str, Outcome]:
    """All of them in turn about; none may fail."""
    outcomes, failures = run_turn_about(runs, folder / "runs")
    if failures:
        raise SystemExit("\n".join(f"{name}: {text}" for name, text in failures.items()))
    return outcomes


def weights_sha256(run_dir: Path, model: dict[str, Any]) -> str:
    """Of the fp32 weights in a run's newest checkpoint, in the order of their names."""
    gpt = GPT(ModelConfig(**model))
    views = {f"param.{name}": parameter.data.flatten() for name, parameter in gpt.named_parameters()}
    read_partitions(list_checkpoints(run_dir)[-1], {key: Partition(view, 0, view.numel()) for key, view in views.items()})
    digest = hashlib.sha256()
    for key in sorted(views):
        digest.update(views[key].numpy().tobytes())
    return digest.hexdigest()


def _contender(name: str, engine: str, ranks: int, job: dict[str, Any], folder: Path) -> Contender:
    return contender(name, "megagpt", engine, ranks, job, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
