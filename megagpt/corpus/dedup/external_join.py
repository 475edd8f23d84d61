"""Pairs of documents that share a 64-bit key, for any number of documents in bounded memory: sorted runs on disk, merged by
key range.

Keys are hashes, so they spread evenly: a range of keys of all runs together fits in memory and is sorted there. A range that
does not fit is halved; a single key with too many documents is passed through piece by piece. The memory changes no result.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from megagpt.corpus.dedup.index import write_array

BYTES_PER_ENTRY = 64
"""Memory that sorting takes per entry: key and document, the order, sorted copies."""

MAX_KEY = (1 << 64) - 1

Entries = tuple[np.ndarray, np.ndarray]


def equal_key_pairs(chunks: Iterable[Entries], *, memory_bytes: int, scratch: Path) -> Iterator[np.ndarray]:
    """int64 [n, 2] arrays of (smallest document with a key, another document with it), each pair once, in no special order.

    chunks: (keys uint64 [n], documents int64 [n]) in any order; a document has each key at most once.
    """
    capacity = max(1024, memory_bytes // BYTES_PER_ENTRY)
    with tempfile.TemporaryDirectory(prefix="runs-", dir=scratch) as folder:
        pieces = _regroup(chunks, capacity)
        last = next(pieces, None)
        if last is None:
            return
        runs: list[Entries] = []
        for piece in pieces:
            runs.append(_spill(last, Path(folder), len(runs)))
            last = piece
        if not runs:
            yield from _pairs(*last)
            return
        runs.append(_spill(last, Path(folder), len(runs)))
        yield from _merge(runs, 0, MAX_KEY, capacity)


def _regroup(chunks: Iterable[Entries], capacity: int) -> Iterator[Entries]:
    """The same entries in arrays of `capacity`, the last one shorter."""
    waiting: list[Entries] = []
    size = 0
    for keys, documents in chunks:
        while keys.size:
            take = min(capacity - size, keys.size)
            waiting.append((keys[:take], documents[:take]))
            keys, documents = keys[take:], documents[take:]
            size += take
            if size == capacity:
                yield _join(waiting)
                waiting, size = [], 0
    if size:
        yield _join(waiting)


def _join(pieces: list[Entries]) -> Entries:
    return np.concatenate([keys for keys, _ in pieces]), np.concatenate([documents for _, documents in pieces])


def _spill(entries: Entries, folder: Path, number: int) -> Entries:
    keys, documents = entries
    order = np.argsort(keys)
    mapped = []
    for name, values in (("keys", keys), ("documents", documents)):
        path = folder / f"{number:05d}.{name}"
        write_array(path, values[order])
        mapped.append(np.memmap(path, values.dtype, "r"))
    return mapped[0], mapped[1]


def _merge(runs: list[Entries], low: int, high: int, capacity: int) -> Iterator[np.ndarray]:
    """Pairs among the entries whose keys are in [low, high]."""
    bounds = [
        (int(np.searchsorted(keys, np.uint64(low), "left")), int(np.searchsorted(keys, np.uint64(high), "right")))
        for keys, _ in runs
    ]
    size = sum(end - start for start, end in bounds)
    if size < 2:
        return
    parts = [(keys[a:b], documents[a:b]) for (keys, documents), (a, b) in zip(runs, bounds, strict=True) if b > a]
    if size <= capacity:
        yield from _pairs(*_join(parts))
    elif low == high:
        smallest = min(int(documents.min()) for _, documents in parts)
        for _, documents in parts:
            yield from (_star(smallest, documents[at : at + capacity]) for at in range(0, documents.size, capacity))
    else:
        middle = (low + high) // 2
        yield from _merge(runs, low, middle, capacity)
        yield from _merge(runs, middle + 1, high, capacity)


def _pairs(keys: np.ndarray, documents: np.ndarray) -> Iterator[np.ndarray]:
    if keys.size < 2:
        return
    order = np.argsort(keys)
    keys, documents = keys[order], documents[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    smallest = np.repeat(np.minimum.reduceat(documents, starts), np.diff(np.append(starts, keys.size)))
    others = smallest != documents
    yield np.stack([smallest[others], documents[others]], axis=1)


def _star(center: int, documents: np.ndarray) -> np.ndarray:
    others = np.asarray(documents[documents != center])
    return np.stack([np.full_like(others, center), others], axis=1)
