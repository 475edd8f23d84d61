"""Each message that the pages explain is one that the code prints."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
VALUE = "\0"
"""Stands in a string of the code for a value that is filled in."""


@cache
def strings() -> tuple[str, ...]:
    """All strings of the library, the tools and the scripts of SLURM; docstrings and comments left out."""
    found = []
    for folder in ("megagpt", "tools"):
        for path in sorted((PROJECT / folder).rglob("*.py")):
            found += strings_of(ast.parse(path.read_text(encoding="utf-8")))
    for path in sorted((PROJECT / "slurm").glob("*.sh")):
        code = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#"))
        found += [re.sub(r"\$\{[^}]*\}|\$\w+", VALUE, text) for text in re.findall(r'"([^"]*)"', code)]
    return tuple(found)


def strings_of(tree: ast.AST) -> Iterator[str]:
    """Every string below a node, with VALUE for `{...}` and `%s`, and `name=` for each argument that is passed by name."""
    if isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Constant):  # a docstring
        return
    if isinstance(tree, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in tree.values)
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield re.sub(r"%[sdr]", VALUE, tree.value)
    if isinstance(tree, ast.keyword):
        yield f"{tree.arg}="
    for child in ast.iter_child_nodes(tree):
        yield from strings_of(child)


def messages(page: str) -> list[str]:
    """What stands in backquotes in the first column of the page's tables, and at the beginning of its paragraphs."""
    text = (PROJECT / "docs" / page).read_text(encoding="utf-8")
    cells = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)] + re.findall(
        r"^`([^`]+)`:", text, re.MULTILINE
    )


OF_OTHERS = {"sbatch: error: ...", "(Resources)", "(PartitionConfig)"}
"""What SLURM prints."""

COMPOSED = ("check_node: ", "left out of training: ", "slow rank ", "watchdog: rank ")
"""Messages of several strings, by how they begin. The tests of these parts see them whole."""

WILD = re.compile(r"\.\.\.|…|SIG\w+|\S*\d\S*")
"""What differs from case to case: `...`, signals, and words with a figure."""


def pieces(message: str) -> list[str]:
    """The fixed words of a message."""
    return [piece.strip(" ,:;") for piece in WILD.split(message) if re.search(r"\w", piece)]


def is_printed(message: str) -> bool:
    """Whether one string of the code has the fixed words in this order, or a row has these values (`kind ...  name value`)."""
    if "  " in message:
        return all(is_part_of_a_row(piece) for each in re.split(r"  +", message) for piece in pieces(each))
    pattern = re.compile(".*?".join(map(re.escape, pieces(message))), re.DOTALL)
    return any(pattern.search(string) for string in strings())


def is_part_of_a_row(piece: str) -> bool:
    """Whether it is the kind of a row of metrics.jsonl, or the name of a value with the value's first words."""
    first, _, rest = piece.partition(" ")
    return first in strings() if not rest else f"{first}=" in strings() and any(rest in string for string in strings())


@pytest.mark.parametrize("page", ["troubleshooting.md", "slurm.md"])
def test_every_message_that_the_page_explains_is_in_the_code(page: str) -> None:
    found = [message for message in messages(page) if message not in OF_OTHERS and not message.startswith(COMPOSED)]
    found = [message for message in found if pieces(message)]
    assert len(found) > 15
    assert [message for message in found if not is_printed(message)] == []


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("choose another output directory, or overwrite=true to replace it", True),
        ("choose another output directory, or overwrite=false to replace it", False),
        ("bad nodes: n7; a successor without them takes over", True),
        ("bad nodes: n7; a successor with them takes over", False),
        ("skip 812/20000  reason non-finite gradients", True),
        ("skip 812/20000  reason infinite gradients", False),
        ("skip 812/20000  cause non-finite gradients", False),
    ],
)
def test_messages_are_compared_by_their_fixed_words(message: str, printed: bool) -> None:
    assert is_printed(message) == printed
