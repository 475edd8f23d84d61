"""Compiled loops behind words.count_repeated_n_grams. Importing this module imports numba: do it where it is used.

Both loops keep n-grams in an open-addressing table of positions and compare the n-grams themselves on a hit, so a collision of
hashes changes nothing.
"""

import numpy as np

from megagpt.corpus.compiled import njit

BASE = np.uint64(0x9E3779B97F4A7C15)


@njit
def mix(value):
    """The finalizer of MurmurHash3, 64 bits: https://github.com/aappleby/smhasher."""
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xFF51AFD7ED558CCD)
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))


@njit
def table_size(num_entries):
    """Slots of an open-addressing table: a power of two, at most half of them used."""
    size = 16
    while size < 2 * num_entries:
        size *= 2
    return size


@njit
def top_n_gram(ids, starts, n):
    """Characters of the most frequent n-gram joined by spaces, times its count; the first one seen among equally frequent.

    ids: int64 [words], equal for equal words. starts: int64 [words + 1], character offsets in the unspaced text. Needs n words.
    """
    num_grams = ids.size - n + 1
    size = table_size(num_grams)
    mask = np.uint64(size - 1)
    table = np.full(size, -1, np.int64)
    counts = np.zeros(num_grams, np.int64)
    for i in range(num_grams):
        value = np.uint64(0)
        for j in range(i, i + n):
            value = value * BASE + np.uint64(ids[j]) + np.uint64(1)
        slot = mix(value) & mask
        while True:
            first = table[slot]
            if first < 0:
                table[slot] = i
                counts[i] = 1
                break
            same = True
            for j in range(n):
                if ids[first + j] != ids[i + j]:
                    same = False
                    break
            if same:
                counts[first] += 1
                break
            slot = (slot + np.uint64(1)) & mask
    best = np.argmax(counts)
    return (starts[best + n] - starts[best] + n - 1) * counts[best]


@njit
def duplicate_n_grams(codes, starts, sizes):
    """For each n of `sizes`, the characters in n-grams that occurred before, advancing by n after a hit: int64 [len(sizes)].

    codes: uint32 [characters], the words joined without spaces. starts: int64 [words + 1], where each word begins in it.
    """
    num_words = starts.size - 1
    prefix = np.zeros(num_words + 1, np.uint64)
    value = np.uint64(0)
    power = np.ones(codes.size + 1, np.uint64)
    for word in range(num_words):
        for at in range(starts[word], starts[word + 1]):
            value = value * BASE + np.uint64(codes[at]) + np.uint64(1)
            power[at + 1] = power[at] * BASE
        prefix[word + 1] = value
    slots = table_size(num_words)
    mask = np.uint64(slots - 1)
    table = np.empty(slots, np.int64)
    repeated = np.zeros(sizes.size, np.int64)
    for which in range(sizes.size):
        n = sizes[which]
        table[:] = -1
        i = 0
        while i + n <= num_words:
            begin = starts[i]
            length = starts[i + n] - begin
            slot = mix(prefix[i + n] - prefix[i] * power[length]) & mask
            hit = False
            while table[slot] >= 0 and not hit:
                first = starts[table[slot]]
                hit = starts[table[slot] + n] - first == length
                if hit:
                    for offset in range(length):
                        if codes[first + offset] != codes[begin + offset]:
                            hit = False
                            break
                if not hit:
                    slot = (slot + np.uint64(1)) & mask
            if hit:
                repeated[which] += length
                i += n
            else:
                table[slot] = i
                i += 1
    return repeated
