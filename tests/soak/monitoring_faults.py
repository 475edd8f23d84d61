"""A run that is killed three times beside W&B, and step times beside writers that cannot be reached, hang or fail.

    python tests/soak/monitoring_faults.py FOLDER                about six minutes on two cores; root (it mounts a full disk)
    python tests/soak/monitoring_faults.py FOLDER part=writers   the second part; the first is kept from the results

A real run logs to W&B offline, every step. It is killed three times, once alone and twice together with W&B's process, and
resumed. The files that are left are read by W&B's own reader (that of wandb 0.19, in an environment of its own: later versions
have none in Python): one run, every step once, none missing, each with the loss of metrics.jsonl. Then a small training with a
broken writer, and a row after every step, takes turns with the same training without one: one is stopped while the other
does some steps. FOLDER is made; the results go to bench/results/monitoring_faults.json.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]

from own_python import own_python  # noqa: E402
from ranks import wait_until  # noqa: E402
from small_run import settings, start, write_shards  # noqa: E402

from megagpt.measurement import RESULTS, spread, write_results  # noqa: E402
from megagpt.monitor.metrics import METRICS_FILE, read_metrics  # noqa: E402

STEPS = 90
KILLS = ((20, "rank"), (45, "rank and W&B"), (70, "rank and W&B"))
"""About the step at which, and what is killed."""
READER = ("wandb==0.19.11", "protobuf<6")
READ = """
import json, sys
from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore
for path in sys.argv[1:]:
    store = DataStore()
    store.open_for_scan(path)
    found = {"id": None, "history": [], "torn": False}
    while True:
        try:
            data = store.scan_data()
        except AssertionError:  # what a kill has torn; `wandb sync` stops there too
            found["torn"] = True
            break
        if data is None:
            break
        record = Record.FromString(bytes(data))
        if record.WhichOneof("record_type") == "run":
            found["id"] = record.run.run_id
        elif record.WhichOneof("record_type") == "history":
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found["history"].append([record.history.step.num or values.get("_step", 0), values.get("train/loss")])
    print(json.dumps(found))
"""
WRITERS = ("W&B cannot be reached", "W&B's server hangs", "TensorBoard on a full disk", "never returns", "raises")
TURNS, GROUP, STEPS_OF_A_TURN, WARM_TURNS = 40, 10, 10, 2
"""Turns of either training, groups of turns, steps per turn, and steps before them that are not counted."""


def main(words: Sequence[str]) -> None:
    """Both parts, and the results."""
    if len(words) == 4 and words[0] == "one":
        time_steps(words[1], Path(words[2]), int(words[3]))
        return
    folder, parts = Path(words[0]), words[1:]
    folder.mkdir(parents=True)
    if parts == ["part=writers"]:
        before = json.loads((RESULTS / "monitoring_faults.json").read_text(encoding="utf-8"))
        kills = before["results"]["tables"][0]["rows"]
        forget_accounts(folder)
    else:
        reader = own_python(folder / "wandb_reader", READER)
        forget_accounts(folder)
        kills = kill_and_resume(folder / "kills", reader)
    rows = broken_writers(folder / "writers")
    tables = [
        {
            "title": "Kills",
            "about": "What W&B's file of each start has, and what was sent again by the next one. Read by wandb 0.19.11.",
            "rows": kills,
        }
    ]
    results = {
        "title": "Monitoring under kills and broken writers",
        "about": f"A run of {STEPS} steps with W&B offline was killed three times and resumed: its files are one run and have"
        " every step once, none is missing, each with the loss of metrics.jsonl. A small training that logs every"
        f" step ran with each kind of broken writer and without one, turn about: {TURNS} turns of {STEPS_OF_A_TURN} steps each,"
        " while the other was stopped. The figures are the ratios of the median step of two turns in a row, by the wall and by"
        f" the training thread's CPU time: medians of {GROUP} turns, their median, least and largest.",
        "rows": rows,
        "tables": tables,
        "lost": "",
    }
    write_results("monitoring_faults", results, packages=("torch", "wandb", "tensorboard"))


def forget_accounts(folder: Path) -> None:
    """W&B knows no account, whatever this machine's user has set up."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(HOME=str(folder.resolve()), NETRC=str(folder / "none"), OMP_NUM_THREADS="1")


def kill_and_resume(folder: Path, reader: Path) -> list[dict[str, Any]]:
    """Kill, resume, read: a row per start. Raises AssertionError if W&B's files are not what they must be."""
    run_dir, rng = folder / "run", random.Random(0)
    monitor = {"log_every_steps": 1, "wandb": "offline", "wandb_project": "soak"}
    changes = {"max_steps": STEPS, "save_every_steps": 5, "evaluate_every_steps": 30, "monitor": monitor}
    values = settings(write_shards(folder / "shards"), run_dir, **changes)
    rows: list[dict[str, Any]] = []
    for number, (about, what) in enumerate((*KILLS, (STEPS, "nothing")), start=1):
        ranks = start(PROJECT, folder / f"start_{number}", values, 1)
        at = about + rng.randrange(4)
        if what == "nothing":
            assert ranks.wait() == [0], ranks.output()
        else:
            wait_until(lambda at=at: (run_dir / METRICS_FILE).exists() and last_step(run_dir) >= at)
            pid = ranks.processes[0].pid
            for process in [*(descendants(pid) if what == "rank and W&B" else []), pid]:
                os.kill(process, signal.SIGKILL)
            ranks.wait()
        again = [int(line.split("lacks ")[1].split()[0]) for line in ranks.output().splitlines() if "W&B lacks" in line]
        rows.append({"start": number, "killed": what, "last_step": last_step(run_dir), "rows_sent_again": sum(again)})
        print(rows[-1], flush=True)
    time.sleep(30)  # a W&B process that was left alone still ends its file
    found = read_by_wandb(reader, run_dir)
    assert len(found) == len(rows)
    for row, file in zip(rows, found, strict=True):
        row |= {"steps_in_its_file": len(file["history"]), "file_torn": file["torn"]}
    assert len({file["id"] for file in found if file["history"]}) == 1
    history = [(step, loss) for file in found for step, loss in file["history"]]
    steps = [step for step, _ in history]
    assert steps == sorted(set(steps)), "a step is there twice"
    logged = {row["step"]: row["loss"] for row in read_metrics(run_dir).of_kind("train")}
    assert {step: loss for step, loss in history if loss is not None} == logged
    assert list(logged) == list(range(1, STEPS + 1))
    return rows


def last_step(run_dir: Path) -> int:
    return max((row["step"] for row in read_metrics(run_dir).of_kind("train")), default=0)


def read_by_wandb(reader: Path, run_dir: Path) -> list[dict[str, Any]]:
    """What W&B's reader finds in the files of a run, oldest first."""
    paths = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))  # the folder's name begins with the time
    done = subprocess.run([reader, "-c", READ, *paths], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def descendants(process: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    import psutil

    return [child.pid for child in psutil.Process(process).children(recursive=True)]


def broken_writers(folder: Path) -> list[dict[str, Any]]:
    """A row per kind of writer."""
    folder.mkdir()
    rows = []
    with hanging_server() as port:
        for kind in WRITERS:
            rows.append({"writer": kind, **take_turns(kind, folder, port)})
            print(rows[-1], flush=True)
    return rows


def take_turns(kind: str, folder: Path, port: int) -> dict[str, Any]:
    """Steps with a kind of writer against steps without one: the trainings run in turns, each stopped in the other's."""
    both = [Training(name, Path(tempfile.mkdtemp(dir=folder)), port) for name in (kind, "none")]
    try:
        start_seconds = [training.started["start_s"] for training in both]
        ratios: dict[str, list[float]] = {"step_ms": [], "cpu_ms": []}
        for turn in range(WARM_TURNS + TURNS):
            order = both if turn % 2 else both[::-1]  # what grows or falls with time then favours neither
            found = {training.kind: training.take_turn() for training in order}
            if turn >= WARM_TURNS:
                for name, values in ratios.items():
                    values.append(found[kind][name] / found["none"][name])
        said = both[0].end()
        both[1].end()
    finally:
        for training in both:
            training.kill()
    row: dict[str, Any] = {"start_s": start_seconds[0]}
    for name, column in (("step_ms", "step_against_none"), ("cpu_ms", "cpu_against_none")):
        values = ratios[name]
        row[column] = spread([median(values[i : i + GROUP]) for i in range(0, TURNS, GROUP)])
    return {**row, "said": said}


class Training:
    """A training in a process of its own, which does some steps when it is told to and is stopped otherwise."""

    def __init__(self, kind: str, folder: Path, port: int) -> None:
        self.kind = kind
        command = [sys.executable, str(Path(__file__).resolve()), "one", kind, str(folder), str(port)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
        self.started = self._read()
        self._send(signal.SIGSTOP)

    def take_turn(self) -> dict[str, Any]:
        """Medians of the steps of one turn."""
        self._send(signal.SIGCONT)
        found = self._ask("go")
        self._send(signal.SIGSTOP)
        return found

    def end(self) -> str:
        """Close the writers; what was logged as warnings."""
        self._send(signal.SIGCONT)
        said = self._ask("end")["said"]
        assert self._process.wait(timeout=120) == 0
        return said

    def kill(self) -> None:
        """End the process, wherever it is."""
        if self._process.poll() is None:
            self._send(signal.SIGKILL)
            self._process.wait()

    def _send(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _ask(self, word: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the training with {self.kind} ended")


@contextmanager
def hanging_server() -> Iterator[int]:
    """The port of a server that takes connections and never answers."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:

        def accept() -> None:
            try:
                while True:
                    connections.append(server.accept()[0])
            except OSError:
                return

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]


class Broken:
    """A writer that does not what it should."""

    name = "broken"

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self._act()

    def close(self) -> None:
        """Nothing to end."""


def fail() -> None:
    """What a library does whose server has gone."""
    raise ConnectionError("gone")


def time_steps(kind: str, folder: Path, port: int) -> None:
    """Print the seconds of the start; for each word `go` medians of a turn's steps with their rows, by the wall and by the
    training thread's CPU; at the end what was logged as warnings."""
    import logging

    import torch

    from megagpt.model.gpt import GPT, ModelConfig
    from megagpt.monitor.config import MonitorConfig
    from megagpt.monitor.monitor import Monitor
    from megagpt.monitor.writers import BackgroundWriter

    class Said(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    logging.getLogger("megagpt").addHandler(Said(logging.WARNING))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=1024, seq_len=64, num_layers=2, num_heads=4, hidden_size=128))
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randint(1024, (4, 64))
    run_dir = Path(tempfile.mkdtemp(dir=folder))
    options: dict[str, Any] = {"log_every_steps": 1, "close_seconds": 1.0, "wandb_init_seconds": 3.0}
    servers = {"W&B cannot be reached": 9, "W&B's server hangs": port}
    if kind in servers:
        os.environ.update(WANDB_API_KEY="0" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{servers[kind]}")
        options["wandb"] = "online"
    disk = run_dir / "tensorboard"
    if kind == "TensorBoard on a full disk":
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)], check=True)
        options["tensorboard"] = True
    began = time.perf_counter()
    monitor = Monitor(run_dir, MonitorConfig.model_validate(options), run_config={}, rank=0)
    acts: dict[str, Callable[[], None]] = {"never returns": threading.Event().wait, "raises": fail}  # type: ignore[dict-item]
    if kind in acts:
        monitor._writers.append(BackgroundWriter(Broken(acts[kind])))
    monitor.log("start", 0, tokens=0)
    print(json.dumps({"start_s": time.perf_counter() - began}), flush=True)
    step = 0
    while sys.stdin.readline().strip() == "go":
        walls, cpus = [], []
        for _ in range(STEPS_OF_A_TURN):
            step += 1
            wall, cpu = time.perf_counter(), time.thread_time()
            with monitor.clock("train"):
                loss = model(ids, ids) / ids.numel()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            monitor.due(step)
            monitor.log("train", step, loss=loss.detach(), tokens=step * ids.numel())
            walls.append(time.perf_counter() - wall)
            cpus.append(time.thread_time() - cpu)
        print(json.dumps({"step_ms": 1e3 * median(walls), "cpu_ms": 1e3 * median(cpus)}), flush=True)
    monitor.close()
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)
    assert len(read_metrics(run_dir).of_kind("train")) == step
    print(json.dumps({"said": "; ".join(line.partition(" (")[0] for line in said)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
