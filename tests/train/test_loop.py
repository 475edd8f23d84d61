"""The training loop as a user runs it: stop, kill, resume, another layout, damage, and what is refused."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import Ranks, free_port, run_ranks, wait_until
from small_run import STEPS, losses, settings, start, stop_one_of_two, write_shards
from whole_model import WholeModel

from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.on_disk import list_checkpoints, step_of
from megagpt.checkpoint.ownership import take_ownership
from megagpt.checkpoint.save_load import Saver
from megagpt.command import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR, run_words
from megagpt.config import UserError, validate
from megagpt.data.open_data import DataConfig, open_data
from megagpt.data.sample_hash import recompute_fed_hash
from megagpt.data.sample_ledger import read_ledger
from megagpt.data.state import TrainState
from megagpt.distributed.world import lone_world
from megagpt.files import read_json
from megagpt.model.gpt import GPT
from megagpt.monitor.metrics import read_metrics
from megagpt.report.inspect_data import check_ledger
from megagpt.train import preflight
from megagpt.train.config import TrainConfig
from megagpt.train.data_changes import record_of
from megagpt.train.loop import load_newest, train
from megagpt.train.spike_guard import Guard

FAULTS = Path(__file__).resolve().parents[1] / "support" / "faults"


def assert_ledger_is_complete(values: dict[str, Any]) -> None:
    """Every step once, each with the hash that the shards give: no sample lost, none used twice."""
    data = open_data(DataConfig.model_validate(values["data"]))
    state, size = TrainState(), values["global_batch_size"]
    entries = read_ledger(Path(values["run_dir"]))
    assert [entry.step for entry in entries] == list(range(values["max_steps"]))
    for entry in entries:
        assert (entry.first_sample, entry.num_samples) == (state.samples, size)
        assert entry.fed_hash == recompute_fed_hash(data.train, state, size)
        state = state.advance(size, 0)


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    ranks = start(project, folder, settings(shards, folder / "run"))
    assert ranks.wait() == [EXIT_DONE, EXIT_DONE], ranks.output()
    return folder / "run"


@pytest.mark.slow
def test_a_run_learns_evaluates_and_keeps_its_ledger(uninterrupted: Path, shards: Path) -> None:
    values = losses(uninterrupted)
    assert values[STEPS] < values[1] - 0.5
    evaluations = read_metrics(uninterrupted).of_kind("evaluate")
    assert [row["step"] for row in evaluations] == [8, 16, 24]
    best = read_json(uninterrupted / "checkpoints" / "best.json")
    lowest = min(evaluations, key=lambda row: row["loss"])
    assert (best["step"], best["validation_loss"]) == (lowest["step"], lowest["loss"])
    (score,) = read_json(uninterrupted / "checkpoints" / "step_00000024" / "scores.json").items()
    assert score[0] == best["validation_set"]
    assert score[1]["loss"] == evaluations[-1]["loss"]
    assert "validation_loss" not in read_json(uninterrupted / "checkpoints" / "step_00000024" / "state.json")
    assert_ledger_is_complete(settings(shards, uninterrupted))


@pytest.mark.slow
def test_the_logged_loss_is_the_loss_and_z_loss_a_row_of_its_own(
    uninterrupted: Path, shards: Path, project: Path, tmp_path: Path
) -> None:
    values = settings(shards, tmp_path / "run", max_steps=2, evaluate_every_steps=0)
    values["model"] = {**values["model"], "z_loss": 0.1}
    ranks = start(project, tmp_path, values)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    rows = read_metrics(tmp_path / "run").of_kind("train")
    plain = read_metrics(uninterrupted).of_kind("train")
    assert rows[0]["loss"] == plain[0]["loss"], "the same weights and samples: not one bit of it comes from z_loss"
    assert rows[0]["z_loss"] == pytest.approx(0.1 * np.log(257) ** 2, rel=0.05)  # fresh weights know nothing
    assert "z_loss" not in plain[0]


@pytest.mark.slow
def test_killed_at_a_random_step_it_resumes_bitwise(uninterrupted: Path, shards: Path, project: Path, tmp_path: Path) -> None:
    """kill -9 of all ranks; dropout is on, so its seeds are part of what must come back."""
    kill_at = random.randrange(5, STEPS - 2)
    values = settings(shards, tmp_path / "run")
    ranks = start(project, tmp_path, values)
    wait_until(lambda: len(read_ledger(tmp_path / "run")) >= kill_at and list_checkpoints(tmp_path / "run") != [])
    ranks.send(signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL] * 2
    assert len(read_ledger(tmp_path / "run")) < STEPS
    ranks = start(project, tmp_path, values)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    resumed = [row for row in read_metrics(tmp_path / "run").of_kind("start") if row["resumed"]]
    assert len(resumed) == 1
    assert losses(tmp_path / "run") == losses(uninterrupted)
    assert_ledger_is_complete(values)


@pytest.mark.slow
def test_told_to_stop_it_saves_and_goes_on_with_other_ranks(
    uninterrupted: Path, shards: Path, project: Path, tmp_path: Path
) -> None:
    """One rank of two gets the signal; ZeRO 1 on 2 ranks goes on as ZeRO 3 on 3, with the same data order."""
    values = settings(shards, tmp_path / "run")
    ranks = start(project, tmp_path, values)
    done = stop_one_of_two(ranks, tmp_path / "run")
    assert done < STEPS
    assert (tmp_path / "run" / "checkpoints" / f"step_{done:08d}" / "manifest.json").is_file()
    ranks = start(project, tmp_path, values, 3, "engine.zero_stage=3", "engine.stage3_persistence_elements=0")
    assert ranks.wait() == [EXIT_DONE] * 3, ranks.output()
    assert "engine.zero_stage: 1 -> 3" in ranks.output()
    expected, found = losses(uninterrupted), losses(tmp_path / "run")
    # fp32 sums in another order
    assert max(abs(found[step] - expected[step]) for step in expected) < 1e-5
    assert_ledger_is_complete(values)


def run_under(launcher: str, project: Path, folder: Path) -> subprocess.Popen[bytes]:
    """tools/train_model.py on two ranks under a launcher, as a user starts it; its output goes to folder/launcher.log."""
    port = free_port()
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
    command = {
        "torchrun": ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "--shutdown-timeout=300", signals],
        "deepspeed": ["deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={port}"],
    }[launcher]
    command = [sys.executable, "-m", *command, str(project / "tools" / "train_model.py"), str(folder / "run.yaml")]
    with (folder / "launcher.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "status"), [("torchrun", 1), ("deepspeed", EXIT_STOPPED)])
def test_under_a_launcher_it_is_the_same_run(
    launcher: str, status: int, uninterrupted: Path, shards: Path, project: Path, tmp_path: Path
) -> None:
    """SIGUSR1 to torchrun, which passes it on, or to one of the ranks that deepspeed started; then the same command again."""
    values, run_dir = settings(shards, tmp_path / "run"), tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    process = run_under(launcher, project, tmp_path)
    try:
        wait_until(lambda: len(read_ledger(run_dir)) >= 6 or process.poll() is not None)
        log = (tmp_path / "launcher.log").read_text()
        spawned = [int(pid) for pid in re.findall(r"process (\d+) spawned", log)]
        os.kill(process.pid if launcher == "torchrun" else spawned[1], signal.SIGUSR1)
        # torchrun ends with 1 whatever its ranks end with, and tells it; deepspeed ends as they do.
        assert process.wait(600) == status, (tmp_path / "launcher.log").read_text()
        assert read_metrics(run_dir).all_rows[-1]["kind"] == "stop"
        done = len(read_ledger(run_dir))
        assert 6 <= done < STEPS
        assert (run_dir / "checkpoints" / f"step_{done:08d}" / "manifest.json").is_file()
        process = run_under(launcher, project, tmp_path)
        assert process.wait(600) == EXIT_DONE, (tmp_path / "launcher.log").read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(600)
    assert losses(run_dir) == losses(uninterrupted)
    assert_ledger_is_complete(values)


@pytest.mark.slow
def test_a_second_start_is_refused_and_one_that_takes_over_ends_the_first(
    uninterrupted: Path, shards: Path, project: Path, tmp_path: Path
) -> None:
    values = settings(shards, tmp_path / "run")
    first = start(project, tmp_path / "first", {**values, "max_steps": 100_000}, 2)
    wait_until(lambda: len(list_checkpoints(tmp_path / "run")) > 0)
    second = start(project, tmp_path / "second", values, 2)
    assert second.wait(600) == [EXIT_USER_ERROR] * 2, second.output()
    assert "attempt 1 (host" in second.output()
    assert "is alive: end it first" in second.output()
    assert not any(process.poll() for process in first.processes)
    third = start(project, tmp_path / "third", {**values, "max_steps": 100_000}, 2, "if_running=take_over")
    wait_until(lambda: (tmp_path / "run" / "owner.json").read_text().startswith('{\n "incarnation": 2'))
    begun = time.monotonic()
    assert first.wait(600) == [EXIT_USER_ERROR] * 2, first.output()
    assert time.monotonic() - begun < 30
    assert "Traceback" not in first.output() + first.output(1)
    assert "a later start has taken this run over" in first.output(1)
    third.send(signal.SIGTERM)
    assert third.wait() == [EXIT_STOPPED] * 2, third.output()


@pytest.mark.slow
def test_a_flipped_byte_in_the_newest_checkpoint_costs_steps_not_the_run(
    uninterrupted: Path, shards: Path, project: Path, tmp_path: Path
) -> None:
    values = settings(shards, tmp_path / "run", max_steps=12)
    assert start(project, tmp_path, values).wait() == [EXIT_DONE] * 2
    newest = tmp_path / "run" / "checkpoints" / "step_00000012" / "pieces_00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[-100] ^= 4
    newest.write_bytes(data)
    values["max_steps"] = STEPS
    ranks = start(project, tmp_path, values)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    metrics = read_metrics(tmp_path / "run")
    assert "pieces_00001.safetensors: its sha256" in metrics.of_kind("damaged")[0]["reason"]
    assert [row["step"] for row in metrics.of_kind("start")][-1] == 8


@pytest.mark.slow
def test_a_flipped_byte_in_a_shard_stops_training_by_name(shards: Path, project: Path, tmp_path: Path) -> None:
    copy = write_shards(tmp_path / "corpus")
    path = copy / "train" / "shard_00000.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ranks = start(project, tmp_path, settings(copy, tmp_path / "run"), 1)
    assert ranks.wait() == [EXIT_USER_ERROR]
    assert f"error: {path}" in ranks.output()
    assert "Traceback" not in ranks.output()


REFUSED = [
    ({}, ["optim.lr=abc"], "optim.lr='abc'"),
    ({}, ["global_batch_size=-1"], "global_batch_size=-1"),
    ({}, ["optm.lr=1"], "did you mean optim.lr?"),
    ({}, ["model.vocab_size=200"], "model.vocab_size=200 is less than the 257"),
    ({}, ["data.seq_len=64"], "data.seq_len=64 is more than model.seq_len=32"),
    ({}, ["data.sources.toy.path=/nowhere"], "/nowhere"),
    ({}, ["run_dir=/proc/nothing/run"], "/proc"),
    ({}, ["precision=bf16", "engine.zero_stage=0"], "zero_stage=0 with precision=bf16"),
    ({}, ["activation_checkpointing=-2"], "activation_checkpointing=-2"),
    ({}, ["precision=bf16", "engine.kind=fsdp", "tf32=true"], "tf32=true with precision=bf16"),
]


@pytest.mark.parametrize(("changes", "words", "message"), REFUSED)
def test_a_mistake_is_one_clear_error(
    changes: dict[str, Any], words: list[str], message: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(shards, tmp_path / "run", **changes)))
    assert run_words(TrainConfig, train, "", [str(path), *words, "check=true"]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Put a fault of tests/faults into the ranks started from here on; a file that appears when it has begun."""

    def put(kind: str, **values: Any) -> Path:
        monkeypatch.setenv("PYTHONPATH", str(FAULTS), prepend=os.pathsep)
        monkeypatch.setenv("FAULTS", json.dumps([{"kind": kind, "mark": str(tmp_path / kind), **values}]))
        return tmp_path / kind

    return put


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "row"), [("slow_evaluation", "evaluate"), ("slow_sampling", "sample"), ("slow_answers", "score")]
)
@pytest.mark.parametrize("at", [8, STEPS])
def test_told_to_stop_in_an_evaluation_it_ends_within_seconds_and_does_it_again(
    kind: str,
    row: str,
    at: int,
    uninterrupted: Path,
    shards: Path,
    project: Path,
    tmp_path: Path,
    fault: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also in the last step. Preemption kills after 30 seconds; here the evaluation would take a minute and more."""
    mark = fault(kind, seconds=4.0)
    values = settings(shards, tmp_path / "run", save_every_steps=6, sample_tokens=20)
    values |= {"evaluate_every_steps": 8 * (row == "evaluate" and at == 8), "sample_every_steps": at * (row == "sample")}
    if (row, at) == ("sample", STEPS):
        values["evaluate_max_samples"] = 1
    if row == "score":
        (tmp_path / "asked.jsonl").write_text('{"prompt": "ab", "answer": "ab"}\n' * 3)
        exercises = {"toy": str(tmp_path / "asked.jsonl")}
        values["score"] = {"every_steps": at, "exercises": exercises, "answer_tokens": 20, "max_samples": 3}
        values["evaluate_every_steps"] = 0
    ranks = start(project, tmp_path, values)
    wait_until(lambda: mark.exists() or any(process.poll() is not None for process in ranks.processes))
    ranks.send(signal.SIGTERM, [1])
    told = time.time()
    assert ranks.wait() == [EXIT_STOPPED] * 2, ranks.output()
    stop = read_metrics(tmp_path / "run").all_rows[-1]
    assert stop["time"] - told < 25
    assert (stop["kind"], stop["step"], stop["interrupted"]) == ("stop", at, [row])
    checkpoint = tmp_path / "run" / "checkpoints" / f"step_{at:08d}"
    assert (checkpoint / "manifest.json").is_file(), "no step is lost"
    assert not (checkpoint / "scores.json").exists() or row != "evaluate"
    monkeypatch.setenv("FAULTS", "[]")
    ranks = start(project, tmp_path, values)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    rows = read_metrics(tmp_path / "run").of_kind(row)
    assert [found["step"] for found in rows].count(at) == 1
    assert rows[0]["step"] == at
    if row == "evaluate":
        expected = {found["step"]: found["loss"] for found in read_metrics(uninterrupted).of_kind("evaluate")}
        assert rows[0]["loss"] == expected[at]
    assert losses(tmp_path / "run") == losses(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "told"), [("slow_load", [0, 1]), ("slow_first_forward", [0, 1]), ("slow_first_forward", [1])])
def test_told_to_stop_before_the_first_update_it_ends_at_once(
    kind: str, told: list[int], shards: Path, project: Path, tmp_path: Path, fault: Callable[..., Path]
) -> None:
    """Inside C code, where Python's handlers do not run; there is nothing to save."""
    mark = fault(kind, seconds=60 if len(told) == 2 else 25)  # a rank that is not told learns it once it gets on
    ranks = start(project, tmp_path, settings(shards, tmp_path / "run"))
    wait_until(mark.exists)
    time.sleep(1.0)
    ranks.send(signal.SIGTERM, told)
    assert [ranks.processes[rank].wait(20) for rank in told] == [EXIT_STOPPED] * len(told), ranks.output()
    assert ranks.wait(600) == [EXIT_STOPPED] * 2, ranks.output()
    (stop,) = read_metrics(tmp_path / "run").of_kind("stop")
    assert (stop["step"], "seconds" in stop) == (0, True)
    assert list_checkpoints(tmp_path / "run") == []


def test_what_a_start_draws_and_loads_and_a_save_copies_and_writes_is_progress(shards: Path, tmp_path: Path) -> None:
    """Each parameter moves what the watchdog judges by, so that a large model on a slow disk is no hang."""
    world = lone_world(torch.device("cpu"))

    def start_at(name: str, **changes: Any) -> Any:
        config = validate(TrainConfig, settings(shards, tmp_path / name, **changes), source="test")
        guard, engine = Guard(config.guard, config.run_dir), WholeModel(GPT(config.model))
        return SimpleNamespace(
            config=config, data=open_data(config.data), world=world, engine=engine, guard=guard, attempt=1, base={}
        )

    def progress(action: Callable[[], object]) -> int:
        before = world.progress.count
        action()
        return world.progress.count - before

    run = start_at("run")
    count = len(run.engine.state())
    assert progress(lambda: load_newest(run, None)) == count, "each parameter that is drawn"
    info = {"config": run.config.model_dump(mode="json"), "model": run.config.model.model_dump(mode="json")}
    saver = Saver(run.config.run_dir, world, take_ownership(run.config.run_dir, world), background=True)
    slices = progress(lambda: saver.save(run.engine, TrainState(step=4), info | record_of(run.data)) or saver.wait())
    assert slices == 2 * count + 1, "each that is copied and each that is written, and the file's header"
    saver.close()
    again = start_at("run")
    assert progress(lambda: load_newest(again, None)) == count, "each that is read"
    begun = start_at("begun", init_from=str(run.config.run_dir))
    assert progress(lambda: load_newest(begun, None)) == 2 * count, "each that is drawn, and each that is read into it"


@pytest.mark.slow
def test_a_sample_of_text_without_memory_costs_no_step(
    shards: Path, project: Path, tmp_path: Path, fault: Callable[..., Path]
) -> None:
    fault("sampling_out_of_memory")
    values = settings(shards, tmp_path / "run", sample_every_steps=5, evaluate_every_steps=0, save_every_steps=100)
    ranks = start(project, tmp_path, values, 1)
    assert ranks.wait() != [EXIT_DONE]
    assert "out of memory in the sample" in ranks.output()
    assert [step_of(found) for found in list_checkpoints(tmp_path / "run")] == [5]


@pytest.mark.slow
def test_a_damaged_validation_shard_costs_no_step(uninterrupted: Path, project: Path, tmp_path: Path) -> None:
    """Named, with status 2 on every rank; the step is saved, though no save was due; repaired, the run ends as ever."""
    copy = write_shards(tmp_path / "corpus")
    path = copy / "validation" / "shard_00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    values = settings(copy, tmp_path / "run", save_every_steps=100)
    ranks = start(project, tmp_path, values)
    assert ranks.wait() == [EXIT_USER_ERROR] * 2, ranks.output()
    assert all(f"error: {path}" in ranks.output(rank) for rank in (0, 1))
    assert [step_of(found) for found in list_checkpoints(tmp_path / "run")] == [8]
    path.write_bytes(whole)
    ranks = start(project, tmp_path, values)
    assert ranks.wait() == [EXIT_DONE] * 2, ranks.output()
    assert losses(tmp_path / "run") == losses(uninterrupted)


@pytest.mark.slow
def test_ranks_with_other_data_are_refused_by_all_of_them(shards: Path, project: Path, tmp_path: Path) -> None:
    """A node whose own disk has an older copy of the shards would train on other samples than the ledger says."""
    other = write_shards(tmp_path / "corpus", seed=1)
    for rank, corpus in enumerate((shards, other)):
        (tmp_path / f"rank{rank}.yaml").write_text(yaml.safe_dump(settings(corpus, tmp_path / "run")))
    tool = str(project / "tools" / "train_model.py")
    words = f"[{tool!r}, {str(tmp_path)!r} + '/rank' + os.environ['RANK'] + '.yaml']"
    code = f"import os, runpy, sys; sys.argv = {words}; runpy.run_path({tool!r}, run_name='__main__')"
    ranks = Ranks(["-c", code], 2, tmp_path / "logs")
    assert ranks.wait() == [EXIT_USER_ERROR] * 2, ranks.output()
    assert all("every rank needs the same settings and data: rank 1 finds data=" in ranks.output(rank) for rank in (0, 1))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_model_does_not_go_on_from_a_checkpoint(
    uninterrupted: Path, shards: Path, project: Path, tmp_path: Path
) -> None:
    before = (uninterrupted / "config.yaml").read_text()
    ranks = start(project, tmp_path, settings(shards, uninterrupted, max_steps=STEPS + 1), 1, "data.seed=5")
    assert ranks.wait() == [EXIT_USER_ERROR]
    assert "data.order (seed: 0 -> 5)" in ranks.output()
    assert "allow_change=[data.order]" in ranks.output()
    assert (uninterrupted / "config.yaml").read_text() == before  # a refused start writes nothing over


@pytest.mark.slow
def test_weights_of_another_shape_are_refused(uninterrupted: Path, shards: Path, project: Path, tmp_path: Path) -> None:
    """Read by places in the flattened parameters, a larger matrix would fill a smaller one."""
    values = settings(shards, tmp_path / "run", init_from=str(uninterrupted))
    ranks = start(project, tmp_path, values, 1, "model.hidden_size=16", "model.num_layers=1")
    assert ranks.wait() == [EXIT_USER_ERROR], ranks.output()
    assert "holds the weights of another model: blocks.0" in ranks.output()
    fewer = start(
        project,
        tmp_path / "fewer",
        settings(shards, tmp_path / "run"),
        1,
        "max_steps=4",
        "optim.schedule.warmup_steps=0",
        f"continue_from={uninterrupted}/checkpoints/step_{STEPS:08d}",
    )
    assert fewer.wait() == [EXIT_USER_ERROR], fewer.output()
    assert f"max_steps=4: {uninterrupted}/checkpoints/step_{STEPS:08d} is further already" in fewer.output()


@pytest.mark.slow
def test_another_optimizer_begins_with_states_of_its_own(shards: Path, project: Path, tmp_path: Path) -> None:
    values = settings(shards, tmp_path / "run", max_steps=4)
    assert start(project, tmp_path / "first", values, 1).wait() == [EXIT_DONE]
    ranks = start(project, tmp_path / "second", values, 1, "optim.kind=sgd", "allow_change=[optim.kind]", "max_steps=6")
    assert ranks.wait() == [EXIT_DONE], ranks.output()
    assert "the states of this one begin at zero" in ranks.output()
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_adamw_and_its_bf16_moments_resume_each_other(shards: Path, project: Path, tmp_path: Path) -> None:
    values = settings(shards, tmp_path / "run", max_steps=4, optim={"kind": "adamw_bf16_states"})
    assert start(project, tmp_path / "first", values, 1).wait() == [EXIT_DONE]
    for steps, kind, engine in ((6, "adamw", "deepspeed"), (8, "adamw_bf16_states", "fsdp")):
        words = (f"optim.kind={kind}", f"engine.kind={engine}", "allow_change=[optim.kind]", f"max_steps={steps}")
        ranks = start(project, tmp_path / kind, values, 1, *words)
        assert ranks.wait() == [EXIT_DONE], ranks.output()
        assert "begin at zero" not in ranks.output()
        assert f"optimizer_states {'fp32' if kind == 'adamw' else 'bf16'}" in ranks.output()
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.slow
def test_another_runs_weights_another_engine_and_optimizer(
    uninterrupted: Path, shards: Path, project: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"max_steps": 2, "activation_checkpointing": "selective"}
    values = settings(shards, tmp_path / "run", init_from=str(uninterrupted), **changes)
    ranks = start(project, tmp_path, values, 1, "engine.kind=fsdp", "optim.kind=muon")
    assert ranks.wait() == [EXIT_DONE], ranks.output()
    whole = losses(uninterrupted)
    assert losses(tmp_path / "run")[1] < (whole[1] + whole[STEPS]) / 2


@pytest.mark.slow
def test_a_cooldown_from_a_longer_run_is_that_of_the_shorter_run(shards: Path, project: Path, tmp_path: Path) -> None:
    """A long run on 2 ranks with a batch warm-up; from its step 8 a cooldown. The short run that has this cooldown from the
    beginning, on 1 rank, gives the same bits: losses after step 8 and weights (determinism=canonical)."""

    def schedule(decay: int) -> dict[str, Any]:
        return {"lr": 1e-3, "schedule": {"kind": "wsd", "warmup_steps": 4, "decay_steps": decay}}

    def run(name: str, size: int, **changes: Any) -> dict[int, float]:
        warmup = [{"until_step": 2, "global_batch_size": 3}, {"until_step": 5, "global_batch_size": 6}]
        common: dict[str, Any] = {"determinism": "canonical", "batch_warmup": warmup, "evaluate_every_steps": 0, "keep_last": 3}
        values = settings(shards, tmp_path / name, **{**common, **changes})
        assert start(project, tmp_path / f"{name}.start", values, size).wait() == [EXIT_DONE] * size
        return losses(tmp_path / name)

    long = run("long", 2, max_steps=16, optim=schedule(decay=4))
    origin = tmp_path / "long" / "checkpoints" / "step_00000008"
    branch = run("branch", 2, max_steps=12, optim=schedule(decay=4), continue_from=str(origin))
    short = run("short", 1, max_steps=12, optim=schedule(decay=4))
    assert [branch[step] for step in range(9, 13)] == [short[step] for step in range(9, 13)]
    assert list(branch) == [9, 10, 11, 12]
    assert [long[step] for step in range(1, 9)] == [short[step] for step in range(1, 9)]
    assert long[12] != short[12]
    weights = [load_model(tmp_path / name).model.state_dict() for name in ("branch", "short")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert [entry.num_samples for entry in read_ledger(tmp_path / "short")] == [3, 3, 6, 6, 6] + [8] * 7
    (line,) = check_ledger(tmp_path / "short")
    assert line.endswith("all as in the shards")


def test_batch_sizes_are_a_function_of_the_step() -> None:
    phases = [{"until_step": 2, "global_batch_size": 4}, {"until_step": 5, "global_batch_size": 6}]
    config = TrainConfig.model_validate(settings(Path("x"), Path("y"), batch_warmup=phases, max_steps=7))
    assert [config.batch_size_at(step) for step in range(7)] == [4, 4, 6, 6, 6, 8, 8]
    assert config.num_samples() == 42
    assert config.model_copy(update={"max_steps": 3}).num_samples() == 14


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"batch_warmup": [{"until_step": 5, "global_batch_size": 4}, {"until_step": 5, "global_batch_size": 6}]}, "ascend"),
        ({"batch_warmup": [{"until_step": 5, "global_batch_size": 1}]}, "less than micro_batch_size=2"),
        (
            {"activation_checkpointing": "selective", "engine": {"zero_stage": 3}},
            "activation_checkpointing=selective with engine.zero_stage=3",
        ),
        ({"init_from": "a", "continue_from": "b/checkpoints/step_1"}, "init_from and continue_from"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        validate(TrainConfig, settings(Path("x"), Path("y"), **changes), source="test")


@pytest.mark.parametrize(
    ("setting", "every", "selectively"), [("none", 0, False), ("full", 1, False), ("selective", 1, True), (3, 3, False)]
)
def test_activation_checkpointing_reaches_the_engine(setting: Any, every: int, selectively: bool) -> None:
    values = settings(Path("x"), Path("y"), activation_checkpointing=setting, compile=True)
    options = TrainConfig.model_validate(values).engine_options
    assert (options["checkpoint_every"], options["checkpoint_selectively"]) == (every, selectively)
    assert options["compile_blocks"] is True


def test_the_check_of_a_run_looks_at_compiled_dropout(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "BROKEN_DROPOUT", (".".join(torch.__version__.split(".")[:2]),))
    values = settings(shards, tmp_path / "run", compile=True)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**values, "model": {**values["model"], "dropout": 0.1}}))
    assert run_words(TrainConfig, train, "", [str(path), "check=true"]) == EXIT_DONE
    assert "198333" in caplog.text


@pytest.mark.parametrize(
    ("compiled", "dropouts", "version", "on_gpu", "refused"),
    [
        (
            True,
            (0.1, 0.0),
            "2.13.0+cu130",
            True,
            r"\(model.dropout=0.1\): torch 2.13.0.cu130 .*set compile=false or model.dropout=0$",
        ),
        (True, (0.1, 0.0), "2.13.1", True, "198333"),
        (True, (0.0, 0.2), "2.13.0", True, r"compile=true with dropout \(tune.lora.dropout=0.2\): .*tune.lora.dropout=0$"),
        (True, (0.1, 0.2), "2.13.0", True, "or model.dropout=0, tune.lora.dropout=0$"),
        (True, (0.1, 0.0), "2.13.0", False, ""),
        (True, (0.1, 0.0), "2.12.1", True, ""),
        (True, (0.0, 0.0), "2.13.0", True, ""),
        (False, (0.1, 0.2), "2.13.0", True, ""),
    ],
)
def test_compiled_dropout_is_refused_where_torch_computes_it_wrongly(
    compiled: bool, dropouts: tuple[float, float], version: str, on_gpu: bool, refused: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = settings(Path("x"), Path("y"), compile=compiled, init_from="z")
    values |= {"model": {**values["model"], "dropout": dropouts[0]}, "tune": {"lora": {"dropout": dropouts[1]}}}
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
        preflight.refuse_compiled_dropout(TrainConfig.model_validate(values), version, on_gpu=on_gpu)
    assert ("a GPU would refuse" in caplog.text) == (compiled and not on_gpu)


@pytest.mark.slow
def test_an_engine_compiles_blocks_and_keeps_products(tmp_path: Path) -> None:
    assert run_ranks(engine_traits, 1, tmp_path) == [[(True, True), (True, True), (False, False)]]


def engine_traits(world: Any) -> list[tuple[bool, bool]]:
    from toy import make_engine

    from megagpt.model.gpt import keep_products

    traits = []
    # ZeRO 3 first: it makes the model by functions of its own, in which torch's compiler cannot be imported
    for name, wanted in (("zero3", True), ("fsdp", True), ("fsdp", False)):
        module: Any = make_engine(world, name, checkpoint_every=1, checkpoint_selectively=wanted, compile_blocks=wanted).module
        compiled = all(block._compiled_call_impl is not None for block in module.blocks)
        traits.append((compiled, module.checkpoint_options.get("context_fn") is keep_products))
    return traits


def dropout_masks(world: Any, _: None) -> list[int]:
    from megagpt.data.loader import MicroBatch
    from megagpt.train.step import seed_dropout

    model = {"vocab_size": 257, "seq_len": 32, "num_layers": 2, "num_heads": 2, "hidden_size": 32, "dropout": 0.1}
    config = TrainConfig.model_validate(settings(Path(), Path()) | {"model": model})
    sums = []
    for first in (0, 2, 4):
        ids = torch.zeros((1, 1), dtype=torch.int64)
        seed_dropout(config, 3, MicroBatch(ids, ids, None, first, 0))
        sums.append(int(torch.rand(1000).mul(1e6).sum()))
    return sums


def test_dropout_is_seeded_by_samples_not_by_rank(tmp_path: Path) -> None:
    first, second = run_ranks(dropout_masks, 2, tmp_path, None)
    assert first == second
    assert len(set(first)) == 3
