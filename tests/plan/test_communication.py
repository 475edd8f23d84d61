"""Planned traffic against the collectives that real engines run on gloo."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from ranks import run_ranks

from megagpt.distributed.mesh import with_context_parallel
from megagpt.distributed.world import World
from megagpt.engine.build import build_engine
from megagpt.engine.config import EngineConfig, FSDPConfig
from megagpt.engine.initial_weights import draw_weights
from megagpt.engine.optim import OptimConfig
from megagpt.model.gpt import ModelConfig
from megagpt.plan.communication import Traffic, step_traffic, traffic_seconds
from megagpt.plan.measured import CollectiveCounter
from megagpt.plan.timeline import Job

MODEL = ModelConfig(vocab_size=512, seq_len=32, num_layers=4, num_heads=4, hidden_size=64, tied_head=False)
CELLS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"kind": "fsdp"}, {"precision": "fp32", "accumulation": 1}),
    ({"kind": "fsdp", "reshard_after_forward": False}, {"precision": "fp32", "accumulation": 1}),
    ({"kind": "fsdp"}, {"precision": "bf16", "accumulation": 2}),
    ({"kind": "fsdp", "shard_size": 2}, {"precision": "fp32", "accumulation": 1}),
    ({"kind": "fsdp", "shard_size": 2, "accumulate": "sharded"}, {"precision": "bf16", "accumulation": 3}),
    ({"kind": "deepspeed", "zero_stage": 1}, {"precision": "bf16", "accumulation": 2}),
    ({"kind": "deepspeed", "zero_stage": 2}, {"precision": "fp32", "accumulation": 1}),
    ({"kind": "deepspeed", "zero_stage": 3, "stage3_persistence_elements": 0}, {"precision": "bf16", "accumulation": 1}),
    ({"kind": "fsdp", "context_parallel_size": 2}, {"precision": "bf16", "accumulation": 2}),
    (
        {"kind": "fsdp", "context_parallel_size": 4, "context_parallel_method": "gather"},
        {"precision": "fp32", "accumulation": 1, "checkpoint_every": 2},
    ),
]


def engine_of(values: dict[str, Any]) -> EngineConfig:
    return TypeAdapter(EngineConfig).validate_python(values)


def count_cells(world: World) -> list[dict[str, int]]:
    counts, ids = [], torch.zeros(1, MODEL.seq_len, dtype=torch.long)
    for values, run in CELLS:
        config = engine_of(values)
        shared = with_context_parallel(world, config.context_parallel_size)
        options = {key: run[key] for key in ("precision", "checkpoint_every") if key in run}
        engine = build_engine(MODEL, OptimConfig(), config, shared, micro_batch_size=1, **options)
        draw_weights(engine, MODEL, 0)
        for _ in range(3):
            with CollectiveCounter() as counter:
                for number in range(run["accumulation"]):
                    engine.backward(engine.model(ids, ids) / ids.numel(), last=number == run["accumulation"] - 1)
                engine.step(1e-3, 1.0)
        counts.append(dict(counter.bytes))
    return counts


@pytest.mark.slow
def test_bytes_equal_what_is_counted_on_gloo(tmp_path: Path) -> None:
    counted = run_ranks(count_cells, 4, tmp_path, timeout_seconds=1800)[0]
    for (values, run), found in zip(CELLS, counted, strict=True):
        config = engine_of(values)
        tokens = MODEL.seq_len // config.context_parallel_size
        job = Job(MODEL, config, OptimConfig(), run["precision"], 1, tokens, 4, run["accumulation"])
        job = replace(job, checkpoint_every=run.get("checkpoint_every", 0))
        planned: dict[str, int] = {}
        for item in step_traffic(job):
            planned[item.collective] = planned.get(item.collective, 0) + item.bytes
        # DeepSpeed pads flat groups to whole partitions, a few elements.
        assert found == pytest.approx(planned, rel=0 if values["kind"] == "fsdp" else 0.001), (values, run)


def test_a_ring_sends_all_but_its_own_part_and_an_all_reduce_twice() -> None:
    assert Traffic("all-gather", "weights", 800, 8).sent == 700
    assert Traffic("all-reduce", "gradients", 800, 8).sent == 1400


def test_seconds_follow_the_slower_link() -> None:
    speeds: dict[str, Any] = {"gpus_per_node": 8, "node_bandwidth": 100.0, "network_bandwidth": 400.0}
    assert traffic_seconds([Traffic("all-gather", "weights", 800, 8)], **speeds) == 7
    assert traffic_seconds([Traffic("all-gather", "weights", 6400, 64)], **speeds) == pytest.approx(6300 / 400)
    # One GPU per node and group: the eight groups of a node share its adapters.
    assert traffic_seconds([Traffic("all-reduce", "gradients", 800, 8, "far")], **speeds) == pytest.approx(1400 / 50)


def test_one_rank_sends_nothing() -> None:
    assert step_traffic(Job(MODEL, FSDPConfig(), OptimConfig(), "bf16", 1, 32, 1)) == []
