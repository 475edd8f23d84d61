"""What is read of collectives that are under way: from torch's own flight recorder, and by looking at who waits."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, wait_until
from torch.distributed.flight_recorder.components.loader import read_dump

from megagpt.distributed.world import World
from megagpt.watchdog.flight_recorder import (
    WaitSampler,
    collectives_begun,
    compare_groups,
    not_come,
    read_groups,
    recorded_groups,
    write_dump,
)
from megagpt.watchdog.watchdog import judge, most_behind


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


def gpu_dumps(stuck: int) -> dict[int, dict[str, Any]]:
    """Dumps of four ranks that have launched the same collectives; the GPU of `stuck` never comes to number 8."""
    started = entry(8, "nccl:_reduce_scatter_base", state="started", retired=False)
    scheduled = entry(8, "nccl:_reduce_scatter_base", state="scheduled", retired=False)
    later = entry(9, "nccl:all_reduce", state="scheduled", retired=False)
    return {rank: {"entries": [entry(7, "nccl:x"), scheduled if rank == stuck else started, later]} for rank in range(4)}


def test_the_gpu_that_has_not_started_is_the_one_that_did_not_come() -> None:
    """On GPUs all hosts have launched equally much and wait for their devices: only the recorder knows."""
    groups = {rank: read_groups(dump, now_ns=9_000_000_000) for rank, dump in gpu_dumps(2).items()}
    assert not_come(groups) == {
        2: "has not started 8 nccl:_reduce_scatter_base [4, 2] Float of group 0 default_pg, in which ranks 0, 1, 3 wait"
    }
    name = "nccl:_reduce_scatter_base [4, 2] Float"
    assert compare_groups(groups) == f"group 0 default_pg: rank 2 in 8 {name} (scheduled), ranks 0, 1, 3 in 8 {name} (started)"
    assert not_come(dict.fromkeys(range(4), groups[2])) == {}
    assert not_come(dict.fromkeys(range(4), groups[0])) == {}, "all are in it: the network's fault"
    # Rank 1 is missing in group 0, but its GPU waits in another group for rank 3.
    other = {"process_group": ["5", "shard"]}
    waits = read_groups({"entries": [entry(3, "nccl:y", state="started", retired=False, **other), entry(7, "nccl:x")]}, 0)
    stuck = read_groups({"entries": [entry(2, "nccl:y", **other), entry(7, "nccl:x")]}, 0)
    assert list(not_come({0: groups[0], 1: waits, 2: groups[0], 3: stuck})) == [3]


def test_the_verdict_names_the_gpu_that_did_not_come() -> None:
    reports = {
        rank: {
            "rank": rank, "host": f"n{rank // 2}", "step": 7, "activity": "train", "position": [7, 1], "collectives": 11,
            "stuck_seconds": 400.0, "limit_seconds": 300.0, "ended": False, "waits_for_others": True, "cause": "device",
            "what": "thread MainThread at fetch.py", "groups": read_groups(dump, now_ns=9_000_000_000),
        }
        for rank, dump in gpu_dumps(2).items()
    }  # fmt: skip
    verdict = judge(reports, dict.fromkeys(range(1, 4), 1.0), 60.0)
    assert verdict is not None
    assert (verdict.rank, verdict.host, verdict.cause) == (2, "n1", "device")
    assert "its GPU has not started 8 nccl:_reduce_scatter_base" in verdict.what


def test_a_wait_for_the_gpu_in_unknown_code_is_judged_by_the_recorder() -> None:
    """All hosts stand in the same place of some library: the recorder tells who is missing; without it all are named."""
    groups = {rank: read_groups(dump, now_ns=9_000_000_000) for rank, dump in gpu_dumps(2).items()}
    reports = [
        {"rank": rank, "position": [7, 1], "collectives": 11, "waits_for_others": False, "what": "x", "groups": groups[rank]}
        for rank in range(4)
    ]
    assert [report["rank"] for report in most_behind(reports)[0]] == [2]
    waits = [{**report, "waits_for_others": report["rank"] != 1} for report in reports]
    assert [report["rank"] for report in most_behind(waits)[0]] == [1], "one that works is what the others wait for"
    same = [{**report, "groups": []} for report in reports]
    assert [report["rank"] for report in most_behind(same)[0]] == [0, 1, 2, 3]


def late(world: World, folder: str) -> dict[str, Any]:
    """Rank 1 comes late to an all-reduce, once both have looked; what each rank sees of it from other threads."""
    closing, seen = threading.Event(), {}
    sampler = WaitSampler(lambda: True)
    looking = threading.Thread(target=sampler.run, args=(closing,))
    world.barrier()
    begun = collectives_begun()

    def look() -> None:
        wait_until(lambda: world.rank == 1 or collectives_begun() > begun)
        time.sleep(0.8)
        seen["groups"] = recorded_groups()
        write_dump(Path(folder) / f"rank_{world.rank}")

    looker = threading.Thread(target=look)
    looker.start()
    looking.start()
    if world.rank == 1:
        wait_until(lambda: all((Path(folder) / f"rank_{rank}").exists() for rank in range(2)))
        time.sleep(0.7)
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
    assert open_one["seconds"] > 0.3
    assert second["groups"][0]["open"] == []
    assert second["groups"][0]["begun"] == open_one["number"] - 1
    stand = compare_groups({0: first["groups"], 1: second["groups"]})
    number = open_one["number"]
    assert stand == f"group 0 default_pg: rank 0 in {number} gloo:all_reduce [7] Float, rank 1 begun {number - 1}, none open"
    assert first["waited"] > 0.5
    assert first["waited"] > second["waited"]
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


def on_gpu(world: World, folder: str) -> dict[str, Any]:
    """Some collectives over NCCL, on one GPU."""
    for _ in range(50):
        dist.all_reduce(torch.ones(1 << 24, device=world.device))
        torch.cuda.synchronize()
    groups = recorded_groups()
    write_dump(Path(folder) / f"rank_{world.rank}")
    return {"groups": groups}
