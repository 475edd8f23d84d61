"""Who owns an output folder. Its marker file names the work that is made there: a hash of settings and inputs.

A start may be left over on a node that SLURM has lost, while another one with other settings works in the same folder, and must
not mix its results with that one's. Unfinished results are in a folder named by the work, which no other work reads
(`folder_of`), and before a finished file gets its final name the marker is read again (`require_ownership`). Starts of the same
work write the same bytes and need no fence. The moment between that look and the renaming stays open.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.files import read_json, write_json


@dataclass(frozen=True, slots=True)
class Ownership:
    """The marker file of an output folder, and the work that this start does there."""

    marker: Path
    work: str


def take_ownership(marker: Path, work: str, **said: Any) -> Ownership:
    """Write the marker, with what else is `said` of the work. Starts of other work end when they next look."""
    write_json(marker, {**said, "work": work})
    return Ownership(marker, work)


def is_of_other_work(marker: Path, work: str) -> bool:
    """Whether the marker names other work than this."""
    return marker.is_file() and read_json(marker).get("work") != work


def require_ownership(ownership: Ownership) -> None:
    """Raise UserError where another start has claimed the folder for other work since."""
    if is_of_other_work(ownership.marker, ownership.work):
        raise UserError(f"{ownership.marker.parent}: a later start makes something else here: this one ends")


@contextlib.contextmanager
def work_of(ownership: Ownership) -> Iterator[None]:
    """Where files of the work in the body are gone because a later start has removed them, say that instead."""
    try:
        yield
    except (FileNotFoundError, UserError):
        require_ownership(ownership)
        raise


def folder_of(parent: Path, work: str) -> Path:
    """The folder below `parent` for unfinished results of this work alone."""
    return parent / work[:16]
