"""Settings that are right one by one and wrong together: refused where they cannot be meant, else reported."""

import logging
from pathlib import Path
from typing import Any

import pytest
from small_run import settings

from megagpt.command import EXIT_DONE, EXIT_USER_ERROR, run_words
from megagpt.config import UserError, dump, validate
from megagpt.data.open_data import open_data
from megagpt.files import write_json
from megagpt.train.config import TrainConfig
from megagpt.train.cross_checks import refuse_contradictions, warnings_of
from megagpt.train.loop import train


def wsd(**changes: int) -> dict[str, Any]:
    return {"lr": 1e-3, "schedule": {"kind": "wsd", **changes}}


def make(shards: Path, tmp_path: Path, *, data: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    values = settings(shards, tmp_path / "run", **{"max_steps": 16, **changes})
    return validate(TrainConfig, {**values, "data": {**values["data"], **(data or {})}}, source="test")


SCORE = {"tasks": {"a": "a.jsonl"}}
REFUSED = [
    ({"max_steps": 10, "optim": {"schedule": {"warmup_steps": 10}}}, "warmup_steps=10 is not below max_steps=10"),
    ({"max_steps": 10, "optim": {"schedule": {"kind": "constant", "warmup_steps": 11}}}, "warmup_steps=11 is not below"),
    (
        {"max_steps": 10, "optim": wsd(warmup_steps=4, decay_steps=7)},
        "4 + decay_steps=7 are more than max_steps=10",
    ),
    ({"data": {"shuffle_block": 1000}}, "not more than data.shuffle_block=1000: they would come in the same order"),
]
ACCEPTED: list[dict[str, Any]] = [
    {},
    {"max_steps": 10, "optim": {"schedule": {"warmup_steps": 9}}},
    {"max_steps": 10, "optim": wsd(warmup_steps=4, decay_steps=6)},
    {"data": {"shuffle_block": 1}},
    {"data": {"document_mask": True}},
    {"keep_every_steps": 8},
    {"export_every_steps": 8},
]
REPORTED = [
    ({"evaluate_every_steps": 17}, "evaluate_every_steps=17 is more than max_steps=16"),
    ({"score": {**SCORE, "every_steps": 17}}, "score.every_steps=17 is more than max_steps=16: the only scores are those"),
    (
        {"score": {**SCORE, "every_steps": 6}, "best_by": "a.accuracy", "early_stop_evaluations": 1},
        "score.every_steps=6 is not a multiple of save_every_steps=4",
    ),
    ({"monitor": {"norms_every_steps": 17}}, "monitor.norms_every_steps=17 is more than max_steps=16: no norms are logged"),
    ({"profile": {"steps": [17, 20]}}, "profile.steps=[17, 20] begin after max_steps=16: nothing is recorded"),
    ({"sample_every_steps": 17}, "sample_every_steps=17 is more than max_steps=16: no text is generated"),
    ({"export_every_steps": 20}, "export_every_steps=20 is more than max_steps=16: nothing is exported"),
    ({"export_every_steps": 6}, "6 is not a multiple of save_every_steps=4: checkpoints are exported every 12 steps"),
    ({"save_every_steps": 17}, "save_every_steps=17 is more than max_steps=16: the only checkpoint"),
    ({"monitor": {"log_every_steps": 17}}, "monitor.log_every_steps=17 is more than max_steps=16: no training loss"),
    (
        {"keep_every_steps": 20},
        "with save_every_steps=4: the first checkpoint to be kept is that of step 20, after max_steps",
    ),
    (
        {"keep_every_steps": 6},
        "6 is not a multiple of save_every_steps=4: checkpoints are kept every 12 steps",
    ),
    ({"batch_warmup": [{"until_step": 17, "global_batch_size": 4}]}, "batch_warmup: until_step=17 is more than max_steps=16"),
    (
        {"data": {"weight_changes": [{"from_sample": 128, "weights": {"toy": 2}}]}},
        "from_sample=128 is not below the run's 128 samples",
    ),
    ({"optim": {"schedule": {"decay_steps": 3}}}, "decay_steps=3 has no effect with kind=cosine"),
    ({"resume_step": 17}, "resume_step=17 is more than max_steps=16"),
    ({"float8": "rowwise", "precision": "bf16"}, "float8=rowwise without compile=true"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused(changes: dict[str, Any], message: str, shards: Path, tmp_path: Path) -> None:
    config = make(shards, tmp_path, **changes)
    with pytest.raises(UserError) as raised:
        refuse_contradictions(config, open_data(config.data))
    assert message in str(raised.value)
    assert warnings_of(config, open_data(config.data)) == []


@pytest.mark.parametrize("changes", ACCEPTED)
def test_what_fits_is_neither_refused_nor_reported(changes: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    config = make(shards, tmp_path, **changes)
    refuse_contradictions(config, open_data(config.data))
    assert warnings_of(config, open_data(config.data)) == []


@pytest.mark.parametrize(("changes", "message"), REPORTED)
def test_what_may_be_meant_is_reported(changes: dict[str, Any], message: str, shards: Path, tmp_path: Path) -> None:
    config = make(shards, tmp_path, **changes)
    refuse_contradictions(config, open_data(config.data))
    (warning,) = warnings_of(config, open_data(config.data))
    assert message in warning


def test_documents_shorter_than_samples_are_reported_where_attention_stays_inside_them(shards: Path, tmp_path: Path) -> None:
    model = {"vocab_size": 257, "seq_len": 256, "num_layers": 2, "num_heads": 2, "hidden_size": 32}
    long = make(shards, tmp_path, model=model, data={"seq_len": 200, "document_mask": True})
    (warning,) = warnings_of(long, open_data(long.data))
    assert "data.seq_len=200 is longer than every document (at most " in warning
    across = make(shards, tmp_path, model=model, data={"seq_len": 200})
    assert warnings_of(across, open_data(across.data)) == []


def test_a_run_without_a_validation_split_is_told(shards: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("train", "tokenizer"):
        (alone / name).symlink_to(shards / name)
    config = make(alone, tmp_path)
    assert [text for text in warnings_of(config, open_data(config.data)) if "no source has a validation split" in text]


def test_a_learning_rate_that_jumps_on_a_resume_is_reported(shards: Path, tmp_path: Path) -> None:
    before = make(shards, tmp_path, max_steps=16)
    path = before.run_dir / "checkpoints" / "step_00000012"
    path.mkdir(parents=True)
    write_json(path / "state.json", {"config": before.model_dump(mode="json")})
    data = open_data(before.data)
    assert warnings_of(before, data) == []
    (warning,) = warnings_of(make(shards, tmp_path, max_steps=64), data)
    assert "the learning rate jumps at step 12 from 0.000" in warning
    assert "max_steps=16 -> 64" in warning
    stable = {"lr": 1e-3, "schedule": {"kind": "constant", "warmup_steps": 4}}
    write_json(path / "state.json", {"config": make(shards, tmp_path, optim=stable).model_dump(mode="json")})
    assert warnings_of(make(shards, tmp_path, max_steps=64, optim=stable), data) == []
    for damaged in ({"config": 3}, {"config": {}}, {"config": {"optim": {"lr": "x"}, "max_steps": 3}}):
        write_json(path / "state.json", damaged)
        assert warnings_of(before, data) == []


def test_a_run_that_began_so_may_end_so(shards: Path, tmp_path: Path) -> None:
    config = make(shards, tmp_path, max_steps=10, optim={"schedule": {"warmup_steps": 10}})
    (config.run_dir / "checkpoints" / "step_00000004").mkdir(parents=True)
    refuse_contradictions(config, open_data(config.data))
    (warning,) = warnings_of(config, open_data(config.data))
    assert "warmup_steps=10 is not below max_steps=10" in warning


def test_the_tool_refuses_and_reports(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump(make(shards, tmp_path)))
    words = ["optim.schedule.warmup_steps=99", "data.shuffle_block=1000", "check=true"]
    assert run_words(TrainConfig, train, "", [str(path), *words]) == EXIT_USER_ERROR
    assert len(capsys.readouterr().err.splitlines()) == 3
    with caplog.at_level(logging.WARNING):
        assert run_words(TrainConfig, train, "", [str(path), "sample_every_steps=99", "check=true"]) == EXIT_DONE
        assert run_words(TrainConfig, train, "", [str(path), "allow_change=[data]", "check=true"]) == EXIT_DONE
    assert "sample_every_steps=99 is more than max_steps=16" in caplog.text
    assert "allow_change=[data] stands for data.shards, data.order, data.weights, data.seq_len: name what is" in caplog.text
