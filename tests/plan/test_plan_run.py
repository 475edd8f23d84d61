"""The plan of a run: its figures, what is printed, the sweep, and the configuration that fits."""

from pathlib import Path
from typing import Any

import pytest

from megagpt.config import UserError, load
from megagpt.plan import show
from megagpt.plan.run_plan import PlanConfig, RunPlan, cluster_of, job_of, make_plan, save_interval_seconds
from megagpt.plan.suggest import suggest
from megagpt.train.config import TrainConfig

PROJECT = Path(__file__).resolve().parents[2]


def config_of(name: str = "gpt_1b3", **words: Any) -> PlanConfig:
    return load(PlanConfig, [str(PROJECT / f"configs/train/{name}.yaml"), *(f"{k}={v}" for k, v in words.items())])


def plan_of(config: PlanConfig) -> RunPlan:
    return make_plan(config.train_config(), cluster_of(config))


def test_the_arithmetic_of_a_run() -> None:
    config = config_of(gpus=16)
    plan = plan_of(config)
    assert plan.parameters == 1_317_373_952
    assert plan.checkpoint_bytes == 12 * plan.parameters
    assert plan.accumulation == -(-config.global_batch_size // (16 * config.micro_batch_size))
    assert plan.tokens == config.num_samples() * config.data.seq_len
    assert plan.step is not None
    assert plan.seconds == pytest.approx(plan.step.total * config.max_steps)
    assert plan.tokens_per_second == pytest.approx(config.global_batch_size * config.data.seq_len / plan.step.total)
    assert plan.fits


def test_batch_warmup_takes_the_steps_it_is_in() -> None:
    config = config_of(gpus=8, batch_warmup="[{until_step: 100, global_batch_size: 256}]", max_steps=200)
    plan, small = plan_of(config), plan_of(config.model_copy(update={"global_batch_size": 256, "batch_warmup": ()}))
    assert plan.step is not None
    assert small.step is not None
    assert plan.seconds == pytest.approx(100 * plan.step.total + 100 * small.step.total)


@pytest.mark.parametrize(("gpu", "what"), [("tpu_v9", "not in hardware.yaml"), ("b200", "no published runs")])
def test_a_gpu_without_published_runs_has_memory_and_no_time(gpu: str, what: str) -> None:
    config = config_of(gpus=8, gpu=gpu)
    plan = plan_of(config)
    assert plan.step is plan.seconds is plan.tokens_per_second is None
    assert plan.memory.peak > 0
    assert (plan.capacity_gib is None) == (gpu == "tpu_v9")
    assert any(what in note for note in plan.notes)
    lines = show.summary_lines(config, cluster_of(config), plan)
    assert len(lines) == 6
    assert "not known" in lines[3]


@pytest.mark.parametrize(("used", "warned"), [(0.85, False), (0.95, True), (1.05, False)])
def test_nearly_full_memory_is_noted(used: float, warned: bool) -> None:
    needed = plan_of(config_of(gpus=8)).needed_gib
    plan = plan_of(config_of(gpus=8, gpu_memory_gib=needed / used))
    assert any(f"{used:.0%} of the GPU is planned to be in use" in note for note in plan.notes) == warned
    assert plan.fits == (used < 1)


def test_six_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert show.run(config_of(gpus=8, summary="true", price_per_gpu_hour=2, storage_gb_per_second=5)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["plan", "batch", "memory", "speed", "time", "checkpoints"]
    assert "cost" in lines[4]


def test_a_sweep_has_a_row_per_number_of_gpus_and_a_plot(tmp_path: Path) -> None:
    lines = show.sweep_lines(config_of(sweep="[8,16]", plot=tmp_path / "sweep.svg"))
    assert [line.split()[0] for line in lines] == ["GPUs", "8", "16"]
    assert (tmp_path / "sweep.svg").stat().st_size > 1000


@pytest.mark.slow
def test_fit_writes_a_configuration_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(
        gpus=8,
        gpu="a100_40gb",
        global_batch_size=256,
        micro_batch_size=32,
        activation_checkpointing="none",
        fit="true",
        output=tmp_path / "p.yaml",
    )
    assert plan_of(config).fits is False
    assert show.run(config) == 0
    fitting = load(TrainConfig, [str(tmp_path / "p.yaml")])
    assert make_plan(fitting, cluster_of(config)).fits
    assert "suggestion: " in capsys.readouterr().out


def test_nothing_fits_a_tiny_gpu(tmp_path: Path) -> None:
    words: dict[str, Any] = {"gpus": 1, "global_batch_size": 1, "micro_batch_size": 1}
    config = config_of("gpt_13b", gpu_memory_gib=8, fit="true", output=tmp_path / "p.yaml", **words)
    assert suggest(config.train_config(), cluster_of(config), plan_of(config)) is None
    assert show.run(config) == 2
    assert not (tmp_path / "p.yaml").exists()


def test_groups_must_divide_the_ranks() -> None:
    with pytest.raises(UserError, match=r"engine.shard_size=8 does not divide the 12 ranks"):
        job_of(config_of("gpt_7b", **{"engine.shard_size": 8}), 12)


def test_bad_words_are_named() -> None:
    with pytest.raises(UserError, match="gpus=12 is not a multiple of nodes=5"):
        config_of(gpus=12, nodes=5)
    with pytest.raises(UserError, match="network=token_ring: one of"):
        cluster_of(config_of(network="token_ring"))
    with pytest.raises(UserError, match="gpus=0"):
        config_of(gpus=0)


def test_saving_gets_rarer_with_slower_disks_and_fewer_gpus() -> None:
    plan = plan_of(config_of(gpus=8))
    write, interval = save_interval_seconds(plan, 8, 1.0)
    assert write == pytest.approx(plan.checkpoint_bytes / 1e9)
    assert interval == pytest.approx((2 * write * 50700 * 3600 / 8) ** 0.5)
    assert save_interval_seconds(plan, 64, 1.0)[1] < interval
