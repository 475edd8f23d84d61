"""No regular expression of megagpt takes more than linear time, on texts that are derived from the pattern to be hostile."""

import re
import time

import pytest
from patterns import MAX_RATIO, ONLY_MATCHED, growth, patterns

from megagpt.corpus.text.words import split_words


@pytest.mark.slow
def test_every_pattern_is_linear() -> None:
    """Measured one after the other: tests/soak/patterns.py prints which family a failing one grows on."""
    found = patterns()
    assert len(found) > 100
    assert found.keys() >= ONLY_MATCHED
    ratios = {name: growth(pattern, search=name not in ONLY_MATCHED)[0] for name, pattern in found.items()}
    assert {name: ratio for name, ratio in ratios.items() if ratio >= MAX_RATIO} == {}


@pytest.mark.parametrize(
    "pattern",
    [
        r"\s+$",
        r"x[^>]*>",
        r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+|\w+|.",  # the word splitter once: @a+a+a
        rb"<ref\b.*?</ref>",
        r"<a [^>]*href",
    ],
)
def test_a_pattern_that_is_not_linear_is_found(pattern: str | bytes) -> None:
    ratio, _, how = growth(re.compile(pattern))
    assert ratio >= MAX_RATIO, how


@pytest.mark.parametrize("pattern", [r"(?<!\s)\s++x", r"(?<!\w)\w++@", r"\n{3,}", rb"<[^<>]*+>", r"\A\s*$"])
def test_a_linear_pattern_passes(pattern: str | bytes) -> None:
    ratio, _, how = growth(re.compile(pattern))
    assert ratio < MAX_RATIO, how


@pytest.mark.parametrize("unit", ["@a+", "a+a@", "a.b@c.", "@", "www.,", "a-@"])
def test_splitting_hostile_tokens_takes_linear_time(unit: str) -> None:
    started = time.process_time()
    assert "".join(split_words("@" + unit * 20_000)) == "@" + unit * 20_000
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mail a.b+c@x-y.org, now", ["mail", "a.b+c@x-y.org", ",", "now"]),
        ("(me@x.org) <you@y.co.uk>", ["(", "me@x.org", ")", "<", "you@y.co.uk", ">"]),
        ("a@b c@ @d e@f.g@h.i", ["a", "@", "b", "c", "@", "@", "d", "e@f.g", "@", "h", ".", "i"]),
    ],
)
def test_addresses_stay_whole(text: str, words: list[str]) -> None:
    assert split_words(text) == words
