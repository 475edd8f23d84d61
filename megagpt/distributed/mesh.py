"""How the ranks of a run share its samples: data-parallel groups hold other samples, the ranks of one group parts of the same.

    rank = dp_rank * cp_size + cp_rank          cp_size = engine.context_parallel_size, dp_size = ranks / cp_size

Samples are dealt to dp_size groups. The ranks of a context-parallel group follow each other, so that a group is inside a node
wherever its size divides the node's GPUs. Weights and optimizer states know nothing of it: they are spread over all ranks.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch.distributed as dist

from megagpt.config import UserError
from megagpt.distributed.world import World

NAME = "engine.context_parallel_size"


def with_context_parallel(world: World, cp_size: int) -> World:
    """The same ranks in context-parallel groups of `cp_size`; all ranks call it together. Raises UserError if they do not
    divide into groups."""
    refuse_groups(world.size, cp_size)
    if cp_size == 1:
        return world
    groups = [dist.new_group(range(first, first + cp_size)) for first in range(0, world.size, cp_size)]
    return replace(world, cp_size=cp_size, cp_group=groups[world.rank // cp_size])


def refuse_groups(ranks: int, cp_size: int) -> None:
    """Raise UserError unless `ranks` form whole groups; the message names sizes that would."""
    if ranks % cp_size:
        fitting = ", ".join(str(size) for size in range(1, ranks + 1) if ranks % size == 0)
        raise UserError(f"{NAME}={cp_size} does not divide the {ranks} ranks: one of {fitting} does")


def refuse_idle_groups(ranks: int, cp_size: int, batch_sizes: Iterable[tuple[str, int]], micro_batch_size: int) -> None:
    """Raise UserError if some batch, given as (name of the setting, samples), has fewer micro-batches than there are groups:
    a whole group would then compute nothing in every step. Without context parallelism a rank may."""
    if cp_size == 1:
        return
    groups = ranks // cp_size
    for name, size in batch_sizes:
        micro_batches = -(-size // micro_batch_size)
        if micro_batches < groups:
            raise UserError(
                f"{name}={size} is {micro_batches} micro-batches of micro_batch_size={micro_batch_size} for {groups} groups of "
                f"{NAME}={cp_size}: some would have no samples; raise it to {groups * micro_batch_size}, or {NAME} to "
                f"{_least_size(ranks, micro_batches)}"
            )


def _least_size(ranks: int, micro_batches: int) -> int:
    """The smallest size of a group with which each has a micro-batch."""
    return next(size for size in range(1, ranks + 1) if ranks % size == 0 and ranks // size <= micro_batches)
