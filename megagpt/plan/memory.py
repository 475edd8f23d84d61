"""Bytes of memory that each rank of a run holds, by part, computed without a GPU and without starting ranks.

A step is simulated as a list of allocations and releases, in the order in which the engine makes them (`Timeline`): the
states that stay, each unit's gathered weights and gradients, the buffers of the collectives, and the activations that
megagpt.plan.trace has measured. The plan is the peak of this list. bench/plan/memory.py compares it with real steps.
"""

from dataclasses import replace

from megagpt.engine.config import DeepSpeedConfig, FSDPConfig
from megagpt.plan.memory_fsdp import play_fsdp
from megagpt.plan.memory_zero import play_zero
from megagpt.plan.timeline import Job, MemoryPlan, Timeline, play_passes, shapes_of, state_bytes, units_of
from megagpt.plan.trace import Gradients


def plan_memory(job: Job) -> MemoryPlan:
    """The memory of rank 0, which holds the largest shards. Raises UserError if the engine's groups do not divide the ranks."""
    timeline, job = Timeline(), replace(job, accumulation=min(job.accumulation, 3))  # all but the first and last are alike
    if _plays_alone(job):
        _play_alone(job, timeline)
    elif isinstance(job.engine, FSDPConfig):
        play_fsdp(job, job.engine, timeline)
    else:
        play_zero(job, job.engine, timeline)
    peak, phase, parts = timeline.at_peak
    return MemoryPlan(peak, phase, {part: size for part, size in parts.items() if size}, timeline.peaks, timeline.host)


def _plays_alone(job: Job) -> bool:
    """Whether the engine uses the module unchanged, since there is nothing to shard (megagpt.engine)."""
    bf16_as_fp32 = job.kernels == "cpu" and not job.checkpoint_every
    if job.ranks > 1 or not (job.precision == "fp32" or bf16_as_fp32):
        return False
    if isinstance(job.engine, DeepSpeedConfig):
        return job.engine.zero_stage < 3 and not job.engine.offload_optimizer
    return job.kernels == "cpu" and not job.engine.cpu_offload


def _play_alone(job: Job, timeline: Timeline) -> None:
    """One process on a CPU: whole fp32 weights; in bf16 they are cast for each forward pass."""
    shapes, layers = shapes_of(job.model), job.model.num_layers
    numel, casts = sum(shape.numel() for shape in shapes.values()), job.precision == "bf16"
    timeline.change("master weights", 4 * numel)
    timeline.change(
        "optimizer states", sum(state_bytes(job.optim, name, shape) * shape.numel() for name, shape in shapes.items())
    )
    timeline.change("inputs", 8 * job.micro_batch_size * job.seq_len)
    # The trace casts the three layers that it has.
    cast_besides = 2 * (layers - 3) * sum(shape.numel() for shape in units_of(shapes)[0].values()) if casts else 0
    for micro in range(job.accumulation):
        mode: Gradients = "kept" if micro == 0 else "taken"
        timeline.phase = f"forward {micro + 1}"
        timeline.change("gathered weights", cast_besides)
        play_passes(job, timeline, mode, casts=casts, micro=micro)
        timeline.drop("gathered weights", "activations")
        timeline.change("gradients", 4 * numel if micro == 0 else 0)
    timeline.phase = "update"
    timeline.touch()
