"""The chosen lines of a page as plain text or as Markdown: tables by row, code with its indentation, raised digits as powers.

A table is data when its cells are short and no table is in it; tables that only lay a page out are read cell by cell. In both
forms no number changes its value: 10<sup>6</sup> is 10^6, and the cells of a row stay apart.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np

from megagpt.corpus.extraction.config import Markup
from megagpt.corpus.extraction.page_lines import HEADINGS, PageLines, attributes_of, is_sectioning, judge_classes, number_set

MAX_CELL_WIDTH, MAX_MEAN_CELL_WIDTH, MAX_CELL_LINES = 300, 80, 4
_CODE_NAMES = re.compile(
    r"(?<![a-z])(?:blob-code|code(?:hilite|block|-block|mirror)?|highlight(?:table)?|source-?code|syntaxhighlighter|hljs|prettyprint|rouge|"
    r"gist|crayon|dp-highlighter)(?![a-z])",
    re.IGNORECASE,
)
_NUMBER_NAMES = re.compile(r"(?<![a-z])(?:num|blob-num|line-?n(?:o|os|umbers?|um)|gutter|lno)(?![a-z])", re.IGNORECASE)
_LANGUAGE = re.compile(
    r"""class="[^"]*?\b(?:lang(?:uage)?|highlight-source|highlight|brush:)[- ]([a-z][\w+#-]*)""", re.IGNORECASE
)
_MAY_BE_NAMED_CODE = frozenset(("div", "table", "td", "ol", "ul", "tbody", "tr"))
_IS_PREFORMATTED, _CAN_BE_NAMED_CODE = number_set(("pre", "listing")), number_set(_MAY_BE_NAMED_CODE)
_TABLE_PARTS = number_set(("td", "th", "table"))
_IS_HEADING, _IS_PARAGRAPH = number_set(HEADINGS), number_set(("p",))
_TAG = re.compile(r"<[^<>]*>")
_MARKS = re.compile("[\ufdd0-\ufdd5]")
_RAISED = re.compile("\ufdd0([^\ufdd0-\ufdd3]*)\ufdd1")
_LOWERED = re.compile("\ufdd2([^\ufdd0-\ufdd3]*)\ufdd3")
_CODE_MARKS = re.compile("[\ufdd4\ufdd5]")
_INLINE_CODE = re.compile("\ufdd4([^\ufdd4\ufdd5]*)\ufdd5")
_EXPONENT = re.compile(r"\A[+\-−–]?(?:\d+(?:[.,/]\d+)?|[nkijmxyztpqNT]|[0-9A-Za-z]{1,3}(?:[+\-−–/*][0-9A-Za-z]{1,3})+)$")
_SHORT_WORD = re.compile(r"(?<![^\W\d_])[^\W\d_]{1,3}$")
_PERMALINK = re.compile(r"(?<!\s)\s*+[¶#§🔗]\s*+$")


@dataclass(frozen=True, slots=True)
class Structure:
    """Which lines of a page are in data tables and in code."""

    rows: list[int]
    """By line: number of the row's element if it is in a data table, else -1."""
    cells: dict[int, list[int]]
    """By row: its cells' elements."""
    tables: dict[int, int]
    """By row: the table's element."""
    code: list[int]
    """By line: number of the element that holds code (a pre, or one named so), else -1."""
    section_starts: list[bool]
    """By line: whether it is the first paragraph below the heading of a section of a generated document."""


def read_structure(page: PageLines, parent_of: list[int]) -> Structure:
    """Find the data tables and the code of a page."""
    names = page.names
    around = _Around(page, parent_of)
    rows, cells, tables = [-1] * len(page.texts), dict[int, list[int]](), dict[int, int]()
    if "tr" in names and ("td" in names or "th" in names):
        by_table: dict[int, dict[int, list[int]]] = {}
        nested: set[int] = set()
        for i in np.flatnonzero(_TABLE_PARTS[page.numbers]).tolist():
            name = names[i]
            if name != "table" and (row := around.find(i, "tr")) >= 0 and (table := around.find(row, "table")) >= 0:
                by_table.setdefault(table, {}).setdefault(row, []).append(i)
            elif name == "table" and (outer := around.find(parent_of[i], "table")) >= 0:
                nested.add(outer)
        for table, its_rows in by_table.items():
            if table not in nested and not around.is_code(table) and _is_data(page, its_rows):
                for row, its_cells in its_rows.items():
                    cells[row], tables[row] = its_cells, table
                    for line in range(page.start_list[row], page.end_list[row]):
                        rows[line] = row
    section_starts = [False] * len(page.texts)
    below_heading = _IS_HEADING[page.tag_numbers[:-1]] & _IS_PARAGRAPH[page.tag_numbers[1:]]
    for i in (1 + np.flatnonzero(below_heading)).tolist():
        section_starts[i] = _starts_section(page, i, parent_of)
    return Structure(rows, cells, tables, _code(page, around), section_starts)


def _code(page: PageLines, around: "_Around") -> list[int]:
    """By line: number of the outermost element around it that holds code, -1 if there is none."""
    code, end = [-1] * len(page.texts), 0
    holds_lines = page.ends > page.starts
    can_be_named = holds_lines & _CAN_BE_NAMED_CODE[page.numbers]
    is_named = can_be_named & (judge_classes(page, _names_code, can_be_named) | (page.attributes[:, 4] >= 0))
    for i in np.flatnonzero(is_named | (holds_lines & _IS_PREFORMATTED[page.numbers])).tolist():
        if page.end_list[i] > end and around.is_code(i):
            start, end = page.start_list[i], page.end_list[i]
            code[start:end] = [i] * (end - start)
    return code


def _starts_section(page: PageLines, i: int, parent_of: list[int]) -> bool:
    element = page.parent_list[i]
    for _ in range(3):
        element = parent_of[element]
        if is_sectioning(page, element):
            return True
    return False


class _Around:
    """Finds what an element is in, each answer once."""

    def __init__(self, page: PageLines, parent_of: list[int]) -> None:
        self._page, self._parent_of = page, parent_of
        self._named: dict[int, bool] = {}

    def find(self, element: int, name: str) -> int:
        """The element itself or the nearest one around it of a name, but not beyond a table; -1 if there is none."""
        while element and self._page.names[element] != name:
            if self._page.names[element] == "table":
                return -1
            element = self._parent_of[element]
        return element or -1

    def is_code(self, element: int) -> bool:
        """Whether an element is a pre or named like code."""
        if element not in self._named:
            name = self._page.names[element]
            named = False
            if name in _MAY_BE_NAMED_CODE:
                css_class, _, others = attributes_of(self._page, element)
                named = _names_code(css_class) or "white-space: pre" in others or "white-space:pre" in others
            self._named[element] = name in ("pre", "listing") or named
        return self._named[element]


@functools.lru_cache(maxsize=1 << 16)
def _names_code(css_class: str) -> bool:
    return css_class != "" and _CODE_NAMES.search(css_class) is not None


def _is_data(page: PageLines, rows: dict[int, list[int]]) -> bool:
    """Whether a table's rows, given by their cells, are data."""
    cells = [cell for row in rows.values() for cell in row]
    if len(rows) < 2 or max(map(len, rows.values())) < 2:
        return False
    sums = np.concatenate([[0], np.cumsum(page.sizes)])
    starts, ends = page.starts[cells], page.ends[cells]
    widths = sums[ends] - sums[starts]
    filled = widths[widths > 0]
    return bool(
        len(filled) >= 2
        and widths.max() <= MAX_CELL_WIDTH
        and filled.mean() <= MAX_MEAN_CELL_WIDTH
        and (ends - starts).max() <= MAX_CELL_LINES
    )


def write(page: PageLines, lines: list[int], structure: Structure, parent_of: list[int], markup: Markup) -> str:
    """The text of the chosen lines."""
    blocks: list[str] = []
    done_rows: set[int] = set()
    table = code = -1
    for i in lines:
        row, holder = structure.rows[i], structure.code[i]
        if row >= 0:
            if row not in done_rows:
                blocks += _row(page, row, structure, markup, is_first=structure.tables[row] != table)
                done_rows.add(row)
            table, code = structure.tables[row], -1
        elif holder >= 0:
            text = _code_line(page, i)
            if text is None:
                continue
            if markup == "text":
                blocks.append(text)
            elif holder == code:
                blocks[-1] = f"{blocks[-1][:-4]}\n{text}\n```"
            else:
                blocks.append(f"\n```{_language(page, i, holder, parent_of)}\n{text}\n```")
            table, code = -1, holder
        else:
            blocks.append(_line(page, i, parent_of, markup))
            table = code = -1
    return "\n".join(blocks).strip("\n")


def resolve_marks(text: str, *, code: bool = False) -> str:
    """A line without the marks of sup, sub and code: raised digits behind a number, a bracket or a short word are a power."""
    if not _MARKS.search(text):
        return text
    text = _INLINE_CODE.sub(lambda match: f"`{match[1]}`" if match[1].strip() else match[1], text) if code else text
    text = _CODE_MARKS.sub("", text)
    text = _RAISED.sub(_raised, text)
    return _MARKS.sub("", _LOWERED.sub(_lowered, text))


def _raised(match: re.Match[str]) -> str:
    before, content = _MARKS.sub("", match.string[max(0, match.start() - 8) : match.start()]), match[1].strip()
    following = match.string[match.end() : match.end() + 1]
    if before[-1:].isdigit() and content[:1].isdigit() and following in ("⁄", "/", "∕"):
        return f" {content}"
    is_power = _EXPONENT.match(content) and (before[-1:].isdigit() or before[-1:] in tuple(")]}") or _SHORT_WORD.search(before))
    if is_power:
        return f"^{content}" if content.isalnum() or content.lstrip("+-−–").isalnum() else f"^({content})"
    return f"^{content}" if before[-1:].isdigit() and content[:1].isdigit() else match[1]


def _lowered(match: re.Match[str]) -> str:
    before, following = match.string[: match.start()][-1:], match.string[match.end() : match.end() + 1]
    content = match[1].strip()
    text = f"_{content}" if before.isdigit() and content[:1].isdigit() else match[1]
    return f"{text} " if content[-1:].isdigit() and following.isdigit() else text


def _line(page: PageLines, i: int, parent_of: list[int], markup: Markup) -> str:
    text, tag = resolve_marks(page.texts[i], code=markup == "markdown"), page.tags[i]
    if tag in HEADINGS and page.link_list[i]:
        text = _PERMALINK.sub("", text)
    if markup == "text":
        return text
    if tag in HEADINGS:
        return f"\n{'#' * int(tag[1])} {text}\n"
    items, quotes = 0, 0
    element = item = page.parent_list[i]
    first_item = -1
    while element:
        name = page.names[element]
        if name in ("ul", "ol"):
            items += 1
        elif name == "li" and first_item < 0:
            first_item = element
        quotes += name == "blockquote"
        element = parent_of[element]
    if first_item >= 0 and items:
        indent = "  " * (items - 1)
        if page.starts[first_item] == i:
            return f"{'> ' * quotes}{indent}{_bullet(page, first_item, parent_of)} {text}"
        return f"{'> ' * quotes}{indent}  {text}"
    return f"{'> ' * quotes}{text}" if tag in ("dt", "td", "th") else f"\n{'> ' * quotes}{text}" if item else text


def _bullet(page: PageLines, item: int, parent_of: list[int]) -> str:
    parent = parent_of[item]
    if page.names[parent] != "ol":
        return "-"
    before = sum(parent_of[i] == parent and page.names[i] == "li" for i in range(parent + 1, item))
    return f"{before + 1}."


def _row(page: PageLines, row: int, structure: Structure, markup: Markup, *, is_first: bool) -> list[str]:
    """A row of a data table: its cells, empty ones too, with bars between them."""
    cells = []
    for cell in structure.cells[row]:
        pieces = [
            resolve_marks(page.texts[i], code=markup == "markdown") for i in range(int(page.starts[cell]), int(page.ends[cell]))
        ]
        cells.append(" ".join(" ".join(pieces).split()))
    if markup == "text":
        return [" | ".join(cells).rstrip() if len(cells) > 1 else cells[0]]
    text = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    return [f"\n{text}", "|" + " --- |" * len(cells)] if is_first else [text]


def _code_line(page: PageLines, i: int) -> str | None:
    """A line of code as it is in the source, None for a line number."""
    element = int(page.parents[i])
    css_class = attributes_of(page, element)[0]
    text = page.texts[i]
    numbers = text.split()
    if _NUMBER_NAMES.search(css_class) and all(number.isdigit() for number in numbers):
        return None
    if page.tags[i] in ("pre", "listing"):
        is_count = (
            len(numbers) > 1 and numbers == [str(int(numbers[0]) + n) for n in range(len(numbers))]
            if numbers[0].isdigit()
            else False
        )
        return None if is_count else _MARKS.sub("", text)
    start, end = page.places[i].tolist()
    source = (
        _TAG.sub("", page.source[start:end])
        .replace("&nbsp;", " ")
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
    )
    return source.strip("\r\n").rstrip()


def _language(page: PageLines, i: int, holder: int, parent_of: list[int]) -> str:
    """The language that classes of a code's elements name, "" if none does."""
    start = int(page.places[i][0])
    if match := _LANGUAGE.search(page.source[start : start + 300].partition(">")[0]):
        return match[1].lower()
    for element in (holder, parent_of[holder], parent_of[parent_of[holder]]):
        css_class = attributes_of(page, element)[0]
        if match := _LANGUAGE.search(f'class="{css_class}"'):
            return match[1].lower()
    return ""
