"""HTML to main text: the page is parsed once by lexbor, then read as one stream of tags; no tree is walked in Python.

How it works. lexbor parses and writes the page back well-formed, without scripts and the like. One pass over the tags cuts the
text into lines (a block element or <br> ends a line) and notes for every element the range of lines it holds, with how much of
their text is links (page_lines.py). Elements that look like navigation, sharing, related stories, comments, advertisements (by
tag, id, class, role) or that are mostly links give ranges to drop; the element that looks most like the article's body gives
the range to keep. Where the usual names are missing, the body is the element whose own paragraphs hold the most text. The
scoring of bodies follows readability.
"""

import re
import unicodedata
from dataclasses import dataclass

import numpy as np
from selectolax.lexbor import LexborHTMLParser

from megagpt.corpus.extraction.page_lines import ALWAYS_BAD, RAW_TAGS, PageLines, body_kind, is_furniture, read_page, words

MIN_BODY_CHARACTERS = 200  # a named element with less prose is not the body
SMALL_BODY = 1500  # a body found by density with less prose than this may be a part of it
MIN_LEAD_CHARACTERS = 80
LONG_LINE = 60  # characters, for `prose`
PROSE_CHARACTERS = 1000
_REMOVED = sorted(RAW_TAGS)
_PROSE = words("p div td li dd blockquote section article main body pre span center")
_MAY_BE_LINKS = frozenset(("ul", "ol", "dl", "table", "div", "section", "p", "tr", "h2", "h3", "h4"))


@dataclass(frozen=True, slots=True)
class Extracted:
    """Main text of a page and its title (empty if it has none)."""

    text: str
    title: str


@dataclass(frozen=True, slots=True)
class ParsedPage:
    """A page that was parsed, its main text not yet found."""

    lines: PageLines
    title: str


def extract_html(page: str) -> Extracted:
    """The main text of an HTML page, paragraphs on lines of their own, and its title. Text is empty if there is none."""
    return main_text(parse_page(page))


def parse_page(page: str) -> ParsedPage:
    """Parse a page and read its lines: the one part of extraction that all pages need."""
    tree = LexborHTMLParser(page)
    title_node = tree.css_first("title")
    title = " ".join(title_node.text().split()) if title_node is not None else ""
    tree.strip_tags(_REMOVED)
    return ParsedPage(read_page((tree.body.html if tree.body is not None else None) or ""), title)


def prose(page: ParsedPage) -> str:
    """What tells a page's language: the first characters of its long lines that are not links, or of all lines if none is."""
    lines = page.lines
    own = (lines.sizes - lines.links).tolist()
    chosen = [text for text, size in zip(lines.texts, own, strict=True) if size >= LONG_LINE] or lines.texts
    return " ".join(" ".join(chosen[:PROSE_CHARACTERS])[:PROSE_CHARACTERS].split())


def main_text(page: ParsedPage) -> Extracted:
    """The main text of a parsed page."""
    return Extracted(unicodedata.normalize("NFC", "\n".join(_main_lines(page.lines))), page.title)


def _main_lines(page: PageLines) -> list[str]:
    """The lines of the body, without what is to be dropped."""
    own = page.sizes - page.links
    good = np.where((own > 40) & np.array([tag in _PROSE for tag in page.tags], bool), own, 0)
    dropped, kept = np.zeros(len(page.texts), bool), good
    for by_name in (True, False):
        dropped = _dropped(page, good, by_name=by_name)
        kept = np.where(dropped, 0, good)
        if kept.sum() >= 0.2 * good.sum():
            break
    start, end = _find_body(page, kept)
    lines = _lead(page, start, kept) + (start + np.flatnonzero(~dropped[start:end])).tolist()
    return [page.texts[i] for i in _trim(page, lines)]


def _dropped(page: PageLines, good: np.ndarray, *, by_name: bool) -> np.ndarray:
    """Which lines go: those in elements that look like furniture (by_name: also by what they are called) or are mostly links,
    unless much of the page's prose, `good` by line, is in them. bool [lines]."""
    sizes, links, prose = (_inside(page, values) for values in (page.sizes, page.links, good))
    may_be_bad = prose <= 0.5 * good.sum()
    mostly_links = (links > 0.5 * sizes) & (prose <= 0.3 * good.sum())
    dropped, end = np.zeros(len(page.texts), bool), 0
    for i in np.flatnonzero((sizes > 0) & may_be_bad).tolist():
        if page.ends[i] <= end:
            continue  # it lies in one that goes
        name = page.names[i]
        bad = name in ALWAYS_BAD or (mostly_links[i] and name in _MAY_BE_LINKS) or (by_name and is_furniture(page, i))
        if bad:
            end = int(page.ends[i])
            dropped[page.starts[i] : end] = True
    return dropped


def _inside(page: PageLines, values: np.ndarray) -> np.ndarray:
    """Sums over the lines of each element."""
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[page.ends] - sums[page.starts]


def _find_body(page: PageLines, kept: np.ndarray) -> tuple[int, int]:
    """Lines of the first element of the surest kind that holds enough of the page's prose, else of the densest one."""
    inside = _inside(page, kept)
    large = np.flatnonzero((inside >= MIN_BODY_CHARACTERS) & (inside >= 0.3 * kept.sum())).tolist()
    named = [(kind, number) for number in large if (kind := body_kind(page, number))]
    number = min(named)[1] if named else _densest(page, kept.tolist(), inside)
    return int(page.starts[number]), int(page.ends[number])


def _lead(page: PageLines, start: int, kept: np.ndarray) -> list[int]:
    """Paragraphs between the page's main heading and the body, which is where a lead often stands."""
    heading = max((i for i in range(start) if page.tags[i] == "h1"), default=start)
    between = [i for i in range(heading + 1, start) if kept[i] >= MIN_LEAD_CHARACTERS]
    return between if len(between) <= 3 else []


def _densest(page: PageLines, kept: list[int], inside: np.ndarray) -> int:
    """The element whose children hold the most prose, as readability scores them: parent in full, grandparent half."""
    scores: dict[int, float] = {}
    parent_of = _parents(page.depths.tolist())
    for i, size in enumerate(kept):
        if size < 25:
            continue
        points = 1 + page.texts[i].count(",") + min(size / 100, 3)
        holder = int(page.parents[i])
        if page.tags[i] in ("p", "pre", "li", "td", "blockquote"):
            holder = parent_of[holder]
        scores[holder] = scores.get(holder, 0) + points
        above = parent_of[holder]
        scores[above] = scores.get(above, 0) + points / 2
    best = max(scores, key=lambda index: scores[index], default=0)
    while best and inside[best] < min(0.5 * inside[0], SMALL_BODY):
        best = parent_of[best]
    return best


def _parents(depths: list[int]) -> list[int]:
    """Number of each element's parent; the root is its own."""
    parents, path = [0] * len(depths), [0]
    for index, depth in enumerate(depths[1:], start=1):
        del path[depth:]
        parents[index] = path[-1]
        path.append(index)
    return parents


def _trim(page: PageLines, lines: list[int]) -> list[int]:
    """Drop lines that are only links or only a date, a byline, an address, a notice; and what hangs at the end."""
    lines = [
        i
        for i in lines
        if (page.links[i] < 0.9 * page.sizes[i] or page.sizes[i] > 200)
        and not (page.sizes[i] < 100 and _JUNK.match(page.texts[i]) and page.tags[i] != "li")
    ]
    while lines and _hangs(page, lines[-1]):
        lines.pop()
    return lines


def _hangs(page: PageLines, i: int) -> bool:
    """Whether a line at the end is a heading, or a few words that end no sentence."""
    text = page.texts[i]
    short = len(text) < 30 and page.tags[i] != "li" and text[-1] not in ".!?\"'”’»…)。！？"
    return short or page.tags[i] in ("h1", "h2", "h3", "h4", "h5", "h6")


_JUNK = re.compile(
    r"(?:\W*(?:advert(?:isement|isements|s)?|anzeige|werbung|publicité|comments?|sponsored)\W*"
    r"|https?://\S+"
    r"|(?:by|von|par) [A-Z]\S*(?: \S+){0,3}"
    r"|(?:first )?(?:updated|published|posted)\b.{0,70}"
    r"|(?:read|share|sign up|subscribe|follow us|click here|get the latest|get access|like this|don'?t miss|related)\b"
    r".{0,80}[^.]"
    r"|(?:\w{3,9}\.?,? )?(?:\d{1,2}\.? \w{3,9}\.?,? \d{4}|\w{3,9}\.? \d{1,2},? \d{4}|\d{1,2}[./]\d{1,2}[./]\d{2,4}).{0,30}"
    r"|\W+)$",
    re.I,
)
