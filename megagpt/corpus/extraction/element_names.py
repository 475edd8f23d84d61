"""What ids, classes and other attributes say of an element: boilerplate (navigation, sharing, comments and the like) or text.

Names are compared as words, never as parts of words: `topNav_left` is the words top, nav, left; `metallurgy` is not meta. Three
degrees of boilerplate: a consent dialogue by its vendor is never text; a strong name (sidebar, related-posts) is boilerplate
unless most of the page is in it; a weak name (author, message, slide) only says so of an element with little prose. The
vocabulary began with trafilatura's (Barbaresi 2021, Apache-2.0, xpaths.py).
"""

import functools
import re
from typing import NamedTuple

WEAK, STRONG, CONSENT = 1, 2, 3


class Verdict(NamedTuple):
    """How sure an element is boilerplate (0: its name says nothing), and the word that says so."""

    level: int
    word: str


NOTHING = Verdict(0, "")
COMMENTS = "comments"
"""The word of all verdicts that mean readers' comments."""


def _words_of(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONSENT_STARTS = (
    "onetrust", "ot-sdk", "ot-pc", "otpc", "cybot", "cookiebot", "didomi", "usercentrics", "truste", "trustarc", "qc-cmp",
    "sp-message", "fc-consent", "cmplz", "cky", "iubenda", "osano", "evidon", "quantcast", "borlabs", "klaro", "termly",
    "cc-window", "gdpr",
)  # fmt: skip
"""How ids and classes of the dialogues of consent vendors begin."""
_CONSENT_HEADS = frozenset(start[:2] for start in _CONSENT_STARTS)
_CONSENT_PAIRS = {
    **dict.fromkeys(("cookie", "cookies", "consent", "privacy", "gdpr", "ccpa"), _words_of(
        "law consent banner notice bar popup modal message dialog overlay wall preferences disclaimer manager alert accept"
    )),
    "eu": _words_of("cookie cookies"),
}  # fmt: skip
_COMMENT_WORDS = _words_of(
    "comment comments usercomments commentlist comol disqus dsq respond reply replies akismet livefyre intensedebate "
    "nocomments commentary commentsection commentform commentarea commentbody"
) - {"commentary"}
_STRONG_SUFFIXES = ("footer", "sidebar", "navbar", "navbox", "menu", "menus", "breadcrumb", "breadcrumbs", "toolbar", "nav")
_STRONG_WORDS = _words_of(
    "crumbs navigation navi pagination pager share shares sharing sharer sharebar sharedaddy sharethis shareaholic "
    "sharebutton sharebuttons addthis addtoany a2a social socials sociable newsletter newsletters syndication cookie "
    "cookies consent banner banners ad ads adv advert adverts advertisement advertisements advertising adsense dfp dfpad "
    "sponsor sponsored sponsors promo promos outbrain taboola criteo yarpp recommend recommended recommendation "
    "recommendations recommends trending byline timestamp tags taglist tagcloud teaser teasers widget widgets invisible "
    "noprint notloaded modal popup overlay lightbox caption captions figcaption copyright copyrights colophon authorbox "
    "authorbio"
)
_STRONG_PAIRS = {
    "side": _words_of("bar"),
    "bread": _words_of("crumb crumbs"),
    "paid": _words_of("content"),
    "related": _words_of(
        "post posts article articles story stories news content contents link links item items video videos question "
        "questions topic topics product products reading list box media entries searches page pages coverage tags wrapper "
        "section container widget block area type"
    ),
    "may": _words_of("like also"),
    "might": _words_of("like also"),
    "more": _words_of("on from stories news posts articles"),
    "read": _words_of("more also next"),
    "also": _words_of("read"),
    "most": _words_of("popular read viewed recent"),
    "popular": _words_of("post posts article articles news"),
    **dict.fromkeys(("latest", "recent", "top", "other", "next"), _words_of(
        "post posts article articles story stories news entries"
    )),
    "suggest": _words_of("links"),
    "tag": _words_of("list cloud links"),
    "author": _words_of(
        "bio box info card desc description profile about detail details meta name block wrapper container image avatar"
    ),
    "about": _words_of("author authors"),
    "the": _words_of("author"),
    "bio": _words_of("box card"),
    "user": _words_of("info profile"),
    "is": _words_of("hidden"),
    "visually": _words_of("hidden"),
    "sr": _words_of("only"),
    "screen": _words_of("reader"),
    "no": _words_of("print"),
    "hide": _words_of("print"),
    "print": _words_of("hide"),
}  # fmt: skip
_STRONG_JOINED = frozenset(first + second for first, seconds in _STRONG_PAIRS.items() for second in seconds)
_WHOLE = _words_of("hidden hide")
"""Words that mean what they say only as a whole class or id, or at its beginning (`hide-mobile`, not `overflow-hidden`)."""
_WEAK_WORDS = _words_of(
    "bar author authors authorname related viral premium message messages slide slides slider slideshow carousel viewport "
    "option options expand expandable obfuscated blurred meta metas metadata rating ratings attachment attachments icon "
    "icons button buttons embed embedded permission permissions next shared subscribe subscription signup "
    "login search tooltip disclaimer license licence jp"
)
_WEAK_SUFFIXES = ("bar", "stories")
_THREAD = _words_of(
    "thread threads topic forum forums bbs bbp conversation discussion discussions postlist poststream question questions "
    "answer answers"
)
_SUFFIXES = _STRONG_SUFFIXES + _WEAK_SUFFIXES
NAME_WORDS = frozenset(
    _COMMENT_WORDS | _STRONG_WORDS | _STRONG_JOINED | _WEAK_WORDS | _WHOLE | _CONSENT_PAIRS.keys() | _STRONG_PAIRS.keys()
)
"""The words that may make a name say something; so do the last three letters of a word and the first of a class, or its whole
first word if that is shorter."""
NAME_ENDS = frozenset(suffix[-3:] for suffix in _SUFFIXES)
NAME_STARTS = frozenset(start.split("-")[0][:3] for start in _CONSENT_STARTS)
_MODIFIERS = _words_of("has with no without not js enable disable show use")
_NO_WIDGETS = ("wp-block", "elementor-widget", "elementor-element", "elementor-section", "elementor-column")
_HIDDEN = re.compile(
    r""" (?:style="[^"]*(?:display: ?none|visibility: ?hidden)|aria-hidden="true"|hidden="(?!until-found))""", re.IGNORECASE
)
_ATTRIBUTE = re.compile(r""" (role|itemprop)="([^"]*)\"""")
_WORD = re.compile(r"[A-Z]+[a-z0-9]*|[a-z0-9]+")


@functools.lru_cache(maxsize=1 << 16)
def judge_name(value: str) -> Verdict:
    """What a class attribute or an id says."""
    parts = value[:500].split()
    return _judge_part(parts[0]) if len(parts) == 1 else max(map(_judge_part, parts), default=NOTHING)


@functools.lru_cache(maxsize=1 << 16)
def _judge_part(part: str) -> Verdict:
    """What one class, or an id, says."""
    words = _words_in(part)
    if not words:
        return NOTHING
    first = words[0]
    if first[:2] in _CONSENT_HEADS and "-".join(words).startswith(_CONSENT_STARTS):
        return Verdict(CONSENT, "consent")
    said = [_said_by(word) for word in words]
    if not any(said):
        return NOTHING
    if (first in _MODIFIERS and words != ["no", "print"]) or "-".join(words).startswith(_NO_WIDGETS):
        return NOTHING
    if first in _WHOLE:
        return Verdict(STRONG, "hidden")
    verdict = NOTHING
    for i, says in enumerate(said):
        if not says:
            continue
        word, following = words[i], words[i + 1] if i + 1 < len(words) else ""
        if following in says.consent_with:
            return Verdict(CONSENT, "consent")
        if says.alone.word == COMMENTS:
            return says.alone
        if following in says.strong_with:
            verdict = max(verdict, Verdict(STRONG, f"{word}-{following}"))
        elif says.alone.level:
            verdict = max(verdict, says.alone)
    return verdict


class _Said(NamedTuple):
    """What a word says: alone, and the words behind it with which it means consent, or is strong."""

    alone: Verdict
    consent_with: frozenset[str]
    strong_with: frozenset[str]


@functools.lru_cache(maxsize=1 << 16)
def _said_by(word: str) -> _Said | None:
    """None: the word says nothing, and a name of such words says nothing."""
    if not (word in NAME_WORDS or word.endswith(_SUFFIXES)):
        return None
    alone = NOTHING
    if word in _COMMENT_WORDS:
        alone = Verdict(STRONG, COMMENTS)
    elif word in _STRONG_WORDS or word in _STRONG_JOINED or word.endswith(_STRONG_SUFFIXES):
        alone = Verdict(STRONG, word)
    elif word in _WEAK_WORDS or word.endswith(_WEAK_SUFFIXES):
        alone = Verdict(WEAK, word)
    return _Said(alone, _CONSENT_PAIRS.get(word, frozenset()), _STRONG_PAIRS.get(word, frozenset()))


@functools.lru_cache(maxsize=1 << 12)
def names_thread(value: str) -> bool:
    """Whether classes and ids say that an element holds the posts of a thread."""
    return any(not _THREAD.isdisjoint(_words_in(part)) for part in value[:500].split())


def _words_in(part: str) -> list[str]:
    """The words of a class in small letters: `topNav_left` is top, nav, left."""
    words = _WORD.findall(part)
    return words if part.islower() else [word.lower() for word in words]


def judge_others(attributes: str) -> Verdict:
    """What the other attributes say: hidden, or a role of navigation."""
    if _HIDDEN.search(attributes) or "nav" in dict(_ATTRIBUTE.findall(attributes)).get("role", ""):
        return Verdict(STRONG, "attribute")
    return NOTHING
