"""A function on several ranks of one machine, each a fresh process of a real process group."""

import os
import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` on ranks 0 .. size-1, each on one thread; returns their results in rank order.

    The function must be importable by name. Raises torch's ChildFailedError with the traceback of the first rank that failed.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    found = elastic_launch(config, _rank)(function, arguments)
    return [found[rank] for rank in range(size)]


def _rank(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from megagpt.distributed.world import close_world, init_world

    torch.set_num_threads(1)
    result = function(init_world(timeout_seconds=300), *arguments)
    close_world()
    return result
