"""Looking after the checkpoints of a real run: what retention leaves, listing, verifying, pruning, averaging, going back."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_checkpoints import run as show
from small_run import settings, start, write_shards

from megagpt.checkpoint.admin import InspectConfig
from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.on_disk import list_checkpoints, step_of, verify
from megagpt.command import EXIT_CRASH, EXIT_DONE, run_words
from megagpt.files import read_json
from megagpt.monitor.metrics import read_metrics

CHANGES: dict[str, Any] = {
    "max_steps": 12,
    "save_every_steps": 2,
    "evaluate_every_steps": 2,
    "keep_last": 2,
    "keep_every_steps": 4,
    "engine": {"kind": "fsdp"},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(shards: Path, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    ranks = start(project, folder, settings(shards, folder / "run", **CHANGES), 1)
    assert ranks.wait() == [EXIT_DONE], ranks.output()
    return folder / "run"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def steps_of(run_dir: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run_dir)]


def inspect(*words: str) -> int:
    return run_words(InspectConfig, show, "", list(words))


@pytest.mark.slow
def test_a_run_keeps_its_newest_its_best_and_round_ones(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {row["step"]: row["loss"] for row in read_metrics(run_dir).of_kind("evaluate")}
    best = min(losses, key=lambda step: (losses[step], step))
    assert sorted(losses) == [2, 4, 6, 8, 10, 12]
    assert steps_of(run_dir) == sorted({4, 8, 12, 10, best})
    assert inspect(f"run_dir={run_dir}", "verify=true") == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert [f"step_{step:08d}" in line for step, line in zip(steps_of(run_dir), lines, strict=True)] == [True] * len(lines)
    assert all(line.endswith("  good") for line in lines)
    assert [f"validation loss {losses[best]:.4f}  best" in line for line in lines].count(True) == 1


@pytest.mark.slow
def test_verify_finds_damage_and_prune_deletes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(list_checkpoints(run_dir)[0] / "pieces_00000.safetensors", 100)
    assert inspect(f"run_dir={run_dir}") == EXIT_DONE  # nothing was asked to be read
    assert inspect(f"run_dir={run_dir}", "verify=true") == EXIT_CRASH
    assert "step_00000004/pieces_00000.safetensors: 100 bytes, the manifest says" in capsys.readouterr().out
    best = read_json(run_dir / "checkpoints" / "best.json")["step"]
    assert inspect(f"run_dir={run_dir}", "prune=true", "keep_last=1", "verify=true") == EXIT_DONE
    assert steps_of(run_dir) == sorted({12, best})


@pytest.mark.slow
def test_average_is_the_mean_of_the_weights(run_dir: Path, tmp_path: Path) -> None:
    assert inspect(f"run_dir={run_dir}", "average=[8,12]", f"output_dir={tmp_path / 'mean'}") == EXIT_DONE
    first, second, mean = (
        load_model(folder, step).model.state_dict() for folder, step in ((run_dir, 8), (run_dir, 12), (tmp_path / "mean", 12))
    )
    for name, value in mean.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(first[name], value) for name, value in mean.items())


@pytest.mark.slow
def test_going_back_to_a_step_gives_up_what_came_after(run_dir: Path, shards: Path, project: Path, tmp_path: Path) -> None:
    """With resume_step a run sets newer checkpoints aside; the same command again goes on with the new course."""
    values = settings(shards, run_dir, **CHANGES | {"max_steps": 10, "keep_last": 1, "keep_every_steps": 0}, resume_step=8)
    ranks = start(project, tmp_path, values, 1)
    assert ranks.wait() == [EXIT_DONE], ranks.output()
    assert [path.name for path in sorted((run_dir / "checkpoints").glob("aside_*"))] == [
        "aside_2_step_00000010",
        "aside_2_step_00000012",
    ]
    assert steps_of(run_dir)[-1] == 10
    assert inspect(f"run_dir={run_dir}", "verify=true") == EXIT_DONE
    ranks = start(project, tmp_path, {**values, "max_steps": 11}, 1)
    assert ranks.wait() == [EXIT_DONE], ranks.output()
    starts = read_metrics(run_dir).of_kind("start")
    assert [row["step"] for row in starts[1:]] == [8, 10]
    assert inspect(f"run_dir={run_dir}", "prune=true") == EXIT_DONE
    assert list((run_dir / "checkpoints").glob("aside_*")) == []
    assert verify(list_checkpoints(run_dir)[-1]) == []
