"""Training on one NVIDIA GPU: correctness first, then tokens/s and MFU of both engines and of peers, each in its own process.

    python3 -m bench.gpu.run out=$OUT phases=check,matmul,124m   a few phases per call: each ends within `limit_s` (540)
    python3 -m bench.gpu.run out=$OUT phases=124m only=fsdp,nanogpt
    python3 -m bench.gpu.run out=runs/dry dry=true   every phase with tiny shapes, on a CPU; compile=true to compile
    python -m bench.gpu.run collect=DIR   the phases' JSON files -> bench/results/gpu.json
    python -m bench.gpu.run wheels=.whl   fetch what a GPU machine without a network lacks (see WHEELS)

Phases: check (losses against a CPU), matmul (the matrix-product rate of this card), 124m, 350m, 1b3_t2048, 1b3_t4096, 8b,
trace_124m, trace_1b3 (what the time of a step goes to), fp8 (float8=tensorwise and rowwise against bf16: speed and losses),
muon (AdamW and Muon: time to a fixed loss), generation (tokens/s against transformers). Contenders: deepspeed, fsdp (MegaGPT's
engines through train()), nanogpt, transformers, litgpt, torchtitan, torch; one that cannot be imported is named in the result.
Nothing is installed, no setting of the card is touched.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.measure import run_interleaved
from bench.training.write_data import write_data
from megagpt.distributed.ports import free_port
from megagpt.engine.config import FSDPConfig
from megagpt.engine.optim import OptimConfig
from megagpt.measurement import PROJECT, machine, spread, write_results
from megagpt.model.flops import flops_per_token, utilisation
from megagpt.model.gpt import GPT, ModelConfig, initialise
from megagpt.plan.memory import plan_memory
from megagpt.plan.timeline import Job

PEAK_TFLOPS = 989.0
"""Dense bf16 of an H100 or H200 SXM, NVIDIA's data sheet."""
GPT2 = {"family": "gpt2", "vocab_size": 50304}
LLAMA = {"family": "llama", "vocab_size": 50304}
SIZES: dict[str, dict[str, Any]] = {
    "124m": {**GPT2, "num_layers": 12, "num_heads": 12, "hidden_size": 768, "mlp_size": 3072},
    "350m": {**GPT2, "num_layers": 24, "num_heads": 16, "hidden_size": 1024, "mlp_size": 4096},
    "1b3": {**LLAMA, "num_layers": 24, "num_heads": 16, "hidden_size": 2048, "mlp_size": 5504},
    "8b": {
        "family": "llama", "vocab_size": 128256, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "hidden_size": 4096,
        "mlp_size": 14336, "tied_head": False,
    },
    "tiny": {"family": "llama", "vocab_size": 512, "num_layers": 2, "num_heads": 2, "hidden_size": 64, "mlp_size": 192},
    "tiny_gpt2": {"family": "gpt2", "vocab_size": 512, "num_layers": 2, "num_heads": 2, "hidden_size": 64, "mlp_size": 256},
}  # fmt: skip
NEEDS = {
    "deepspeed": ("deepspeed",), "fsdp": (), "nanogpt": (), "torch": (), "transformers": ("transformers", "accelerate"),
    "torchtitan": ("torchtitan", "torchdata", "tyro", "datasets", "tokenizers", "tensorboard"),
    "litgpt": ("litgpt", "lightning"), "fsdp_tensorwise": ("torchao",), "fsdp_rowwise": ("torchao",),
}  # fmt: skip
"""Modules without which a contender cannot run."""
OURS = ("deepspeed", "fsdp", "fsdp_tensorwise", "fsdp_rowwise")
"""Contenders that are train() itself: its engines, and its float8 recipes."""


@dataclass(frozen=True)
class Timing:
    """One shape and how it is run."""

    size: str
    seq_len: int
    micro_batch_size: int
    contenders: tuple[str, ...]
    steps: int = 30
    micro_batches: int = 1
    checkpointing: str = "none"
    trace_from: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    """Keys of the job that differ."""


TIMINGS: dict[str, Timing] = {
    "124m": Timing("124m", 1024, 64, ("deepspeed", "fsdp", "nanogpt", "transformers"), steps=40),
    "350m": Timing("350m", 1024, 32, ("deepspeed", "fsdp", "nanogpt", "transformers"), steps=25),
    "1b3_t2048": Timing("1b3", 2048, 8, ("deepspeed", "fsdp", "transformers", "litgpt", "torchtitan"), steps=20),
    "1b3_t4096": Timing("1b3", 4096, 4, ("deepspeed", "fsdp", "transformers", "litgpt", "torchtitan"), steps=20),
    "8b": Timing("8b", 4096, 1, ("fsdp", "torchtitan"), steps=10, micro_batches=2, checkpointing="full"),
    "trace_124m": Timing("124m", 1024, 64, ("fsdp", "nanogpt"), steps=24, trace_from=15),
    "trace_1b3": Timing("1b3", 2048, 8, ("fsdp",), steps=20, trace_from=12),
    "fp8": Timing("1b3", 2048, 8, ("fsdp", "fsdp_tensorwise", "fsdp_rowwise"), steps=120, changes={"log_every_steps": 5}),
}
MUON = Timing("124m", 1024, 32, (), steps=600)
GENERATION = {"one row": (1, 16), "32 rows": (32, 16), "long prompt": (1, 3500)}
"""(rows, tokens of the prompt) of each case of the phase generation."""
LEARNING_RATES = {"adamw": (6e-4, 1.8e-3), "muon": (1e-3, 3e-3)}
"""Of the phase muon; torch's Muon with match_rms_adamw takes AdamW's rates, and bears higher ones."""
TARGETS = {"124m": 578_000, "1b3_t4096": 60_000, "8b": 11_000}
"""Tokens/s to reach, where one is set."""
TIMED_AFTER = 8
"""Steps that are not timed: compilation, allocation, clocks."""
NOTES = {
    "torchtitan": "its head is never tied to the embedding: vocabulary x width more parameters to update where ours is",
    "fsdp_tensorwise": "MFU is of bf16's peak and products",
    "fsdp_rowwise": "MFU is of bf16's peak and products",
}
"""Where a contender does not do quite what the others of its phase do."""
CHECK_STEPS = 12
CHECK_TOLERANCE = {"fp32": 2e-3, "bf16": 3e-2}
"""Largest loss difference from the CPU's fp32 run in CHECK_STEPS steps; fp32 products on a GPU may be TF32 in none of ours."""


def main(words: Sequence[str]) -> None:
    """Run phases; each writes OUT/<phase>.json as soon as it has a result."""
    options = dict(word.split("=", 1) for word in words)
    if "collect" in options:
        collect(Path(options["collect"]))
        return
    if "wheels" in options:
        fetch_wheels(Path(options["wheels"]))
        return
    dry, out = options.get("dry") == "true", Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    phases = options["phases"].split(",") if "phases" in options else ["check", "matmul", *TIMINGS, "muon", "generation"]
    only = tuple(options["only"].split(",")) if "only" in options else None
    how = How(
        dry, options.get("compile", str(not dry)).lower() == "true", only, time.monotonic() + float(options.get("limit_s", 540))
    )
    for phase in phases:
        began = time.monotonic()
        result = run_phase(phase, how)
        result |= {"phase": phase, "dry_run": dry, "machine": machine() | {"gpu": gpu_name()}, "versions": versions()}
        result["phase_s"] = time.monotonic() - began
        (out / f"{phase}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{phase}: {json.dumps(result.get('rows', result))[:3000]}", flush=True)


@dataclass(frozen=True)
class How:
    """How this call runs its phases."""

    dry: bool
    compile: bool
    only: tuple[str, ...] | None
    """Contenders to run; None = all of the phase."""
    deadline: float
    """By time.monotonic()."""

    def wanted(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the contenders that are asked for."""
        return tuple(name for name in names if self.only is None or name in self.only)


def run_phase(phase: str, how: How) -> dict[str, Any]:
    """The JSON of one phase."""
    if phase == "matmul":
        return {"rows": matrix_products(how.dry)}
    if phase == "check":
        return check(how)
    if phase == "muon":
        return time_to_loss(tiny(MUON) if how.dry else MUON, how, LEARNING_RATES)
    if phase == "generation":
        return generation(how)
    timing = replace(TIMINGS[phase], contenders=how.wanted(TIMINGS[phase].contenders))
    return time_contenders(phase, tiny(timing) if how.dry else timing, how)


def tiny(timing: Timing) -> Timing:
    """The same phase on a shape for a dry run."""
    size = "tiny_gpt2" if SIZES[timing.size]["family"] == "gpt2" else "tiny"
    trace_from = 4 if timing.trace_from else 0
    return replace(timing, size=size, seq_len=64, micro_batch_size=2, steps=TIMED_AFTER + 2, trace_from=trace_from)


def time_contenders(phase: str, timing: Timing, how: How) -> dict[str, Any]:
    """One row per contender, best first is for the reader to see; the matrix-product rate is measured before and after."""
    before = product_rate(small=timing.size.startswith("tiny"))
    rows, runs, absent = [], {}, {}
    for name in timing.contenders:
        reason = cannot_run(name) or too_large(timing)
        if reason or time.monotonic() > how.deadline:
            absent[name] = reason or "no time left in this call"
            continue
        outcome = run_contender(name, job_of(timing, name, how), how.deadline)
        if "error" in outcome:
            absent[name] = outcome["error"]
            continue
        runs[name] = outcome
        rows.append(row_of(phase, timing, name, outcome, before))
    return {"rows": rows, "not_run": absent, "matmul_tflops_before": before, "runs": runs}


def row_of(phase: str, timing: Timing, name: str, outcome: dict[str, Any], product_tflops: float) -> dict[str, Any]:
    """Throughput and MFU in three conventions, and against the measured matrix-product rate."""
    ends = outcome["step_ends_wall_s"]
    seconds = [b - a for a, b in zip(ends[TIMED_AFTER - 1 :], ends[TIMED_AFTER:], strict=False)]
    tokens = timing.seq_len * timing.micro_batch_size * timing.micro_batches
    rate = tokens * len(seconds) / sum(seconds)  # from the end of one step to the end of the last
    config = ModelConfig(**SIZES[timing.size], seq_len=timing.seq_len)
    every = 1 if timing.checkpointing == "full" else 0
    flops = flops_per_token(config, seq_len=timing.seq_len, checkpoint_every=every)
    share = utilisation(flops, rate, PEAK_TFLOPS * 1e12)
    return {
        "phase": phase,
        "contender": name,
        "seq_len": timing.seq_len,
        "micro_batch_size": timing.micro_batch_size,
        "checkpointing": timing.checkpointing,
        "tokens_per_s": rate,
        "slowest_step_over_median": max(seconds) / median(seconds),
        "target_tokens_per_s": TARGETS.get(phase),
        "mfu_full": share.full,
        "mfu_causal": share.causal,
        "mfu_hardware": share.hardware,
        "mfu_full_of_measured_products": flops.full * rate / (product_tflops * 1e12),
        "peak_gpu_gib": outcome.get("peak_gpu_bytes", 0) / 2**30,
        "loss_at_end": outcome["losses"][-1] if outcome["losses"] else None,
        "first_step_after_s": outcome["first_step_after_s"],
        "note": NOTES.get(name, ""),
    }


def job_of(timing: Timing, name: str, how: How) -> dict[str, Any]:
    """What the contender is told; see training.prepare for the CPU's."""
    return {
        "model": {**SIZES[timing.size], "seq_len": timing.seq_len},
        "precision": "bf16",
        "compile": how.compile,
        "steps": timing.steps,
        "seq_len": timing.seq_len,
        "micro_batch_size": timing.micro_batch_size,
        "micro_batches": timing.micro_batches,
        "checkpointing": timing.checkpointing,
        "lr": 3e-4,
        "weight_decay": 0.1,
        "seed": 1,
        "log_every_steps": 5,
        "trace_from": timing.trace_from,
        "layout": "zero1" if name == "deepspeed" else "fsdp" if name in OURS else "ddp",
        "float8": name.partition("_")[2] or "none",
        "save": False,
        "resumed_at": 0,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "initial_weights": None,
        **timing.changes,
    }


def run_contender(name: str, job: dict[str, Any], deadline: float) -> dict[str, Any]:
    """What its clock wrote, or {"error": why}. The data of the job is made beside it."""
    program = "megagpt" if name in OURS else name
    with tempfile.TemporaryDirectory(prefix="bench_gpu_") as temporary:
        folder = Path(temporary)
        job = write_data(folder, job)
        (folder / "job.json").write_text(json.dumps({**job, "run_dir": str(folder / "run")}), encoding="utf-8")
        paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "BENCH_READY": str(folder / "ready.json"), "BENCH_OUT": str(folder / "out.json"),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        }  # fmt: skip
        if job["trace_from"]:
            environment["BENCH_TRACE_FROM"] = str(job["trace_from"])
        if job["device"] == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", f"bench.training.peers.{program}", str(folder / "job.json")]
        started, left = time.time(), max(10.0, deadline - time.monotonic())
        try:
            done = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True, timeout=left, check=False
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not done in {left:.0f} s"}
        if done.returncode != 0:
            return {"error": f"exit status {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"}
        outcome = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        ready = json.loads((folder / "ready.json").read_text(encoding="utf-8"))
        return outcome | {"first_step_after_s": ready["at"] - started}


def cannot_run(name: str) -> str:
    """Why a contender cannot run here; empty = it can."""
    missing = [module for module in NEEDS[name] if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def too_large(timing: Timing, card_bytes: int | None = None) -> str:
    """Why a shape does not fit the card (None = the first of this machine), by the planner's arithmetic; empty = it does, or
    there is no card."""
    if card_bytes is None and not torch.cuda.is_available():
        return ""
    card_bytes = card_bytes or int(torch.cuda.get_device_properties(0).total_memory)
    model = ModelConfig(**SIZES[timing.size], seq_len=timing.seq_len)
    every = 1 if timing.checkpointing == "full" else 0
    job = Job(
        model, FSDPConfig(), OptimConfig(), "bf16", timing.micro_batch_size, timing.seq_len, 1, timing.micro_batches, every
    )
    plan = plan_memory(job)
    if plan.peak <= card_bytes:
        return ""
    return f"needs {plan.peak / 2**30:.0f} GiB with fp32 masters and states, the card has {card_bytes / 2**30:.0f} GiB"


def check(how: How) -> dict[str, Any]:
    """Losses of both engines in both precisions against a plain fp32 loop on the CPU: same weights, same samples."""
    shape = {"num_layers": 4, "num_heads": 4, "hidden_size": 256, "mlp_size": 704, "vocab_size": 1024, "family": "llama"}
    timing = Timing("tiny", 64 if how.dry else 256, 4, (), steps=CHECK_STEPS)
    job = {**job_of(timing, "torch", how), "compile": False, "log_every_steps": 1}
    job["model"] = {**(SIZES["tiny"] if how.dry else shape), "seq_len": timing.seq_len}
    reference = run_contender("torch", {**job, "device": "cpu", "precision": "fp32"}, how.deadline)
    rows, absent = [], {}
    for name in how.wanted(("deepspeed", "fsdp")):
        reason = cannot_run(name)
        for precision in ("fp32", "bf16") if not reason else ():
            for compiled in (False, True) if how.compile else (False,):
                changes = {"layout": job_of(timing, name, how)["layout"], "precision": precision, "compile": compiled}
                outcome = run_contender(name, {**job, **changes}, how.deadline)
                if "error" in outcome:
                    absent[f"{name} {precision} compile={compiled}"] = outcome["error"]
                    continue
                worst = max(abs(a - b) for a, b in zip(outcome["losses"], reference["losses"], strict=True))
                good = worst < CHECK_TOLERANCE[precision]
                rows.append(
                    {
                        "engine": name,
                        "precision": precision,
                        "compiled": compiled,
                        "largest_loss_difference": worst,
                        "good": good,
                    }
                )
        if reason:
            absent[name] = reason
    return {"rows": rows, "not_run": absent, "reference_losses": reference.get("losses"), "error": reference.get("error")}


def time_to_loss(timing: Timing, how: How, learning_rates: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """AdamW and Muon on the same data and model, each at its learning rates: updates and seconds to the loss on held-out data
    that AdamW's best has at the end."""
    curves: dict[tuple[str, float], list[tuple[int, float]]] = {}
    seconds, absent = {}, {}
    for kind, rates in learning_rates.items():
        for lr in rates:
            job = {
                **job_of(timing, "fsdp", how),
                "optimizer": kind,
                "lr": lr,
                "evaluate_every_steps": max(1, timing.steps // 20),
            }
            outcome = run_contender("fsdp", {**job, "evaluate_max_samples": 64}, how.deadline)
            if "error" in outcome:
                absent[f"{kind} {lr}"] = outcome["error"]
                continue
            curves[kind, lr] = [(int(step), loss) for step, loss in outcome["validation"]]
            ends = outcome["step_ends_wall_s" if job["device"] == "cuda" else "step_ends_cpu_s"]
            seconds[kind, lr] = median(b - a for a, b in itertools.pairwise(ends[TIMED_AFTER - 1 :]))
    goal = min((curve[-1][1] for (kind, _), curve in curves.items() if kind == "adamw"), default=float("-inf"))
    rows = []
    for (kind, lr), curve in curves.items():
        reached = next((step for step, loss in curve if loss <= goal), None)
        rows.append(
            {
                "optimizer": kind,
                "learning_rate": lr,
                "validation_loss_at_end": curve[-1][1],
                "goal": goal,
                "updates_to_goal": reached,
                "update_s": seconds[kind, lr],
                "seconds_to_goal": reached * seconds[kind, lr] if reached else None,
            }
        )
    curve_rows = [
        {"update": step, "validation_loss": loss, "run": f"{kind} {lr}"}
        for (kind, lr), curve in curves.items() for step, loss in curve
    ]  # fmt: skip
    return {"rows": rows, "curves": curve_rows, "not_run": absent}


def generation(how: How) -> dict[str, Any]:
    """Greedy generation by both with the same bf16 weights, in turn: tokens/s, and how many of the ids are the same.

    In bf16 two sums in another order may make another token the likeliest, and all after it differ.
    """
    reason, rows, absent = cannot_run("transformers"), [], {}
    if reason:
        return {"rows": rows, "not_run": {"transformers": reason}}
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="bench_gpu_") as temporary:
        job = write_model(Path(temporary), ModelConfig(**SIZES["tiny" if how.dry else "1b3"], seq_len=64 if how.dry else 4096))
        for case, (batch, prompt) in ({"two rows": (2, 16)} if how.dry else GENERATION).items():
            path = Path(temporary) / "job.json"
            path.write_text(
                json.dumps({**job, "batch": batch, "prompt": prompt, "new": 8 if how.dry else 128}), encoding="utf-8"
            )
            commands = {
                name: [sys.executable, "-m", f"bench.generation.peers.{name}", str(path)]
                for name in ("megagpt", "transformers")
            }
            try:
                left = max(10.0, how.deadline - time.monotonic())
                runs = run_interleaved(commands, 1 if how.dry else 2, environment=environment, timeout_s=left)
            except SystemExit as error:
                absent[case] = str(error)[-1500:]
                continue
            rates = {name: [run.output["tokens_per_s"] for run in mine] for name, mine in runs.items()}
            ours, theirs = (runs[name][0].output["ids"] for name in commands)
            pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
            rows.append(
                {
                    "case": case,
                    "rows": batch,
                    "prompt_tokens": prompt,
                    **{f"{name}_tokens_per_s": median(values) for name, values in rates.items()},
                    "ratio_to_transformers": spread([a / b for a, b in zip(*rates.values(), strict=True)]),
                    "share_of_equal_ids": sum(a == b for a, b in pairs) / len(pairs),
                }
            )
    return {"rows": rows, "not_run": absent}


def write_model(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Fresh weights and sizes below `folder`; what both programs are told of them."""
    model = GPT(config)
    initialise(model, seed=5)
    torch.save(model.bfloat16().state_dict(), folder / "model.pt")
    values = config.model_dump(mode="json") | {"mlp_size": config.mlp_width}
    (folder / "model.json").write_text(json.dumps(values), encoding="utf-8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"weights": str(folder / "model.pt"), "model": str(folder / "model.json"), "device": device, "dtype": "bfloat16"}


def matrix_products(dry: bool) -> list[dict[str, Any]]:
    """bf16 products of the sizes that a step is made of."""
    shapes = [(8192, 8192, 8192), (65536, 768, 3072), (16384, 2048, 5504), (16384, 4096, 14336)]
    return [
        {"rows": m, "inner": k, "columns": n, "bf16_tflops": product_rate((m, k, n), small=dry)}
        for m, k, n in ([(256, 256, 256)] if dry else shapes)
    ]


def product_rate(shape: tuple[int, int, int] = (8192, 8192, 8192), *, small: bool) -> float:
    """TFLOP/s of one bf16 product on random data, the median of repeated batches of products."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    m, k, n = (256, 256, 256) if small else shape
    a, b = torch.randn(m, k, device=device).bfloat16(), torch.randn(k, n, device=device).bfloat16()
    repeats, times = 2 if small else 10, []
    for _ in range(6):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / repeats)
    return 2 * m * k * n / median(times[2:]) / 1e12


def collect(folder: Path) -> None:
    """bench/results/gpu.json of the phases' files; dry runs are refused."""
    phases = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    dry = [each["phase"] for each in phases if each["dry_run"]]
    if dry or not phases:
        raise SystemExit(f"collect={folder}: {'dry runs: ' + ', '.join(dry) if dry else 'no phase in it'}")
    timed = [row for each in phases if each["phase"] in TIMINGS for row in each["rows"]]
    others = {each["phase"]: each for each in phases if each["phase"] not in TIMINGS}
    tables = [{"title": name, "rows": each["rows"]} for name, each in others.items()]
    tables += [
        {"title": f"{each['phase']}: where a step's time goes, {name}", "rows": trace_rows(run["trace"])}
        for each in phases for name, run in each.get("runs", {}).items() if run.get("trace")
    ]  # fmt: skip
    tables += [
        {"title": "fp8: training loss", "rows": loss_rows(each["runs"], TIMINGS["fp8"].changes["log_every_steps"])}
        for each in phases if each["phase"] == "fp8"
    ]  # fmt: skip
    absent = [f"{each['phase']} {name}: {why}" for each in phases for name, why in each.get("not_run", {}).items()]
    about = "Each contender in its own process, alone on the GPU; bf16 with fp32 master weights, moments and sums."
    results = {"title": "Training on one GPU", "about": about, "rows": timed, "tables": tables, "lost": lost(timed, absent)}
    path = write_results("gpu", results)
    document = json.loads(path.read_text(encoding="utf-8"))
    document |= {"machine": phases[0]["machine"], "versions": phases[0]["versions"]}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def trace_rows(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """Shares of the traced wall time by kind of work."""
    kinds = sorted(trace["seconds_by_kind"].items(), key=lambda pair: -pair[1])
    return [{"work": kind, "seconds": seconds, "share": seconds / trace["wall_s"]} for kind, seconds in kinds]


def loss_rows(runs: Mapping[str, Mapping[str, Any]], every: int) -> list[dict[str, Any]]:
    """One row per logged step with the training loss of each run."""
    curves = {name: run["losses"] for name, run in runs.items()}
    length = min(map(len, curves.values()), default=0)
    return [{"step": (i + 1) * every, **{name: losses[i] for name, losses in curves.items()}} for i in range(length)]


def lost(rows: Sequence[dict[str, Any]], absent: Sequence[str]) -> str:
    """A sentence per phase in which a peer or the target wins, and what did not run."""
    sentences = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        mine = [r for r in rows if r["phase"] == phase and r["contender"] in OURS]
        peers = [r for r in rows if r["phase"] == phase and r not in mine]
        best = max((r["tokens_per_s"] for r in mine), default=0.0)
        for peer in peers:
            if peer["tokens_per_s"] * 1.1 > best:
                sentences.append(f"{phase}: {best / peer['tokens_per_s']:.2f} of {peer['contender']}'s rate (goal 1.1).")
        if TARGETS.get(phase, 0) > best:
            sentences.append(f"{phase}: {best:,.0f} tokens/s of {TARGETS[phase]:,}.")
    return " ".join([*sentences, *(f"Not run: {text[:200]}." for text in absent)])


def gpu_name() -> str | None:
    """The card's name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Versions of what is there."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"torch": str(torch.__version__)}
    names = ("triton", "deepspeed", "transformers", "accelerate", "litgpt", "lightning", "torchao", "torchtitan", "torchdata")
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


WHEELS = (
    "pydantic==2.14.3", "pydantic_core==2.50.4", "annotated_types==0.8.0", "orjson==3.13.0", "zstandard==0.25.0",
    "litgpt==0.5.13", "lightning==2.6.6", "jsonargparse==4.41.0", "docstring_parser", "typeshed_client", "torchao==0.18.0",
    "torchtitan==0.2.2", "torchdata==0.11.0", "tyro==1.0.17", "typeguard==4.6.0", "datasets==4.7.0", "dill==0.4.0",
    "multiprocess==0.70.18", "httpx==0.28.1",
)  # fmt: skip
"""For a machine with torch 2.11 for Python 3.12 and the usual scientific packages; deepspeed is built beside them."""


def fetch_wheels(folder: Path) -> None:
    """Wheels for x86-64 and Python 3.12 without what they need in turn, and deepspeed and hjson built here (pure Python)."""
    platforms = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 27, 28, 31, 34)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    target = [word for platform in platforms for word in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip"]
    options = ["--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *target]
    subprocess.run([*pip, "download", "-q", *options, "-d", str(folder), *WHEELS], check=True)
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(folder), "deepspeed==0.19.8", "hjson"], check=True)
    total = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{len(list(folder.glob('*.whl')))} wheels, {total / 2**20:.1f} MiB in {folder}")
    print(f"there: python3 -m pip install --no-index --no-deps --target /tmp/site {folder}/*.whl; export PYTHONPATH=/tmp/site")


if __name__ == "__main__":
    main(sys.argv[1:])
