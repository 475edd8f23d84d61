"""Bytes that ranks exchange in one step, per kind of collective, by the rules of the engines. Tests count them on gloo.

Bytes are those of the whole buffer (the larger of a collective's input and output); on a ring each of R ranks sends and
receives (R - 1) / R of them, twice that for an all-reduce.
"""

import math
from dataclasses import dataclass
from typing import Literal

from megagpt.engine.config import DeepSpeedConfig, FSDPConfig
from megagpt.plan.memory_zero import gathered_per_micro_batch
from megagpt.plan.timeline import Job, checkpointing_of, shapes_of, shard_elements, units_of, width_of

Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all"]


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of collective in a step: its purpose, the bytes of its buffers, and the number of ranks that take part.

    group: "whole" = all ranks; "near" = consecutive ranks (one node, if the group is as large as a node); "far" = one rank of
    each such group.
    """

    collective: Collective
    purpose: str
    bytes: int
    ranks: int
    group: Literal["whole", "near", "far"] = "whole"

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, and receives, on a ring."""
        share = (self.ranks - 1) / self.ranks
        return self.bytes * share * (2 if self.collective == "all-reduce" else 1)


def step_traffic(job: Job) -> list[Traffic]:
    """The collectives that each rank takes part in during one step, without the gradient norm and counters of a few bytes."""
    if job.ranks == 1:
        return []
    traffic = _fsdp(job, job.engine) if isinstance(job.engine, FSDPConfig) else _zero(job, job.engine)
    traffic.append(_shared_samples(job))
    return [item for item in traffic if item.bytes and item.ranks > 1]


def _fsdp(job: Job, engine: FSDPConfig) -> list[Traffic]:
    shapes = shapes_of(job.model)
    shards = engine.shard_size or job.ranks
    block, root = (sum(shards * shard_elements(s, shards) for s in unit.values()) for unit in units_of(shapes))
    blocks = block * job.model.num_layers
    width, reduce_width = width_of(job), 2 if engine.reduce_dtype == "bf16" else 4
    times = 2 if engine.reshard_after_forward else 1
    near = "whole" if shards == job.ranks else "near"
    reduced = reduce_width * (blocks + root) * (job.accumulation if engine.accumulate == "sharded" else 1)
    return [
        Traffic("all-gather", "weights", width * (times * blocks + root) * job.accumulation, shards, near),
        Traffic("reduce-scatter", "gradients", reduced, shards, near),
        Traffic("all-reduce", "gradients", reduced // shards, job.ranks // shards, "far"),
    ]


def _zero(job: Job, engine: DeepSpeedConfig) -> list[Traffic]:
    numel = sum(shape.numel() for shape in shapes_of(job.model).values())
    width, reduce_width = width_of(job), 2 if engine.reduce_dtype == "bf16" else 4
    if engine.zero_stage < 3:
        times = job.accumulation if engine.zero_stage == 2 else 1
        gathered = width * numel if engine.zero_stage else 0
        return [
            Traffic("all-gather", "weights", gathered, job.ranks),
            Traffic("all-reduce", "gradients", reduce_width * numel * times, job.ranks),
        ]
    forward, backward = gathered_per_micro_batch(job, engine)
    group = engine.hpz_partition_size
    near = Traffic("all-gather", "weights, second copy", width * backward * job.accumulation, group, "near")
    far = width * (forward + (0 if group > 1 else backward)) * job.accumulation
    return [
        Traffic("all-gather", "weights", far, job.ranks),
        *([near] if group > 1 else []),
        Traffic("reduce-scatter", "gradients", reduce_width * numel * job.accumulation, job.ranks),
    ]


def _shared_samples(job: Job) -> Traffic:
    """What the ranks of a context-parallel group exchange around attention: once in the forward pass, once more where it is
    recomputed, and the same amount of gradients. `job.seq_len` counts one rank's tokens."""
    engine, model = job.engine, job.model
    size = engine.context_parallel_size
    if size == 1:
        return Traffic("all-to-all", "attention", 0, 1)
    if engine.context_parallel_method == "ulysses":  # queries and outputs; keys and values, repeated to a multiple of the ranks
        heads = 2 * model.num_heads + 2 * math.lcm(model.kv_heads, size)
    else:  # the keys and values of all tokens
        heads = 2 * model.kv_heads * size
    recomputed = len([number for number in range(model.num_layers) if checkpointing_of(job, number) != "none"])
    times = 2 * model.num_layers + recomputed
    elements = job.micro_batch_size * job.seq_len * heads * model.head_width
    return Traffic("all-to-all", "attention", width_of(job) * elements * times * job.accumulation, size, "near")


def traffic_seconds(traffic: list[Traffic], *, gpus_per_node: int, node_bandwidth: float, network_bandwidth: float) -> float:
    """Seconds that the collectives take one after the other at full bandwidth.

    node_bandwidth: bytes per second of one GPU inside a node. network_bandwidth: of one node. A ring over whole nodes uses all
    adapters of a node at once; groups with one GPU per node share them, but each moves its own bytes through its share.
    """
    seconds = 0.0
    for item in traffic:
        if item.group == "far":
            seconds += item.sent / (network_bandwidth / gpus_per_node)
        elif item.ranks <= gpus_per_node:
            seconds += item.sent / node_bandwidth
        else:
            seconds += item.sent / network_bandwidth
    return seconds
