"""A toy training problem: samples that are a function of their index, the engines on a small model, and train.py's step."""

from typing import Any

import numpy as np
import torch

from megagpt.data.dataset import Sample
from megagpt.data.loader import step_batches
from megagpt.data.state import TrainState
from megagpt.distributed.world import World
from megagpt.documents import IGNORE
from megagpt.engine.base import Engine
from megagpt.engine.build import build_engine
from megagpt.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig, Precision
from megagpt.engine.optim import OPTIMIZERS as SPECS
from megagpt.engine.optim import OptimConfig, ScheduleConfig, lr_at
from megagpt.model.context_parallel import ContextParallelMethod
from megagpt.model.float8 import Float8
from megagpt.model.gpt import ModelConfig
from megagpt.model.tune import TuneConfig

MODEL = ModelConfig(vocab_size=64, seq_len=32, num_layers=2, num_heads=2, num_kv_heads=1, hidden_size=32)
UNTIED = MODEL.model_copy(update={"tied_head": False})
GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, MAX_STEPS = 12, 3, 1000
ADAMW = OptimConfig(lr=1e-3, schedule=ScheduleConfig(warmup_steps=5))
SGD = OptimConfig(kind="sgd", lr=0.5, beta1=0.9, weight_decay=0.1, max_grad_norm=0.3, schedule=ScheduleConfig(kind="constant"))
MUON = OptimConfig(kind="muon", lr=2e-3, schedule=ScheduleConfig(warmup_steps=5))
ADABELIEF = OptimConfig(kind="adabelief", lr=1e-3, eps=1e-12, schedule=ScheduleConfig(warmup_steps=5))
ADAMW_BF16 = OptimConfig(kind="adamw_bf16_states", lr=1e-3, schedule=ScheduleConfig(warmup_steps=5))
OPTIMIZERS = {"adamw": ADAMW, "adamw_bf16_states": ADAMW_BF16, "sgd": SGD, "muon": MUON, "adabelief": ADABELIEF}
"""Settings with which each optimizer learns the toy problem: parity and checkpoint tests run all of them."""


def offered_on(engine: str, kind: str) -> bool:
    """Whether an engine of `engines_on` or `variations_on` takes this optimizer (megagpt.engine.build refuses the rest)."""
    return not (SPECS[kind].updates_in == "group" and engine.startswith("zero3"))


class ToyDataset:
    """Arithmetic sequences modulo the vocabulary with some tokens replaced; of some samples the first targets are masked. Each
    is three documents, for who looks at their lengths."""

    def __len__(self) -> int:
        return 1 << 30

    def sample(self, index: int) -> Sample:
        """Sample `index`, [32] tokens."""
        rng, length = np.random.default_rng(index), MODEL.seq_len
        tokens = (rng.integers(64) + rng.choice([1, 3, 5]) * np.arange(length + 1)) % MODEL.vocab_size
        tokens = np.where(rng.random(length + 1) < 0.1, rng.integers(MODEL.vocab_size, size=length + 1), tokens)
        targets = tokens[1:].copy()
        targets[: 3 * (index % 5)] = IGNORE
        ends = np.sort(rng.choice(np.arange(1, length), 2, replace=False))
        return Sample(tokens[:-1], targets, np.diff(ends, prepend=0, append=length).astype(np.int32))


DATASET = ToyDataset()


def engines_on(size: int) -> list[str]:
    """Every engine, stage and way to shard that there is on `size` ranks."""
    names = ["zero0", "zero1", "zero2", "zero3", "fsdp", "fsdp_kept"]
    return [*names, "hsdp"] if size > 1 else names


def variations_on(size: int) -> list[str]:
    """The same engines with states in host memory, and ZeRO 3 with a second copy of the weights inside pairs of ranks."""
    names = ["zero1_offload", "zero2_offload", "zero3_offload", "fsdp_offload", "fsdp_sharded_sums"]
    return [*names, "zero3_hpz"] if size % 2 == 0 else names


def engine_config(name: str, world: World, method: ContextParallelMethod = "ulysses") -> EngineConfig:
    """Its settings on these ranks, in the groups that the world has."""
    shared = {"context_parallel_size": world.cp_size, "context_parallel_method": method}
    return _engine_config(name, world.size).model_copy(update=shared)


def _engine_config(name: str, size: int) -> EngineConfig:
    """ZeRO 3 shards everything; HSDP is pairs on an even number of ranks, else copies."""
    if name.startswith("zero"):
        values: dict[str, Any] = {"zero_stage": int(name[4]), "stage3_persistence_elements": 0}
        if name.endswith("_offload"):
            values |= {"offload_optimizer": True, "offload_parameters": name == "zero3_offload"}
        return DeepSpeedConfig.model_validate(values | ({"hpz_partition_size": 2} if name.endswith("_hpz") else {}))
    if name == "hsdp":
        return FSDPConfig(shard_size=2 if size > 2 and size % 2 == 0 else 1)
    return FSDPConfig(
        reshard_after_forward=name != "fsdp_kept",
        cpu_offload=name == "fsdp_offload",
        accumulate="sharded" if name == "fsdp_sharded_sums" else "whole",
    )


def make_engine(
    world: World,
    name: str,
    optim: OptimConfig = ADAMW,
    *,
    model: ModelConfig = MODEL,
    precision: Precision = "fp32",
    micro_batch_size: int = MICRO_BATCH_SIZE,
    checkpoint_every: int = 0,
    checkpoint_selectively: bool = False,
    compile_blocks: bool = False,
    canonical: bool = False,
    float8: Float8 = "none",
    method: ContextParallelMethod = "ulysses",
    tune: TuneConfig | None = None,
) -> Engine:
    """The engine of that name on the toy model."""
    return build_engine(
        model,
        optim,
        engine_config(name, world, method),
        world,
        precision=precision,
        micro_batch_size=micro_batch_size,
        checkpoint_every=checkpoint_every,
        checkpoint_selectively=checkpoint_selectively,
        compile_blocks=compile_blocks,
        canonical=canonical,
        float8=float8,
        tune=tune,
    )


def at_step(step: int) -> TrainState:
    """The state before update number `step`."""
    return TrainState(step=step, samples=step * GLOBAL_BATCH_SIZE)


def train_steps(
    engine: Engine,
    world: World,
    steps: range,
    optim: OptimConfig = ADAMW,
    micro_batch_size: int = MICRO_BATCH_SIZE,
    *,
    document_mask: bool = False,
) -> list[float]:
    """Losses of the steps, on every rank."""
    losses = []
    layout: dict[str, Any] = {"micro_batch_size": micro_batch_size, "rank": world.dp_rank, "size": world.dp_size}
    layout |= {"global_batch_size": GLOBAL_BATCH_SIZE, "document_mask": document_mask}
    for step in steps:
        batches = step_batches(DATASET, at_step(step), **layout)
        (num_targets,), loss = world.sum([world.counts * batches.num_targets]), torch.zeros(())
        for i, batch in enumerate(batches.micro_batches):
            micro_loss = engine.model(batch.ids, batch.targets, batch.doc_lengths) / num_targets
            engine.backward(micro_loss, last=i == len(batches.micro_batches) - 1)
            loss += micro_loss.detach()
        result = engine.step(lr_at(optim, step, MAX_STEPS), optim.max_grad_norm)
        assert result.applied
        torch.distributed.all_reduce(loss)
        losses.append(float(loss))
    return losses
