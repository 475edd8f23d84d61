"""A step that finds no memory: what it leaves behind, and whether the settings that it names are accepted and need less."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import STEPS, losses, settings, start

from megagpt.command import EXIT_CRASH, EXIT_DONE
from megagpt.config import validate
from megagpt.engine.build import whole_shapes
from megagpt.files import read_json
from megagpt.plan.run_plan import planned_parts
from megagpt.train.config import TrainConfig
from megagpt.train.out_of_memory import Allocation, Held, allocations, in_words, is_out_of_memory, settings_to_try

FAULTS = Path(__file__).resolve().parents[1] / "support" / "faults"
MIB = 1 << 20


def config_of(**changes: Any) -> TrainConfig:
    values = settings(Path("shards"), Path("run"), **{"micro_batch_size": 4, "precision": "bf16", **changes})
    return validate(TrainConfig, values, source="test")


def names(config: TrainConfig, ranks: int, *, on_gpu: bool = True) -> list[str]:
    """The first setting of each change."""
    found = settings_to_try(config, ranks, on_gpu=on_gpu)
    return [f"{name}={value}" for change in found for name, value in change.changes.items()]


ZERO3 = {"zero_stage": 3}
FULL = {"activation_checkpointing": "full", "micro_batch_size": 1}


@pytest.mark.parametrize(
    ("changes", "ranks", "expected"),
    [
        ({}, 4, ["micro_batch_size=2", "activation_checkpointing=selective", "engine.zero_stage=2"]),
        ({"engine": ZERO3}, 4, ["micro_batch_size=2", "activation_checkpointing=full", "engine.offload_optimizer=True"]),
        (
            {"engine": {"kind": "fsdp"}},
            4,
            ["micro_batch_size=2", "activation_checkpointing=selective", "engine.cpu_offload=True"],
        ),
        (
            {"engine": {"kind": "fsdp", "reshard_after_forward": False}, "activation_checkpointing": "selective"},
            4,
            ["micro_batch_size=2", "activation_checkpointing=full", "engine.reshard_after_forward=True"],
        ),
        (
            {"engine": {"kind": "fsdp", "shard_size": 2}, **FULL},
            4,
            ["engine.accumulate=sharded", "engine.shard_size=None", "engine.cpu_offload=True"],
        ),
        ({**FULL}, 4, ["engine.zero_stage=2", "engine.zero_stage=3", "engine.offload_optimizer=True"]),
        ({**FULL, "engine": ZERO3 | {"offload_optimizer": True}}, 4, ["engine.offload_parameters=True"]),
        ({}, 1, ["micro_batch_size=2", "activation_checkpointing=selective", "engine.offload_optimizer=True"]),
        (
            {"determinism": "canonical", "activation_checkpointing": "full", "engine": {"kind": "fsdp"}},
            4,
            ["micro_batch_size=2", "allow_change=['micro_batch_size']"],
        ),
    ],
)
def test_settings_fit_the_run(changes: dict[str, Any], ranks: int, expected: list[str]) -> None:
    """Dropout of these runs keeps them from sharing samples, so that context parallelism is not among them."""
    assert names(config_of(**changes), ranks) == expected


def test_without_a_gpu_nothing_is_offloaded_and_the_copy_for_saves_goes() -> None:
    expected = ["micro_batch_size=2", "activation_checkpointing=selective", "save_in_background=False"]
    assert names(config_of(), 1, on_gpu=False) == expected


def test_long_samples_are_shared_where_all_else_is_done() -> None:
    model = {"vocab_size": 257, "seq_len": 32, "num_layers": 2, "num_heads": 2, "hidden_size": 32}
    config = config_of(**FULL, model=model, engine={"kind": "fsdp", "cpu_offload": True, "accumulate": "sharded"})
    assert names(config, 4) == ["engine.context_parallel_size=2"]


@pytest.mark.slow
def test_what_is_planned_to_need_as_much_is_not_named() -> None:
    """The buckets of ZeRO 2 are larger than all of this model."""
    config = config_of()
    plan = partial(planned_parts, ranks=4, kernels="gpu")
    found = settings_to_try(config, 4, on_gpu=True, plan=plan)
    assert "engine.zero_stage=2" in names(config, 4)
    assert [list(change.changes) for change in found[:2]] == [["micro_batch_size"], ["activation_checkpointing"]]
    assert {"engine.zero_stage": 2} not in [change.changes for change in found]
    before = sum(plan(config).values())
    assert all(change.planned_bytes is not None and change.planned_bytes < before for change in found)


def snapshot() -> list[dict[str, Any]]:
    """Segments as torch.cuda.memory._snapshot gives them, of a device on which a run holds 2 weights and 3 activations."""
    frames = [
        {"filename": "/env/torch/nn/modules/linear.py", "name": "forward", "line": 134},
        {"filename": "/env/megagpt/model/gpt.py", "name": "forward", "line": 210},
    ]
    first = [
        {"address": 0x1000_0000, "size": 64 * MIB, "requested_size": 64 * MIB, "state": "active_allocated", "frames": []},
        {"address": 0x1400_0000, "size": 32 * MIB, "requested_size": 32 * MIB, "state": "inactive", "frames": []},
        {"address": 0x1600_0000, "size": 32 * MIB, "requested_size": 30 * MIB, "state": "active_allocated", "frames": frames},
    ]
    # Releases before torch 2.1 give no address for a block: it follows the one before it.
    second = [{"size": 32 * MIB, "state": "active_allocated", "frames": frames} for _ in range(2)]
    second += [{"size": 8 * MIB, "state": "active_allocated"}, {"size": 8 * MIB, "state": "active_pending_free"}]
    return [
        {"address": 0x1000_0000, "total_size": 128 * MIB, "active_size": 96 * MIB, "blocks": first},
        {"address": 0x9000_0000, "total_size": 80 * MIB, "active_size": 80 * MIB, "blocks": second},
    ]


def test_allocations_are_named_by_what_lies_in_them() -> None:
    held = [
        Held(0x1000_0000, 16 * MIB, "weights", ("embedding.weight",), "cuda:0"),
        Held(0x1100_0000, 16 * MIB, "weights", ("head.weight", "head.bias"), "cuda:0"),
        Held(0x9000_0000, 16 * MIB, "optimizer states", ("offloaded",), "cpu"),
    ]
    assert allocations(snapshot(), held) == [
        Allocation(64 * MIB, 1, "weights of embedding.weight and 2 more"),
        Allocation(32 * MIB, 3, "activations or buffers made by forward (gpt.py:210)"),
        Allocation(8 * MIB, 1, "activations or buffers"),
    ]


def test_the_message_of_a_gpu() -> None:
    record = {
        "rank": 3,
        "step": 41,
        "when": "in step 42",
        "device": "cuda:3",
        "error": "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore",
        "free_bytes": 10**9,
        "total_bytes": 80 * 10**9,
        "unused_bytes_of_allocator": 9 * 10**9,
        "engine": {"weights": 10**9, "optimizer states": 2 * 10**9},
        "largest": [{"bytes": 32 * MIB, "count": 3, "what": "activations or buffers"}],
        "planned": {"activations": 10**9, "master weights": 4 * 10**9},
        "try": [{"changes": {"engine.shard_size": None}, "why": "shards", "planned_bytes": 3 * 10**9}],
        "snapshot": "rank_3_step_41.pickle",
    }
    words = in_words(record, Path("run/memory/rank_3_step_41.json"))
    for expected in (
        "rank 3 ran out of memory in step 42 on cuda:3: CUDA out of memory. Tried to allocate 2.00 GiB.\n",
        "free: 1.0 GB of 80.0 GB, and 9.0 GB unused in torch's blocks",
        "the engine's tensors: weights 1.0 GB, optimizer states 2.0 GB",
        "largest allocations: 3 x 33.6 MB activations or buffers",
        "planned at the most of a step: 5.0 GB (master weights 4.0 GB, activations 1.0 GB)",
        "engine.shard_size=null: shards (planned: 3.0 GB)",
        "PYTORCH_ALLOC_CONF=expandable_segments:True",
        "record: run/memory/rank_3_step_41.json, rank_3_step_41.pickle (open it at pytorch.org/memory_viz)",
    ):
        assert expected in words


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.slow
def test_an_evaluation_without_memory_is_recorded_too(
    project: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAULTS))
    monkeypatch.setenv("FAULTS", json.dumps([{"kind": "out_of_memory_in_evaluation"}]))
    ranks = start(
        project, tmp_path, settings(shards, tmp_path / "run", evaluate_every_steps=3, profile={"allocation_history": 9}), 1
    )
    assert ranks.wait() == [EXIT_CRASH]
    assert "profile.allocation_history=9: nothing is kept on cpu" in ranks.output()
    assert "error: rank 0 ran out of memory in the evaluation after step 3 on cpu: " in ranks.output()
    record = read_json(tmp_path / "run" / "memory" / "attempt_0001_rank_0_step_3.json")
    assert record["when"] == "in the evaluation after step 3"
    assert record["engine"]["optimizer states"] > 0
    assert list(record["try"][0]["changes"]) == ["micro_batch_size"]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "engine", "device"), [(1, {"zero_stage": 1}, ""), (2, {"kind": "fsdp"}, "cuda")])
def test_a_run_says_what_it_held_and_resumes(
    project: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    engine: dict[str, Any],
    device: str,
) -> None:
    rank, run_dir = size - 1, tmp_path / "run"
    fault = {"kind": "out_of_memory", "rank": rank, "step": 6, "once": str(tmp_path / "once"), "device": device}
    monkeypatch.setenv("PYTHONPATH", str(FAULTS))
    monkeypatch.setenv("FAULTS", json.dumps([fault]))
    values = settings(shards, run_dir, engine=engine)
    ranks = start(project, tmp_path, values, size)
    assert ranks.wait()[rank] == EXIT_CRASH
    output = ranks.logs[rank].read_text()
    assert f"error: rank {rank} ran out of memory in step 7 on cpu: " in output
    record = read_json(run_dir / "memory" / f"attempt_0001_rank_{rank}_step_6.json")
    elements = sum(shape.numel() for shape in whole_shapes(config_of().model).values())
    assert record["engine"]["weights"] + record["engine"].get("master weights", 0) == pytest.approx(
        4 * elements / size, rel=0.05
    )
    assert record["engine"]["optimizer states"] == pytest.approx(8 * elements / size, rel=0.05)
    assert record["planned"]["activations"] > 0
    rows = 257 // size  # the last rank has the smaller shard
    assert record["largest"][0] == {"bytes": 4 * 32 * rows, "count": 2, "what": "optimizer states of embedding.weight"}
    assert [list(item["changes"]) for item in record["try"]][:2] == [["micro_batch_size"], ["activation_checkpointing"]]
    assert 0 < record["free_bytes"] < record["total_bytes"]

    if size > 1:
        return
    ranks = start(project, tmp_path / "again", values, size, "micro_batch_size=1", "activation_checkpointing=selective")
    assert ranks.wait() == [EXIT_DONE] * size, ranks.output()
    assert max(losses(run_dir)) == STEPS
