"""Find hangs and stragglers: which rank keeps the others waiting, where, and why.

Every rank reports its progress several times a minute to a TCP store that rank 0 serves. A hung file system, a full
collective queue or a stuck main thread cannot block these reports. Rank 0 checks all reports, the others check rank 0's. If a
rank makes no progress for too long, the missing rank is the one behind the others: it is silent or has ended, is in an earlier
place of the loop, has begun fewer collectives, or is in the same place but not inside a collective. The verdict goes to the
job's log, to run_dir/watchdog/ and metrics.jsonl, and all ranks end with status 76, so that the job starts again.

The limits apply to the time since a rank's last progress, not to the length of an activity: an evaluation makes progress with
every batch, a save with every slice that it writes, a load with every range that it reads (World.progress), a start with every
module that it imports, torch.compile with every graph and kernel.

The loop spends a microsecond per micro-batch; everything else happens in three threads per rank, and in a fourth on one rank
per node, which reads the GPUs. A rank that never releases the interpreter's lock is silent: faulthandler, which needs no lock,
prints its stack to stderr and ends it.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megagpt.command import EXIT_WATCHDOG
from megagpt.config import Config
from megagpt.distributed.device_timer import DeviceTimer
from megagpt.distributed.world import World
from megagpt.files import read_json, write_json
from megagpt.monitor.goodput import Stopwatch
from megagpt.monitor.metrics import METRICS_FILE, format_row
from megagpt.monitor.nvml import read_node, summarise_nodes
from megagpt.watchdog import flight_recorder as collectives
from megagpt.watchdog import stacks
from megagpt.watchdog.stragglers import LONG_ACTIVITIES, Progress, RankTimes

Report = dict[str, Any]
"""A rank's report on itself: number (of the report), rank, host, pid, step, activity, position, stuck_seconds, limit_seconds,
collectives, ended, progress (see stragglers.py); after half of the limit also threads, cause, what, waits_for_others, groups
(see flight_recorder.py)."""


class WatchdogConfig(Config):
    """When a run counts as hung. Nothing here changes the trained model."""

    enabled: bool = True
    """Whether hangs end the run with status 76 (slurm/pretrain.sh then starts it again)."""
    stall_seconds: float = Field(default=300.0, gt=0)
    """A rank is stuck if it completes no micro-batch and no wait of a step within this time."""
    long_seconds: float = Field(default=1500.0, gt=0)
    """The same limit in the first step, and while loading, saving, evaluating and generating. These may take longer in total
    while they make progress: a batch, a token, a slice of a file, a compiled graph."""
    slow_ratio: float = Field(default=1.5, gt=1)
    """A rank is reported as slow if its data wait, its forward passes, or its own work (own_work: a step without data wait and
    without waiting in collectives) take this many times the median of all ranks."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the watchdog ended the run. rank: the missing one; None if no single rank is missing."""

    rank: int | None
    host: str
    step: int
    """Updates done."""
    activity: str
    cause: str
    what: str
    collectives: str = ""
    """Where each rank is, for the groups in which a rank waits, from torch's flight recorder."""

    def line(self) -> str:
        """One line for the log."""
        who = "no rank is missing" if self.rank is None else f"rank {self.rank} on {self.host} is missing"
        recorded = f"; collectives: {self.collectives}" if self.collectives else ""
        return f"watchdog: {who}: step {self.step}, {self.activity}, {self.cause}: {self.what}{recorded}"


class Watchdog:
    """The watchdog's threads of one rank. The loop only has to call `beat`."""

    def __init__(self, config: WatchdogConfig, world: World, run_dir: Path, clock: Stopwatch, attempt: int) -> None:
        """Start the threads, if enabled. All ranks call it together. attempt: the number of this start of the run."""
        self.config, self.world, self.run_dir, self.attempt = config, world, run_dir, attempt
        self._clock, self._step, self._beats, self._switches = clock, 0, 0, clock.switches
        self._times = RankTimes(config.slow_ratio)
        self._forward = DeviceTimer(world.device)
        self._sampler = collectives.WaitSampler(lambda: clock.activity not in LONG_ACTIVITIES)
        self.collective_waits: DeviceTimer | None = None
        """On a GPU, of the engine, once there is one; on a CPU the main thread is looked at instead."""
        self._progress: Progress = {"steps": -1}
        self._marks, self._since = (0, 0, 0, 0), time.monotonic()
        self._number, self._first_step = 0, None
        self._reports: dict[int, Report] = {}
        self._heard: dict[int, float] = {}
        self._foreign_verdict: Verdict | None = None
        self._gpus: Mapping[str, Any] = {}
        self._closing = threading.Event()
        self._interval = min(5.0, max(0.1, config.stall_seconds / 20))
        self._threads: list[threading.Thread] = []
        if not config.enabled:
            return
        self._port = world.broadcast(self._serve() if world.rank == 0 else 0)
        if world.rank != 0:
            self._store = _store(os.environ["MASTER_ADDR"], self._port, is_master=False)
        now = time.monotonic()
        self._heard = dict.fromkeys(range(world.size) if world.rank == 0 else (0,), now)
        threads: dict[str, Callable[[], None]] = {"reports": self._exchange, "judge": self._judge}
        if world.size > 1 and world.device.type == "cpu":  # one rank alone waits for nobody
            threads["samples"] = partial(self._sampler.run, self._closing)
        if world.local_rank == 0 and world.device.type == "cuda":
            threads["gpus"] = self._read_gpus
        for name, target in threads.items():
            thread = threading.Thread(target=target, name=f"watchdog {name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self) -> int:
        self._store = _store(os.environ["MASTER_ADDR"], 0, is_master=True)
        return self._store.port

    # ---- called by the loop

    def beat(self, step: int) -> None:
        """Note progress: `step` updates are done. Called before the first step, for every micro-batch and after each update."""
        if step != self._step:
            waits = self.collective_waits
            waited, looks = (self._sampler.seconds, self._sampler.looks) if waits is None else (waits.seconds, waits.count)
            sampled = {"collective": waited, "looks": looks, "forward": self._forward.seconds}
            self._progress = {"steps": step, **self._clock.peek(), **sampled}
        self._step, self._switches = step, self._clock.switches
        self._beats += 1
        if self._first_step is None:
            self._first_step = step

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Measure a forward pass: the part of a step in which a rank waits least for others."""
        with self._forward():
            yield

    def ranks(self) -> dict[str, Any]:
        """Values for the metrics (rank 0): RankTimes.summary, and `nodes`: the GPUs of all nodes on which NVML was read."""
        reports = dict(self._reports)
        nodes = summarise_nodes((report["host"], report["gpus"]) for report in reports.values() if report.get("gpus"))
        return self._times.summary(reports) | ({"nodes": nodes} if nodes else {})

    def end_if_judged(self) -> None:
        """End this process with status 76 if this attempt has a verdict. The loop calls it on an exception, which may be only a
        consequence: the rank that wrote the verdict has ended, for example, and closed its connections."""
        verdict = self._foreign_verdict
        for path in sorted((self.run_dir / "watchdog").glob(f"*_{self.attempt:04d}_rank*.json"))[:1]:
            written = read_json(path)
            verdict = Verdict(**{name: written[name] for name in Verdict.__slots__})
        if verdict is not None:
            self._end(verdict, record=False)

    def close(self) -> None:
        """End the threads, and report to the other ranks that this one has ended."""
        if not self._threads:
            return
        self._closing.set()
        for thread in self._threads:
            thread.join(5.0)
        faulthandler.cancel_dump_traceback_later()
        self._threads = []

    # ---- thread "watchdog reports": may hang with the network, decides nothing

    def _exchange(self) -> None:
        while not self._closing.wait(self._interval):
            try:
                self._send(self.report() | ({"gpus": self._gpus} if self._gpus else {}))
                self._receive()
            except (RuntimeError, ValueError, OSError):
                # The network failed, or rank 0 has ended, which its silence will show. Connect again.
                if self.world.rank != 0 and not self._closing.wait(self._interval):
                    with contextlib.suppress(RuntimeError):
                        self._store = _store(os.environ["MASTER_ADDR"], self._port, is_master=False)
        with contextlib.suppress(RuntimeError):
            self._send(self.report() | {"ended": True})

    def _read_gpus(self) -> None:
        """Runs in its own thread on one rank of each node: NVML may hang on a broken GPU, and must not delay reports."""
        while not self._closing.wait(self._interval):
            self._gpus = read_node()

    def _send(self, report: Report) -> None:
        self._store.set(f"rank {report['rank']}", json.dumps(report))

    def _receive(self) -> None:
        names = [f"rank {rank}" for rank in sorted(self._heard)]
        present = [name for name in names if self._store.check([name])] if len(self._reports) < len(names) else names
        for name, text in zip(present, self._store.multi_get(present) if present else [], strict=True):
            report, rank = json.loads(text), int(name.split()[1])
            if report["number"] != self._reports.get(rank, {}).get("number"):
                self._heard[rank] = time.monotonic()
            self._reports[rank] = report
        if self.world.rank != 0 and self._store.check(["verdict"]):
            self._foreign_verdict = Verdict(**json.loads(self._store.get("verdict")))

    # ---- thread "watchdog": touches memory only, until there is a verdict

    def report(self) -> Report:
        """This rank's current report."""
        position = (self._beats, self._clock.switches - self._switches)
        marks = (*position, self.world.progress.count, _imported_and_compiled())
        if marks != self._marks:
            self._marks, self._since = marks, time.monotonic()
        activity = self._clock.activity
        stuck, limit = time.monotonic() - self._since, self._limit(activity)
        self._number += 1
        report: Report = {
            "number": self._number,
            "rank": self.world.rank,
            "host": os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
            "pid": os.getpid(),
            "step": self._step,
            "activity": activity,
            "position": list(position),
            "stuck_seconds": stuck,
            "limit_seconds": limit,
            "collectives": collectives.collectives_begun(),
            "ended": False,
            "progress": self._progress,
        }
        if stuck > limit / 2:
            threads = stacks.threads()
            cause, what = stacks.explain(threads, activity)
            waits = stacks.waits_for_others(threads)
            report |= {"threads": stacks.as_json(threads), "cause": cause, "what": what, "waits_for_others": waits}
            report["groups"] = collectives.recorded_groups()
        return report

    def _limit(self, activity: str) -> float:
        first = self._first_step is None or self._step == self._first_step
        return self.config.long_seconds if first or activity in LONG_ACTIVITIES else self.config.stall_seconds

    def _judge(self) -> None:
        while not self._closing.wait(self._interval):
            faulthandler.dump_traceback_later(self.config.long_seconds + self.config.stall_seconds, exit=True, file=2)
            if self._foreign_verdict is not None:
                self._end(self._foreign_verdict, record=False)
            now = time.monotonic()
            reports = self._judged()
            silent = {rank: now - heard for rank, heard in self._heard.items() if rank != self.world.rank}
            verdict = judge(reports, silent, self._silence_limit(reports))
            if verdict is not None:
                groups = {rank: report["groups"] for rank, report in reports.items() if "groups" in report}
                self._end(replace(verdict, collectives=collectives.compare_groups(groups)), record=True)

    def _judged(self) -> dict[int, Report]:
        """The reports to judge: all on rank 0; on the others only whether rank 0 is still there."""
        if self.world.rank == 0:
            return {**self._reports, 0: self.report()}
        first = {rank: report | {"stuck_seconds": 0.0} for rank, report in self._reports.items()}
        return {**first, self.world.rank: self.report()} if first and first[0]["ended"] else first

    def _silence_limit(self, reports: Mapping[int, Report]) -> float:
        """The longest limit of all ranks: imports, compilations and writes can hold the interpreter's lock, and so keep a
        rank's threads silent, longer than a step may take."""
        return max((report["limit_seconds"] for report in reports.values()), default=self.config.long_seconds)

    def _end(self, verdict: Verdict, *, record: bool) -> None:
        """Print the verdict, record it, send it to the other ranks, and end the process. Nothing here may wait for long."""
        line = verdict.line() if record else f"rank {self.world.rank} ends: {verdict.line()}"
        os.write(2, (line + "\n").encode(errors="replace"))  # not with logging: the stuck thread may hold its lock
        for action in (self._tell, self._record, self._dump) if record else (self._dump,):
            thread = threading.Thread(target=action, args=(verdict,), name="watchdog verdict", daemon=True)
            thread.start()
            thread.join(5.0)
        if record:
            time.sleep(2 * self._interval + 1.0)  # the others read the verdict from this process
        os._exit(EXIT_WATCHDOG)

    def _tell(self, verdict: Verdict) -> None:
        if self.world.rank == 0:
            self._store.set("verdict", json.dumps(_fields(verdict)))

    def _record(self, verdict: Verdict) -> None:
        report = self.report()
        seconds, activity = self._clock.so_far(), report["activity"]
        stuck = min(report["stuck_seconds"], seconds.get(activity, 0.0))
        seconds |= {activity: seconds.get(activity, 0.0) - stuck, "hang": stuck}
        seconds = {name: round(spent, 3) for name, spent in seconds.items()}
        record = _fields(verdict) | {"time": round(time.time(), 3), "incarnation": self.attempt, "seconds": seconds}
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        reports = {**self._reports, self.world.rank: report}
        path = self.run_dir / "watchdog" / f"{stamp}_{self.attempt:04d}_rank{self.world.rank}.json"
        write_json(path, record | {"seen_by_rank": self.world.rank, "reports": [reports[rank] for rank in sorted(reports)]})
        with (self.run_dir / METRICS_FILE).open("ab", buffering=0) as file:
            file.write(format_row({"kind": "watchdog", **record}))

    def _dump(self, _: Verdict) -> None:
        folder = self.run_dir / "watchdog" / f"collectives_{self.attempt:04d}"
        collectives.write_dump(folder / f"rank_{self.world.rank}")


def judge(reports: Mapping[int, Report], silent_seconds: Mapping[int, float], silence_limit: float) -> Verdict | None:
    """The verdict on the missing rank; None while all make progress.

    silent_seconds: seconds since the last report of each other rank. silence_limit: the most that is allowed of them.
    """
    silent = {rank: seconds for rank, seconds in silent_seconds.items() if seconds > silence_limit}
    stuck = [report for report in reports.values() if report["stuck_seconds"] > report["limit_seconds"]]
    if not silent and not stuck:
        return None
    done = max((report["step"] for report in reports.values()), default=0)  # a silent rank's last report may be older
    # A rank that went quiet is missing, and so is one that ended while others wait, even if its limit is not reached.
    gone = {rank: silent_seconds[rank] for rank in silent} | {
        rank: silent_seconds.get(rank, 0.0) for rank, report in reports.items() if report["ended"]
    }
    if not gone and stuck:
        gone = {r: s for r, s in silent_seconds.items() if s > max(5.0, 0.5 * silence_limit)}
    if gone:
        rank = max(gone, key=lambda r: gone[r])
        last: Report = reports.get(rank) or {"host": "unknown", "activity": "start", "ended": False}
        cause = "ended" if last["ended"] else "silent"
        what = (
            "its process has ended, and the others wait for it"
            if last["ended"]
            else f"no report for {gone[rank]:.0f} s: process, node or step daemon gone or stopped, or its interpreter blocked"
        )
        # A silent rank could not report its last activity; the others wait for it in the activity that all should do.
        waiting = max((r for r in reports.values() if r["rank"] != rank), key=lambda r: r["stuck_seconds"], default=last)
        return Verdict(rank, last["host"], done, (last if last["ended"] else waiting)["activity"], cause, what)
    missing, different = most_behind(list(reports.values()))
    named = missing[0]
    if named["stuck_seconds"] <= named["limit_seconds"]:
        return None  # the others wait for something that may take longer
    cause, what = named.get("cause", "code"), named.get("what", "no stack yet")
    if len(missing) == len(reports) and named.get("waits_for_others"):
        what = f"all ranks are inside {'different collectives' if different else 'the same collective'}: {different or what}"
        return Verdict(None, "", done, named["activity"], "collective", what)
    what += f"; the others: {different}" if different else ""
    others = f" (and ranks {[report['rank'] for report in missing[1:9]]})" if len(missing) > 1 else ""
    return Verdict(named["rank"], named["host"], done, named["activity"], cause, what + others)


def most_behind(reports: Sequence[Report]) -> tuple[list[Report], str]:
    """(the ranks that keep the others waiting, found by finer and finer comparison; where the others are).

    The second is "" if it is clear which ranks are behind; it is set if ranks only wait in different collectives.
    """
    earliest = min(tuple(report["position"]) for report in reports)
    behind = [report for report in reports if tuple(report["position"]) == earliest]
    if len(behind) < len(reports):
        return behind, ""
    fewest = min(report["collectives"] for report in behind)
    if any(report["collectives"] != fewest for report in behind):
        return [report for report in behind if report["collectives"] == fewest], ""
    busy = [report for report in behind if not report.get("waits_for_others", True)]
    if busy and len(busy) < len(behind):
        return busy, ""
    absent = collectives.not_come({report["rank"]: report["groups"] for report in behind if "groups" in report})
    if absent:
        return [
            report | {"what": f"{report.get('what', '')}; its GPU {absent[r]}"}
            for report in behind
            if (r := report["rank"]) in absent
        ], ""
    if busy:
        return busy, ""
    places: dict[str, list[Report]] = {}
    for report in behind:
        places.setdefault(report.get("what", ""), []).append(report)
    fewer, *more = sorted(places.values(), key=len)
    elsewhere = "; ".join(f"ranks {[r['rank'] for r in group[:4]]} {group[0].get('what', '')}" for group in more)
    return (fewer, elsewhere) if more and len(fewer) < len(more[-1]) else (behind, elsewhere)


def _imported_and_compiled() -> int:
    """How many modules this process has imported, plus torch.compile's frames, graphs and kernels. Another thread reads it,
    and it imports nothing."""
    dynamo, inductor = sys.modules.get("torch._dynamo.utils"), sys.modules.get("torch._inductor.metrics")
    counters = getattr(dynamo, "counters", {})
    counts = [*counters.get("frames", {}).values(), *counters.get("inductor", {}).values(), *counters.get("stats", {}).values()]
    return len(sys.modules) + sum(counts) + getattr(inductor, "generated_kernel_count", 0)


def _store(address: str, port: int, *, is_master: bool) -> Any:
    return TCPStore(address, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=30))


def _fields(verdict: Verdict) -> dict[str, Any]:
    return {name: getattr(verdict, name) for name in Verdict.__slots__}
