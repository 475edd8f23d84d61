"""Several sources as one stream of samples, in exact proportions that may change at planned steps."""

import bisect
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

from megagpt.data.dataset import Dataset, Sample


class Mixture:
    """Several datasets as one endless sequence in exact proportions: after any n samples each of S sources has had its share of
    them, give or take half of log2(S), rounded up.

    Computed, not stored: the sources are halved, sample i of the two halves goes to the first one when its share of the first
    i + 1 samples, rounded, is more than its share of i; and so on within the half. Each source counts its own samples, so it
    has epochs of its own. Weights may change at given samples: the proportions then begin anew, each source's count goes on.
    """

    def __init__(
        self, datasets: Sequence[Dataset], weights: Sequence[float], changes: Sequence[tuple[int, Sequence[float]]] = ()
    ) -> None:
        self.datasets = tuple(datasets)
        self._starts = [0, *(start for start, _ in changes)]
        self._sums = [_cumulated(values) for values in (weights, *(values for _, values in changes))]
        self._before = [[0] * len(datasets)]
        """Samples that each source has given when a phase begins."""
        for phase, (start, end) in enumerate(itertools.pairwise(self._starts)):
            given = self._counts(end - start, self._sums[phase])
            self._before.append([a + b for a, b in zip(self._before[-1], given, strict=True)])
        sums = self._sums[0]
        shares = [last - first for first, last in itertools.pairwise(sums)]
        self._length = max(-(-len(d) * sums[-1] // share) for d, share in zip(datasets, shares, strict=True) if share)

    def __len__(self) -> int:
        """Samples until every source has been through about once, by the first weights."""
        return self._length

    def sample(self, index: int) -> Sample:
        """Sample `index` of the mixture."""
        source, position = self.locate(index)
        return self.datasets[source].sample(position)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, sample index in that source) of a sample of the mixture."""
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

    def _counts(self, count: int, sums: list[int], first: int = 0, last: int | None = None) -> list[int]:
        """How many of the first `count` samples of a phase come from each source."""
        last = len(self.datasets) if last is None else last
        if last - first == 1:
            return [count]
        middle = (first + last) // 2
        taken = _share(count, sums, first, middle, last)
        return self._counts(taken, sums, first, middle) + self._counts(count - taken, sums, middle, last)


def _cumulated(weights: Sequence[float]) -> list[int]:
    """0 and the running sums of weights, scaled to integers: decimal fractions stay exact."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    return [0, *itertools.accumulate(int(weight * scale) for weight in exact)]


def _share(count: int, sums: list[int], first: int, middle: int, last: int) -> int:
    """How many of `count` samples of the sources [first, last) the sources before `middle` have had, rounded."""
    share, whole = sums[middle] - sums[first], sums[last] - sums[first]
    return (2 * count * share + whole) // (2 * whole) if whole else 0
