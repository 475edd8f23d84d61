"""Cleaning functions: each on a text it changes and on one it must leave alone."""

import pytest

from megagpt.corpus.filters.clean import (
    CleanConfig,
    clean_text,
    drop_boilerplate_lines,
    normalize_unicode,
    normalize_whitespace,
    remove_control_characters,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x00b\x1fc\ufeff", "abc"),
        ("soft\u00adhyphen zero\u200bwidth", "softhyphen zerowidth"),
        ("one\r\ntwo\rthree\x85four\u2028five", "one\ntwo\nthree\nfour\nfive"),
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬"),
        ("tab\tand\nnewline", "tab\tand\nnewline"),
    ],
)
def test_control_characters_go_and_joiners_stay(text: str, expected: str) -> None:
    assert remove_control_characters(text) == expected


def test_white_space_is_tidied() -> None:
    assert normalize_whitespace("\n\n  a \t b\u00a0c  \n\n\n\n\nd \n") == "a b c\n\nd"
    assert normalize_whitespace("a b\n\nc\nd") == "a b\n\nc\nd"


def test_unicode_forms() -> None:
    assert normalize_unicode("e\u0301 ﬁ", "NFC") == "é ﬁ"
    assert normalize_unicode("e\u0301 ﬁ", "NFKC") == "é fi"
    assert normalize_unicode("e\u0301 ﬁ", "none") == "e\u0301 ﬁ"


@pytest.mark.parametrize(
    "line", ["Read more »", "SKIP TO CONTENT", "Share this on Facebook", "© 2019 Acme Inc. All rights reserved."]
)
def test_boilerplate_lines_are_dropped(line: str) -> None:
    assert drop_boilerplate_lines(f"Real text.\n{line}\nMore text.", language="en") == "Real text.\nMore text."


def test_lines_that_only_contain_boilerplate_words_stay() -> None:
    text = "Please share this with your friends, she said.\nRead more books and you will write better."
    assert drop_boilerplate_lines(text, language="en") == text


def test_a_language_without_patterns_keeps_every_line() -> None:
    assert drop_boilerplate_lines("Read more", language="de") == "Read more"


def test_clean_text_is_idempotent() -> None:
    settings = CleanConfig(drop_boilerplate=True)
    once = clean_text("Cafe\u0301\r\n\r\n\r\n\r\nRead more\n  x\x07y  ", settings, language="en")
    assert once == "Café\n\nxy"
    assert clean_text(once, settings, language="en") == once
