"""Rules for single lines of a page: which are no text, at the edges of the body and anywhere.

A byline, a date or a button's words are boilerplate only where they stand at an edge of the text, or between the posts of a
thread, or are mostly a link; "By then it was late." in the middle is a sentence.
"""

import functools
import re
from collections import Counter

import numpy as np

from megagpt.corpus.extraction.markup import Structure
from megagpt.corpus.extraction.page_lines import HEADINGS, PageLines, class_of_holder, number_set

SENTENCE_WIDTH = 8  # so much of a paragraph that is a sentence is not in links
_IS_PARAGRAPH = number_set(("p",))
REPEATED_WIDTH = 40  # short lines that a forum repeats around its posts
EDGE_LINE = 60  # a line this wide without links is text: what stands before the third and behind the last is an edge


def trim(page: PageLines, lines: list[int], structure: Structure, *, is_thread: bool) -> list[int]:
    """Drop lines that are only links, labels or advertisements; bylines, dates, addresses, notices at both ends of the text;
    in a thread what its program writes around posts; and what hangs at the end. Rows of data tables and code stay."""
    fixed = {i for i in lines if structure.rows[i] >= 0 or structure.code[i] >= 0 or structure.section_starts[i]}
    lines = [
        i for at, i in enumerate(lines) if i in fixed or not is_aside(page, i) or _is_title(page, lines[at : at + 2], fixed)
    ]
    if is_thread:
        lines = _without_post_boilerplate(page, lines, fixed)
    is_notice = [_is_notice(page, i) for i in lines]
    wide = [at for at, i in enumerate(lines) if _is_text(page, i) and not is_notice[at]]
    first, last = (wide[min(2, len(wide) - 1)], wide[-1]) if wide else (len(lines), 0)
    notices = {at: class_of_holder(page, i) for at, i in enumerate(lines) if is_notice[at] and i not in fixed}
    repeated = {name for name, count in Counter(notices.values()).items() if name and count >= 3}
    lines = [
        i
        for at, i in enumerate(lines)
        if at not in notices
        or not (at < first or at > last or notices[at] in repeated or page.link_list[i] > 0.3 * page.size_list[i])
    ]
    while lines and lines[-1] not in fixed and _hangs(page, lines[-1]):
        lines.pop()
    return lines


def _without_post_boilerplate(page: PageLines, lines: list[int], fixed: set[int]) -> list[int]:
    """The lines of a thread without what stands around its posts: who wrote when, and short lines that come again and again in
    elements of one class, numbers aside."""
    keys = {i: _repetition_key(page, i) for i in lines if i not in fixed and page.size_list[i] < REPEATED_WIDTH}
    often = {key for key, count in Counter(filter(None, keys.values())).items() if count >= 3}
    return [i for i in lines if i in fixed or not (keys.get(i) in often or _is_post_boilerplate(page, i))]


def _repetition_key(page: PageLines, i: int) -> tuple[str, str] | None:
    """What is alike in a line that comes again and again, None for one that ends a sentence."""
    text = page.texts[i].strip()
    holder = class_of_holder(page, i)
    return (holder, _DIGITS.sub("0", text)) if holder and text and text[-1] not in _SENTENCE_ENDS else None


def _is_post_boilerplate(page: PageLines, i: int) -> bool:
    """Whether a line of a thread says who wrote when, whom a quotation is of, or what to do to take part."""
    return page.size_list[i] < 2 * EDGE_LINE and _POST_BOILERPLATE.match(page.texts[i]) is not None


def _is_title(page: PageLines, pair: list[int], fixed: set[int]) -> bool:
    """Whether the first of two lines is a heading with a paragraph below it."""
    if len(pair) < 2 or page.tags[pair[0]] not in HEADINGS:
        return False
    return pair[1] in fixed or (page.tags[pair[1]] == "p" and _is_text(page, pair[1]))


def is_aside(page: PageLines, i: int) -> bool:
    """Whether a line is only links, only a control's label, or only says that an advertisement follows."""
    size = page.size_list[i]
    is_links = page.link_list[i] >= 0.9 * size and size <= 200
    return bool(is_links or page.label_list[i] >= 0.9 * size or _ADVERTISEMENT.match(page.texts[i]))


def _is_text(page: PageLines, i: int) -> bool:
    """Whether a line is wide, has few links and is no heading."""
    return page.size_list[i] - page.link_list[i] >= EDGE_LINE and page.tags[i] not in HEADINGS


def _is_notice(page: PageLines, i: int) -> bool:
    """Whether a line reads like a byline, a date, an address, or a button's words."""
    return bool(page.size_list[i] < 100 and page.tags[i] != "li" and _NOTICE.match(page.texts[i])) or is_boilerplate(page, i)


def _hangs(page: PageLines, i: int) -> bool:
    """Whether a line at the end is a heading, or a few words that end no sentence."""
    tag, text = page.tags[i], page.texts[i].rstrip()
    short = page.size_list[i] < 30 and tag != "li" and text[-1] not in _SENTENCE_ENDS
    return short or tag in HEADINGS


def are_sentences(page: PageLines) -> np.ndarray:
    """Which lines are paragraphs that end like a sentence and are not all links, though they hold some. bool [lines]."""
    found = _IS_PARAGRAPH[page.tag_numbers] & (page.links > 0) & (page.sizes - page.links >= SENTENCE_WIDTH)
    for i in np.flatnonzero(found).tolist():
        found[i] = page.texts[i][-1] in _SENTENCE_ENDS
    return found


def is_boilerplate(page: PageLines, i: int) -> bool:
    """Whether a line says that a browser is old or lacks JavaScript, that cookies are used, or whose the rights are."""
    if page.size_list[i] >= 300:
        return False
    return _says_boilerplate(page.texts[i])


@functools.lru_cache(maxsize=1 << 12)
def _says_boilerplate(text: str) -> bool:
    text = text.lower()
    return any(map(text.__contains__, _HINTS)) and _BOILERPLATE.search(text) is not None


_SENTENCE_ENDS = frozenset(".!?\"'”’»…)]｣。！？．｡」』】）〉》؟۔॥।။၊។៕་།፧።՞՜։;")
_ADVERTISEMENT = re.compile(
    r"\A\W*+(?:advert(?:isement|isements|s)?|anzeige|werbung|publicité|comments?|sponsored|广告|廣告)\W*$", re.IGNORECASE
)
_NOTICE = re.compile(
    r"\A(?:https?://\S+"
    r"|(?:[Bb]y|BY|[Vv]on|VON|[Pp]ar|PAR):? [A-ZÀ-ÞА-Я]\S*(?: \S+){0,3}"
    r"|(?:[Ff]irst )?(?:Updated|UPDATED|updated|Published|PUBLISHED|published|Posted|POSTED|posted)\b.{0,70}"
    r"|(?:Read|READ|Share|SHARE|Sign [Uu]p|SIGN UP|Subscribe|SUBSCRIBE|Follow [Uu]s|FOLLOW US|Click [Hh]ere|CLICK HERE|"
    r"Get the latest|Get access|Like this|Don['’]?t miss|DON['’]?T MISS|Related|RELATED)\b.{0,80}"
    r"|(?:\w{3,9}\.?,? )?(?:\d{1,2}\.? \w{3,9}\.?,? \d{4}|\w{3,9}\.? \d{1,2},? \d{4}|\d{1,2}[./]\d{1,2}[./]\d{2,4}).{0,30}"
    r"|\W+)(?<![.!?:])$"
)
_POST_BOILERPLATE = re.compile(
    r"\A(?:On \d{1,4}[/.-].{4,40}\bsaid:|Originally [Pp]osted by\b.{1,40}|Click to expand\W*|Reveal hidden contents"
    r"|Last edit(?:ed)?\b.{0,80}|(?:Posted|Joined|Posts|Location|Registered):? .{0,40}|(?:本帖最后由|最后编辑|最後編輯).{1,60}"
    r"|(?:.{1,30} )?(?:发表|發表|发布|發布|发布|回复|回覆)[于於] ?\d{4}.{0,80}"
    r"|(?:[Pp]lease |[Yy]ou (?:must|need to|have to) (?:be )?)?(?:[Ll]og(?:ged)?|[Ss]ign(?:ed)?)[ -]?[Ii]n\b.{0,60}"
    r"\b(?:reply|post|comment|answer|join|view|vote|participate)\b.{0,40}"
    r"|.{0,12}登[录錄入].{0,12}(?:回[复復覆帖]|[评評]论|評論|[发發]表|[发發]言|跟帖|查看|[发發]帖).{0,12})$"
)
_DIGITS = re.compile(r"\d+")
_HINTS = ("©", "(c)", "ight", "cookie", "browser", "javascript", "版权", "著作", "icp")
_BOILERPLATE = re.compile(
    r"^\W*(?:©|\(c\)|copyright\b)|\ball rights reserved\b|\bwe (?:and our partners )?use cookies\b|"
    r"\b(?:site|website) uses cookies\b|"
    r"\b(?:your|this|older?|outdated|unsupported|modern) (?:version of your )?browser\b"
    r".{0,60}\b(?:support|outdated|out of date|upgrade|update|old)|"
    r"\b(?:enable|turn on|activate|requires?|without) javascript\b|"
    r"\bjavascript (?:is|must be|seems to be|has been|enabled|to be|in your browser)\b|^\W*(?:版权所有|著作権)|ICP备\d",
    re.IGNORECASE,
)
