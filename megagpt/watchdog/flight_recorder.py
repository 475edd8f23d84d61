"""Observe the collectives of this process: how many were begun, which are open, and how long the rank waits in them.

Other threads than the one that trains read all of this, and nothing here makes a rank or a GPU wait. Torch's flight recorder
keeps the last collectives of each process group, on gloo and on NCCL (world.RECORDER_SETTINGS turns it on for NCCL). Torch's
own analysis, `torchfrtrace`, reads its dumps.
"""

import contextlib
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagpt.files import atomic_path
from megagpt.watchdog import stacks

Group = dict[str, Any]
"""One process group as a rank reports it: name, begun (number of collectives so far), open (the collectives that have not
ended, each with number, operation, state, and seconds since it was begun)."""

MAX_OPEN = 8
"""Most open collectives that are reported of a group."""


def collectives_begun() -> int:
    """How many collectives this process has begun in all its groups; ranks that have begun fewer are behind."""
    total = 0
    groups: Any = dist.distributed_c10d._world.pg_map
    for group in list(groups):
        with contextlib.suppress(RuntimeError):
            total += group._get_sequence_number_for_group()
    return total


# ---- the flight recorder


def recorded_groups(now_ns: int | None = None) -> list[Group]:
    """The flight recorder's record of this process's groups; [] if this torch has no recorder. now_ns: Unix time."""
    now_ns = time.time_ns() if now_ns is None else now_ns
    return [group for dump in _dumps("_json", True, False) for group in read_groups(json.loads(dump), now_ns)]


def read_groups(dump: Mapping[str, Any], now_ns: int) -> list[Group]:
    """The groups in a dump (JSON or pickle) of torch 2.13, format version 2.10. now_ns: Unix time in nanoseconds."""
    groups: dict[str, Group] = {}
    for entry in dump.get("entries", []):
        name = " ".join(part for part in entry["process_group"] if part and part != "undefined")
        group = groups.setdefault(name, {"name": name, "begun": 0, "open": []})
        group["begun"] = max(group["begun"], int(entry["collective_seq_id"]))
        if entry["state"] != "completed" and not entry["retired"] and len(group["open"]) < MAX_OPEN:
            waited = (now_ns - int(entry["time_created_ns"])) / 1e9
            state = {"number": int(entry["collective_seq_id"]), "operation": _operation(entry), "state": entry["state"]}
            group["open"].append(state | {"seconds": round(waited, 3)})
    return [groups[name] for name in sorted(groups)]


def compare_groups(ranks: Mapping[int, list[Group]]) -> str:
    """One line on where each rank is, for the groups in which a rank waits; "" if none waits."""
    names = sorted({group["name"] for groups in ranks.values() for group in groups if group["open"]})
    return "; ".join(_compare_group(name, ranks) for name in names[:4])


def not_come(ranks: Mapping[int, list[Group]]) -> dict[int, str]:
    """The ranks whose GPU has not started a collective in which other ranks' GPUs wait, each with a sentence on it.

    NCCL's entries are `scheduled` when the host has launched them and `started` when the GPU has reached them. A rank that is
    missing in one group counts only if it does not itself wait in another, unless all of them do. {} if no dump shows one.
    """
    missing: dict[int, str] = {}
    for name in sorted({group["name"] for groups in ranks.values() for group in groups}):
        members = {rank: group for rank, groups in ranks.items() for group in groups if group["name"] == name}
        started = {
            (place["number"], place["operation"])
            for group in members.values()
            for place in group["open"]
            if place["state"] == "started"
        }
        if not started:
            continue
        number, operation = min(started)
        waiting = sorted(rank for rank, group in members.items() if _has_started(group, number))
        for rank, group in members.items():
            before = any(place["number"] < number for place in group["open"])
            if rank not in waiting and (group["begun"] < number or before or _is_scheduled(group, number)):
                missing.setdefault(
                    rank, f"has not started {number} {operation} of group {name}, in which {_ranks(waiting)} wait"
                )
    idle = {
        rank for rank in missing if not any(place["state"] == "started" for group in ranks[rank] for place in group["open"])
    }
    return {rank: missing[rank] for rank in sorted(idle or missing)}


def _has_started(group: Group, number: int) -> bool:
    return any(place["number"] == number and place["state"] == "started" for place in group["open"])


def _is_scheduled(group: Group, number: int) -> bool:
    return any(place["number"] == number and place["state"] == "scheduled" for place in group["open"])


def write_dump(path: Path) -> None:
    """Write this rank's dump, with stacks, for `torchfrtrace --prefix ... FOLDER`: NCCL's if there is NCCL, else gloo's."""
    for dump in _dumps("", True, True, False)[:1]:
        with atomic_path(path) as temporary:
            temporary.write_bytes(dump)


def _compare_group(name: str, ranks: Mapping[int, list[Group]]) -> str:
    places: dict[str, list[int]] = {}
    firsts = [group["open"][0] for groups in ranks.values() for group in groups if group["name"] == name and group["open"]]
    several = len({first["state"] for first in firsts}) > 1  # one GPU is in it, another has not reached it
    for rank in sorted(ranks):
        for group in ranks[rank]:
            if group["name"] == name:
                first = group["open"][0] if group["open"] else None
                state = f" ({first['state']})" if first and several else ""
                place = f"in {first['number']} {first['operation']}{state}" if first else f"begun {group['begun']}, none open"
                places.setdefault(place, []).append(rank)
    parts = (f"{_ranks(members)} {place}" for place, members in sorted(places.items(), key=lambda item: len(item[1])))
    return f"group {name}: {', '.join(parts)}"


def _ranks(members: list[int]) -> str:
    shown = ", ".join(map(str, members[:8])) + (f" and {len(members) - 8} more" if len(members) > 8 else "")
    return f"rank {shown}" if len(members) == 1 else f"ranks {shown}"


def _operation(entry: Mapping[str, Any]) -> str:
    """What the ranks must agree on, for example `nccl:all_reduce [1024] Float`."""
    kinds = zip(entry["input_sizes"], entry["input_dtypes"], strict=False)
    return " ".join([entry["profiling_name"], *(f"{list(sizes)} {kind}" for sizes, kind in kinds)])


def _dumps(suffix: str, *arguments: bool) -> list[bytes]:
    """The dump of NCCL's recorder, if torch has it and a group uses it, then that of the other backends."""
    module: Any = torch._C._distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]
    names = ["_dump_nccl_trace"] if dist.is_nccl_available() and torch.cuda.is_available() else []
    found = [getattr(module, name + suffix, None) for name in [*names, "_dump_fr_trace"]]
    return [dump(*arguments) for dump in found if dump is not None]


# ---- waiting


class WaitSampler:
    """Seconds that this rank waits in collectives on the CPU, estimated by sampling whether its main thread sleeps inside
    torch's or DeepSpeed's collectives. A slow rank waits least, on any engine.

    NCCL's collectives run beside the GPU's computing: that one is running says nothing. See Engine.collective_waits.
    """

    def __init__(self, counts: Callable[[], bool]) -> None:
        """counts: returns whether the current moment is part of a step (and not, for example, of a save)."""
        self.seconds, self.looks, self.pause_seconds = 0.0, 0, 0.05
        self._counts = counts

    def run(self, closing: threading.Event) -> None:
        """Sample until `closing` is set, at irregular intervals, so that all parts of steps of equal length are sampled."""
        before = time.monotonic()
        while not closing.wait(self.pause_seconds * random.uniform(0.5, 1.5)):
            now = time.monotonic()
            if self._counts():
                self.looks += 1
                self.seconds += now - before if _main_thread_waits() else 0.0
            before = now


def _main_thread_waits() -> bool:
    """Whether the main thread sleeps at one place inside a collective; a thread that only passes there does not count."""
    main = threading.main_thread()
    before = _collective_place(main)
    if before is None:
        return False
    time.sleep(0.001)
    return _collective_place(main) == before and stacks.system_call(main.native_id) != "running"


def _collective_place(thread: threading.Thread) -> tuple[int, int] | None:
    frame = sys._current_frames().get(thread.ident or 0)
    return (id(frame), frame.f_lasti) if frame is not None and stacks.in_collective(frame) else None
