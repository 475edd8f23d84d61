"""Where FSDP2's computing waits for collectives. A CPU's streams have no events; here they get some that are counted."""

import contextlib
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

Event = tuple[int, int]
"""Stream, and number among all events."""


class Streams:
    """In the place of the timer and of a CPU's streams: what computing waits for, in a measured block and outside of one."""

    def __init__(self) -> None:
        self.inside, self.recorded, self.measured = False, 0, 0
        self.passed: dict[int, int] = {}
        self.missed: list[Event] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def record(self, stream: Any) -> Event:
        self.recorded += 1
        return id(stream), self.recorded

    def wait(self, event: Any) -> None:
        if not isinstance(event, tuple):  # of the computing itself
            return
        stream, number = event
        if self.inside:
            self.measured += 1
            self.passed[stream] = max(number, self.passed.get(stream, 0))
        elif number > self.passed.get(stream, 0):  # what was waited for already takes no time
            self.missed.append(event)


def waits(world: World, name: str) -> dict[str, Any]:
    """Two steps without and with the measurement."""
    found: dict[str, Any] = {"losses": [], "missed": [], "measured": []}
    for measured in (False, True):
        streams = Streams()
        torch.cpu.Stream.record_event = lambda stream, streams=streams: streams.record(stream)  # type: ignore[method-assign]

        def wait(stream: Any, event: Any, streams: Streams = streams) -> None:
            if stream is torch.cpu.current_stream():
                streams.wait(event)

        torch.cpu.Stream.wait_event = wait  # type: ignore[method-assign]
        engine = make_engine(world, name)
        draw_weights(engine, MODEL, seed=1)
        if measured:
            fsdp_waits.measure_waits(engine._units, streams, streams.wait)  # type: ignore[attr-defined,arg-type]
        found["losses"].append(train_steps(engine, world, range(2)))
        found["missed"].append(len(streams.missed))
        found["measured"].append(streams.measured)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "fsdp_kept"])
def test_every_wait_of_a_step_is_measured(name: str, tmp_path: Path) -> None:
    for found in run_ranks(waits, 2, tmp_path, name):
        print(found)
        assert found["losses"][0] == found["losses"][1]
        assert found["measured"][0] == 0
        assert found["missed"][0] > 10, "the events of this test are those that are waited for"
        assert found["measured"][1] > 10
        assert found["missed"][1] == 0
