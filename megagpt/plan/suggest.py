"""Suggest settings with which a run fits or is faster. The search makes a plan for each candidate."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megagpt.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig
from megagpt.plan.run_plan import Cluster, RunPlan, make_plan
from megagpt.train.config import TrainConfig

FASTER = 1.03
"""A smaller speedup than this is not suggested."""
MAX_TOKENS = 1 << 17
"""Tokens of the largest micro-batch that is tried; matrix products reach their full speed with fewer."""


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Other settings of a run, its plan with them, and why."""

    changes: dict[str, Any]
    """By dotted name, as on a command line."""
    config: TrainConfig
    plan: RunPlan
    why: str


def suggest(config: TrainConfig, cluster: Cluster, plan: RunPlan) -> Suggestion | None:
    """The fastest settings that fit; None if the run's own fit and none is clearly faster, or if nothing fits.

    The search tries micro-batches in powers of two, all activation checkpointing, and all sharding of the configured engine.
    Without planned times it prefers less recomputation, then the larger micro-batch.
    """
    if cluster.memory_gib is None:
        return None
    best: tuple[tuple[float, ...], TrainConfig, RunPlan] | None = None
    for candidate in _candidates(config, cluster):
        found = _largest_micro_batch(candidate, cluster)
        if found is None:
            continue
        score = _score(*found)
        if best is None or score > best[0]:
            best = (score, *found)
    if best is None:
        return None
    _, chosen, chosen_plan = best
    changes = _changes(config, chosen)
    if not changes or (plan.fits and not _clearly_faster(chosen_plan, plan)):
        return None
    return Suggestion(changes, chosen, chosen_plan, _why(plan, chosen_plan))


def _candidates(config: TrainConfig, cluster: Cluster) -> Iterator[TrainConfig]:
    modes: dict[str, None] = dict.fromkeys([str(config.activation_checkpointing), "none", "selective", "full"])
    for engine in _engines(config.engine, cluster):
        for mode in modes:
            if mode == "selective" and isinstance(engine, DeepSpeedConfig) and engine.zero_stage == 3:
                continue  # the configuration refuses it, see TrainConfig
            checkpointing = int(mode) if mode.isdigit() else mode
            yield config.model_copy(update={"engine": engine, "activation_checkpointing": checkpointing})


def _engines(engine: EngineConfig, cluster: Cluster) -> list[EngineConfig]:
    node, ranks = cluster.gpus_per_node, cluster.gpus
    found: list[EngineConfig] = [engine]
    if isinstance(engine, FSDPConfig):
        found += [engine.model_copy(update={"reshard_after_forward": r, "shard_size": None}) for r in (True, False)]
        if ranks > node and ranks % node == 0:
            found.append(engine.model_copy(update={"reshard_after_forward": True, "shard_size": node}))
        found += [one.model_copy(update={"accumulate": "sharded"}) for one in found]
    else:
        stages: list[dict[str, Any]] = [{"zero_stage": s, "hpz_partition_size": 1} for s in (1, 2, 3)]
        if ranks > node and ranks % node == 0:
            stages.append({"zero_stage": 3, "hpz_partition_size": node})
        for stage in stages:
            values = {**engine.model_dump(), **stage}
            if values["zero_stage"] < 3:
                values["offload_parameters"] = False
            if values["zero_stage"] < 2:
                values["overlap_comm"] = False
            found.append(DeepSpeedConfig.model_validate(values))
    return [item for number, item in enumerate(found) if item not in found[:number]]


def _largest_micro_batch(config: TrainConfig, cluster: Cluster) -> tuple[TrainConfig, RunPlan] | None:
    """The largest power of two that fits. All are tried: without accumulation a larger micro-batch can need less than a
    smaller one with it, since fully_shard keeps whole gradients until the last micro-batch."""
    most = max(1, min(config.global_batch_size // cluster.gpus, MAX_TOKENS // config.data.seq_len))
    for bit in reversed(range(most.bit_length())):
        candidate = config.model_copy(update={"micro_batch_size": 1 << bit})
        plan = make_plan(candidate, cluster)
        if plan.fits:
            return candidate, plan
    return None


def _score(config: TrainConfig, plan: RunPlan) -> tuple[float, ...]:
    recomputation = {"none": 0, "selective": 1, "full": 3}.get(str(config.activation_checkpointing), 2)
    return (plan.tokens_per_second or 0.0, -recomputation, config.micro_batch_size)


def _clearly_faster(one: RunPlan, other: RunPlan) -> bool:
    return bool(one.tokens_per_second and other.tokens_per_second and one.tokens_per_second > FASTER * other.tokens_per_second)


def _changes(before: TrainConfig, after: TrainConfig) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name in ("micro_batch_size", "activation_checkpointing"):
        if getattr(before, name) != getattr(after, name):
            changes[name] = getattr(after, name)
    old, new = before.engine.model_dump(), after.engine.model_dump()
    changes |= {f"engine.{name}": value for name, value in new.items() if old.get(name) != value}
    return changes


def _why(before: RunPlan, after: RunPlan) -> str:
    words = [f"needs {after.needed_gib:.1f} instead of {before.needed_gib:.1f} GiB"]
    if before.capacity_gib is not None:
        words.append(f"of {before.capacity_gib:.1f}")
    if before.tokens_per_second and after.tokens_per_second:
        words.append(f"at {after.tokens_per_second / before.tokens_per_second:.2f} x the speed")
    return " ".join(words)
