"""A page as lines of text and the elements that hold them, read in one pass over what lexbor writes (page_kernels.py).

A block element or <br> ends a line; an inline element does not. What the tag, id, class and other attributes of an element say
is judged when it is asked for: whether it looks like navigation, sharing, comments and the like, and whether like an article's
body. The vocabulary of ids and classes follows trafilatura's (Barbaresi 2021, Apache-2.0, xpaths.py).
"""

import functools
import html
import re
from dataclasses import dataclass

import numpy as np


def words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


RAW_TAGS = words("head script style noscript iframe template svg math xmp plaintext noembed noframes")
"""Elements that lexbor removes, with all that is in them: what some of them hold is no HTML."""
DROPPED_TAGS = RAW_TAGS | words(
    "canvas button select textarea object embed applet audio video map dialog datalist menu rp rt option input label fieldset "
    "legend picture img area progress meter"
)
_VOID = words("area base br col embed hr img input link meta param source track wbr")
INLINE = words(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i ins kbd mark q s samp small span strong strike sub sup time "
    "tt u var"
)
"""Elements that end no line."""
ALWAYS_BAD = frozenset(("nav", "footer", "aside", "figure", "figcaption", "form"))
"""Elements that are no part of an article by their tag."""
_MAY_BE_BAD = words("div section ul ol li dl p span header table aside details h2 h3 h4")
_MAY_BE_BODY = frozenset(("article", "div", "main", "section"))

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
_HIDDEN = re.compile(r""" (?:style="[^"]*(?:display: ?none|visibility: ?hidden)|aria-hidden="true")""")
_ATTRIBUTE = re.compile(r""" (role|itemprop)="([^"]*)\"""")
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

_NAMES = (
    "",
    "body",
    *sorted(
        (
            DROPPED_TAGS
            | _VOID
            | INLINE
            | ALWAYS_BAD
            | _MAY_BE_BAD
            | _MAY_BE_BODY
            | words("blockquote center dd h1 h5 h6 pre td tr")
        )
        - {"body"}
    ),
)
"""Names of elements that mean something here, by number; all others are number 0."""


@dataclass(frozen=True, slots=True)
class PageLines:
    """Lines of a page in order, with what is known of each, and its elements; arrays are int64."""

    texts: list[str]
    tags: list[str]
    """Name of the element that holds the line directly."""
    sizes: np.ndarray
    """Characters of each line."""
    links: np.ndarray
    """How many of them are in links; the newlines of preformatted text do not count."""
    parents: np.ndarray
    """Number of the element that holds the line directly."""
    names: list[str]
    """Of the elements, "" for names that mean nothing here; the first element is the root."""
    depths: np.ndarray
    starts: np.ndarray
    """Elements hold the lines [start, end)."""
    ends: np.ndarray
    attributes: np.ndarray
    """(elements, 6): where in the source class, id and other attributes begin and end, -1 where there are none."""
    source: str


def read_page(source: str) -> PageLines:
    """Lines and elements of a page as lexbor writes it."""
    from megagpt.corpus.extraction import page_kernels as kernels

    codes = np.frombuffer(source.encode("utf-32-le", "surrogatepass"), np.uint32)
    out, lines, elements = kernels.read_page(codes, *_tables())
    text = out.tobytes().decode("utf-32-le", "surrogatepass")
    texts = [text[start:end] for start, end in lines[:, :2].tolist()]
    if "&" in text:
        texts = [html.unescape(line) if "&" in line else line for line in texts]
    names = [_NAMES[number] for number in elements[:, kernels.NAME].tolist()]
    parents = lines[:, 3]
    return PageLines(
        texts,
        [names[parent] for parent in parents.tolist()],
        lines[:, 1] - lines[:, 0],
        lines[:, 2],
        parents,
        names,
        elements[:, kernels.DEPTH],
        elements[:, kernels.START],
        elements[:, kernels.END],
        elements[:, kernels.CLASS :],
        source,
    )


def is_furniture(page: PageLines, element: int) -> bool:
    """Whether an element's id, class or other attributes say navigation, sharing, comments, hidden and the like."""
    if page.names[element] not in _MAY_BE_BAD:
        return False
    css_class, identifier, others = _values(page, element)
    return bool(
        (css_class and _bad_class(css_class))
        or (identifier and _bad_id(identifier))
        or (others and (_HIDDEN.search(others) or "nav" in dict(_ATTRIBUTE.findall(others)).get("role", "")))
    )


def body_kind(page: PageLines, element: int) -> int:
    """1 to 5 for an element that is named like an article's body, surest first; 0 for others."""
    name = page.names[element]
    if name not in _MAY_BE_BODY:
        return 0
    css_class, identifier, others = _values(page, element)
    values = dict(_ATTRIBUTE.findall(others))
    role = values.get("role", "")
    if "articleBody" in values.get("itemprop", "") or _BODY_1_ID.search(identifier) or _BODY_1_CLASS.search(css_class):
        return 1
    if name == "article":
        return 2
    if role == "article" or _BODY_3_ID.search(identifier) or _BODY_3_CLASS.search(css_class):
        return 3
    if _BODY_4_ID.search(identifier) or _BODY_4_CLASS.search(css_class):
        return 4
    return 5 if name == "main" or any(value.startswith("main") for value in (css_class, identifier, role)) else 0


def _values(page: PageLines, element: int) -> tuple[str, str, str]:
    """Class, id, and all attributes if there are others of meaning; "" where there are none."""
    class_start, class_end, id_start, id_end, start, end = page.attributes[element].tolist()
    source = page.source
    return (
        source[class_start:class_end] if class_start >= 0 else "",
        source[id_start:id_end] if id_start >= 0 else "",
        source[start:end] if start >= 0 else "",
    )


@functools.lru_cache(maxsize=1 << 16)
def _bad_class(css_class: str) -> bool:
    return _BAD_CLASS.search(css_class) is not None


@functools.lru_cache(maxsize=1 << 16)
def _bad_id(identifier: str) -> bool:
    return _BAD_ID.search(identifier) is not None


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the kernel knows about names: hashes in order, their numbers, flags by number, attributes that are watched."""
    from megagpt.corpus.extraction import page_kernels as kernels

    def hash_of(name: str) -> int:
        return int(kernels.name_hash(np.frombuffer(name.encode("utf-32-le"), np.uint32), 0, len(name)))

    flags = np.zeros(len(_NAMES), np.uint8)
    for number, name in enumerate(_NAMES):
        flags[number] = (
            kernels.INLINE * (name in INLINE)
            + kernels.VOID * (name in _VOID)
            + kernels.DROPPED * (name in DROPPED_TAGS)
            + kernels.BREAK * (name == "br")
            + kernels.LINK * (name == "a")
            + kernels.PREFORMATTED * (name == "pre")
        )
    hashes = np.array([hash_of(name) for name in _NAMES[1:]], np.uint64)
    order = np.argsort(hashes)
    watched = np.array([hash_of(name) for name in ("class", "id", "role", "style", "itemprop", "aria-hidden")], np.uint64)
    return hashes[order], (order + 1).astype(np.int64), flags, watched
