"""Training steps on CPU: MegaGPT against a hand-written loop and what a user would pick instead, CPU seconds per step.

    python -m bench.training.compare                      every cell below, three times: more than an hour on 2 cores
    python -m bench.training.compare cells=one_fp32 repetitions=5      this cell anew; the others stay in the result file
    python -m bench.training.compare short=true           one tiny cell, to see that it works

Same model (Llama family), same samples in the same order, same fused AdamW, clipping, precision and logging for all; each
contender is the library's own entry point in an environment of its own. A hook on torch's optimizers takes the time at the end
of each update. Contenders of a cell take turns on the cores in slices of 2 s (bench/training/turns.py), so ratios hold although
times may not. Every ratio is to the bare loop of the same cell: medians over steps, with the spread over repetitions.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import peer_python, peer_versions
from bench.training.turns import Contender, Outcome, run_turn_about
from bench.training.write_data import write_data
from megagpt.measurement import PROJECT, RESULTS, commit, spread, write_results
from megagpt.model.gpt import GPT, ModelConfig, initialise

TORCH = "torch==2.13.0"
OURS = ("pydantic", "PyYAML", "numpy==2.4.6", "xxhash", "tqdm", "zstandard", "orjson")
PEERS: dict[str, tuple[str, ...]] = {
    "transformers": (
        TORCH,
        "transformers==5.23.0",
        "accelerate==1.15.0",
        "deepspeed==0.19.8",
        "datasets==5.2.0",
        "numpy==2.4.6",
    ),
    "lightning": (TORCH, "lightning==2.6.6", *OURS),
    "litgpt": (TORCH, "litgpt==0.5.13", "numpy==2.4.6", "requests"),
}
"""Each peer's environment. Lightning's also holds what our model class imports."""

WHY = (
    "Differences below about 4 % lie within the spread of shared cores. Alone in its process, an engine of ours adds no copies "
    "to the bare loop (ZeRO 0 to 2, fsdp), and Lightning trains our own model class: there all three do the same work. In "
    "every cell ours keeps freed memory for the next step (by malloc.py: less time, a higher peak), which neither the bare "
    "loops nor a peer do. ZeRO 0 is the like of DDP; ZeRO 1 and 2 also gather the new weights from the ranks that hold them, "
    "which gloo copies through the loopback, and are to be compared with the Trainer's. ZeRO 3 gathers and frees each module's "
    "weights by hooks in Python; its like is the Trainer's ZeRO 3."
)
NOT_RUN = (
    "Not run: torchtitan 0.3.0, which has no CPU device: `python -m torchtitan.train --module llama3 --config "
    "llama3_debugmodel`, with torch 2.13.0+cpu and triton (without which it cannot be imported), falls back to the device type "
    "cuda and ends in its trainer's torch.cuda.set_device. litgpt has no CPU strategy for several processes (its FSDP wants "
    "GPUs), Lightning's FSDP likewise; accelerate, asked for FSDP2 by the Trainer, uses DDP on a CPU without a word: the peer "
    "of our fsdp on two processes is a loop with torch's fully_shard written by hand."
)

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 1024, "num_layers": 2, "num_heads": 2, "hidden_size": 64, "mlp_size": 192},
    "10M": {"vocab_size": 8192, "num_layers": 6, "num_heads": 5, "hidden_size": 320, "mlp_size": 896},
    "50M": {"vocab_size": 8192, "num_layers": 9, "num_heads": 10, "hidden_size": 640, "mlp_size": 1728},
}
SEQ_LEN = 256


@dataclass(frozen=True)
class Cell:
    """Contenders that are compared with one another: name -> (program, layout)."""

    model: str
    precision: str
    contenders: dict[str, tuple[str, str]]
    ranks: int = 1
    compile: bool = False
    steps: int = 11
    micro_batch_size: int = 4
    what: str = ""
    """Further words for the title."""


BARE = "bare torch loop"
ALONE = {
    BARE: ("torch", "ddp"),
    "megagpt, deepspeed ZeRO-1": ("megagpt", "zero1"),
    "megagpt, fsdp": ("megagpt", "fsdp"),
    "transformers Trainer": ("transformers", "ddp"),
    "Lightning": ("lightning", "ddp"),
    "litgpt": ("litgpt", "ddp"),
}
ALONE_FP32 = {BARE: ALONE[BARE], "megagpt, deepspeed ZeRO-0": ("megagpt", "zero0"), **ALONE}
"""Stage 0 is refused in bf16."""
OURS_ALONE = {name: ALONE_FP32[name] for name in ALONE_FP32 if name.startswith(("megagpt", "bare"))}
COMPILED = {name: ALONE_FP32[name] for name in ALONE_FP32 if name != "Lightning"}
COMPILED_BF16 = {name: ALONE[name] for name in ALONE if name != "Lightning"}
REPLICATED_BF16 = {
    "bare torch loop, DDP": ("torch", "ddp"),
    "megagpt, deepspeed ZeRO-1": ("megagpt", "zero1"),
    "megagpt, deepspeed ZeRO-2": ("megagpt", "zero2"),
    "transformers Trainer, DDP": ("transformers", "ddp"),
    "transformers Trainer, DeepSpeed ZeRO-1": ("transformers", "zero1"),
    "transformers Trainer, DeepSpeed ZeRO-2": ("transformers", "zero2"),
}
WHOLE = {"bare torch loop, DDP": ("torch", "ddp"), "megagpt, deepspeed ZeRO-0": ("megagpt", "zero0")}
REPLICATED = {**WHOLE, **REPLICATED_BF16}
SHARDED = {
    "bare torch loop, FSDP2": ("torch", "fsdp"),
    "megagpt, deepspeed ZeRO-3": ("megagpt", "zero3"),
    "megagpt, fsdp": ("megagpt", "fsdp"),
    "transformers Trainer, DeepSpeed ZeRO-3": ("transformers", "zero3"),
}
LARGE_REPLICATED = {
    **WHOLE,
    "megagpt, deepspeed ZeRO-1": ("megagpt", "zero1"),
    "transformers Trainer, DDP": ("transformers", "ddp"),
    "transformers Trainer, DeepSpeed ZeRO-1": ("transformers", "zero1"),
}
"""All contenders of a cell are in memory at once: 2.1 to 2.5 GiB for each of these processes."""
LARGE_SHARDED = {"bare torch loop, FSDP2": ("torch", "fsdp"), "megagpt, fsdp": ("megagpt", "fsdp")}
CELLS: dict[str, Cell] = {
    "one_fp32": Cell("10M", "fp32", ALONE_FP32),
    "one_fp32_batch16": Cell("10M", "fp32", OURS_ALONE, steps=6, micro_batch_size=16),
    "one_bf16": Cell("10M", "bf16", ALONE),
    "one_compiled": Cell("10M", "fp32", COMPILED, compile=True),
    "one_bf16_compiled": Cell("10M", "bf16", COMPILED_BF16, compile=True),
    "large_fp32": Cell("50M", "fp32", ALONE_FP32, steps=5),
    "large_bf16": Cell("50M", "bf16", ALONE, steps=5),
    "large_compiled": Cell("50M", "fp32", COMPILED, compile=True, steps=5),
    "two_replicated": Cell("10M", "fp32", REPLICATED, ranks=2, steps=9, what="weights whole on both"),
    "two_sharded": Cell("10M", "fp32", SHARDED, ranks=2, steps=9, what="weights sharded"),
    "two_replicated_bf16": Cell("10M", "bf16", REPLICATED_BF16, ranks=2, steps=9, what="weights whole on both"),
    "two_sharded_bf16": Cell("10M", "bf16", SHARDED, ranks=2, steps=9, what="weights sharded"),
    "two_large": Cell("50M", "fp32", LARGE_REPLICATED, ranks=2, steps=5, what="weights whole on both"),
    "two_large_sharded": Cell("50M", "fp32", LARGE_SHARDED, ranks=2, steps=5, what="weights sharded"),
}
SHORT = {
    "tiny": Cell("tiny", "fp32", {name: ALONE[name] for name in (BARE, "megagpt, fsdp")}, steps=6),
    "tiny_peers": Cell("tiny", "fp32", ALONE, steps=6),
}
"""What `short=true` chooses from; tiny needs no environment but our own."""


def main(words: Sequence[str]) -> None:
    """Run cells; what was measured before of other cells stays in the result file."""
    options = dict(word.split("=", 1) for word in words)
    short = options.get("short") == "true"
    cells = SHORT if short else CELLS
    names = options["cells"].split(",") if "cells" in options else ["tiny"] if short else list(CELLS)
    repetitions = int(options.get("repetitions", 1 if short else 3))
    for name in names:
        rows, failed = run_cell(name, cells[name], repetitions)
        shown = f"python -m bench.training.compare cells={name} repetitions={repetitions}"
        about = f"Measured {datetime.now(UTC).date().isoformat()} by `{shown}`, commit {commit()}."
        about += f" Failed: {', '.join(failed)}." if failed else ""
        table = {"key": name, "title": title_of(cells[name]), "about": about, "rows": rows}
        if not short:
            tables = {**earlier_tables("training"), name: table}
            write_tables([tables[name] for name in cells if name in tables])


def write_tables(tables: list[dict[str, Any]]) -> None:
    """The result file, with the versions that each peer's environment has."""
    peers = {}
    for peer, requirements in PEERS.items():
        peers |= peer_versions(peer_python(peer, requirements), [r.split("==")[0] for r in requirements if "==" in r][:4])
    lost = [f"{table['title']}: {losses_explained(table['rows'])}" for table in tables if losses_explained(table["rows"])]
    results = {
        "title": "Training on CPU: time per step",
        "about": (__doc__ or "").split("\n\n", 2)[2].replace("\n", " ").strip(),
        "tables": tables,
        "lost": " ".join([*lost, *([WHY] if lost else []), NOT_RUN]),
    }
    write_results("training", results, packages=("torch", "deepspeed"), peers=peers)


def earlier_tables(name: str) -> dict[str, dict[str, Any]]:
    """Tables of the result file by their key; empty if there is none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    return {table["key"]: table for table in json.loads(path.read_text(encoding="utf-8"))["results"]["tables"]}


def title_of(cell: Cell) -> str:
    """What is the same for all of a cell."""
    compiled = ", compiled" if cell.compile else ""
    tokens = cell.micro_batch_size * SEQ_LEN
    ranks = f"{cell.ranks} process{'es' if cell.ranks > 1 else ''}"
    words = [
        f"{cell.model} parameters",
        f"{cell.precision}{compiled}",
        ranks,
        f"{tokens:,} tokens per process and step",
        cell.what,
    ]
    return ", ".join(word for word in words if word)


def run_cell(name: str, cell: Cell, repetitions: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one cell, and the contenders that failed. Raises SystemExit if ours or the floor did."""
    outcomes: dict[str, list[Outcome]] = {contender: [] for contender in cell.contenders}
    for number in range(repetitions):
        with tempfile.TemporaryDirectory(prefix="bench_training_") as folder:
            seen, failures = run_turn_about(prepare(cell, Path(folder)), Path(folder) / "runs")
        for contender, reason in failures.items():
            print(f"{name}: {contender} failed: {reason}", file=sys.stderr, flush=True)
            if contender.startswith(("megagpt", "bare")):
                raise SystemExit(1)
            outcomes.pop(contender, None)
        for contender, outcome in seen.items():
            if contender in outcomes:
                outcomes[contender].append(outcome)
        print(f"{name}: repetition {number + 1} of {repetitions} done", flush=True)
    rows = [row_of(contender, outcomes) for contender in outcomes]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows, [contender for contender in cell.contenders if contender not in outcomes]


def row_of(name: str, outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    """One contender against the first of its cell."""
    mine, floor = outcomes[name], outcomes[next(iter(outcomes))]
    ratios = [median(a.step_cpu_s()) / median(b.step_cpu_s()) for a, b in zip(mine, floor, strict=True)]
    last = [rank["losses"][-1] for rank in mine[0].ranks if rank["losses"]]
    return {
        "contender": name,
        "step_cpu_s": median(median(outcome.step_cpu_s()) for outcome in mine),
        "ratio_to_bare_loop": spread(ratios),
        "first_step_after_s": median(outcome.start_wall_s for outcome in mine),
        "first_step_after_cpu_s": median(outcome.start_cpu_s for outcome in mine),
        "peak_rss_mib_per_process": max(rank["peak_rss_bytes"] for o in mine for rank in o.ranks) / 2**20,
        "loss": sum(last) / len(last) if last else None,
    }


def prepare(cell: Cell, folder: Path) -> list[Contender]:
    """Write the cell's data below `folder`, and one job per contender."""
    job = prepare_job(cell, folder)
    return [contender(name, program, layout, cell.ranks, job, folder) for name, (program, layout) in cell.contenders.items()]


def prepare_job(cell: Cell, folder: Path) -> dict[str, Any]:
    """Write shards, the rows in training order and initial weights below `folder`; what all contenders are told."""
    model = {"family": "llama", "seq_len": SEQ_LEN, **MODELS[cell.model]}
    gpt = GPT(ModelConfig(**model))
    initialise(gpt, seed=1)
    torch.save(gpt.state_dict(), folder / "initial.pt")
    job = {
        "model": model, "precision": cell.precision, "compile": cell.compile, "steps": cell.steps, "seq_len": SEQ_LEN,
        "micro_batch_size": cell.micro_batch_size, "lr": 3e-4, "weight_decay": 0.1, "seed": 1, "log_every_steps": 5,
        "initial_weights": str(folder / "initial.pt"), "save": False, "resumed_at": 0, "device": "cpu", "micro_batches": 1,
    }  # fmt: skip
    return write_data(folder, job, ranks=cell.ranks)


def contender(
    name: str,
    program: str,
    layout: str,
    ranks: int,
    job: dict[str, Any],
    folder: Path,
    *,
    peers: Mapping[str, Sequence[str]] = PEERS,
    package: str = "bench.training.peers",
) -> Contender:
    """Its job file and its command: `program` of `package`, in the environment that `peers` describes."""
    path = folder / f"{name}.json".replace(" ", "_")
    path.write_text(json.dumps({**job, "layout": layout, "run_dir": str(folder / "run" / name)}), encoding="utf-8")
    python = peer_python(program, peers[program]) if program in peers else Path(sys.executable)
    environment = {
        "PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'bench'}",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",  # DeepSpeed builds an extension with its own ninja
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor" / name.replace(" ", "_")),
        **({} if job["compile"] else {"TORCHDYNAMO_DISABLE": "1"}),  # litgpt compiles whatever it is told
    }
    return Contender(name, [str(python), "-m", f"{package}.{program}", str(path)], ranks, environment)


def losses_explained(rows: list[dict[str, Any]]) -> str:
    """A sentence per engine of ours that a peer or the floor beats, by their ratios to the floor of the same turns."""
    sentences = []
    ratios = {row["contender"]: row["ratio_to_bare_loop"]["median"] for row in rows}
    peers = {name: ratio for name, ratio in ratios.items() if not name.startswith("megagpt")}
    for name, mine in ratios.items():
        shares = [f"{mine / ratio - 1:.1%} more than {peer}" for peer, ratio in peers.items() if ratio < mine]
        if shares and name not in peers:
            sentences.append(f"{name} takes {', '.join(shares)}.")
    return " ".join(sentences)


if __name__ == "__main__":
    main(sys.argv[1:])
