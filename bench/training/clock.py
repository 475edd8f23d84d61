"""What every contender of compare.py runs inside its own process: a clock on the optimizer's steps, and the job's data.

Only torch and numpy are needed, so it works in each peer's environment. A hook on every torch optimizer marks the CPU and wall
time at the end of each update, whichever library drives it; nothing in the library is changed.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Clock:
    """Marks of this process at the end of each optimizer call. The first one touches the file BENCH_READY names.

    On a GPU the hook runs when the update has been launched, not when it has been done: each mark is a CUDA event too, and the
    wall times are those of the device.
    """

    def __init__(self) -> None:
        self.cpu_s: list[float] = []
        self.wall_s: list[float] = []
        self.rss_bytes: list[int] = []
        self.extra: dict[str, Any] = {}
        self._events: list[Any] | None = [] if torch.cuda.is_available() else None
        self._ready = Path(os.environ["BENCH_READY"])
        self._every = int(os.environ.get("BENCH_RSS_EVERY", "0"))
        self._trace = Trace(int(os.environ["BENCH_TRACE_FROM"])) if "BENCH_TRACE_FROM" in os.environ else None
        register_optimizer_step_post_hook(self._mark)

    def _mark(self, *_: Any) -> None:
        self.cpu_s.append(time.process_time())
        self.wall_s.append(time.perf_counter())
        if self._events is not None:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        if self._trace is not None:
            self._trace.step(len(self.cpu_s))
        if not self._ready.exists():
            self._ready.write_text(json.dumps({"cpu_s": self.cpu_s[0], "at": time.time()}), encoding="utf-8")
        if self._every and len(self.cpu_s) % self._every == 0:
            self.rss_bytes.append(resident_bytes())

    def write(self, steps: int, losses: list[float]) -> None:
        """Write what was seen to the file BENCH_OUT names. A library may call its optimizer several times per update."""
        calls = len(self.cpu_s)
        if calls == 0 or calls % steps:
            raise SystemExit(f"{calls} optimizer calls are no multiple of {steps} steps")
        per_step = calls // steps
        if self._events is not None:
            torch.cuda.synchronize()
            self.wall_s = [self.wall_s[0] + self._events[0].elapsed_time(event) / 1e3 for event in self._events]
        result = {
            "step_ends_cpu_s": self.cpu_s[per_step - 1 :: per_step],
            "step_ends_wall_s": self.wall_s[per_step - 1 :: per_step],
            "calls_per_step": per_step,
            "rss_bytes": self.rss_bytes,
            "peak_rss_bytes": peak_resident_bytes(),
            "losses": [float(loss) for loss in losses],
            **self.extra,
        }
        if torch.cuda.is_available():
            result["peak_gpu_bytes"] = max(torch.cuda.max_memory_allocated(), self.extra.get("peak_gpu_bytes", 0))
        if self._trace is not None:
            result["trace"] = self._trace.summary
        Path(os.environ["BENCH_OUT"]).write_text(json.dumps(result), encoding="utf-8")


class Trace:
    """torch's profiler over TRACED_STEPS optimizer calls from number `start` on, and what the device's time went to."""

    TRACED_STEPS = 3

    def __init__(self, start: int) -> None:
        self._start, self._profiler, self._began = start, None, 0.0
        self.summary: dict[str, Any] = {}

    def step(self, number: int) -> None:
        """Called after each optimizer call."""
        if number == self._start:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.__enter__()
            self._began = time.perf_counter()
        elif number == self._start + self.TRACED_STEPS and self._profiler is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            wall_s = time.perf_counter() - self._began
            self._profiler.__exit__(None, None, None)
            self.summary = summarise_trace(self._profiler.key_averages(), wall_s)


KINDS = (
    ("matrix products", ("gemm", "nvjet", "cutlass", "matmul", "::mm", "::addmm", "::bmm", "xmma", "wgmma")),
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("optimizer", ("adam", "foreach", "multi_tensor", "muon")),
    ("copies", ("memcpy", "copy", "cat", "memset", "fill")),
    ("communication", ("nccl", "gloo", "all_gather", "reduce_scatter", "allreduce")),
    ("compiled pointwise and norms", ("triton",)),
)
"""Kinds of work by words in the names of kernels (on a CPU: of operators), the first that fits."""


def summarise_trace(events: Any, wall_s: float) -> dict[str, Any]:
    """Seconds by kind of work and the longest entries, of the device where there is one, else of the CPU."""
    on_gpu = torch.cuda.is_available()
    entries = []
    for event in events:
        if on_gpu and "CUDA" not in str(event.device_type):
            continue
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        entries.append((micros / 1e6, event.key, event.count))
    kinds: dict[str, float] = {}
    for seconds, name, _ in entries:
        kind = next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + seconds
    kinds["idle"] = max(0.0, wall_s - sum(kinds.values()))
    longest = [{"seconds": s, "name": n[:100], "calls": c} for s, n, c in sorted(entries, reverse=True)[:25]]
    return {"wall_s": wall_s, "seconds_by_kind": kinds, "longest": longest}


def read_job() -> dict[str, Any]:
    """The job of this process: the JSON file that is its only argument (bench/training/compare.py writes it)."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))


class Rows(torch.utils.data.Dataset):
    """The samples of the run in the order in which all contenders take them: rows of T + 1 token ids."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._tokens = np.load(job["rows"], mmap_mode="r")

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self._tokens[index]))


def resident_bytes() -> int:
    """This process's resident memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def peak_resident_bytes() -> int:
    """The most that this process had resident. (ru_maxrss would count what its parent had when it was started.)"""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def adamw(model: torch.nn.Module, job: dict[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of every contender: torch's fused AdamW."""
    groups = decay_groups(model, job["weight_decay"])
    return torch.optim.AdamW(groups, lr=job["lr"], betas=(0.9, 0.95), eps=1e-8, fused=True)
