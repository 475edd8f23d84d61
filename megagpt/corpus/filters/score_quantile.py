"""The score that a given fraction of documents reaches: exact, over any number of scores, in bounded memory."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megagpt.config import UserError
from megagpt.corpus.dedup.index import write_array
from megagpt.files import atomic_path

SCORES_PER_READ = 1 << 20


def write_scores(scores: Iterable[float], path: Path) -> int:
    """Write scores (0 to 1) as float32; returns how many."""
    values = np.fromiter(scores, np.float32)
    with atomic_path(path) as temporary:
        write_array(temporary, values)
    return values.size


def score_of_top(paths: Sequence[Path], fraction: float) -> float:
    """The smallest score of the best `fraction` of all scores in the files, at least one. Raises UserError if there is none."""
    total = sum(path.stat().st_size // 4 for path in paths)
    if total == 0:
        raise UserError("filter.classifier.top_fraction: no document reaches the classifier")
    # The bits of floats from 0 on are ordered like the floats: count by their upper half, then by the lower half in that bin.
    wanted = max(1, math.ceil(fraction * total - 1e-9))
    upper = np.zeros(1 << 16, np.int64)
    for bits in _read_bits(paths):
        upper += np.bincount(bits >> 16, minlength=upper.size)
    top, above = _bin_of(upper, wanted)
    lower = np.zeros(1 << 16, np.int64)
    for bits in _read_bits(paths):
        lower += np.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=lower.size)
    bottom, _ = _bin_of(lower, wanted - above)
    return float(np.array(top << 16 | bottom, np.uint32).view(np.float32))


def _read_bits(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    for path in paths:
        with path.open("rb") as file:
            while (bits := np.fromfile(file, np.uint32, SCORES_PER_READ)).size:
                yield bits


def _bin_of(counts: np.ndarray, wanted: int) -> tuple[int, int]:
    """(the bin that holds the wanted-th entry from the top, how many entries are above it)."""
    from_top = np.cumsum(counts[::-1])
    at = int(np.searchsorted(from_top, wanted))
    return len(counts) - 1 - at, int(from_top[at] - counts[::-1][at])
