"""Mark the lines of a dropped text that its rule is about."""

import re
from collections import Counter
from collections.abc import Callable, Iterable

from megagpt.corpus.text.punctuation import TERMINAL_PUNCTUATION
from megagpt.corpus.text.words import split_words

Parts = list[tuple[str, bool]]
"""The parts of a text: (part, whether it is marked)."""

_LINES: dict[str, Callable[[str], bool]] = {
    "gopher_quality:too_many_bullet_lines": lambda line: line.lstrip().startswith(("•", "-")),
    "gopher_quality:too_many_ellipsis_lines": lambda line: line.rstrip().endswith(("...", "…")),
    "gopher_quality:too_many_hashes": lambda line: "#" in line,
    "gopher_quality:too_many_ellipses": lambda line: "..." in line or "…" in line,
    "gopher_quality:too_few_alphabetic_words": lambda line: not any(map(str.isalpha, line)),
    "fineweb:few_punctuated_lines": lambda line: line[-1] not in TERMINAL_PUNCTUATION,
    "fineweb:short_lines": lambda line: len(line) <= 30,
    "fineweb:list_like": lambda line: len(line) <= 30,
    "c4:lorem_ipsum": lambda line: "lorem ipsum" in line.lower(),
    "c4:curly_bracket": lambda line: "{" in line,
    "c4:too_few_sentences": lambda line: not line.rstrip().endswith((".", "?", "!", '"', "'")),
}
_REPEATED = re.compile(r"(?:gopher_repetition:duplicate_(?:line|paragraph)(?:s|_chars)|fineweb:duplicate_line_chars)")
_N_GRAMS = re.compile(r"gopher_repetition:(top|duplicate)_(\d+)_grams?")


def mark(text: str, reason: str) -> Parts:
    """Mark the parts of a text that the reason is about: whole lines, or words of repeated n-grams. A rule about the whole
    text (its length, its language) marks nothing."""
    if match := _N_GRAMS.fullmatch(reason):
        return _repeated_words(text, int(match[2]), only_top=match[1] == "top")
    lines = text.split("\n")
    if _REPEATED.fullmatch(reason):
        seen: set[str] = set()
        marked = []
        for line in lines:
            marked.append(line.strip() != "" and line in seen)
            seen.add(line)
    elif (is_marked := _LINES.get(reason)) is not None:
        marked = [line.strip() != "" and is_marked(line) for line in lines]
    else:
        return [(text, False)]
    return joined(
        (line + "\n" * (i < len(lines) - 1), is_marked) for i, (line, is_marked) in enumerate(zip(lines, marked, strict=True))
    )


def joined(pieces: Iterable[tuple[str, bool]]) -> Parts:
    """Join neighbours that are both marked, or both not marked."""
    result: Parts = []
    for text, is_marked in pieces:
        if result and result[-1][1] == is_marked:
            result[-1] = (result[-1][0] + text, is_marked)
        elif text:
            result.append((text, is_marked))
    return result


def cut(parts: Parts, characters: int) -> Parts:
    """A window of at most `characters` that begins shortly before the first mark; an ellipsis shows where text is cut."""
    before = 0
    for text, is_marked in parts:
        if is_marked:
            break
        before += len(text)
    else:
        before = 0
    start, total = max(0, before - characters // 4), sum(len(text) for text, _ in parts)
    start = 0 if total <= characters else min(start, total - characters)
    result, position = [("… ", False)] if start else [], 0
    for text, is_marked in parts:
        piece = text[max(0, start - position) : max(0, start + characters - position)]
        result.append((piece, is_marked))
        position += len(text)
    return joined([*result, *([(" …", False)] if start + characters < total else [])])


def _repeated_words(text: str, n: int, *, only_top: bool) -> Parts:
    words, places, position = split_words(text), [], 0
    for word in words:
        found = text.find(word, position)
        if found < 0:  # the splitter changes words, so nothing can be marked
            return [(text, False)]
        position = found + len(word)
        places.append((found, position))
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    top = counts.most_common(1)[0][0] if counts and only_top else None
    marked, seen = [False] * len(words), set[tuple[str, ...]]()
    for i, gram in enumerate(grams):
        if (gram == top) if only_top else (gram in seen):
            marked[i : i + n] = [True] * n
        seen.add(gram)
    pieces, end = [], 0
    for i, ((start, stop), is_marked) in enumerate(zip(places, marked, strict=True)):
        pieces += [(text[end:start], is_marked and i > 0 and marked[i - 1]), (text[start:stop], is_marked)]
        end = stop
    return joined([*pieces, (text[end:], False)])
