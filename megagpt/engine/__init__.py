"""How gradients cross ranks: one protocol, and the engines behind it.

The contract: gradients are SUMMED over ranks and micro-batches (the loop divides each micro-batch's summed loss by the global
number of targets). An engine hands out its fp32 weights and optimizer states as FlatPieces, views of its own memory: the
checkpoint writes them and reads into them, and fresh weights are drawn into them, so every engine starts and resumes the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol, TypeAlias

import torch
from pydantic import Field, Tag, model_validator
from torch import Tensor, nn

from megagpt.config import Config, UserError, by_kind
from megagpt.distributed.world import World
from megagpt.engine.optim import OptimConfig
from megagpt.model.float8 import Float8, refuse_float8, use_float8
from megagpt.model.gpt import GPT, ModelConfig, initial_value


@dataclass(frozen=True, slots=True)
class FlatPiece:
    """A contiguous run of a flattened parameter (or of an optimizer state of it) that lives on this rank.

    data: 1-D fp32 view of the engine's memory. start: its offset in the flattened parameter. numel: the length of the whole.
    copy, copies: `copies` ranks hold this same run and this is number `copy`; each writes its share of it.
    """

    data: Tensor
    start: int
    numel: int
    copy: int = 0
    copies: int = 1


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update did: global L2 norm of the gradients before clipping, and whether the update was applied."""

    grad_norm: float
    applied: bool


class Engine(Protocol):
    """A model spread over ranks."""

    model: Callable[..., Tensor]
    module: nn.Module
    updates: int
    formats: dict[str, str]
    """What the tensors of the first update were, see megagpt.engine.dtypes; filled by then."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of `loss`; `last` marks the step's last micro-batch."""
        ...

    def step(self, lr: float, max_norm: float) -> StepResult:
        """Clip to `max_norm` (0 = no clipping), update, zero the gradients. A non-finite update is not applied, and says so."""
        ...

    def state(self) -> dict[str, FlatPiece]:
        """`param.<name>` and `<optimizer state>.<name>` pieces of this rank, as views: writing into them changes the engine."""
        ...

    def refresh(self, updates: int) -> None:
        """After the pieces were written: rebuild the working weights and set the optimizer's step counts to `updates`."""
        ...


ReduceType: TypeAlias = Literal["fp32", "bf16"]


class DeepSpeedConfig(Config):
    """DeepSpeed ZeRO (arXiv 1910.02054)."""

    kind: Literal["deepspeed"] = "deepspeed"
    """deepspeed (ZeRO) or fsdp (torch's fully_shard)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over ranks: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights."""
    reduce_bucket_elements: int = Field(default=50_000_000, gt=0)
    """Gradients reduced at a time."""
    allgather_bucket_elements: int = Field(default=500_000_000, gt=0, multiple_of=2)
    """Weights gathered at a time (stages 1 and 2); an even number."""
    overlap_comm: bool = False
    """Whether to reduce gradients during the backward pass (stages 2 and 3)."""
    stage3_prefetch_elements: int = Field(default=50_000_000, ge=0)
    """Stage 3: weights fetched ahead."""
    stage3_max_live_elements: int = Field(default=1_000_000_000, ge=0)
    """Stage 3: gathered weights kept at a time."""
    stage3_persistence_elements: int = Field(default=100_000, ge=0)
    """Stage 3: parameters up to this size stay whole on every rank."""
    offload_optimizer: bool = False
    """Keep fp32 weights and optimizer states in host memory and update there (stages 1 to 3, arXiv 2101.06840)."""
    offload_parameters: bool = False
    """Stage 3: keep the working weights in host memory too, but for those in use (arXiv 2104.07857)."""
    reduce_dtype: ReduceType = "fp32"
    """The type in which gradients are added across ranks. bf16 halves the traffic and rounds the sums."""
    hpz_partition_size: int = Field(default=1, ge=1)
    """Stage 3: ranks that share a secondary copy of the weights, usually those of one node (arXiv 2306.10209); 1 = off."""

    @model_validator(mode="after")
    def _check(self) -> "DeepSpeedConfig":
        if self.overlap_comm and self.zero_stage < 2:
            raise ValueError(f"overlap_comm needs zero_stage 2 or 3, this is {self.zero_stage}")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1 to 3, this is 0")
        if self.offload_parameters and not (self.zero_stage == 3 and self.offload_optimizer):
            raise ValueError("offload_parameters needs zero_stage=3 and offload_optimizer=true")
        if self.hpz_partition_size > 1 and self.zero_stage != 3:
            raise ValueError(f"hpz_partition_size={self.hpz_partition_size} needs zero_stage=3, this is {self.zero_stage}")
        return self


class FSDPConfig(Config):
    """FSDP2, torch's fully_shard: weights, gradients and optimizer states are sharded (arXiv 2304.11277)."""

    kind: Literal["fsdp"] = "fsdp"
    """deepspeed (ZeRO) or fsdp (torch's fully_shard)."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights after its forward pass (as ZeRO 3) or keep them until the backward pass (as ZeRO 2)."""
    shard_size: int | None = Field(default=None, ge=1)
    """Ranks that share one copy of the model, usually those of one node; the copies are kept equal (HSDP). null = all ranks."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer states in host memory; the update runs there."""
    reduce_dtype: ReduceType = "fp32"
    """The type in which gradients are added across ranks. bf16 halves the traffic and rounds the sums."""


EngineConfig: TypeAlias = Annotated[
    Annotated[DeepSpeedConfig, Tag("deepspeed")] | Annotated[FSDPConfig, Tag("fsdp")], by_kind("deepspeed")
]
"""Which engine shards the model, and how; told apart by `kind`."""

Precision = Literal["fp32", "bf16"]
"""fp32: everything. bf16: bf16 working weights and activations; fp32 master weights, gradient sums, reductions and moments."""


def build_engine(
    model_config: ModelConfig,
    optim: OptimConfig,
    engine: EngineConfig,
    world: World,
    *,
    precision: Precision,
    micro_batch_size: int,
    checkpoint_every: int = 0,
    checkpoint_selectively: bool = False,
    compile_blocks: bool = False,
    canonical: bool = False,
    float8: Float8 = "none",
) -> Engine:
    """The engine that `engine` names, with weights not yet drawn or loaded. Raises UserError on what it cannot do.

    `canonical`: gradients are added in the order of the micro-batches (megagpt.engine.canonical), whatever the layout.
    """
    refuse_unsupported(engine, optim, precision, canonical=canonical)
    refuse_float8(float8, model_config, precision, canonical=canonical)

    def make() -> GPT:
        model = GPT(model_config, checkpoint_every=checkpoint_every, checkpoint_selectively=checkpoint_selectively)
        if float8 != "none":
            use_float8(model.blocks, float8, emulate=world.device.type == "cpu")
        model.head.compile_loss = compile_blocks
        for block in model.blocks if compile_blocks else ():
            block.compile()
        return model

    if isinstance(engine, FSDPConfig):
        from megagpt.engine.fsdp import FSDPEngine

        return FSDPEngine(make, optim, engine, world, precision=precision, canonical=canonical)
    from megagpt.engine.deepspeed import DeepSpeedEngine  # imports deepspeed: 2 s and a build cache

    options = {"precision": precision, "micro_batch_size": micro_batch_size, "canonical": canonical}
    return DeepSpeedEngine(make, optim, engine, world, **options)


def refuse_unsupported(engine: EngineConfig, optim: OptimConfig, precision: Precision, *, canonical: bool = False) -> None:
    """Raise UserError on a combination that no engine computes rightly."""
    if canonical:
        _refuse_canonical(engine, optim)
    if not isinstance(engine, DeepSpeedConfig):
        return
    stage = f"engine.zero_stage={engine.zero_stage}"
    if precision == "bf16" and engine.zero_stage == 0:
        raise UserError(f"{stage} with precision=bf16 is refused: DeepSpeed's stage 0 is inexact in bf16; use 1 to 3")
    if optim.kind == "muon" and engine.zero_stage > 0:
        raise UserError(
            f"optim.kind=muon with {stage}: Muon needs whole matrices, ZeRO cuts them; use engine.kind=fsdp or zero_stage=0"
        )
    if optim.kind == "adabelief" and engine.zero_stage == 3:
        raise UserError(
            f"optim.kind=adabelief with {stage}: its step count lies in the groups, which stage 3 empties; use 0 to 2 or fsdp"
        )


def _refuse_canonical(engine: EngineConfig, optim: OptimConfig) -> None:
    """Raise UserError where the order of sums cannot be held."""
    if isinstance(engine, DeepSpeedConfig) and engine.zero_stage != 1:
        raise UserError(f"determinism=canonical with engine.zero_stage={engine.zero_stage}: only stage 1 and engine.kind=fsdp")
    if isinstance(engine, FSDPConfig) and engine.shard_size is not None:
        raise UserError(
            f"determinism=canonical with engine.shard_size={engine.shard_size}: copies of shards (HSDP) are not covered"
        )
    if isinstance(engine, FSDPConfig) and engine.cpu_offload:
        raise UserError("determinism=canonical with engine.cpu_offload=true is not covered")
    if engine.reduce_dtype != "fp32":
        raise UserError(f"determinism=canonical with engine.reduce_dtype={engine.reduce_dtype}: it adds in fp32")
    if optim.kind == "muon":
        raise UserError("determinism=canonical with optim.kind=muon: its matrix products depend on how matrices are cut")


def draw_weights(engine: Engine, config: ModelConfig, seed: int) -> None:
    """Fill the engine with initial weights that depend on `seed` only, not on the layout."""
    shapes = whole_shapes(config)
    with torch.no_grad():
        for key, piece in engine.state().items():
            kind, _, name = key.partition(".")
            if kind == "param":
                full = initial_value(config, name, shapes[name], seed).flatten()
                piece.data.copy_(full[piece.start : piece.start + len(piece.data)])
            else:
                piece.data.zero_()
    engine.refresh(0)


def whole_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name and whole shape of every parameter, computed without allocating any."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(config).named_parameters()}
