"""Compiled blocks have no graph break: not on the bare model (test_model.py), and not under FSDP2 and ZeRO 1 either.

Under ZeRO 3 DeepSpeed's hooks cut the graph of every module: 38 breaks on this model of two blocks (torch 2.13, DeepSpeed
0.19.8; put "zero3" into ENGINES to see them).
"""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from toy import MODEL, make_engine, train_steps

from megagpt.distributed.world import World
from megagpt.engine.initial_weights import draw_weights

ENGINES = ["fsdp", "zero1"]


def breaks_and_losses(world: World, names: list[str]) -> dict[str, Any]:
    """By engine: graph breaks with their reasons, the losses compiled and not."""
    import warnings

    from torch._dynamo.utils import counters

    warnings.simplefilter("ignore")
    found = {}
    for name in names:
        losses = []
        for compiled in (False, True):
            counters.clear()
            engine = make_engine(world, name, compile_blocks=compiled)
            draw_weights(engine, MODEL, seed=1)
            losses.append(train_steps(engine, world, range(3)))
        found[name] = {"breaks": dict(counters["graph_break"]), "frames": dict(counters["frames"]), "losses": losses}
    return found


@pytest.mark.slow
def test_engines_cut_no_graph(tmp_path: Path) -> None:
    found = run_ranks(breaks_and_losses, 2, tmp_path, ENGINES)[0]  # one rank alone is not sharded
    for name, result in found.items():
        print(name, result["frames"], sum(result["breaks"].values()), "graph breaks")
        plain, compiled = result["losses"]
        assert max(abs(a - b) for a, b in zip(plain, compiled, strict=True)) < 1e-4, name
        assert result["frames"]["ok"] > 0, name
        assert result["breaks"] == {}, name
