"""Lines of code in a text: in fences, or indented below a line that is indented less."""

import re

_FENCE = re.compile(r"[ \t]{0,3}(```+|~~~+)")
_INDENTATION = re.compile("[ \t\u00a0]*")
_OPENS_BLOCK = re.compile(r"\{\s*$|^\s*(?:async|case|class|def|elif|else|except|finally|for|if|match|try|while|with)\b.*:\s*$")
_MAY_HOLD_CODE = re.compile("^(?: {2}|\u00a0{2}|\t| \u00a0|\u00a0 |```|~~~)", re.MULTILINE)


def may_hold_code(text: str) -> bool:
    """Whether a line is indented or begins a fence: a quick test before `code_lines`."""
    return _MAY_HOLD_CODE.search(text) is not None


def code_lines(lines: list[str]) -> list[int | None]:
    """For each line the indentation of its block in characters, None for a line that is no code.

    Code is what stands in a closed Markdown fence (the fence included), and every line that is indented by two characters or a
    tab more than the line its block began with; blank lines inside go with it. Uniform indentation, and the indented first
    lines of paragraphs between blank lines, are no code.
    """
    found: list[int | None] = [None] * len(lines)
    base, inside = -1, False  # base: indentation of the line that the block began with, -1 between blocks
    # inside: the block continues after a blank line
    position = 0
    while position < len(lines):
        line = lines[position]
        if (fence := _FENCE.match(line)) and (end := _end_of_fence(lines, position, fence[1])) is not None:
            found[position : end + 1] = [0] * (end + 1 - position)
            position, base, inside = end + 1, -1, False
            continue
        position += 1
        if not line.strip():
            base = base if inside else -1
            continue
        indentation = _INDENTATION.match(line)
        width = indentation.end() if indentation else 0
        deeper = width - base
        if base >= 0 and (deeper >= 2 or (deeper == 1 and line[width - 1] == "\t")):
            found[position - 1], inside = base, True
        else:
            base, inside = width, _OPENS_BLOCK.search(line) is not None
    return found


def _end_of_fence(lines: list[str], start: int, fence: str) -> int | None:
    for position in range(start + 1, len(lines)):
        stripped = lines[position].strip()
        if stripped.startswith(fence) and not stripped.strip(fence[0]):
            return position
    return None
