"""Compiled loops behind minhash.py. Importing this module imports numba: do it where it is used."""

import numpy as np
from numba import njit

from megagpt.corpus.minhash import DIGIT, FOLDED_SIZE, LETTER, MARK, NOT_ALONE, TABLE_SIZE, WORD_CHARACTER


@njit(cache=True, nogil=True)
def _mix(value):
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xFF51AFD7ED558CCD)
    value ^= value >> np.uint64(33)
    value *= np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))


@njit(cache=True, nogil=True)
def _class_of(code, classes):
    if code < TABLE_SIZE:
        return classes[code]
    return np.uint8(WORD_CHARACTER) if code < 0x40000 else np.uint8(MARK)


@njit(cache=True, nogil=True)
def folded(codes, table):
    """Each character by the table (minhash.folded_characters): uint32; of no characters if one is not in it."""
    found = np.empty(codes.size, np.uint32)
    for i in range(codes.size):
        code = codes[i]
        found[i] = table[code] if code < FOLDED_SIZE else np.uint32(NOT_ALONE)
        if found[i] == NOT_ALONE:
            return np.empty(0, np.uint32)
    return found


@njit(cache=True, nogil=True)
def shingles(codes, classes, size):
    """Hashes of `size` consecutive words (of all in a shorter text): uint64. codes: uint32, classes: uint8 [table]."""
    start = np.uint64(0xCBF29CE484222325)
    prime = np.uint64(0x100000001B3)
    words = np.empty(codes.size, np.uint64)
    num_words = 0
    value = start
    i = 0
    while i < codes.size:
        code = codes[i]
        kind = _class_of(code, classes)
        if kind == LETTER:
            value = (value ^ np.uint64(code)) * prime
        elif kind == DIGIT:
            value = (value ^ np.uint64(48)) * prime
            while i + 1 < codes.size and _class_of(codes[i + 1], classes) == DIGIT:
                i += 1
            decimal = i + 2 < codes.size and (codes[i + 1] == 46 or codes[i + 1] == 44)
            if decimal and _class_of(codes[i + 2], classes) == DIGIT:
                i += 2
                while i + 1 < codes.size and _class_of(codes[i + 1], classes) == DIGIT:
                    i += 1
        elif kind != MARK:
            if value != start:
                words[num_words] = _mix(value)
                num_words += 1
                value = start
            if kind == WORD_CHARACTER:
                words[num_words] = _mix((start ^ np.uint64(code)) * prime)
                num_words += 1
        i += 1
    if value != start:
        words[num_words] = _mix(value)
        num_words += 1
    if num_words == 0:
        return np.empty(0, np.uint64)
    size = min(size, num_words)
    found = np.empty(num_words - size + 1, np.uint64)
    for first in range(found.size):
        value = np.uint64(size)
        for word in range(first, first + size):
            value = _mix(value ^ words[word]) + np.uint64(0x9E3779B97F4A7C15)
        found[first] = _mix(value)
    return found


@njit(cache=True, nogil=True)
def minima(found, factors, offsets):
    """Per (factor, offset) the smallest (factor * shingle + offset) >> 32 over `found`: uint32 [functions]."""
    smallest = np.full(factors.size, 0xFFFFFFFF, np.uint32)
    for shingle in found:
        wide = np.uint64(shingle)
        for p in range(factors.size):
            value = np.uint32((factors[p] * wide + offsets[p]) >> np.uint64(32))
            smallest[p] = min(smallest[p], value)
    return smallest


@njit(cache=True, nogil=True)
def band_keys(smallest, rows):
    """One hash per `rows` consecutive numbers, and of the band's number: uint64 [bands]."""
    keys = np.empty(smallest.size // rows, np.uint64)
    for band in range(keys.size):
        value = np.uint64(band)
        for row in range(band * rows, band * rows + rows):
            value = _mix(value ^ np.uint64(smallest[row])) + np.uint64(0x9E3779B97F4A7C15)
        keys[band] = value
    return keys
