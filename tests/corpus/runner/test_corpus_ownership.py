"""Finished files get their names only while the folder is of this work."""

import ast
from pathlib import Path

import pytest

from megagpt.config import UserError
from megagpt.corpus.runner.ownership import commit, commit_by, take_ownership
from megagpt.files import write_json, write_text

CORPUS = Path(__file__).resolve().parents[3] / "megagpt" / "corpus"


def test_a_finished_file_is_written_by_the_owner_only(tmp_path: Path) -> None:
    path, value = tmp_path / "documents", tmp_path / "done.json"
    mine = take_ownership(tmp_path / "stage.json", "mine")
    with commit(path, mine) as temporary:
        temporary.write_text("mine")
    assert commit_by(mine, value.write_text, "mine") == 4
    assert path.read_text() == value.read_text() == "mine"
    late = commit(path, mine)
    late.__enter__().write_text("late")
    other = take_ownership(tmp_path / "stage.json", "other")
    with pytest.raises(UserError, match="a later start makes something else here"):
        late.__exit__(None, None, None)
    with pytest.raises(UserError, match="a later start makes something else here"):
        commit_by(mine, write_json, value, "late")
    assert path.read_text() == value.read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {"stage.json", "documents", "done.json"}
    commit_by(other, write_text, value, "other")
    assert value.read_text() == "other"


def test_ownership_is_asked_by_the_helper_and_between_phases_only() -> None:
    """Stages write finished files by `commit` and `commit_by`; dedup asks once more, before the phase that writes documents."""
    callers = {}
    for path in sorted(CORPUS.rglob("*.py")):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        if count := sum(isinstance(call, ast.Name) and call.id == "require_ownership" for call in calls):
            callers[str(path.relative_to(CORPUS))] = count
    assert callers == {"runner/ownership.py": 3, "dedup/dedup_documents.py": 1}
