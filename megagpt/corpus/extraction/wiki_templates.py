"""Templates that stand for text in an article: which they are, by language of the wiki, and what each shows.

A template is a name with arguments that are rendered already. `render_template` gives its text, or a hole: a mark with the
template's name, empty where nobody misses a text (notes, maintenance tags). Sources are the templates' own documentation pages
on the wikis named; a name on another wiki that means something else is in that language's table and goes first.
"""

import functools
import re
from collections.abc import Sequence

from megagpt.corpus.extraction import wiki_template_languages as languages
from megagpt.corpus.extraction import wiki_template_tables as tables
from megagpt.corpus.extraction.wiki_countries import COUNTRIES
from megagpt.corpus.extraction.wiki_render import Arguments, Renderer, evaluate

HOLE, HOLE_END = "\x01", "\x02"
"""Around the name of a template that showed nothing."""
MARK, MARK_END = "\x03", "\x04"
"""Around the number of a text that was put aside."""
MAX_NAME_CHARACTERS = 60

_HOLES = re.compile(f"{HOLE}[^{HOLE}{HOLE_END}]*+{HOLE_END}")
_BLANKS = re.compile(r"[\s_]++")
_FUNCTION = re.compile(r"\A#?[^\W\d_][\w ]*+:")
_ROMAN_NUMBER = re.compile(r"\A(?=[ivxlcdm])m{0,3}(?:cm|cd|d?c{0,3})(?:xc|xl|l?x{0,3})(?:ix|iv|v?i{0,3})$")
_CENTURY = re.compile(r"\A([ivx]{1,5})(e|er) (siècle|siècles)(.{0,20})$")


def render_template(head: str, arguments: Sequence[tuple[str | None, str]], language: str, title: str) -> str:
    """The text of a template. `head` is its name, or "function:argument"; `arguments` are (name or None, text) in order."""
    name = _BLANKS.sub(" ", _HOLES.sub("", head)).strip()
    key = name[:200].lower().removeprefix("subst:").removeprefix("template:").strip()
    if "{" in name or "}" in name:  # no name of a page: the author's own braces
        return "{{" + "|".join((head, *(value if key is None else f"{key}={value}" for key, value in arguments))) + "}}"
    if _FUNCTION.match(key) and key not in tables.COMMON:
        shown = _function(name, arguments, title)
    elif key in tables.SILENT or key.startswith(tables.SILENT_BEGINNINGS):
        return f"{HOLE}{HOLE_END}"
    elif key in ("pagename", "pagename:", "fullpagename", "basepagename"):
        shown = title
    else:
        renderer = _renderers(language).get(key) or _by_pattern(name, key, language)
        shown = renderer(_arguments(arguments)) if renderer else None
    if shown is None:
        shown_name = "".join(character for character in key if character.isprintable())[:MAX_NAME_CHARACTERS]
        return f"{HOLE}{shown_name}{HOLE_END}"
    return shown + "".join(hole for hole in _named_holes(head, arguments) if hole not in shown)


def _named_holes(head: str, arguments: Sequence[tuple[str | None, str]]) -> list[str]:
    """The holes in what a template was given: a number that is missing in it is missing in what it shows."""
    texts = [text for text in (head, *(value for _, value in arguments)) if HOLE in text]
    return [hole for text in texts for hole in _HOLES.findall(text) if len(hole) > 2]


def _arguments(arguments: Sequence[tuple[str | None, str]]) -> Arguments:
    positional: dict[int, str] = {}
    named: dict[str, str] = {}
    count = 0
    for name, value in arguments:
        if name is None:
            count += 1
            positional[count] = value.strip()
        elif name.isascii() and name.isdigit() and len(name) < 3:
            positional[int(name)] = value.strip()
        else:
            named[name.lower()] = value.strip()
    size = max(positional, default=0)
    return Arguments(tuple(positional.get(number, "") for number in range(1, size + 1)), named)


@functools.cache
def _renderers(language: str) -> dict[str, Renderer]:
    return {**tables.COMMON, **languages.BY_LANGUAGE.get(language, {})}


def _by_pattern(name: str, key: str, language: str) -> Renderer | None:
    """Templates of which there is one for each language, number or currency."""
    for beginning, renderer in tables.BEGINNINGS.items():
        if key.startswith(beginning) and len(key) <= len(beginning) + 12:
            return functools.partial(renderer, key.removeprefix(beginning), language)
    if language == "fr" and (century := _CENTURY.match(key)):
        text = f"{century[1].upper()}{century[2]} {century[3]}{century[4]}"
        return lambda arguments: text
    if language in ("fr", "") and len(key) <= 9 and name.isupper() and _ROMAN_NUMBER.match(key):
        return lambda arguments: name
    if language == "de" and len(key) in (3, 4) and name.endswith("S") and key[:-1] in languages.GERMAN_LANGUAGES:
        label = languages.GERMAN_LANGUAGES[key[:-1]]
        return lambda arguments: f"{label} {arguments.at(1)}"
    if language in ("en", "simple") and len(name) == 3 and name.isupper() and name in COUNTRIES:
        return lambda arguments: COUNTRIES[name]
    return None


def _function(name: str, arguments: Sequence[tuple[str | None, str]], title: str) -> str | None:
    """Parser functions of MediaWiki: those that show their arguments; "" for the ones that set something."""
    function, _, first = name.partition(":")
    function, first = function.lower().strip(), first.strip()
    rest = [(key, value.strip()) for key, value in arguments]
    texts = [value if key is None else f"{key}={value}" for key, value in rest]
    match function:
        case "formatnum" | "nowrap" | "padleft" | "plural" | "#formatdate" | "#dateformat" | "fullurl" | "urlencode":
            return None if function in ("fullurl", "urlencode", "plural") else first
        case "lc":
            return first.lower()
        case "uc":
            return first.upper()
        case "lcfirst":
            return first[:1].lower() + first[1:]
        case "ucfirst":
            return first[:1].upper() + first[1:]
        case "#expr":
            return evaluate(first)
        case "#if":
            return _choose(bool(first), texts)
        case "#ifeq":
            return _choose(bool(texts) and first == texts[0], texts[1:])
        case "#ifexpr":
            value = evaluate(first)
            return None if value is None else _choose(value != "0", texts)
        case "#switch":
            return _switch(first, rest)
        case "#tag":
            return (texts[0] if texts else "") if first.lower() in ("poem", "span", "div") else f"{HOLE}{HOLE_END}"
        case "pagename" | "fullpagename":
            return title
    return None if function.startswith("#") else f"{HOLE}{HOLE_END}"


def _choose(condition: bool, texts: Sequence[str]) -> str:
    number = 0 if condition else 1
    return texts[number] if number < len(texts) else ""


def _switch(value: str, cases: Sequence[tuple[str | None, str]]) -> str:
    """{{#switch: value | a | b = text | #default = text}}: cases without a text fall through to the next one."""
    found, default = False, ""
    for key, text in cases:
        if key is None:
            found = found or text == value
            default = text
        elif found or key == value:
            return text
        elif key == "#default":
            default = text
    return default
