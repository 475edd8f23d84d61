"""Other people's text on a terminal, in a log or in a report: it moves no cursor, reorders nothing and gives no secret away.

Documents, file names and the fields of other people's checkpoints reach messages. Control characters are escaped, so that no
text can clear the screen or forge a line. Right-to-left text is isolated (UAX #9, 2.1), so that numbers beside it stay in
their order, and characters that override the direction are escaped (the "Trojan Source" attack, arXiv 2111.00169). What follows
a URL's `?` may be a signature that opens a bucket for hours: it is left out.
"""

import logging
import re

FIRST_STRONG_ISOLATE, POP_ISOLATE = "\u2068", "\u2069"

_ESCAPED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_RIGHT_TO_LEFT = "\u0590-\u08ff\u200f\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff"
_RUN = re.compile(f"[{_RIGHT_TO_LEFT}]+(?:[ \u200c-\u200e.,:;!?'\"()/0-9-]{{1,4}}[{_RIGHT_TO_LEFT}]+)*")
_SECRETS = re.compile(r"\b([a-z][a-z0-9+.-]{0,15}+://)(?:[^\s/?#@'\"]{0,500}@)?([^\s?#'\"]{0,2000}+)(?:[?#][^\s'\"]*)?", re.I)


def safe_text(text: str) -> str:
    """The text as it may be shown; newlines and tabs stay. Applied twice it is the same as once, but for isolated text."""
    text = _ESCAPED.sub(_escaped, text)
    return _RUN.sub(lambda run: f"{FIRST_STRONG_ISOLATE}{run[0]}{POP_ISOLATE}", text)


def safe_line(text: str) -> str:
    """`safe_text` in one line: newlines and tabs are escaped too."""
    return safe_text(text.replace("\n", "\\n").replace("\t", "\\t"))


def padded(text: str, width: int) -> str:
    """`safe_line` in a table's cell: filled up with spaces to `width` characters, of which isolates are none."""
    line = safe_line(text)
    return line + " " * (width - len(line) + line.count(FIRST_STRONG_ISOLATE) + line.count(POP_ISOLATE))


def without_secrets(text: str) -> str:
    """The text with every URL cut before its query and fragment, and without a user's name and password in it."""
    return _SECRETS.sub(r"\1\2", text)


class SafeFormatter(logging.Formatter):
    """A log record's line as `safe_text`."""

    def format(self, record: logging.LogRecord) -> str:
        """Format, then escape."""
        return safe_text(without_secrets(super().format(record)))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
