"""Builds the engine that a configuration names; refuses settings that no engine computes correctly."""

import importlib
import os

import torch

from megagpt.config import UserError
from megagpt.distributed.device import cores_of_rank
from megagpt.distributed.world import World
from megagpt.engine.base import Engine
from megagpt.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig, Precision
from megagpt.engine.optim import OPTIMIZERS, OptimConfig
from megagpt.model.context_parallel import ContextParallel, refuse_context_parallel
from megagpt.model.float8 import Float8, refuse_float8, use_float8
from megagpt.model.gpt import GPT, ModelConfig
from megagpt.model.tune import TuneConfig, prepare


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
    tune: TuneConfig | None = None,
) -> Engine:
    """The engine that `engine` names, with weights not yet drawn or loaded. Raises UserError on settings that it does not
    support.

    `tune`: what is trained; None = everything. `canonical`: gradients are added in the order of the micro-batches
    (megagpt.engine.canonical), whatever the layout.
    """
    refuse_unsupported(engine, optim, precision, canonical=canonical)
    refuse_float8(float8, model_config, precision, canonical=canonical)
    refuse_shared_samples(engine, model_config, seq_len=None, canonical=canonical)
    assert engine.context_parallel_size == world.cp_size, "the world's groups are not those of the settings"

    use_cores_for_offload(engine, world.device)
    if compile_blocks:  # under DeepSpeed's stage 3 the model is made by replaced functions, in which this cannot be imported
        importlib.import_module("torch._dynamo.polyfills.tensor")

    def make() -> GPT:
        model = GPT(model_config, checkpoint_every=checkpoint_every, checkpoint_selectively=checkpoint_selectively)
        if tune is not None and tune.freezes:
            prepare(model, tune)
        if float8 != "none":
            use_float8(model.blocks, float8, emulate=world.device.type == "cpu")
        if world.cp_size > 1:
            method = engine.context_parallel_method
            model.context_parallel = ContextParallel(method, world.cp_rank, world.cp_size, world.cp_group)
        if compile_blocks:
            model.compile_blocks()
        return model

    if isinstance(engine, FSDPConfig):
        from megagpt.engine.fsdp import FSDPEngine

        return FSDPEngine(make, optim, engine, world, precision=precision, canonical=canonical)
    from megagpt.engine.deepspeed import DeepSpeedEngine  # imports deepspeed: 2 s and a build cache

    options = {"precision": precision, "micro_batch_size": micro_batch_size, "canonical": canonical}
    return DeepSpeedEngine(make, optim, engine, world, **options)


def use_cores_for_offload(engine: EngineConfig, device: torch.device) -> None:
    """Let the update of states in host memory beside a GPU use all cores of this rank: OMP_NUM_THREADS=1, which suits all else,
    would make it several times slower."""
    offloads = engine.cpu_offload if isinstance(engine, FSDPConfig) else engine.offload_optimizer
    if offloads and device.type == "cuda":
        threads = cores_of_rank(os.environ, len(os.sched_getaffinity(0)), torch.cuda.device_count())
        torch.set_num_threads(max(threads, torch.get_num_threads()))


def refuse_unsupported(engine: EngineConfig, optim: OptimConfig, precision: Precision, *, canonical: bool = False) -> None:
    """Raise UserError on a combination that no engine computes correctly."""
    if canonical:
        _refuse_canonical(engine, optim)
    if not isinstance(engine, DeepSpeedConfig):
        return
    stage = f"engine.zero_stage={engine.zero_stage}"
    if precision == "bf16" and engine.zero_stage == 0:
        raise UserError(f"{stage} with precision=bf16 is refused: DeepSpeed's stage 0 is inexact in bf16; use 1 to 3")
    optimizer, name = OPTIMIZERS[optim.kind], f"optim.kind={optim.kind}"
    if optimizer.updates_in == "group" and engine.zero_stage == 3:
        raise UserError(f"{name} with {stage}: its step count is in the groups, which stage 3 empties; use 0 to 2 or fsdp")


def refuse_shared_samples(engine: EngineConfig, model: ModelConfig, *, seq_len: int | None, canonical: bool) -> None:
    """Raise UserError if the ranks of a context-parallel group cannot share samples of `seq_len` tokens (None: any)."""
    size, method = engine.context_parallel_size, engine.context_parallel_method
    seq_len = 2 * size if seq_len is None else seq_len
    options = {"num_heads": model.num_heads, "seq_len": seq_len, "dropout": model.dropout}
    refuse_context_parallel(size, method, canonical=canonical, **options)


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
    if isinstance(engine, FSDPConfig) and engine.accumulate != "whole":
        raise UserError("determinism=canonical reduces every micro-batch by itself: engine.accumulate=sharded has no meaning")
    if engine.reduce_dtype != "fp32":
        raise UserError(f"determinism=canonical with engine.reduce_dtype={engine.reduce_dtype}: it adds in fp32")
    if OPTIMIZERS[optim.kind].matrices_only:
        raise UserError(
            f"determinism=canonical with optim.kind={optim.kind}: its matrix products depend on how matrices are cut"
        )


def whole_shapes(config: ModelConfig, tune: TuneConfig | None = None, *, trained_only: bool = False) -> dict[str, torch.Size]:
    """Name and whole shape of every parameter, computed without allocating any; with `tune` adapters too, of which and others
    `trained_only` leaves out what is frozen. Raises UserError if `tune` names what there is not."""
    with torch.device("meta"):
        model = GPT(config)
        if tune is not None and tune.freezes:
            prepare(model, tune)
        return {name: p.shape for name, p in model.named_parameters() if p.requires_grad or not trained_only}
