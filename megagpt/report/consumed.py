"""The mixture that a run has consumed: samples of each source over steps, from its ledger and the settings of its attempts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.data.mixture import given_by
from megagpt.data.open_data import DataConfig
from megagpt.data.sample_ledger import Entry, read_ledger
from megagpt.settings_record import read_settings

MAX_SPANS = 100
"""Most points of the chart."""

Phases = list[tuple[int, list[float]]]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive updates: the number of the last one (from 1), samples by source, and the samples by the weights."""

    step: int
    samples: dict[str, int]
    configured: dict[str, float]


@dataclass(frozen=True, slots=True)
class Order:
    """How an attempt drew its samples: names of the sources, and (first sample, weights) of each phase."""

    names: tuple[str, ...]
    phases: Phases

    def counts(self, start: int, end: int) -> list[int]:
        """Samples of each source among [start, end)."""
        before, after = (given_by(index, self.phases) for index in (start, end))
        return [b - a for a, b in zip(before, after, strict=True)]

    def configured(self, start: int, end: int) -> list[float]:
        """The weights' shares of [start, end)."""
        found = [0.0] * len(self.names)
        bounds = [begin for begin, _ in self.phases[1:]] + [end]
        for (begin, weights), until in zip(self.phases, bounds, strict=True):
            count = max(0, min(end, until) - max(start, begin))
            found = [sofar + count * weight / sum(weights) for sofar, weight in zip(found, weights, strict=True)]
        return found


def read_consumed(run_dir: Path, orders: Mapping[int, Order]) -> list[Span]:
    """The run's updates in at most MAX_SPANS equal spans, oldest first; [] without a ledger or the orders of its attempts.

    Repeated steps count once, as in the ledger; samples that a rewind left out are not in it. Raises UserError, KeyError,
    TypeError or ValueError on a damaged ledger.
    """
    entries = [entry for entry in read_ledger(run_dir) if entry.attempt in orders]
    width = -(-len(entries) // MAX_SPANS) or 1
    spans = []
    for begin in range(0, len(entries), width):
        chunk = entries[begin : begin + width]
        samples: dict[str, int] = {}
        configured: dict[str, float] = {}
        for attempt, start, end in _merged(chunk):
            order = orders[attempt]
            for name, count, share in zip(order.names, order.counts(start, end), order.configured(start, end), strict=True):
                samples[name] = samples.get(name, 0) + count
                configured[name] = configured.get(name, 0.0) + share
        spans.append(Span(chunk[-1].step + 1, samples, configured))
    return spans


def order_of(start: Mapping[str, Any]) -> Order:
    """How the attempt of this record drew its samples. Raises UserError, KeyError, TypeError or ValueError."""
    config = read_settings(DataConfig, start["config"]["data"], source=f"starts/{start['incarnation']:04d}.json")
    phases = config.phases()
    if start.get("mixture"):  # it continues an earlier mixture; from this sample on the proportions start again
        begin = int(start["mixture"]["from_sample"])
        in_force = [weights for first, weights in phases if first <= begin][-1]
        phases = [(begin, in_force), *(phase for phase in phases if phase[0] > begin)]
    return Order(tuple(config.sources), phases)


def _merged(entries: Sequence[Entry]) -> Iterator[tuple[int, int, int]]:
    """(attempt, start, end) of the samples of entries; consecutive ranges are joined."""
    found: tuple[int, int, int] | None = None
    for entry in entries:
        for start, end in entry.ranges():
            if found is not None and found[0] == entry.attempt and found[2] == start:
                found = (entry.attempt, found[1], end)
                continue
            if found is not None:
                yield found
            found = (entry.attempt, start, end)
    if found is not None:
        yield found
