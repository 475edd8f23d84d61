"""Every engine and layout gives the losses of a plain torch loop on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from megagpt.engine import EngineConfig, build_engine, draw_weights
from megagpt.model import GPT, ModelConfig, initialise
from megagpt.optim import OptimConfig, ScheduleConfig, build_optimizer, lr_at, parameter_groups
from megagpt.world import World

MODEL = ModelConfig(vocab_size=64, seq_len=32, num_layers=3, num_heads=2, hidden_size=32)
STEPS, MICRO_BATCHES, MICRO_BATCH_SIZE = 30, 4, 2
ADAMW = OptimConfig(lr=1e-3, schedule=ScheduleConfig(warmup_steps=5))
SGD = OptimConfig(kind="sgd", lr=0.5, beta1=0.9, weight_decay=0.1, max_grad_norm=0.3, schedule=ScheduleConfig(kind="constant"))


def batch(step: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Micro-batch `number` of a step: ids and targets [2, 32], some targets masked so that counts differ."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    tokens = torch.randint(0, MODEL.vocab_size, (MICRO_BATCH_SIZE, MODEL.seq_len + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[:, : 3 * number] = -100
    return tokens[:, :-1], targets


def num_targets(step: int) -> int:
    return sum(int((batch(step, number)[1] != -100).sum()) for number in range(MICRO_BATCHES))


def plain_losses(optim: OptimConfig) -> list[float]:
    """The obvious loop: one process, whole batch, torch's own optimizer and clipping."""
    model = GPT(MODEL)
    initialise(model, seed=1)
    optimizer = build_optimizer(parameter_groups(model, optim), optim)
    losses = []
    for step in range(STEPS):
        loss = sum(model(*batch(step, number)) for number in range(MICRO_BATCHES)) / num_targets(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(optim, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def engine_losses(world: World, cases: list[dict[str, Any]]) -> list[list[float]]:
    """Losses of each case on this world, its ranks taking every size-th micro-batch."""
    return [one_case(world, **case) for case in cases]


def one_case(world: World, stage: int, optim: OptimConfig, precision: Any = "fp32", checkpoint_every: int = 0) -> list[float]:
    config = EngineConfig(zero_stage=stage, stage3_persistence_elements=0)  # type: ignore[arg-type]
    engine = build_engine(
        MODEL, optim, config, world, precision=precision, micro_batch_size=MICRO_BATCH_SIZE, checkpoint_every=checkpoint_every
    )
    draw_weights(engine, MODEL, seed=1)
    losses = []
    for step in range(STEPS):
        mine = range(world.rank, MICRO_BATCHES, world.size)
        loss = torch.zeros(())
        for number in mine:
            micro_loss = engine.model(*batch(step, number)) / num_targets(step)
            engine.backward(micro_loss, last=number == mine[-1])
            loss += micro_loss.detach()
        result = engine.step(lr_at(optim, step, STEPS), optim.max_grad_norm)
        assert result.applied
        torch.distributed.all_reduce(loss)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_every_stage_matches_the_plain_loop(size: int, tmp_path: Path) -> None:
    cases = [
        {"stage": stage, "optim": optim, "checkpoint_every": every}
        for stage in (0, 1, 2, 3)
        for optim, every in ((ADAMW, 0), (SGD, 1))
    ]
    results = run_ranks(engine_losses, size, tmp_path, cases)
    expected = {optim.kind: plain_losses(optim) for optim in (ADAMW, SGD)}
    for case, losses in zip(cases, results[0], strict=True):
        difference = max(abs(a - b) for a, b in zip(losses, expected[case["optim"].kind], strict=True))
        # fp32 sums in another order move the loss by a few 1e-7; anything wrong (a mean of means, a clip factor) by 1e-3
        print(case["stage"], case["optim"].kind, case["checkpoint_every"], difference)
        assert difference < 1e-5, (size, case)
