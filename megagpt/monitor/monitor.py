"""Log a run while it trains: metrics.jsonl, console lines and a progress bar, other writers, throughput and MFU."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megagpt.model.flops import FlopsPerToken, peak_flops, utilisation
from megagpt.monitor.alerts import Alerts
from megagpt.monitor.config import MonitorConfig, check_monitor
from megagpt.monitor.goodput import Stopwatch, advise_checkpoints, job_times, process_age
from megagpt.monitor.metrics import METRICS_FILE, Metrics, format_row, plain, read_metrics
from megagpt.monitor.nvml import open_gpu, read_gpu, read_node
from megagpt.monitor.prometheus import open_prometheus
from megagpt.monitor.tensorboard import TensorBoardWriter
from megagpt.monitor.wandb_run import WandbRun
from megagpt.monitor.writers import BackgroundWriter, Writer

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

KEPT_BYTES = 2**24
"""Most bytes of rows that are kept in memory while metrics.jsonl cannot be written."""

OpenPanel = Callable[[Path, TextIO], Writer]
"""Opens a writer that shows the run of a run_dir on a terminal."""

PAUSES = ("start", "load", "evaluate", "generate", "save")
"""Activities of the clock that are not training: they do not lower the throughput."""


class Monitor:
    """Logs one process of a run. On ranks other than 0 `log` does nothing; the clock runs on all ranks.

    metrics.jsonl is written at once. Other writers have threads of their own (writers.py).
    """

    def __init__(
        self,
        run_dir: Path,
        config: MonitorConfig,
        *,
        run_config: dict[str, Any],
        rank: int,
        local_rank: int | None = None,
        attempt: int | None = None,
        max_steps: int | None = None,
        flops: FlopsPerToken | None = None,
        num_devices: int = 1,
        device: "torch.device | None" = None,
        open_panel: OpenPanel | None = None,
    ) -> None:
        """Open run_dir/metrics.jsonl for appending, and the other writers that config asks for.

        local_rank: of this process on its node; local rank 0 of each node serves Prometheus (None = only rank 0 does).
        attempt: the number of this attempt; None = one more than the last in the file. max_steps: for the progress bar.
        flops, num_devices: for MFU. device: this rank's, for its GPU's readings. open_panel: for config.panel. Raises
        UserError as check_monitor does.
        """
        check_monitor(config)
        self.config, self.rank, self.max_steps = config, rank, max_steps
        self.clock = Stopwatch(already={"start": process_age()})
        self._flops, self._num_devices, self._device = flops, num_devices, device
        self._device_name = _device_name(device)
        self._peak = config.peak_tflops * 1e12 if config.peak_tflops else peak_flops(self._device_name)
        self._file = self._wandb = self._gpu = self._bar = self._panel = None
        self._open_panel = open_panel
        self._writers: list[BackgroundWriter] = []
        self._window: tuple[int, float] | None = None
        self._advice: dict[str, Any] = {}
        self._energy: tuple[float, float] | None = None
        self._step_seconds: list[float] = []
        self._last_step_at: float | None = None
        self._alerts = Alerts(run_dir, config.alert_pause_seconds)
        self._at_start: list[tuple[str, str]] = []
        if config.prometheus_port is not None and (rank == 0 or local_rank == 0):
            labels = {"run": run_dir.resolve().name, "rank": str(rank)}
            endpoint = open_prometheus(config.prometheus_port, config.prometheus_address, labels, read_node)
            self._writers += [BackgroundWriter(endpoint)] if endpoint is not None else []
        if rank != 0:
            return
        with self.clock("start"):
            self._open(run_dir, run_config, attempt)

    def _open(self, run_dir: Path, run_config: dict[str, Any], attempt: int | None) -> None:
        earlier = _earlier(run_dir)
        self.attempt = attempt or 1 + max((row["incarnation"] for row in earlier.all_rows), default=0)
        self._at_start = self._alerts.at_start(earlier.all_rows[-1] if earlier.all_rows else None)
        if earlier.torn_lines:
            log.warning("%s: %d torn lines of an earlier attempt are left out", run_dir / METRICS_FILE, earlier.torn_lines)
        advice = advise_checkpoints(earlier)
        if advice is not None:
            self._advice = {"advised_save_every_steps": advice.interval_steps}
        self._file = LineFile(run_dir / METRICS_FILE)
        self._gpu = open_gpu(self._device) if self._device is not None else None
        if self.config.wandb != "off":
            self._wandb = WandbRun(run_dir, self.config, run_config, earlier)
            self._writers.append(BackgroundWriter(self._wandb))
        if self.config.tensorboard:
            self._writers.append(BackgroundWriter(TensorBoardWriter(run_dir)))
        if self.config.panel and self._open_panel is not None and sys.stderr.isatty():
            self._panel = BackgroundWriter(self._open_panel(run_dir, sys.stderr))
            self._writers.append(self._panel)

    def due(self, step: int) -> bool:
        """Whether to log the step that has just ended. Call it once after every step: it also measures step times."""
        if self._file is not None:
            now = self._training_seconds()
            if self._last_step_at is not None:
                self._step_seconds.append(now - self._last_step_at)
            self._last_step_at = now
        return step % self.config.log_every_steps == 0

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Write one row: a line of metrics.jsonl, a line on the console, a point in each other writer.

        step: number of updates done. Values may be tensors, or nested mappings (not shown on the console). A "train" row with
        `tokens` (all tokens so far) gets the throughput since the previous row; a "start" row sets its origin.
        """
        if self._file is None:
            return
        values = plain(values)
        if kind in ("start", "rewind"):
            self._window = None
        if kind == "start":
            values |= self._facts()
        if "tokens" in values:
            values |= self._throughput(values["tokens"], report=kind == "train")
        if kind == "train":
            values |= self._percentiles()
        if kind == "train" and self._gpu is not None and self._device is not None:
            values["gpu"] = self._read_gpu(values.get("tokens"))
        head = {"kind": kind, "step": step, "time": round(time.time(), 3), "incarnation": self.attempt}
        seconds = {activity: round(spent, 3) for activity, spent in self.clock.seconds().items()}
        self._file.append(format_row(head | values | {"seconds": seconds}))
        self._show(kind, step, values)
        for writer in self._writers:
            writer.put(kind, step, values | {"seconds": seconds})
        raised = self._alerts.look(kind, values)
        if kind == "start":
            raised, self._at_start = self._at_start + raised, []
        for name, reason in raised:
            self.log("alert", step, alert=name, reason=reason)

    def log_from_a_thread(self, kind: str, step: int, **values: Any) -> None:
        """Write one row to metrics.jsonl only, for a process that is about to end and whose main thread cannot write."""
        if self._file is not None:
            seconds = {activity: round(spent, 3) for activity, spent in self.clock.so_far().items()}
            head = {"kind": kind, "step": step, "time": round(time.time(), 3), "incarnation": self.attempt}
            self._file.append(format_row(head | values | {"seconds": seconds}))

    def close(self) -> None:
        """End the writers, within config.close_seconds in all, and close the file. Safe to call twice."""
        if self._bar is not None:
            self._bar.close()
        deadline = time.monotonic() + self.config.close_seconds
        for writer in self._writers:
            writer.close(max(0.1, deadline - time.monotonic()))
        self._writers = []
        if self._file is not None:
            self._file.close()
        self._bar = self._wandb = self._file = None

    def _facts(self) -> dict[str, Any]:
        peak = self._peak / 1e12 if self._peak else None
        facts: dict[str, Any] = {
            "device_name": self._device_name,
            "num_devices": self._num_devices,
            "peak_tflops_per_device": peak,
        }
        facts |= {"job": job_times()} | self._advice
        if self._wandb is not None:
            facts["wandb"] = {"id": self._wandb.id, "mode": self._wandb.mode, "folder": self._wandb.folder}
        return facts

    def _throughput(self, tokens: int, *, report: bool) -> dict[str, float]:
        now = self._training_seconds()
        before = self._window
        if before is None or report:
            self._window = (tokens, now)
        if before is None or not report or now <= before[1]:
            return {}
        rate = (tokens - before[0]) / (now - before[1])
        result = {"tokens_per_second": rate}
        if self._num_devices > 1:
            result["tokens_per_second_per_device"] = rate / self._num_devices
        if self._flops is not None and self._peak is not None:
            share = utilisation(self._flops, rate / self._num_devices, self._peak)
            result |= {"mfu": share.full, "mfu_causal": share.causal, "mfu_hardware": share.hardware}
        return result

    def _training_seconds(self) -> float:
        """Seconds since the process started, without PAUSES."""
        seconds = self.clock.seconds()
        return sum(seconds.values()) - sum(seconds.get(pause, 0.0) for pause in PAUSES)

    def _percentiles(self) -> dict[str, Any]:
        """Seconds per step by percentile since the previous train row, and shares of the attempt's time until now."""
        seconds = self.clock.seconds()
        total = max(1e-9, sum(seconds.values()))
        shares = {"goodput": seconds.get("train", 0.0) / total, "data_wait": seconds.get("data_wait", 0.0) / total}
        result: dict[str, Any] = {"shares": {name: round(share, 6) for name, share in shares.items()}}
        if self._step_seconds:
            ordered, self._step_seconds = sorted(self._step_seconds), []
            last = len(ordered) - 1
            marks = {"p50": ordered[round(0.5 * last)], "p95": ordered[round(0.95 * last)], "max": ordered[last]}
            result["step_seconds"] = {name: round(value, 6) for name, value in marks.items()}
        return result

    def _read_gpu(self, tokens: float | None) -> dict[str, Any]:
        """Readings of this rank's GPU, with its energy per token since the previous row; tokens are divided by devices."""
        assert self._device is not None
        found: dict[str, Any] = read_gpu(self._gpu, self._device)
        energy, before = found.get("energy_joules"), self._energy
        if tokens is None or energy is None:
            return found
        self._energy = (tokens, energy)
        if before is not None and tokens > before[0] and energy >= before[1]:
            found["joules_per_token"] = (energy - before[1]) / ((tokens - before[0]) / self._num_devices)
        return found

    def _show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._panel is not None and not self._panel.failed:
            return
        flat = {name: value for name, value in values.items() if not isinstance(value, dict | list)}
        texts = {name: value for name, value in flat.items() if isinstance(value, str) and "\n" in value.strip()}
        of = f"/{self.max_steps}" if self.max_steps else ""
        words = [f"{kind} {step}{of}", *(f"{name} {_short(value)}" for name, value in flat.items() if name not in texts)]
        line = "  ".join(words) + "".join("\n  | " + text.replace("\n", "\n  | ") for text in texts.values())
        if self.max_steps and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = self._bar or tqdm(total=self.max_steps, initial=step, unit="step", dynamic_ncols=True)
            tqdm.write(line, file=sys.stderr)
            self._bar.update(step - self._bar.n)
        else:
            log.info("%s", line)


class LineFile:
    """Appends whole lines to a file. While the disk is full, up to KEPT_BYTES of lines are kept and written later.

    If a kill has torn the last line, it is ended first. Any thread may call it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._kept, self._lost = path, b"", 0
        self._lock = threading.RLock()  # a signal may come while a line is written
        self._file = path.open("ab+", buffering=0)
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._kept = b"\n"

    def append(self, line: bytes) -> None:
        """Write the kept lines and this one. A disk error is logged when it begins and when it ends."""
        with self._lock:
            was_kept = len(self._kept) > 1
            if len(self._kept) + len(line) > KEPT_BYTES:
                self._lost += 1
            else:
                self._kept += line
            try:
                while self._kept:
                    self._kept = self._kept[self._file.write(self._kept) :]
            except OSError as error:
                if not was_kept:
                    log.warning("%s: %s: rows are kept in memory; training continues", self._path, error.strerror)
                return
            if was_kept:
                log.warning("%s: written again, %d rows are lost", self._path, self._lost)

    def close(self) -> None:
        """Try once more to write the kept lines, and close the file; lines that are lost are logged."""
        self.append(b"")
        self._file.close()
        if self._kept:
            log.warning("%s: rows of this attempt are lost: the disk could not be written", self._path)


def _earlier(run_dir: Path) -> Metrics:
    run_dir.mkdir(parents=True, exist_ok=True)
    return read_metrics(run_dir) if (run_dir / METRICS_FILE).exists() else Metrics((), (), 0)


def _device_name(device: "torch.device | None") -> str:
    if device is None or device.type != "cuda":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value if value.strip() == value else repr(value)
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if value < 1_000_000 else f"{value / 1e6:,.1f}M" if value < 1e9 else f"{value / 1e9:,.2f}B"
    if value and (abs(value) < 1e-2 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
