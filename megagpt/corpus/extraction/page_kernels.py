"""Compiled loops behind page_lines.py. Importing this module imports numba: do it where it is used.

`read_page` goes once over the characters of a page as lexbor writes it: tags are closed, attributes are ` name="value"` with
quotes escaped, text has no bare `<` or `&`.
"""

import numpy as np

from megagpt.corpus.compiled import njit
from megagpt.corpus.text.word_kernels import is_space

INLINE, VOID, DROPPED, BREAK, LINK, PREFORMATTED, HEADING, CONTROL, LABEL, RAISED, LOWERED, CODE = (1 << i for i in range(12))
"""What an element's name says.

INLINE leaves the line as it is, VOID has no end tag, DROPPED goes with all that is in it, CONTROL too unless it is in a
HEADING, the text of a LABEL is counted; RAISED (sup), LOWERED (sub) and CODE leave a mark in the line.
"""
LINE_START, LINE_END, LINE_WIDTH, LINK_WIDTH, LABEL_WIDTH, HOLDER, SOURCE_START, SOURCE_END = range(8)
"""Columns of a line: its characters [START, END) in `out`, its width and that of its parts in links and in labels, in halves of
a Latin letter, the element that holds it, and where it is in the source."""
LINE_COLUMNS = 8
FIRST_MARK = 0xFDD0
"""Marks, which Unicode keeps for such use: begin of sup, its end, begin of sub, its end, begin of code, its end."""
NUM_MARKS = 6
NAME, DEPTH, START, END, PARENT, ALIKE, CLASS, CLASS_END, ID, ID_END, OTHER, OTHER_END = range(12)
"""Columns of an element: number of its name, depth, lines [START, END), the element it is in, the first one with its class, and
where in the source its class, its id and, if it has a role, style, itemprop or aria-hidden, all its attributes stand.

-1 where there is none."""
ELEMENT_COLUMNS = 12
TABLE_SIZE = 1024

_LT, _GT, _SLASH, _SPACE, _QUOTE, _EQUAL, _AND, _BANG, _DASH, _SEMICOLON, _NEWLINE = (ord(c) for c in '<>/ "=&!-;\n')
_AMP, _NBSP = ord("a"), ord("n")
_COLON, _N, _O, _E, _Y, _A, _L = (ord(c) for c in ":noeyal")


@njit
def name_hash(codes, start, end):
    """64-bit hash (FNV-1a) of the characters [start, end)."""
    value = np.uint64(0xCBF29CE484222325)
    for i in range(start, end):
        value = (value ^ np.uint64(codes[i])) * np.uint64(0x100000001B3)
    return value


def name_table(hashes):
    """(hashes, each at the place of its value modulo TABLE_SIZE or the next free one; its number, from 1): 0 if free."""
    table, numbers = np.zeros(TABLE_SIZE, np.uint64), np.zeros(TABLE_SIZE, np.int64)
    for number, value in enumerate(hashes, start=1):
        at = value % TABLE_SIZE
        while table[at]:
            at = (at + 1) % TABLE_SIZE
        table[at], numbers[at] = value, number
    return table, numbers


@njit
def width_of(code):
    """Width of a character in halves of a Latin letter: what an ideograph or a syllable says takes two or three letters."""
    if code < 0x2E80:
        return 2
    if 0xAC00 <= code <= 0xD7AF:
        return 4
    if code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or 0xFF00 <= code <= 0xFFEF or 0x20000 <= code <= 0x3FFFF:
        return 5
    return 2


@njit
def width_of_all(codes):
    """Sum of `width_of`."""
    width = 0
    for code in codes:
        width += width_of(code)
    return width


@njit
def _is_mark(code):
    return FIRST_MARK <= code < FIRST_MARK + NUM_MARKS


@njit
def number_of(value, hashes, numbers):
    """The number of a hash in a `name_table`, 0 if it is not there."""
    at = np.int64(value & np.uint64(TABLE_SIZE - 1))
    while hashes[at] != 0 and hashes[at] != value:
        at = (at + 1) & (TABLE_SIZE - 1)
    return numbers[at]


@njit
def _entity(codes, at):
    """(character, length) of the entity that begins at `at`: the four that lexbor writes in text."""
    left = codes.size - at
    second = codes[at + 1] if left > 3 else 0
    if second == _AMP and left > 4 and codes[at + 4] == _SEMICOLON:
        return 0x26, 5
    if second == 0x6C and codes[at + 3] == _SEMICOLON:
        return _LT, 4
    if second == 0x67 and codes[at + 3] == _SEMICOLON:
        return _GT, 4
    if second == _NBSP and left > 5 and codes[at + 5] == _SEMICOLON:
        return _SPACE, 6
    return 0x26, 1


@njit
def _skip_comment(codes, at):
    """The place behind a comment that begins at `at`."""
    at += 4
    while at + 2 < codes.size and not (codes[at] == _DASH and codes[at + 1] == _DASH and codes[at + 2] == _GT):
        at += 1
    return min(codes.size, at + 3)


@njit
def _read_attributes(codes, at, watched, row):
    """Note class, id and whether others of `watched` (hashes; class and id first) are there in `row`; the place of the `>`."""
    start, size = at, codes.size
    while at < size and codes[at] == _SPACE:
        begin = at + 1
        at = begin + 1
        while at + 1 < size and not (codes[at] == _EQUAL and codes[at + 1] == _QUOTE):
            at += 1
        value = name_hash(codes, begin, at)
        first = at + 2
        at = first
        while at < size and codes[at] != _QUOTE:
            at += 1
        if value == watched[0]:
            row[CLASS], row[CLASS_END] = first, at
        elif value == watched[1]:
            row[ID], row[ID_END] = first, at
        elif value == watched[2] or value == watched[3] or value == watched[4] or value == watched[5] or value == watched[6]:
            row[OTHER] = start
        at += 1
    while at < size and codes[at] != _GT:
        at += 1
    if row[OTHER] >= 0:
        row[OTHER_END] = at
    return at


@njit
def _end_line(out, begin, end, raw, line):
    """Close the line out[begin:end] and fill its columns START, END, WIDTH: (its end in `out`, 1 if it is a line, else 0).

    A line of white space and marks is none.
    """
    first = begin
    if raw:
        while begin < end and out[end - 1] == _NEWLINE:
            end -= 1
        while first < end and out[first] == _NEWLINE:
            first += 1
    blank, width = True, 0
    for i in range(first, end):
        code = out[i]
        if not _is_mark(code):
            blank = blank and is_space(code)
            width += width_of(code)
    if blank:
        return begin, 0
    line[LINE_START], line[LINE_END], line[LINE_WIDTH] = first, end, width
    return end, 1


@njit
def _is_hidden(codes, at, end):
    """Whether a style among the attributes in [at, end) says `display:none`."""
    while at + 6 <= end:
        if codes[at] == _COLON:
            value = at + 1 + (codes[at + 1] == _SPACE)
            if (
                codes[value] == _N
                and codes[value + 1] == _O
                and codes[value + 2] == _N
                and codes[value + 3] == _E
                and codes[at - 1] == _Y
                and codes[at - 2] == _A
                and codes[at - 3] == _L
            ):
                return True
        at += 1
    return False


@njit
def _first_alike(codes, elements, number, places):
    """Number of the first element with an element's class, its own if none is in `places` (by the class's hash)."""
    start, end = elements[number, CLASS], elements[number, CLASS_END]
    at = np.int64(name_hash(codes, start, end) & np.uint64(places.size - 1))
    for _ in range(8):
        other = places[at]
        if other == 0:
            places[at] = number
            return number
        first = elements[other, CLASS]
        same = elements[other, CLASS_END] - first == end - start
        for i in range(end - start):
            if not same:
                break
            same = codes[first + i] == codes[start + i]
        if same:
            return other
        at = (at + 1) & (places.size - 1)
    return number


@njit
def _lower(code):
    return code + 32 if 0x41 <= code <= 0x5A else code


@njit
def _lower_hash(codes, start, end):
    value = np.uint64(0xCBF29CE484222325)
    for i in range(start, end):
        value = (value ^ np.uint64(_lower(codes[i]))) * np.uint64(0x100000001B3)
    return value


@njit
def may_say(codes, places, among, words, starts, ends):
    """Which of the names [start, end) in `places`, a class attribute or an id, may say something. bool [names].

    codes: the page's characters; among: bool, the names that are asked. A name may say something if one of its words is in
    `words`, if its last three letters are in `ends`, or if the first three letters of a class, or its first word if that is
    shorter, are in `starts`. These three are hashes, each a `name_table`. A word is capitals and what follows them up to the
    next one, or small letters and digits.
    """
    found = np.zeros(len(places), np.bool_)
    for row in range(len(places)):
        at, end = places[row]
        if not among[row] or at < 0:
            continue
        is_first = True
        while at < end and not found[row]:
            code = codes[at]
            if not (0x61 <= code <= 0x7A or 0x41 <= code <= 0x5A or 0x30 <= code <= 0x39):
                is_first = is_first or is_space(code)
                at += 1
                continue
            begin = at
            while at < end and 0x41 <= codes[at] <= 0x5A:
                at += 1
            while at < end and (0x61 <= codes[at] <= 0x7A or 0x30 <= codes[at] <= 0x39):
                at += 1
            found[row] = (
                number_of(_lower_hash(codes, begin, at), *words) > 0
                or number_of(_lower_hash(codes, max(begin, at - 3), at), *ends) > 0
                or (is_first and number_of(_lower_hash(codes, begin, min(at, begin + 3)), *starts) > 0)
            )
            is_first = False
    return found


@njit
def read_page(codes, hashes, numbers, flags, watched):
    """Lines and elements of a page.

    codes: uint32, the page's characters. hashes, numbers: known names of elements, see `name_table`; flags: uint16 by number,
    at 0 those of unknown names. watched: see `_read_attributes`. Returns out (uint32, the lines' characters), lines (int64
    [lines, LINE_COLUMNS]) and elements (int64 [elements, ELEMENT_COLUMNS]; the first is the root).
    """
    size, num_tags = codes.size, 2
    for code in codes:
        num_tags += code == _LT
    out, lines = np.empty(size + 1, np.uint32), np.empty((num_tags, LINE_COLUMNS), np.int64)
    elements = np.empty((num_tags, ELEMENT_COLUMNS), np.int64)
    stack, alike = np.empty(num_tags, np.int64), np.zeros(4 * TABLE_SIZE, np.int64)
    elements[0, :ALIKE] = 0
    elements[0, ALIKE:] = -1
    num_lines, num_elements, depth, skipped = 0, 1, 0, 0
    stack[0] = 0
    at, begin, end, link, label, source = 0, 0, 0, 0, 0, 0
    space = in_link = in_label = raw = False
    headings = 0
    while at < size:
        code = codes[at]
        if code != _LT:
            length = 1
            if code == _AND:
                code, length = _entity(codes, at)
            at += length
            if skipped or _is_mark(code):
                continue
            if not raw:
                if is_space(code):
                    space = end > begin
                    continue
                if space:
                    out[end] = _SPACE
                    end += 1
                    link += 2 * in_link
                    label += 2 * in_label
                    space = False
            out[end] = code
            end += 1
            if in_link and code != _NEWLINE:
                link += width_of(code)
            if in_label:
                label += width_of(code)
            continue
        if at + 3 < size and codes[at + 1] == _BANG:
            at = _skip_comment(codes, at)
            continue
        tag = at
        closing = at + 1 < size and codes[at + 1] == _SLASH
        name_start = at + 2 if closing else at + 1
        at = name_start
        while at < size and codes[at] != _SPACE and codes[at] != _GT:
            at += 1
        number = number_of(name_hash(codes, name_start, at), hashes, numbers)
        kind = flags[number]
        row = elements[num_elements]
        row[ALIKE:] = -1
        at = _read_attributes(codes, at, watched, row) + 1
        if skipped:
            if not kind & VOID:
                skipped += -1 if closing else 1
            continue
        if kind & DROPPED or (kind & CONTROL and not headings):
            skipped = 0 if closing or kind & VOID else 1
            continue
        if kind & INLINE:
            if row[OTHER] >= 0 and _is_hidden(codes, row[OTHER], row[OTHER_END]):
                skipped = 1
                continue
            if kind & LINK:
                in_link = not closing
            if kind & LABEL:
                in_label = not closing
            if kind & (RAISED | LOWERED | CODE):
                if space and not closing:
                    out[end] = _SPACE
                    end += 1
                    link += 2 * in_link
                    label += 2 * in_label
                    space = False
                mark = 0 if kind & RAISED else 2 if kind & LOWERED else 4
                out[end] = FIRST_MARK + mark + closing
                end += 1
            continue
        if kind & VOID and not kind & BREAK:
            continue
        end, is_line = _end_line(out, begin, end, raw, lines[num_lines])
        if is_line:
            line = lines[num_lines]
            line[LINK_WIDTH], line[LABEL_WIDTH], line[HOLDER] = link, label, stack[depth]
            line[SOURCE_START], line[SOURCE_END] = source, tag
            num_lines += 1
        begin, link, label, space, source = end, 0, 0, False, at
        if kind & BREAK:
            continue
        if kind & HEADING:
            headings += -1 if closing else 1
        if closing:
            if depth > 0:
                elements[stack[depth], END] = num_lines
                depth -= 1
        else:
            depth += 1
            row[NAME], row[DEPTH], row[START], row[PARENT] = number, depth, num_lines, stack[depth - 1]
            if row[CLASS] >= 0:
                row[ALIKE] = _first_alike(codes, elements, num_elements, alike)
            stack[depth] = num_elements
            num_elements += 1
        if kind & PREFORMATTED:
            raw = not closing
    end, is_line = _end_line(out, begin, end, raw, lines[num_lines])
    if is_line:
        line = lines[num_lines]
        line[LINK_WIDTH], line[LABEL_WIDTH], line[HOLDER], line[SOURCE_START], line[SOURCE_END] = (
            link,
            label,
            stack[depth],
            source,
            at,
        )
        num_lines += 1
    for i in range(depth + 1):
        elements[stack[i], END] = num_lines
    return out[:end], lines[:num_lines], elements[:num_elements]
