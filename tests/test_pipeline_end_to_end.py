"""The whole data path, from dumps to shards, in processes of its own: the same bytes whatever is killed, and no partial file.

MEGAGPT_TEST_KILLS says how many times the path is killed (default 4; 20 takes some minutes).
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megagpt.config import UserError
from megagpt.data.shards import read_manifest, verify_shard
from megagpt.documents import read_documents

pytestmark = [pytest.mark.slow, pytest.mark.realdata]

KILLS = int(os.environ.get("MEGAGPT_TEST_KILLS", "4"))
TOOLS = ("extract_documents", "filter_documents", "dedup_documents", "train_tokenizer", "tokenize_documents")
# One process for all tools, as they are, so that start-ups do not take most of the time. With MEGAGPT_TEST_KILL_CHANCE it or a
# worker of its kills them all just before or after a file is synced or gets its final name: where a mistake would show.
CHAIN = f"""
import importlib, os, random, signal, sys
from megagpt.command import run_words
from megagpt.corpus.config import CorpusConfig

chance = float(os.environ.get("MEGAGPT_TEST_KILL_CHANCE", "0"))

def deadly(function):
    def call(*arguments, **named):
        for moment in ("before", "after"):
            if random.random() < chance:
                os.killpg(0, signal.SIGKILL)
            result = function(*arguments, **named) if moment == "before" else result
        return result
    return call

if chance:
    os.fsync, os.replace, os.rename = deadly(os.fsync), deadly(os.replace), deadly(os.rename)

if __name__ == "__main__":
    for name in {TOOLS!r}:
        if status := run_words(CorpusConfig, importlib.import_module(name).run, "", sys.argv[1:]):
            sys.exit(status)
"""
RECIPE = """
extract: {{inputs: ["{inputs}/*"], source: real}}
block_bytes: 100000
filter: {{order: [clean, min_length, language, gopher_repetition], language: {{labels: [], min_score: 0}}}}
dedup: {{drop_repeated: lines}}
tokenizer: {{vocab_size: 2000}}
tokenize: {{validation_fraction: 0.1, shard_tokens: 20000, pack_seq_len: 256}}
"""


class Path2Shards:
    """The recipe over a few real dumps, and how to run it."""

    def __init__(self, folder: Path, shared_data: Path, project: Path) -> None:
        inputs = folder / "inputs"
        inputs.mkdir()
        for name in ("warc/dolma-sample-0000.warc.gz", "warc/cc-main-2020-34.warc.gz", "wiki/enwiki-10k.xml.bz2"):
            shutil.copy(shared_data / name, inputs)
        shutil.copy(shared_data / "warc/cc-main-2020-34.warc.gz", inputs / "again.warc.gz")
        (folder / "recipe.yaml").write_text(RECIPE.format(inputs=inputs))
        (folder / "chain.py").write_text(CHAIN)
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": f"{project}:{project / 'tools'}", "OMP_NUM_THREADS": "1"}

    def command(self, work_dir: Path, *words: str) -> list[str]:
        return [sys.executable, str(self.folder / "chain.py"), str(self.folder / "recipe.yaml"), f"work_dir={work_dir}", *words]

    def run(self, work_dir: Path, *words: str, prefix: tuple[str, ...] = ()) -> None:
        command = [*prefix, *self.command(work_dir, *words)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]

    def start(self, work_dir: Path, *words: str, kill_chance: float = 0.0) -> subprocess.Popen[bytes]:
        """In a process group of its own, to be killed as a whole."""
        return subprocess.Popen(
            self.command(work_dir, *words),
            env={**self.environment, "MEGAGPT_TEST_KILL_CHANCE": str(kill_chance)},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, shared_data: Path, project: Path) -> Path2Shards:
    return Path2Shards(tmp_path_factory.mktemp("path"), shared_data, project)


@pytest.fixture(scope="module")
def reference(path: Path2Shards) -> tuple[dict[str, str], float]:
    """What one worker makes without interruption, and in how many seconds."""
    started = time.monotonic()
    path.run(path.folder / "reference", "num_workers=1")
    return tree(path.folder / "reference"), time.monotonic() - started


def tree(work_dir: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file that is there at the end, whatever wrote it."""
    files = sorted(found for found in work_dir.rglob("*") if found.is_file())
    return {str(found.relative_to(work_dir)): hashlib.sha256(found.read_bytes()).hexdigest() for found in files}


def test_the_path_makes_what_it_should(path: Path2Shards, reference: tuple[dict[str, str], float]) -> None:
    work_dir = path.folder / "reference"
    summaries = {stage: json.loads((work_dir / stage / "summary.json").read_text()) for stage in ("extract", "filter", "dedup")}
    assert summaries["extract"]["files"] == 4
    assert summaries["dedup"]["rejected"]["dedup:exact"] > 0
    assert summaries["dedup"]["documents_in"] == summaries["filter"]["kept"]
    shards = json.loads((work_dir / "shards" / "summary.json").read_text())
    assert shards["splits"]["train"]["shards"] > 1
    assert shards["splits"]["validation"]["documents"] > 0
    total = sum(split["documents"] for split in shards["splits"].values())
    assert total == summaries["dedup"]["kept"] - shards["empty_documents"] - shards["leaked_documents"]
    assert not [name for name in reference[0] if "tmp-" in name or "/.parts/" in name or "/.segments/" in name]


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_change_no_byte(
    path: Path2Shards, reference: tuple[dict[str, str], float], tmp_path: Path, num_workers: int
) -> None:
    path.run(tmp_path / "w", f"num_workers={num_workers}")
    assert tree(tmp_path / "w") == reference[0]


@pytest.mark.parametrize("kill_chance", [0.0, 0.01])
def test_killed_anywhere_the_path_ends_with_the_same_bytes(
    path: Path2Shards, reference: tuple[dict[str, str], float], tmp_path: Path, kill_chance: float
) -> None:
    """At any time, or around the moments at which files become final."""
    expected, seconds = reference
    choose, kills, rounds = random.Random(3), 0, 0
    while kills < KILLS:
        # Each round is a corpus of its own: a run that was not killed in time has finished it.
        work_dir, rounds = tmp_path / f"round{rounds}", rounds + 1
        with reader(work_dir) as faults:
            while kills < KILLS:
                process = path.start(work_dir, f"num_workers={choose.choice((1, 2))}", kill_chance=kill_chance)
                try:
                    status = process.wait(timeout=900 if kill_chance else choose.uniform(0.5, max(2.0, seconds)))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    status = process.wait()
                assert status in (0, -signal.SIGKILL)
                kills += status != 0
                if status == 0:
                    break
            path.run(work_dir, "num_workers=2")
        assert faults == []
        assert tree(work_dir) == expected
        shutil.rmtree(work_dir)


@contextmanager
def reader(work_dir: Path) -> Iterator[list[str]]:
    """Somebody who reads every file that has its final name, all the time; yields what was not whole."""
    faults: list[str] = []
    stop, rounds = threading.Event(), [0]

    def follow() -> None:
        while not stop.is_set():
            faults.extend(partial_files(work_dir))
            rounds[0] += 1
            stop.wait(0.05)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        stop.set()
        thread.join(timeout=900)
    assert rounds[0] > 1


def partial_files(work_dir: Path) -> Iterator[str]:
    """Messages about files with final names that are not whole. What begins with a dot or lies in dedup/index is internal."""
    # os.walk, unlike rglob, passes over folders that are removed while it looks.
    for found in sorted(Path(folder, name) for folder, _, names in os.walk(work_dir) for name in names):
        parts = found.relative_to(work_dir).parts
        if any(part.startswith(".") for part in parts) or "index" in parts or not found.is_file():
            continue
        try:
            if found.name == "manifest.json":
                manifest = read_manifest(found.parent)
                yield from (fault for info in manifest.shards for fault in verify_shard(found.parent, info, manifest.dtype))
            elif found.suffix == ".json":
                json.loads(found.read_text(encoding="utf-8"))
            elif found.name.endswith(".jsonl.zst") and parts[1] not in ("dropped", "duplicates"):
                list(read_documents(found))
        except (FileNotFoundError, UserError, ValueError) as error:
            if found.is_file():
                yield f"{found}: {error}"


def test_the_reader_sees_partial_files(tmp_path: Path) -> None:
    (tmp_path / "extract" / "rejected").mkdir(parents=True)
    (tmp_path / "extract" / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x04")
    (tmp_path / "extract" / "rejected" / "b.jsonl.zst").write_bytes(b"{")
    (tmp_path / "extract" / "summary.json").write_text('{"kept":')
    (tmp_path / "extract" / ".tmp-c.jsonl.zst").write_bytes(b"{")
    assert len(list(partial_files(tmp_path))) == 3


def test_dask_with_a_killed_worker_changes_no_byte(
    path: Path2Shards, reference: tuple[dict[str, str], float], tmp_path: Path
) -> None:
    scheduler_file = tmp_path / "scheduler.json"
    local = ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(scheduler_file)]
    environment = {**path.environment, "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}

    def start(*words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", *words, *local]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)

    worker = ("worker", "--nthreads", "1", "--nworkers", "1", "--no-nanny")
    processes = [start("scheduler", "--port", "0"), start(*worker), start(*worker)]
    try:
        deadline = time.monotonic() + 600
        while not scheduler_file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        with reader(tmp_path / "w") as faults:
            run = path.start(tmp_path / "w", "executor=dask", f"scheduler_file={scheduler_file}")
            while not list((tmp_path / "w").rglob("*.done.json")) and run.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            processes[1].kill()
            assert run.wait(timeout=900) == 0
        assert faults == []
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(timeout=900)
    assert tree(tmp_path / "w") == reference[0]


def test_the_path_needs_no_network(path: Path2Shards, reference: tuple[dict[str, str], float], tmp_path: Path) -> None:
    prefix = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--map-root-user", "--net")
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode != 0:
        pytest.skip("unshare --net is not permitted here")
    path.run(tmp_path / "w", "num_workers=2", prefix=prefix)
    assert tree(tmp_path / "w") == reference[0]
