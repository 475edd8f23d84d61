"""States in host memory, second copies, buckets and overlap change where things lie and when they move, not what comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from toy import MODEL, OPTIMIZERS, train_steps

from megagpt.config import Failure, UserError, validate
from megagpt.distributed.world import World
from megagpt.engine.build import build_engine
from megagpt.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig
from megagpt.engine.dtypes import check_formats, declared_formats
from megagpt.engine.initial_weights import draw_weights
from megagpt.engine.optim import OptimConfig

STEPS = 3
PLAIN: dict[str, EngineConfig] = {"zero1": DeepSpeedConfig(zero_stage=1), "fsdp": FSDPConfig()}
OFFLOADED: dict[str, EngineConfig] = {
    "zero1": DeepSpeedConfig(zero_stage=1, offload_optimizer=True),
    "zero2": DeepSpeedConfig(zero_stage=2, offload_optimizer=True),
    "zero3": DeepSpeedConfig(zero_stage=3, offload_optimizer=True, stage3_persistence_elements=0),
    "zero3_parameters": DeepSpeedConfig(
        zero_stage=3, offload_optimizer=True, offload_parameters=True, stage3_persistence_elements=0
    ),
    "zero3_hpz": DeepSpeedConfig(zero_stage=3, hpz_partition_size=2, stage3_persistence_elements=0),
    "zero2_overlap": DeepSpeedConfig(
        zero_stage=2, overlap_comm=True, reduce_bucket_elements=2_000, allgather_bucket_elements=998
    ),
    "zero3_overlap": DeepSpeedConfig(
        zero_stage=3,
        overlap_comm=True,
        reduce_bucket_elements=2_000,
        stage3_prefetch_elements=500,
        stage3_max_live_elements=9_000,
    ),
    "fsdp": FSDPConfig(cpu_offload=True),
}
IN_DEVICE_MEMORY = ("zero3_hpz", "zero2_overlap", "zero3_overlap")


def runs(world: World, cases: list[tuple[EngineConfig, str]], optimizer: str = "adamw") -> list[dict[str, Any]]:
    """Losses of two times STEPS steps with the state read back and written in again between them; sums of that state."""
    results, optim = [], OPTIMIZERS[optimizer]
    for config, precision in cases:
        engine = build_engine(MODEL, optim, config, world, precision=precision, micro_batch_size=3)  # type: ignore[arg-type]
        draw_weights(engine, MODEL, seed=1)
        losses = train_steps(engine, world, range(STEPS), optim)
        kept = {key: partition.data.clone() for key, partition in engine.state().items()}
        elements = sum(len(data) for data in kept.values())
        with torch.no_grad():
            for partition in engine.state().values():
                partition.data.zero_()
            engine.refresh(0)
            for key, partition in engine.state().items():
                partition.data.copy_(kept[key])
            engine.refresh(STEPS)
        losses += train_steps(engine, world, range(STEPS, 2 * STEPS), optim)
        check_formats(declared_formats(precision, config, optim), engine.formats | {"loss": "fp32"})  # type: ignore[arg-type]
        results.append({"losses": losses, "elements": elements, "offloads": offloads(engine)})
    return results


def offloads(engine: Any) -> bool:
    """Whether the engine's library says that it keeps the optimizer in host memory; on CPUs nothing else shows it."""
    if hasattr(engine, "_zero"):
        return bool(getattr(engine._zero, "cpu_offload", False) or getattr(engine._zero, "offload_optimizer", False))
    return engine.module._get_fsdp_state()._fsdp_param_group.fsdp_params[0].offload_to_cpu


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "optimizer", "names"),
    [
        ("fp32", "adamw", list(OFFLOADED)),
        ("bf16", "adamw", ["zero1", "zero3_parameters", "zero2_overlap", "fsdp"]),
        ("fp32", "muon", ["zero2", "zero3_parameters", "zero3_overlap"]),
        ("fp32", "adamw_bf16_states", ["zero2", "zero3_parameters", "fsdp"]),
    ],
)
def test_the_losses_are_the_same(precision: str, optimizer: str, names: list[str], tmp_path: Path) -> None:
    cases = [(config, precision) for config in (PLAIN["zero1"], *(OFFLOADED[name] for name in names))]
    plain, *offloaded = run_ranks(runs, 2, tmp_path, cases, optimizer)[0]
    assert not plain["offloads"]
    for name, result in zip(names, offloaded, strict=True):
        difference = max(abs(a - b) for a, b in zip(plain["losses"], result["losses"], strict=True))
        print(f"{precision} {name}: {difference:.2e}")
        assert difference < (1e-5 if precision == "fp32" else 1e-2), name
        assert result["offloads"] == (name not in IN_DEVICE_MEMORY), name
        assert abs(result["elements"] - plain["elements"]) <= 64, name


@pytest.mark.slow
def test_gradients_added_in_bf16_are_near_and_not_the_same(tmp_path: Path) -> None:
    configs = [config.model_copy(update={"reduce_dtype": "bf16"}) for config in PLAIN.values()]
    plain, *rounded = run_ranks(runs, 2, tmp_path, [(config, "fp32") for config in (PLAIN["zero1"], *configs)])[0]
    for result in rounded:
        difference = max(abs(a - b) for a, b in zip(plain["losses"], result["losses"], strict=True))
        assert 1e-6 < difference < 2e-2, difference


def test_a_format_other_than_declared_is_named() -> None:
    declared = declared_formats("bf16", FSDPConfig(), OptimConfig())
    check_formats(declared, dict(declared))
    with pytest.raises(Failure, match=r"precision: gradients are bf16 instead of fp32$"):
        check_formats(declared, {**declared, "gradients": "bf16"})
    with pytest.raises(Failure, match="optimizer_states are None"):
        check_formats(declared, {key: name for key, name in declared.items() if key != "optimizer_states"})


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"zero_stage": 0, "offload_optimizer": True}, "offload_optimizer needs zero_stage 1 to 3"),
        ({"zero_stage": 2, "offload_optimizer": True, "offload_parameters": True}, "offload_parameters needs zero_stage=3"),
        ({"zero_stage": 3, "offload_parameters": True}, "offload_parameters needs zero_stage=3 and offload_optimizer"),
    ],
)
def test_offload_without_what_it_needs_is_refused(section: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what):
        validate(DeepSpeedConfig, section, source="test")
