"""The address of a page: listed domains, URLs, words and substrings."""

import functools
import re
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.filters.spec import Filter, FilterSpec, read_list
from megagpt.corpus.text.words import Splitter
from megagpt.documents import Document, Rejected


class UrlConfig(Config):
    """Refuse pages by their address."""

    built_in: bool = True
    """Use the small built-in lists of adult and spam words; everything else comes from your files."""
    domains: tuple[Path, ...] = ()
    """Files of domains, one a line; what lies below a listed domain is refused too."""
    urls: tuple[Path, ...] = ()
    """Files of full URLs."""
    words: tuple[Path, ...] = ()
    """Files of words of which one is enough. A word is a run of letters and digits in the URL; in a host name also a part,
    if the rest is made of listed words and of common ones (free, online, club, tube, …)."""
    soft_words: tuple[Path, ...] = ()
    """Files of words of which `min_soft_words` different ones are needed."""
    substrings: tuple[Path, ...] = ()
    """Files of strings that are refused anywhere in a URL, whose marks are left out first (RefinedWeb's strict words)."""
    min_soft_words: Annotated[int, Field(ge=1)] | None = 2
    """RefinedWeb and FineWeb: 2."""


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
DISTINCTIVE_WORDS = frozenset({"porn", "porntube", "xvideos", "xhamster", "hentai", "camgirl", "livesex", "blowjob", "bdsm"})
"""Of ADULT_WORDS those that are in no ordinary word: they are found anywhere in a host name."""
ORDINARY = re.compile("pornic(?:het)?")
"""Names that contain such a word: two towns."""
COMPANIONS = frozenset(
    {
        "a", "all", "and", "asian", "best", "big", "bonus", "box", "cam", "cams", "chat", "city", "club", "date", "dating",
        "dream", "fans", "fast", "film", "films", "forum", "free", "fun", "gay", "girl", "girls", "gold", "hd", "home", "hot",
        "hub", "king", "land", "life", "live", "love", "map", "mobile", "movie", "movies", "my", "net", "new", "now", "of",
        "on", "online", "only", "party", "pic", "pics", "place", "play", "pro", "real", "red", "room", "shop", "show", "site",
        "spot", "star", "stars", "stream", "teen", "the", "time", "top", "tube", "tv", "vid", "video", "videos", "vip", "web",
        "world", "you", "your", "zone",
    }
)  # fmt: skip
"""Words that stand beside listed ones in host names: a part of a host name is taken apart if it is made of these alone."""
_URL_WORD = re.compile(r"[^a-zA-Z0-9]+")


@dataclass(frozen=True, slots=True)
class UrlLists:
    """What is refused in a URL. Words are lower-case."""

    domains: AbstractSet[str] = frozenset()
    urls: AbstractSet[str] = frozenset()
    words: AbstractSet[str] = frozenset()
    soft_words: AbstractSet[str] = frozenset()
    substrings: re.Pattern[str] | None = None


def url(document: Document, config: UrlConfig, *, lists: UrlLists) -> Document | Rejected:
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
    words = {*_URL_WORD.split(address.lower()), *_words_in_host(host, lists)}
    if not words.isdisjoint(lists.words):
        return Rejected(document, "url:word")
    if config.min_soft_words is not None and len(words & lists.soft_words) >= config.min_soft_words:
        return Rejected(document, "url:soft_words")
    if lists.substrings is not None and lists.substrings.search(_URL_WORD.sub("", address).lower()):
        return Rejected(document, "url:substring")
    return document


@functools.lru_cache(maxsize=1 << 16)
def _words_in_host(host: str, lists: UrlLists) -> frozenset[str]:
    """Listed words inside the parts of a host name, but for its last one: of youpornhub.example porn."""
    found: set[str] = set()
    listed = lists.words | lists.soft_words
    for part in {part for label in host.split(".")[:-1] for part in _URL_WORD.split(label.lower())}:
        found |= _made_of(part.strip("0123456789"), listed)
        if lists.words >= DISTINCTIVE_WORDS:
            plain = ORDINARY.sub(" ", part)
            found.update(word for word in DISTINCTIVE_WORDS if word in plain)
    return frozenset(found)


def _made_of(part: str, listed: AbstractSet[str]) -> set[str]:
    """The listed words that a string is made of, together with companions and digits; none if any other character remains."""
    longest = max((*map(len, listed), *map(len, COMPANIONS)))
    parsed: list[set[str] | None] = [set(), *[None] * len(part)]
    for end in range(1, len(part) + 1):
        for start in range(max(0, end - longest), end):
            before, word = parsed[start], part[start:end]
            if before is None or not (word in listed or word in COMPANIONS or word.isdigit()):
                continue
            words = before | ({word} & listed)
            if (best := parsed[end]) is None or len(words) > len(best):
                parsed[end] = words
    return parsed[-1] or set()


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


def _lower(paths: Sequence[Path]) -> frozenset[str]:
    return frozenset(entry.lower() for path in paths for entry in read_list(path))


def _bind(config: UrlConfig, _: Splitter) -> Filter:
    lists = load_url_lists(config.domains, config.urls, config.words, config.soft_words, config.substrings, config.built_in)
    return functools.partial(url, config=config, lists=lists)


URL = FilterSpec(UrlConfig, _bind)
