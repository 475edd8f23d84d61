"""The portable checkpoint: any layout reads any other's; torn, changed and stale ones are found."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from toy import ADAMW, MODEL, SGD, make_engine, train_steps

from megagpt import checkpoint
from megagpt.checkpoint import Saver
from megagpt.data import TrainState
from megagpt.engine import draw_weights
from megagpt.files import read_json, write_json
from megagpt.optim import OptimConfig
from megagpt.pieces import CheckpointError, index_of
from megagpt.world import World, lone_world

INFO: dict[str, Any] = {"model": MODEL.model_dump(mode="json"), "config": {}, "data_fingerprint": "x"}


def write_and_continue(
    world: World, run_dir: Path, engine_name: str, optim: OptimConfig, steps: tuple[int, ...]
) -> list[float]:
    """Train to each of `steps`, save there, then the next 10 losses."""
    engine = make_engine(world, engine_name, optim)
    draw_weights(engine, MODEL, seed=1)
    incarnation = checkpoint.claim_run(run_dir, world)
    saver = Saver(run_dir, world, incarnation, background=True)
    done = 0
    for step in steps:
        train_steps(engine, world, range(done, step), optim)
        saver.save(engine, TrainState(step=step), INFO)
        done = step
    saver.close()
    return train_steps(engine, world, range(done, done + 10), optim)


def read_and_continue(
    world: World, run_dir: Path, copy: Path, engine_name: str, optim: OptimConfig
) -> tuple[int, list[float], Any]:
    """Restore, save again under `copy`, then the next 10 losses."""
    engine = make_engine(world, engine_name, optim)
    restored = checkpoint.restore(run_dir, engine, world)
    assert restored is not None
    incarnation = checkpoint.claim_run(copy, world)
    Saver(copy, world, incarnation).save(engine, restored.state, INFO)
    losses = train_steps(engine, world, range(restored.state.step, restored.state.step + 10), optim)
    return restored.state.step, losses, restored.passed_over


def whole_tensors(path: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint put together from its files, as bytes."""
    import numpy as np
    from safetensors import safe_open

    index = index_of(path)
    result = {}
    for key, runs in index.items():
        full = np.full(sum(run.length for run in runs), np.nan, dtype=np.float32)
        for run in runs:
            with safe_open(path / run.file, framework="np") as file:
                full[run.start : run.start + run.length] = file.get_tensor(key)
        result[key] = full.tobytes()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("optim", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_zero_2_on_two_ranks_goes_on_on_any_layout(optim: OptimConfig, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    expected = run_ranks(write_and_continue, 2, tmp_path / "a", run_dir, "zero2", optim, (5,))[0]
    written = whole_tensors(run_dir / "checkpoints" / "step_00000005")
    for name, size in (("zero1", 1), ("zero3", 3), ("zero0", 2), ("fsdp", 3), ("hsdp", 4)):
        copy = tmp_path / f"copy_{name}"
        step, losses, _ = run_ranks(read_and_continue, size, tmp_path / "b", run_dir, copy, name, optim)[0]
        assert step == 5
        assert whole_tensors(copy / "checkpoints" / "step_00000005") == written
        difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        print(f"{optim.kind}: ZeRO 2 on 2 ranks -> {name} on {size}: {difference:.2e}")
        assert difference < 1e-6  # fp32 sums in another order: a few 1e-7


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_ranks(write_and_continue, 2, folder / "ranks", folder / "run", "zero1", ADAMW, (2, 4))
    return folder / "run"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped bit": (lambda c: flip(c / "pieces_00001.safetensors"), "pieces_00001.safetensors: its sha256"),
    "truncated": (lambda c: (c / "pieces_00000.safetensors").write_bytes(b"short"), "pieces_00000.safetensors: 5 bytes"),
    "missing rank file": (lambda c: (c / "pieces_00001.safetensors").unlink(), "pieces_00001.safetensors: missing"),
    "flipped state": (lambda c: flip(c / "state.json"), "state.json: its sha256"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json: "),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_previous_checkpoint_used(name: str, two_checkpoints: Path, tmp_path: Path) -> None:
    damage, message = DAMAGES[name]
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    damage(run_dir / "checkpoints" / "step_00000004")
    step, _, passed_over = run_ranks(read_and_continue, 1, tmp_path / "r", run_dir, tmp_path / "copy", "zero1", ADAMW)[0]
    assert step == 2
    assert len(passed_over) == 1
    assert message in passed_over[0]
    damage(run_dir / "checkpoints" / "step_00000002")
    with pytest.raises(CheckpointError, match="no checkpoint is good"):
        checkpoint.newest_good(run_dir, lone_world(torch.device("cpu")))


def save_as_ghost(world: World, run_dir: Path) -> str:
    """A rank that was started before somebody else claimed the run."""
    engine = make_engine(world, "zero1")
    draw_weights(engine, MODEL, seed=2)
    incarnation = checkpoint.claim_run(run_dir, world)
    write_json(run_dir / "owner.json", {**read_json(run_dir / "owner.json"), "incarnation": incarnation + 1})
    with pytest.raises(CheckpointError) as raised:
        Saver(run_dir, world, incarnation).save(engine, TrainState(step=9), INFO)
    return str(raised.value)


@pytest.mark.slow
def test_a_ghost_of_an_earlier_start_cannot_commit(tmp_path: Path) -> None:
    messages = run_ranks(save_as_ghost, 2, tmp_path / "ranks", tmp_path / "run")
    assert all("a later start owns this run" in message for message in messages)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_prune_keeps_the_newest_the_best_and_the_round_ones(two_checkpoints: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for step in (2, 4, 6, 8, 10):
        shutil.copytree(two_checkpoints / "checkpoints" / "step_00000002", run_dir / "checkpoints" / f"step_{step:08d}")
    assert checkpoint.mark_best(run_dir, 4, 2.5)
    assert not checkpoint.mark_best(run_dir, 8, 2.5)
    checkpoint.prune(run_dir, keep_last=1, keep_every_steps=6)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run_dir)] == [4, 6, 10]
