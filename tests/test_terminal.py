"""What others wrote, shown: control characters escaped, right-to-left text isolated, no signature of a URL."""

import logging
import time

import pytest

from megagpt.terminal import SafeFormatter, padded, safe_line, safe_text, without_secrets

HEBREW = "\u05d0\u05d1\u05d2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 中文, 🙂\n\tline", "plain, é, 中文, 🙂\n\tline"),
        ("\x1b[2Jgone\r\x07", "\\x1b[2Jgone\\x0d\\x07"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("gnp.\u202etxt.exe", "gnp.\\u202etxt.exe"),
        ("\u2069a\u2066", "\\u2069a\\u2066"),
        (f"a {HEBREW} 12", f"a \u2068{HEBREW}\u2069 12"),
        (f"{HEBREW} 3, {HEBREW}", f"\u2068{HEBREW} 3, {HEBREW}\u2069"),
        ("a\u200fb", "a\u2068\u200f\u2069b"),
        ("lone \ud83d", "lone \\ud83d"),
    ],
)
def test_what_is_shown(text: str, shown: str) -> None:
    assert safe_text(text) == shown
    shown.encode("utf-8")


def test_a_line_is_one_line_and_a_cell_keeps_its_width() -> None:
    assert safe_line("a\nb\tc") == "a\\nb\\tc"
    assert padded("ab", 4) == "ab  "
    assert padded(HEBREW, 5) == f"\u2068{HEBREW}\u2069  "
    assert padded("abcdef", 3) == "abcdef"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (
            "s3://b/a.warc.gz?X-Amz-Signature=abc&X-Amz-Credential=k: not found",
            "s3://b/a.warc.gz not found",
        ),
        ("'https://user:secret@host:81/a?sig=1' and https://h/b#t", "'https://host:81/a' and https://h/b"),
        ("no url? yes", "no url? yes"),
        ("https://h/a.gz: not found", "https://h/a.gz: not found"),
        ("HTTPS://h/x@2?token=1", "HTTPS://h/x@2"),
    ],
)
def test_a_signature_is_left_out(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "text", ["\u05d0 " * 200_000, "a://" * 100_000, "a://b@" * 100_000, "a" * 500_000, "https://" + "b" * 500_000]
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    started = time.process_time()
    safe_text(without_secrets(text))
    assert time.process_time() - started < 5


def test_a_log_line_is_safe() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s of %s", ("\x1b[1m", "https://h/a?sig=1"), None)
    assert SafeFormatter("%(message)s").format(record) == "\\x1b[1m of https://h/a"
