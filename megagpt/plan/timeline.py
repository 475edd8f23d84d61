"""The parts of every engine's memory plan: the job, the timeline of allocations, and the rules that shard tensors."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, cast

import torch

from megagpt.engine.adamw_bf16 import SCRATCH_BYTES, SLICE
from megagpt.engine.build import whole_shapes
from megagpt.engine.config import EngineConfig, Precision
from megagpt.engine.optim import OPTIMIZERS, OptimConfig
from megagpt.model.gpt import ModelConfig
from megagpt.plan.trace import Activations, Gradients, Kernels, Made, Span, TraceKey, trace

Shapes = dict[str, torch.Size]


def shapes_of(model: ModelConfig) -> Shapes:
    """Name and whole shape of every parameter."""
    return _shapes_of(cast(Hashable, model))  # frozen, which pydantic makes hashable


@lru_cache(maxsize=16)
def _shapes_of(model: Any) -> Shapes:
    return whole_shapes(model)


@dataclass(frozen=True, slots=True)
class Job:
    """The settings of a run that its memory and traffic depend on."""

    model: ModelConfig
    engine: EngineConfig
    optim: OptimConfig
    precision: Precision
    micro_batch_size: int
    seq_len: int
    """Tokens of a sample on one rank; with context parallelism, the rank's part of the sample."""
    ranks: int
    accumulation: int = 1
    checkpoint_every: int = 0
    checkpoint_selectively: bool = False
    kernels: Kernels = "gpu"
    documents: bool = False


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Peak bytes of tensors on a rank during a step, and the phase of that peak.

    parts: the peak's bytes by part. peaks: the peak of each phase. host: bytes of states that offloading keeps in host memory,
    per rank.
    """

    peak: int
    phase: str
    parts: dict[str, int]
    peaks: dict[str, int]
    host: int = 0


@dataclass
class Timeline:
    """Live bytes by part, now (`live`) and at the peak so far (`at_peak`), and the peak of each phase (`peaks`)."""

    live: dict[str, int] = field(default_factory=dict)
    phase: str = "start"
    peaks: dict[str, int] = field(default_factory=dict)
    at_peak: tuple[int, str, dict[str, int]] = (0, "", {})
    host: int = 0

    def change(self, part: str, size: int) -> None:
        """Allocate, or release with a negative size."""
        self.live[part] = self.live.get(part, 0) + size
        self.touch()

    def keep(self, part: str, size: int, *, on_host: bool) -> None:
        """Allocate for the whole run, on the device or in host memory."""
        if on_host:
            self.host += size
        else:
            self.change(part, size)

    def drop(self, *parts: str) -> None:
        """Release all of some parts."""
        for part in parts:
            self.live.pop(part, None)

    def touch(self, more: Mapping[str, int] = MappingProxyType({})) -> None:
        """Update the peaks with the live bytes plus `more`, which is alive only now."""
        total = sum(self.live.values()) + sum(more.values())
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), total)
        if total > self.at_peak[0]:
            parts = dict(self.live)
            for part, size in more.items():
                parts[part] = parts.get(part, 0) + size
            self.at_peak = (total, self.phase, parts)

    def span(self, part: str, span: Span) -> None:
        """Play a part of a pass: reach its peak, then keep what it leaves."""
        self.touch({part: span.peak})
        self.change(part, span.left)


def state_bytes(optim: OptimConfig, name: str, shape: torch.Size) -> int:
    """Bytes of optimizer states per element of a parameter."""
    matrix = len(shape) >= 2 and name.startswith("blocks.")
    kind = "adamw" if OPTIMIZERS[optim.kind].matrices_only and not matrix else optim.kind
    return OPTIMIZERS[kind].state_dtype.itemsize * len(OPTIMIZERS[kind].states)


def update_scratch(optim: OptimConfig, elements: int) -> dict[str, int]:
    """What an update holds beside the states of a tensor with so many elements, by part."""
    if OPTIMIZERS[optim.kind].state_dtype == torch.float32:  # torch's updates are in place
        return {}
    return {"optimizer scratch": SCRATCH_BYTES * min(SLICE, elements)}


def units_of(shapes: Shapes) -> tuple[Shapes, Shapes]:
    """(a block's parameters, the root's)."""
    block = {name: shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    root = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.")}
    return block, root


def shard_elements(shape: torch.Size, shards: int) -> int:
    """Elements of the first rank's shard, by torch.chunk's rule along the first dimension."""
    return -(-shape[0] // shards) * (shape.numel() // shape[0])


def width_of(job: Job) -> int:
    """Bytes per element of weights and activations."""
    return 2 if job.precision == "bf16" else 4


def checkpointing_of(job: Job, number: int) -> Literal["none", "selective", "full"]:
    """The activation checkpointing of a block, by its number from 0."""
    if not job.checkpoint_every or number % job.checkpoint_every:
        return "none"
    return "selective" if job.checkpoint_selectively else "full"


def trace_block(job: Job, number: int, gradients: Gradients, *, casts: bool = False) -> Activations:
    """Traced bytes of a block, by its number from 0, and of the embedding and the head around it."""
    key = TraceKey(
        job.model,
        job.micro_batch_size,
        job.seq_len,
        job.precision,
        checkpointing_of(job, number),
        job.kernels,
        gradients,
        documents=job.documents,
        casts=casts,
    )
    return trace(key)


def play_passes(
    job: Job,
    timeline: Timeline,
    mode: Gradients,
    *,
    casts: bool = False,
    micro: int = 0,
    before_backward: Mapping[str, int] = MappingProxyType({}),
    take: Callable[[str, int], None] | None = None,
) -> None:
    """Simulate both passes of a model with whole weights; its gradients are counted as activations.

    before_backward: bytes allocated between the passes. take: called when a gradient has been made, with the parameter's name
    and the bytes of activations, this gradient included, that were allocated since the part's start; only with `taken`.
    """

    def backward(span: Span, moments: Sequence[Made], prefix: str = "") -> None:
        for made in moments if take is not None else ():
            timeline.touch({"activations": made.peak})
            if take is not None and made.parameter:
                take(prefix + made.parameter, made.live)
        if take is None:
            timeline.touch({"activations": span.peak})
        timeline.change("activations", span.left)

    layers = job.model.num_layers
    timeline.span("activations", trace_block(job, 0, mode, casts=casts).embedding)
    for number in range(layers):
        timeline.span("activations", trace_block(job, number, mode, casts=casts).block)
    timeline.span("activations", trace_block(job, layers - 1, mode, casts=casts).head)
    timeline.phase = f"backward {micro + 1}"
    for part, size in before_backward.items():
        timeline.change(part, size)
    last = trace_block(job, layers - 1, mode, casts=casts)
    backward(last.head_backward, last.made_by_head)
    for number in reversed(range(layers)):
        of_block = trace_block(job, number, mode, casts=casts)
        backward(of_block.block_backward, of_block.made_by_block, f"blocks.{number}.")
    first = trace_block(job, 0, mode, casts=casts)
    backward(first.embedding_backward, first.made_by_embedding)
