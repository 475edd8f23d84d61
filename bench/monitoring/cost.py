"""What monitoring costs of a training step: CPU seconds of the loop's calls and the writers, beside those of the steps between.

    python -m bench.monitoring.cost            about two minutes on a free core

A process trains a GPT (4 blocks, 128 wide, 16 x 128 tokens a step, one thread). Steps take turns with what the loop does in the
default interval: `Monitor.due` ten times, and a `train` row with 30 values. A row is charged with the CPU time of this process
until every writer has taken it, and of W&B's process; reading these clocks is included. Each set of writers is a process of its
own. The panel is another process and costs a run nothing; shown is one reading of a file of 20,000 rows.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.measure import run_interleaved
from megagpt.measurement import spread, write_results

WRITERS: dict[str, dict[str, Any]] = {
    "metrics.jsonl": {},
    "and TensorBoard, Prometheus": {"tensorboard": True, "prometheus_port": 0},
    "and W&B (offline)": {"tensorboard": True, "prometheus_port": 0, "wandb": "offline"},
}
ROUNDS, WARM_ROUNDS, REPETITIONS = 8, 2, 2


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
    tables = [{"title": "The panel", "about": "In a process of its own.", "rows": [{"reading_cpu_ms": panel}]}]
    results = {"title": "Cost of monitoring", "about": about, "rows": rows, "tables": tables, "lost": ""}
    write_results("monitoring", results, packages=("torch", "tensorboard", "prometheus_client", "wandb"))


def measure(options: dict[str, Any]) -> dict[str, float]:
    """CPU milliseconds of a step, of `due`, and of a row; and what share of the steps' time they are."""
    import torch

    from megagpt.model.gpt import GPT, ModelConfig
    from megagpt.monitor.config import MonitorConfig
    from megagpt.monitor.monitor import Monitor

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=4096, seq_len=128, num_layers=4, num_heads=4, hidden_size=128))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(4096, (16, 128))
    steps: list[float] = []
    dues: list[float] = []
    rows: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench_monitoring_") as temporary:
        monitor = Monitor(Path(temporary), MonitorConfig.model_validate(options), run_config={"seed": 1}, rank=0)
        every = monitor.config.log_every_steps
        monitor.log("start", 0, tokens=0)
        for i in range(ROUNDS + WARM_ROUNDS):
            began = cpu_seconds()
            with monitor.clock("train"):
                (model(ids, ids) / ids.numel()).backward()
                optimizer.step()
                optimizer.zero_grad()
            trained = cpu_seconds()
            for step in range(i * every + 1, i * every + every + 1):
                monitor.due(step)
            looked = cpu_seconds()
            monitor.log("train", (i + 1) * every, tokens=(i + 1) * every * ids.numel(), **values())
            while any(not writer._rows.empty() for writer in monitor._writers):
                time.sleep(0.001)
            rows.append(cpu_seconds() - looked)
            steps.append(trained - began)
            dues.append((looked - trained) / every)
        panel = read_panel(Path(temporary))
        monitor.close()
    step_seconds, due_seconds = median(steps[WARM_ROUNDS:]), median(dues[WARM_ROUNDS:])
    row_seconds = sum(rows[WARM_ROUNDS:]) / ROUNDS
    return {
        "step_cpu_ms": 1e3 * step_seconds,
        "due_cpu_ms": 1e3 * due_seconds,
        "row_cpu_ms": 1e3 * row_seconds,
        "share_percent": 100 * (due_seconds + row_seconds / every) / step_seconds,
        "share_of_a_100_ms_step_percent": 100 * (due_seconds + row_seconds / every) / 0.1,
        "panel_cpu_ms": 1e3 * panel,
    }


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
