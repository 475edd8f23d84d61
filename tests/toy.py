"""A toy training problem whose batches depend on the step only, and a plain loop and an engine loop over it."""

from typing import Any

import torch
from torch import Tensor

from megagpt.engine import DeepSpeedConfig, Engine, EngineConfig, FSDPConfig, build_engine
from megagpt.model import GPT, ModelConfig, initialise
from megagpt.optim import OptimConfig, ScheduleConfig, build_optimizer, lr_at, parameter_groups
from megagpt.world import World

MODEL = ModelConfig(vocab_size=64, seq_len=32, num_layers=3, num_heads=2, hidden_size=32)
MICRO_BATCHES, MICRO_BATCH_SIZE, MAX_STEPS = 4, 2, 60
ADAMW = OptimConfig(lr=1e-3, schedule=ScheduleConfig(warmup_steps=5))
SGD = OptimConfig(kind="sgd", lr=0.5, beta1=0.9, weight_decay=0.1, max_grad_norm=0.3, schedule=ScheduleConfig(kind="constant"))
MUON = OptimConfig(kind="muon", lr=2e-3, schedule=ScheduleConfig(warmup_steps=5))
ADABELIEF = OptimConfig(kind="adabelief", lr=1e-3, eps=1e-12, schedule=ScheduleConfig(warmup_steps=5))


def batch(step: int, number: int) -> tuple[Tensor, Tensor]:
    """Micro-batch `number` of a step: ids and targets [2, 32], some targets masked so that counts differ."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(0, MODEL.vocab_size, (MICRO_BATCH_SIZE, MODEL.seq_len + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[:, : 3 * number] = -100
    return tokens[:, :-1], targets


def num_targets(step: int) -> int:
    """Targets of all micro-batches of a step."""
    return sum(int((batch(step, number)[1] != -100).sum()) for number in range(MICRO_BATCHES))


def plain_losses(optim: OptimConfig, steps: int, model_config: ModelConfig = MODEL) -> list[float]:
    """The obvious loop: one process, whole batch, torch's own optimizer and clipping."""
    model = GPT(model_config)
    initialise(model, seed=1)
    optimizer = build_optimizer(parameter_groups(model, optim), optim)
    losses = []
    for step in range(steps):
        loss = torch.zeros(())
        for number in range(MICRO_BATCHES):
            loss = loss + model(*batch(step, number)) / num_targets(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, step, MAX_STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


ENGINES: dict[str, EngineConfig] = {
    **{f"zero{n}": DeepSpeedConfig(zero_stage=n, stage3_persistence_elements=0) for n in (0, 1, 2, 3)},  # type: ignore[arg-type]
    "fsdp": FSDPConfig(),
    "fsdp_kept": FSDPConfig(reshard_after_forward=False),
    "hsdp": FSDPConfig(shard_size=2),
}
"""Every engine and stage; nothing stays unsharded at ZeRO 3."""


def make_engine(world: World, name: str, optim: OptimConfig = ADAMW, **options: Any) -> Engine:
    """The engine of that name on the toy model."""
    options = {"precision": "fp32", "micro_batch_size": MICRO_BATCH_SIZE, "model": MODEL, **options}
    return build_engine(options.pop("model"), optim, ENGINES[name], world, **options)


def train_steps(engine: Engine, world: World, steps: range, optim: OptimConfig = ADAMW) -> list[float]:
    """Losses of the steps; micro-batches are dealt to the ranks in turn."""
    losses = []
    for step in steps:
        loss, mine = torch.zeros(()), range(world.rank, MICRO_BATCHES, world.size)
        rounds = -(-MICRO_BATCHES // world.size)
        for i in range(rounds):
            ids, targets = batch(step, mine[i]) if i < len(mine) else (batch(step, 0)[0], torch.full((2, 32), -100))
            micro_loss = engine.model(ids, targets) / num_targets(step)
            engine.backward(micro_loss, last=i == rounds - 1)
            loss += micro_loss.detach()
        result = engine.step(lr_at(optim, step, MAX_STEPS), optim.max_grad_norm)
        assert result.applied
        torch.distributed.all_reduce(loss)
        losses.append(float(loss))
    return losses
