"""A step that is judged after the next one was launched: the same run, and nothing waits for the device inside a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import STEPS, losses, settings, start, stop_one_of_two

from megagpt.command import EXIT_DONE
from megagpt.data.loader import MicroBatch
from megagpt.data.sample_ledger import read_ledger
from megagpt.files import read_json
from megagpt.monitor.metrics import read_metrics
from megagpt.train.feed import Feed

FAULTS = Path(__file__).resolve().parents[1] / "support" / "faults"


def weights(run_dir: Path) -> bytes:
    """All of the newest checkpoint's weights and states."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    return b"".join(path.read_bytes() for path in sorted(newest.glob("pieces_*")))


def facts(run_dir: Path) -> dict[str, Any]:
    """What must not depend on when steps are judged."""
    metrics = read_metrics(run_dir)
    kinds = ("planned", "skip", "rewind", "train", "evaluate", "save")
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "bad_step", "reason", "skipped")
    rows = {kind: [[row.get(key) for key in keys] for row in metrics.of_kind(kind)] for kind in kinds}
    return rows | {"ledger": read_ledger(run_dir), "weights": weights(run_dir)}


@pytest.mark.slow
def test_a_poisoned_run_is_the_same_when_judged_late(
    project: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spikes in a step whose successor is launched already, and in one before a checkpoint, which is judged at once."""
    monkeypatch.setenv("PYTHONPATH", str(FAULTS))
    monkeypatch.setenv("FAULTS", json.dumps([{"kind": "poisoned", "windows": [[24, 26], [41, 42]], "batch": 8}]))
    guard = {"window_steps": 24, "min_steps": 12, "skip_steps": 2}
    optim = {"lr": 3e-3, "schedule": {"warmup_steps": 4}}
    changes = {"max_steps": 44, "guard": guard, "optim": optim, "engine": {"kind": "fsdp"}, "evaluate_every_steps": 22}
    found = {}
    for when in ("at_once", "late"):
        values = settings(shards, tmp_path / when / "run", **changes) | {"save_every_steps": 10, "read_results": when}
        ranks = start(project, tmp_path / when, values)
        assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
        found[when] = facts(tmp_path / when / "run") | {"left out": read_json(tmp_path / when / "run" / "skipped.json")}
    assert [row[5] for row in found["late"]["rewind"]] == [24, 39], "in between, and the one that a checkpoint follows"
    for key, value in found["at_once"].items():
        assert found["late"][key] == value, key


@pytest.mark.slow
def test_told_to_stop_while_a_step_is_unjudged_it_saves_that_step(shards: Path, project: Path, tmp_path: Path) -> None:
    """One rank gets the signal between checkpoints; the checkpoint has all that was launched, and the run goes on from it."""
    values = settings(shards, tmp_path / "run", engine={"kind": "fsdp"}, read_results="late", save_every_steps=100)
    values |= {"evaluate_every_steps": 0}
    ranks = start(project, tmp_path, values)
    done = stop_one_of_two(ranks, tmp_path / "run")
    assert done < STEPS
    saved = read_json(tmp_path / "run" / "checkpoints" / f"step_{done:08d}" / "state.json")
    assert (saved["train_state"]["step"], saved["updates"]) == (done, done)
    assert len(saved["guard"]["loss"]) == done, "every step in the checkpoint is judged"
    ranks = start(project, tmp_path, values)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert sorted(losses(tmp_path / "run")) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_nothing_is_fetched_between_the_first_launch_of_a_step_and_the_last(
    shards: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAULTS))
    found = {}
    for name, changes in {"adamw": {}, "canonical": {"determinism": "canonical"}}.items():
        monkeypatch.setenv("FAULTS", json.dumps([{"kind": "count_fetches", "counts": str(tmp_path / name / "counts")}]))
        values = settings(shards, tmp_path / name / "run", max_steps=6, engine={"kind": "fsdp"}, **changes)
        # Losses by source, which only a mixture has, wait for nothing either.
        values["data"] = {**values["data"], "sources": {"a": {"path": str(shards)}, "b": {"path": str(shards)}}}
        ranks = start(project, tmp_path / name, values | {"read_results": "late", "evaluate_every_steps": 0})
        assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
        found[name] = [json.loads(line) for line in (tmp_path / name / "counts").read_text().splitlines()]
    assert found["adamw"] == [[]] * 6
    assert all(found["canonical"]), "the counter sees what the host decides"


def test_a_feed_gives_every_micro_batch_in_order() -> None:
    batches = [
        MicroBatch(torch.full((2, 4), i), torch.full((2, 4), i + 1), torch.full((2, 1), 4) if i % 2 else None, i, 8)
        for i in range(5)
    ]
    feed = Feed(torch.device("cpu"))
    assert list(feed([])) == []
    for number, (batch, (ids, targets, lengths, _)) in enumerate(feed(batches)):
        assert batch is batches[number]
        assert torch.equal(ids, batches[number].ids)
        assert torch.equal(targets, batches[number].targets)
        assert (lengths is None) == (number % 2 == 0)
