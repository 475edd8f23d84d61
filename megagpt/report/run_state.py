"""The state of a run, from its files alone: progress, remaining time, figures of the last rows, events. No torch."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megagpt.config import UserError
from megagpt.monitor.goodput import advise_checkpoints, goodput_ledger
from megagpt.monitor.metrics import Metrics, MetricsFollower, Row

WINDOW_ROWS = 20
"""Number of train rows at the end of an attempt from which pace and shares are computed."""

SILENT_SECONDS = 60.0
"""A run is silent after this time without a row, or after five times its usual interval if that is longer."""

EVENT_KINDS = ("start", "rewind", "skip", "damaged", "stop", "watchdog", "planned", "done", "evaluate", "save", "alert")

GPU_NAMES = ("memory_used_gib", "peak_allocated_gib", "utilisation_percent", "power_watts", "temperature_celsius")


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a run at one moment; None = not in its files. Times are Unix seconds, durations are seconds."""

    name: str
    status: str
    """running, silent, finished, stopped, hung, or not started."""
    now: float
    step: int = 0
    max_steps: int | None = None
    attempt: int = 0
    num_attempts: int = 0
    last_row: float | None = None
    loss: float | None = None
    losses: tuple[float, ...] = ()
    """Losses of all train rows that are not superseded, oldest first."""
    validation_loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    tokens: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    gpu: Mapping[str, float] = field(default_factory=dict)
    throttled: str = ""
    step_seconds: float | None = None
    """Wall time per step over the last rows, including evaluations and saves between them."""
    data_wait: float | None = None
    """Share of training time spent waiting for data over the last rows, 0 to 1."""
    goodput: float | None = None
    eta_seconds: float | None = None
    """Time to max_steps at the pace of the last rows."""
    eta_with_restarts_seconds: float | None = None
    """Time to max_steps at the pace of the whole run, including the cost of its restarts; None without a restart."""
    saved_step: int | None = None
    next_save_step: int | None = None
    next_save_seconds: float | None = None
    advised_save_every_steps: int | None = None
    events: tuple[Row, ...] = ()
    """Rows of EVENT_KINDS, oldest first."""
    problems: tuple[str, ...] = ()
    """A line for each file that could not be read or is damaged."""


class RunReader:
    """Reads the state of one run repeatedly."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._follower = MetricsFollower(run_dir)

    def read(self, now: float) -> RunState:
        """The state at `now`, a Unix time. Raises UserError if there is no metrics.jsonl."""
        metrics = self._follower.read()
        problems = [f"metrics.jsonl: {metrics.torn_lines:,} damaged lines left out"] if metrics.torn_lines else []
        config = read_last_config(self.run_dir, problems)
        return state_of(self.run_dir.resolve().name, metrics, config, now, problems)


def read_last_config(run_dir: Path, problems: list[str]) -> dict[str, Any]:
    """The settings in the newest file of starts/; {} if there is none, and a line in `problems` if it is damaged."""
    path = max((run_dir / "starts").glob("*.json"), default=None)
    if path is None:
        return {}
    try:
        config = orjson.loads(path.read_bytes())["config"]
        return config if isinstance(config, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        problems.append(f"starts/{path.name}: damaged, so max_steps and the next save are not known")
        return {}


def state_of(name: str, metrics: Metrics, config: Mapping[str, Any], now: float, problems: Sequence[str] = ()) -> RunState:
    """The state of a run, from its metrics and the settings of its last attempt (`config`)."""
    rows = metrics.all_rows
    if not rows:
        return RunState(name, "not started", now, problems=tuple(problems))
    last, train = rows[-1], metrics.of_kind("train")
    attempt = max(row["incarnation"] for row in rows)
    recent = [row for row in train if row["incarnation"] == attempt][-WINDOW_ROWS:]
    latest = train[-1] if train else {}
    step = max(last["step"], latest.get("step", 0)) if last["incarnation"] == attempt else last["step"]
    max_steps, save_every = (_whole(config.get(key)) for key in ("max_steps", "save_every_steps"))
    pace = _pace(recent)
    left = None if max_steps is None else max(0, max_steps - step)
    saves = [row["step"] for row in metrics.rows if row["kind"] == "save"]
    next_save = None if not save_every else (step // save_every + 1) * save_every
    if next_save is not None and max_steps is not None:
        next_save = min(next_save, max_steps)
    status = _status(last, recent, now)
    over = status in ("finished", "stopped", "hung")
    ledger = goodput_ledger(metrics)
    evaluated = metrics.of_kind("evaluate")
    advice = advise_checkpoints(metrics)
    gpu: Any = latest.get("gpu")
    gpu = gpu if isinstance(gpu, dict) else {}
    losses = [value for row in train if (value := number(row.get("loss"))) is not None]
    return RunState(
        name=name,
        status=status,
        now=now,
        step=step,
        max_steps=max_steps,
        attempt=attempt,
        num_attempts=len({row["incarnation"] for row in rows}),
        last_row=last["time"],
        loss=number(latest.get("loss")),
        losses=tuple(losses),
        validation_loss=number(evaluated[-1].get("loss")) if evaluated else None,
        grad_norm=number(latest.get("grad_norm")),
        lr=number(latest.get("lr")),
        tokens=number(latest.get("tokens")),
        tokens_per_second=number(latest.get("tokens_per_second")),
        mfu=number(latest.get("mfu")),
        gpu={key: value for key in GPU_NAMES if (value := number(gpu.get(key))) is not None},
        throttled=str(gpu.get("throttled") or ""),
        step_seconds=pace,
        data_wait=_data_wait(recent),
        goodput=ledger.goodput if ledger.seconds else None,
        eta_seconds=None if over or left is None or pace is None else left * pace,
        eta_with_restarts_seconds=None if over else _eta_with_restarts(rows, left, ledger.wall_seconds, step),
        saved_step=max(saves, default=None),
        next_save_step=None if over else next_save,
        next_save_seconds=None if over or next_save is None or pace is None else (next_save - step) * pace,
        advised_save_every_steps=None if advice is None else advice.interval_steps,
        events=tuple(row for row in rows if row["kind"] in EVENT_KINDS),
        problems=tuple(problems),
    )


def number(value: Any) -> float | None:
    """`value` if it is a finite number, else None: other programs may have written the file."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def find_runs(folder: Path) -> list[Path]:
    """The run directories at or below a folder, by name. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"runs={folder}: not a folder")
    found = sorted(path.parent for path in folder.rglob("metrics.jsonl") if "wandb" not in path.parts)
    if not found:
        raise UserError(f"runs={folder}: has no metrics.jsonl below it, so no run has started there")
    return found


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _status(last: Row, recent: Sequence[Row], now: float) -> str:
    ended = {"done": "finished", "stop": "stopped", "watchdog": "hung"}
    if last["kind"] in ended:
        return ended[last["kind"]]
    interval = (recent[-1]["time"] - recent[0]["time"]) / (len(recent) - 1) if len(recent) > 1 else 0.0
    return "silent" if now - last["time"] > max(SILENT_SECONDS, 5 * interval) else "running"


def _pace(recent: Sequence[Row]) -> float | None:
    """Wall seconds per step over train rows of one attempt, in which a rewind may lower the step."""
    steps = sum(max(0, b["step"] - a["step"]) for a, b in itertools.pairwise(recent))
    seconds = recent[-1]["time"] - recent[0]["time"] if recent else 0.0
    return seconds / steps if steps > 0 and seconds > 0 else None


def _data_wait(recent: Sequence[Row]) -> float | None:
    if len(recent) < 2:
        return None
    first, last = (row.get("seconds", {}) for row in (recent[0], recent[-1]))
    waited, trained = (last.get(name, 0.0) - first.get(name, 0.0) for name in ("data_wait", "train"))
    return waited / (waited + trained) if waited >= 0 and waited + trained > 0 else None


def _eta_with_restarts(rows: Sequence[Row], left: int | None, wall_seconds: float, step: int) -> float | None:
    starts = [row for row in rows if row["kind"] == "start"]
    done = step - starts[0]["step"] if starts else 0
    return left * wall_seconds / done if left is not None and len(starts) > 1 and done > 0 else None
