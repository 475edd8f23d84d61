"""Work that is dealt out to the ranks in groups, and remembered on disk so that an evaluation that was stopped resumes.

Groups are made before they are dealt out, and each is computed as a whole: a group's answers have the same bits on any number
of ranks, and after a resume.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from megagpt.distributed.world import World

T = TypeVar("T")


class Journal:
    """The answers that are known, in a folder: a file per rank, a JSON line per group, written as soon as it is computed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, list[Any]]:
        """The answers of each group, by its key. A torn line, which a kill leaves, counts as not there."""
        known = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except FileNotFoundError:  # another evaluation of this checkpoint has ended, and needs it no longer
                continue
            for line in text.splitlines():
                try:
                    entry = json.loads(line)
                    known[entry["group"]] = entry["answers"]
                except (ValueError, KeyError, TypeError):
                    continue
        return known

    def add(self, rank: int, answers_by_key: dict[str, list[Any]]) -> None:
        """Append the answers of groups to this rank's file."""
        if not answers_by_key:
            return
        rows = [{"group": key, "answers": answers} for key, answers in answers_by_key.items()]
        line = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        with self._open(f"rank_{rank:05d}.jsonl") as file:
            if file.tell() and not _ends_a_line(Path(file.name)):
                line = b"\n" + line
            file.write(line)

    def _open(self, name: str) -> IO[bytes]:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                return (self.folder / name).open("ab")
            except FileNotFoundError:  # another evaluation of this checkpoint has ended, and removed the folder just now
                continue

    def remove(self) -> None:
        """Delete the folder: what was computed is kept elsewhere now."""
        shutil.rmtree(self.folder, ignore_errors=True)


def answer_groups(
    groups: Sequence[Sequence[T]], answer: Callable[[Sequence[T]], list[Any]], world: World, journal: Journal | None = None
) -> list[list[Any]]:
    """`answer` of every group, in order, on every rank; all ranks call it together with the same groups.

    Items and answers are JSON values. Every rank makes equally many calls of `answer`, as a model whose weights are spread over
    the ranks needs. Raises Stopped on all ranks between two groups after one got a stop request, Failure on all where one could
    not read or write its journal.
    """
    keys = [hashlib.sha256(json.dumps(group).encode()).hexdigest()[:32] for group in groups]
    known = world.broadcast(world.together(lambda: journal.read() if journal is not None and world.rank == 0 else {}))
    missing = [i for i, key in enumerate(keys) if key not in known]
    found: dict[str, list[Any]] = {}
    for start in range(0, len(missing), world.size):
        world.agree()
        world.progress()
        own = start + world.rank
        i = missing[own if own < len(missing) else start]  # who has none left computes one that another rank has, too
        answers = answer(groups[i])
        own_group = {keys[i]: answers} if own < len(missing) else {}
        found |= own_group
        if journal is not None:
            world.together(partial(journal.add, world.rank, own_group))
    for part in world.gather(found):
        known |= part
    return [known[key] for key in keys]


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
