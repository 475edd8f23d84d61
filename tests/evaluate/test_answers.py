"""Work dealt out to ranks and resumed: every group once, the same answers on any number of ranks and after a kill."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from megagpt.distributed.world import Stopped, World, lone_world
from megagpt.evaluate.answers import Journal, answer_groups

GROUPS = [[1, 2], [3], [4, 5, 6], [7], [8]]
SQUARES = [[1, 4], [9], [16, 25, 36], [49], [64]]


def squares_on_ranks(world: World, folder: Path) -> tuple[list[list[int]], int]:
    calls = 0

    def answer(group: Any) -> list[int]:
        nonlocal calls
        calls += 1
        return [item * item for item in group]

    return answer_groups(GROUPS, answer, world, Journal(folder)), calls


@pytest.mark.slow
def test_ranks_share_groups_make_equally_many_calls_and_resume_on_another_number(tmp_path: Path) -> None:
    first, second = run_ranks(squares_on_ranks, 2, tmp_path / "ranks", tmp_path / "journal")
    assert first == second == (SQUARES, 3)  # five groups: the second rank computes one beside the first
    assert sorted(path.name for path in (tmp_path / "journal").iterdir()) == ["rank_00000.jsonl", "rank_00001.jsonl"]
    assert squares_on_ranks(lone_world(torch.device("cpu")), tmp_path / "journal") == (SQUARES, 0)


def test_what_is_in_the_journal_is_not_computed_again_and_a_torn_line_is(tmp_path: Path) -> None:
    world, journal, seen = lone_world(torch.device("cpu")), Journal(tmp_path / "journal"), []

    def answer(group: Any) -> list[int]:
        if len(seen) == 3:
            world.stop.request("SIGTERM")
        seen.append(group)
        return [item * item for item in group]

    with pytest.raises(Stopped):
        answer_groups(GROUPS, answer, world, journal)
    assert seen == GROUPS[:4]
    path = tmp_path / "journal" / "rank_00000.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    world.stop.signal_name = ""
    seen.clear()
    before = world.progress.count
    assert answer_groups(GROUPS, answer, world, journal) == SQUARES
    assert seen == GROUPS[3:]
    assert world.progress.count - before == 2, "each group is progress for the watchdog"
    seen.clear()
    assert answer_groups([*GROUPS, [9]], answer, world, journal) == [*SQUARES, [81]]
    assert seen == [[9]]
    journal.remove()
    assert journal.read() == {}


def test_an_evaluation_goes_on_when_another_of_its_checkpoint_removes_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the worst moments: between making the folder and opening a file in it, and between listing it and reading."""
    mine, other = Journal(tmp_path / "journal"), Journal(tmp_path / "journal")
    made, removals = Path.mkdir, []

    def mkdir(self: Path, *words: Any, **options: Any) -> None:
        made(self, *words, **options)
        if not removals:
            removals.append(self)
            other.remove()

    monkeypatch.setattr(Path, "mkdir", mkdir)
    mine.add(0, {"a": [1]})
    assert removals
    assert other.read() == {"a": [1]}
    listed = Path.glob

    def glob(self: Path, pattern: str) -> list[Path]:
        found = list(listed(self, pattern))
        other.remove()
        return found

    monkeypatch.setattr(Path, "glob", glob)
    assert mine.read() == {}
