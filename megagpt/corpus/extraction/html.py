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

from megagpt.corpus.extraction.config import Comments, Markup
from megagpt.corpus.extraction.element_names import COMMENTS, CONSENT, STRONG, Verdict
from megagpt.corpus.extraction.formulas import replace_formulas
from megagpt.corpus.extraction.json_articles import article_of_json
from megagpt.corpus.extraction.line_rules import are_sentences, is_aside, is_boilerplate, trim
from megagpt.corpus.extraction.markup import Structure, read_structure, write
from megagpt.corpus.extraction.page_lines import (
    ALWAYS_BAD,
    MAY_BE_BAD,
    PageLines,
    body_kind,
    element_class,
    is_named_thread,
    is_sectioning,
    judge_element,
    may_be_named,
    number_set,
    read_page,
    width,
    words,
)

MIN_BODY_CHARACTERS = 200  # a named element with less prose is not the body
MIN_LEAD_CHARACTERS = 80
ARTICLE = 2  # the surest kinds of `body_kind`
MEANINGLESS = 0.5  # a name that holds more of the page's prose says nothing
MOST_COMMENTS = 0.8  # and so much of it is a thread, not an article's comments
WEAK_PROSE = 80  # an element with as much prose, few links and a weak name stays
GROUP = 1.4  # siblings of one class belong to the body if they hold this many times the prose of one of them
LONG_LINE = 60  # characters, for `prose`
PROSE_CHARACTERS = 1000
_REMOVED = ["math", "noscript", "script", "svg", "template"]  # of RAW_TAGS those that the guard leaves to the parser
_IS_PROSE = number_set(words("p div td li dd blockquote section article main body pre span center"))
_MAY_BE_LINKS = number_set(("ul", "ol", "dl", "table", "div", "section", "tr", "h2", "h3", "h4"))
_DIALOGS = words("modal popup lightbox")
_IS_ALWAYS_BAD, _MAY_BE_BAD = number_set(ALWAYS_BAD), number_set(MAY_BE_BAD)


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
    is_thread: bool
    """Whether the head says that the page is a thread of a forum, or a question with its answers."""
    source: str
    """The page as it was parsed."""


def extract_html(page: str, url: str | None = None, *, markup: Markup = "text", comments: Comments = "drop") -> Extracted:
    """The main text of an HTML page, paragraphs on lines of their own, and its title. Text is empty if there is none.

    url: the page's address, if known: it tells threads of forums. markup: plain text or Markdown. comments: whether readers'
    comments below an article stay; posts of a thread always do.
    """
    return main_text(parse_page(page, url), markup=markup, comments=comments)


def parse_page(page: str, url: str | None = None) -> ParsedPage:
    """Parse a page and read its lines: the one part of extraction that all pages need."""
    from megagpt.corpus.extraction.page_guard import FORMULA, TEMPLATE, THREAD, guard_page

    guarded = guard_page(page)
    if guarded.seen & TEMPLATE and "shadowroot" in page:
        guarded = guard_page(_open_shadow_roots(page))
    tree = LexborHTMLParser(guarded.encoded)
    title_node = tree.css_first("title")
    title = " ".join(title_node.text().split()) if title_node is not None else ""
    is_thread = bool(guarded.seen & THREAD and any(name in page for name in _THREAD_TYPES)) or _says_thread(tree, url)
    if guarded.seen & FORMULA:
        replace_formulas(tree)
    tree.strip_tags(_REMOVED)
    return ParsedPage(read_page((tree.body.html if tree.body is not None else None) or ""), title, is_thread, guarded.source)


def _open_shadow_roots(page: str) -> str:
    """The page with its declarative shadow roots as plain elements: their content is shown."""
    opened = 0
    pieces, at = [], 0
    for match in _TEMPLATE.finditer(page):
        is_root = match[1] == "" and "shadowroot" in match[0]
        if is_root or (opened and match[1]):
            pieces += [page[at : match.start()], "<div>" if is_root else "</div>"]
            at = match.end()
        opened += is_root - bool(match[1] and opened)
    return "".join([*pieces, page[at:]])


def _says_thread(tree: LexborHTMLParser, url: str | None) -> bool:
    """Whether a page's address, as given or as it says itself, or the program that made it is a forum's."""
    if url and _THREAD.search(url):
        return True
    if tree.head is None:
        return False
    return any(
        _THREAD.search(node.attributes.get("href" if node.tag == "link" else "content") or "")
        for node in tree.head.css('link[rel=canonical], meta[property="og:url"], meta[name=generator]')
    )


def prose(page: ParsedPage) -> str:
    """What tells a page's language: the first characters of its long lines that are not links, or of all lines if none is."""
    lines = page.lines
    own = (lines.sizes - lines.links).tolist()
    chosen = [text for text, size in zip(lines.texts, own, strict=True) if size >= LONG_LINE] or lines.texts
    return " ".join(" ".join(chosen[:PROSE_CHARACTERS])[:PROSE_CHARACTERS].split())


def main_text(page: ParsedPage, *, markup: Markup = "text", comments: Comments = "drop") -> Extracted:
    """The main text of a parsed page."""
    text = _text(page, markup, keep_comments=comments == "keep")
    if len(text) < MIN_BODY_CHARACTERS and width(text) < MIN_BODY_CHARACTERS:
        text = _last_resort(page, text, markup)
    return Extracted(unicodedata.normalize("NFC", text), page.title)


def _text(page: ParsedPage, markup: Markup, *, keep_comments: bool) -> str:
    lines = page.lines
    parent_of = lines.parent_of
    structure = read_structure(lines, parent_of)
    chosen = _main_lines(lines, parent_of, structure, is_thread=page.is_thread, keep_comments=keep_comments)
    return write(lines, chosen, structure, parent_of, markup)


def _last_resort(page: ParsedPage, text: str, markup: Markup) -> str:
    """The article of a page that has it only in noscript or other elements that are dropped, or in JSON-LD."""
    if _FALLBACK.search(page.source):
        opened = parse_page(_FALLBACK.sub("", page.source))
        found = _text(opened, markup, keep_comments=False)
        if width(found) >= max(MIN_BODY_CHARACTERS, 2 * width(text)):
            return found
    found = article_of_json(page.source)
    return found if width(found) >= max(MIN_BODY_CHARACTERS, 2 * width(text)) else text


def _main_lines(
    page: PageLines, parent_of: list[int], structure: Structure, *, is_thread: bool, keep_comments: bool
) -> list[int]:
    """Numbers of the lines of the body, without what is to be dropped."""
    good = _prose(page)
    verdicts = _verdicts(page)
    consent = np.zeros(len(page.texts), bool)
    for i, verdict in verdicts.items():
        if verdict.level == CONSENT:
            consent[page.starts[i] : page.ends[i]] = True
    if (good[~consent].sum() >= MIN_BODY_CHARACTERS) or not good.sum():
        good = np.where(consent, 0, good)
    dialogs = _in_dialogs(page, verdicts, good)
    if good[~dialogs].sum() >= MIN_BODY_CHARACTERS:
        good, consent = np.where(dialogs, 0, good), consent | dialogs
    meaningless = _meaningless(page, verdicts, good)
    if is_thread or COMMENTS in meaningless or _is_in_thread(page, good):
        is_thread, meaningless = True, meaningless | {COMMENTS, "message"}
        verdicts = _without_holders_of_threads(page, verdicts, good)
    if keep_comments:
        meaningless |= {COMMENTS}
    dropped, kept = consent, good
    for by_name in (True, False):
        dropped = consent | _dropped(page, good, structure.section_starts, verdicts if by_name else {}, meaningless)
        kept = np.where(dropped, 0, good)
        if kept.sum() >= 0.2 * good.sum():
            break
    start, end = _find_body(page, kept, parent_of, is_thread=is_thread)
    lines = _lead(page, start, kept) + (start + np.flatnonzero(~dropped[start:end])).tolist()
    if keep_comments:
        lines += _comments_behind(page, verdicts, dropped, end)
    others = np.flatnonzero(~dropped).tolist()
    trimmed = trim(page, lines, structure, is_thread=is_thread) or trim(page, others, structure, is_thread=is_thread)
    return trimmed or [i for i in others if not is_aside(page, i)]


def _in_dialogs(page: PageLines, verdicts: dict[int, Verdict], good: np.ndarray) -> np.ndarray:
    """Which lines are in dialogs with prose, which stand over a page that has text of its own; not in those that hold an
    article. bool [lines]."""
    found, sums = np.zeros(len(page.texts), bool), np.concatenate([[0], np.cumsum(good)])
    for i in [i for i, verdict in verdicts.items() if verdict.word in _DIALOGS]:
        start, end = page.start_list[i], page.end_list[i]
        if sums[end] - sums[start] < WEAK_PROSE or found[start]:
            continue
        inside = np.flatnonzero((page.starts >= start) & (page.ends <= end) & (page.ends > page.starts))
        found[start:end] = not any(0 < body_kind(page, j) <= ARTICLE for j in inside.tolist())
    return found


def _without_holders_of_threads(page: PageLines, verdicts: dict[int, Verdict], good: np.ndarray) -> dict[int, Verdict]:
    """The verdicts but those on elements around one that is named like a thread and holds much of the page's prose."""
    inside = _inside(page, good)
    large = np.flatnonzero((inside >= 0.2 * good.sum()) & (inside > 0)).tolist()
    threads = [(page.start_list[i], page.end_list[i]) for i in large if is_named_thread(page, i)]
    return {
        i: verdict
        for i, verdict in verdicts.items()
        if verdict.level == CONSENT
        or not any(page.start_list[i] <= start and end <= page.end_list[i] for start, end in threads)
    }


def _comments_behind(page: PageLines, verdicts: dict[int, Verdict], dropped: np.ndarray, end: int) -> list[int]:
    """Lines of readers' comments behind the body."""
    found = np.zeros(len(page.texts), bool)
    for i, verdict in verdicts.items():
        if verdict.word == COMMENTS:
            found[max(end, page.starts[i]) : max(end, page.ends[i])] = True
    return np.flatnonzero(found & ~dropped).tolist()


def _prose(page: PageLines) -> np.ndarray:
    """Width of each line that is prose, 0 for others: wide lines without links that are not about browsers, cookies or rights.

    On a page that has none narrower ones count too. int64 [lines].
    """
    own = page.sizes - page.links
    is_prose = _IS_PROSE[page.tag_numbers]
    for narrow in (40, 15, 0):
        good = np.where((own > narrow) & is_prose, own, 0)
        for i in np.flatnonzero(good).tolist():
            if is_boilerplate(page, i):
                good[i] = 0
        if good.sum() >= MIN_BODY_CHARACTERS:
            break
    return good


def _is_in_thread(page: PageLines, good: np.ndarray) -> bool:
    """Whether an element that holds most of the page's prose is named like a thread."""
    inside = _inside(page, good)
    return any(is_named_thread(page, i) for i in np.flatnonzero((inside > 0) & (inside >= 0.5 * good.sum())).tolist())


def _verdicts(page: PageLines) -> dict[int, Verdict]:
    """What names say of the elements that hold lines, where they say something."""
    found: dict[int, Verdict] = {}
    may_be_bad = (page.ends > page.starts) & _MAY_BE_BAD[page.numbers]
    has_others = (page.attributes[:, 2] >= 0) | (page.attributes[:, 4] >= 0)
    of_class: dict[int, Verdict] = {}
    named, by_class = may_be_named(page, may_be_bad)
    candidates = np.flatnonzero(named)
    columns = (candidates, page.alike[candidates], has_others[candidates], by_class[candidates])
    for i, first, others, says in zip(*(column.tolist() for column in columns), strict=True):
        verdict = None if others else of_class.get(first)
        if verdict is None:
            verdict = judge_element(page, i, by_class=says)
            if not others:
                of_class[first] = verdict
        if verdict.level:
            found[i] = verdict
    return found


def _meaningless(page: PageLines, verdicts: dict[int, Verdict], good: np.ndarray) -> set[str]:
    """Words of names in which, taken together, most of the page's prose is."""
    sums = np.concatenate([[0], np.cumsum(good)]).tolist()
    prose: dict[str, int] = {}
    ends: dict[str, int] = {}
    for i, verdict in verdicts.items():
        start, end = page.start_list[i], page.end_list[i]
        if start >= ends.get(verdict.word, 0):
            ends[verdict.word] = end
            prose[verdict.word] = prose.get(verdict.word, 0) + sums[end] - sums[start]
    return {word for word, size in prose.items() if size > (MOST_COMMENTS if word == COMMENTS else MEANINGLESS) * sums[-1]}


def _dropped(
    page: PageLines, good: np.ndarray, section_starts: list[bool], verdicts: dict[int, Verdict], meaningless: set[str]
) -> np.ndarray:
    """Which lines go: those in elements that look like boilerplate or are mostly links, unless much of the page's prose, `good`
    by line, is in them. bool [lines]."""
    sizes, links, prose = (_inside(page, values) for values in (page.sizes, page.links, good))
    may_be_bad = prose <= 0.5 * good.sum()
    sentences = _inside(page, are_sentences(page) | np.array(section_starts, bool))
    mostly_links = (links > 0.5 * sizes) & (prose <= 0.3 * good.sum()) & (sentences == 0)
    rich = (prose >= WEAK_PROSE) & (prose > 0.5 * sizes) & (links < 0.25 * sizes)
    dropped, end = np.zeros(len(page.texts), bool), 0
    ends, bad_by_tag = page.end_list, _IS_ALWAYS_BAD[page.numbers] | (mostly_links & _MAY_BE_LINKS[page.numbers])
    judged = bad_by_tag.copy()
    judged[list(verdicts)] = True
    bad_list = bad_by_tag.tolist()
    for i in np.flatnonzero((sizes > 0) & may_be_bad & judged).tolist():
        if ends[i] <= end:
            continue  # its parent is dropped already
        bad = bad_list[i]
        if not bad and (verdict := verdicts.get(i)) and verdict.word not in meaningless:
            bad = verdict.level >= STRONG or not rich[i]
        if bad:
            end = ends[i]
            dropped[page.starts[i] : end] = True
    return dropped


def _inside(page: PageLines, values: np.ndarray) -> np.ndarray:
    """Sums over the lines of each element."""
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[page.ends] - sums[page.starts]


def _find_body(page: PageLines, kept: np.ndarray, parent_of: list[int], *, is_thread: bool) -> tuple[int, int]:
    """Lines of the first element of the surest kind that holds enough of the page's prose, else of the densest one; of a thread
    those of all its posts."""
    inside = _inside(page, kept)
    large = np.flatnonzero((inside >= MIN_BODY_CHARACTERS) & (inside >= 0.3 * kept.sum())).tolist()
    named = [(kind, number) for number in large if (kind := body_kind(page, number))]
    number = min(named)[1] if named else _densest(page, kept.tolist(), inside, parent_of)
    section = _outermost_section(page, number, parent_of)
    if section:
        return _with_siblings(page, section, parent_of)
    start, end = _with_siblings(page, number, parent_of)
    sums = np.concatenate([[0], np.cumsum(kept)])
    if is_thread or sums[end] - sums[start] > GROUP * inside[number]:
        return start, end
    return int(page.starts[number]), int(page.ends[number])


def _outermost_section(page: PageLines, number: int, parent_of: list[int]) -> int:
    """The outermost section of a generated document that an element is or is in, 0 if there is none."""
    found = 0
    while number:
        if is_sectioning(page, number):
            found = number
        number = parent_of[number]
    return found


def _with_siblings(page: PageLines, number: int, parent_of: list[int]) -> tuple[int, int]:
    """Lines from the first to the last sibling of an element, or the nearest one around it that has siblings of its class."""
    start, end = int(page.starts[number]), int(page.ends[number])
    for _ in range(8):
        name = element_class(page, number)
        if not number:
            break
        if name:
            siblings = np.flatnonzero((page.around == parent_of[number]) & (page.ends > page.starts)).tolist()
            posts = [i for i in siblings if i and element_class(page, i) == name]
            if len(posts) > 1:
                return int(page.starts[posts[0]]), int(page.ends[posts[-1]])
        number = parent_of[number]
    return start, end


def _lead(page: PageLines, start: int, kept: np.ndarray) -> list[int]:
    """Paragraphs between the page's main heading and the body, which is where a lead often stands."""
    heading = max((i for i in range(start) if page.tags[i] == "h1"), default=start)
    between = [i for i in range(heading + 1, start) if kept[i] >= MIN_LEAD_CHARACTERS]
    return between if len(between) <= 3 else []


def _densest(page: PageLines, kept: list[int], inside: np.ndarray, parent_of: list[int]) -> int:
    """The element whose children hold the most prose, as readability scores them: parent in full, grandparent half."""
    scores: dict[int, float] = {}
    for i, size in enumerate(kept):
        if size < 25:
            continue
        points = 1 + page.texts[i].count(",") + min(size / 100, 3)
        holder = page.parent_list[i]
        if page.tags[i] in ("p", "pre", "li", "td", "blockquote"):
            holder = parent_of[holder]
        scores[holder] = scores.get(holder, 0) + points
        above = parent_of[holder]
        scores[above] = scores.get(above, 0) + points / 2
    best = max(scores, key=lambda index: scores[index], default=0)
    while best and inside[best] < 0.5 * inside[0]:
        best = parent_of[best]
    return best


_THREAD = re.compile(
    r"//(?:forums?|bbs|boards?|discuss|ask|answers)\.|/(?:forums?|threads?|topics?|t|viewtopic|viewthread|showthread|discussions?|"
    r"questions?|q|bbs|answers?)[/.\-]|(?:viewtopic|viewthread|showthread|forumdisplay)\.php|"
    r"\b(?:vbulletin|xenforo|phpbb|discourse|flarum|mybb|discuz|bbpress|invision|simple machines|nodebb|vanilla|fluxbb|kunena|"
    r"misago)\b",
    re.IGNORECASE,
)
_TEMPLATE = re.compile(r"<(/?)template\b[^<>]*>", re.IGNORECASE)
_FALLBACK = re.compile(r"</?(?:noscript|template|dialog|menu|button|canvas|object|video|audio)\b[^<>]*>", re.IGNORECASE)
_THREAD_TYPES = ("DiscussionForumPosting", "QAPage")
