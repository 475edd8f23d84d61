"""Which ranks share samples, and groups that cannot be formed."""

import pytest
import torch

from megagpt.config import UserError
from megagpt.distributed.mesh import refuse_groups, refuse_idle_groups, with_context_parallel
from megagpt.distributed.world import World, lone_world


def test_ranks_that_follow_each_other_share_samples() -> None:
    worlds = [World(rank, 6, 0, torch.device("cpu"), "none", None, cp_size=3) for rank in range(6)]
    assert [world.dp_rank for world in worlds] == [0, 0, 0, 1, 1, 1]
    assert [world.cp_rank for world in worlds] == [0, 1, 2, 0, 1, 2]
    assert [world.counts for world in worlds] == [1, 0, 0, 1, 0, 0]
    assert {world.dp_size for world in worlds} == {2}


def test_without_groups_every_rank_has_its_own_samples() -> None:
    world = lone_world(torch.device("cpu"))
    assert with_context_parallel(world, 1) is world
    assert (world.dp_rank, world.dp_size, world.cp_rank, world.counts) == (0, 1, 0, 1)


def test_groups_that_do_not_divide_the_ranks_are_refused_with_those_that_do() -> None:
    refuse_groups(12, 4)
    with pytest.raises(
        UserError, match=r"engine.context_parallel_size=5 does not divide the 12 ranks: one of 1, 2, 3, 4, 6, 12"
    ):
        refuse_groups(12, 5)
    with pytest.raises(UserError, match="context_parallel_size=2 does not divide the 1 ranks"):
        with_context_parallel(lone_world(torch.device("cpu")), 2)


def test_a_group_without_samples_is_refused_and_a_rank_is_not() -> None:
    batch = [("global_batch_size", 6)]
    refuse_idle_groups(8, 1, batch, 3)  # as ever: some ranks compute an empty micro-batch
    refuse_idle_groups(8, 4, batch, 3)
    with pytest.raises(UserError) as raised:
        refuse_idle_groups(8, 2, batch, 3)
    assert str(raised.value) == (
        "global_batch_size=6 is 2 micro-batches of micro_batch_size=3 for 4 groups of engine.context_parallel_size=2: "
        "some would have no samples; raise it to 12, or engine.context_parallel_size to 4"
    )
