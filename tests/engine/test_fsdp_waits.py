"""Where FSDP2's computing waits for collectives. A CPU's streams have no events; here they get some that are counted."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from toy import MODEL, make_engine, train_steps

from megagpt.distributed.world import World
from megagpt.engine import fsdp_waits
from megagpt.engine.initial_weights import draw_weights


class Marks:
    """In the place of the timer and of the stream: which events were waited for inside a measured block, and which outside."""

    def __init__(self) -> None:
        self.inside, self.measured, self.outside = False, [], []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def wait(self, event: Any) -> None:
        (self.measured if self.inside else self.outside).append(event)


def waits(world: World, name: str) -> dict[str, Any]:
    """Two steps with and without the measurement."""
    numbers, marks = itertools.count(), Marks()
    torch.cpu.Stream.record_event = lambda self: next(numbers)  # type: ignore[method-assign]
    torch.cpu.Stream.wait_event = lambda self, event: marks.wait(event)  # type: ignore[method-assign]
    losses = []
    for measured in (False, True):
        marks.measured, marks.outside = [], []
        engine = make_engine(world, name)
        draw_weights(engine, MODEL, seed=1)
        if measured:
            fsdp_waits.measure_waits(engine._units, marks, marks.wait)  # type: ignore[attr-defined,arg-type]
        losses.append(train_steps(engine, world, range(2)))
    first = [event for i, event in enumerate(marks.outside) if event not in marks.outside[:i]]
    return {"losses": losses, "measured": marks.measured, "not_measured": [e for e in first if e not in marks.measured]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "fsdp_kept"])
def test_every_wait_of_a_step_is_measured(name: str, tmp_path: Path) -> None:
    for found in run_ranks(waits, 2, tmp_path, name):
        assert found["losses"][0] == found["losses"][1]
        assert len(found["measured"]) > 10
        assert found["not_measured"] == []
