"""Compiled loops behind shingles.py. Importing this module imports numba: do it where it is used.

An entry is a character as characters.plain_characters has it: above the 24 bits of its code point, what it is to the splitter.
"""

import numpy as np

from megagpt.corpus.compiled import njit
from megagpt.corpus.text.characters import (
    CLASS_SHIFT,
    DIGIT,
    EXPANSION,
    HANGUL,
    LETTER,
    MARK,
    MAX_EXPANSION,
    NOT_ALONE,
    TABLE_SIZE,
    WORD_CHARACTER,
)
from megagpt.corpus.text.ngram_kernels import mix
from megagpt.corpus.text.word_kernels import is_space

_CODE_BITS = (1 << CLASS_SHIFT) - 1
_HANGUL_FIRST, _HANGUL_END = HANGUL
_POINT, _COMMA = ord("."), ord(",")


@njit
def _code_point(data, i):
    """(the code point whose UTF-8 begins at data[i], where the next one begins)."""
    first = np.uint32(data[i])
    if first < 0x80:
        return first, i + 1
    if first < 0xE0:
        return (first & np.uint32(0x1F)) << np.uint32(6) | np.uint32(data[i + 1]) & np.uint32(0x3F), i + 2
    value = np.uint32(data[i + 1]) & np.uint32(0x3F)
    value = value << np.uint32(6) | np.uint32(data[i + 2]) & np.uint32(0x3F)
    if first < 0xF0:
        return (first & np.uint32(0x0F)) << np.uint32(12) | value, i + 3
    value = value << np.uint32(6) | np.uint32(data[i + 3]) & np.uint32(0x3F)
    return (first & np.uint32(0x07)) << np.uint32(18) | value, i + 4


@njit
def characters(data, table, expansions, orders):
    """(the entries of the characters of UTF-8 bytes, uint32; whether the tables, of characters.Characters, tell them).

    They do not where a character has no entry of its own, or marks are not in canonical order. Code points above the table are
    words (Han), from U+40000 on marks. Hangul syllables are decomposed: the table knows their letters alone.
    """
    found = np.empty(2 * data.size, np.uint32)  # at most 3 entries of 2 bytes
    count = i = last = 0
    while i < data.size:
        if data[i] < 0x80:  # no entry of these is NOT_ALONE
            found[count] = table[data[i]]
            count += 1
            i += 1
            last = 0
            continue
        code, i = _code_point(data, i)
        order = 0
        if code < TABLE_SIZE:
            entry, order = table[code], np.int64(orders[code])
        elif 0x2F800 <= code <= 0x2FA1D:  # compatibility ideographs, which decompose
            entry = np.uint32(NOT_ALONE)
        else:
            entry = code | np.uint32((WORD_CHARACTER if code < 0x40000 else MARK) << CLASS_SHIFT)
        if _HANGUL_FIRST <= code < _HANGUL_END:  # two or three letters, by arithmetic (Unicode, section 3.12)
            initial, rest = divmod(code - _HANGUL_FIRST, 588)
            found[count] = table[0x1100 + initial]
            found[count + 1] = table[0x1161 + rest // 28]
            count += 2
            last = 0
            if rest % 28 == 0:
                continue
            entry = table[0x11A7 + rest % 28]
        if entry == NOT_ALONE or 0 < order < last:
            return found[:0], False
        if entry >> CLASS_SHIFT == EXPANSION:
            row = expansions[entry & np.uint32(_CODE_BITS)]
            for j in range(MAX_EXPANSION):
                if row[j]:
                    found[count] = row[j]
                    count += 1
                    order = np.int64(orders[row[j] & np.uint32(_CODE_BITS)])
        else:
            found[count] = entry
            count += 1
        last = order if entry >> CLASS_SHIFT != MARK else last
    return found[:count], True


@njit
def single_spaced(data):
    """UTF-8 bytes with each run of white space made one space, and none at either end (" ".join(text.split())): uint8."""
    found = np.empty(data.size, np.uint8)
    count = i = 0
    while i < data.size:
        code, following = _code_point(data, i)
        if not is_space(code):
            while i < following:
                found[count] = data[i]
                count += 1
                i += 1
        elif count and found[count - 1] != 32:
            found[count] = 32
            count += 1
        i = following
    return found[: count - 1] if count and found[count - 1] == 32 else found[:count]


@njit
def single_spaced_texts(data, ends):
    """(each text `single_spaced`, one after the other, uint8; where each ends, int64). ends: where each text ends in data."""
    found = np.empty(data.size, np.uint8)
    found_ends = np.empty(ends.size, np.int64)
    count = begin = 0
    for text in range(ends.size):
        part = single_spaced(data[begin : ends[text]])
        found[count : count + part.size] = part
        count += part.size
        found_ends[text], begin = count, ends[text]
    return found, found_ends


@njit
def _last_digit(entries, i):
    """The last of the digits that follow each other from i on."""
    while i + 1 < entries.size and entries[i + 1] >> CLASS_SHIFT == DIGIT:
        i += 1
    return i


@njit
def shingles(entries, size):
    """Hashes of `size` consecutive words (of all in a shorter text): uint64. entries: uint32, as `characters` gives them."""
    start = np.uint64(0xCBF29CE484222325)
    prime = np.uint64(0x100000001B3)
    words = np.empty(entries.size, np.uint64)
    num_words = 0
    value = start
    i = 0
    while i < entries.size:
        code = entries[i] & np.uint32(_CODE_BITS)
        kind = entries[i] >> CLASS_SHIFT
        if kind == LETTER:
            value = (value ^ np.uint64(code)) * prime
        elif kind == DIGIT:
            value = (value ^ np.uint64(48)) * prime
            i = _last_digit(entries, i)
            if i + 2 < entries.size and entries[i + 2] >> CLASS_SHIFT == DIGIT:
                mark = entries[i + 1] & np.uint32(_CODE_BITS)
                if mark in (_POINT, _COMMA):
                    i = _last_digit(entries, i + 2)
        elif kind != MARK:
            if value != start:
                words[num_words] = mix(value)
                num_words += 1
                value = start
            if kind == WORD_CHARACTER:
                words[num_words] = mix((start ^ np.uint64(code)) * prime)
                num_words += 1
        i += 1
    if value != start:
        words[num_words] = mix(value)
        num_words += 1
    if num_words == 0:
        return np.empty(0, np.uint64)
    size = min(size, num_words)
    found = np.full(num_words - size + 1, np.uint64(size))
    for offset in range(size):  # the inner loop is the one over shingles: it becomes vector instructions
        for first in range(found.size):
            found[first] = mix(found[first] ^ words[first + offset]) + np.uint64(0x9E3779B97F4A7C15)
    for first in range(found.size):
        found[first] = mix(found[first])
    return found


@njit
def n_grams(data, tables, size):
    """(`shingles` of UTF-8 bytes; whether the tables tell each of their characters)."""
    entries, complete = characters(data, tables[0], tables[1], tables[2])
    return shingles(entries, size), complete


@njit
def shingles_of_texts(data, ends, tables, size):
    """(upper halves of the `n_grams` of texts that follow each other, uint32; where those of each text end, int64; whether the
    tables tell each of its characters). data: UTF-8 bytes; ends: where each text ends in them."""
    found = np.empty(2 * data.size, np.uint32)
    found_ends = np.empty(ends.size, np.int64)
    complete = np.empty(ends.size, np.bool_)
    count = begin = 0
    for text in range(ends.size):
        hashes, complete[text] = n_grams(data[begin : ends[text]], tables, size)
        for value in hashes:
            found[count] = value >> np.uint64(32)
            count += 1
        found_ends[text], begin = count, ends[text]
    return found[:count], found_ends, complete


@njit
def minima(found, factors, offsets):
    """Per (factor, offset) the smallest (factor * shingle + offset) >> 32 over `found`: uint32 [functions]."""
    smallest = np.full(factors.size, 0xFFFFFFFF, np.uint32)
    for shingle in found:
        wide = np.uint64(shingle)
        for p in range(factors.size):
            value = np.uint32((factors[p] * wide + offsets[p]) >> np.uint64(32))
            smallest[p] = min(smallest[p], value)
    return smallest


@njit
def band_keys(smallest, rows):
    """One hash per `rows` consecutive numbers, and of the band's number: uint64 [bands]."""
    keys = np.empty(smallest.size // rows, np.uint64)
    for band in range(keys.size):
        value = np.uint64(band)
        for row in range(band * rows, band * rows + rows):
            value = mix(value ^ np.uint64(smallest[row])) + np.uint64(0x9E3779B97F4A7C15)
        keys[band] = value
    return keys


@njit
def minhash_of_texts(found, ends, factors, offsets, rows):
    """(the lower 16 bits of each text's `minima`, uint16 [texts, functions]; their band keys, uint64 [texts, bands]).

    found, ends: as `shingles_of_texts` gives them.
    """
    signatures = np.empty((ends.size, factors.size), np.uint16)
    keys = np.empty((ends.size, factors.size // rows), np.uint64)
    begin = 0
    for text in range(ends.size):
        smallest = minima(found[begin : ends[text]], factors, offsets)
        signatures[text] = smallest & np.uint32(0xFFFF)
        keys[text] = band_keys(smallest, rows)
        begin = ends[text]
    return signatures, keys
