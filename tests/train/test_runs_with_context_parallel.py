"""Runs whose ranks share samples: what is refused, the ledger, evaluation and sampling, and restarts with other groups."""

import re
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from small_run import STEPS, losses, settings, start

from megagpt.command import EXIT_DONE, EXIT_USER_ERROR
from megagpt.config import UserError, validate
from megagpt.data.open_data import open_data
from megagpt.data.sample_ledger import Entry, read_ledger
from megagpt.monitor.metrics import read_metrics
from megagpt.report.inspect_data import _open_run, _samples_of, check_ledger
from megagpt.train.config import TrainConfig
from megagpt.train.preflight import check_run

HALF = STEPS // 2
MODEL = {"vocab_size": 257, "seq_len": 32, "num_layers": 2, "num_heads": 2, "hidden_size": 32}
LASTING: dict[str, Any] = {
    "model": MODEL,
    "optim": {"lr": 1e-3, "schedule": {"kind": "constant", "warmup_steps": 4}},
    "keep_every_steps": HALF,
    "sample_every_steps": HALF,
    "sample_tokens": 40,  # beyond the model's 32: generation continues from the last half
}


def shared(size: int, **more: Any) -> dict[str, Any]:
    return {"context_parallel_size": size, **more}


REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (2, {"engine": shared(3)}, "engine.context_parallel_size=3 does not divide the 2 ranks: one of 1, 2 does"),
    (
        4,
        {"engine": shared(4)},
        "engine.context_parallel_size=4 with context_parallel_method=ulysses: model.num_heads=2 is not a multiple of it; sizes "
        "that fit: 2. engine.context_parallel_method=gather takes any number of heads",
    ),
    (
        2,
        {"engine": shared(2, context_parallel_method="gather"), "data.seq_len": 30},
        "engine.context_parallel_size=2 with context_parallel_method=gather: data.seq_len=30 is not a multiple of 4; 28 is",
    ),
    (2, {"engine": shared(2, kind="fsdp"), "data.seq_len": 31}, "data.seq_len=31 is not a multiple of 2; 30 is"),
    (
        2,
        {"engine": shared(2), "model.dropout": 0.1},
        "engine.context_parallel_size=2 with model.dropout=0.1: which activations",
    ),
    (
        2,
        {"engine": shared(2), "determinism": "canonical"},
        "engine.context_parallel_size=2 with determinism=canonical: its order",
    ),
    (
        16,
        {"engine": shared(2)},
        "global_batch_size=8 is 4 micro-batches of micro_batch_size=2 for 8 groups of engine.context_parallel_size=2: some "
        "would have no samples; raise it to 16, or engine.context_parallel_size to 4",
    ),
    (
        8,
        {"engine": shared(2), "batch_warmup": [{"until_step": 3, "global_batch_size": 4}]},
        "batch_warmup until step 3: global_batch_size=4 is 2 micro-batches",
    ),
]


def config_of(shards: Path, run_dir: Path, changes: dict[str, Any]) -> TrainConfig:
    values = settings(shards, run_dir, model=dict(MODEL))
    for key, value in changes.items():
        section, _, field = key.partition(".")
        if field:
            values[section] = {**values[section], field: value}
        else:
            values[section] = value
    return validate(TrainConfig, values, source="test")


@pytest.mark.parametrize(("ranks", "changes", "message"), REFUSED)
def test_what_ranks_cannot_share_is_refused_before_any_work(
    ranks: int, changes: dict[str, Any], message: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(shards, tmp_path / "run", changes)
    for name, value in (("RANK", 0), ("WORLD_SIZE", ranks), ("LOCAL_RANK", 0)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError) as raised:
        check_run(config, open_data(config.data))
    assert message in str(raised.value)
    assert not config.run_dir.exists()


def test_a_check_on_one_process_is_for_any_number_of_ranks(shards: Path, tmp_path: Path) -> None:
    """check=true looks at what does not depend on the ranks; a run on one process is refused."""
    changes = {"engine": shared(2), "check": True}
    config = config_of(shards, tmp_path / "run", changes)
    check_run(config, open_data(config.data))
    with pytest.raises(UserError, match="does not divide the 1 ranks"):
        check_run(config.model_copy(update={"check": False}), open_data(config.data))


def test_a_ranks_samples_are_those_of_its_group(tmp_path: Path) -> None:
    (tmp_path / "starts").mkdir()
    (tmp_path / "starts" / "0001.json").write_text(
        '{"world_size": 4, "config": {"micro_batch_size": 2, "engine": {"context_parallel_size": 2}}}'
    )
    entry = Entry(step=0, first_sample=0, num_samples=8, fed_hash=0, attempt=1)
    assert [_samples_of(tmp_path, entry, rank) for rank in range(4)] == [[0, 1, 4, 5]] * 2 + [[2, 3, 6, 7]] * 2


def finished(ranks: Ranks) -> None:
    statuses = ranks.wait()
    assert statuses == [EXIT_DONE] * len(statuses), ranks.output()


@pytest.mark.slow
def test_groups_change_at_a_restart_and_the_run_is_the_same(shards: Path, project: Path, tmp_path: Path) -> None:
    """One process; 2 ranks that share samples, then one; one, then 2 that share them otherwise, on the other engine."""
    data = {**settings(shards, tmp_path)["data"], "document_mask": True}

    def values(name: str, engine: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return settings(shards, tmp_path / name, **LASTING, data=data, engine=engine, **changes)

    one = start(project, tmp_path / "a", values("one", {"kind": "fsdp"}), 1)
    finished(start(project, tmp_path / "b", values("down", shared(2, kind="fsdp"), max_steps=HALF), 2))
    finished(one)
    down = start(project, tmp_path / "c", values("down", {"kind": "fsdp"}), 1)
    begin = str(tmp_path / "one" / "checkpoints" / f"step_{HALF:08d}")
    other = shared(2, context_parallel_method="gather", zero_stage=1)
    finished(start(project, tmp_path / "d", values("up", other, continue_from=begin), 2))
    finished(down)
    expected, entries = losses(tmp_path / "one"), ledger(tmp_path / "one")
    assert losses(tmp_path / "down").keys() == expected.keys()
    for name in ("down", "up"):
        found = losses(tmp_path / name)
        # fp32 sums in another order, as between other layouts
        assert max(abs(found[step] - expected[step]) for step in found) < 1e-5, name
        assert entries[-len(found) :] == ledger(tmp_path / name), name
        for kind, key in (("evaluate", "tokens"), ("evaluate", "bits_per_byte"), ("sample", "text")):
            ours, theirs = (by_step(tmp_path / run, kind, key)[STEPS] for run in (name, "one"))
            assert ours == (pytest.approx(theirs, abs=1e-5) if key == "bits_per_byte" else theirs), (name, key)
    refused = start(project, tmp_path / "e", values("up", shared(2), continue_from=begin), 1)
    assert refused.wait() == [EXIT_USER_ERROR], refused.output()
    assert "engine.context_parallel_size=2 does not divide the 1 ranks" in refused.output()


@pytest.mark.slow
def test_a_run_continues_with_longer_samples_that_ranks_share(shards: Path, project: Path, tmp_path: Path) -> None:
    """Twice the length on 2 ranks: no token twice by the ledger, and no alarm of the guard."""
    finished(start(project, tmp_path / "a", settings(shards, tmp_path / "one", **LASTING, engine={"kind": "fsdp"}), 1))
    begin = tmp_path / "one" / "checkpoints" / f"step_{HALF:08d}"
    scaled = {**MODEL, "seq_len": 64, "rope_scaling": {"kind": "yarn", "factor": 2.0, "original_seq_len": 32}}
    data = {**settings(shards, tmp_path)["data"], "seq_len": 64}
    changes = {**LASTING, "model": scaled, "data": data, "engine": shared(2, kind="fsdp"), "continue_from": str(begin)}
    values = settings(shards, tmp_path / "two", **{**changes, "max_steps": HALF + 3, "global_batch_size": 4})
    finished(start(project, tmp_path / "b", values, 2))
    before, after = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(after) == [HALF + 1, HALF + 2, HALF + 3]
    assert all(loss < before[1] - 0.5 for loss in after.values()), "it resumes from the learned weights"
    (planned,) = read_metrics(tmp_path / "two").of_kind("planned")
    assert planned["step"] == HALF
    assert {"data", "model"} <= set(re.findall(r"[a-z_]+", planned["change"]))
    assert read_metrics(tmp_path / "two").of_kind("rewind") == []
    (line,) = check_ledger(tmp_path / "two")
    assert line.endswith(f"steps {HALF} to {HALF + 2}, samples {8 * HALF} to {8 * HALF + 12}, all as in the shards"), line
    used = [tokens_of(tmp_path / name) for name in ("one", "two")]
    assert len(used[0] | used[1]) == 32 * 8 * HALF + 64 * 12 == len(used[0]) + len(used[1])


def tokens_of(run_dir: Path) -> set[int]:
    """Numbers of the tokens that a run's ledger says were inputs, up to the step that the other run begins with."""
    entries, data_at = _open_run(run_dir)
    found: list[int] = []
    for entry in entries if run_dir.name == "two" else entries[:HALF]:
        mixture = data_at(entry)
        for first, last in entry.ranges():
            for index in range(first, last):
                dataset: Any = mixture.datasets[0]
                token = dataset.first_token(mixture.locate(index)[1])
                found += range(token, token + dataset.seq_len)
    assert len(set(found)) == len(found)
    return set(found)


def ledger(run_dir: Path) -> list[tuple[int, int, int, int]]:
    return [(entry.step, entry.first_sample, entry.num_samples, entry.fed_hash) for entry in read_ledger(run_dir)]


def by_step(run_dir: Path, kind: str, key: str) -> dict[int, Any]:
    return {row["step"]: row[key] for row in read_metrics(run_dir).of_kind(kind)}
