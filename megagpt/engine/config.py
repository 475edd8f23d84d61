"""The engine section of a run: which engine, and how it shards."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, Tag, model_validator

from megagpt.config import Config, by_kind
from megagpt.model.context_parallel import ContextParallelMethod

ReduceType: TypeAlias = Literal["fp32", "bf16"]


class DeepSpeedConfig(Config):
    """DeepSpeed ZeRO (arXiv 1910.02054)."""

    kind: Literal["deepspeed"] = "deepspeed"
    """deepspeed (ZeRO) or fsdp (torch's fully_shard)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over ranks: 0 nothing, 1 optimizer states, 2 and gradients, 3 and weights."""
    reduce_bucket_elements: int = Field(default=50_000_000, gt=0)
    """Reduce bucket size in elements."""
    allgather_bucket_elements: int = Field(default=500_000_000, gt=0, multiple_of=2)
    """All-gather bucket size in elements (stages 1 and 2); must be even."""
    overlap_comm: bool = False
    """Whether to reduce gradients during the backward pass (stages 2 and 3)."""
    stage3_prefetch_elements: int = Field(default=50_000_000, ge=0)
    """Stage 3: elements to prefetch."""
    stage3_max_live_elements: int = Field(default=1_000_000_000, ge=0)
    """Stage 3: at most this many gathered elements at a time."""
    stage3_persistence_elements: int = Field(default=100_000, ge=0)
    """Stage 3: parameters up to this many elements are not sharded."""
    offload_optimizer: bool = False
    """Keep fp32 weights and optimizer states in host memory and update there (stages 1 to 3, arXiv 2101.06840)."""
    offload_parameters: bool = False
    """Stage 3: keep the working weights in host memory too, except those in use (arXiv 2104.07857)."""
    reduce_dtype: ReduceType = "fp32"
    """The type in which gradients are added across ranks. bf16 halves the traffic and rounds the sums."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each sample, every one holding a part of its tokens; divides the ranks and data.seq_len. 1 = off."""
    context_parallel_method: ContextParallelMethod = "ulysses"
    """ulysses: ranks exchange tokens for heads around attention (arXiv 2309.14509), num_heads is a multiple of the size.
    gather: each rank gets the keys and values of all tokens (as in arXiv 2407.21783), any number of heads."""
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
    accumulate: Literal["whole", "sharded"] = "whole"
    """How gradients of several micro-batches are added up: whole, on every rank in fp32 (4 bytes per parameter), and reduced
    once per step; or sharded, each micro-batch reduced by itself: saves that memory, and takes more traffic of gradients."""
    reduce_dtype: ReduceType = "fp32"
    """The type in which gradients are added across ranks. bf16 halves the traffic and rounds the sums."""
    context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share each sample, every one holding a part of its tokens; divides the ranks and data.seq_len. 1 = off."""
    context_parallel_method: ContextParallelMethod = "ulysses"
    """ulysses: ranks exchange tokens for heads around attention (arXiv 2309.14509), num_heads is a multiple of the size.
    gather: each rank gets the keys and values of all tokens (as in arXiv 2407.21783), any number of heads."""


EngineConfig: TypeAlias = Annotated[
    Annotated[DeepSpeedConfig, Tag("deepspeed")] | Annotated[FSDPConfig, Tag("fsdp")], by_kind("deepspeed")
]
"""Which engine shards the model, and how; `kind` selects it."""


Precision = Literal["fp32", "bf16"]
"""fp32: everything. bf16: bf16 working weights and activations; fp32 master weights, gradient sums, reductions and moments."""
