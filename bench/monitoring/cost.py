"""What monitoring costs of a training step: CPU seconds of the loop's calls and the writers, beside those of the steps between.

    python -m bench.monitoring.cost            about ten minutes on a free core

A process trains a GPT (4 blocks, 128 wide, one thread; 16 x 128 tokens a step, then 4 x 128: shorter steps) and does what the
loop does in the default interval: `Monitor.due` after each step, and after ten of them a `train` row with 30 values. Monitoring
is charged with all CPU time, after the start, of the process and of W&B's, but that of the training thread inside the steps.
Each set of writers is a process of its own, in turns. The panel is drawn on a pseudo-terminal.
"""

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TextIO

from bench.measure import run_interleaved
from megagpt.measurement import spread, write_results

WRITERS: dict[str, dict[str, Any]] = {
    "metrics.jsonl": {},
    "and TensorBoard, Prometheus": {"tensorboard": True, "prometheus_port": 0},
    "and W&B (offline)": {"tensorboard": True, "prometheus_port": 0, "wandb": "offline"},
    "metrics.jsonl and the panel": {"panel": True},
    "all": {"tensorboard": True, "prometheus_port": 0, "wandb": "offline", "panel": True},
}
ROUNDS = {16: 2, 4: 8}
"""Intervals that are measured, by samples of a step; one more comes before them."""
REPETITIONS = 1
START_SECONDS = 15.0
"""W&B is busy with its start for so long (0.4 s of CPU), once a run."""
SETTLE_SECONDS = 1.0
"""What the writers get to take the row before, so that it is charged to the rounds that it belongs to."""


def main(words: Sequence[str]) -> None:
    """Measure each set of writers and write the table."""
    if words and words[0] == "one":
        print(json.dumps(measure(json.loads(words[1]))))
        return
    command = [sys.executable, "-m", "bench.monitoring.cost", "one"]
    commands = {name: [*command, json.dumps(options)] for name, options in WRITERS.items()}
    runs = run_interleaved(commands, REPETITIONS, environment={"OMP_NUM_THREADS": "1"})
    rows = []
    for name, found in runs.items():
        outputs = [run.output for run in found]
        row: dict[str, Any] = {"writers": name}
        row |= {key: spread([output[key] for output in outputs]) for key in outputs[0] if key != "panel_cpu_ms"}
        rows.append(row)
    panel = spread([output["panel_cpu_ms"] for found in runs.values() for output in (run.output for run in found)])
    about = (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip()
    watch = "tools/watch_run.py, a process of its own: one reading of a file of 20,000 rows."
    tables = [{"title": "The panel of another process", "about": watch, "rows": [{"reading_cpu_ms": panel}]}]
    results = {"title": "Cost of monitoring", "about": about, "rows": rows, "tables": tables, "lost": ""}
    write_results("monitoring", results, packages=("torch", "tensorboard", "prometheus_client", "wandb"))


def measure(options: dict[str, Any]) -> dict[str, float]:
    """CPU milliseconds of a step, of monitoring per row, and their share of the steps: with long steps and with short ones."""
    import torch

    from megagpt.model.gpt import GPT, ModelConfig
    from megagpt.monitor.config import MonitorConfig
    from megagpt.monitor.monitor import Monitor

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=4096, seq_len=128, num_layers=4, num_heads=4, hidden_size=128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    drawings: list[float] = []
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="bench_monitoring_") as temporary, a_terminal():
        config = MonitorConfig.model_validate(options)
        open_panel, started = timed_panel(drawings), time.monotonic()
        monitor = Monitor(Path(temporary), config, run_config={"seed": 1}, rank=0, max_steps=1000, open_panel=open_panel)
        monitor.log("start", 0, tokens=0)
        step, every, tokens = 0, monitor.config.log_every_steps, 0

        def train(ids: torch.Tensor) -> list[float]:
            """An interval and its row; CPU seconds of the steps."""
            nonlocal step, tokens
            seconds = []
            for _ in range(every):
                step, tokens = step + 1, tokens + ids.numel()
                began = time.thread_time()
                with monitor.clock("train"):
                    (model(ids, ids) / ids.numel()).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                seconds.append(time.thread_time() - began)
                monitor.due(step)
            monitor.log("train", step, tokens=tokens, **values())
            return seconds

        for samples, rounds in ROUNDS.items():
            ids = torch.randint(4096, (samples, 128))
            train(ids)
            time.sleep(max(SETTLE_SECONDS, started + START_SECONDS - time.monotonic()))
            drawings.clear()
            before = cpu_seconds()
            steps = [seconds for _ in range(rounds) for seconds in train(ids)]
            time.sleep(SETTLE_SECONDS)
            row_seconds = (cpu_seconds() - before - sum(steps)) / rounds
            prefix = "short_" if found else ""
            found |= {
                f"{prefix}step_cpu_ms": 1e3 * median(steps),
                f"{prefix}row_cpu_ms": 1e3 * row_seconds,
                f"{prefix}of_which_drawing_ms": 1e3 * sum(drawings) / rounds,
                f"{prefix}share_percent": 100 * row_seconds / every / median(steps),
            }
        panel = read_panel(Path(temporary))
        monitor.close()
    return {**found, "panel_cpu_ms": 1e3 * panel}


def timed_panel(drawings: list[float]) -> Callable[[Path, TextIO], Any]:
    """Opens the panel of a run; the CPU seconds of each drawing are added to the list."""
    from megagpt.report.live_panel import LivePanel

    def open_panel(run_dir: Path, stream: TextIO) -> LivePanel:
        panel = LivePanel(run_dir, stream)
        draw = panel._draw

        def timed() -> None:
            begun = time.thread_time()
            draw()
            drawings.append(time.thread_time() - begun)

        panel._draw = timed  # type: ignore[method-assign]
        return panel

    return open_panel


@contextlib.contextmanager
def a_terminal() -> Iterator[None]:
    """Standard error is a pseudo-terminal whose other end is read."""
    reading, writing = os.openpty()

    def drain() -> None:
        with contextlib.suppress(OSError):
            while os.read(reading, 1 << 16):
                pass

    threading.Thread(target=drain, daemon=True).start()
    before = sys.stderr
    with os.fdopen(writing, "w", buffering=1) as stream:
        sys.stderr = stream
        try:
            yield
        finally:
            sys.stderr = before


def values() -> dict[str, Any]:
    """Thirty values, as a run on several ranks has them."""
    times = {name: {"median_seconds": 0.1, "max_seconds": 0.2, "max_rank": 3} for name in ("step_time", "data_wait", "forward")}
    readings = {f"reading_{i}": float(i) for i in range(12)}
    return {"loss": 3.0, "lr": 1e-3, "grad_norm": 0.5, **times, "gpu": readings}


def read_panel(run_dir: Path) -> float:
    """CPU seconds of a second reading of a run of 20,000 rows, panel included."""
    from rich.console import Console

    from megagpt.monitor.metrics import METRICS_FILE, format_row
    from megagpt.report.panel import run_panel
    from megagpt.report.run_state import RunReader

    folder = run_dir / "long"
    folder.mkdir()
    line = {"kind": "train", "time": 1.0, "incarnation": 1, "loss": 2.0, "seconds": {"train": 1.0}}
    (folder / METRICS_FILE).write_bytes(b"".join(format_row({**line, "step": step}) for step in range(20_000)))
    reader, console = RunReader(folder), Console(width=120, file=(folder / "out").open("w"))
    reader.read(time.time())
    began = time.process_time()
    console.print(run_panel(reader.read(time.time()), 120))
    return time.process_time() - began


def cpu_seconds() -> float:
    """CPU time of this process and of the processes it has started."""
    import psutil

    children = psutil.Process().children(recursive=True)
    return time.process_time() + sum(times.user + times.system for child in children if (times := child.cpu_times()))


if __name__ == "__main__":
    main(sys.argv[1:])
