"""A guard before the HTML parser, whose time is quadratic in the open elements and in the attributes of one tag.

One compiled pass over the page's bytes finds tags that go too deep, formatting elements that are never closed and attributes
beyond a number; they are cut out, the text stays. Browsers flatten deep pages too. Importing this module imports
numba: do it where it is used.
"""

import numpy as np
from numba import njit

from megagpt.corpus.extraction.page_kernels import name_table, number_of

MAX_DEPTH, MAX_ATTRIBUTES, MAX_FORMATTING = 256, 256, 24
_SLOTS = 1024
_LT, _GT, _SLASH, _BANG, _DASH, _QUOTE, _APOSTROPHE, _EQUAL = (ord(c) for c in "<>/!-\"'=")
_VOID, _FORMATTING, _IMPLIED, _RAW, _PLAIN, _FOREIGN = 1, 2, 4, 8, 16, 32
_KINDS = {
    _VOID: "area base br col embed hr img input link meta param source track wbr",
    _FORMATTING: "b big code em font i nobr s small strike strong tt u",
    _IMPLIED: "p li dd dt td th tr tbody thead tfoot option optgroup rp rt html head body",
    _RAW: "script style",
    _PLAIN: "a address article aside blockquote button caption center details dialog dir div dl fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hgroup label legend main menu nav ol pre ruby section span sub summary sup table "
    "ul var",
    _FOREIGN: "svg math",
}


def limit_page(page: str) -> tuple[str, bytes]:
    """(the page without the tags and attributes that would make parsing slow, the same object if there are none; its UTF-8)."""
    data = page.encode("utf-8", "ignore")  # lone surrogates go
    cuts = find_excess(np.frombuffer(data, np.uint8), *_TABLE)
    if not len(cuts):
        return page, data
    pieces, at = [], 0
    for start, end in cuts.tolist():
        pieces.append(data[at:start])
        at = end
    data = b"".join([*pieces, data[at:]])
    return data.decode("utf-8"), data


@njit(cache=True, nogil=True)
def _lower(code):
    return code + 32 if 65 <= code <= 90 else code


@njit(cache=True, nogil=True)
def _name_end(codes, at):
    while at < codes.size and codes[at] > 32 and codes[at] != _GT and codes[at] != _SLASH:
        at += 1
    return at


@njit(cache=True, nogil=True)
def _hash(codes, start, end):
    value = np.uint64(0xCBF29CE484222325)
    for i in range(start, end):
        value = (value ^ np.uint64(_lower(codes[i]))) * np.uint64(0x100000001B3)
    return value


@njit(cache=True, nogil=True)
def _slot(names, value):
    """Where a name's counts are; names beyond the table share the last place."""
    at = np.int64(value % np.uint64(_SLOTS - 1))
    for _ in range(8):
        if names[at] == value:
            return at
        if names[at] == 0:
            names[at] = value
            return at
        at = (at + 1) % (_SLOTS - 1)
    return _SLOTS - 1


@njit(cache=True, nogil=True)
def _tag_end(codes, at):
    """(place of the tag's `>` or the size, where its attributes go beyond MAX_ATTRIBUTES or -1, whether it ends in /)."""
    size, count, excess = codes.size, 0, -1
    between, last = True, 0
    while at < size and codes[at] != _GT:
        code = codes[at]
        if code <= 32 or code == _SLASH:
            between = True
        elif code == _EQUAL:
            at += 1
            while at < size and codes[at] <= 32:
                at += 1
            if at < size and (codes[at] == _QUOTE or codes[at] == _APOSTROPHE):
                quote = codes[at]
                at += 1
                while at < size and codes[at] != quote:
                    at += 1
                between = True
            else:
                while at < size and codes[at] > 32 and codes[at] != _GT:
                    at += 1
                between = True
                last = 0
                continue
        elif between:
            between = False
            count += 1
            if count > MAX_ATTRIBUTES and excess < 0:
                excess = at
        if at < size:
            last = codes[at]
        at += 1
    return at, excess, last == _SLASH


@njit(cache=True, nogil=True)
def find_excess(codes, known, numbers, kinds):
    """Ranges to cut out. codes: uint8, the page. known, numbers: see `name_table`; kinds: uint8 by number, what names mean."""
    size, num_tags = codes.size, 0
    for code in codes:
        num_tags += code == _LT
    cuts, num_cuts = np.empty((num_tags, 2), np.int64), 0
    names = np.zeros(_SLOTS, np.uint64)
    opened, dropped = np.zeros(_SLOTS, np.int64), np.zeros(_SLOTS, np.int64)
    depth = formatting = at = 0
    is_foreign = False
    while at < size:
        if codes[at] != _LT or at + 1 >= size:
            at += 1
            continue
        start = at
        following = codes[at + 1]
        if following == _BANG and at + 3 < size and codes[at + 2] == _DASH and codes[at + 3] == _DASH:
            at += 4
            while at + 2 < size and not (codes[at] == _DASH and codes[at + 1] == _DASH and codes[at + 2] == _GT):
                at += 1
            continue
        closing = following == _SLASH
        begin = at + 2 if closing else at + 1
        if begin >= size or not 97 <= _lower(codes[begin]) <= 122:
            at += 1
            continue
        name_end = _name_end(codes, begin)
        value = _hash(codes, begin, name_end)
        kind = kinds[number_of(value, known, numbers)]
        end, excess, self_closed = _tag_end(codes, name_end)
        at = end + 1
        if closing:
            if kind & (_VOID | _IMPLIED):
                continue
            slot = _slot(names, value)
            if dropped[slot] > 0:
                dropped[slot] -= 1
                cuts[num_cuts, 0], cuts[num_cuts, 1] = start, min(at, size)
                num_cuts += 1
            elif opened[slot] > 0:
                opened[slot] -= 1
                depth -= 1
                formatting -= (kind & _FORMATTING) != 0
            continue
        is_foreign = (is_foreign and not kind) or (kind & _FOREIGN) != 0
        if not kind & (_VOID | _IMPLIED | _RAW) and not (self_closed and is_foreign):
            slot = _slot(names, value)
            if depth >= MAX_DEPTH or (kind & _FORMATTING and formatting >= MAX_FORMATTING):
                dropped[slot] += 1
                cuts[num_cuts, 0], cuts[num_cuts, 1] = start, min(at, size)
                num_cuts += 1
                continue
            opened[slot] += 1
            depth += 1
            formatting += (kind & _FORMATTING) != 0
        if excess >= 0 and end < size:
            cuts[num_cuts, 0], cuts[num_cuts, 1] = excess, end
            num_cuts += 1
        if kind & _RAW:
            while at + 1 < size and not (
                codes[at] == _LT and codes[at + 1] == _SLASH and _same_name(codes, at + 2, begin, name_end)
            ):
                at += 1
    return cuts[:num_cuts]


@njit(cache=True, nogil=True)
def _same_name(codes, at, begin, end):
    for i in range(begin, end):
        if at + i - begin >= codes.size or _lower(codes[at + i - begin]) != _lower(codes[i]):
            return False
    return True


def _table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The names that mean something and what they are."""
    pairs = [(name, kind) for kind, names in _KINDS.items() for name in names.split()]
    hashes = [_hash(np.frombuffer(name.encode(), np.uint8), 0, len(name)) for name, _ in pairs]
    return *name_table(hashes), np.array([0, *(kind for _, kind in pairs)], np.uint8)


_TABLE = _table()
