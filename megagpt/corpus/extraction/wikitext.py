"""Wikitext to plain text: templates, tables, references, files and categories go; prose, headings and numbers stay.

How it works. Brackets nest, so each kind is removed from the inside out: templates first (a few stand for text and become it:
{{convert}}, {{formatnum:}}, {{lang}} ...), then tables by lines, then links, where the label stays. What is left of the markup
is on single lines: headings, list marks, bold, entities. A heading whose section became empty goes too.
"""

import html
import re

FILE_AND_CATEGORY = frozenset(("file", "image", "category", "media"))

_DROPPED_SECTIONS = frozenset(
    ("references", "external links", "see also", "further reading", "notes", "footnotes", "notes and references", "citations")
)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
_NOWIKI = re.compile(r"<nowiki>(.*?)(?:</nowiki>|\Z)", re.S | re.I)
_REF = re.compile(r"<ref\b[^<>]*/>|<ref\b[^<>]*>.*?(?:</ref\s*>|(?=\n\n)|\Z)|</ref\s*>", re.S | re.I)
_ELEMENT_TAG = re.compile(
    r"<(/?)(gallery|math|chem|timeline|score|syntaxhighlight|source|imagemap|graph|mapframe|hiero|templatedata|references"
    r"|charinsert|inputbox|categorytree)\b[^<>]*>",
    re.I,
)
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_PARAMETER = re.compile(r"\{\{\{[^{}]*\}\}\}")
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL = re.compile(
    r"\[(?:https?:|ftp:|mailto:|irc:|news:)?//[^\s\[\]]*[ \t]*([^\[\]\n]*)\]|\[(?:mailto|news):[^\s\[\]]*[ \t]*([^\[\]\n]*)\]"
)
_BREAK = re.compile(r"<br\b[^<>]*>", re.I)
_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>]*)?/?>")
_HEADING = re.compile(r"^(={1,6})[ \t]*(.+?)[ \t]*=*[ \t]*$")
_QUOTES = re.compile(r"'{2,5}")
_MAGIC = re.compile(r"__[A-Z]{3,}__")
_EMPTY_BRACKETS = re.compile(r"[(（][\s,;:/–—-]*[)）]")
_BRACKET_START = re.compile(r"([(（])[\s,;:]+")
_WORD = re.compile(r"[^\W_]")
_SPACES = re.compile(r"[ \t]{2,}|\t")
_SPACE_BEFORE_POINT = re.compile(r" ([,.;:!?])(?=\s|\Z)")
_LEFTOVER = re.compile(r"\{\{+|\}\}+|\[\[+|\]\]+|\{\||\|\}|\|\|+|<!--|-->|</?ref\b[^<>\n]*>?", re.I)
_LANGUAGE_PREFIX = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*$|simple$")
_NOT_LANGUAGES = frozenset(("mr", "dr", "st", "vs", "re", "ex", "the", "and", "war", "law", "art"))
_REDIRECT = re.compile(r"\s*#\s*\w+\s*:?\s*\[\[", re.I)


def is_redirect(text: str) -> bool:
    """Whether a page's text says only that it redirects (the word differs by language)."""
    return _REDIRECT.match(text[:200]) is not None


def wikitext_to_text(text: str, drop_links: frozenset[str] = FILE_AND_CATEGORY) -> str:
    """Plain text of an article. Links into the namespaces `drop_links` (lower case; the wiki's own names too) go whole."""
    text = _COMMENT.sub("", text)
    text = _NOWIKI.sub(lambda match: match[1].translate(_AS_ENTITIES), text)
    text = _without_elements(_REF.sub("", text))
    text = _inside_out(_PARAMETER, "", text)
    text = _inside_out(_TEMPLATE, _template_text, text)
    text = _without_tables(text)
    text = _inside_out(_LINK, lambda match: _link_text(match[1], drop_links), text)
    text = _EXTERNAL.sub(lambda match: match[1] or match[2] or "", text)
    text = _TAG.sub("", _BREAK.sub("\n", text))
    text = _MAGIC.sub("", _QUOTES.sub("", text))
    text = _LEFTOVER.sub(" ", text)
    return _tidy(text)


_AS_ENTITIES = {ord(character): f"&#{ord(character)};" for character in "<>&[]{}|'=*#:;_"}


def _without_elements(text: str) -> str:
    """Drop elements that hold no prose, with their content; of one that is never closed only the tag."""
    pieces, position, opened = list[str](), 0, ""
    for match in _ELEMENT_TAG.finditer(text):
        closing, name = match[1], match[2].lower()
        if opened:
            if closing and name == opened:
                position, opened = match.end(), ""
            continue
        pieces.append(text[position : match.start()])
        position = match.end()
        opened = "" if closing or match[0].endswith("/>") else name
    return "".join([*pieces, text[position:]])


def _inside_out(pattern: re.Pattern[str], replacement: object, text: str) -> str:
    """Replace the innermost brackets until none is left; 40 levels are more than any page has."""
    for _ in range(40):
        text, count = pattern.subn(replacement, text)  # type: ignore[arg-type]
        if not count:
            break
    return text


# ---- templates that stand for text


def _template_text(match: re.Match[str]) -> str:
    """What a template without inner templates shows; nothing for most."""
    head, _, rest = match[1].partition("|")
    name = head.strip().lower().replace("_", " ")
    if name.startswith("formatnum:"):
        return head.partition(":")[2].strip()
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    if not name.startswith("lang-") and name not in _SHOWN:
        return ""
    arguments = rest.split("|") if "[[" not in rest else _PIPE_OUTSIDE_LINKS.split(rest[:20000])
    positional = [argument.strip() for argument in arguments if not _NAMED.match(argument)]
    if name in _CONVERT:
        return _converted(positional)
    if name in _FRACTION:
        return " ".join(positional[:-2]) + (" " if len(positional) > 2 else "") + "/".join(positional[-2:])
    if name in _CIRCA:
        return "c. " + (positional[0] if positional else "")
    if name in _AS_OF:
        return "As of " + "-".join(positional)
    if name in _FIRST_ARGUMENT:
        return positional[0] if positional else _named(arguments, ("1", "text", "quote"))
    return positional[-1] if positional else _named(arguments, ("text", "quote"))


_PIPE_OUTSIDE_LINKS = re.compile(r"\|(?![^\[\]]*\]\])")
_NAMED = re.compile(r"\s*[\w -]+=")
_CONVERT, _FRACTION = frozenset(("convert", "cvt")), frozenset(("frac", "fraction", "sfrac"))
_CIRCA, _AS_OF = frozenset(("circa", "c.", "ca", "ca.")), frozenset(("as of", "asof"))
_SYMBOLS = {
    "nbsp": " ", "space": " ", "ndash": "–", "mdash": "—", "spaced ndash": " – ", "spnd": " – ", "snd": " – ", "dash": "–",
    "spaced en dash": " – ", "em dash": "—", "en dash": "–", "'": "'", "times": "×", "pi": "π", "deg": "°", "degree": "°",
    "bullet": "•", "middot": "·", "·": " · ", "•": " • ", "euro": "€", "pound": "£", "=": "=", "hyphen": "-",
}  # fmt: skip
_FIRST_ARGUMENT = frozenset(
    ("nowrap", "nobr", "nobreak", "abbr", "abbrv", "tooltip", "quote", "blockquote", "cquote", "quotation", "small", "smaller")
    + ("big", "bigger", "em", "strong", "smallcaps", "sc", "num", "val", "mvar", "var", "math", "nihongo", "okina", "center")
    + ("nom", "gaps", "not a typo", "proper name", "strikethrough", "code", "mono", "kbd", "ill", "interlanguage link")
    + ("visible anchor", "formatnum")
)
_LAST_ARGUMENT = frozenset(
    ("lang", "transl", "transliteration", "script", "wikt-lang", "color", "font color", "rtl-lang", "angbr", "linktext")
)
_SHOWN = _CONVERT | _FRACTION | _CIRCA | _AS_OF | _FIRST_ARGUMENT | _LAST_ARGUMENT


def _named(arguments: list[str], names: tuple[str, ...]) -> str:
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name.strip().lower() in names:
            return value.strip()
    return ""


def _converted(arguments: list[str]) -> str:
    """{{convert|5|to|10|km|mi}} reads "5 to 10 km", {{convert|5|ft|11|in|m}} reads "5 ft 11 in"."""
    words = arguments[:2]
    rest = arguments[2:]
    while len(words) >= 2 and words[-1] in _BETWEEN_NUMBERS and rest:
        words, rest = [*words, *rest[:2]], rest[2:]
    if len(rest) >= 2 and re.fullmatch(r"[\d.,/+-]+", rest[0]) and not re.search(r"\d", rest[1]):
        words += rest[:2]
    return " ".join(_BETWEEN_NUMBERS.get(word, word) for word in words).replace(" – ", "–")


_BETWEEN_NUMBERS = {
    "-": "–", "–": "–", "to": "to", "to(-)": "to", "and": "and", "or": "or", "by": "by", "x": "×", "×": "×", "+/-": "±",
    "±": "±", "to about": "to about", "and(-)": "and",
}  # fmt: skip


# ---- tables and links


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
            if not depth and (rest := start[2:].strip()):
                kept.append(rest)
        elif depth and _HEADING.match(line) and line.startswith("==") and line.rstrip().endswith("=="):
            depth = 0
            kept.append(line)
        elif not depth:
            kept.append(line)
    return "\n".join(kept)


def _link_text(inside: str, drop_links: frozenset[str]) -> str:
    """The label of a [[link]]; nothing for files, categories and other languages."""
    target, pipe, label = inside.partition("|")
    prefix, colon, rest = target.partition(":")
    prefix = prefix.strip().lower()
    if colon and not target.lstrip().startswith(":"):
        if prefix in drop_links:
            return ""
        if not pipe and _LANGUAGE_PREFIX.match(prefix) and prefix not in _NOT_LANGUAGES and not rest.startswith(" "):
            return ""
    if pipe:
        return label.rpartition("|")[2] if label.strip() else re.sub(r"\s*\([^()]*\)$", "", rest if colon else target)
    return target.lstrip(": ").partition("#")[0] or target.lstrip("#")


# ---- lines


def _tidy(text: str) -> str:
    text = _SPACES.sub(" ", html.unescape(text).replace("\xa0", " "))
    text = _BRACKET_START.sub(r"\1", _EMPTY_BRACKETS.sub("", text))
    for before in (" )", ",)", ";)", " ）"):
        text = text.replace(before, before[-1])
    text = _SPACE_BEFORE_POINT.sub(r"\1", _SPACES.sub(" ", text))
    blocks: list[tuple[int, str]] = []
    skip_below = 0
    for line in text.split("\n"):
        heading = _HEADING.match(line) if line.startswith("=") else None
        if heading is not None:
            level, title = len(heading[1]), heading[2].strip("= ")
            if skip_below and level > skip_below:
                continue
            skip_below = level if title.lower() in _DROPPED_SECTIONS else 0
            while blocks and blocks[-1][0] >= level:
                blocks.pop()
            if not skip_below and title:
                blocks.append((level, title))
            continue
        line = line.strip().lstrip("*#:; ")
        if line and not skip_below and not line.startswith(("|", "!")) and _WORD.search(line):
            blocks.append((0, line))
    while blocks and blocks[-1][0]:
        blocks.pop()
    return "\n".join(line for _, line in blocks)
