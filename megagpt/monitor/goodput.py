"""Where the time went: a stopwatch over the activities of one process, and the ledger of a whole run with its restarts."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megagpt.monitor.metrics import CONTINUES, Metrics, Row

OTHER = "other"
"""The activity outside every `with`."""


class Stopwatch:
    """Seconds per activity. Each moment counts for one activity, the innermost, so their sum is always the elapsed time.

    with clock("save"): ...
    """

    def __init__(self, *, already: dict[str, float] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        """already: seconds that passed before, by activity (for example "start"). now: a clock in seconds."""
        self._now = now
        self._seconds = dict(already or {})
        self._stack = [OTHER]
        self._since = now()
        self.switches = 0
        """How often the activity has changed."""

    @property
    def activity(self) -> str:
        """The current activity. Like `switches` and `peek`, it may be read from another thread."""
        return self._stack[-1]

    @contextlib.contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time inside the block for `activity`; of nested blocks only the innermost counts."""
        self._switch()
        self._stack.append(activity)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds per activity until now, the current one included."""
        self._charge()
        return dict(self._seconds)

    def so_far(self) -> dict[str, float]:
        """The same as `seconds`, for another thread: it changes nothing."""
        seconds, activity = dict(self._seconds), self._stack[-1]
        seconds[activity] = seconds.get(activity, 0.0) + self._now() - self._since
        return seconds

    def peek(self) -> dict[str, float]:
        """Seconds per activity up to the last switch."""
        return dict(self._seconds)

    def _switch(self) -> None:
        self._charge()
        self.switches += 1

    def _charge(self) -> None:
        now = self._now()
        activity = self._stack[-1]
        self._seconds[activity] = self._seconds.get(activity, 0.0) + now - self._since
        self._since = now


def process_age() -> float:
    """Seconds since this process started, including the interpreter's start and the imports."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


JOB_TIMES = {"queued_at": "MEGAGPT_QUEUED_AT", "started_at": "MEGAGPT_JOB_STARTED_AT"}
"""Name in a "start" row's `job` -> the environment variable (Unix seconds) that slurm/pretrain.sh sets."""


def job_times(environment: Mapping[str, str] = os.environ) -> dict[str, float]:
    """When this process's job entered the queue and when it started, in Unix seconds; {} outside slurm/pretrain.sh."""
    return {name: float(environment[variable]) for name, variable in JOB_TIMES.items() if environment.get(variable)}


@dataclass(frozen=True, slots=True)
class Ledger:
    """Seconds of a run by activity, from the first submission to the last logged row; their sum is `wall_seconds`.

    It adds to the stopwatch's activities: "repeated" is training that a restart or rewind did again; "hang" is the time without
    progress before the watchdog ended an attempt; between two attempts come "down" (from the last row of one until the next is
    queued), "queue" and "launch" (the job's checks and srun). If the job's times are not known, all three count as "down".
    """

    seconds: dict[str, float]

    @property
    def wall_seconds(self) -> float:
        """The sum of all activities."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the time spent on training that was not repeated, 0 to 1."""
        return self.seconds.get("train", 0.0) / self.wall_seconds if self.wall_seconds else 0.0


def goodput_ledger(metrics: Metrics) -> Ledger:
    """The ledger of a run, from the `seconds` in its rows."""
    seconds: dict[str, float] = {}
    previous_end = None
    for rows in _attempts(metrics.all_rows):
        last = rows[-1]
        for activity, spent in last["seconds"].items():
            seconds[activity] = seconds.get(activity, 0.0) + spent
        started = last["time"] - sum(last["seconds"].values())
        first = next((row for row in rows if row["kind"] == "start"), rows[0])  # "damaged" may come before it
        for activity, spent in _between(first, started, previous_end).items():
            seconds[activity] = seconds.get(activity, 0.0) + spent
        previous_end = last["time"]
    repeated = min(_repeated_seconds(metrics.all_rows), seconds.get("train", 0.0))
    if repeated:
        seconds["train"] -= repeated
        seconds["repeated"] = repeated
    return Ledger(seconds)


@dataclass(frozen=True, slots=True)
class CheckpointAdvice:
    """How often to save, from the cost of a save and the frequency of failures so far."""

    save_seconds: float
    """Training time that one save costs."""
    failures: int
    seconds_between_failures: float
    """Mean; without a failure, the whole time so far."""
    interval_seconds: float
    interval_steps: int

    def line(self) -> str:
        """One line for a report."""
        seen = f"{self.failures} failures" if self.failures else "no failure yet (at least)"
        return (
            f"a save costs {self.save_seconds:.1f} s; {seen}, one in {self.seconds_between_failures / 3600:.2f} h: "
            f"save every {self.interval_seconds / 60:.1f} min or {self.interval_steps:,} steps"
        )


def advise_checkpoints(metrics: Metrics) -> CheckpointAdvice | None:
    """Daly's interval (Future Generation Computer Systems 22, 2006, equation 37); None until a save and a step are timed."""
    groups = _attempts(metrics.all_rows)
    spent = {name: sum(rows[-1]["seconds"].get(name, 0.0) for rows in groups) for name in ("save", "train", "data_wait")}
    saves = sum(row["kind"] == "save" for row in metrics.all_rows)
    steps = sum(rows[-1]["step"] - rows[0]["step"] for rows in groups)
    if not saves or steps <= 0 or spent["save"] <= 0:
        return None
    failures = sum(rows[-1]["kind"] not in ("stop", "done") for rows in groups[:-1])
    up = sum(sum(rows[-1]["seconds"].values()) for rows in groups) / max(1, failures)
    cost = spent["save"] / saves
    interval = daly_interval(cost, up)
    step_seconds = (spent["train"] + spent["data_wait"]) / steps
    return CheckpointAdvice(cost, failures, up, interval, max(1, round(interval / step_seconds)))


def daly_interval(save_seconds: float, seconds_between_failures: float) -> float:
    """Seconds of work between two saves at which the least time is lost: Young's sqrt(2 d M) to higher order."""
    if save_seconds >= 2 * seconds_between_failures:
        return seconds_between_failures
    ratio = save_seconds / (2 * seconds_between_failures)
    return math.sqrt(2 * save_seconds * seconds_between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_seconds


def _between(first: Row, started: float, previous_end: float | None) -> dict[str, float]:
    """Seconds before a process, by activity, from the end of the previous one (or the first submission)."""
    queued, left = (first.get("job", {}).get(name) for name in JOB_TIMES)
    if queued is None or left is None:
        return {} if previous_end is None else {"down": max(0.0, started - previous_end)}
    # Two machines' clocks differ and SLURM rounds to seconds: keep the times in order, so that the parts sum to the whole.
    end = min(previous_end if previous_end is not None else queued, started)
    queued = min(max(queued, end), started)
    left = min(max(left, queued), started)
    return {"down": queued - end, "queue": left - queued, "launch": started - left}


def _attempts(rows: tuple[Row, ...]) -> list[list[Row]]:
    groups: dict[int, list[Row]] = {}
    for row in rows:
        if "seconds" in row:
            groups.setdefault(row["incarnation"], []).append(row)
    return [groups[attempt] for attempt in sorted(groups)]


def _repeated_seconds(rows: tuple[Row, ...]) -> float:
    """Training time that restarts and rewinds discarded: all after the last row at or before the step they resumed from."""
    total = 0.0
    stretch: list[Row] = []
    for row in rows:
        if "seconds" not in row or row["kind"] == "damaged":  # it belongs to the attempt that follows
            continue
        if row["kind"] in CONTINUES and stretch:
            kept = [earlier for earlier in stretch if earlier["step"] <= row["step"]]
            last_kept = kept[-1] if kept else stretch[0]
            total += stretch[-1]["seconds"].get("train", 0.0) - last_kept["seconds"].get("train", 0.0)
        if row["kind"] in CONTINUES:
            stretch = []
        stretch.append(row)
    return total
