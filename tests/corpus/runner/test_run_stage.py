"""Stages: the same bytes whatever happens, and clear errors."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_disk import SmallDisk

from megagpt.config import UserError, validate
from megagpt.corpus.runner import commit
from megagpt.corpus.runner.blocks import (
    Block,
    MalformedRecord,
    Outcome,
    Seen,
    document_blocks,
    output_name,
    plan_hash,
    read_block,
)
from megagpt.corpus.runner.config import Execution
from megagpt.corpus.runner.executors import WorkerDiedError
from megagpt.corpus.runner.run_stage import run_stage
from megagpt.corpus.runner.summary import read_summary, stage_outputs
from megagpt.documents import Document, Rejected, read_documents
from megagpt.files import atomic_path, remove_leftovers
from megagpt.settings_record import MadeWith

DOCUMENTS_PER_BLOCK = 60


def numbers(block: Block) -> Iterator[Outcome]:
    """Every third document is rejected, of two reasons; one fault a block."""
    for i in range(DOCUMENTS_PER_BLOCK):
        document = Document(
            f"{Path(block.path).name}:{block.start + i}", f"text {block.index} {i} " * 20, "test", f"http://x/{i}"
        )
        yield Seen("line")
        yield Rejected(document, f"test:{i % 2}") if i % 3 == 0 else document
    yield MalformedRecord("bad line", f"{Path(block.path).name}: offset {block.start}")


def slow_numbers(block: Block) -> Iterator[Outcome]:
    time.sleep(0.05)
    yield from numbers(block)


def dies_once(block: Block) -> Iterator[Outcome]:
    """Kills its worker on block 3 of the first file, the first time."""
    marker = Path(block.path + ".died")
    if block.index == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield from numbers(block)


def fills_the_disk(block: Block) -> Iterator[Outcome]:
    """About 2 MB that does not compress."""
    for i in range(4000):
        noise = "".join(hashlib.sha512(f"{block.path[-9:]}-{i}-{k}".encode()).hexdigest() for k in range(8))
        yield Document(f"{i}", noise, "test")


def make_blocks(folder: Path, num_files: int = 3, num_blocks: int = 5) -> list[Block]:
    folder.mkdir(exist_ok=True)
    blocks = []
    for f in range(num_files):
        path = folder / f"in{f}.jsonl"
        if not path.exists():
            path.write_text(f"content of {f}\n" * 100)
        blocks += [Block(str(path), f"in{f}.jsonl.zst", i, 100 * i, 100 * (i + 1)) for i in range(num_blocks)]
    return blocks


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("reference")
    output = folder / "out"
    run_stage("test", make_blocks(folder / "in"), output, numbers, made_with=MadeWith("a"), execution=Execution(num_workers=1))
    return folder / "in", tree(output)


def test_what_killed_starts_left_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "0"]) as process:
        pass
    with atomic_path(tmp_path / "stage.json") as temporary:
        living = temporary.name
    dead = living.replace(f".{os.getpid()}.", f".{process.pid}.")
    elsewhere = living.replace(living.split("-")[2], "0123abcd.1.1")
    blocks, output = make_blocks(tmp_path / "in", num_files=1, num_blocks=1), tmp_path / "out"
    (output / "dropped").mkdir(parents=True)
    for name in (living, dead, elsewhere, f"dropped/{dead}"):
        (output / name).write_text("torn")
    run_stage("test", blocks, output, numbers, made_with=MadeWith("a"), execution=Execution(num_workers=1, part="0/2"))
    assert [name for name in (living, dead, elsewhere, f"dropped/{dead}") if (output / name).exists()] == [living, elsewhere]
    os.utime(output / elsewhere, (0, 0))
    run_stage("test", blocks, output, numbers, made_with=MadeWith("a"), execution=Execution(num_workers=1))
    assert not (output / elsewhere).exists()


def test_a_flipped_byte_in_a_result_is_seen_wherever_it_is(reference: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Damage that still decodes, to another text, is found by the frames' checksums."""
    sound = stage_outputs(reference[0].parent / "out")[0].read_bytes()
    path, unnoticed = tmp_path / "damaged.jsonl.zst", []
    for place in range(0, len(sound), 7):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        with contextlib.suppress(UserError):
            list(read_documents(path))
            unnoticed.append(place)
    assert unnoticed == []


def test_counts_and_files(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path / "in")
    summary = run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("a"), execution=Execution(num_workers=2))
    assert (summary.documents_in, summary.kept, summary.rejected) == (900, 600, {"test:0": 150, "test:1": 150})
    assert summary.faults == {"bad line": 15}
    assert len(summary.fault_examples["bad line"]) == 10
    assert summary.records == {"line": 900}
    assert (summary.files, summary.files_total, summary.complete) == (3, 3, True)
    outputs = stage_outputs(tmp_path / "out")
    kept = [document for path in outputs for document in read_documents(path)]
    assert len(kept) == 600
    assert summary.characters_out == sum(len(document.text) for document in kept)
    dropped = subprocess.check_output(["cat", tmp_path / "out/dropped/in0.jsonl.zst"])
    import zstandard

    lines = zstandard.ZstdDecompressor().stream_reader(dropped, read_across_frames=True).read().splitlines()
    assert len(lines) == 100
    assert json.loads(lines[0]) == {"id": "in0.jsonl:0", "url": "http://x/0", "reason": "test:0"}
    samples = list(read_documents(tmp_path / "out/rejected/in0.jsonl.zst"))
    assert [sample.meta["rejected"] for sample in samples] == ["test:0"] * 20 + ["test:1"] * 20
    assert read_summary(tmp_path / "out") == summary
    assert not (tmp_path / "out" / ".parts").exists()


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_change_no_byte(tmp_path: Path, reference: tuple[Path, dict[str, str]], num_workers: int) -> None:
    blocks = make_blocks(reference[0])
    run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("a"), execution=Execution(num_workers=num_workers))
    assert tree(tmp_path / "out") == reference[1]


def test_parts_give_the_bytes_of_one_run(tmp_path: Path, reference: tuple[Path, dict[str, str]]) -> None:
    blocks = make_blocks(reference[0])
    for part in ("1/2", "0/2"):
        execution = Execution(num_workers=1, part=part)
        summary = run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("a"), execution=execution)
        assert summary.complete == (part == "0/2")
        if not summary.complete:
            with pytest.raises(UserError, match="0 of 3 files"):
                stage_outputs(tmp_path / "out")
    assert tree(tmp_path / "out") == reference[1]


def test_rerun_does_nothing(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path / "in")
    execution = Execution(num_workers=1)
    first = run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("a"), execution=execution)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("in*")}
    assert run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("a"), execution=execution) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("in*")} == times


def test_changed_input_is_made_again(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path / "in")
    execution = Execution(num_workers=1)
    run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("a"), execution=execution)
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.done.json")}
    (tmp_path / "in/in1.jsonl").write_text("other content")
    run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("a"), execution=execution)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.done.json")}
    assert {name for name in times if times[name] != after[name]} == {"in1.jsonl.zst.done.json"}


def fails_on_old_content(block: Block) -> Iterator[Outcome]:
    text = Path(block.path).read_text()[:20]
    if block.index == 3 and text.startswith("content"):
        raise ValueError("old content")
    yield Document(f"{block.index}", text, "test")


def test_no_part_of_an_old_input_is_used(tmp_path: Path) -> None:
    """Blocks 0 to 2 are committed, then the input changes: the result is that of the new input alone."""
    blocks = make_blocks(tmp_path / "in", num_files=1)
    execution = Execution(num_workers=1)
    with pytest.raises(ValueError, match="old content"):
        run_stage("test", blocks, tmp_path / "out", fails_on_old_content, made_with=MadeWith("a"), execution=execution)
    assert num_committed(tmp_path / "out") >= 3  # the last block may have been on its way
    (tmp_path / "in/in0.jsonl").write_text("new")
    run_stage("test", blocks, tmp_path / "out", fails_on_old_content, made_with=MadeWith("a"), execution=execution)
    assert [document.text for document in read_documents(tmp_path / "out/in0.jsonl.zst")] == ["new"] * 5
    (tmp_path / "in/in0.jsonl").write_text("content again")
    with pytest.raises(ValueError, match="old content"):
        run_stage("test", blocks, tmp_path / "out", fails_on_old_content, made_with=MadeWith("a"), execution=execution)
    assert not (tmp_path / "out/in0.jsonl.zst.done.json").exists()
    with pytest.raises(UserError, match="no finished stage"):
        stage_outputs(tmp_path / "out")


def test_what_killed_runs_leave_is_swept(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path / "in", num_files=1)
    for _ in range(2):
        run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("a"), execution=Execution(num_workers=1))
        left = [
            tmp_path / "out" / name for name in (".tmp-in0.jsonl.zst-x1", "dropped/.tmp-in0.jsonl.zst-x2", ".parts/in0/0.kept")
        ]
        assert not any(path.exists() for path in left)
        for path in left:
            path.parent.mkdir(exist_ok=True, parents=True)
            path.touch()


def test_a_killed_writer_is_known_by_its_start(tmp_path: Path) -> None:
    """A killed process may stay a zombie, and its number may be given again: neither keeps its unfinished file."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "a.json")])
    deadline = time.monotonic() + 600
    while not (left := list(tmp_path.glob(".tmp-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    remove_leftovers([tmp_path])
    assert list(tmp_path.glob(".tmp-*")) == left
    head, begun, tail = left[0].name.rpartition("-")[0].rpartition(".")[0], "1", left[0].name.rpartition("-")[2]
    given_again = left[0].with_name(f"{head}.{begun}-{tail}")
    given_again.touch()
    remove_leftovers([tmp_path])
    assert list(tmp_path.glob(".tmp-*")) == left
    process.kill()
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
        time.sleep(0.05)
    remove_leftovers([tmp_path])
    assert not list(tmp_path.glob(".tmp-*"))
    process.wait()


WRITER = "import sys, time, pathlib, megagpt.files as f\nwith f.atomic_path(pathlib.Path(sys.argv[1])): time.sleep(600)"


def sleeps(block: Block) -> Iterator[Outcome]:
    time.sleep(600)
    yield from numbers(block)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    blocks = make_blocks(tmp_path / "in")
    execution = Execution(num_workers=1)
    run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("a"), execution=execution)
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=r"other settings.*overwrite=true"):
        run_stage("test", blocks, tmp_path / "out", numbers, made_with=MadeWith("b"), execution=execution)
    with pytest.raises(UserError, match=r"in2.jsonl.zst.done.json.*input is gone"):
        run_stage("test", blocks[:10], tmp_path / "out", numbers, made_with=MadeWith("a"), execution=execution)
    assert tree(tmp_path / "out") == before
    replaced = execution.model_copy(update={"overwrite": True})
    (tmp_path / "out/mine.txt").write_text("not the stage's")
    run_stage("test", blocks[:10], tmp_path / "out", numbers, made_with=MadeWith("b"), execution=replaced)
    assert [path.name for path in stage_outputs(tmp_path / "out")] == ["in0.jsonl.zst", "in1.jsonl.zst"]
    assert (tmp_path / "out/mine.txt").read_text() == "not the stage's"


def other_numbers(block: Block) -> Iterator[Outcome]:
    for outcome in numbers(block):
        yield outcome if isinstance(outcome, Document) else Seen("other")


@pytest.mark.parametrize("moment", ["block", "end"])
def test_a_start_that_was_left_over_commits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """While the first start is at work a second one, with other settings and fewer inputs, does all of its work."""
    blocks, output = make_blocks(tmp_path / "in", num_files=2, num_blocks=2), tmp_path / "out"
    inside = [False]

    def second_start() -> None:
        inside[0] = True
        replace = Execution(num_workers=1, overwrite=True)
        run_stage("test", blocks[:2], output, other_numbers, made_with=MadeWith("b"), execution=replace)
        inside[0] = False

    def left_over(block: Block) -> Iterator[Outcome]:
        if moment == "block" and block == blocks[1]:
            second_start()
        yield from numbers(block)

    merge = commit._merge

    def merge_late(*arguments: Any) -> dict[str, Any]:
        if moment == "end" and not inside[0]:
            second_start()
        return merge(*arguments)

    monkeypatch.setattr(commit, "_merge", merge_late)
    with pytest.raises(UserError, match="a later start makes something else here: this one ends"):
        run_stage("test", blocks, output, left_over, made_with=MadeWith("a"), execution=Execution(executor="inline"))
    run_stage(
        "test", blocks[:2], tmp_path / "b", other_numbers, made_with=MadeWith("b"), execution=Execution(executor="inline")
    )
    assert {name: digest for name, digest in tree(output).items() if "/.parts" not in f"/{name}"} == tree(tmp_path / "b")


def test_a_block_of_a_left_over_worker_is_not_used(tmp_path: Path) -> None:
    """It commits the block that the later start is about to do."""
    blocks, output = make_blocks(tmp_path / "in", num_files=1, num_blocks=3), tmp_path / "out"

    def with_left_over(block: Block) -> Iterator[Outcome]:
        if block.index == 0:
            for late in blocks:
                commit.commit_block(late, output, numbers, plan_hash("a", blocks))
        yield from other_numbers(block)

    for folder, process in ((output, with_left_over), (tmp_path / "b", other_numbers)):
        run_stage("test", blocks, folder, process, made_with=MadeWith("b"), execution=Execution(executor="inline"))
    assert tree(output) == tree(tmp_path / "b")


def test_names_must_not_collide(tmp_path: Path) -> None:
    blocks = [Block("a/x.warc.gz", "x.warc.jsonl.zst"), Block("b/x.warc.gz", "x.warc.jsonl.zst")]
    with pytest.raises(UserError, match=r"a/x\.warc\.gz and b/x\.warc\.gz"):
        run_stage("test", blocks, tmp_path, numbers, made_with=MadeWith("a"), execution=Execution())


@pytest.mark.slow
def test_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, reference: tuple[Path, dict[str, str]], project: Path) -> None:
    """kill -9 of a run at several moments; readers' globs never see a partial file; no worker outlives its parent."""
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        sys.path[:0] = sys.argv[1].split(":")
        from test_run_stage import make_blocks, slow_numbers
        from megagpt.corpus.runner.config import Execution
        from megagpt.corpus.runner.run_stage import run_stage
        from megagpt.settings_record import MadeWith
        if __name__ == "__main__":
            run_stage("test", make_blocks(Path(sys.argv[2])), Path(sys.argv[3]), slow_numbers, made_with=MadeWith("a"),
                      execution=Execution(num_workers=2))
            print("done")
        """
    )
    (tmp_path / "run.py").write_text(script)
    command = [
        sys.executable,
        str(tmp_path / "run.py"),
        f"{Path(__file__).parent}:{project / 'tests'}:{project / 'tests' / 'support'}",
        str(reference[0]),
        str(tmp_path / "out"),
    ]
    kills = 0
    for parts_to_wait_for in (1, 4, 9):
        process = subprocess.Popen(command, cwd=project, start_new_session=True, stderr=subprocess.DEVNULL)
        while process.poll() is None and num_committed(tmp_path / "out") < parts_to_wait_for:
            for path in (tmp_path / "out").glob("*.jsonl.zst"):
                assert len(list(read_documents(path))) == 5 * 40
            time.sleep(0.005)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        deadline = time.monotonic() + 600
        while session_members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not session_members(process.pid)
    assert kills >= 2
    assert b"done" in subprocess.check_output(command, cwd=project, stderr=subprocess.DEVNULL)
    assert tree(tmp_path / "out") == reference[1]


@pytest.mark.slow
def test_workers_end_with_their_parent(tmp_path: Path, project: Path) -> None:
    """Also in the middle of a long block."""
    code = (
        "import sys; from pathlib import Path; from test_run_stage import make_blocks, sleeps;"
        "from megagpt.corpus.runner.config import Execution; from megagpt.corpus.runner.run_stage import run_stage;"
        "from megagpt.settings_record import MadeWith;"
        "run_stage('t', make_blocks(Path(sys.argv[1])), Path(sys.argv[2]), sleeps, made_with=MadeWith('a'),"
        "execution=Execution(num_workers=2))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in"), str(tmp_path / "out")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, project / "tests", project / "tests" / "support"))),
    }
    process = subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while len(session_members(process.pid)) < 3 and time.monotonic() < deadline:  # itself and two workers, forked
        time.sleep(0.1)
    assert len(session_members(process.pid)) >= 3
    time.sleep(3)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 600
    while session_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not session_members(process.pid)


def import_path(project: Path) -> str:
    """PYTHONPATH of a process that imports this file."""
    return os.pathsep.join(map(str, (Path(__file__).parent, project / "tests", project / "tests" / "support")))


def num_committed(output: Path) -> int:
    """Blocks committed so far, finished files included."""
    return len(list(output.glob(".parts/*/*/*.json"))) + 5 * len(list(output.glob("*.done.json")))


def session_members(session: int) -> list[int]:
    """Live processes of a session (zombies aside), from /proc."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            members.append(int(folder.name))
    return members


FORKED = """
import sys, threading
from megagpt.corpus.runner import executors
from megagpt.corpus.runner.cpu_limit import cpu_limit

MARK = []

def mark():
    return list(MARK)

if __name__ == "__main__":
    with cpu_limit(60):  # as in a phase that ran in this process: it leaves a thread
        MARK.append(len(threading.enumerate()) - 1)
    found = []
    for other in (None, threading.Thread(target=input)):
        if other:
            other.start()
        executors.run_tasks([(0, mark, ())], executors.Execution(num_workers=1), lambda key, value: found.append(value))
    print(found, flush=True)
"""


def test_workers_are_forks_of_a_process_with_one_thread_and_else_begin_anew(tmp_path: Path) -> None:
    (tmp_path / "forked.py").write_text(FORKED)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, str(tmp_path / "forked.py")]
    done = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert done.stdout
    assert done.stdout.readline() == "[[1], []]\n"
    done.communicate("\n", timeout=900)
    assert done.returncode == 0


def test_killed_worker_is_named_and_a_rerun_completes(tmp_path: Path, reference: tuple[Path, dict[str, str]]) -> None:
    shutil.copytree(reference[0], tmp_path / "in")
    blocks = make_blocks(tmp_path / "in", num_files=1)
    execution = Execution(num_workers=2)
    with pytest.raises(WorkerDiedError, match=r"in0.jsonl from byte 300"):
        run_stage("test", blocks, tmp_path / "out", dies_once, made_with=MadeWith("a"), execution=execution)
    assert num_committed(tmp_path / "out") >= 1
    run_stage("test", blocks, tmp_path / "out", dies_once, made_with=MadeWith("a"), execution=execution)
    expected = {name: digest for name, digest in reference[1].items() if "in0" in name}
    assert {name: digest for name, digest in tree(tmp_path / "out").items() if "in0" in name} == expected


@pytest.mark.slow
def test_full_disk_is_a_clear_error_and_a_rerun_completes(tmp_path: Path, small_disk: SmallDisk) -> None:
    blocks = make_blocks(tmp_path / "in", num_files=4, num_blocks=1)
    small, one = small_disk.path, Execution(num_workers=1)
    small_disk.resize(7 << 10)
    with pytest.raises(OSError) as caught:
        run_stage("test", blocks, small / "out", fills_the_disk, made_with=MadeWith("a"), execution=one)
    assert caught.value.errno == errno.ENOSPC
    assert str(small) in str(caught.value.filename)
    done = list((small / "out").glob("*.done.json"))
    assert 1 <= len(done) < 4
    small_disk.resize(64 << 10)
    summary = run_stage("test", blocks, small / "out", fills_the_disk, made_with=MadeWith("a"), execution=one)
    assert (summary.complete, summary.kept) == (True, 16000)
    run_stage("test", blocks, tmp_path / "out", fills_the_disk, made_with=MadeWith("a"), execution=one)
    assert tree(small / "out") == tree(tmp_path / "out")


@pytest.mark.slow
def test_dask_gives_the_same_bytes(tmp_path: Path, reference: tuple[Path, dict[str, str]], project: Path) -> None:
    """A scheduler and two workers as processes of their own."""
    scheduler_file = tmp_path / "scheduler.json"
    environment = {**os.environ, "PYTHONPATH": f"{project}:{import_path(project)}", "DASK_DISTRIBUTED__WORKER__DAEMON": "False"}
    dask = [sys.executable, "-m", "dask"]
    local = ["--host", "127.0.0.1", "--no-dashboard"]
    workers = ["worker", "--scheduler-file", str(scheduler_file), "--nthreads", "1", "--nworkers", "1", "--no-nanny", *local]
    commands = [["scheduler", "--scheduler-file", str(scheduler_file), "--port", "0", *local], workers, workers]
    processes = [
        subprocess.Popen([*dask, *command], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) for command in commands
    ]
    try:
        deadline = time.monotonic() + 600
        while not scheduler_file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        code = (
            "import sys; from pathlib import Path; from test_run_stage import make_blocks, numbers;"
            "from megagpt.corpus.runner.config import Execution; from megagpt.corpus.runner.run_stage import run_stage;"
            "from megagpt.settings_record import MadeWith;"
            "run_stage('test', make_blocks(Path(sys.argv[1])), Path(sys.argv[2]), numbers, made_with=MadeWith('a'),"
            "execution=Execution(executor='dask', scheduler_file=Path(sys.argv[3])))"
        )
        command = [sys.executable, "-c", code, str(reference[0]), str(tmp_path / "out"), str(scheduler_file)]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=900)
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(timeout=900)
    assert tree(tmp_path / "out") == reference[1]


def test_outputs_are_read_back_by_blocks(tmp_path: Path) -> None:
    run_stage(
        "t",
        make_blocks(tmp_path / "in", 1),
        tmp_path / "out",
        numbers,
        made_with=MadeWith("a"),
        execution=Execution(num_workers=1),
    )
    paths = stage_outputs(tmp_path / "out")
    blocks = document_blocks(paths, min_bytes=1)
    assert [block.index for block in blocks] == [0, 1, 2, 3, 4]
    by_blocks = [document for block in blocks for document in read_block(block)]
    assert by_blocks == list(read_documents(paths[0]))
    assert len(document_blocks(paths)) == 1
    paths[0].write_bytes(paths[0].read_bytes()[:-7])
    with pytest.raises(UserError, match=r"in0\.jsonl\.zst: cut off or damaged"):
        list(read_documents(paths[0]))
    with pytest.raises(UserError, match=r"in0\.jsonl\.zst: cut off or damaged"):
        list(read_block(blocks[4]))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/d/CC-MAIN-1.warc.gz", "CC-MAIN-1.warc.jsonl.zst"),
        ("x.jsonl.zst", "x.jsonl.zst"),
        ("x.xml.bz2", "x.xml.jsonl.zst"),
        ("https://h/p/a.jsonl", "a.jsonl.zst"),
    ],
)
def test_output_name(path: str, name: str) -> None:
    assert output_name(path) == name


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"part": "2/2"}, "parts of 2 are 0/2 to 1/2"),
        ({"part": "0/0"}, "part"),
        ({"executor": "dask"}, "needs scheduler_file"),
        ({"num_workers": 0}, "num_workers=0"),
        ({"part": "0/2", "overwrite": True}, "delete another's work"),
    ],
)
def test_wrong_execution(values: dict[str, object], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        validate(Execution, values, source="test")


def test_inline_runs_in_this_process_in_order_and_changes_no_byte(
    tmp_path: Path, reference: tuple[Path, dict[str, str]]
) -> None:
    def here(block: Block) -> Iterator[Outcome]:  # a function that no worker process could be given
        seen.append((block.name, block.index, os.getpid()))
        yield from numbers(block)

    seen: list[tuple[str, int, int]] = []
    blocks = make_blocks(reference[0])
    run_stage("test", blocks, tmp_path / "out", here, made_with=MadeWith("a"), execution=Execution(executor="inline"))
    assert seen == [(block.name, block.index, os.getpid()) for block in blocks]
    assert tree(tmp_path / "out") == reference[1]
