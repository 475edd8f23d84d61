"""The compiled loop behind words.number_split_words. Importing this module imports numba: do it where it is used."""

import numpy as np

from megagpt.corpus.compiled import njit
from megagpt.corpus.text.ngram_kernels import BASE, mix, table_size

_DOT, _COMMA, _COLON, _AT, _APOSTROPHE, _SLASH, _LOW_LINE, _SMALL_W = (ord(mark) for mark in ".,:@'/_w")
_MARKS = np.array([ord(mark) for mark in "«»·–—‘“”•…"], np.uint32)
"""Marks outside ASCII that are often in English texts; each is a word. (’ is no such mark: it may be part of a clitic.)"""
_RULES = np.array([ord(mark) for mark in ".-=*#"], np.uint32)
"""Marks of which a run is one word."""


@njit
def is_space(code):
    """What str.isspace says."""
    if code < 0x80:
        return code <= 32 and (code == 32 or 9 <= code <= 13 or code >= 28)
    if code < 0x1680:
        return code == 0x85 or code == 0xA0
    return (
        code == 0x1680
        or 0x2000 <= code <= 0x200A
        or code == 0x2028
        or code == 0x2029
        or code == 0x202F
        or code == 0x205F
        or code == 0x3000
    )


@njit
def _is_letter(code):
    return 97 <= code | 32 <= 122


@njit
def _is_digit(code):
    return 48 <= code <= 57


@njit
def _is_one_of(code, marks):
    found = False
    for mark in marks:
        found |= code == mark
    return found


@njit
def _token(codes, at):
    """(where the next token from `at` begins, where it ends, whether `_word_end` finds its words)."""
    begin = at
    while begin < codes.size and is_space(codes[begin]):
        begin += 1
    end, plain = begin, True
    while end < codes.size and not is_space(codes[end]):
        code = codes[end]
        if code >= 128:
            plain = plain and _is_one_of(code, _MARKS)
        elif code in (_AT, _APOSTROPHE):  # an e-mail address, a clitic
            plain = False
        elif code == _SLASH and end - begin >= 2 and codes[end - 1] == _SLASH and codes[end - 2] == _COLON:
            plain = False  # a URL; the next is one that begins with www
        elif code == _DOT and end - begin >= 3 and codes[end - 1] == codes[end - 2] == codes[end - 3] == _SMALL_W:
            plain = False
        end += 1
    return begin, end, plain


@njit
def _word_end(codes, at, end):
    """Where the word ends that begins at `at`, in a plain token that ends at `end`."""
    code = codes[at]
    if _is_letter(code) or code == _LOW_LINE:
        last = at  # of initials
        while last + 1 < end and _is_letter(codes[last]) and codes[last + 1] == _DOT:
            last += 2
        if last - at >= 4:
            return last
        at += 1
        while at < end and (_is_letter(codes[at]) or _is_digit(codes[at]) or codes[at] == _LOW_LINE):
            at += 1
        return at
    if _is_digit(code):
        while True:
            while at < end and _is_digit(codes[at]):
                at += 1
            if at + 1 < end and _is_digit(codes[at + 1]) and (codes[at] == _DOT or codes[at] == _COMMA or codes[at] == _COLON):
                at += 1
            else:
                return at
    at += 1
    if _is_one_of(code, _RULES):
        while at < end and codes[at] == code:
            at += 1
    return at


@njit
def number_plain_words(codes):
    """Number the words of tokens without accents, apostrophes, URLs and e-mail addresses.

    codes: uint32 [characters]. Returns (numbers, words, others): int64 [entries], the number of each word in the order of the
    text, -1 for a token of another kind; int64 [different, 2], where each different word begins and ends; int64 [others, 2],
    the same of each token of another kind.
    """
    num_entries = num_others = end = 0
    while end < codes.size:
        at, end, plain = _token(codes, end)
        num_others += not plain
        num_entries += not plain
        while plain and at < end:
            at = _word_end(codes, at, end)
            num_entries += 1
    numbers = np.empty(num_entries, np.int64)
    words = np.empty((num_entries - num_others, 2), np.int64)
    others = np.empty((num_others, 2), np.int64)
    slots = table_size(num_entries)
    mask = np.uint64(slots - 1)
    table = np.full(slots, -1, np.int64)
    num_entries = num_others = num_words = end = 0
    while end < codes.size:
        at, end, plain = _token(codes, end)
        if not plain:
            others[num_others, 0] = at
            others[num_others, 1] = end
            numbers[num_entries] = -1
            num_others += 1
            num_entries += 1
        while plain and at < end:
            first, at = at, _word_end(codes, at, end)
            value = np.uint64(0)
            for i in range(first, at):
                value = value * BASE + np.uint64(codes[i]) + np.uint64(1)
            slot = mix(value) & mask
            while table[slot] >= 0:
                known = words[table[slot], 0]
                same = words[table[slot], 1] - known == at - first
                for i in range(at - first if same else 0):
                    if codes[known + i] != codes[first + i]:
                        same = False
                        break
                if same:
                    break
                slot = (slot + np.uint64(1)) & mask
            if table[slot] < 0:
                table[slot] = num_words
                words[num_words, 0] = first
                words[num_words, 1] = at
                num_words += 1
            numbers[num_entries] = table[slot]
            num_entries += 1
    return numbers, words[:num_words], others
