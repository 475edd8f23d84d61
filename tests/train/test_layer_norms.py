"""Norms by layer are those of the whole model, on every engine, and measuring leaves the training's bits as they are."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from toy import ADAMW, DATASET, MODEL, OPTIMIZERS, SGD, at_step, engines_on, make_engine

from megagpt.data.loader import step_batches
from megagpt.distributed.world import World
from megagpt.engine.initial_weights import draw_weights
from megagpt.engine.optim import OptimConfig
from megagpt.train.layer_norms import LayerNorms, layer_of

CLIPPED = ADAMW.model_copy(update={"max_grad_norm": 0.05})
STEPS = 4


def run(world: World, engine_name: str, optim: OptimConfig, every_steps: int) -> tuple[list[float], list[dict], list[float]]:
    """Losses of this rank, the norms measured, and the gradient norm of each step."""
    engine = make_engine(world, engine_name, optim)
    draw_weights(engine, MODEL, seed=1)
    norms, losses, found, totals = LayerNorms(every_steps, optim, world), [], [], []
    for step in range(STEPS):
        options: dict[str, Any] = {"global_batch_size": 12, "micro_batch_size": 3, "rank": world.rank, "size": world.size}
        batches = step_batches(DATASET, at_step(step), **options)
        (num_targets,) = world.sum([batches.num_targets])
        for i, batch in enumerate(batches.micro_batches):
            loss = engine.model(batch.ids, batch.targets) / num_targets
            engine.backward(loss, last=i == len(batches.micro_batches) - 1)
            losses.append(float(loss))
        norms.before(engine, step)
        result = engine.launch_step(1e-2, optim.max_grad_norm)
        engine.count_update(bool(result[1]))
        measured = norms.after(engine, result, optim.max_grad_norm)
        found += [] if measured is None else [measured]
        totals.append(float(result[0]))
    return losses, found, totals


def check(found: list[dict], totals: list[float], *, gradients: bool = True) -> None:
    assert len(found) == STEPS // 2
    for norms, total in zip(found, totals[1::2], strict=True):
        assert sorted(norms) == ["block_000", "block_001", "embedding", "norm"]
        for layer in norms.values():
            assert layer["weight"] > 0
            assert 0 < layer["update_ratio"] < 1
        if gradients:
            assert math.sqrt(sum(layer["gradient"] ** 2 for layer in norms.values())) == pytest.approx(total, rel=1e-4)


def alone(world: World) -> dict[str, Any]:
    """What one process measures with sgd, and of one large update what is measured and what it is."""
    with_sgd = {every_steps: run(world, "fsdp", SGD, every_steps) for every_steps in (0, 2)}
    engine = make_engine(world, "fsdp", ADAMW)
    draw_weights(engine, MODEL, seed=1)
    weights = {name: value.detach().clone() for name, value in engine.module.named_parameters()}
    norms = LayerNorms(1, ADAMW, world)
    engine.backward(engine.model(torch.arange(32)[None], torch.arange(1, 33)[None]) / 32, last=True)
    norms.before(engine, 0)
    found = norms.after(engine, engine.launch_step(0.1, 0.0), 0.0)
    after = dict(engine.module.named_parameters())
    (weight, change) = (weights["embedding.weight"], after["embedding.weight"].detach() - weights["embedding.weight"])
    norms.before(engine, 1)
    left_out = norms.after(engine, torch.tensor([math.nan, 0.0], dtype=torch.float64), 0.0)
    facts = {"weight": float(weight.norm()), "update_ratio": float(change.norm() / weight.norm())}
    return {"with_sgd": with_sgd, "found": found, "facts": facts, "left_out": left_out}


@pytest.mark.slow
def test_the_weights_and_the_update_are_those_of_the_layer(tmp_path: Path) -> None:
    (of,) = run_ranks(alone, 1, tmp_path)
    measured, found, totals = of["with_sgd"][2]
    assert (measured, []) == of["with_sgd"][0][:2], "measuring moves no bit"
    check(found, totals, gradients=False)
    for name, value in of["facts"].items():
        assert of["found"]["embedding"][name] == pytest.approx(value, rel=1e-5), name
    assert of["left_out"] is None, "an update that was not applied has no norms"


def test_names_of_layers() -> None:
    assert [layer_of(name) for name in ("blocks.12.mlp.up.weight", "head.weight")] == ["block_012", "head"]


def on_ranks(world: World) -> dict[str, tuple[list[dict], list[float]]]:
    results = {}
    for name in engines_on(world.size):
        measured, found, totals = run(world, name, CLIPPED, 2)
        if name in ("zero1", "zero3", "fsdp"):
            assert measured == run(world, name, CLIPPED, 0)[0], name
        results[name] = (found, totals)
    results["muon"] = run(world, "zero2", OPTIMIZERS["muon"], 2)[1:]
    return results


@pytest.mark.slow
def test_every_engine_says_the_same(tmp_path: Path) -> None:
    first, second = run_ranks(on_ranks, 2, tmp_path)
    assert first == second
    for name, (found, totals) in first.items():
        check(found, totals)
        for norms, expected in zip(found, first[name if name == "muon" else "zero0"][0], strict=True):
            for layer in norms:
                assert norms[layer] == pytest.approx(expected[layer], rel=2e-3), (name, layer)
