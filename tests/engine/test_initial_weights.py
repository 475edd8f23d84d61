"""Ranks share the drawing of the initial weights: the values are those of one rank that draws all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from toy import MODEL, engines_on, make_engine

from megagpt.distributed.world import World
from megagpt.engine import initial_weights
from megagpt.engine.base import Partition
from megagpt.engine.build import whole_shapes
from megagpt.engine.initial_weights import draw_weights, rounds
from megagpt.model.gpt import initial_value


def drawn(world: World) -> list[tuple[str, bool, list[str]]]:
    """By engine: whether this rank holds its part of the initial values, drawn alone or together, and what it drew."""
    found, names = [], []
    plain: Any = initial_weights.initial_value

    def counted(config: Any, name: str, *rest: Any) -> torch.Tensor:
        names.append(name)
        return plain(config, name, *rest)

    initial_weights.initial_value = counted
    for engine_name in engines_on(world.size):
        engine, same = make_engine(world, engine_name), True
        for together in (None, world):
            for partition in engine.state().values():
                partition.data.fill_(float("nan"))
            names.clear()
            draw_weights(engine, MODEL, seed=1, world=together)
            same = same and all(torch.equal(part.data, expected(key, part)) for key, part in engine.state().items())
        found.append((engine_name, same, list(names)))
    initial_weights.initial_value = plain
    return found


def expected(key: str, partition: Partition) -> torch.Tensor:
    kind, _, name = key.partition(".")
    if kind != "param":
        return torch.zeros(len(partition.data))
    whole = initial_value(MODEL, name, whole_shapes(MODEL)[name], 1).flatten()
    return whole[partition.start : partition.start + len(partition.data)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_each_parameter_is_drawn_once_and_the_values_are_the_same(size: int, tmp_path: Path) -> None:
    by_rank = run_ranks(drawn, size, tmp_path)
    for engines in zip(*by_rank, strict=True):
        assert all(same for _, same, _ in engines), engines
        together = [name for _, _, names in engines for name in names]
        assert len(together) == len(set(together)) > size, engines
        assert max(len(names) for _, _, names in engines) <= -(-len(together) // size), engines


def test_those_of_a_round_are_of_about_one_size() -> None:
    assert rounds({"a": 1, "b": 9, "c": 8, "d": 2, "e": 1}, 2) == [["b", "c"], ["d", "a"], ["e"]]
