"""Ten mistakes in a job, each caught before it is submitted with a sentence that says what to do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_run import settings, write_shards

from megagpt.config import UserError, validate
from megagpt.data.open_data import open_data
from megagpt.plan.preflight import preflight_job
from megagpt.plan.run_plan import PlanConfig, RunPlan, cluster_of, make_plan
from megagpt.plan.sbatch import gpus_asked, node_bytes_asked, sbatch_options
from megagpt.train.preflight import check_run

PROJECT = Path(__file__).resolve().parents[2]

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a rank without samples": ({"gpus": 64}, "ranks would have none; raise it to"),
    "a batch that does not divide": (
        {"gpus": 2, "global_batch_size": 10, "micro_batch_size": 4},
        "is not a multiple of micro_",
    ),
    "groups that do not divide": (
        {"gpus": 2, "engine": {"kind": "fsdp", "shard_size": 3}},
        "engine.shard_size=3 does not divide the 2 ranks",
    ),
    "context-parallel groups that do not divide": (
        {"gpus": 3, "engine": {"context_parallel_size": 2}, "model.dropout": 0.0},
        "engine.context_parallel_size=2 does not divide the 3 ranks",
    ),
    "more ranks that share samples than heads": (
        {"gpus": 4, "engine": {"kind": "fsdp", "context_parallel_size": 4}, "model.dropout": 0.0},
        "engine.context_parallel_method=gather takes any number of heads",
    ),
    "a warm-up that never ends": ({"optim": {"schedule": {"warmup_steps": 5000}}}, "the run would end in its warm-up"),
    "a run without checkpoints": ({"save_every_steps": 100_000}, "a failure loses the whole run"),
    "a vocabulary that is too small": ({"model.vocab_size": 100}, "set it to 320"),
    "data read too often": ({"max_steps": 1_000_000}, "train for fewer steps or on more data"),
    "more memory than there is": ({"gpu_memory_gib": 0.5}, "fit=true searches settings that fit"),
    "an engine that is inexact": ({"engine": {"zero_stage": 0}, "precision": "bf16"}, "use 1 to 3"),
    "sbatch for other GPUs": ({"gpus": 2, "sbatch": "--nodes=2 --gpus-per-node=8 --signal=B:USR1@300"}, "make them equal"),
    "no warning before the time limit": ({"sbatch": "--time=24:00:00"}, "give B:USR1@300"),
    "a time limit within the warning": ({"sbatch": "--time=5 --signal=B:USR1@300"}, "gets the stop signal as it starts"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("plan_shards"))


def config_of(shards: Path, run_dir: Path, changes: dict[str, Any]) -> PlanConfig:
    values = settings(shards, run_dir)
    for key, value in {"gpus": 1, **changes}.items():
        target, *rest = key.split(".")
        if rest:
            values[target] = {**values[target], rest[0]: value}
        else:
            values[target] = value
    return validate(PlanConfig, values, source="test")


def problems_of(config: PlanConfig) -> list[str]:
    cluster = cluster_of(config)
    plan: RunPlan | UserError
    try:
        plan = make_plan(config.train_config(), cluster)
    except UserError as error:
        plan = error
    return preflight_job(config, cluster, plan)


def test_a_sound_job_passes(shards: Path, tmp_path: Path) -> None:
    assert problems_of(config_of(shards, tmp_path / "run", {"sbatch": "--time=1-00 --signal=B:USR1@300"})) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_caught(name: str, shards: Path, tmp_path: Path) -> None:
    changes, sentence = MISTAKES[name]
    found = problems_of(config_of(shards, tmp_path / "run", changes))
    assert any(sentence in problem for problem in found), found


def test_exports_count_among_what_the_disk_must_hold(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = {"export_every_steps": 4, "export_keep_last": 3}
    config = config_of(shards, tmp_path / "run", exports)
    plan = make_plan(config.train_config(), cluster_of(config))
    assert plan.export_bytes == 4 * 2 * plan.parameters
    assert make_plan(config_of(shards, tmp_path / "run", {}).train_config(), cluster_of(config)).export_bytes == 0
    room = 4 * plan.checkpoint_bytes + plan.export_bytes
    for free, is_caught in ((room - 1, True), (room, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        found = problems_of(config)
        assert any("of exports need" in problem for problem in found) == is_caught, found
        message = ""
        try:
            check_run(config.train_config(), open_data(config.data))
        except UserError as error:
            message = str(error)
        assert ("and exports (export_keep_last=3, and one being written) need" in message) == is_caught, message


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--mem=200G", 200 * 2**30),
        ("--mem=500", 500 * 2**20),
        ("--mem-per-gpu=2T", 16 * 2**40),
        ("--mem=0", None),
        ("--exclusive", None),
    ],
)
def test_the_host_memory_of_a_job_is_read_from_its_options(options: str, found: int | None) -> None:
    assert node_bytes_asked(sbatch_options(options), 8) == found


def test_copies_for_background_saves_count_against_a_nodes_memory(shards: Path, tmp_path: Path) -> None:
    changes = {"gpus": 16, "global_batch_size": 64, "engine": {"kind": "fsdp", "cpu_offload": True}}
    config = config_of(shards, tmp_path / "run", changes)
    plan = make_plan(config.train_config(), cluster_of(config))
    assert plan.save_copy_bytes == -(-plan.checkpoint_bytes // 16)
    assert plan.memory.host > plan.save_copy_bytes * 0.99
    for room, is_caught in ((8 * plan.host_bytes, False), (8 * plan.host_bytes - 1, True)):
        found = problems_of(config.model_copy(update={"node_memory_gib": room / 2**30}))
        assert any("host memory: 8 ranks of a node need" in problem for problem in found) == is_caught, found
    small = config.model_copy(update={"sbatch": "--nodes=2 --gpus-per-node=8 --signal=B:USR1@300 --mem=1K"})
    assert any("sbatch asks for 1" in problem for problem in problems_of(small))
    waits = config_of(shards, tmp_path / "run", {**changes, "save_in_background": False})
    assert make_plan(waits.train_config(), cluster_of(waits)).save_copy_bytes == 0


def test_missing_shards_are_named(tmp_path: Path) -> None:
    found = problems_of(config_of(tmp_path / "none", tmp_path / "run", {}))
    assert any(str(tmp_path / "none") in problem for problem in found)


def test_a_script_is_checked(shards: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --signal=B:USR1@300\nif true; then\n", encoding="utf-8")
    found = problems_of(config_of(shards, tmp_path / "run", {"script": script}))
    assert any("not valid for bash" in problem for problem in found)
    assert any("--requeue" in problem for problem in found)
    assert problems_of(config_of(shards, tmp_path / "run", {"script": PROJECT / "slurm" / "pretrain.sh"})) == []


NOTING_MEMORY = """
import runpy, shutil, sys
note, *sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    shutil.copyfile("/proc/self/status", note)
"""
"""Runs a tool and keeps what Linux says of its process; what wait4 says of memory has that of the process which forked it."""


@pytest.mark.slow
def test_7b_on_512_ranks_takes_less_than_a_minute_and_2_gib(tmp_path: Path) -> None:
    words = ["tools/plan_run.py", "configs/train/gpt_7b.yaml", "gpus=512", "summary=true", "preflight=true"]
    with (tmp_path / "output").open("wb") as output:
        command = [sys.executable, "-c", NOTING_MEMORY, str(tmp_path / "status"), *words]
        process = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert "plan: 6.74 B parameters on 512 x h100_80gb" in (tmp_path / "output").read_text()
    assert used.ru_utime + used.ru_stime < 60
    peak = re.search(r"VmHWM:\s+(\d+) kB", (tmp_path / "status").read_text())
    assert peak is not None
    assert int(peak[1]) < 2 * 2**20


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ("--exclusive --mem=0 --nodes=4 --gpus-per-node=8 --time=24:00:00", (4, 8)),
        ("--gres=gpu:h100:4", (1, 4)),
        ("--nodes=1-3 --gres=gpu:2", (3, 2)),
        ("--nodes 2 --gpus-per-node h100:8 --nodes=3", (3, 8)),
        ("--nodes=2 --time=30", None),
        ("--nodes=2 --gpus-per-node=0", None),
    ],
)
def test_the_gpus_of_a_job_are_read_from_its_options(options: str, asked: tuple[int, int] | None) -> None:
    assert gpus_asked(sbatch_options(options)) == asked
