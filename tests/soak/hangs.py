"""The watchdog: what it says of hangs that it knows nothing of, its silence in a healthy run, and what it costs.

    python tests/soak/hangs.py [--short]     (about six minutes; --short: three hangs and 300 healthy steps)

The hangs are those of tests/watchdog/test_watchdog.py: code injected from there makes rank 1
of a real run hang, the trainer does not know how.
"""

import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support"), str(PROJECT / "tests" / "watchdog")]

from ranks import Ranks  # noqa: E402
from small_run import settings, write_shards  # noqa: E402
from test_watchdog import HANGS, hang  # noqa: E402

from megagpt.measurement import write_results  # noqa: E402

DESCRIPTIONS = {
    "lock": "the main thread waits for a lock that it holds itself",
    "busy": "an endless loop in Python",
    "collective": "a collective that the other two ranks do not make",
    "stopped": "SIGSTOP: a rank that does nothing, as when its node or step daemon is gone",
    "interpreter": "a C call that never gives the interpreter's lock back",
    "loader": "the loader's thread sleeps",
    "loader_file": "the loader's thread reads from a file system that does not answer (a FIFO)",
    "loader_dead": "the loader's thread is gone, the batch never comes",
    "save_file": "a save into a file system that does not answer",
}


def show_hangs(folder: Path, kinds: list[str]) -> list[dict[str, Any]]:
    """One row per hang: what was said, and what of it is right."""
    shards = write_shards(folder / "corpus")
    rows = []
    for kind in kinds:
        (folder / kind).mkdir()
        verdict = hang(kind, shards, PROJECT, folder / kind)
        cause, activity, words = HANGS[kind]
        rows.append(
            {
                "hang_in_rank_1": DESCRIPTIONS[kind],
                "rank_named": verdict["rank"],
                "activity": verdict["activity"],
                "cause": verdict["cause"],
                "rank_right": verdict["rank"] == 1,
                "operation_right": verdict["activity"] == activity and words in verdict["what"],
                "cause_right": verdict["cause"] == cause,
                "hang_to_end_s": round(verdict["seconds_to_end"], 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def healthy(folder: Path, steps: int) -> dict[str, Any]:
    """A run of two ranks without a fault, with saves and evaluations: verdicts, and the CPU time of the watchdog's threads."""
    shards = write_shards(folder / "corpus")
    watchdog = {"stall_seconds": 20.0, "long_seconds": 120.0}
    values = settings(shards, folder / "run", watchdog=watchdog, max_steps=steps, engine={"kind": "fsdp"})
    values |= {"evaluate_every_steps": 500, "save_every_steps": 200, "monitor": {"log_every_steps": 10}}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    ranks = Ranks([str(Path(__file__).resolve()), "--rank", str(folder / "run.yaml")], 2, folder / "logs")
    statuses = ranks.wait(1500)
    if statuses != [0, 0]:
        raise SystemExit(ranks.output())
    found = [json.loads(ranks.output(rank).strip().splitlines()[-1]) for rank in (0, 1)]
    return {"verdicts": len(list((folder / "run" / "watchdog").glob("*.json"))), "ranks": found}


def one_rank(config: str) -> None:
    """Train in this process, and print what its watchdog's threads cost."""
    from megagpt.config import load
    from megagpt.monitor.metrics import read_metrics
    from megagpt.train.loop import TrainConfig, train

    loaded = load(TrainConfig, [config])
    spent: dict[str, float] = {}
    ended = threading.Event()

    def observe() -> None:
        while not ended.wait(0.2):
            for thread in threading.enumerate():
                statistics = Path(f"/proc/self/task/{thread.native_id}/schedstat")
                if thread.name.startswith("watchdog") and statistics.exists():
                    spent[thread.name] = int(statistics.read_text().split()[0]) / 1e9

    observer = threading.Thread(target=observe, daemon=True)
    observer.start()
    began = time.monotonic()
    status = train(loaded)
    wall = time.monotonic() - began
    ended.set()
    observer.join()
    steps = len(read_metrics(loaded.run_dir).of_kind("train")) * loaded.monitor.log_every_steps
    print(json.dumps({"threads_cpu_s": spent, "wall_s": wall, "process_cpu_s": time.process_time(), "steps": steps}))
    sys.exit(status)


def beat_seconds(folder: Path) -> float:
    """CPU seconds of what the loop itself pays, per micro-batch."""
    import torch

    from megagpt.distributed.world import lone_world
    from megagpt.monitor.goodput import Stopwatch
    from megagpt.watchdog.watchdog import Watchdog, WatchdogConfig

    clock = Stopwatch()
    with clock("train"):
        watchdog = Watchdog(WatchdogConfig(enabled=False), lone_world(torch.device("cpu")), folder, clock, 1)
        began = time.process_time()
        for step in range(100_000):
            watchdog.beat(step)
            with watchdog.forward():
                pass
        return (time.process_time() - began) / 100_000


def main() -> None:
    """Hangs, a healthy run, costs."""
    short = "--short" in sys.argv
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = healthy(folder / "healthy", 300 if short else 2000)
        rows = show_hangs(folder, list(HANGS)[::3] if short else list(HANGS))
        beat = beat_seconds(folder)
    costs = [{"part": "the loop, per micro-batch", "cpu_us_per_step": 1e6 * beat, "share_of_one_core": None}]
    for thread in sorted(found["ranks"][0]["threads_cpu_s"]):
        mean = sum(rank["threads_cpu_s"][thread] for rank in found["ranks"]) / 2
        wall, steps = (sum(rank[key] for rank in found["ranks"]) / 2 for key in ("wall_s", "steps"))
        costs.append({"part": f"thread {thread!r}", "cpu_us_per_step": 1e6 * mean / steps, "share_of_one_core": mean / wall})
    right = sum(row["rank_right"] and row["operation_right"] and row["cause_right"] for row in rows)
    steps = found["ranks"][0]["steps"]
    results = {
        "title": "The watchdog",
        "about": f"{right} of {len(rows)} hangs named with the right rank, operation and cause; {found['verdicts']} verdicts "
        f"in {steps:,} healthy steps of two ranks. stall_seconds was 6 for the hangs (300 by default), 20 for the healthy run.",
        "rows": rows,
        "tables": [
            {"title": "CPU time that the watchdog adds", "about": "Mean of two ranks in the healthy run.", "rows": costs}
        ],
        "lost": "" if right == len(rows) and not found["verdicts"] else "Not all verdicts are right.",
        "healthy": found,
    }
    write_results("watchdog", results, packages=("torch", "megagpt"))
    print(results["about"])
    print(json.dumps(costs, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        one_rank(sys.argv[2])
    main()
