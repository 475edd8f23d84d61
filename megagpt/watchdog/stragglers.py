"""Find the ranks that are slow, and what they are slow at: rank 0 compares all ranks' seconds per step. Needs no torch."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

LONG_ACTIVITIES = ("start", "load", "save", "evaluate", "generate")
"""Activities of the clock that are not part of a step."""

Progress = dict[str, float]
"""A rank's totals at the beginning of a step, since its process began: "steps" done (-1: none has begun), seconds by activity
of the clock, "forward": seconds in forward passes, "collective": seconds of waiting in collectives, estimated from "looks"
samples."""

MIN_LOOKS = 100
"""Samples of the stack that are needed before a share of the time is reported; it is then accurate within 0.05."""


class RankTimes:
    """Compares the ranks' reports with those of the previous call."""

    def __init__(self, slow_ratio: float) -> None:
        self.slow_ratio = slow_ratio
        self._before: dict[int, Progress] = {}
        self._looked_before: dict[int, Progress] = {}

    def summary(self, reports: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        """`summarise` over the time since the last call; for sampled values, since the last call that reported them."""
        rates: dict[str, dict[int, float]] = {}
        reports = {rank: report for rank, report in reports.items() if report["progress"]["steps"] >= 0}
        now: dict[int, Progress] = {rank: report["progress"] for rank, report in reports.items()}
        for before, read in ((self._before, step_seconds), (self._looked_before, waiting_seconds)):
            for rank, progress in now.items():
                if rank not in before or progress["steps"] < before[rank]["steps"]:  # a rewind: start again
                    before[rank] = progress
            found = {rank: read(before[rank], progress) for rank, progress in now.items()}
            if all(found.values()):  # all ranks over the same time, so that they can be compared
                before.update(now)
                for rank, seconds in found.items():
                    for name in seconds:
                        rates.setdefault(name, {})[rank] = seconds[name]
        return summarise(rates, {rank: report["host"] for rank, report in reports.items()}, self.slow_ratio)


def step_seconds(earlier: Progress, later: Progress) -> dict[str, float]:
    """Seconds per step of one rank between two moments: total, waiting for data, and in forward passes; {} without a step."""
    steps = later["steps"] - earlier["steps"]
    if steps <= 0:
        return {}
    spent = {name: (seconds - earlier.get(name, 0.0)) / steps for name, seconds in later.items()}
    outside = (*LONG_ACTIVITIES, "steps", "looks", "forward", "collective")
    step = sum(seconds for name, seconds in spent.items() if name not in outside)
    return {"step_time": step, "data_wait": spent.get("data_wait", 0.0), "forward": spent["forward"]}


def waiting_seconds(earlier: Progress, later: Progress) -> dict[str, float]:
    """Seconds per step that one rank waits in collectives, and that it works by itself: the step without that and without the
    data wait. {} until there are MIN_LOOKS samples."""
    found = step_seconds(earlier, later)
    if not found or later["looks"] - earlier["looks"] < MIN_LOOKS:
        return {}
    waited = (later["collective"] - earlier["collective"]) / (later["steps"] - earlier["steps"])
    return {"collective_wait": waited, "own_work": max(0.0, found["step_time"] - found["data_wait"] - waited)}


def summarise(rates: Mapping[str, Mapping[int, float]], hosts: Mapping[int, str], slow_ratio: float) -> dict[str, Any]:
    """Median and maximum over ranks of seconds per step, by activity, and `slow`: the ranks above slow_ratio x the median, each
    named once. A long wait in collectives makes no rank slow: the slow rank waits least, and does the most work of its own."""
    result: dict[str, Any] = {}
    slow: dict[int, str] = {}
    for name, table in rates.items():
        median, worst = statistics.median_low(table.values()), max(table, key=lambda rank: table[rank])
        result[name] = {"median_seconds": median, "max_seconds": table[worst], "max_rank": worst}
        # A smaller difference is noise: less than a millisecond costs nothing, and own_work is only sampled.
        looked = [table[rank] + rates["collective_wait"][rank] for rank in table] if name == "own_work" else [0.0]
        noise = max(1e-3, 0.15 * statistics.median_low(looked))
        for rank in sorted(table) if name in ("data_wait", "forward", "own_work") else ():
            if table[rank] > slow_ratio * median and table[rank] - median > noise and rank not in slow:
                slow[rank] = f"rank {rank} on {hosts[rank]}: {name} {table[rank]:.3f} s, median {median:.3f} s"
    if slow:
        result["slow"] = "; ".join(list(slow.values())[:8])
    return result


def count_slow(texts: Iterable[str]) -> dict[tuple[str, str], tuple[int, str]]:
    """Count `slow` of rows in metrics.jsonl: (rank and host, activity) -> (number of rows, last figures), most rows first."""
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for text in texts:
        for name in filter(None, text.split("; ")):
            place, _, rest = name.partition(": ")
            what, _, figures = rest.partition(" ")
            found[place, what] = (found.get((place, what), (0, ""))[0] + 1, figures)
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
