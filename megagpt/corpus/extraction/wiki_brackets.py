"""The brackets of wikitext, which nest: templates, links, parameters and script variants, replaced in one scan with a stack."""

import re
from dataclasses import dataclass, field

from megagpt.corpus.extraction.wiki_sites import Site
from megagpt.corpus.extraction.wiki_templates import HOLE, HOLE_END, render_template

MAX_NESTING = 60
"""Brackets that are nested deeper are not opened: each level copies the text inside it once."""

_TOKEN = re.compile(r"\[\[(?:([^\[\]{}|]*+)(\|[^\[\]{}|]*+)?\]\])?|\{{2,}|-\{|\}++(?:-(?!\{))?|\]\]|\|")
_LANGUAGE_PREFIX = re.compile(r"\A(?:[a-z]{2,3}(?:-[a-z]++)*+|simple)$")
_NOT_LANGUAGES = frozenset(("mr", "dr", "st", "vs", "re", "ex", "the", "and", "war", "law", "art"))
_DISAMBIGUATION = re.compile(r"(?<!\s)\s*+\([^()]*+\)$")


def replace_brackets(text: str, site: Site, title: str) -> str:
    """The text with what its templates and links show; holes where they show nothing. Brackets that never close go."""
    return _Scan(site, title).run(text)


@dataclass(slots=True)
class _Frame:
    """A bracket that is open: what stands between its pipes so far, and the names of arguments that have one."""

    kind: str
    parts: list[list[str]] = field(default_factory=lambda: [[]])
    names: list[str | None] = field(default_factory=lambda: [None])


class _Scan:
    """The stack of open brackets over one text. A bracket is rendered when it closes; its text goes into the one around it."""

    def __init__(self, site: Site, title: str) -> None:
        self.site, self.title = site, title
        self.out: list[str] = []
        self.stack: list[_Frame] = []
        self.open_templates = 0

    def run(self, text: str) -> str:
        position = 0
        for match in _TOKEN.finditer(text):
            self._add(text[position : match.start()], raw=True)
            position = match.end()
            token = match[0]
            if token == "|":
                self._pipe()
            elif token == "[[":
                self._open("[[")
            elif match[1] is not None:
                self._add(_link_text([match[1]] if match[2] is None else [match[1], match[2][1:]], self.site))
            elif token == "-{":
                self._open("-{") if self.site.has_variants and text[position : position + 1] != "{" else self._add("-{")
            elif token == "]]":
                self._close_link()
            elif token[0] == "{":
                self._open_braces(len(token))
            else:
                self._close_braces(token)
        self._add(text[position:], raw=True)
        while self.stack:
            self._flatten()
        return "".join(self.out)

    def _add(self, text: str, *, raw: bool = False) -> None:
        if not text:
            return
        if not self.stack:
            self.out.append(text)
            return
        frame = self.stack[-1]
        part = frame.parts[-1]
        if raw and frame.kind == "{{" and len(frame.parts) > 1 and frame.names[-1] is None:
            name, equals, value = text.partition("=")
            if equals:
                frame.names[-1] = ("".join(part) + name).strip()
                part[:] = [value]
                return
        part.append(text)

    def _pipe(self) -> None:
        if self.stack:
            self.stack[-1].parts.append([])
            self.stack[-1].names.append(None)
        else:
            self.out.append("|")

    def _open(self, kind: str) -> None:
        if len(self.stack) < MAX_NESTING:
            self.stack.append(_Frame(kind))
            self.open_templates += kind[0] == "{"

    def _open_braces(self, count: int) -> None:
        while count > 3 or count == 2:
            self._open("{{")
            count -= 2
        if count == 3:
            self._open("{{{")

    def _close_link(self) -> None:
        if self.stack and self.stack[-1].kind == "[[":
            frame = self.stack.pop()
            self._add(_link_text(["".join(part) for part in frame.parts], self.site))
        else:
            self._add("]]")

    def _close_braces(self, token: str) -> None:
        count, dash = len(token.rstrip("-")), token[-1] == "-"
        while count:
            if dash and count == 1 and self.stack and self.stack[-1].kind == "-{":
                self._add(_variant("|".join(map("".join, self.stack.pop().parts)), self.site))
                return
            if count < 2 or not self.open_templates:
                break
            while self.stack[-1].kind[0] != "{":
                self._flatten()
            frame = self.stack.pop()
            self.open_templates -= 1
            if frame.kind == "{{{" and count >= 3:
                count -= 3
                self._add("|".join(map("".join, frame.parts[1:])))
            else:
                count -= 2
                if frame.kind == "{{{":
                    self._add("{")
                self._add(self._template(frame))
        self._add("}" * count + "-" * dash)

    def _template(self, frame: _Frame) -> str:
        arguments = [(name, "".join(part)) for name, part in zip(frame.names[1:], frame.parts[1:], strict=True)]
        return render_template("".join(frame.parts[0]), arguments, self.site.language, self.title)

    def _flatten(self) -> None:
        """A bracket that is never closed: it goes, and what stands in it stays."""
        frame = self.stack.pop()
        self.open_templates -= frame.kind[0] == "{"
        named = zip(frame.names, frame.parts, strict=True)
        self._add("|".join(("" if name is None else f"{name}=") + "".join(part) for name, part in named))


def _link_text(parts: list[str], site: Site) -> str:
    """The label of a [[link]]; a hole for files, categories and other languages."""
    target, label = parts[0], parts[-1]
    prefix, colon, rest = target.partition(":")
    prefix = prefix.strip().lower().replace("_", " ")
    if colon and not target.lstrip().startswith(":"):
        if prefix in site.drop_links:
            return f"{HOLE}{HOLE_END}"
        if len(parts) == 1 and _LANGUAGE_PREFIX.match(prefix) and prefix not in _NOT_LANGUAGES and not rest.startswith(" "):
            return f"{HOLE}{HOLE_END}"
    if len(parts) > 1:
        return label if label.strip() else _DISAMBIGUATION.sub("", rest if colon else target)
    return target.lstrip(": ").partition("#")[0] or target.lstrip("#")


def _variant(inside: str, site: Site) -> str:
    """The text of -{...}- in the site's first variant: rules are "flags|code:text;code:text", and hidden ones show nothing."""
    flags, pipe, rules = inside.rpartition("|")
    names = {flag.strip().upper() for flag in flags.split(";")} if pipe else set[str]()
    if names & {"H", "T", "-", "D"}:
        return ""
    texts: dict[str, str] = {}
    for rule in rules.split(";"):
        code, colon, value = rule.rpartition("=>")[2].partition(":")
        if colon and code.strip().lower() in site.variants:
            texts[code.strip().lower()] = value.strip()
    if "R" in names or not texts:
        return rules
    return next(texts[code] for code in site.variants if code in texts)
