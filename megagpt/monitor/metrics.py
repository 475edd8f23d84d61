"""Write the rows of a run's metrics.jsonl, and read a file with torn and superseded rows."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megagpt.config import UserError

METRICS_FILE = "metrics.jsonl"

Row = dict[str, Any]
"""One line: kind, step (updates done), time (Unix seconds), attempt (1 = first start), seconds (see goodput.py), values."""

CONTINUES = ("start", "rewind")
"""Kinds of rows whose step is where training resumes: later steps logged before them are repeated."""

EVENTS = (*CONTINUES, "damaged", "stop", "watchdog", "done")
"""Kinds of rows that record events and are never superseded."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class Metrics:
    """The contents of metrics.jsonl. `rows` leaves out rows that a restart or rewind superseded; `all_rows` has all of them."""

    rows: tuple[Row, ...]
    all_rows: tuple[Row, ...]
    torn_lines: int

    def of_kind(self, kind: str) -> list[Row]:
        """The rows of one kind that are not superseded, in file order."""
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def last_step(self) -> int:
        """The largest step ever logged, superseded rows included; -1 if there is none."""
        return max((row["step"] for row in self.all_rows), default=-1)


def read_metrics(run_dir: Path) -> Metrics:
    """Read run_dir/metrics.jsonl. Raises UserError if there is no file.

    A line is left out and counted as torn if a kill cut it, if a field is missing or has a wrong type, or if its attempt never
    started: such a line would hide the rows of other attempts.
    """
    path = run_dir / METRICS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: not the directory of a run that has started") from None
    return _standing(*parse_rows(data), _last_start(run_dir))


class MetricsFollower:
    """Reads a metrics.jsonl repeatedly while it grows; each call parses only the new lines."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._rows: list[Row] = []
        self._torn, self._offset = 0, 0

    def read(self) -> Metrics:
        """`read_metrics` of the current file. A line that is still being written is left for the next call.

        Raises UserError if there is no file.
        """
        path = self._run_dir / METRICS_FILE
        try:
            with path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:  # a shorter file: somebody replaced it by a copy
                    self._rows, self._torn, self._offset = [], 0, 0
                file.seek(self._offset)
                data = file.read()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: not the directory of a run that has started") from None
        whole = data[: data.rfind(b"\n") + 1]
        rows, torn = parse_rows(whole)
        self._rows += rows
        self._torn += torn
        self._offset += len(whole)
        return _standing(self._rows, self._torn, _last_start(self._run_dir))


def parse_rows(data: bytes) -> tuple[list[Row], int]:
    """(rows, number of torn lines) of some lines of a metrics.jsonl."""
    lines = [line for line in data.split(b"\n") if line]
    rows = [row for row in map(_parse, lines) if row is not None]
    return rows, len(lines) - len(rows)


def _last_start(run_dir: Path) -> float:
    numbers = [int(file.stem) for file in (run_dir / "starts").glob("*") if file.stem.isdecimal()]
    return max(numbers, default=math.inf)


def _standing(rows: list[Row], torn: int, last_start: float) -> Metrics:
    known = [row for row in rows if row["incarnation"] <= last_start]
    kept = tuple(row for row, is_superseded in zip(known, superseded(known), strict=True) if not is_superseded)
    return Metrics(rows=kept, all_rows=tuple(known), torn_lines=torn + len(rows) - len(known))


def superseded(rows: list[Row]) -> list[bool]:
    """For each row, whether later rows replaced it; rows are in file order.

    A row is replaced if its step is after the step from which a later attempt or rewind resumed, if a later attempt has a row
    of the same kind and step, or if a process of an earlier attempt wrote it after the next attempt had begun.
    """
    result = [False] * len(rows)
    newest = 0
    for i, row in enumerate(rows):
        newest = max(newest, row["incarnation"])
        result[i] = row["incarnation"] < newest
    resumed_from = math.inf
    last_writer: dict[tuple[str, int], int] = {}
    for i in reversed(range(len(rows))):
        row = rows[i]
        if row["kind"] in EVENTS:
            if row["kind"] in CONTINUES and not result[i]:
                resumed_from = min(resumed_from, row["step"])
            continue
        if not result[i]:
            writer = last_writer.setdefault((row["kind"], row["step"]), row["incarnation"])
            result[i] = row["step"] > resumed_from or row["incarnation"] < writer
    return result


def interrupted_at(rows: Sequence[Row], step: int) -> tuple[str, ...]:
    """The kinds of rows (`evaluate`, `sample`) that a stop signal interrupted at `step` and no later attempt has done.

    rows: those of the attempts before this one. If an attempt has tried again and failed, it is not tried once more.
    """
    left: tuple[str, ...] = ()
    tried = False
    for row in rows:
        here = row["step"] == step
        if row["kind"] == "stop":
            left, tried = tuple(row["interrupted"]) if here and row.get("interrupted") else left, False
        elif row["kind"] == "start" and left:
            left, tried = () if tried else left, here
        elif here:
            left = tuple(kind for kind in left if kind != row["kind"])
    return () if tried else left


def format_row(row: Mapping[str, Any]) -> bytes:
    """One JSON line with its newline. Tensors and numpy scalars become floats, NaN and infinities strings of _NON_FINITE."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def plain(value: Any) -> Any:
    """`value` in types that JSON has, with nested mappings and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _parse(line: bytes) -> Row | None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return None
    step, start, time = (row.get(name) for name in ("step", "incarnation", "time"))
    if type(step) is not int or type(start) is not int or type(time) not in (int, float):
        return None
    seconds = row.get("seconds", {})
    if not isinstance(seconds, dict) or not all(type(spent) in (int, float) for spent in seconds.values()):
        return None
    return {key: _NON_FINITE.get(item, item) if isinstance(item, str) else item for key, item in row.items()}
