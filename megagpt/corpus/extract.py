"""HTML to main text: the page is parsed once by lexbor, then read as one stream of tags; no tree is walked in Python.

How it works. lexbor parses and writes the page back well-formed, without scripts and the like. One pass over the tags cuts the
text into lines (a block element or <br> ends a line) and notes for every element the range of lines it holds, with how much of
their text is links. Elements that look like navigation, sharing, related stories, comments, advertisements (by tag, id, class,
role) or that are mostly links give ranges to drop; the element that looks most like the article's body gives the range to keep.
Where the usual names are missing, the body is the element whose own paragraphs hold the most text. The vocabulary of ids and
classes follows trafilatura's (Barbaresi 2021, Apache-2.0, xpaths.py); the scoring of bodies follows readability.
"""

import functools
import html
import itertools
import re
import unicodedata
from dataclasses import dataclass, field

from selectolax.lexbor import LexborHTMLParser

MIN_BODY_CHARACTERS = 200  # a named element with less prose is not the body
SMALL_BODY = 1500  # a body found by density with less prose than this may be a part of it
MIN_LEAD_CHARACTERS = 80


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DROPPED_TAGS = _words(
    "head script style noscript iframe template svg canvas button select textarea object embed applet audio video map math "
    "dialog datalist noembed noframes xmp plaintext menu rp rt option input label fieldset legend picture img area progress "
    "meter"
)
_VOID = _words("area base br col embed hr img input link meta param source track wbr")
_INLINE = _words("a abbr acronym bdi bdo big cite code data del dfn em font i ins kbd mark q s samp small span time u tt var")
_PLAIN_INLINE = re.compile(
    r"</?(?:b|i|em|strong|u|s|font|small|big|sup|sub|code|kbd|tt|abbr|acronym|mark|q|wbr|var|samp|dfn|bdi|bdo|ins)(?: [^>]*)?>"
)
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_TAG = re.compile(r"""<(/?)([a-z][^\s/>]*)([^>"]*(?:"[^"]*"[^>"]*)*)>""")
_ATTRIBUTE = re.compile(r""" (class|id|role|style|itemprop|aria-hidden|hidden)="([^"]*)\"""")
_CAN_HOLD_BODY = frozenset(("article", "div", "main", "section", "td", "body", "form"))

_SHARED = "^shar|social|viral|newsletter|syndication|tags|sidebar|banner|bread-?crumb|button|author|cookie"
_BAD_ID = re.compile(
    _SHARED + "|^(?:jp-|dpsp-content)|[Ff]ooter|[Ss]hare|[Nn]av|menu|related|message-container|premium|^ad-"
    "|^(?:[Cc]omment(?!ary)|comol|disqus_thread|dsq-comments)|hidden|reader-comments|akismet|^respond|^reply-|infinite-?scroll"
)
_BAD_CLASS = re.compile(
    _SHARED
    + "|^(?:nav|post-nav|ZendeskForm)|subnav|avigation|navbar|navbox|menu|bar(?![a-z])| ad |-ad-|(?:^| )ad-|dfp[Aa]d|outbrain"
    "|taboola|criteo|paid-?content|(?<!elementor-)widget|[Ff]ooter|[Bb]yline|share-|sociable|embed|tag-list|consent|modal-content"
    "|permission|elated|next-|-stories|most-popular|more-on|meta|rating|attachment|timestamp|user-info|user-profile|-icon"
    "|article-infos|message|slide|viewport|overlay|options|expand|obfuscated|blurred|^[Cc]omment(?!ary)|(?:article|post)-comments"
    "|comments-title|nocomments|-reply-|akismet|suggest-links|^hide-|-hide-|hide-print| hidden| hide|noprint|notloaded|caption"
    "|[Tt]easer|infinite-?scroll"
)
_HIDDEN_STYLE = re.compile(r"display: ?none|visibility: ?hidden")
_BODY_1_ID = re.compile(
    "(?:entry|article|art)-content|article__content|article(?:-|__)?body|articleBody|body-text|^articleContent$"
)
_BODY_1_CLASS = re.compile(
    "^(?:post|entry)$|post[-_]text|post-body|post-?entry|post[-_]?content|postContent|post_inner_wrapper|article-?text|articleText"
    "|(?:entry|page|text|article|art)-content|article__content|article(?:-|__)?body|articleBody|ArticleContent|body-text"
    "|article__container"
)
_BODY_3_ID = re.compile("^primary|story-body|^article$|^story$")
_BODY_3_CLASS = re.compile(
    "^(?:postarea|art-postcontent|text|cell|story)$|[Ff]ull[Tt]ext|^article |post-bodycopy|story-?content"
    "|(?:theme|blog|section|single)-content|single-post|main-column|wpb_text_column|story-body|field-body"
)
_BODY_4_ID = re.compile("^content$|content-main|content-body|contentBody|[Mm]ain-[Cc]ontent")
_BODY_4_CLASS = re.compile("^content$|content[-_]main|content(?:-|__)body|[Mm]ain-[Cc]ontent|[Pp]age-[Cc]ontent")


@dataclass(frozen=True, slots=True)
class Extracted:
    """Main text of a page and its title (empty if it has none)."""

    text: str
    title: str


@dataclass(slots=True)
class _Element:
    """An element while and after it is read: the lines [start, end) it holds; `kind` 1 to 5 if it is named like a body."""

    tag: str
    start: int
    depth: int
    kind: int = 0
    bad: int = 0
    end: int = 0


@dataclass(slots=True)
class _Page:
    """Lines of a page in order, with what is known of each."""

    texts: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    links: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    elements: list[_Element] = field(default_factory=list)


def extract_html(page: str) -> Extracted:
    """The main text of an HTML page, paragraphs on lines of their own, and its title. Text is empty if there is none."""
    tree = LexborHTMLParser(page)
    title_node = tree.css_first("title")
    title = " ".join(title_node.text().split()) if title_node is not None else ""
    tree.strip_tags(sorted(_DROPPED_TAGS))
    if tree.body is None:
        return Extracted("", title)
    read = _read_lines(tree.body.html or "")
    return Extracted(unicodedata.normalize("NFC", "\n".join(_main_lines(read))), title)


def _read_lines(source: str) -> _Page:
    """One pass over the tags of a well-formed page."""
    source = _PLAIN_INLINE.sub("", _COMMENT.sub("", source))
    tokens = _TAG.split(source)
    page = _Page()
    root = _Element("body", 0, 0)
    page.elements.append(root)
    stack = [0]
    pieces: list[str] = []
    state = _LineState()

    def flush() -> None:
        if not pieces:
            return
        text = "".join(pieces)
        pieces.clear()
        text = " ".join(text.split()) if not state.in_pre else text.strip("\n")
        if text and not text.isspace():
            if "&" in text:
                text = html.unescape(text).replace("\xa0", " ")
            page.texts.append(text)
            page.tags.append(state.tag)
            page.sizes.append(len(text))
            page.links.append(min(state.link_characters, len(text)))
            page.parents.append(stack[-1])
        state.link_characters = 0

    pieces.append(tokens[0])
    for i in range(1, len(tokens), 4):
        closing, name, attributes, text = tokens[i : i + 4]
        if name in _INLINE:
            if name == "a":
                state.in_link = not closing
        elif name == "br":
            flush()
        elif name not in _VOID:
            flush()
            if closing:
                if len(stack) > 1:
                    page.elements[stack.pop()].end = len(page.texts)
            else:
                bad, kind = _judge(name, attributes)
                page.elements.append(_Element(name, len(page.texts), len(stack), kind, bad))
                stack.append(len(page.elements) - 1)
            state.tag = page.elements[stack[-1]].tag
            if name == "pre":
                state.in_pre = not closing
        if text and (pieces or not text.isspace()):
            pieces.append(text)
            if state.in_link:
                state.link_characters += len(text.strip())
    flush()
    for index in stack:
        page.elements[index].end = len(page.texts)
    return page


@dataclass(slots=True)
class _LineState:
    tag: str = "body"
    in_link: bool = False
    in_pre: bool = False
    link_characters: int = 0


_ALWAYS_BAD = frozenset(("nav", "footer", "aside", "figure", "figcaption", "form"))
_MAY_BE_BAD = _words("div section ul ol li dl p span header table aside details h2 h3 h4")
_MAY_BE_BODY = frozenset(("article", "div", "main", "section"))


@functools.lru_cache(maxsize=1 << 16)
def _judge(tag: str, attributes: str) -> tuple[int, int]:
    """(badness, kind) of an element by its tag and attributes. badness: 2 by its tag, 1 by a name, 0 not."""
    values = dict(_ATTRIBUTE.findall(attributes)) if attributes else {}
    identifier, css_class = values.get("id", ""), values.get("class", "")
    bad = 0
    if tag in _ALWAYS_BAD:
        bad = 2
    elif tag in _MAY_BE_BAD and attributes:
        named = (css_class and _BAD_CLASS.search(css_class)) or (identifier and _BAD_ID.search(identifier))
        hidden = values.get("aria-hidden") == "true" or _HIDDEN_STYLE.search(values.get("style", ""))
        bad = 1 if named or hidden or "nav" in values.get("role", "") else 0
    return bad, _body_kind(tag, identifier, css_class, values) if tag in _MAY_BE_BODY else 0


def _body_kind(tag: str, identifier: str, css_class: str, values: dict[str, str]) -> int:
    """1 to 5 for elements named like a body, surest first; 0 for others."""
    if "articleBody" in values.get("itemprop", "") or _BODY_1_ID.search(identifier) or _BODY_1_CLASS.search(css_class):
        return 1
    if tag == "article":
        return 2
    if values.get("role") == "article" or _BODY_3_ID.search(identifier) or _BODY_3_CLASS.search(css_class):
        return 3
    if _BODY_4_ID.search(identifier) or _BODY_4_CLASS.search(css_class):
        return 4
    if (
        tag == "main"
        or css_class.startswith("main")
        or identifier.startswith("main")
        or values.get("role", "").startswith("main")
    ):
        return 5
    return 0


def _main_lines(page: _Page) -> list[str]:
    """The lines of the body, without what is to be dropped."""
    count = len(page.texts)
    own = [size - link for size, link in zip(page.sizes, page.links, strict=True)]
    good = [own[i] if page.tags[i] in _PROSE and own[i] > 40 else 0 for i in range(count)]
    sums = _Sums(*(list(itertools.accumulate(values, initial=0)) for values in (page.sizes, page.links, good)))
    for min_bad in (1, 2):
        dropped = [False] * count
        for element in page.elements:
            if _to_drop(element, sums, min_bad):
                dropped[element.start : element.end] = [True] * (element.end - element.start)
        kept = [0 if dropped[i] else good[i] for i in range(count)]
        if sum(kept) >= 0.2 * sums.good[-1]:
            break
    body = _find_body(page, kept)
    lines = _lead(page, body, kept) + [i for i in range(body.start, body.end) if not dropped[i]]
    return [page.texts[i] for i in _trim(page, lines)]


@dataclass(frozen=True, slots=True)
class _Sums:
    """Running sums over lines of characters, of characters in links, and of prose."""

    sizes: list[int]
    links: list[int]
    good: list[int]


_PROSE = _words("p div td li dd blockquote section article main body pre span center")


def _to_drop(element: _Element, sums: _Sums, min_bad: int) -> bool:
    start, end = element.start, element.end
    size = sums.sizes[end] - sums.sizes[start]
    if not size:
        return False
    good = sums.good[end] - sums.good[start]
    if element.bad >= min_bad:
        return good <= 0.5 * sums.good[-1]
    if element.tag in _MAY_BE_LINKS:
        return sums.links[end] - sums.links[start] > 0.5 * size and good <= 0.3 * sums.good[-1]
    return False


_MAY_BE_LINKS = frozenset(("ul", "ol", "dl", "table", "div", "section", "p", "tr", "h2", "h3", "h4"))


def _find_body(page: _Page, kept: list[int]) -> _Element:
    """The first element of the surest kind that holds enough of the page's prose, else the densest one."""
    sums = list(itertools.accumulate(kept, initial=0))
    named = [element for element in page.elements if element.kind]
    for element in sorted(named, key=lambda element: element.kind):
        size = sums[element.end] - sums[element.start]
        if size >= MIN_BODY_CHARACTERS and size >= 0.3 * sums[-1]:
            return element
    return _densest(page, kept)


def _lead(page: _Page, body: _Element, kept: list[int]) -> list[int]:
    """Paragraphs between the page's main heading and the body, which is where a lead often stands."""
    headings = [i for i in range(body.start) if page.tags[i] == "h1"]
    if not headings:
        return []
    between = [i for i in range(headings[-1] + 1, body.start) if kept[i] >= MIN_LEAD_CHARACTERS]
    return between if len(between) <= 3 else []


def _densest(page: _Page, kept: list[int]) -> _Element:
    """The element whose children hold the most prose, as readability scores them: parent in full, grandparent half."""
    scores: dict[int, float] = {}
    parent_of = _parents(page)
    for i, size in enumerate(kept):
        if size < 25:
            continue
        points = 1 + page.texts[i].count(",") + min(size / 100, 3)
        holder = page.parents[i]
        if page.tags[i] in ("p", "pre", "li", "td", "blockquote"):
            holder = parent_of[holder]
        scores[holder] = scores.get(holder, 0) + points
        above = parent_of[holder]
        scores[above] = scores.get(above, 0) + points / 2
    best = max(scores, key=lambda index: scores[index], default=0)
    sums = list(itertools.accumulate(kept, initial=0))
    while best and sums[page.elements[best].end] - sums[page.elements[best].start] < min(0.5 * sums[-1], SMALL_BODY):
        best = parent_of[best]
    return page.elements[best]


def _parents(page: _Page) -> list[int]:
    """Index of each element's parent; the root is its own."""
    parents, path = [0] * len(page.elements), [0]
    for index, element in enumerate(page.elements[1:], start=1):
        del path[element.depth :]
        parents[index] = path[-1]
        path.append(index)
    return parents


def _trim(page: _Page, lines: list[int]) -> list[int]:
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


def _hangs(page: _Page, i: int) -> bool:
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
