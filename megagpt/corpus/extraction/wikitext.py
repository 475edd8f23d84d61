"""Wikitext to plain text: tables, references, files and categories go; prose, headings, code, formulas and numbers stay.

How it works. Four passes, each linear in the text. (1) What is not parsed (nowiki, pre, code, formulas) is put aside behind
markers; comments and references go. (2) One scan with a stack replaces templates and links from the inside out
(wiki_brackets.py). A template that stands for text becomes it (wiki_templates.py); any other leaves a hole that knows the
template's name. (3) Tables go by lines; tags, external links and quotes by patterns. (4) Lines: list marks go, headings of
empty and of link sections go, and the blanks and brackets around holes are tidied. What the author wrote is touched nowhere
else. A hole inside a line that has words cost text in mid-sentence: it is counted by the template's name.
"""

import html
import re
from collections import Counter
from dataclasses import dataclass, field, replace

from megagpt.corpus.extraction.wiki_brackets import replace_brackets
from megagpt.corpus.extraction.wiki_render import FRACTION
from megagpt.corpus.extraction.wiki_sites import DEFAULT_SITE, Site
from megagpt.corpus.extraction.wiki_templates import HOLE, HOLE_END, MARK, MARK_END

_OUR_MARKS = re.compile("[\x01-\x05]")
_FRACTION_AFTER_DIGIT = re.compile(f"(?<=[0-9]){FRACTION}")
_NOT_PARSED = (
    "nowiki|pre|math|chem|ce|syntaxhighlight|source|gallery|timeline|score|templatedata|graph|imagemap|hiero|mapframe|maplink"
    "|inputbox|categorytree|charinsert|references|includeonly|rt|rp|templatestyles"
)
_VERBATIM = re.compile(rf"<!--|<({_NOT_PARSED})\b([^<>]*+)>", re.I)
_REF = re.compile(r"<ref\b[^<>]*/>|<ref\b[^<>]*>|</ref\s*+>|\n\n", re.I)
_EXTERNAL = re.compile(
    r"\[(?:https?:|ftp:|irc:)?//[^\s\[\]]*+[ \t]*+([^\[\]\n]*+)\]|\[(?:mailto|news):[^\s\[\]]*+[ \t]*+([^\[\]\n]*+)\]"
)
_BREAK = re.compile(r"</?(?:br|p|div|hr|li|ul|ol|dl|dt|dd|tr|table|center|blockquote|poem|h[1-6])\b[^<>]*+>", re.I)
_TAG = re.compile(
    r"</?(?:b|i|u|s|em|strong|small|big|span|font|code|tt|kbd|samp|var|cite|q|abbr|dfn|del|ins|strike|td|th|caption|thead|tbody"
    rf"|tfoot|ruby|rb|rtc|bdi|bdo|data|time|mark|wbr|noinclude|onlyinclude|section|indicator|languages|translate|{_NOT_PARSED})"
    r"(?:[\s/][^<>]*+)?>",
    re.I,
)
_RAISED = re.compile(r"<(sup|sub)\b[^<>]*+>([^<>]*+)</\1\s*+>|</?su[bp]\b[^<>]*+>", re.I)
_QUOTES = re.compile(r"'{2,}+")
_MAGIC = re.compile(r"__([^\W_]\w{1,40}?)__")
_UNFINISHED_REF = re.compile(r"</?ref\b[^<>\n]*+>?", re.I)
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_WORD = re.compile(r"[^\W_]")
_SPACES = re.compile(r"[ \t]{2,}+|\t")
_HOLE = re.compile(f"{HOLE}([^{HOLE}{HOLE_END}]*+){HOLE_END}")
_HOLES = f"(?:[ \\t]*+{HOLE}[^{HOLE}{HOLE_END}]*+{HOLE_END})++"
_AROUND_HOLE = re.compile(f"(?<![ \\t]){_HOLES}[ \\t]*+([,;]?)")
_EMPTY_BRACKETS = re.compile(f"[(（](?:[\\s,;:/–—-]*+{HOLE}[^{HOLE}{HOLE_END}]*+{HOLE_END})++[\\s,;:/–—-]*+[)）]")
_BRACKET_START = re.compile(f"([(（])(?:[\\s,;:]*+{HOLE}[^{HOLE}{HOLE_END}]*+{HOLE_END})++[\\s,;:]*+")
_BRACKET_END = re.compile(f"(?<![\\s,;:{HOLE_END}])(?:[\\s,;:]*+{HOLE}[^{HOLE}{HOLE_END}]*+{HOLE_END})++[\\s,;:]*+(?=[)）])")
_MARKER = re.compile(f"{MARK}([0-9]++){MARK_END}")
_REDIRECT = re.compile(r"\A\s*+#\s*+\w++\s*+:?\s*+\[\[")


@dataclass(frozen=True, slots=True)
class Article:
    """Plain text of an article, and how often templates of each name left a hole in a sentence."""

    text: str
    dropped_templates: dict[str, int] = field(default_factory=dict)


def is_redirect(text: str) -> bool:
    """Whether a page's text says only that it redirects (the word differs by language)."""
    return _REDIRECT.match(text[:200]) is not None


def wikitext_to_text(text: str, drop_links: frozenset[str] = DEFAULT_SITE.drop_links) -> str:
    """Plain text of an article of no known wiki. Links into the namespaces `drop_links` (lower case) go whole."""
    return read_wikitext(text, replace(DEFAULT_SITE, drop_links=drop_links)).text


def read_wikitext(text: str, site: Site = DEFAULT_SITE, title: str = "") -> Article:
    """Plain text of an article as its reader sees it. `title` is what {{PAGENAME}} shows.

    A superscript number is written with ^ where it would change the number before it: 10<sup>6</sup> becomes 10^6.
    """
    text, kept = _put_aside(_OUR_MARKS.sub("", text.replace("\r\n", "\n")))
    text = _without_references(text)
    text = replace_brackets(text, site, title)
    text = _without_tables(text)
    text = _EXTERNAL.sub(lambda match: match[1] or match[2] or f"{HOLE}{HOLE_END}", text)
    text = _TAG.sub("", _BREAK.sub("\n", text))
    text = _MAGIC.sub(lambda match: match[0] if match[1] != match[1].upper() else "", _QUOTES.sub(_quotes, text))
    text = _UNFINISHED_REF.sub(" ", _RAISED.sub(_raised, text))
    text = _FRACTION_AFTER_DIGIT.sub(" ", text).replace(FRACTION, "")
    lines, dropped = _lines(text, site)
    plain = _MARKER.sub(lambda match: kept[int(match[1])], "\n".join(lines))
    return Article(plain.strip("\n"), dict(sorted(dropped.items())))


# ---- what is not parsed


def _put_aside(text: str) -> tuple[str, list[str]]:
    """(text with markers for what is not parsed, what they stand for). An element that is never closed loses only its tag."""
    pieces, kept, position, unclosed = list[str](), list[str](), 0, set[str]()
    while match := _VERBATIM.search(text, position):
        pieces.append(text[position : match.start()])
        position = match.end()
        if match[1] is None:
            end = text.find("-->", position)
            position = len(text) if end < 0 else end + 3
            continue
        name = match[1].lower()
        if match[2].endswith("/") or name in unclosed:
            pieces.append("" if match[2].endswith("/") else match[0])
            continue
        end = _CLOSING[name].search(text, position)
        if end is None and name != "nowiki":
            unclosed.add(name)
            pieces.append(match[0])
            continue
        inside = text[position : end.start() if end else len(text)]
        position = end.end() if end else len(text)
        if shown := _verbatim(name, inside):
            line = "\n" if name in _BLOCKS else ""
            pieces.append(f"{line}{MARK}{len(kept)}{MARK_END}{line}")
            kept.append(shown)
    return "".join([*pieces, text[position:]]), kept


_DOUBLE_BRACE = re.compile(r"(?<!\\)([{](?=[{])|[}](?=[}]))")
_SHOWN = frozenset(("nowiki", "pre", "math", "chem", "ce", "syntaxhighlight", "source"))
_BLOCKS = frozenset(("pre", "syntaxhighlight", "source"))
_CLOSING = {name: re.compile(rf"</{name}\s*+>", re.I) for name in _NOT_PARSED.split("|")}


def _verbatim(name: str, inside: str) -> str:
    """What an element that is not parsed shows: code as it is, a formula as TeX in one line, nothing for a picture."""
    if name not in _SHOWN:
        return ""
    if name in ("math", "chem", "ce"):
        # Braces that meet are written apart, as inside a template: to TeX it is the same, and }} in a text is always residue.
        return " ".join(_DOUBLE_BRACE.sub(r"\1 ", _unescape(inside)).split())
    if name == "pre":
        inside = _unescape(inside.replace("<nowiki>", "").replace("</nowiki>", ""))
    elif name == "nowiki":
        return _unescape(inside)
    return inside.strip("\n").rstrip()


def _without_references(text: str) -> str:
    """Drop <ref>...</ref>; one that is never closed ends at the next empty line. A reference leaves a hole without a name."""
    if "ref" not in text and "REF" not in text:
        return text
    pieces, position, opened = list[str](), 0, -1
    for match in _REF.finditer(text):
        token = match[0]
        if opened >= 0:
            if token == "\n\n" or token[1] == "/":
                pieces.append(f"{HOLE}{HOLE_END}")
                position, opened = match.start() if token == "\n\n" else match.end(), -1
        elif token != "\n\n":
            pieces.append(text[position : match.start()])
            position = match.end()
            if token[1] != "/" and not token.endswith("/>"):
                opened = position
            else:
                pieces.append(f"{HOLE}{HOLE_END}")
    return "".join(pieces) if opened >= 0 else "".join([*pieces, text[position:]])


# ---- tables and tags


def _without_tables(text: str) -> str:
    """Drop {| ... |} by lines; a table that is never closed ends at the next heading."""
    if "{|" not in text:
        return text
    kept, depth = [], 0
    for line in text.split("\n"):
        start = line.lstrip(" \t:*#")
        if start.startswith("{|"):
            depth += 1
        elif depth and start.startswith("|}"):
            depth -= 1
            if not depth and (rest := start[2:].strip("} \t")):
                kept.append(rest)
        elif depth and line.startswith("==") and line.rstrip().endswith("=="):
            depth = 0
            kept.append(line)
        elif not depth:
            kept.append(line)
    return "\n".join(kept)


def _quotes(match: re.Match[str]) -> str:
    """Marks of bold and italic go; of four quotes one is an apostrophe, and so is what exceeds five."""
    count = len(match[0])
    return "'" if count == 4 else "'" * (count - 5)


def _raised(match: re.Match[str]) -> str:
    """A superscript or subscript in plain text: ^ or _ where the characters would otherwise join a number before them."""
    if match[1] is None:
        return ""
    inside = match[2].strip()
    before = match.string[match.start() - 1 : match.start()] if match.start() else ""
    if not inside.strip("+-−–") or (not before.isalnum() and before not in ")]>}"):
        return inside
    raised = match[1].lower() == "sup"
    if not raised:
        return f"_{inside}" if before.isdigit() and inside[0].isdigit() else inside
    number = inside[0].isdigit() or (inside[0] in "+-−–±" and len(inside) > 1)
    if inside.lower() in _ORDINALS or not (number or before.isdigit() or (inside.isalpha() and len(inside) == 1)):
        return inside
    if inside[0].isdigit() and inside[-1] in "+-−–" and before.isalpha():
        return inside  # an ion: Ca2+
    return f"^{inside}" if inside.strip("+-−–").replace(".", "").isalnum() else f"^({inside})"


_ORDINALS = frozenset(
    (
        "st",
        "nd",
        "rd",
        "th",
        "d",
        "e",
        "er",
        "ère",
        "re",
        "ème",
        "me",
        "es",
        "ers",
        "nde",
        "o",
        "a",
        "os",
        "as",
        "ª",
        "º",
        "ter",
        "te",
    )
)


# ---- lines


def _lines(text: str, site: Site) -> tuple[list[str], Counter[str]]:
    """Lines that have words, below headings that are not empty and not of links; and the names of the holes in them."""
    blocks: list[tuple[int, str, Counter[str]]] = []
    skip_below = 0
    for raw in text.split("\n"):
        if (heading := _heading(raw)) is not None:
            level, title = heading
            if skip_below and level > skip_below:
                continue
            holes = Counter[str]()
            title = _tidy(title, holes).strip()
            skip_below = level if title.lower() in site.link_sections else 0
            while blocks and blocks[-1][0] >= level:
                blocks.pop()
            if not skip_below and title:
                blocks.append((level, title, holes))
        elif not skip_below and (line := _marked_line(raw)):
            holes = Counter[str]()
            line = _tidy(line, holes).rstrip()
            if _WORD.search(line):
                blocks.append((0, line, holes))
    while blocks and blocks[-1][0]:
        blocks.pop()
    return [line for _, line, _ in blocks], sum((holes for _, _, holes in blocks), Counter[str]())


def _heading(line: str) -> tuple[int, str] | None:
    """(level, title) of a line like "== title ==". One sign alone and without its end is the author's."""
    if not line.startswith("="):
        return None
    stripped = line.strip(" \t")
    title = stripped.strip("=")
    level = min(len(stripped) - len(stripped.lstrip("=")), 6)
    if level == 1 and not stripped.endswith("="):
        return None
    return level, title.strip()


def _marked_line(line: str) -> str:
    """A line without its list marks; nothing for a row of a table or a template that was never closed."""
    if line.startswith("  "):
        return line[1:].rstrip() if not line.lstrip().startswith(("|", "*", "#", ":")) else _marked_line(line.lstrip())
    line = line.strip().lstrip("*#:; ")
    if line.startswith("|") or (line.startswith("!") and ("!!" in line or "|" in line or "=" in line)):
        return ""
    return line


def _tidy(line: str, holes: Counter[str]) -> str:
    """A line with its entities decoded, runs of blanks as one, and holes closed; their names are added to `holes`."""
    indent = len(line) - len(line.lstrip(" "))
    line = _unescape(line).replace("\xa0", " ") if "&" in line or "\xa0" in line else line
    if "[" in line or "]]" in line or "{" in line or "}" in line:
        line = _without_stray_brackets(line)
    line = line[:indent] + _SPACES.sub(" ", line[indent:])
    if HOLE not in line:
        return line
    names = [name for name in _HOLE.findall(line) if name]
    line = _EMPTY_BRACKETS.sub(f"{HOLE}{HOLE_END}", line)
    line = _BRACKET_END.sub("", _BRACKET_START.sub(r"\1", line))
    line = _AROUND_HOLE.sub(_closed, line).strip()
    if _WORD.search(line):
        holes.update(names)
    return line


def _closed(match: re.Match[str]) -> str:
    """What is left of a hole: one blank if there was one, and no comma after another or where a line begins."""
    before = match.string[match.start() - 1 : match.start()] if match.start() else ""
    comma = "" if before in ",;(" else match[1]
    after = comma or match.string[match.end() : match.end() + 1]
    text = match[0][: len(match[0]) - len(match[1])]
    blank = text[0] in " \t" or text[-1] in " \t" or match[1] != comma
    return (" " if blank and before and before not in "(（[" and after and after not in " ,.;:!?)）]" else "") + comma


def _without_stray_brackets(line: str) -> str:
    """Drop {| |} }} ]] of markup that was never closed; }} and ]] stay where the line has two open ones before them."""
    pieces, position, depth = list[str](), 0, {"[": 0, "{": 0}
    for match in _BRACKETS.finditer(line):
        token = match[0]
        kind = "[" if token[0] in "[]" else "{"
        drop = token in ("{|", "|}") or (token in ("}}", "]]") and depth[kind] < 2)
        if not drop:
            depth[kind] += len(token) if token[0] in "[{" else -len(token)
        pieces += [line[position : match.start()], " " if drop else token]
        position = match.end()
    return "".join([*pieces, line[position:]])


_BRACKETS = re.compile(r"\{\||\|\}|\[\[?|\]\]?|\{\{?|\}\}?")


def _unescape(text: str) -> str:
    """Entities as MediaWiki reads them: only with their semicolon."""
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text) if "&" in text else text
