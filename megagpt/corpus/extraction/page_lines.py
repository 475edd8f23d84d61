"""A page as lines of text and the elements that hold them, read in one pass over what lexbor writes (page_kernels.py).

A block element or <br> ends a line; an inline element does not. What the tag, id, class and other attributes of an element say
is judged when it is asked for: whether it looks like navigation, sharing, comments and the like, and whether like an article's
body. The vocabulary of ids and classes follows trafilatura's (Barbaresi 2021, Apache-2.0, xpaths.py).
"""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megagpt.corpus.extraction.element_names import (
    CONSENT,
    NAME_ENDS,
    NAME_STARTS,
    NAME_WORDS,
    NOTHING,
    STRONG,
    Verdict,
    judge_name,
    judge_others,
    names_thread,
)


def words(text: str) -> frozenset[str]:
    """The words of a text as a set."""
    return frozenset(text.split())


RAW_TAGS = words("head script style noscript iframe template svg math xmp plaintext noembed noframes")
"""Elements that the guard or the parser removes, with all that is in them: what some of them hold is no HTML."""
DROPPED_TAGS = RAW_TAGS | words(
    "canvas select textarea object embed applet audio video map dialog datalist menu rp rt rtc option input picture img area "
    "progress meter"
)
_CONTROLS = frozenset(("button",))
_VOID = words("area base br col embed hr img input link meta param source track wbr")
BLOCKS = words(
    "address article aside blockquote body caption center dd details dir div dl dt fieldset figcaption figure footer form "
    "h1 h2 h3 h4 h5 h6 header hgroup html legend li listing main nav ol p pre search section summary table tbody td tfoot "
    "th thead tr ul"
)
"""Elements that end a line; <br> and <hr> do too, all others do not."""
HEADINGS = words("h1 h2 h3 h4 h5 h6")
ALWAYS_BAD = frozenset(("nav", "footer", "aside", "figure", "figcaption", "form"))
"""Elements that are no part of an article by their tag."""
MAY_BE_BAD = words("div section ul ol li dl p header table tbody tr td details h2 h3 h4 h5 h6 fieldset address main article")
_MAY_BE_BODY = frozenset(("article", "div", "main", "section"))

_WORD = re.compile(r"[^\W\d_]+")
_DIGITS = re.compile(r"\d+")
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

_MARKED = {"sup": 0, "sub": 1, "code": 2, "kbd": 2, "samp": 2, "tt": 2}
_NAMES = ("", "body", *sorted((DROPPED_TAGS | _VOID | BLOCKS | _CONTROLS | {"a", "label", *_MARKED}) - {"body"}))
"""Names of elements that mean something here, by number; all others are number 0."""


@dataclass(frozen=True, slots=True)
class PageLines:
    """Lines of a page in order, with what is known of each, and its elements; arrays are int64."""

    texts: list[str]
    tags: list[str]
    """Name of the element that holds the line directly."""
    sizes: np.ndarray
    """Width of each line in Latin letters: an ideograph counts for two and a half, a Korean syllable for two."""
    links: np.ndarray
    """How much of it is in links; the newlines of preformatted text do not count."""
    labels: np.ndarray
    """How much of it is in labels of controls."""
    parents: np.ndarray
    """Number of the element that holds the line directly."""
    tag_numbers: np.ndarray
    """Number of the name of that element, see `number_set`."""
    names: list[str]
    """Of the elements, "" for names that mean nothing here; the first element is the root."""
    numbers: np.ndarray
    """Numbers of these names."""
    depths: np.ndarray
    around: np.ndarray
    """Number of the element that each element is in; the root's is its own."""
    alike: np.ndarray
    """Number of the first element with the same class, -1 of those without one; or an element's own in place of it."""
    starts: np.ndarray
    """Elements hold the lines [start, end)."""
    ends: np.ndarray
    attributes: np.ndarray
    """(elements, 6): where in the source class, id and other attributes begin and end, -1 where there are none."""
    attribute_places: list[int]
    """The same as a flat list: single values are read faster from lists; so are those of the next fields."""
    size_list: list[int]
    link_list: list[int]
    label_list: list[int]
    parent_list: list[int]
    start_list: list[int]
    end_list: list[int]
    parent_of: list[int]
    """`around` as a list."""
    places: np.ndarray
    """(lines, 2): where each line begins and ends in the source, tags and all."""
    source: str
    codes: np.ndarray
    """The source's characters, uint32."""


def number_set(names: Iterable[str]) -> np.ndarray:
    """Whether the name of a number is one of `names`. bool [names]."""
    wanted = frozenset(names)
    return np.array([name in wanted for name in _NAMES], bool)


def width(text: str) -> int:
    """Width of a text in Latin letters."""
    from megagpt.corpus.extraction import page_kernels as kernels

    return int(kernels.width_of_all(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32))) // 2


def read_page(source: str) -> PageLines:
    """Lines and elements of a page as lexbor writes it."""
    from megagpt.corpus.extraction import page_kernels as kernels

    codes = np.frombuffer(source.encode("utf-32-le", "surrogatepass"), np.uint32)
    out, lines, elements = kernels.read_page(codes, *_tables())
    text = out.tobytes().decode("utf-32-le", "surrogatepass")
    texts = [text[start:end] for start, end in lines[:, :2].tolist()]
    numbers = np.ascontiguousarray(elements[:, kernels.NAME])
    names = [_NAMES[number] for number in numbers.tolist()]
    parents, around = np.ascontiguousarray(lines[:, kernels.HOLDER]), np.ascontiguousarray(elements[:, kernels.PARENT])
    parent_list = parents.tolist()
    sizes, links, labels = (lines[:, column] // 2 for column in (kernels.LINE_WIDTH, kernels.LINK_WIDTH, kernels.LABEL_WIDTH))
    starts, ends = np.ascontiguousarray(elements[:, kernels.START]), np.ascontiguousarray(elements[:, kernels.END])
    attributes = elements[:, kernels.CLASS :]
    return PageLines(
        texts,
        [names[parent] for parent in parent_list],
        sizes,
        links,
        labels,
        parents,
        numbers[parents],
        names,
        numbers,
        elements[:, kernels.DEPTH],
        around,
        elements[:, kernels.ALIKE],
        starts,
        ends,
        attributes,
        attributes.ravel().tolist(),
        sizes.tolist(),
        links.tolist(),
        labels.tolist(),
        parent_list,
        starts.tolist(),
        ends.tolist(),
        around.tolist(),
        lines[:, kernels.SOURCE_START :],
        source,
        codes,
    )


def judge_element(page: PageLines, element: int, *, by_class: bool = True) -> Verdict:
    """Whether an element's id, class or other attributes say navigation, sharing, comments, hidden and the like.

    by_class: False where the class is known to say nothing.
    """
    if page.names[element] not in MAY_BE_BAD:
        return NOTHING
    class_start, class_end, id_start, id_end, start, end = page.attribute_places[6 * element : 6 * element + 6]
    source = page.source
    verdict = judge_name(source[class_start:class_end]) if by_class and class_start < class_end else NOTHING
    identifier = source[id_start:id_end]
    if identifier and verdict.level < CONSENT:
        by_id = judge_name(identifier)
        if by_id.level > verdict.level and not is_title_made(page, element, identifier):
            verdict = by_id
    if start < end and verdict.level < STRONG:
        verdict = max(verdict, judge_others(source[start:end]))
    return verdict


def may_be_named(page: PageLines, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(which of the elements `among` have attributes of which `judge_element` may say something, of which classes it may).
    bool [elements] each."""
    from megagpt.corpus.extraction import page_kernels as kernels

    places, tables = page.attributes, _name_tables()
    by_class, by_id = (kernels.may_say(page.codes, places[:, i : i + 2], among, *tables) for i in (0, 2))
    return by_class | by_id | (among & (places[:, 4] >= 0)), by_class


def judge_classes(page: PageLines, judge: Callable[[str], bool], among: np.ndarray) -> np.ndarray:
    """What `judge` says of the classes of the elements `among`, each asked once; False where there is none. bool [elements]."""
    found, source = np.zeros(len(page.alike) + 1, bool), page.source
    found[page.alike[among]] = True
    firsts = np.flatnonzero(found[:-1])
    found[-1] = False
    found[firsts] = [judge(source[start:end]) for start, end in page.attributes[firsts, :2].tolist()]
    return found[page.alike]


def class_of_holder(page: PageLines, line: int) -> str:
    """Tag and first class of the element that holds a line, "" if it has no class."""
    return element_class(page, page.parent_list[line])


def element_class(page: PageLines, element: int) -> str:
    """Tag and first class of an element without its digits, "" if it has no class."""
    css_class = _DIGITS.sub("", attributes_of(page, element)[0]).split()
    return f"{page.names[element]} {css_class[0]}" if css_class else ""


def is_named_thread(page: PageLines, element: int) -> bool:
    """Whether an element's class or id says that it holds the posts of a thread, or a question and its answers."""
    css_class, identifier, _ = attributes_of(page, element)
    return page.names[element] != "article" and names_thread(f"{css_class} {identifier}")


def is_sectioning(page: PageLines, element: int) -> bool:
    """Whether an element is a section of a generated document: its id made of its title, or `div class="sect2"`."""
    if page.names[element] not in ("section", "div"):
        return False
    css_class, identifier, _ = attributes_of(page, element)
    if identifier and (page.names[element] == "section" or css_class == "section") and is_title_made(page, element, identifier):
        return True
    return css_class.startswith(("sect1", "sect2", "sect3", "sect4", "refsect", "chapter"))


def is_title_made(page: PageLines, element: int, identifier: str) -> bool:
    """Whether an id is made of the words of the heading that the element begins with, as generators of documents make them.

    Single letters beside words do not count: Sphinx writes `s-introduction`.
    """
    start = page.start_list[element]
    if start >= page.end_list[element] or page.tags[start] not in HEADINGS:
        return False
    title = set(_WORD.findall(page.texts[start].lower()))
    words = _WORD.findall(identifier.lower())
    return bool(title) and title.issuperset([word for word in words if len(word) > 1] or words)


def body_kind(page: PageLines, element: int) -> int:
    """1 to 5 for an element that is named like an article's body, surest first; 0 for others."""
    name = page.names[element]
    if name not in _MAY_BE_BODY:
        return 0
    css_class, identifier, others = attributes_of(page, element)
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


def attributes_of(page: PageLines, element: int) -> tuple[str, str, str]:
    """Class, id, and all attributes if there are others of meaning; "" where there are none."""
    class_start, class_end, id_start, id_end, start, end = page.attribute_places[6 * element : 6 * element + 6]
    source = page.source
    return (
        source[class_start:class_end] if class_start >= 0 else "",
        source[id_start:id_end] if id_start >= 0 else "",
        source[start:end] if start >= 0 else "",
    )


def _hash_of(name: str) -> int:
    from megagpt.corpus.extraction import page_kernels as kernels

    return int(kernels.name_hash(np.frombuffer(name.encode("utf-32-le"), np.uint32), 0, len(name)))


@functools.cache
def _name_tables() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """What the kernel knows about words in classes and ids."""
    from megagpt.corpus.extraction import page_kernels as kernels

    return tuple(
        kernels.name_table([_hash_of(word) for word in sorted(known)]) for known in (NAME_WORDS, NAME_STARTS, NAME_ENDS)
    )


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What the kernel knows about names: a table of them, flags by number, attributes that are watched."""
    from megagpt.corpus.extraction import page_kernels as kernels

    flags = np.zeros(len(_NAMES), np.uint16)
    marks = (kernels.RAISED, kernels.LOWERED, kernels.CODE)
    for number, name in enumerate(_NAMES):
        flags[number] = (
            kernels.INLINE * (name not in BLOCKS | _VOID | DROPPED_TAGS)
            + kernels.VOID * (name in _VOID)
            + kernels.DROPPED * (name in DROPPED_TAGS)
            + kernels.BREAK * (name in ("br", "hr"))
            + kernels.LINK * (name == "a")
            + kernels.PREFORMATTED * (name in ("pre", "listing"))
            + kernels.HEADING * (name in HEADINGS or name in ("summary", "dt"))
            + kernels.CONTROL * (name in _CONTROLS)
            + kernels.LABEL * (name == "label")
            + (marks[_MARKED[name]] if name in _MARKED else 0)
        )
    hashes, numbers = kernels.name_table([_hash_of(name) for name in _NAMES[1:]])
    names = ("class", "id", "role", "style", "itemprop", "aria-hidden", "hidden")
    return hashes, numbers, flags, np.array([_hash_of(name) for name in names], np.uint64)
