"""The lines of a run's metrics.jsonl: how one is written, and how a file with torn and superseded lines is read back."""

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
"""Kinds of rows that are history, never superseded."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class Metrics:
    """What metrics.jsonl says. `rows` leaves out what a restart or rewind did again; `all_rows` is the raw reading."""

    rows: tuple[Row, ...]
    all_rows: tuple[Row, ...]
    torn_lines: int

    def of_kind(self, kind: str) -> list[Row]:
        """The rows of one kind that stand, in file order."""
        return [row for row in self.rows if row["kind"] == kind]

    @property
    def last_step(self) -> int:
        """The largest step ever logged, superseded rows included; -1 if there is none."""
        return max((row["step"] for row in self.all_rows), default=-1)


def read_metrics(run_dir: Path) -> Metrics:
    """Read run_dir/metrics.jsonl. Raises UserError if there is no file.

    Lines that are torn by a kill, lack a field, have one of a wrong type or name a start that there never was are counted as
    torn and left out: one of them would hide the rows of other starts.
    """
    path = run_dir / METRICS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: not the directory of a run that has started") from None
    return _standing(*parse_rows(data), _last_start(run_dir))


class MetricsFollower:
    """Reads a metrics.jsonl again and again while it grows; of each reading only what is new is parsed."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._rows: list[Row] = []
        self._torn, self._offset = 0, 0

    def read(self) -> Metrics:
        """`read_metrics` of this moment. A line that is still being written is left for the next call."""
        path = self._run_dir / METRICS_FILE
        try:
            with path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:  # another file: somebody put a copy in its place
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
    """The rows in some lines of a metrics.jsonl, and how many lines are torn."""
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
    went_on_from = math.inf
    last_writer: dict[tuple[str, int], int] = {}
    for i in reversed(range(len(rows))):
        row = rows[i]
        if row["kind"] in EVENTS:
            if row["kind"] in CONTINUES and not result[i]:
                went_on_from = min(went_on_from, row["step"])
            continue
        if not result[i]:
            writer = last_writer.setdefault((row["kind"], row["step"]), row["incarnation"])
            result[i] = row["step"] > went_on_from or row["incarnation"] < writer
    return result


def interrupted_at(rows: Sequence[Row], step: int) -> tuple[str, ...]:
    """The kinds of rows (`evaluate`, `sample`) that a stop signal cut short at `step` and that no start since has done.

    `rows` of the starts before this one. What a start has tried in vain, ended by nobody's wish, is not tried again.
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
    """One JSON line, newline included. Tensors and numpy scalars become floats; NaN and infinities the words of _NON_FINITE."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def plain(value: Any) -> Any:
    """`value` as JSON can hold it, nested mappings and lists included."""
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
