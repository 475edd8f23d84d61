"""Initial weights that depend on the seed only: each parameter is drawn whole by one rank, and the others get what they hold.

Values come from one generator per parameter (initial_value), which has to be run from its start, so a rank cannot draw a slice
alone. If all ranks drew everything, a model of 8B would take each of them over a minute.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.distributed.world import World
from megagpt.engine.base import Engine
from megagpt.engine.build import whole_shapes
from megagpt.model.gpt import ModelConfig, initial_value
from megagpt.model.tune import TuneConfig, initial_adapter, is_adapter

Held = Mapping[str, tuple[int, int]]
"""By name of a parameter: the first element that a rank holds of it, flattened, and how many."""


def draw_weights(
    engine: Engine,
    config: ModelConfig,
    seed: int,
    progress: Callable[[], object] | None = None,
    tune: TuneConfig | None = None,
    world: World | None = None,
) -> None:
    """Fill what the engine trains with initial weights that depend on `seed` only, not on the layout.

    `world`: the ranks that share the drawing, all of which call this; None = this rank draws everything that it holds.
    `progress` is called now and then.
    """
    shapes, state = whole_shapes(config, tune), engine.state()
    parts = {key.removeprefix("param."): part for key, part in state.items() if key.startswith("param.")}
    held = {name: (part.start, len(part.data)) for name, part in parts.items()}

    def draw(name: str) -> Tensor:
        adapter = is_adapter(name)
        full = initial_adapter(name, shapes[name], seed) if adapter else initial_value(config, name, shapes[name], seed)
        return full.flatten()

    with torch.no_grad():
        for key, partition in state.items():
            if not key.startswith("param."):
                partition.data.zero_()
        everywhere = [held] if world is None else world.gather(held)
        for names in rounds({name: shapes[name].numel() for one in everywhere for name in one}, len(everywhere)):
            for name, values in _exchange(names, draw, everywhere, world):
                parts[name].data.copy_(values)
            if progress is not None:
                progress()
    engine.refresh(0)


def rounds(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """The names in groups of `num_ranks`, the largest parameters first, so that those of a group take equally long to draw."""
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    return [names[i : i + num_ranks] for i in range(0, len(names), num_ranks)]


def _exchange(
    names: Sequence[str], draw: Callable[[str], Tensor], everywhere: Sequence[Held], world: World | None
) -> list[tuple[str, Tensor]]:
    """Rank r draws names[r] and sends each rank its part; what this rank holds of each of the names."""
    rank = 0 if world is None else world.rank
    drawn = draw(names[rank]) if rank < len(names) and any(held.get(names[rank], (0, 0))[1] for held in everywhere) else None
    if world is None or world.size == 1:
        return [] if drawn is None else [(names[0], _part(drawn, everywhere[0][names[0]]))]
    sent = [_part(drawn, held.get(names[rank], (0, 0))) if drawn is not None else torch.empty(0) for held in everywhere]
    sizes = [everywhere[rank].get(name, (0, 0))[1] for name in names]
    received = torch.empty(sum(sizes))
    splits = [*sizes, *[0] * (world.size - len(names))]
    dist.all_to_all_single(received, torch.cat(sent), splits, [len(part) for part in sent], group=world.control)
    return [(name, part) for name, part in zip(names, received.split(sizes), strict=True) if name in everywhere[rank]]


def _part(full: Tensor, held: tuple[int, int]) -> Tensor:
    start, length = held
    return full[start : start + length]
