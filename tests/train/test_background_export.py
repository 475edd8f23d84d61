"""Exports beside training: the loop neither waits for them nor notices what goes wrong with them."""

import os
import signal
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from random_models import random_gpt
from ranks import wait_until
from safetensors.torch import load_file
from small_run import losses, settings, start
from whole_model import WholeModel

from megagpt.checkpoint import save_load
from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.on_disk import list_checkpoints, step_of
from megagpt.checkpoint.partitions import write_partitions
from megagpt.checkpoint.save_load import Saver
from megagpt.command import EXIT_DONE, EXIT_STOPPED
from megagpt.config import UserError, validate
from megagpt.data.state import TrainState
from megagpt.distributed.world import lone_world
from megagpt.files import read_json, sha256_file, write_json
from megagpt.model.gpt import ModelConfig
from megagpt.monitor.config import MonitorConfig
from megagpt.monitor.metrics import read_metrics
from megagpt.monitor.monitor import Monitor
from megagpt.train import background_export
from megagpt.train.background_export import BackgroundExports, refuse_exports

TOOL = """
import hashlib, json, os, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:])
temporary = os.path.join(os.path.dirname(words["output_dir"]), f".tmp-{os.path.basename(words['output_dir'])}-{os.getpid()}")
os.mkdir(temporary)
if os.path.exists(os.path.join(words["run_dir"], "refuse")):
    sys.exit("error: the logits differ")
while os.path.exists(os.path.join(words["run_dir"], "hold")):
    time.sleep(0.01)
checkpoint = os.path.join(words["run_dir"], "checkpoints", os.path.basename(words["output_dir"]))
digest = hashlib.sha256(open(os.path.join(checkpoint, "manifest.json"), "rb").read()).hexdigest()
record = {"source": {"manifest_sha256": digest}, "nice": os.nice(0), "seen": sorted(os.environ)}
json.dump(record, open(os.path.join(temporary, "checked.json"), "w"))
os.rename(temporary, words["output_dir"])
"""
"""Writes as export_model does, and waits while there is a file `hold`: the order of events is the test's."""


class Background:
    """Exports of a run directory by TOOL, with a checkpoint of a manifest alone for each step."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        for step in (2, 4, 6):
            self.commit(step, f"first {step}")
        write_json(run_dir / "owner.json", {"incarnation": 1})
        self.monitor = Monitor(run_dir, MonitorConfig(), run_config={}, rank=0)
        self.world = lone_world(torch.device("cpu"))
        self.exports = BackgroundExports(run_dir, self.world, self.monitor, 1, every_steps=2, keep_last=2)

    def commit(self, step: int, text: str) -> None:
        write_json(self.run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json", {"text": text})

    def rows(self) -> list[tuple[int, str]]:
        return [(row["of_step"], row["status"]) for row in read_metrics(self.run_dir).of_kind("export")]

    def names(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "exports").iterdir())

    def hold(self) -> None:
        (self.run_dir / "hold").touch()

    def release(self) -> None:
        (self.run_dir / "hold").unlink()


@pytest.fixture
def background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    (tmp_path / "tool.py").write_text(TOOL)
    monkeypatch.setattr(background_export, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(background_export, "tool_file", lambda name: {"export_model": tmp_path / "tool.py"}[name])
    made = Background(tmp_path / "run")
    with made.exports:
        yield made
    made.monitor.close()


def test_one_at_a_time_and_the_newest_waits(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "PMIX_RANK"):
        monkeypatch.setenv(name, "1")
    exports = background.exports
    background.hold()
    exports.catch_up(3)
    wait_until(lambda: exports.in_use() == {2} and any(background.run_dir.glob("exports/.tmp-*")))
    for step in (4, 6):
        exports.catch_up(step)
    assert exports.in_use() == {2, 6}
    exports.look(6)
    assert background.rows() == [(4, "left out")]
    background.release()
    exports.wait(7)
    assert background.rows() == [(4, "left out"), (2, "written"), (6, "written")]
    assert background.names() == ["step_00000002", "step_00000006"]
    assert exports.in_use() == set()
    made = read_json(background.run_dir / "exports" / "step_00000006" / "checked.json")
    assert made["nice"] == os.nice(0) + 10
    assert not {"RANK", "WORLD_SIZE", "PMIX_RANK"} & set(made["seen"])


def test_what_there_is_stays_and_another_branch_replaces_it(background: Background) -> None:
    exports = background.exports
    for step in (2, 4, 4):
        exports.catch_up(step)
        exports.wait(step)
    assert background.rows() == [(2, "written"), (4, "written")]
    background.commit(4, "after a rewind")
    for step in (4, 6):
        exports.catch_up(step)
        exports.wait(step)
    assert background.names() == ["step_00000004", "step_00000006"], "the last two that were made"
    manifest = background.run_dir / "checkpoints" / "step_00000004" / "manifest.json"
    replaced = read_json(background.run_dir / "exports" / "step_00000004" / "checked.json")
    assert replaced["source"]["manifest_sha256"] == sha256_file(manifest)


def test_a_checkpoint_is_committed_before_its_export_begins_and_the_next_one_while_it_is_made(
    background: Background, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    disk, exports, checkpoints = threading.Event(), background.exports, background.run_dir / "checkpoints"

    def write_slowly(*arguments: Any) -> Any:
        disk.wait()
        return write_partitions(*arguments)

    monkeypatch.setattr(save_load, "write_partitions", write_slowly)
    saver, engine = Saver(background.run_dir, lone_world(torch.device("cpu")), 1, background=True), WholeModel(random_gpt())
    background.hold()
    for finish in (saver.close, lambda: (background.run_dir / "hold").unlink(missing_ok=True), disk.set):  # the last one first
        request.addfinalizer(finish)
    saver.save(engine, TrainState(step=8), {})  # type: ignore[arg-type]
    exports.after(saver, 8)
    assert exports.in_use() == set(), "it has begun before there is a checkpoint"
    disk.set()
    wait_until(lambda: exports.in_use() == {8})
    assert (checkpoints / "step_00000008" / "manifest.json").is_file()
    saver.save(engine, TrainState(step=10), {})  # type: ignore[arg-type]
    exports.after(saver, 10)
    wait_until(lambda: (checkpoints / "step_00000010" / "manifest.json").is_file())
    wait_until(lambda: exports.in_use() == {8, 10})
    background.release()
    exports.wait(11)
    assert background.rows() == [(8, "written"), (10, "written")]


def test_a_refusal_is_a_row(background: Background) -> None:
    (background.run_dir / "refuse").touch()
    background.exports.catch_up(2)
    background.exports.wait(3)
    [row] = read_metrics(background.run_dir).of_kind("export")
    assert (row["step"], row["of_step"], row["status"]) == (3, 2, "failed")
    assert row["message"].startswith("status 1: error: the logits differ (see ")
    assert background.names() == ["step_00000002.log"]


def test_the_end_leaves_nothing_half_written(background: Background) -> None:
    exports = background.exports
    background.hold()
    exports.catch_up(2)
    wait_until(lambda: any(background.run_dir.glob("exports/.tmp-*")))
    [temporary] = background.run_dir.glob("exports/.tmp-*")
    exports.catch_up(4)
    exports.begin_to_end()  # what a stop does before it saves
    wait_until(lambda: exports.in_use() == set())
    exports.end()
    assert not psutil.pid_exists(int(temporary.name.rpartition("-")[2]))
    exports.catch_up(6)
    exports.wait(6)
    assert background.rows() == [(2, "ended")]
    assert background.names() == []


def test_what_hangs_is_ended(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = background.exports
    background.hold()
    exports.catch_up(2)
    wait_until(lambda: any(background.run_dir.glob("exports/.tmp-*")))
    monkeypatch.setattr(background_export, "STALL_SECONDS", 0.5)
    [temporary] = background.run_dir.glob("exports/.tmp-*")
    psutil.Process(int(temporary.name.rpartition("-")[2])).send_signal(signal.SIGSTOP)
    exports.wait(3)
    assert background.world.progress.count > 0, "the wait is no hang: the export's own thread ends what hangs"
    assert background.rows() == [(2, "failed")]
    assert background.names() == ["step_00000002.log"]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ({"family": "gpt2", "qk_norm": True}, "export_every_steps: family=gpt2 with qk_norm=True"),
        ({"qkv_bias": True, "qk_norm": True}, "export_every_steps: qk_norm=true with qkv_bias=true"),
    ],
)
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs megagpt[convert]")
def test_a_model_that_no_export_can_hold_is_refused(model: dict[str, Any], match: str) -> None:
    sizes = {"vocab_size": 257, "seq_len": 32, "num_layers": 1, "num_heads": 2, "hidden_size": 32}
    with pytest.raises(UserError, match=match):
        refuse_exports(validate(ModelConfig, {**sizes, **model}, source="test"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs megagpt[convert]")
def test_a_stop_saves_the_step_before_it_waits_for_the_end_of_an_export(shards: Path, project: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 100_000, "save_every_steps": 50, "export_every_steps": 50, "evaluate_every_steps": 0}
    ranks = start(project, tmp_path, settings(shards, tmp_path / "run", engine={"kind": "fsdp"}, **changes), 1)
    wait_until(lambda: any((tmp_path / "run" / "exports").glob("*.log")) or ranks.processes[0].poll() is not None)
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [EXIT_STOPPED], ranks.output()
    *_, save, export, stop = read_metrics(tmp_path / "run").all_rows
    assert [row["kind"] for row in (save, export, stop)] == ["save", "export", "stop"]
    assert (export["of_step"], export["status"]) == (50, "ended")
    assert save["step"] == stop["step"] == step_of(list_checkpoints(tmp_path / "run")[-1])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs megagpt[convert]")
def test_a_run_exports_beside_its_training(shards: Path, project: Path, tmp_path: Path) -> None:
    plain = settings(shards, tmp_path / "plain", max_steps=6, save_every_steps=2, keep_last=1, engine={"kind": "fsdp"})
    exporting = {**plain, "run_dir": str(tmp_path / "exporting"), "export_every_steps": 4}
    started = [start(project, tmp_path / f"start_{i}", values, 1) for i, values in enumerate((plain, exporting))]
    assert [ranks.wait() for ranks in started] == [[EXIT_DONE]] * 2, started[1].output()
    run = tmp_path / "exporting"
    assert len(losses(run)) == 6
    assert losses(run) == losses(tmp_path / "plain")
    [row] = read_metrics(run).of_kind("export")
    export = run / "exports" / "step_00000004"
    assert (row["step"], row["of_step"], row["status"], row["message"]) == (6, 4, "written", str(export))
    assert [path.name for path in (run / "exports").iterdir()] == ["step_00000004"]
    assert (run / "checkpoints" / "step_00000004").is_dir(), "it stayed while it was exported"
    ours = load_model(run, 4).model.state_dict()
    theirs = load_file(export / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(theirs, ours["embedding.weight"][: len(theirs)].to(torch.bfloat16))
