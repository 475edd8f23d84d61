"""Several sources as one stream of samples, in exact proportions that may change at planned steps."""

import bisect
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

from megagpt.data.dataset import Dataset, Sample, TokenDataset
from megagpt.data.state import MixtureStart


class Mixture:
    """Several datasets as one endless sequence in exact proportions: after any n samples each of S sources has given its share
    of them, within half of log2(S), rounded up.

    Computed, not stored: the sources are halved, sample i of the two halves goes to the first one when its share of the first
    i + 1 samples, rounded, is more than its share of i; and so on within the half. Each source counts its own samples, so it
    has epochs of its own. Weights may change at given samples: the proportions then start anew; each source's count continues.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float],
        changes: Sequence[tuple[int, Sequence[float]]] = (),
        *,
        names: Sequence[str] = (),
        begin: int = 0,
        given: Sequence[int] = (),
    ) -> None:
        """changes: (first sample, weights) of each change. names: of the sources, for `continued`. begin, given: the first
        sample that this mixture has, and how many samples each source had given before it."""
        self.datasets, self.names = tuple(datasets), tuple(names)
        self._phases = [(begin, list(weights)), *((start, list(values)) for start, values in changes)]
        self._starts = [start for start, _ in self._phases]
        self._sums = [_cumulated(values) for _, values in self._phases]
        self._continued: dict[int, Mixture] = {}
        self._before = _given_before(self._starts, self._sums, list(given) or [0] * len(datasets))
        """Samples that each source has given when a phase begins."""
        sums = self._sums[0]
        shares = [last - first for first, last in itertools.pairwise(sums)]
        self._length = max(-(-len(d) * sums[-1] // share) for d, share in zip(datasets, shares, strict=True) if share)

    def __len__(self) -> int:
        """Samples until every source was used about once, by the first weights."""
        return self._length

    def sample(self, index: int) -> Sample:
        """Sample `index` of the mixture."""
        source, position = self.locate(index)
        return self.datasets[source].sample(position)

    def continued(self, start: MixtureStart | None) -> "Mixture":
        """This mixture as one that took over from an earlier one: each source continues, by name, where it was."""
        if start is None:
            return self
        if start.from_sample not in self._continued:
            numbers = [start.numbers[name] for name in self.names]
            datasets = [
                dataset.with_number(number, start.cuts.get(name, ())) if isinstance(dataset, TokenDataset) else dataset
                for name, dataset, number in zip(self.names, self.datasets, numbers, strict=True)
            ]
            given = [start.given.get(name, 0) for name in self.names]
            in_force = [values for begin, values in self._phases if begin <= start.from_sample][-1]
            later = [(begin, values) for begin, values in self._phases if begin > start.from_sample]
            self._continued[start.from_sample] = Mixture(
                datasets, in_force, later, names=self.names, begin=start.from_sample, given=given
            )
        return self._continued[start.from_sample]

    def locate(self, index: int) -> tuple[int, int]:
        """(source, sample index in that source) of a sample of the mixture. Raises ValueError before its first one."""
        if index < self._starts[0]:
            raise ValueError(f"sample {index} is of the mixture before this one, which begins at {self._starts[0]}")
        phase = bisect.bisect_right(self._starts, index) - 1
        index, sums = index - self._starts[phase], self._sums[phase]
        first, last = 0, len(self.datasets)
        while last - first > 1:
            middle = (first + last) // 2
            taken, after = (_share(i, sums, first, middle, last) for i in (index, index + 1))
            if after > taken:
                index, last = taken, middle
            else:
                index, first = index - taken, middle
        return first, self._before[phase][first] + index


def given_by(index: int, phases: Sequence[tuple[int, Sequence[float]]], given: Sequence[int] = ()) -> list[int]:
    """How many samples each source has given before sample `index`, by (first sample, weights) of each phase; `given` before
    the first one."""
    begun = [phase for phase in phases if phase[0] <= index]
    sums = [_cumulated(weights) for _, weights in begun]
    before = _given_before([start for start, _ in begun], sums, list(given) or [0] * len(begun[0][1]))
    return [a + b for a, b in zip(before[-1], _counts(index - begun[-1][0], sums[-1]), strict=True)]


def _given_before(starts: Sequence[int], sums: Sequence[list[int]], given: list[int]) -> list[list[int]]:
    before = [given]
    for phase, (start, end) in enumerate(itertools.pairwise(starts)):
        before.append([a + b for a, b in zip(before[-1], _counts(end - start, sums[phase]), strict=True)])
    return before


def _counts(count: int, sums: list[int], first: int = 0, last: int | None = None) -> list[int]:
    """How many of the first `count` samples of a phase come from each source."""
    last = len(sums) - 1 if last is None else last
    if last - first == 1:
        return [count]
    middle = (first + last) // 2
    taken = _share(count, sums, first, middle, last)
    return _counts(taken, sums, first, middle) + _counts(count - taken, sums, middle, last)


def _cumulated(weights: Sequence[float]) -> list[int]:
    """0 and the running sums of weights, scaled to integers: decimal fractions stay exact."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    return [0, *itertools.accumulate(int(weight * scale) for weight in exact)]


def _share(count: int, sums: list[int], first: int, middle: int, last: int) -> int:
    """How many of `count` samples of the sources [first, last) the sources before `middle` have had, rounded."""
    share, whole = sums[middle] - sums[first], sums[last] - sums[first]
    return (2 * count * share + whole) // (2 * whole) if whole else 0
