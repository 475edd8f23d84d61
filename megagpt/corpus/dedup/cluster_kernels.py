"""Compiled loops of near_duplicates.py. This module imports numba, so import it where it is used."""

import numpy as np

from megagpt.corpus.compiled import njit


@njit
def find(parents, document):
    """The root of a document's component, with path halving; roots are their own parents."""
    while parents[document] != document:
        parents[document] = parents[parents[document]]
        document = parents[document]
    return document


@njit
def unite(parents, pairs):
    """Join the components of each pair; the smallest document of a component is its root, whatever the order of pairs."""
    for i in range(pairs.shape[0]):
        a, b = find(parents, pairs[i, 0]), find(parents, pairs[i, 1])
        if a < b:
            parents[b] = a
        else:
            parents[a] = b


@njit
def flatten(parents):
    """Let every document point at its root."""
    for document in range(parents.size):
        parents[document] = find(parents, document)


@njit
def add_weights(roots, first, shingle_counts, fixed_bytes, first_new, weights):
    """Add the bytes of documents first, first + 1, ... to weights[root], which is negative while a component has one member or
    no new one (from `first_new` on)."""
    for i in range(shingle_counts.size):
        root = roots[first + i]
        weight = fixed_bytes + 4 * np.int64(shingle_counts[i])
        total = abs(weights[root]) + weight
        weights[root] = -total if root == first + i or first + i < first_new else total


@njit
def assign_partitions(weights, capacity):
    """Replace each component's weight by its partition, in order of roots, filled to `capacity` bytes; -1 for single documents.

    Returns the number of partitions. A component above the capacity gets a partition of its own.
    """
    partition, filled = -1, capacity + 1
    for root in range(weights.size):
        weight = weights[root]
        if weight <= 0:
            weights[root] = -1
            continue
        if filled + weight > capacity:
            partition += 1
            filled = 0
        filled += weight
        weights[root] = partition
    return partition + 1


@njit
def _estimate(signatures, a, b):
    equal = 0
    for row in range(signatures.shape[1]):
        equal += signatures[a, row] == signatures[b, row]
    return equal / signatures.shape[1]


@njit
def _jaccard(shingles, starts, a, b, threshold):
    """Jaccard similarity of two ascending sets, or -1 as soon as it cannot reach the threshold."""
    i, end_a, j, end_b = starts[a], starts[a + 1], starts[b], starts[b + 1]
    total = end_a - i + end_b - j
    needed = threshold * total / (1 + threshold)
    if min(end_a - i, end_b - j) < needed - 1e-6:
        return -1.0
    common = 0
    while i < end_a and j < end_b:
        x, y = shingles[i], shingles[j]
        common += x == y
        i += x <= y
        j += y <= x
    return common / (total - common)


@njit
def keep_representatives(buckets, signatures, starts, shingles, threshold, min_estimate, exact, max_comparisons, num_known):
    """Go through documents in order; drop one that is similar to a kept one it shares a bucket with, otherwise keep it.

    buckets: int64 [bands, documents], equal for documents with one key. signatures: uint16 [documents, rows]. starts: int64
    [documents + 1] into shingles (uint32, ascending per document; only with exact). In each bucket a document is compared with
    at most max_comparisons kept ones, the earliest. The first num_known documents are kept without being compared. Returns
    kept_by (int64, -1: kept), similarity, [comparisons, exact comparisons, documents that were kept though some bucket had more
    kept ones than allowed].
    """
    num_bands, count = buckets.shape
    first = np.full((num_bands, count), -1, np.int64)
    last = np.full((num_bands, count), -1, np.int64)
    following = np.full((num_bands, count), -1, np.int64)
    seen = np.full(count, -1, np.int64)
    kept_by = np.full(count, -1, np.int64)
    similarity = np.zeros(count, np.float32)
    counts = np.zeros(3, np.int64)
    for document in range(count):
        limited = False
        for band in range(num_bands if document >= num_known else 0):
            other = first[band, buckets[band, document]]
            compared = 0
            while other >= 0 and kept_by[document] < 0:
                if compared == max_comparisons:
                    limited = True
                    break
                compared += 1
                if seen[other] != document:
                    seen[other] = document
                    counts[0] += 1
                    value = _estimate(signatures, document, other)
                    if exact and value >= min_estimate:
                        counts[1] += 1
                        value = _jaccard(shingles, starts, document, other, threshold)
                    elif exact:
                        value = -1.0
                    if value >= threshold:
                        kept_by[document] = other
                        similarity[document] = value
                other = following[band, other]
            if kept_by[document] >= 0:
                break
        if kept_by[document] >= 0:
            continue
        counts[2] += limited
        for band in range(num_bands):
            bucket = buckets[band, document]
            if first[band, bucket] < 0:
                first[band, bucket] = document
            else:
                following[band, last[band, bucket]] = document
            last[band, bucket] = document
    return kept_by, similarity, counts
