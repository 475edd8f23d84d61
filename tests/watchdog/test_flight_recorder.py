"""What is read of collectives that are under way: from torch's own flight recorder, and by looking at who waits."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.flight_recorder.components.loader import read_dump

from megagpt.distributed.world import World
from megagpt.watchdog.flight_recorder import (
    WaitSampler,
    collectives_begun,
    compare_groups,
    read_groups,
    recorded_groups,
    write_dump,
)


def entry(number: int, name: str, **changes: Any) -> dict[str, Any]:
    """As torch 2.13 writes it, shortened; the real ones are read below."""
    return {
        "collective_seq_id": number, "profiling_name": name, "process_group": ["0", "default_pg"], "state": "completed",
        "retired": True, "time_created_ns": 1_000_000_000, "input_sizes": [[4, 2]], "input_dtypes": ["Float"], **changes,
    }  # fmt: skip


def test_what_a_dump_says() -> None:
    waiting = entry(8, "nccl:all_reduce", state="started", retired=False, time_created_ns=4_000_000_000)
    other = entry(3, "nccl:_all_gather_base", process_group=["5", "undefined"])
    found = read_groups({"entries": [entry(7, "nccl:broadcast"), waiting, other]}, now_ns=6_500_000_000)
    place = {"number": 8, "operation": "nccl:all_reduce [4, 2] Float", "state": "started", "seconds": 2.5}
    assert found == [{"name": "0 default_pg", "begun": 8, "open": [place]}, {"name": "5", "begun": 3, "open": []}]


def test_ranks_are_told_apart_by_where_they_stand() -> None:
    def group(begun: int, operation: str = "") -> list[dict[str, Any]]:
        open_ones = [{"number": begun, "operation": operation, "state": "started", "seconds": 9.0}] if operation else []
        return [{"name": "0", "begun": begun, "open": open_ones}]

    waiting = {rank: group(8, "all_reduce [4] Float") for rank in (0, 2, 3)}
    behind = "group 0: rank 1 begun 7, none open, ranks 0, 2, 3 in 8 all_reduce [4] Float"
    assert compare_groups({**waiting, 1: group(7)}) == behind
    elsewhere = "group 0: rank 1 in 8 broadcast [4] Float, ranks 0, 2, 3 in 8 all_reduce [4] Float"
    assert compare_groups({**waiting, 1: group(8, "broadcast [4] Float")}) == elsewhere
    assert compare_groups({rank: group(8) for rank in range(4)}) == ""


def late(world: World, folder: str) -> dict[str, Any]:
    """Rank 1 comes a second and a half late to an all-reduce; what each rank sees of it from other threads."""
    closing, seen = threading.Event(), {}
    sampler = WaitSampler(world.device, lambda: True)
    looking = threading.Thread(target=sampler.run, args=(closing,))
    world.barrier()
    begun = collectives_begun()

    def look() -> None:
        time.sleep(0.8)
        seen["groups"] = recorded_groups()
        write_dump(Path(folder) / f"rank_{world.rank}")

    looker = threading.Thread(target=look)
    looker.start()
    looking.start()
    if world.rank == 1:
        time.sleep(1.5)
    dist.all_reduce(torch.ones(7), group=world.control)
    closing.set()
    for thread in (looking, looker):
        thread.join()
    return {**seen, "waited": sampler.seconds, "looks": sampler.looks, "begun": collectives_begun() - begun}


@pytest.mark.slow
def test_a_collective_that_waits_for_a_rank_is_seen(tmp_path: Path) -> None:
    first, second = run_ranks(late, 2, tmp_path / "ranks", str(tmp_path))
    (open_one,) = first["groups"][0]["open"]
    assert open_one["operation"] == "gloo:all_reduce [7] Float"
    assert 0.3 < open_one["seconds"] < 1.5
    assert second["groups"][0]["open"] == []
    assert second["groups"][0]["begun"] == open_one["number"] - 1
    stand = compare_groups({0: first["groups"], 1: second["groups"]})
    number = open_one["number"]
    assert stand == f"group 0 default_pg: rank 0 in {number} gloo:all_reduce [7] Float, rank 1 begun {number - 1}, none open"
    assert first["waited"] > 0.5 > second["waited"]
    assert min(first["looks"], second["looks"]) > 5
    assert first["begun"] == second["begun"] == 1
    # The files are those of torch's own tool.
    dump = read_dump("rank_", str(tmp_path / "rank_0"))
    assert dump["rank"] == 0
    assert dump["entries"][-1]["profiling_name"] == "gloo:all_reduce"  # type: ignore[index]
    assert any(frame["name"] == "late" for frame in dump["entries"][-1]["frames"])  # type: ignore[index]


@pytest.mark.gpu
def test_the_recorder_of_nccl_says_the_same(tmp_path: Path) -> None:
    (found,) = run_ranks(on_gpu, 1, tmp_path / "ranks", str(tmp_path))
    names = {operation for group in found["groups"] for operation in [group["name"]]}
    assert names
    assert read_dump("rank_", str(tmp_path / "rank_0"))["entries"][-1]["profiling_name"] == "nccl:all_reduce"  # type: ignore[index]
    assert found["looks"] > 0


def on_gpu(world: World, folder: str) -> dict[str, Any]:
    """Some collectives over NCCL, on one GPU."""
    closing = threading.Event()
    sampler = WaitSampler(world.device, lambda: True)
    sampler.pause_seconds = 0.02
    looking = threading.Thread(target=sampler.run, args=(closing,))
    looking.start()
    for _ in range(50):
        dist.all_reduce(torch.ones(1 << 24, device=world.device))
        torch.cuda.synchronize()
    groups = recorded_groups()
    closing.set()
    looking.join()
    write_dump(Path(folder) / f"rank_{world.rank}")
    return {"groups": groups, "looks": sampler.looks}
