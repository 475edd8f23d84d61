"""The compiled loop behind overlap.py. Importing this module imports numba: do it where it is used."""

import numpy as np

from megagpt.corpus.compiled import njit


@njit
def most_similar(found, keys, owners, buckets, sets, ends, threshold):
    """(document, similarity) of the indexed document most like the shingle set `found`, the first of equals; (-1, 0) if no
    Jaccard similarity reaches the threshold. Every document that could reach it is compared.

    found: uint32, ascending. keys: uint32, ascending, the shingles of all indexed documents; owners: their documents. buckets:
    int64 [65,537], where in keys each value of the upper 16 bits begins. sets with ends: the shingle set of each document.
    """
    # A Jaccard similarity of t needs at least t * |found| shingles in common, so most documents end here.
    needed = int(np.ceil(threshold * found.size - 1e-9))
    firsts = np.empty(found.size, np.int64)
    counts = np.empty(found.size, np.int64)
    matched = 0
    for i in range(found.size):
        top = found[i] >> np.uint32(16)
        low, high = buckets[top], buckets[top + 1]
        first = low + np.searchsorted(keys[low:high], found[i])
        last = low + np.searchsorted(keys[low:high], found[i], side="right")
        if last > first:
            firsts[matched], counts[matched] = first, last - first
            matched += 1
        elif i + 1 - matched > found.size - needed:
            return -1, 0.0
    # Whoever has `needed` of the matched shingles has one of any matched - needed + 1: the rarest ones name the candidates.
    rarest = np.argsort(counts[:matched], kind="mergesort")[: matched - needed + 1]
    candidates = np.empty(counts[rarest].sum(), owners.dtype)
    at = 0
    for i in rarest:
        candidates[at : at + counts[i]] = owners[firsts[i] : firsts[i] + counts[i]]
        at += counts[i]
    candidates.sort()
    best, best_similarity = -1, 0.0
    for i in range(candidates.size):
        if i > 0 and candidates[i] == candidates[i - 1]:
            continue
        document = np.int64(candidates[i])
        similarity = _jaccard(found, sets[ends[document] : ends[document + 1]])
        if similarity >= threshold and similarity > best_similarity:
            best, best_similarity = document, similarity
    return best, best_similarity


@njit
def _jaccard(a, b):
    i = j = common = 0
    while i < a.size and j < b.size:
        x, y = a[i], b[j]
        common += x == y
        i += x <= y
        j += y <= x
    return common / (a.size + b.size - common)
