"""Cleaning: normalises texts; drops only documents of which nothing is left."""

import re
import unicodedata
from typing import Literal, TypeAlias

from megagpt.config import Config
from megagpt.corpus.filters.spec import FilterSpec, thresholds_only, with_text
from megagpt.corpus.text.code import code_lines, may_hold_code
from megagpt.corpus.text.languages import language_of
from megagpt.documents import Document, Rejected

UnicodeForm: TypeAlias = Literal["NFC", "NFKC", "none"]

# C0 and C1 controls except tab and newline, zero-width space, word joiner, BOM, soft hyphen, interlinear marks, U+FFFE/F. ZWJ
# and ZWNJ stay: emoji, Persian and Indic spelling need them. Carriage returns, NEL and form feeds become newlines before.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u2060\ufeff\ufff9-\ufffb\ufffe\uffff]+")
_LINE_BREAK = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_SPACES = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r"\n{3,}")


class CleanConfig(Config):
    """Rewrite texts: Unicode form, control characters, white space."""

    unicode_form: UnicodeForm = "NFC"
    """NFC changes no meaning; NFKC also folds ligatures, full-width forms and superscripts; none leaves all as it is."""
    drop_boilerplate: bool = False
    """Drop boilerplate lines ("Read more", "Share on Facebook"), in languages that have patterns."""


BOILERPLATE_LINES: dict[str, tuple[str, ...]] = {
    "en": (
        r"skip to (?:main )?(?:content|navigation)",
        r"(?:click|tap) here(?: to .{1,40})?",
        r"read (?:more|the full (?:story|article))",
        r"(?:please )?(?:log|sign) ?in(?: (?:or|to) .{1,40})?",
        r"(?:share|tweet|pin|email|print)(?: this(?: (?:post|page|article|story))?)?",
        r"share (?:this )?on (?:facebook|twitter|linkedin|pinterest|whatsapp|x)",
        r"follow us(?: on .{1,40})?",
        r"subscribe(?: to our newsletter)?|sign up for our newsletter",
        r"(?:leave a (?:comment|reply)|post a comment|no comments(?: yet)?)",
        r"(?:advertisement|sponsored(?: content)?|story continues below)",
        r"(?:previous|next) (?:post|article|page)",
        r"back to top",
        r"(?:copyright |©|\(c\)) ?.{0,60}all rights reserved",
        r"(?:we use|this (?:site|website) uses) cookies.{0,80}",
        r"(?:your )?javascript (?:is|must be|seems to be) .{1,60}",
    )
}
"""Whole lines, without case and outer punctuation, that are boilerplate and no part of the text; by language."""


def clean(document: Document, config: CleanConfig) -> Document | Rejected:
    """Rewrite the text with clean_text; refuse a document of which nothing is left."""
    text = clean_text(document.text, config, language=language_of(document))
    return with_text(document, text) if text.strip() else Rejected(document, "clean:empty")


def clean_text(text: str, config: CleanConfig, *, language: str | None) -> str:
    """Normalise Unicode, remove control characters, tidy white space and, if asked, drop boilerplate lines of `language`."""
    text = remove_control_characters(normalize_unicode(text, config.unicode_form))
    if config.drop_boilerplate:
        text = drop_boilerplate_lines(text, language=language)
    return normalize_whitespace(text)


def normalize_unicode(text: str, form: UnicodeForm) -> str:
    """Unicode normalisation. NFC changes no meaning; NFKC also folds ligatures, full-width forms and superscripts."""
    return text if form == "none" or text.isascii() else unicodedata.normalize(form, text)


def remove_control_characters(text: str) -> str:
    """Drop control and invisible characters; every kind of line break becomes a newline. Joiners that scripts need stay."""
    return _CONTROL.sub("", _LINE_BREAK.sub("\n", text))


def normalize_whitespace(text: str) -> str:
    """Runs of blanks become one space, lines lose outer blanks, more than one empty line becomes one.

    Lines of code keep their blanks, and their indentation below the line that their block begins with.
    """
    if may_hold_code(text):
        lines = text.split("\n")
        lines = [_tidy(line, base) for line, base in zip(lines, code_lines(lines), strict=True)]
    else:
        lines = [line.strip(" ") for line in _SPACES.sub(" ", text).split("\n")]
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


def _tidy(line: str, base: int | None) -> str:
    """A line without needless blanks; one of code from the indentation of its block on."""
    if base is None:
        return _SPACES.sub(" ", line).strip(" ")
    return line[base:].replace("\u00a0", " ").rstrip()


def drop_boilerplate_lines(text: str, *, language: str | None) -> str:
    """Drop the lines that match BOILERPLATE_LINES[language]; a language without patterns keeps all its lines."""
    pattern = _BOILERPLATE.get(language or "")
    if pattern is None:
        return text
    return "\n".join(line for line in text.split("\n") if not pattern.fullmatch(line))


_BOILERPLATE = {
    language: re.compile(rf"\A\W*(?:{'|'.join(patterns)})\W*", re.IGNORECASE)
    for language, patterns in BOILERPLATE_LINES.items()
}


CLEAN = FilterSpec(CleanConfig, thresholds_only(clean))
