"""A guard before the HTML parser, whose time is quadratic in the open elements and in the attributes of one tag.

One compiled pass cuts the page's bytes into tags as the HTML standard's tokenizer does. It cuts out what is never text and what
hostile pages hide tags in (comments; scripts, styles and the like with all that is in them), so that the parser and the guard
see the same tags. Of these it cuts out tags that go too deep, formatting elements that are never closed and attributes beyond a
number; their text stays. Browsers flatten deep pages too. Importing this module imports numba: do it where it is used.
"""

from typing import NamedTuple

import numpy as np

from megagpt.corpus.compiled import njit
from megagpt.corpus.extraction.page_kernels import name_table, number_of

MAX_DEPTH, MAX_ATTRIBUTES, MAX_FORMATTING, MAX_TAGS_IN_FORMULA = 256, 256, 24, 64
TEMPLATE, FORMULA, THREAD = 1, 2, 4
_SLOTS = 1024
_LT, _GT, _SLASH, _BANG, _QUESTION, _DASH, _QUOTE, _APOSTROPHE, _EQUAL = (ord(c) for c in "<>/!?-\"'=")
_VOID, _FORMATTING, _IMPLIED, _RAW, _PLAIN, _FOREIGN, _MATH, _SCRIPT, _TITLE, _IMAGE, _TEMPLATE, _REST = (
    1 << i for i in range(12)
)
_NOT_COUNTED = _VOID | _IMPLIED | _RAW | _TITLE
_KINDS = {
    _VOID: "area base br col embed hr input link meta param source track wbr",
    _VOID | _IMAGE: "img",
    _FORMATTING: "b big code em font i nobr s small strike strong tt u",
    _IMPLIED: "p li dd dt td th tr tbody thead tfoot option optgroup rp rt html head body",
    _RAW: "style xmp iframe noembed noframes textarea",
    _RAW | _SCRIPT: "script",
    _RAW | _REST: "plaintext",
    _TITLE: "title",
    _PLAIN: "a address article aside blockquote button caption center details dialog dir div dl fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hgroup label legend main menu nav ol pre ruby section span sub summary sup table "
    "ul var",
    _TEMPLATE: "template",
    _FOREIGN: "svg",
    _FOREIGN | _MATH: "math",
}
"""What the names of elements mean: the content of RAW ones is no markup, that of REST goes to the page's end."""


class GuardedPage(NamedTuple):
    """A page that the parser can read in linear time."""

    source: str
    """The page without the tags and attributes that would make parsing slow; the same object if there are none."""
    encoded: bytes
    """The UTF-8 of `source`, also without comments, scripts, styles and other elements whose content is no markup; scripts
    that hold formulas stay."""
    seen: int
    """TEMPLATE, FORMULA, THREAD: whether there may be template elements, formulas, names of schema.org's types of threads."""


def guard_page(page: str) -> GuardedPage:
    """Make a page safe to parse."""
    data = page.encode("utf-8", "ignore")  # lone surrogates go
    cuts, seen = find_cuts(np.frombuffer(data, np.uint8), *_TABLE)
    excess = cuts[cuts[:, 2] > 0]
    source = _without(data, excess).decode("utf-8") if len(excess) else page
    return GuardedPage(source, _without(data, cuts), int(seen))


def _without(data: bytes, cuts: np.ndarray) -> bytes:
    pieces, at = [], 0
    for start, end in cuts[:, :2].tolist():
        pieces.append(data[at:start])
        at = end
    return b"".join([*pieces, data[at:]])


@njit
def _lower(code):
    return code + 32 if 65 <= code <= 90 else code


@njit
def _is_letter(code):
    return 97 <= code <= 122 or 65 <= code <= 90


@njit
def _is_blank(code):
    """What HTML calls white space."""
    return code == 32 or code == 10 or code == 9 or code == 13 or code == 12


@njit
def _find(codes, at, wanted):
    """Place of the first byte `wanted` from `at` on, the size if there is none; eight bytes are compared at once."""
    size = codes.size
    for _ in range(16):
        if at >= size or codes[at] == wanted:
            return min(at, size)
        at += 1
    while at < size and at & 7:
        if codes[at] == wanted:
            return at
        at += 1
    if at >= size:
        return size
    words = codes[: size // 8 * 8].view(np.uint64)
    ones, highs = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
    pattern, i = np.uint64(wanted) * ones, at >> 3
    while i < words.size:
        different = words[i] ^ pattern
        if (different - ones) & ~different & highs:
            break
        i += 1
    at = 8 * i
    while at < size and codes[at] != wanted:
        at += 1
    return at


@njit
def _name_end(codes, at):
    while at < codes.size and not _is_blank(codes[at]) and codes[at] != _GT and codes[at] != _SLASH:
        at += 1
    return at


@njit
def _hash(codes, start, end):
    value = np.uint64(0xCBF29CE484222325)
    for i in range(start, end):
        value = (value ^ np.uint64(_lower(codes[i]))) * np.uint64(0x100000001B3)
    return value


@njit
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


@njit
def _tag_end(codes, at):
    """(place of the tag's `>` or the size, where its attributes go beyond MAX_ATTRIBUTES or -1, whether it ends in />).

    An equals sign before a name is a part of the name; so is all but a blank, a slash, another equals sign and `>`.
    """
    size, count, excess = codes.size, 0, -1
    in_name = after_name = slash = False
    while at < size and codes[at] != _GT:
        code = codes[at]
        if code == _SLASH:
            in_name, after_name, slash = False, False, True
        elif _is_blank(code):
            in_name, after_name, slash = False, in_name or after_name, False
        elif code == _EQUAL and (in_name or after_name):
            in_name = after_name = slash = False
            at += 1
            while at < size and _is_blank(codes[at]):
                at += 1
            if at < size and (codes[at] == _QUOTE or codes[at] == _APOSTROPHE):
                at = _find(codes, at + 1, codes[at])
            else:
                while at < size and not _is_blank(codes[at]) and codes[at] != _GT:
                    at += 1
                continue
        else:
            if not in_name:
                count += 1
                if count > MAX_ATTRIBUTES and excess < 0:
                    excess = at
            in_name, after_name, slash = True, False, False
        at += 1
    return min(at, size), excess, slash


@njit
def _comment_end(codes, at):
    """The place behind a comment whose text begins at `at`."""
    if at < codes.size and codes[at] == _GT:
        return at + 1
    if at + 1 < codes.size and codes[at] == _DASH and codes[at + 1] == _GT:
        return at + 2
    first = at
    while at < codes.size:
        at = _find(codes, at, _GT)
        last = at - 1
        if last - 2 >= first and codes[last] == _BANG:
            last -= 1
        if last - 1 >= first and codes[last] == _DASH and codes[last - 1] == _DASH:
            break
        at += 1
    return min(codes.size, at + 1)


@njit
def _is_name(codes, at, begin, end):
    """Whether the name in [begin, end) stands at `at`, as a whole."""
    behind = at + end - begin
    if behind >= codes.size or not (_is_blank(codes[behind]) or codes[behind] == _GT or codes[behind] == _SLASH):
        return False
    same = True
    for i in range(end - begin):
        same = same and _lower(codes[at + i]) == _lower(codes[begin + i])
    return same


@njit
def _content_end(codes, at, begin, end, is_script):
    """The place of the end tag of an element without markup whose content begins at `at` and whose name is in [begin, end); the
    size if there is none. In a comment of a script, scripts are nested once."""
    size, comment, nested = codes.size, 0, False
    while True:
        at = _find(codes, at, _LT)
        if at + 2 >= size:
            return size
        in_comment = at < comment
        if codes[at + 1] == _SLASH and _is_name(codes, at + 2, begin, end):
            if not (in_comment and nested):
                return at
            nested = False
        elif is_script and in_comment:
            nested = nested or _is_name(codes, at + 1, begin, end)
        elif is_script and at + 3 < size and codes[at + 1] == _BANG and codes[at + 2] == _DASH and codes[at + 3] == _DASH:
            comment, nested = at + 4, False
            while comment < size and not (
                codes[comment] == _GT and codes[comment - 1] == _DASH and codes[comment - 2] == _DASH
            ):
                comment = _find(codes, comment + 1, _GT)
        at += 1


@njit
def _has_tex(codes, at, end):
    """Whether a word in [at, end) ends in `tex`."""
    while at + 3 < end:
        if codes[at] == 116 and codes[at + 1] == 101 and codes[at + 2] == 120 and not _is_letter(codes[at + 3]):
            return True
        at += 1
    return False


@njit
def _names_thread(codes):
    """Whether the page may hold `QAPage` or `ForumPosting`."""
    found = 0
    for i in range(codes.size - 2):
        first, second, third = codes[i], codes[i + 1], codes[i + 2]
        found |= ((first == 81) & (second == 65) & (third == 80)) | ((first == 109) & (second == 80) & (third == 111))
    return found != 0


@njit
def _add(codes, cuts, count, start, end, is_excess):
    """Note a range to cut out, with the `<` that stand before it: behind it they could begin a tag. The number of ranges."""
    last = cuts[count - 1, 1] if count else 0
    while start > last and codes[start - 1] == _LT:
        start -= 1
    cuts[count, 0], cuts[count, 1], cuts[count, 2] = start, min(end, codes.size), is_excess
    return count + 1


@njit
def find_cuts(codes, known, numbers, kinds):
    """(ranges to cut out, TEMPLATE | FORMULA | THREAD as far as seen).

    codes: uint8, the page. known, numbers: see `name_table`; kinds: uint16 by number, what names mean. The ranges, int64
    [ranges, 3]: start, end, 1 for what would make parsing slow, 0 for what is no text.
    """
    size, num_tags = codes.size, 1
    for code in codes:
        num_tags += code == _LT
    cuts, count = np.empty((num_tags, 3), np.int64), 0
    names = np.zeros(_SLOTS, np.uint64)
    opened, dropped = np.zeros(_SLOTS, np.int64), np.zeros(_SLOTS, np.int64)
    depth = formatting = 0
    foreign = was_foreign = False
    seen = THREAD if _names_thread(codes) else 0
    at = 0
    while True:
        start = at = _find(codes, at, _LT)
        if at + 2 >= size:
            break
        following = codes[at + 1]
        if following == _BANG and codes[at + 2] == _DASH and at + 3 < size and codes[at + 3] == _DASH:
            at = _comment_end(codes, at + 4)
            count = _add(codes, cuts, count, start, at, 0)
            continue
        if following == _BANG and codes[at + 2] == 91 and was_foreign and at + 8 < size and codes[at + 8] == 91:
            at += 9  # what `<![CDATA[` means depends on the element it is in: it goes, its content is read as markup
            count = _add(codes, cuts, count, start, at, 0)
            continue
        closing = following == _SLASH
        begin = at + 2 if closing else at + 1
        if not _is_letter(codes[begin]):
            if closing or following in (_BANG, _QUESTION):
                at = _find(codes, begin, _GT)
            at += 1
            continue
        name_end = _name_end(codes, begin)
        value = _hash(codes, begin, name_end)
        kind = kinds[number_of(value, known, numbers)]
        end, excess, self_closed = _tag_end(codes, name_end)
        at = end + 1
        if closing:
            if kind & _NOT_COUNTED:
                continue
            slot = _slot(names, value)
            if dropped[slot] > 0:
                dropped[slot] -= 1
                count = _add(codes, cuts, count, start, at, 1)
            elif opened[slot] > 0:
                opened[slot] -= 1
                depth -= 1
                formatting -= (kind & _FORMATTING) != 0
            continue
        foreign = (foreign and not kind) or (kind & _FOREIGN) != 0
        was_foreign = was_foreign or foreign
        if kind & _RAW:
            is_script = (kind & _SCRIPT) != 0
            if not (self_closed and was_foreign):
                content = at
                at = size if kind & _REST else _content_end(codes, at, begin, name_end, is_script)
                if is_script and _has_tex(codes, name_end, end) and _is_formula(codes, content, at):
                    seen |= FORMULA
                    at = _tag_end(codes, min(size, at + 8))[0] + 1
                    continue
                if at < size:
                    at = _tag_end(codes, at + 2 + name_end - begin)[0] + 1
            count = _add(codes, cuts, count, start, at, 0)
            continue
        if not kind & _NOT_COUNTED and not (self_closed and foreign):
            slot = _slot(names, value)
            if depth >= MAX_DEPTH or (kind & _FORMATTING and formatting >= MAX_FORMATTING):
                dropped[slot] += 1
                count = _add(codes, cuts, count, start, at, 1)
                continue
            opened[slot] += 1
            depth += 1
            formatting += (kind & _FORMATTING) != 0
        if kind & _TEMPLATE:
            seen |= TEMPLATE
        elif kind & _MATH or (kind & _IMAGE and _has_tex(codes, name_end, end + 1)):
            seen |= FORMULA
        if excess >= 0:
            cuts[count, 0], cuts[count, 1], cuts[count, 2] = excess, end, 1
            count += 1
        if kind & _TITLE and not (self_closed and was_foreign):
            ends = _content_end(codes, at, begin, name_end, False)
            while True:
                at = _find(codes, at, _LT)
                if at >= ends:
                    break
                start, at = at, min(ends, _find(codes, at, _GT) + 1)
                count = _add(codes, cuts, count, start, at, 0)
    return cuts[:count], seen


@njit
def _is_formula(codes, at, end):
    """Whether a script's content can be one: few tags, should the parser take it for markup."""
    tags = 0
    while True:
        at = _find(codes, at, _LT) + 1
        if at > end:
            return end < codes.size
        tags += 1
        if tags > MAX_TAGS_IN_FORMULA:
            return False


def _table() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The names that mean something and what they are."""
    pairs = [(name, kind) for kind, names in _KINDS.items() for name in names.split()]
    hashes = [_hash(np.frombuffer(name.encode(), np.uint8), 0, len(name)) for name, _ in pairs]
    return *name_table(hashes), np.array([0, *(kind for _, kind in pairs)], np.uint16)


_TABLE = _table()
