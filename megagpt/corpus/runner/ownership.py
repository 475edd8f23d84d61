"""Who owns an output folder. Its marker file names the work that is made there: a hash of settings and inputs.

A start may be left over on a node that SLURM has lost, while another one with other settings works in the same folder, and must
not mix its results with that one's. Unfinished results are in a folder named by the work, which no other work reads
(`folder_of`). Finished files are written by `commit` and `commit_by` only: they read the marker again before a file gets its
final name. Starts of the same work write the same bytes and need no fence. The moment between that check and the renaming
stays open.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from megagpt.config import UserError
from megagpt.files import atomic_path, read_json, write_json

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ownership:
    """The marker file of an output folder, and the work that this start does there."""

    marker: Path
    work: str


def take_ownership(marker: Path, work: str, **said: Any) -> Ownership:
    """Write the marker with the fields `said`. Starts of other work end at their next commit."""
    write_json(marker, {**said, "work": work})
    return Ownership(marker, work)


def is_of_other_work(marker: Path, work: str) -> bool:
    """Whether the marker names other work than this."""
    return marker.is_file() and read_json(marker).get("work") != work


def require_ownership(ownership: Ownership) -> None:
    """Raise UserError if another start has taken the folder for other work since."""
    if is_of_other_work(ownership.marker, ownership.work):
        raise UserError(f"{ownership.marker.parent}: a later start makes something else here: this one ends")


@contextlib.contextmanager
def commit(path: Path, ownership: Ownership) -> Iterator[Path]:
    """`atomic_path` for a finished file: yield a temporary path, which becomes `path` only while the folder is this work's.

    Raises UserError, and leaves `path` as it was, if another start has taken the folder for other work since.
    """
    with atomic_path(path) as temporary:
        yield temporary
        require_ownership(ownership)


def commit_by(ownership: Ownership, write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `write`, which gives finished files their names, only while the folder is this work's; returns its result.

    Raises UserError, without the call, if another start has taken the folder for other work since.
    """
    require_ownership(ownership)
    return write(*args, **kwargs)


@contextlib.contextmanager
def work_of(ownership: Ownership) -> Iterator[None]:
    """If files are missing in the body because a later start has removed them, raise the UserError that says so instead."""
    try:
        yield
    except (FileNotFoundError, UserError):
        require_ownership(ownership)
        raise


def folder_of(parent: Path, work: str) -> Path:
    """The folder below `parent` for unfinished results of this work alone."""
    return parent / work[:16]
