"""Best-fit packing: documents in an order in which samples of a given length cut few of them.

No token is added and none is lost: training reads one stream of tokens, sample by sample, and a document that begins where a
sample begins, or fits into what is left of one, is whole in it. Documents longer than a sample come first at a sample's begin,
then what is left of their last sample is filled with the largest documents that fit, largest first, and if possible to its
very end (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", but the shards stay plain streams). Only when nothing
fits is a document cut.
"""

import bisect
from collections.abc import Iterator

import numpy as np

from megagpt.data.permutation import mix

BLOCK_DOCUMENTS = 65_536
"""Documents move within blocks of this many: the order of keys holds on the whole, and memory is bounded."""
LOOK_AHEAD = 256
"""So many sizes are tried for one that together with another fills a sample to its end."""


def best_fit_order(lengths: np.ndarray, seq_len: int, first_token: int) -> np.ndarray:
    """The order of documents of these `lengths` (tokens) in a stream whose next token has the number `first_token`.

    A pure function; returns int64 [documents].
    """
    order, position = [np.empty(0, np.int64)], first_token
    for start in range(0, len(lengths), BLOCK_DOCUMENTS):
        block = lengths[start : start + BLOCK_DOCUMENTS]
        order.append(start + _order_block(block, seq_len, position))
        position += int(block.sum())
    return np.concatenate(order)


def num_cut(lengths: np.ndarray, seq_len: int, first_token: int = 0) -> int:
    """The number of documents that would fit into one sample but are cut in two, in a stream in this order."""
    ends = first_token + np.cumsum(lengths)
    starts = ends - lengths
    return int(np.count_nonzero((lengths <= seq_len) & (starts // seq_len != (ends - 1) // seq_len)))


def _order_block(lengths: np.ndarray, seq_len: int, position: int) -> np.ndarray:
    groups: list[list[int]] = [[]]
    for document in _largest_that_fit(lengths.tolist(), seq_len, position):
        groups[-1].append(document)
        position += int(lengths[document])
        if position % seq_len == 0:
            groups.append([])
    # Groups that begin and end at borders of samples are shuffled, or training would see the largest documents first. The first
    # group and the last one may not be whole samples and stay where they are.
    first, *middle, last = groups if len(groups) > 1 else [groups[0], []]
    return np.array([*first, *(document for group in sorted(middle, key=_shuffled) for document in group), *last], np.int64)


def _shuffled(group: list[int]) -> int:
    return mix(group[0], len(group))


def _largest_that_fit(lengths: list[int], seq_len: int, position: int) -> Iterator[int]:
    """The documents, each once: always one of the largest that fit into the rest of the sample; of equals the first."""
    waiting: dict[int, list[int]] = {}
    for document in reversed(range(len(lengths))):
        waiting.setdefault(lengths[document], []).append(document)
    sizes = sorted(waiting)
    while sizes:
        left = seq_len - position % seq_len
        which = _choose(sizes, waiting, left) if left < seq_len else len(sizes) - 1
        size = sizes[which]
        yield waiting[size].pop()
        position += size
        if not waiting[size]:
            del sizes[which], waiting[size]


def _choose(sizes: list[int], waiting: dict[int, list[int]], left: int) -> int:
    """Which size to put into a rest: the largest that fills it alone or with one more, else the largest that fits, else the
    largest of all, which is cut."""
    fitting = bisect.bisect_right(sizes, left)
    if not fitting:
        return len(sizes) - 1
    for which in range(fitting - 1, max(-1, fitting - 1 - LOOK_AHEAD), -1):
        rest = left - sizes[which]
        if rest == 0 or len(waiting.get(rest, ())) > (rest == sizes[which]):
            return which
    return fitting - 1


def pack_whole(lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Rows of these `lengths` (tokens, each at most seq_len) in samples that cut none: best fit, the longest first.

    A pure function. The samples' order is shuffled, within each the rows keep their order.
    """
    samples: list[list[int]] = []
    for start in range(0, len(lengths), BLOCK_DOCUMENTS):
        block = lengths[start : start + BLOCK_DOCUMENTS]
        room: dict[int, list[list[int]]] = {}
        sizes: list[int] = []  # what is left in samples that are not full, ascending
        packed: list[list[int]] = []
        for row in np.argsort(-block, kind="stable").tolist():
            length = int(block[row])
            which = bisect.bisect_left(sizes, length)
            left = sizes[which] if which < len(sizes) else seq_len
            if which < len(sizes):
                sample = room[left].pop()
                if not room[left]:
                    del room[left], sizes[which]
            else:
                packed.append(sample := [])
            sample.append(start + row)
            if left > length:
                if left - length not in room:
                    bisect.insort(sizes, left - length)
                room.setdefault(left - length, []).append(sample)
        samples += sorted((sorted(sample) for sample in packed), key=_shuffled)
    return samples
