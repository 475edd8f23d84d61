"""Alerts: a loss spike, a hang of the previous attempt, a rank that stays slow, a hot GPU, a disk that fills up."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megagpt.files import show_bytes
from megagpt.monitor.metrics import Row

ROWS_IN_A_ROW = 5
"""Consecutive train rows that must show a slow rank or a hot GPU before an alert: a single one is noise."""
HOT = ("thermal", "hardware_thermal", "hardware_slowdown", "power_brake")
"""Reasons for low clocks that need repair; a power cap is usual under load."""


class Alerts:
    """Checks each logged row, and returns what is wrong as (alert, reason)."""

    def __init__(self, run_dir: Path, pause_seconds: float, *, now: Callable[[], float] = time.monotonic) -> None:
        """pause_seconds: least time between two alerts of the same name. now: a clock in seconds."""
        self._run_dir, self._pause, self._now = run_dir, pause_seconds, now
        self._raised: dict[str, float] = {}
        self._streaks: dict[str, int] = {}

    def look(self, kind: str, values: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The alerts that a row raises: (name, reason)."""
        found: list[tuple[str, str | None]] = []
        if kind == "rewind" and not values.get("taken_back"):
            found.append(("spike", f"step {values.get('bad_step')}: {values.get('reason')}"))
            found.append(("rewind", f"back from step {values.get('bad_step')}, samples left out: {values.get('skipped')}"))
        if kind == "train":
            found.append(("straggler", self._lasting("straggler", str(values.get("slow") or ""))))
            found.append(("thermal", self._lasting("thermal", hot_gpus(values))))
        if kind == "save":
            found.append(("disk", disk_alert(self._run_dir)))
        return [(name, why) for name, why in found if why and self._is_new(name)]

    def at_start(self, last: Row | None) -> list[tuple[str, str]]:
        """The alerts from the previous attempt's last row: a hung process cannot raise one itself."""
        if last is None or last["kind"] != "watchdog":
            return []
        rank = "no rank" if last.get("rank") is None else f"rank {last['rank']} on {last.get('host')}"
        return [("stall", f"attempt {last['incarnation']} was ended at step {last['step']}: {rank}, {last.get('what')}")]

    def _lasting(self, name: str, what: str) -> str | None:
        self._streaks[name] = self._streaks.get(name, 0) + 1 if what else 0
        return what if self._streaks[name] >= ROWS_IN_A_ROW else None

    def _is_new(self, name: str) -> bool:
        now = self._now()
        if now - self._raised.get(name, float("-inf")) < self._pause:
            return False
        self._raised[name] = now
        return True


def hot_gpus(values: Mapping[str, Any]) -> str:
    """The GPUs of a train row whose clocks are low for a reason in HOT, of all nodes if the row has them; "" if none."""
    nodes, own = values.get("nodes"), values.get("gpu")
    throttled = nodes.get("throttled") if isinstance(nodes, dict) else own.get("throttled") if isinstance(own, dict) else ""
    return str(throttled) if any(reason in str(throttled) for reason in HOT) else ""


def disk_alert(run_dir: Path) -> str | None:
    """The reason for an alert if the disk has no room for two more checkpoints like the newest; None if it has."""
    newest = max((run_dir / "checkpoints").glob("step_*"), default=None)
    try:
        size = sum(file.stat().st_size for file in newest.iterdir()) if newest is not None else 0
        free = shutil.disk_usage(run_dir).free
    except OSError:  # it was deleted meanwhile
        return None
    if size == 0 or free >= 2 * size:
        return None
    return f"{show_bytes(free)} free at {run_dir}, a checkpoint takes {show_bytes(size)}"
