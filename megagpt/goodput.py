"""Where the time went: a stopwatch over the activities of one process, and the ledger of a whole run over its restarts."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megagpt.metrics import CONTINUES, Metrics, Row

OTHER = "other"
"""The activity outside every `with`."""


class Stopwatch:
    """Seconds per activity. Each moment belongs to one activity, the innermost, so they always sum to the time that passed.

    with clock("save"): ...
    """

    def __init__(self, *, already: dict[str, float] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        """`already`: seconds that passed before, by activity (the start of the process, say). `now`: a clock in seconds."""
        self._now = now
        self._seconds = dict(already or {})
        self._stack = [OTHER]
        self._since = now()

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Charge the time inside the block to `activity`; blocks nest, and the inner one is charged alone."""
        self._charge()
        self._stack.append(activity)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds per activity up to this moment, the running one included."""
        self._charge()
        return dict(self._seconds)

    def _charge(self) -> None:
        now = self._now()
        activity = self._stack[-1]
        self._seconds[activity] = self._seconds.get(activity, 0.0) + now - self._since
        self._since = now


def process_age() -> float:
    """Seconds since this process was started, the interpreter's start and the imports included."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


@dataclass(frozen=True, slots=True)
class Ledger:
    """Seconds of a run by activity, from the first start to the last line logged; they sum to `wall_seconds`.

    Besides the stopwatch's activities: "repeated" is training that a restart or rewind did again, "down" the time between the
    last line of one incarnation and the start of the next process.
    """

    seconds: dict[str, float]

    @property
    def wall_seconds(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the time that went into training which counts, 0 to 1."""
        return self.seconds.get("train", 0.0) / self.wall_seconds if self.wall_seconds else 0.0


def goodput_ledger(metrics: Metrics) -> Ledger:
    """The ledger of a run from the `seconds` that its rows carry."""
    seconds: dict[str, float] = {}
    previous_end = None
    for rows in _incarnations(metrics.all_rows):
        last = rows[-1]
        for activity, spent in last["seconds"].items():
            seconds[activity] = seconds.get(activity, 0.0) + spent
        if previous_end is not None:
            started = last["time"] - sum(last["seconds"].values())
            seconds["down"] = seconds.get("down", 0.0) + max(0.0, started - previous_end)
        previous_end = last["time"]
    repeated = min(_repeated_seconds(metrics.all_rows), seconds.get("train", 0.0))
    if repeated:
        seconds["train"] -= repeated
        seconds["repeated"] = repeated
    return Ledger(seconds)


def _incarnations(rows: tuple[Row, ...]) -> list[list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        if "seconds" in row:
            groups.setdefault(row["incarnation"], []).append(row)
    return [groups[incarnation] for incarnation in sorted(groups)]


def _repeated_seconds(rows: tuple[Row, ...]) -> float:
    """Training time that starts and rewinds threw away: after the last row at or before the step they went back to."""
    total = 0.0
    stretch: list[Row] = []
    for row in rows:
        if "seconds" not in row:
            continue
        if row["kind"] in CONTINUES and stretch:
            kept = [earlier for earlier in stretch if earlier["step"] <= row["step"]]
            last_kept = kept[-1] if kept else stretch[0]
            total += stretch[-1]["seconds"].get("train", 0.0) - last_kept["seconds"].get("train", 0.0)
        if row["kind"] in CONTINUES:
            stretch = []
        stretch.append(row)
    return total
