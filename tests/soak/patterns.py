"""How the time of every regular expression of megagpt grows with its input: python tests/soak/patterns.py

For each pattern, hostile texts are derived from its own parse tree: what may stand before a repetition, then what the
repetition takes, many times, then something that fits nowhere; and the beginning of the pattern many times. A pattern whose
CPU time at 8 times the input is 20 times or more is not linear (a quadratic one gives 64). Writes
bench/results/patterns.json.
"""

import argparse
import ast
import importlib
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from re import _constants as constants  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT)]

from megagpt.measurement import write_results  # noqa: E402

SMALL, FACTOR, MAX_RATIO = 1_500, 8, 20.0
MEASURABLE_SECONDS = 0.01
"""Below this time at the larger size a growth is noise, and harms nobody: a quadratic pattern takes 0.2 s there."""
FAILING = "\x00"
COMMON = (" ", "+", "\n", "a", "A", "0", ".", "-", "_", "=", "<", "(", "[", "{", "|", '"', "/", "\t", "。", "é")
ONLY_MATCHED = frozenset(("megagpt/corpus/readers/http.py:_CHUNK_SIZE",))
"""Used with match() at a position, where \\A would mean the beginning of all: never searched for."""
CALLS = frozenset(("compile", "sub", "subn", "search", "match", "fullmatch", "split", "findall", "finditer"))


ABOUT = (
    "CPU time of every regular expression of the library on hostile texts derived from its parse tree: the family "
    f"that takes longest at {FACTOR * SMALL:,} characters, and how much longer it takes than at {SMALL:,}. A linear pattern "
    f"has a ratio of about {FACTOR}, a quadratic one {FACTOR**2}; {MAX_RATIO:g} is refused by a test. 0: less than "
    f"{1000 * MEASURABLE_SECONDS:g} ms, too fast to tell."
)


def patterns() -> dict[str, re.Pattern[Any]]:
    """Every pattern of the library and tools/, by "file:name" or "file:line": constants, literals given to functions of re."""
    found: dict[str, re.Pattern[Any]] = {}
    for path in sorted([*(PROJECT / "megagpt").rglob("*.py"), *(PROJECT / "tools").glob("*.py")]):
        name = str(path.relative_to(PROJECT))
        for line, text, flags in _literals(ast.parse(path.read_text(encoding="utf-8"))):
            found[f"{name}:{line}"] = re.compile(text, flags)
        if "re." in path.read_text(encoding="utf-8") and name.startswith("megagpt"):
            module = importlib.import_module(name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
            for attribute, value in vars(module).items():
                for number, pattern in enumerate(_inside(value)):
                    found[f"{name}:{attribute}" + (f"[{number}]" if number else "")] = pattern
    return found | _made_by_functions()


def _made_by_functions() -> dict[str, re.Pattern[Any]]:
    """Patterns that exist only once a function has made them."""
    from megagpt.corpus.text import words

    return {f"megagpt/corpus/text/words.py:_word({at})": words._word(with_at=at) for at in (False, True)}


def _inside(value: Any, depth: int = 0) -> Iterator[re.Pattern[Any]]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, dict | list | tuple) and depth < 3:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _inside(item, depth + 1)


def _literals(tree: ast.AST) -> Iterator[tuple[int, Any, int]]:
    """(line, pattern, flags) of calls re.x("..."); the fields of an f-string are taken for a 3, which fits {n} and words.

    What is only matched at the beginning of a text is anchored there. Constants of modules are not among them.
    """
    constant = {id(node) for item in getattr(tree, "body", []) if isinstance(item, ast.Assign) for node in ast.walk(item)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS and node.args):
            continue
        if ast.unparse(node.func.value) != "re" or id(node) in constant:
            continue
        first, value = node.args[0], 0
        flags = [*node.args[1:], *(keyword.value for keyword in node.keywords if keyword.arg == "flags")]
        for flag in (name for argument in flags for name in ast.walk(argument)):
            if isinstance(flag, ast.Attribute) and ast.unparse(flag.value) == "re" and flag.attr.isupper():
                value |= int(getattr(re, flag.attr))
        if isinstance(first, ast.JoinedStr):
            text: Any = "".join(str(part.value) if isinstance(part, ast.Constant) else "3" for part in first.values)
        elif isinstance(first, ast.Constant) and isinstance(first.value, str | bytes):
            text = first.value
        else:
            continue
        if node.func.attr in ("match", "fullmatch"):
            text = b"\\A(?:" + text + b")" if isinstance(text, bytes) else f"\\A(?:{text})"
        yield node.lineno, text, value


# ---- hostile texts


def families(pattern: re.Pattern[Any], size: int) -> dict[str, Any]:
    """Hostile texts of about `size` characters, by how they are made."""
    tree = parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE if isinstance(pattern.pattern, bytes) else pattern.flags)
    units: dict[str, tuple[str, str]] = {f"{unit!r} *": ("", unit) for unit in COMMON}
    for before, repeated in _repetitions(tree, ""):
        for unit in repeated:
            units[f"{before!r} + {unit!r} *"] = (before, unit)
            units[f"({before + unit!r}) *"] = ("", before + unit)
            if before:
                units[f"{unit!r} * + {before!r}"] = ("", unit)
    start = _sample(tree)
    for cut in {len(start), len(start) - 1, (len(start) + 1) // 2}:
        if start[:cut]:
            units[f"{start[:cut]!r} *"] = ("", start[:cut])
    texts: dict[str, Any] = {}
    for how, (before, unit) in units.items():
        text = before + unit * max(1, size // len(unit))
        for end in ("", FAILING):
            texts[how + (" + \\0" if end else "")] = text + end
    if isinstance(pattern.pattern, bytes):
        return {how: text.encode("latin-1", "replace") for how, text in texts.items()}
    return texts


def _repetitions(tree: Iterable[Any], before: str) -> Iterator[tuple[str, list[str]]]:
    """(a text that leads there, texts that it takes) of every repetition in a parse tree."""
    for operation, argument in tree:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            low, high, body = argument
            if high == constants.MAXREPEAT or high > 50:
                yield before, _samples(body)
            yield from _repetitions(body, before)
            before += _sample(body) * max(low, 0)
            continue
        for child in _children(name, argument):
            yield from _repetitions(child, before)
        before += _sample([(operation, argument)])


def _children(name: str, argument: Any) -> list[Any]:
    if name == "SUBPATTERN":
        return [argument[3]]
    if name == "BRANCH":
        return list(argument[1])
    if name in ("ASSERT", "ASSERT_NOT"):
        return [argument[1]]
    return [argument] if name == "ATOMIC_GROUP" else []


def _samples(tree: Iterable[Any]) -> list[str]:
    """A few texts that a part of a pattern takes: its first choice, and each common character that it fits."""
    items = list(tree)
    found = [_sample(items)]
    if len(items) == 1 and str(items[0][0]) in ("IN", "ANY", "NOT_LITERAL", "LITERAL", "CATEGORY"):
        found += [character for character in COMMON if _fits(items[0], character)]
    elif len(items) == 1 and str(items[0][0]) == "BRANCH":
        found += [_sample(branch) for branch in items[0][1][1]]
    found = [text for text in dict.fromkeys(found) if text][:8]
    return found + [one + other for one in found[:6] for other in found[:6] if one != other]


def _sample(tree: Iterable[Any]) -> str:
    """A short text that a part of a pattern takes."""
    text = ""
    for operation, argument in tree:
        match str(operation):
            case "LITERAL":
                text += chr(argument)
            case "IN" | "ANY" | "NOT_LITERAL" | "CATEGORY":
                text += next((c for c in (*COMMON, *map(chr, range(33, 127))) if _fits((operation, argument), c)), "")
                if not text and str(operation) == "IN":
                    text += next((chr(value) for kind, value in argument if str(kind) == "LITERAL"), "")
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                text += _sample(argument[2]) * max(argument[0], 1)
            case "SUBPATTERN":
                text += _sample(argument[3])
            case "BRANCH":
                text += _sample(argument[1][0])
            case "ATOMIC_GROUP":
                text += _sample(argument)
    return text


def _fits(item: Any, character: str) -> bool:
    operation, argument = item
    code = ord(character)
    match str(operation):
        case "LITERAL":
            return argument == code
        case "NOT_LITERAL":
            return argument != code
        case "ANY":
            return character != "\n"
        case "CATEGORY":
            return _in_category(str(argument), character)
        case "RANGE":
            return argument[0] <= code <= argument[1]
        case "IN":
            inverted = bool(argument) and str(argument[0][0]) == "NEGATE"
            return any(_fits(part, character) for part in argument if str(part[0]) != "NEGATE") != inverted
    return False


def _in_category(category: str, character: str) -> bool:
    kind = {"DIGIT": character.isdigit(), "SPACE": character.isspace(), "WORD": character.isalnum() or character == "_"}
    return kind[category.rpartition("_")[2]] != ("_NOT_" in category)


# ---- measurement


def growth(pattern: re.Pattern[Any], *, search: bool = True) -> tuple[float, float, str]:
    """(ratio, CPU seconds of the larger text, family) of the family that grows fastest; ratio 0: all are too fast to tell."""
    worst = (0.0, 0.0, "")
    small = families(pattern, SMALL)
    for how, text in families(pattern, FACTOR * SMALL).items():
        seconds = _seconds(pattern, text, search)
        if seconds < MEASURABLE_SECONDS:
            worst = max(worst, (0.0, seconds, how))
            continue
        seconds = min(seconds, _seconds(pattern, text, search))
        ratio = seconds / max(min(_seconds(pattern, small[how], search) for _ in range(5)), 1e-7)
        worst = max(worst, (ratio, seconds, how))
        if ratio >= MAX_RATIO:
            break
    return worst


def _seconds(pattern: re.Pattern[Any], text: Any, search: bool) -> float:
    started = time.process_time()
    for _ in pattern.finditer(text) if search else ():
        pass
    pattern.match(text)
    return time.process_time() - started


def main() -> None:
    """Measure all patterns and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--table", action="store_true", help="print all patterns, not only those that are not linear")
    arguments.add_argument("--only", default="", help="measure patterns whose name contains this, and write nothing")
    shown = arguments.parse_args()
    rows = []
    for name, pattern in patterns().items():
        if shown.only not in name:
            continue
        ratio, seconds, how = growth(pattern, search=name not in ONLY_MATCHED)
        rows.append(
            {"pattern": name, "slowest_family": how[:60], "time_ms": round(1000 * seconds, 2), "growth_ratio": round(ratio, 1)}
        )
        if shown.table or ratio >= MAX_RATIO:
            print(f"{ratio:8.1f} {1000 * seconds:10.2f} ms  {name}  {how[:80]}", flush=True)
    print(f"{len(rows)} patterns; {sum(row['growth_ratio'] >= MAX_RATIO for row in rows)} of them not linear")
    if not shown.only:
        rows.sort(key=lambda row: (-row["growth_ratio"], -row["time_ms"], row["pattern"]))
        results = {
            "title": "Growth of regular expressions",
            "about": ABOUT,
            "num_patterns": len(rows),
            "rows": rows,
            "lost": "",
        }
        write_results("patterns", results, packages=["megagpt"])


if __name__ == "__main__":
    main()
