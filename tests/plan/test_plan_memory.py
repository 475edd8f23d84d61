"""Memory plans: the parts against rules worked out by hand, the whole against real steps on CPU ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from ranks import run_ranks

from megagpt.distributed.world import World
from megagpt.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig
from megagpt.engine.optim import OptimConfig
from megagpt.model.gpt import ModelConfig
from megagpt.plan.measured import measured_peak
from megagpt.plan.memory import plan_memory
from megagpt.plan.timeline import Job
from megagpt.plan.trace import StorageTracker, TraceKey, trace

MODEL = ModelConfig(vocab_size=1024, seq_len=128, num_layers=4, num_heads=4, hidden_size=128, tied_head=False)
GQA = ModelConfig(vocab_size=999, seq_len=96, num_layers=5, num_heads=6, num_kv_heads=2, hidden_size=192)
GPT2 = ModelConfig(vocab_size=1024, seq_len=64, num_layers=3, num_heads=4, hidden_size=128, family="gpt2")
MODELS = {"llama": MODEL, "gqa": GQA, "gpt2": GPT2}
LARGE = ModelConfig(
    vocab_size=32000, seq_len=4096, num_layers=32, num_heads=32, hidden_size=4096, mlp_size=11008, tied_head=False
)
"""Llama 2 7B's shape."""

ZERO: dict[str, Any] = {"kind": "deepspeed", "reduce_bucket_elements": 200_000, "stage3_persistence_elements": 0}
BF16_STATES = OptimConfig(kind="adamw_bf16_states")
CELLS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"kind": "fsdp"}, {"precision": "fp32", "micro_batch_size": 2}),
    ("gqa", {"kind": "fsdp"}, {"precision": "bf16", "micro_batch_size": 3, "checkpoint_every": 1, "accumulation": 2}),
    ("gpt2", {"kind": "fsdp", "reshard_after_forward": False}, {"precision": "bf16", "checkpoint_every": 2}),
    ("llama", {"kind": "fsdp", "shard_size": 1}, {"precision": "bf16", "accumulation": 3}),
    ("gqa", {"kind": "fsdp", "accumulate": "sharded"}, {"precision": "bf16", "checkpoint_every": 1, "accumulation": 3}),
    ("llama", {"kind": "fsdp", "accumulate": "sharded"}, {"precision": "fp32", "accumulation": 2}),
    ("gqa", {**ZERO, "zero_stage": 0}, {"precision": "fp32", "micro_batch_size": 2, "accumulation": 2}),
    ("llama", {**ZERO, "zero_stage": 1}, {"precision": "fp32", "checkpoint_every": 1, "accumulation": 2}),
    ("gpt2", {**ZERO, "zero_stage": 1}, {"precision": "bf16", "micro_batch_size": 2}),
    ("llama", {**ZERO, "zero_stage": 2}, {"precision": "fp32", "micro_batch_size": 2}),
    ("gqa", {**ZERO, "zero_stage": 2}, {"precision": "bf16", "micro_batch_size": 2, "accumulation": 2}),
    ("llama", {**ZERO, "zero_stage": 3}, {"precision": "bf16", "micro_batch_size": 2}),
    ("gqa", {**ZERO, "zero_stage": 3}, {"precision": "fp32", "checkpoint_every": 1}),
    ("llama", {"kind": "fsdp"}, {"precision": "bf16", "checkpoint_every": 1, "checkpoint_selectively": True}),
    ("llama", {"kind": "fsdp"}, {"precision": "fp32", "optim": BF16_STATES}),
    ("gqa", {**ZERO, "zero_stage": 2}, {"precision": "bf16", "optim": BF16_STATES}),
    ("llama", {**ZERO, "zero_stage": 2}, {"precision": "fp32", "optim": BF16_STATES}),
    ("gqa", {**ZERO, "zero_stage": 3}, {"precision": "bf16", "optim": BF16_STATES}),
    ("gqa", {**ZERO, "zero_stage": 1}, {"precision": "bf16", "optim": BF16_STATES}),
]


def engine_of(values: dict[str, Any]) -> EngineConfig:
    return TypeAdapter(EngineConfig).validate_python(values)


def job_of(model: ModelConfig, engine: EngineConfig, ranks: int, **run: Any) -> Job:
    options: dict[str, Any] = {"micro_batch_size": 1, "kernels": "cpu", **run}
    return Job(model, engine, options.pop("optim", OptimConfig()), seq_len=model.seq_len, ranks=ranks, **options)


def measure_cells(world: World) -> list[dict[str, int]]:
    return [measured_peak(world, MODELS[model], engine_of(engine), **run) for model, engine, run in CELLS]


@pytest.mark.slow
def test_plans_meet_real_steps(tmp_path: Path) -> None:
    ranks = run_ranks(measure_cells, 2, tmp_path, timeout_seconds=1800)
    errors = {}
    for (model, engine, run), *measured in zip(CELLS, *ranks, strict=True):
        most = max(max(peaks.values()) for peaks in measured)
        errors[f"{model} {engine} {run}"] = plan_memory(job_of(MODELS[model], engine_of(engine), 2, **run)).peak / most - 1
    off = {cell: error for cell, error in errors.items() if abs(error) > 0.03}
    assert not off
    assert sorted(abs(error) for error in errors.values())[len(errors) // 2] < 0.001


def test_the_tracker_counts_what_is_alive() -> None:
    with StorageTracker() as tracker:
        whole = torch.empty(1000)
        view = whole.view(10, 100)
        assert tracker.live == 4000
        twice = view * 2
        assert tracker.live == 8000
        del whole
        assert tracker.live == 8000, "the view keeps the storage"
        del view
        assert tracker.live == 4000
        twice.untyped_storage().resize_(0)
        assert tracker.live == 0
        assert tracker.peak == 8000


@pytest.mark.parametrize(("kernels", "per_width"), [("gpu", 39.5), ("cpu", 51.5)])
def test_a_block_holds_what_its_operations_keep(kernels: Any, per_width: float) -> None:
    # arXiv 2205.05198's count for this block: 18 D + 8 M bytes per token, and 12 D more for the norms of a CPU.
    traced = trace(TraceKey(LARGE, 2, 4096, "bf16", "none", kernels, "kept"))
    assert traced.block.left / (2 * 4096 * 4096) == pytest.approx(per_width, rel=0.001)


def test_checkpointing_keeps_the_input_alone() -> None:
    traced = trace(TraceKey(LARGE, 2, 4096, "bf16", "full", "gpu", "kept"))
    assert traced.block.left == pytest.approx(2 * 2 * 4096 * 4096, rel=0.001)
    selective = trace(TraceKey(LARGE, 2, 4096, "bf16", "selective", "gpu", "kept"))
    assert traced.block.left < selective.block.left < trace(TraceKey(LARGE, 2, 4096, "bf16", "none", "gpu", "kept")).block.left


@pytest.mark.parametrize("ranks", [8, 64, 1024])
def test_sharded_states_are_12_bytes_per_parameter_and_rank(ranks: int) -> None:
    parts = plan_memory(job_of(LARGE, FSDPConfig(), ranks, precision="bf16", checkpoint_every=1, kernels="gpu")).parts
    assert parts["master weights"] + parts["optimizer states"] == pytest.approx(12 * 6_738_415_616 / ranks, rel=0.02)


def test_sharded_sums_save_whole_fp32_gradients() -> None:
    options = {"precision": "bf16", "checkpoint_every": 1, "kernels": "gpu"}
    plans = {
        (kind, count): plan_memory(job_of(LARGE, FSDPConfig(accumulate=kind), 64, accumulation=count, **options)).peak
        for kind in ("whole", "sharded")
        for count in (1, 4)
    }
    assert plans["sharded", 1] == plans["whole", 1]
    assert plans["whole", 4] - plans["sharded", 4] == pytest.approx(4 * 6_738_415_616, rel=0.1)
    assert plans["sharded", 4] < plans["whole", 1] + 4 * 2 * 6_738_415_616 / 64


def test_stages_hold_less_and_less() -> None:
    options = {"precision": "bf16", "checkpoint_every": 1, "kernels": "gpu"}
    peaks = [plan_memory(job_of(LARGE, DeepSpeedConfig(zero_stage=stage), 64, **options)).peak for stage in (1, 2, 3)]
    assert peaks == sorted(peaks, reverse=True)


def test_offload_moves_states_to_the_host() -> None:
    engine = DeepSpeedConfig(zero_stage=2, offload_optimizer=True)
    plan = plan_memory(job_of(LARGE, engine, 64, precision="bf16", checkpoint_every=1, kernels="gpu"))
    assert plan.host == pytest.approx(16 * 6_738_415_616 / 64, rel=0.01)
    assert "optimizer states" not in plan.parts
