"""Scores of checkpoints: kept beside what was committed, by validation set, and what is best of each."""

import logging
from pathlib import Path

import pytest

from megagpt.checkpoint.on_disk import read_state
from megagpt.checkpoint.save_load import set_aside
from megagpt.checkpoint.scores import keep_score, mark_best, read_best, read_scores, score_of, validation_loss
from megagpt.config import UserError
from megagpt.files import read_json, write_json


def committed(run_dir: Path, step: int, **state: object) -> Path:
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    write_json(path / "state.json", state)
    write_json(path / "manifest.json", {"files": {}})
    return path


def test_a_score_belongs_to_a_validation_set_and_best_begins_anew_with_another(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints" / "best.json"
    for step, name, loss in ((2, "a", 2.0), (4, "a", 3.0), (6, "b", 5.0), (8, "b", 6.0), (8, "a", 1.0)):
        keep_score(committed(tmp_path, step), step, name, {"loss": loss, "tokens": 7})
        if step == 4:
            assert read_json(best) == {"step": 2, "validation_loss": 2.0, "validation_set": "a"}
        if step == 8 and name == "b":
            assert read_json(best) == {"step": 6, "validation_loss": 5.0, "validation_set": "b"}
    eighth = tmp_path / "checkpoints" / "step_00000008"
    assert read_scores(eighth) == {"b": {"loss": 6.0, "tokens": 7}, "a": {"loss": 1.0, "tokens": 7}}
    assert (validation_loss(eighth), validation_loss(eighth, "b"), validation_loss(eighth, "c")) == (1.0, 6.0, None)


def test_the_best_by_a_score_is_the_highest_and_comes_back_with_an_older_branch(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints" / "best.json"
    for step, value in ((2, 0.5), (4, 0.7), (6, 0.9), (8, 0.8)):
        path = committed(tmp_path, step)
        keep_score(path, step, "valid", {"loss": 1.0 / step}, best_by=None)
        keep_score(path, step, "asked", {"scores": {"a.b": {"f1": value, "loss_of_gold": value}}}, best_by="a.b.f1")
    assert read_json(best) == {"step": 6, "value": 0.9, "validation_set": "asked", "metric": "a.b.f1"}
    assert validation_loss(tmp_path / "checkpoints" / "step_00000008") == 1 / 8
    set_aside(tmp_path, newer_than=4, attempt=2)
    assert read_json(best)["step"] == 4
    path = committed(tmp_path, 10)
    keep_score(path, 10, "asked", {"scores": {"a.b": {"loss_of_gold": 0.6}}}, best_by="a.b.loss_of_gold")
    assert read_json(best)["step"] == 10, "another metric begins anew"
    keep_score(committed(tmp_path, 12), 12, "asked", {"scores": {"a.b": {"loss_of_gold": 0.7}}}, best_by="a.b.loss_of_gold")
    assert read_json(best)["step"] == 10, "of a loss the lowest is the best"
    with pytest.raises(UserError, match=r"best_by=a.b.bleu: not among the scores, which are a.b.f1"):
        score_of({"a.b": {"f1": 0.5}}, "a.b.bleu")


def test_the_score_that_release_0_1_kept_in_state_json_is_read(tmp_path: Path) -> None:
    path = committed(tmp_path, 2, validation_loss=2.5)
    assert (validation_loss(path), validation_loss(path, "a")) == (2.5, 2.5)
    write_json(tmp_path / "checkpoints" / "best.json", {"step": 2, "validation_loss": 2.5})
    assert not mark_best(tmp_path, 4, 2.6, "a"), "an old file does not say of which set it is"
    assert mark_best(tmp_path, 4, 2.4, "a")


def test_what_is_not_committed_has_no_score_and_a_full_disk_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_score(tmp_path / "checkpoints" / "step_00000002", 2, "a", {"loss": 1.0})
    assert not (tmp_path / "checkpoints").exists()
    path = committed(tmp_path, 4)
    (path / "scores.json").mkdir()  # nothing can be written there
    with caplog.at_level(logging.WARNING):
        keep_score(path, 4, "a", {"loss": 1.0})
    assert "the score of step 4 is not kept" in caplog.text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("1", "holds a JSON int"),
        ("{}", "train_state is missing"),
        ('{"train_state": []}', "train_state is a list"),
    ],
)
def test_a_state_of_another_shape_is_refused_by_file_and_field(text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(UserError, match=rf"state\.json: {rule}"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    ("text", "rule"), [("[]", "holds a JSON list"), ('{"step": "1", "validation_loss": 1}', "step is a str")]
)
def test_a_best_of_another_shape_is_refused_by_file_and_field(text: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.json").write_text(text)
    with pytest.raises(UserError, match=rf"best\.json: {rule}"):
        read_best(tmp_path)
