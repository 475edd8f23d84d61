"""What a run tells while it goes: metrics.jsonl, console lines and a progress bar, W&B, throughput and MFU. Rank 0 only."""

import errno
import logging
import os
import secrets
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megagpt.config import Config, UserError
from megagpt.files import read_json, write_json
from megagpt.model.flops import FlopsPerToken, peak_flops, utilisation
from megagpt.monitor.goodput import Stopwatch, advise_checkpoints, job_times, process_age
from megagpt.monitor.metrics import METRICS_FILE, Metrics, format_row, plain, read_metrics
from megagpt.monitor.nvml import open_gpu, read_gpu
from megagpt.monitor.wandb_files import missing_rows, values_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

PAUSES = ("start", "load", "evaluate", "generate", "save")
"""Activities of the clock that are no training: they do not count against the throughput."""


class MonitorConfig(Config):
    """What is shown of a run. Nothing here changes the model that comes out."""

    log_every_steps: int = Field(default=10, gt=0)
    """Steps between two lines of metrics."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases: off, offline (written under run_dir/wandb, `wandb sync` sends it later), or online."""
    wandb_project: str = "megagpt"
    """Project of the W&B run."""
    wandb_entity: str | None = None
    """Team or user that owns the W&B project; null = the account's default."""
    wandb_name: str | None = None
    """Name of the W&B run; null = the name of run_dir."""
    wandb_init_seconds: float = Field(default=90.0, gt=0)
    """How long to wait for the W&B server at the start; after that the run is logged offline, with a warning."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak of one device in TFLOP/s (dense, the dtype trained in), for MFU; null = from the table of known GPUs."""


def check_wandb(config: MonitorConfig) -> None:
    """Raise UserError if config.wandb=online and this machine has no credentials for it; never asks on the terminal."""
    if config.wandb != "online":
        return
    import wandb
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import authenticate_session

    try:
        found = authenticate_session(host=wandb.setup().settings.base_url, source="megagpt", prompt=False)
    except AuthenticationError as error:
        raise UserError(f"wandb=online: {error}") from None
    if found is None:
        raise UserError("wandb=online: no credentials (set WANDB_API_KEY, or run `wandb login` once, or use wandb=offline)")


class Monitor:
    """The voice of one process of a run. On ranks other than 0 `log` does nothing; the clock runs on all."""

    def __init__(
        self,
        run_dir: Path,
        config: MonitorConfig,
        *,
        run_config: dict[str, Any],
        rank: int,
        attempt: int | None = None,
        max_steps: int | None = None,
        flops: FlopsPerToken | None = None,
        num_devices: int = 1,
        device: "torch.device | None" = None,
    ) -> None:
        """Open run_dir/metrics.jsonl for appending, and W&B if asked.

        attempt: the number of this start of the run; None = one more than the last in the file. max_steps: for the progress
        bar. flops, num_devices: for MFU; device: this rank's, for its GPU's readings. Raises UserError as check_wandb does.
        """
        check_wandb(config)
        self.config, self.rank, self.max_steps = config, rank, max_steps
        self.clock = Stopwatch(already={"start": process_age()})
        self._flops, self._num_devices, self._device = flops, num_devices, device
        self._device_name = _device_name(device)
        self._peak = config.peak_tflops * 1e12 if config.peak_tflops else peak_flops(self._device_name)
        self._file = self._wandb = self._gpu = self._bar = None
        self._window: tuple[int, float] | None = None
        self._advice: dict[str, Any] = {}
        if rank != 0:
            return
        with self.clock("start"):
            self._open(run_dir, run_config, attempt)

    def _open(self, run_dir: Path, run_config: dict[str, Any], attempt: int | None) -> None:
        earlier = _earlier(run_dir)
        self.attempt = attempt or 1 + max((row["incarnation"] for row in earlier.all_rows), default=0)
        if earlier.torn_lines:
            log.warning("%s: %d torn lines of an earlier start are left out", run_dir / METRICS_FILE, earlier.torn_lines)
        advice = advise_checkpoints(earlier)
        if advice is not None:
            self._advice = {"advised_save_every_steps": advice.interval_steps}
        self._file = _open_for_lines(run_dir / METRICS_FILE)
        self._gpu = open_gpu(self._device) if self._device is not None else None
        if self.config.wandb != "off":
            self._wandb = WandbRun(run_dir, self.config, run_config, earlier)

    def due(self, step: int) -> bool:
        """Whether the step that was just done is one to log."""
        return step % self.config.log_every_steps == 0

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Write one row: a line of metrics.jsonl, a line on the console, a point in W&B.

        `step` counts the updates done. Values may be tensors, and nested mappings (not shown on the console). A "train" row
        with `tokens` (all tokens so far) gets the throughput since the row before it; "start" sets its origin.
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
        if kind == "train" and self._gpu is not None and self._device is not None:
            values["gpu"] = read_gpu(self._gpu, self._device)
        head = {"kind": kind, "step": step, "time": round(time.time(), 3), "incarnation": self.attempt}
        seconds = {activity: round(spent, 3) for activity, spent in self.clock.seconds().items()}
        _write(self._file, format_row(head | values | {"seconds": seconds}))
        self._show(kind, step, values)
        if self._wandb is not None:
            self._wandb.log(kind, step, values | {"seconds": seconds})

    def log_from_a_thread(self, kind: str, step: int, **values: Any) -> None:
        """Write one row to metrics.jsonl and nowhere else, when the process is about to end and its main thread cannot."""
        if self._file is not None:
            seconds = {activity: round(spent, 3) for activity, spent in self.clock.so_far().items()}
            head = {"kind": kind, "step": step, "time": round(time.time(), 3), "incarnation": self.attempt}
            _write(self._file, format_row(head | values | {"seconds": seconds}))

    def close(self) -> None:
        """Finish W&B and close the file. Safe to call twice."""
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()
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
        seconds = self.clock.seconds()
        now = sum(seconds.values()) - sum(seconds.get(pause, 0.0) for pause in PAUSES)
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

    def _show(self, kind: str, step: int, values: dict[str, Any]) -> None:
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


class WandbRun:
    """The W&B run of a run_dir: the id in wandb.json is kept over restarts, and its steps only grow."""

    def __init__(self, run_dir: Path, config: MonitorConfig, run_config: dict[str, Any], earlier: Metrics) -> None:
        """earlier: what metrics.jsonl has. What of it W&B has not got is sent first, what it has not again."""
        import wandb
        from wandb.errors import CommError

        path = run_dir / "wandb.json"
        if not path.exists():
            write_json(path, {"id": secrets.token_hex(8), "project": config.wandb_project})
        self.id: str = read_json(path)["id"]
        self.mode: Literal["offline", "online"] = "online" if config.wandb == "online" else "offline"
        self._last_step, self._step = -1, -1
        options: dict[str, Any] = {
            "id": self.id,
            "project": config.wandb_project,
            "entity": config.wandb_entity,
            "name": config.wandb_name or run_dir.resolve().name,
            "dir": str(run_dir),
            "config": run_config,
            "resume": "allow",
            "allow_val_change": True,
            "settings": wandb.Settings(console="off", silent=True, init_timeout=config.wandb_init_seconds),
        }
        try:
            self._run: Any = wandb.init(mode=self.mode, **options)
        except CommError as error:
            # A run that waited days in a queue must not end because a dashboard is out of reach.
            log.warning("W&B cannot be reached (%s): this start is logged offline under %s/wandb", error, run_dir)
            self.mode = "offline"
            wandb.teardown()
            self._run = wandb.init(mode=self.mode, **options)
        self.folder = Path(self._run.settings.sync_dir).name
        server_step = self._run.starting_step - 1 if self.mode == "online" else None
        missing = missing_rows(earlier, run_dir, server_step)
        if missing.rows:
            log.info("W&B lacks %d rows of an earlier start: they are sent again", len(missing.rows))
        for row in missing.rows:
            self.log(row["kind"], row["step"], plain(values_of(row)))
        self._last_step = missing.last_step

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Send the values as `<kind>/<name>` unless the step was sent before a restart or lies before the current one."""
        if self._run is None or step <= self._last_step or step < self._step:
            return
        self._step = step
        try:
            self._run.log(dict(_flat(kind, values)), step=step)
        except Exception as error:
            # Whatever breaks in W&B's own process: training continues and metrics.jsonl stays complete.
            log.warning("W&B failed (%s): nothing more is sent from this start", error)
            self._run = None

    def finish(self) -> None:
        """Flush and end the W&B run."""
        run, self._run = self._run, None
        try:
            if run is not None:
                run.finish()
        except Exception as error:
            log.warning("W&B failed at the end (%s): metrics.jsonl is complete", error)


def _earlier(run_dir: Path) -> Metrics:
    run_dir.mkdir(parents=True, exist_ok=True)
    return read_metrics(run_dir) if (run_dir / METRICS_FILE).exists() else Metrics((), (), 0)


def _open_for_lines(path: Path) -> Any:
    """Open for appending whole lines; if the last line was torn by a kill, begin on a fresh one."""
    file = path.open("ab+", buffering=0)
    if file.seek(0, os.SEEK_END):
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return file


def _write(file: Any, line: bytes) -> None:
    written = file.write(line)
    if written != len(line):
        raise OSError(errno.ENOSPC, "the disk is full", file.name)


def _device_name(device: "torch.device | None") -> str:
    if device is None or device.type != "cuda":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs.extend(_flat(f"{prefix}/{name}", value))
        elif not isinstance(value, list):
            pairs.append((f"{prefix}/{name}", value))
    return pairs


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
