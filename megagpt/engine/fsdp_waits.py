"""Measures where the computing of FSDP2 waits for its collectives; what overlaps with computing is not counted.

fully_shard gathers and reduces on streams of their own; the stream that computes waits for their events at three places.
There the same event is waited for first between two marks: what passes between them is the wait and nothing else. The wait
that follows then takes no time, so the order of the work stays as it is.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from megagpt.distributed.device_timer import DeviceTimer


def on_this_stream(event: Any) -> None:
    """Let the stream that computes wait for an event."""
    torch.cuda.current_stream().wait_event(event)


def measure_waits(units: Iterable[FSDPModule], timer: DeviceTimer, wait_for: Callable[[Any], None] = on_this_stream) -> None:
    """Let `timer` measure the waits of all units from now on. Names are those of torch 2.13's FSDPParamGroup."""
    for unit in units:
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            _before(group, "wait_for_unshard", _of_unshard, timer, wait_for)
            _before(group, "post_backward", _of_post_backward, timer, wait_for)
            _before(group, "finalize_backward", _of_finalize, timer, wait_for)


def _before(
    group: Any, name: str, events_of: Callable[[Any], list[Any]], timer: DeviceTimer, wait_for: Callable[[Any], None]
) -> None:
    """Wait for the events of `events_of` before the group's method of that name does."""
    method = getattr(group, name)

    def measured(*arguments: Any) -> Any:
        events = [event for event in events_of(group) if event is not None]
        if events:
            with timer():
                for event in events:
                    wait_for(event)
        return method(*arguments)

    setattr(group, name, measured)


def _of_unshard(group: Any) -> list[Any]:
    gathered = group._all_gather_result
    return [gathered.all_gather_event] if gathered else []


def _of_post_backward(group: Any) -> list[Any]:
    """Reduce-scatters whose memory has to be free before the next one begins."""
    if not group.reduce_grads:
        return []
    states = group.comm_ctx.reduce_scatter_states
    return [state.event for state in states[: max(0, len(states) + 1 - group.comm_ctx.reduce_scatter_max_input_buffers)]]


def _of_finalize(group: Any) -> list[Any]:
    return list(group.comm_ctx._last_post_reduce_events.values())
