"""Learning rates by pattern: every engine updates as a plain loop does, and hands its states to any other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from toy import ADAMW, DATASET, GLOBAL_BATCH_SIZE, MAX_STEPS, MODEL, MUON, at_step, make_engine, train_steps

from megagpt.data.loader import step_batches
from megagpt.distributed.world import World
from megagpt.engine.base import Engine
from megagpt.engine.initial_weights import draw_weights
from megagpt.engine.optim import OptimConfig, build_optimizer, lr_at, parameter_groups
from megagpt.model.gpt import GPT, initialise

FACTORS = {"embedding.*": 0.0, "blocks.0.attention.*": 0.0, "blocks.1.mlp.*": 3.0, "*norm.weight": 0.5}
CHANGES = {"lr_factors": FACTORS, "eps": 1e-4}
"""Adam's first updates are of the learning rate's size whatever the gradient's; with this eps one of rounding makes none."""
OPTIMIZERS = {kind: config.model_copy(update=CHANGES) for kind, config in (("adamw", ADAMW), ("muon", MUON))}
ENGINES, STEPS = ("zero0", "zero1", "zero2", "zero3", "fsdp"), 3


def plain_loop(optim: OptimConfig) -> dict[str, np.ndarray]:
    """Weights after the steps, with a factor looked up for each group from a parameter in it."""
    model = GPT(MODEL)
    initialise(model, seed=1)
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(parameter_groups(model, optim), optim)
    factors = (("embedding.weight", 0.0), ("blocks.0.attention.", 0.0), ("blocks.1.mlp.", 3.0))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            name = names[group["params"][0]]
            found = [factor for start, factor in factors if name.startswith(start)]
            group["lr"] = lr_at(optim, step, MAX_STEPS) * (found[0] if found else 0.5 if name.endswith("norm.weight") else 1.0)
        [batch] = step_batches(
            DATASET, at_step(step), global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=GLOBAL_BATCH_SIZE, rank=0, size=1
        ).micro_batches
        (model(batch.ids, batch.targets) / batch.num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().flatten().numpy() for name, parameter in model.named_parameters()}


def whole(world: World, engine: Engine) -> dict[str, np.ndarray]:
    """All weights and states."""
    parts = world.gather([(key, p.start, p.numel, p.data.cpu().numpy().copy()) for key, p in engine.state().items()])
    found: dict[str, np.ndarray] = {}
    for key, first, numel, data in (part for rank in parts for part in rank):
        found.setdefault(key, np.full(numel, np.nan, np.float32))[first : first + len(data)] = data
    return found


def engine_steps(world: World, kind: str) -> list[Any]:
    """For each engine: weights after the steps; the losses of two more, on it and on fsdp with its weights and states."""
    optim, results = OPTIMIZERS[kind], []
    for name in ENGINES:
        engine = make_engine(world, name, optim)
        draw_weights(engine, MODEL, seed=1)
        train_steps(engine, world, range(STEPS), optim)
        found, other = whole(world, engine), make_engine(world, "fsdp", optim)
        for key, partition in other.state().items():
            partition.data.copy_(torch.from_numpy(found[key][partition.start : partition.start + len(partition.data)]))
        other.refresh(STEPS)
        after = [train_steps(each, world, range(STEPS, STEPS + 2), optim) for each in (engine, other)]
        results.append((name, {key: value for key, value in found.items() if key.startswith("param.")}, after))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_engine_updates_as_a_plain_loop(kind: str, tmp_path: Path) -> None:
    expected, start = plain_loop(OPTIMIZERS[kind]), GPT(MODEL)
    initialise(start, seed=1)
    for name, found, (same, other) in run_ranks(engine_steps, 2, tmp_path, kind)[0]:
        assert {key.removeprefix("param.") for key in found} == set(expected)
        for key, value in expected.items():
            # updates are of the learning rate's size, 1e-3; Muon rounds its own to bf16
            assert np.abs(found[f"param.{key}"] - value).max() < (2e-5 if kind == "adamw" else 2e-4), (name, key)
        for key, parameter in start.named_parameters():
            unchanged = np.array_equal(found[f"param.{key}"], parameter.detach().flatten().numpy())
            assert unchanged == key.startswith(("embedding.", "blocks.0.attention.")), (name, key)
        assert other == pytest.approx(same, abs=2e-5), name
