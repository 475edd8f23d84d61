"""A record that is over its CPU limit inside C costs itself only; no worker outlives its parent, whatever it does."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_run_stage import import_path, session_members, tree

from megagpt.corpus.runner.blocks import Block, Outcome
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.cpu_limit import CpuLimitExceededError, cpu_limit
from megagpt.corpus.runner.executors import WorkerDiedError, run_tasks
from megagpt.corpus.runner.run_stage import run_stage
from megagpt.corpus.runner.summary import StageSummary
from megagpt.documents import Document, Rejected
from megagpt.settings_record import MadeWith

CATASTROPHIC = re.compile(r"(?:a+)+$")
"""Backtracks for longer than the universe lives on what `HANGS` is, holding the interpreter's lock all the while."""
HANGS = "a" * 60 + "b"


def match_lines(block: Block, *, by_name: bool = False) -> Iterator[Outcome]:
    """A document per line; one whose pattern is too slow is rejected."""
    for number, line in enumerate(Path(block.path).read_text().splitlines()):
        document = Document(f"{Path(block.path).name}:{number}", line, "test")
        try:
            with cpu_limit(0.3, document.id if by_name else None):
                CATASTROPHIC.match(line)
        except CpuLimitExceededError:
            yield Rejected(document, "test:cpu_limit")
        else:
            yield document


def write_blocks(folder: Path, files: list[list[str]]) -> list[Block]:
    folder.mkdir(exist_ok=True)
    for number, lines in enumerate(files):
        (folder / f"in{number}.txt").write_text("\n".join(lines))
    return [Block(str(folder / f"in{number}.txt"), f"in{number}.jsonl.zst") for number in range(len(files))]


def run(blocks: list[Block], output: Path, execution: Execution, *, by_name: bool = False) -> StageSummary:
    process = functools.partial(match_lines, by_name=by_name)
    return run_stage("test", blocks, output, process, made_with=MadeWith("a"), execution=execution)


def test_a_record_that_hangs_in_c_costs_itself_only(tmp_path: Path) -> None:
    blocks = write_blocks(tmp_path / "in", [["one", HANGS, "two"]])
    summary = run(blocks, tmp_path / "out", Execution(num_workers=1))
    assert (summary.kept, summary.rejected, summary.documents_in) == (2, {"test:cpu_limit": 1}, 3)


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    blocks = write_blocks(tmp_path / "in", [[HANGS, "one"], ["two", "three"], ["four", HANGS, "five", HANGS, "six"]])
    trees = []
    for workers, by_name in ((1, False), (3, False), (2, True)):
        output = tmp_path / f"out{workers}"
        summary = run(blocks, output, Execution(num_workers=workers), by_name=by_name)
        assert (summary.kept, summary.rejected) == (6, {"test:cpu_limit": 3})
        trees.append(tree(output))
    assert trees[0] == trees[1] == trees[2]


@pytest.mark.slow
def test_dask_workers_are_limited_too(tmp_path: Path, project: Path) -> None:
    pytest.importorskip("distributed")
    blocks = write_blocks(tmp_path / "in", [["one", HANGS, "two"], ["three"]])
    run(blocks, tmp_path / "out", Execution(num_workers=1))
    scheduler_file = tmp_path / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": import_path(project), "DASK_DISTRIBUTED__WORKER__MEMORY__TERMINATE": "False"}
    words = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    scheduler = subprocess.Popen([*words, "--scheduler-file", scheduler_file], env=environment, stderr=subprocess.DEVNULL)
    words = [sys.executable, "-m", "distributed.cli.dask_worker", "--nworkers", "1", "--nthreads", "2", "--no-dashboard"]
    worker = subprocess.Popen([*words, "--scheduler-file", scheduler_file], env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while not scheduler_file.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        run(blocks, tmp_path / "dask", Execution(executor="dask", scheduler_file=scheduler_file))
    finally:
        worker.terminate()
        scheduler.terminate()
        worker.wait()
        scheduler.wait()
    assert tree(tmp_path / "dask") == tree(tmp_path / "out")


def fails(kind: str) -> str:
    match kind:
        case "error":
            raise FileNotFoundError(2, "no such thing", "x")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "profiled":
            os.kill(os.getpid(), signal.SIGPROF)
    return kind


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("error", FileNotFoundError, "no such thing"),
        ("killed", WorkerDiedError, "task 7"),
        ("profiled", WorkerDiedError, "task 7"),
    ],
)
def test_errors_of_a_child(kind: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_tasks([(7, fails, (kind,))], Execution(num_workers=1), lambda key, value: None, lambda key: f"task {key}")
    found: list[str] = []
    run_tasks(
        [(1, fails, ("nothing",)), (2, fails, ("else",))], Execution(num_workers=1), lambda key, value: found.append(value)
    )
    assert sorted(found) == ["else", "nothing"]


def hangs(block: Block) -> Iterator[Outcome]:
    CATASTROPHIC.match(HANGS)
    yield Document("a", "", "test")


def test_a_worker_inside_a_pattern_ends_with_its_parent(tmp_path: Path, project: Path) -> None:
    write_blocks(tmp_path / "in", [["one"]])
    code = (
        "import sys; from test_supervised import *; from megagpt.corpus.runner.run_stage import run_stage;"
        f"run_stage('t', [Block({str(tmp_path / 'in/in0.txt')!r}, 'in0.jsonl.zst')], Path({str(tmp_path / 'out')!r}), hangs,"
        "made_with=MadeWith('a'), execution=Execution(num_workers=1))"
    )
    environment = {**os.environ, "PYTHONPATH": import_path(project)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=project, start_new_session=True)
    deadline = time.monotonic() + 600
    while not busy(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert busy(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while session_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not session_members(process.pid)


def busy(session: int) -> bool:
    """Whether a process of the session, other than its first, has used more than half a second of CPU time."""
    ticks = os.sysconf("SC_CLK_TCK")
    for member in session_members(session):
        if member != session:
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
            if int(fields[11]) + int(fields[12]) > 0.5 * ticks:
                return True
    return False
