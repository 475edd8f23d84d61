"""The portable checkpoint: any layout reads any other's; torn, changed and stale ones are found. Its benchmarks, in short."""

import math
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_matrix import matrix
from random_models import random_gpt
from ranks import run_ranks
from torn_writes import damage, in_a_small_disk, kill_and_restart, load_whole, write_good_run
from toy import MODEL, engines_on, make_engine
from whole_model import WholeModel

from megagpt.checkpoint import new_rows
from megagpt.checkpoint import save_load as checkpoint
from megagpt.checkpoint.new_rows import NewRows, read_with_new_rows
from megagpt.checkpoint.on_disk import list_checkpoints, step_of, verify
from megagpt.checkpoint.ownership import take_ownership
from megagpt.checkpoint.partitions import CheckpointError, index_of, read_partitions
from megagpt.checkpoint.save_load import Saver
from megagpt.config import UserError
from megagpt.data.state import TrainState
from megagpt.distributed.world import World, lone_world
from megagpt.engine.base import Partition
from megagpt.engine.initial_weights import draw_weights
from megagpt.files import read_json, sha256_file, write_json

ALONE = lone_world(torch.device("cpu"))


@pytest.mark.slow
def test_every_layout_reads_what_every_layout_wrote(tmp_path: Path) -> None:
    """The short form of tests/soak/checkpoint_matrix.py, which has every engine on 1 to 4 ranks, each with each."""
    layouts = {1: ["zero0", "fsdp"], 2: engines_on(2), 3: ["zero2", "zero3", "fsdp"], 4: ["zero1", "hsdp"]}
    writers, readers = matrix(tmp_path, ["adamw_untied", "muon_tied"], 3, layouts, (2,))
    assert len(writers) == 2 * (2 + 7 + 3 + 2)
    for row in writers:
        assert row["tensors_bitwise"] == row["tensors"] > 0, row
        # fp32 sums in another order: a few 1e-7; Muon orthogonalises in bf16, where the last bits of a sum count for more
        assert row["max_loss_difference"] < (1e-5 if row["variant"] == "muon_tied" else 1e-6), row
    assert [row["differing"] for row in readers] == [[]] * (7 + 7)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["background", "replacement"])
def test_killed_at_any_moment_a_good_checkpoint_is_left(mode: str, tmp_path: Path) -> None:
    found = kill_and_restart(tmp_path, mode, 4, random.Random())
    print(found)
    assert found["wrong"] == []
    assert found["restarts_that_loaded"] == 4


def test_damage_is_named_and_the_previous_checkpoint_used(tmp_path: Path) -> None:
    for row in damage(tmp_path, 2, random.Random(0)):
        right = row.get("the one before was loaded, the file named", 0) + row.get("loaded, and every element right", 0)
        assert right == row["times"], row
        if row["file"] != "manifest.json":  # of which a bit may be flipped in a blank
            assert "loaded, and every element right" not in row


@pytest.mark.slow
def test_a_full_disk_ends_a_save_and_leaves_what_was_there(tmp_path: Path) -> None:
    found = in_a_small_disk(tmp_path / "small", 5, seed=1)
    assert found["wrong"] == []
    assert found.get("refused: no space", 0) + found.get("saved", 0) == 5
    assert found["refused: no space"] > 0


def test_without_any_good_checkpoint_training_does_not_start_afresh(tmp_path: Path) -> None:
    write_good_run(tmp_path)
    for path in list_checkpoints(tmp_path):
        (path / "pieces_00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is good: .*pieces_00001.safetensors: missing"):
        checkpoint.newest_good(tmp_path, ALONE)


def save_as_ghost(world: World, run_dir: Path) -> str:
    """A rank that was started before somebody else claimed the run."""
    engine = make_engine(world, "fsdp")
    draw_weights(engine, MODEL, seed=2)
    attempt = take_ownership(run_dir, world)
    write_json(run_dir / "owner.json", {**read_json(run_dir / "owner.json"), "incarnation": attempt + 1})
    with pytest.raises(UserError) as raised:
        Saver(run_dir, world, attempt).save(engine, TrainState(step=9), {})
    return str(raised.value)


@pytest.mark.slow
def test_a_ghost_of_an_earlier_start_cannot_commit(tmp_path: Path) -> None:
    messages = run_ranks(save_as_ghost, 2, tmp_path / "ranks", tmp_path / "run")
    assert all("a later start has taken this run over" in message for message in messages)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_start_that_loses_the_run_while_it_writes_cannot_commit(tmp_path: Path) -> None:
    attempt, temporary = take_ownership(tmp_path, ALONE), tmp_path / "checkpoints" / "tmp_1_step_00000001"
    temporary.mkdir(parents=True)
    take_ownership(tmp_path, ALONE)
    temporary.mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match="a later start owns this run"):
        checkpoint._commit(tmp_path, temporary, temporary.with_name("step_00000001"), {}, {}, attempt)
    assert not temporary.with_name("step_00000001").exists()


def test_what_comes_after_a_save_is_left_out_by_a_start_that_has_lost_the_run(tmp_path: Path) -> None:
    saver, done = Saver(tmp_path, ALONE, take_ownership(tmp_path, ALONE)), []
    saver.then(lambda: done.append("mine"))
    take_ownership(tmp_path, ALONE)
    saver.then(lambda: done.append("late"))
    assert done == ["mine"]


def steps_of(run_dir: Path) -> list[int]:
    return [step_of(path) for path in list_checkpoints(run_dir)]


def test_prune_keeps_the_newest_the_best_and_the_round_ones(tmp_path: Path) -> None:
    write_good_run(tmp_path, (2, 4, 6, 8, 10))
    assert checkpoint.mark_best(tmp_path, 4, 2.5)
    assert not checkpoint.mark_best(tmp_path, 8, 2.5)
    assert not checkpoint.mark_best(tmp_path, 10, math.nan)
    assert not checkpoint.mark_best(tmp_path, 10, 3.0)
    checkpoint.prune(tmp_path, keep_last=1, keep_every_steps=6, in_use={8})
    assert steps_of(tmp_path) == [4, 6, 8, 10]
    checkpoint.prune(tmp_path, keep_last=1, keep_every_steps=6)
    assert steps_of(tmp_path) == [4, 6, 10]


def test_a_deletion_that_was_killed_is_finished_and_counts_for_nothing(tmp_path: Path) -> None:
    write_good_run(tmp_path, (1, 2, 3))
    for step in (1, 3):
        (tmp_path / "checkpoints" / f"step_0000000{step}" / "manifest.json").unlink()
    checkpoint.prune(tmp_path, keep_last=1)
    assert steps_of(tmp_path) == [2]


def test_what_was_being_replaced_is_put_back(tmp_path: Path) -> None:
    """Between the two renames of a replacement the only checkpoint is under a temporary name."""
    write_good_run(tmp_path, (5,))
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_00000005", folder / "tmp_1_step_00000005")
    (folder / "step_00000005").rename(folder / "tmp_1_old_step_00000005")
    take_ownership(tmp_path, ALONE)
    assert [path.name for path in folder.iterdir()] == ["step_00000005"]
    assert load_whole(tmp_path) == (5, ())


NORM = 256
"""Elements of param.norm.weight in tests/soak/torn_writes.py's model."""


class Held:
    """What restore needs of an engine, for one tensor: no process group, no model."""

    def __init__(self) -> None:
        self.updates, self.partition = 0, Partition(torch.zeros(NORM), 0, NORM)

    def state(self) -> dict[str, Partition]:
        return {"param.norm.weight": self.partition}

    def refresh(self, updates: int) -> None:
        self.updates = updates


def mark(run_dir: Path, step: int, **fields: Any) -> None:
    """Put fields into a checkpoint's state.json and seal it again."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    write_json(path / "state.json", {**read_json(path / "state.json"), "updates": step, **fields})
    partitions = list(path.glob("pieces_*"))
    checkpoint.seal(path, {file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)} for file in partitions})


def restore(run_dir: Path, step: int | None = None) -> int:
    attempt = take_ownership(run_dir, ALONE)
    restored = checkpoint.restore(run_dir, Held(), ALONE, step=step, attempt=attempt)  # type: ignore[arg-type]
    assert restored is not None
    return restored.state.step


def test_a_course_that_is_given_up_is_set_aside(tmp_path: Path) -> None:
    """Going back to step 4: newer checkpoints neither count as newest nor as best; a second start goes on from its own."""
    write_good_run(tmp_path, (2, 4, 6, 8))
    for step, loss in ((2, 2.0), (4, 3.0), (6, 1.0), (8, 1.5)):
        mark(tmp_path, step, config={"resume_step": None}, validation_loss=loss)
        checkpoint.mark_best(tmp_path, step, loss)
    assert restore(tmp_path, step=4) == 4
    assert steps_of(tmp_path) == [2, 4]
    assert read_json(tmp_path / "checkpoints" / "best.json") == {"step": 2, "validation_loss": 2.0}
    aside = sorted(path.name for path in (tmp_path / "checkpoints").glob("aside_*"))
    assert aside == ["aside_1_step_00000006", "aside_1_step_00000008"]
    write_good_run(tmp_path, (6,))
    mark(tmp_path, 6, config={"resume_step": 4})
    assert restore(tmp_path, step=4) == 6
    assert restore(tmp_path) == 6
    assert steps_of(tmp_path) == [2, 4, 6]
    checkpoint.prune(tmp_path, keep_last=1)  # the best, of step 2, stays too
    assert restore(tmp_path, step=4) == 6
    with pytest.raises(UserError, match="there is no checkpoint of step 3"):
        restore(tmp_path, step=3)


def test_a_damaged_newest_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    write_good_run(tmp_path, (2, 4))
    mark(tmp_path, 2)
    os.truncate(tmp_path / "checkpoints" / "step_00000004" / "pieces_00000.safetensors", 9)
    assert restore(tmp_path) == 2
    write_good_run(tmp_path, (3,))
    checkpoint.prune(tmp_path, keep_last=1)
    assert steps_of(tmp_path) == [3]


class Payload:
    """Unpickled it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pieces_00000.safetensors", "state.json", "manifest.json"])
def test_no_code_is_run_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    """A pickle in the place of a file, with a manifest that says that it belongs there."""
    write_good_run(tmp_path, (1,))
    path, proof = tmp_path / "checkpoints" / "step_00000001", tmp_path / "ran"
    (path / name).write_bytes(pickle.dumps(Payload(proof)))
    if name != "manifest.json":
        mine = {file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)} for file in path.glob("pieces_*")}
        checkpoint.seal(path, mine)
        assert verify(path) == []
    with pytest.raises((CheckpointError, UserError), match=name):
        load_whole(tmp_path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    write_good_run(tmp_path, (1, 2))
    path = tmp_path / "checkpoints" / "step_00000002"
    shutil.copy(path / "pieces_00000.safetensors", path / "pieces_00002.safetensors")
    assert verify(path) == [f"{path}/pieces_00002.safetensors: is not in the manifest"]
    assert load_whole(tmp_path)[0] == 1


def test_what_is_verified_and_read_of_a_checkpoint_is_progress(tmp_path: Path) -> None:
    world = lone_world(torch.device("cpu"))
    (tmp_path / "file").write_bytes(bytes(33 << 20))
    sha256_file(tmp_path / "file", world.progress)
    assert world.progress.count == 2
    write_good_run(tmp_path, (1,))
    path = tmp_path / "checkpoints" / "step_00000001"
    lengths = {key: sum(run.length for run in runs) for key, runs in index_of(path).items()}
    read_partitions(path, {key: Partition(torch.empty(length), 0, length) for key, length in lengths.items()}, world)
    assert world.progress.count >= 2 + len(lengths) > 2


def test_what_is_verified_together_is_progress(tmp_path: Path) -> None:
    """Of a checkpoint with one large file, which takes long to read."""
    world, path = lone_world(torch.device("cpu")), tmp_path / "checkpoints" / "step_00000001"
    path.mkdir(parents=True)
    large = path / "pieces_00000.safetensors"
    large.write_bytes(bytes(33 << 20))
    write_json(path / "state.json", {"train_state": TrainState(step=1).to_json(), "updates": 1})
    checkpoint.seal(path, {large.name: {"size": large.stat().st_size, "sha256": sha256_file(large)}})
    assert checkpoint.newest_good(tmp_path, world) == (path, ())
    assert world.progress.count == 2


def test_the_mean_of_the_old_rows_is_read_with_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_rows, "ROWS_AT_A_TIME", 8)
    saver = Saver(tmp_path, ALONE, take_ownership(tmp_path, ALONE))
    saver.save(WholeModel(random_gpt()), TrainState(step=1), {})  # type: ignore[arg-type]
    world, path = lone_world(torch.device("cpu")), tmp_path / "checkpoints" / "step_00000001"
    larger = WholeModel(random_gpt(vocab_size=70)).state()
    wanted = {"param.embedding.weight": larger["param.embedding.weight"]}
    read_with_new_rows(path, wanted, NewRows(64, 32), world, index_of(path))
    assert world.progress.count == 1 + 64 // 8, "the old rows, and their mean in slices"


def test_elements_that_nobody_wrote_are_missed(tmp_path: Path) -> None:
    write_good_run(tmp_path, (1,))
    with pytest.raises(CheckpointError, match=r"holds 256 of the 300 elements of param.norm.weight"):
        read_partitions(tmp_path / "checkpoints" / "step_00000001", {"param.norm.weight": Partition(torch.empty(300), 0, 300)})
