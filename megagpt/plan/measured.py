"""Measure the bytes that a real step holds and sends on this machine, to compare a plan with them."""

import importlib
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from megagpt.distributed.world import World
from megagpt.engine.build import build_engine
from megagpt.engine.config import EngineConfig, Precision
from megagpt.engine.initial_weights import draw_weights
from megagpt.engine.optim import OptimConfig
from megagpt.model.gpt import ModelConfig
from megagpt.plan.trace import StorageTracker

COLLECTIVES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_to_all_single": "all-to-all",
}
"""torch's name of an operation -> its kind of collective."""
RELEASE_SECONDS = 0.002
"""Pause after a collective, in which gloo's thread releases what it has sent."""


def measured_peak(
    world: World,
    model: ModelConfig,
    engine: EngineConfig,
    *,
    optim: OptimConfig | None = None,
    precision: Precision = "fp32",
    micro_batch_size: int = 1,
    accumulation: int = 1,
    checkpoint_every: int = 0,
    checkpoint_selectively: bool = False,
    steps: int = 3,
) -> dict[str, int]:
    """Peak bytes of live tensors on this rank, by phase, in the last of `steps` steps of a real engine.

    The phases are start (bytes before the step), forward 1, backward 1, ..., update. The earlier steps create what stays:
    DeepSpeed's buffers, and caches of sharding rules that run on tensors of global shape.
    """
    optim = optim or OptimConfig()
    # Under a tracker DeepSpeed's stage 3 imports it inside functions that it has replaced, where that fails.
    importlib.import_module("torch._dynamo.polyfills.tensor")
    with StorageTracker() as tracker, _hiding_gloo():
        built = build_engine(
            model,
            optim,
            engine,
            world,
            precision=precision,
            micro_batch_size=micro_batch_size,
            checkpoint_every=checkpoint_every,
            checkpoint_selectively=checkpoint_selectively,
        )
        draw_weights(built, model, 0)
        ids = torch.zeros(micro_batch_size, model.seq_len, dtype=torch.long)
        start = 0
        for _ in range(steps):
            start = tracker.start_peak()
            for number in range(accumulation):
                tracker.label = f"forward {number + 1}"
                loss: Tensor = built.model(ids, ids) / ids.numel()
                tracker.label = f"backward {number + 1}"
                built.backward(loss, last=number == accumulation - 1)
                del loss
            tracker.label = "update"
            built.step(1e-4, 1.0)
        return {"start": start, **tracker.peaks}


@contextmanager
def _hiding_gloo() -> Iterator[None]:
    """Do not track memory while a rank waits for a collective: gloo copies buffers there, other libraries do not. Pause after
    each wait, so that gloo's thread releases buffers that the step has freed; a busy machine would still count them."""
    wait = dist.Work.wait

    def wait_unseen(work: dist.Work, *timeout: Any) -> Any:
        with _disable_current_modes():
            done = wait(work, *timeout)
        time.sleep(RELEASE_SECONDS)
        return done

    dist.Work.wait = wait_unseen  # type: ignore[method-assign]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]


class CollectiveCounter(TorchDispatchMode):
    """Adds up the bytes of collectives' buffers by operation (the larger of input and output). Use it as a context manager."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs first, its local operations come here
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.overloadpacket._qualified_op_name.partition("::")
        if namespace == "c10d" or name == "all_to_all_single":
            sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            if sum(sizes) > 1024:  # not norms and counters
                self.bytes[COLLECTIVES.get(name) or str(name)] += max(sizes)
        return result
