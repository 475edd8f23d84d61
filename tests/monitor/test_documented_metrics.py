"""Every kind of row in metrics.jsonl, and every value that a call of `monitor.log` names, is in a table of docs/training.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.evaluate.loss import Score
from megagpt.monitor.metrics import EVENTS, Row, read_metrics
from megagpt.watchdog.watchdog import Verdict

ADDED = {
    "start": ("device_name", "num_devices", "peak_tflops_per_device", "job", "advised_save_every_steps", "wandb"),
    "evaluate": (*Score(1.0, 1, 1, 1).summary(), "sources"),
    "watchdog": Verdict.__slots__,
    "train": ("z_loss", "tokens_per_second", "tokens_per_second_per_device", "mfu", "mfu_causal", "mfu_hardware", "gpu"),
}
"""What no call names literally: the scores, the verdict, the model's terms of the loss, and what Monitor adds."""
HEAD = {"kind", "step", "time", "incarnation", "seconds"}


def documented(page: str) -> dict[str, set[str]]:
    """Kind -> the words of its third cell in the table whose head begins with `kind`."""
    table = re.search(r"^\| kind \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert table is not None, "docs/training.md: no table of the kinds of rows"
    found = {}
    for line in table[1].splitlines():
        kinds, _, values = (cell.strip() for cell in line.strip("|").split("|"))
        found |= {kind: {*re.findall(r"\w+", values)} for kind in re.findall(r"`(\w+)`", kinds)}
    return found


def logged(source: str) -> Iterator[tuple[str, set[str]]]:
    """(kind, names of values) of each call of `monitor.log` in a module; `**name` counts as the dictionaries of that name."""
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        given: dict[str, set[str]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                given.setdefault(node.targets[0].id, set()).update(keys_in(node.value))
        for node in ast.walk(function):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if is_call and node.func.attr in ("log", "log_from_a_thread") and ast.unparse(node.func.value).endswith("monitor"):
                assert isinstance(node.args[0], ast.Constant), (
                    f"line {node.lineno}: the kind is no literal: {ast.unparse(node)}"
                )
                values = {word.arg for word in node.keywords if word.arg is not None}
                for word in node.keywords:
                    if word.arg is None:
                        values |= given.get(word.value.id, set()) if isinstance(word.value, ast.Name) else keys_in(word.value)
                yield node.args[0].value, values


def keys_in(expression: ast.expr) -> set[str]:
    """The literal keys of the dictionaries in an expression that become keys of the row."""
    parts = [expression.body, expression.orelse] if isinstance(expression, ast.IfExp) else [expression]
    keys: set[str] = set()
    for part in parts:
        for key, value in zip(part.keys, part.values, strict=True) if isinstance(part, ast.Dict) else ():
            keys |= {key.value} if isinstance(key, ast.Constant) else keys_in(value) if key is None else set()
    return keys


def missing(rows: dict[str, set[str]], page: str) -> list[str]:
    """A line for each kind or value that the page's table lacks."""
    table = documented(page)
    lines = [f"no row for the kind {kind}" for kind in sorted(rows.keys() - table.keys())]
    for kind in sorted(rows.keys() & table.keys()):
        if names := sorted(rows[kind] - table[kind] - HEAD):
            lines.append(f"the row of {kind} does not name {', '.join(names)}")
    return lines


def rows_of_the_code(project: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {kind: set(names) for kind, names in ADDED.items()}
    for path in (project / "megagpt").rglob("*.py"):
        for kind, names in logged(path.read_text(encoding="utf-8")):
            found.setdefault(kind, set()).update(names)
    return found


def test_every_logged_kind_and_value_is_documented(project: Path) -> None:
    found = rows_of_the_code(project)
    assert {"start", "train", "evaluate", "save", "rewind", "planned", "skip", "stop", "done"} <= found.keys()
    assert {"lr", "grad_norm", "loss", "tokens"} <= found["train"]
    assert {"bad_step", "taken_back"} <= found["rewind"]
    lines = missing(
        {**{kind: set() for kind in EVENTS}, **found}, (project / "docs" / "training.md").read_text(encoding="utf-8")
    )
    assert not lines, "\n".join(["docs/training.md, table of the kinds of rows in metrics.jsonl:", *lines])


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_every_value_of_a_real_run_is_documented(engine: str, project: Path) -> None:
    found: dict[str, set[str]] = {}
    rows: tuple[Row, ...] = read_metrics(project / "tests" / "fixtures" / "release_0_1" / "trained" / engine).all_rows
    for row in rows:
        found.setdefault(row["kind"], set()).update(row)
    assert {"start", "train", "evaluate", "done"} <= found.keys()
    assert not missing(found, (project / "docs" / "training.md").read_text(encoding="utf-8"))


SOURCE = """
def save(run, log):
    facts = {"a": 1, **({"b": 2} if run else {})}
    more = {"c": {"no": 1}} if run else {}
    run.monitor.log("one", 1, d=2, **facts, **more)
    monitor.log_from_a_thread("two", 1, reason="x", **{"e": 1})
    log.log("three", f=3)
"""


def test_what_is_missing_is_named() -> None:
    found = dict(logged(SOURCE))
    assert found == {"one": {"a", "b", "c", "d"}, "two": {"reason", "e"}}
    page = "| kind | when | values |\n|---|---|---|\n| `one` | now | a, b (of `x`), d |\n"
    assert missing(found, page) == ["no row for the kind two", "the row of one does not name c"]
