"""Hostile input and bad luck: each trial spoils one thing, runs a tool as a user would, and compares the outcome.

    python tests/soak/rough_treatment.py FOLDER [NAME ...]      all trials, or those whose name contains a NAME (minutes; root
                                                                for those that need another user or a file system)

A trial fails if the tool prints a traceback, has another exit status, lacks the words that it must print, runs longer than it
may, or leaves other results than it must. FOLDER is made. All trials together write
bench/results/rough_treatment.json; a short form is among the tests (tests/test_rough_treatment.py).
"""

import bz2
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]

from small_run import settings, write_shards  # noqa: E402

from megagpt.files import read_json, write_json  # noqa: E402
from megagpt.measurement import write_results  # noqa: E402

FIXTURE = PROJECT / "tests" / "fixtures" / "release_0_1"
DONE, CRASH, USER_ERROR = 0, 1, 2
MAX_SECONDS = 120.0
"""CPU seconds that a tool may take on the small inputs here, whatever is in them."""


@dataclass(frozen=True)
class Ran:
    """How a tool ended."""

    status: int
    output: str
    cpu_seconds: float


@dataclass
class Bench:
    """A folder with a small corpus and a small run, for one trial."""

    folder: Path
    ran: list[Ran] = field(default_factory=list)

    def tool(
        self,
        name: str,
        *words: str,
        prefix: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        cwd: Path | None = None,
    ) -> Ran:
        """tools/NAME.py, run in the folder."""
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        command = [*prefix, sys.executable, str(PROJECT / "tools" / f"{name}.py"), *words]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with subprocess.Popen(
            command, cwd=cwd or self.folder, env={k: v for k, v in variables.items() if v is not None},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(timeout=10 * MAX_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        text = output.decode(errors="replace")
        self.ran.append(Ran(process.returncode, text, cpu))
        return self.ran[-1]

    def corpus(self, tool: str, *words: str, **more: Any) -> Ran:
        """A corpus tool on the folder's corpus.yaml."""
        return self.tool(tool, "corpus.yaml", "executor=inline", *words, **more)

    def train(self, *words: str, **more: Any) -> Ran:
        """The folder's run, from where it is to the step that the words say."""
        return self.tool("train_model", "run.yaml", *words, **more)

    def counted(self) -> dict[str, int]:
        """Malformed records by kind, of the extraction into `hostile`."""
        return read_json(self.folder / "hostile" / "extract" / "summary.json")["faults"]

    def expect(self, ran: Ran, status: int | tuple[int, ...], *words: str) -> str:
        """What was got, in a line; AssertionError if it is not what is right."""
        last = (ran.output.strip().splitlines() or [""])[-1]
        allowed = (status,) if isinstance(status, int) else status
        assert ran.status in allowed, f"status {ran.status}: {ran.output[-800:]}"
        assert "Traceback" not in ran.output, ran.output[-2000:]
        for word in words:
            assert re.search(word, ran.output), f"{word!r} is not in: {ran.output[-800:]}"
        assert ran.cpu_seconds < MAX_SECONDS, f"{ran.cpu_seconds:.0f} s of CPU"
        return f"status {ran.status}: {last[:160]}"


Trial = Callable[[Bench], str]
TRIALS: dict[str, tuple[str, str, Trial]] = {}
"""Name -> (kind, what is right, the trial)."""


def trial(kind: str, right: str) -> Callable[[Trial], Trial]:
    """Register a trial under its function's name."""

    def register(function: Trial) -> Trial:
        TRIALS[function.__name__] = (kind, right, function)
        return function

    return register


# ---- silence over what is missing

LOST = "silence over what is missing"


@trial(LOST, "the next stage names the missing file and the command that makes it again")
def record_of_a_finished_file_is_lost(bench: Bench) -> str:
    next((bench.folder / "corpus" / "extract").glob("*.done.json")).unlink()
    return bench.expect(bench.corpus("filter_documents", "overwrite=true"), USER_ERROR, r"\.done\.json|is missing")


@trial(LOST, "the next stage names the file and its size")
def finished_file_is_cut(bench: Bench) -> str:
    path = next((bench.folder / "corpus" / "extract").glob("*.jsonl.zst"))
    path.write_bytes(path.read_bytes()[:-1])
    return bench.expect(bench.corpus("filter_documents", "overwrite=true"), USER_ERROR, re.escape(path.name), "bytes")


@trial(LOST, "verify=true finds it; a rerun with verify=true makes this file again, with the bytes of before, and no other")
def finished_file_is_flipped(bench: Bench) -> str:
    folder = bench.folder / "corpus" / "extract"
    path, other = sorted(folder.glob("*.jsonl.zst"))[:2]
    before, written = path.read_bytes(), other.stat().st_mtime_ns
    path.write_bytes(before[:40] + bytes([before[40] ^ 1]) + before[41:])
    bench.expect(bench.corpus("extract_documents", "verify=true"), DONE)
    assert path.read_bytes() == before
    assert other.stat().st_mtime_ns == written
    return bench.expect(bench.tool("inspect_data", "stage=corpus/extract", "verify=true"), DONE)


@trial(LOST, "verify names it")
def counts_of_a_finished_file_are_changed(bench: Bench) -> str:
    path = next((bench.folder / "corpus" / "extract").glob("*.done.json"))
    write_json(path, {**read_json(path), "kept": 10**6})
    return bench.expect(bench.tool("inspect_data", "stage=corpus/extract", "verify=true"), USER_ERROR, re.escape(path.name))


@trial(LOST, "verify names it, training refuses, and tokenize_documents makes it again")
def manifest_of_shards_is_lost(bench: Bench) -> str:
    path = bench.folder / "corpus" / "shards" / "train" / "manifest.json"
    before = path.read_bytes()
    path.unlink()
    bench.expect(bench.tool("inspect_data", "shards=corpus/shards", "verify=true"), USER_ERROR, r"train/manifest\.json")
    bench.expect(bench.corpus("tokenize_documents"), DONE)
    assert path.read_bytes() == before
    return "made again, byte for byte"


@trial(LOST, "verify names it")
def list_of_overlaps_is_changed(bench: Bench) -> str:
    path = bench.folder / "corpus" / "shards" / "leaks.jsonl"
    path.write_bytes(path.read_bytes() + b"{}\n")
    return bench.expect(bench.tool("inspect_data", "shards=corpus/shards", "verify=true"), USER_ERROR, r"leaks\.jsonl")


@trial(LOST, "numbers of attempts do not fall")
def owner_of_a_run_is_lost(bench: Bench) -> str:
    (bench.folder / "run" / "owner.json").unlink()
    bench.expect(bench.train("max_steps=6"), DONE)
    number = read_json(bench.folder / "run" / "owner.json")["incarnation"]
    assert number == 2, number
    return f"attempt {number}"


@trial(LOST, "the run starts from the checkpoint before, or refuses; an altered state feeds no sample twice")
def state_of_a_checkpoint_is_altered(bench: Bench) -> str:
    path = sorted((bench.folder / "run" / "checkpoints").glob("step_*"))[-1] / "state.json"
    state = read_json(path)
    state["train_state"]["samples"] = 0
    write_json(path, state)
    bench.expect(bench.train("max_steps=6"), DONE, "not used|sha256|differs")
    return bench.expect(bench.tool("inspect_data", "run_dir=run"), DONE, "all as in the shards")


@trial(LOST, "every restart works; the row is counted as torn")
def row_of_the_metrics_has_a_wrong_type(bench: Bench) -> str:
    with (bench.folder / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": "x", "time": 1, "incarnation": 1}\n')
    return bench.expect(bench.train("max_steps=6"), DONE)


# ---- work per byte

WORK = "work per byte without a bound"


def extract(bench: Bench, name: str, data: bytes, *words: str, **more: Any) -> Ran:
    """Extract one file."""
    (bench.folder / name).write_bytes(data)
    return bench.tool(
        "extract_documents", f"extract.inputs=[{name}]", "work_dir=hostile", "num_workers=1", "extract.source=t", *words, **more
    )


def wiki(*texts: str) -> bytes:
    """A MediaWiki dump with pages of these texts."""
    pages = "".join(
        f"<page><title>T{i}</title><ns>0</ns><id>{i}</id><revision><id>{i}</id><model>wikitext</model>"
        f'<text bytes="1">{text}</text></revision></page>'
        for i, text in enumerate(texts)
    )
    return f'<mediawiki xml:lang="en"><siteinfo></siteinfo>{pages}</mediawiki>'.encode()


@trial(WORK, "the dump is read in seconds")
def wiki_page_of_4_kb_with_an_open_table_and_blanks(bench: Bench) -> str:
    page = "{|" + "\n|-\n| a " * 300 + "\n== " + " " * 3000 + "x"
    ran = extract(bench, "a.xml", wiki(page, "A sound page. " * 30))
    assert ran.cpu_seconds < 30
    return bench.expect(ran, DONE, "1 kept|2 kept") + f", {ran.cpu_seconds:.1f} s"


def warc(*bodies: bytes, claimed: int | None = None) -> bytes:
    """Responses with these HTML bodies."""
    records = []
    for i, body in enumerate(bodies):
        http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + body
        head = (
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.example/{i}\r\nWARC-Record-ID: <urn:uuid:{i}>\r\n"
            f"WARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: application/http; msgtype=response\r\n"
            f"Content-Length: {claimed or len(http)}\r\n\r\n"
        )
        records.append(head.encode() + http + b"\r\n\r\n")
    return b"".join(records)


GOOD_PAGE = b"<html><body><article><p>" + b"A sentence of a sound page that is kept. " * 30 + b"</p></article></body></html>"


@trial(WORK, "the page costs itself alone, in bounded time")
def page_of_open_elements(bench: Bench) -> str:
    hostile = b"<html><body>" + b"<div>" * 400_000 + b"x"
    ran = extract(bench, "a.warc.gz", gzip.compress(warc(hostile, GOOD_PAGE)))
    return bench.expect(ran, DONE, "2 of 2 documents") + f", {ran.cpu_seconds:.1f} s"


@trial(WORK, "the page costs itself alone, in bounded time")
def page_of_attributes(bench: Bench) -> str:
    hostile = b"<html><body><p " + b" ".join(b"a%d=1" % i for i in range(150_000)) + b">x</p>"
    ran = extract(bench, "a.warc.gz", gzip.compress(warc(hostile, GOOD_PAGE)))
    return bench.expect(ran, DONE) + f", {ran.cpu_seconds:.1f} s"


@trial(WORK, "each record costs no more than its bytes")
def records_that_claim_64_mb(bench: Bench) -> str:
    ran = extract(bench, "a.warc", warc(*[b"x"] * 3000, claimed=60 << 20))
    return bench.expect(ran, DONE) + f", {ran.cpu_seconds:.1f} s"


@trial(WORK, "splitting is linear")
def words_of_at_signs(bench: Bench) -> str:
    lines = [json.dumps({"id": "1", "text": "@a+" * 100_000}), json.dumps({"id": "2", "text": "A sound text. " * 50})]
    (bench.folder / "a.jsonl").write_text("\n".join(lines))
    ran = extract(bench, "b.jsonl", "\n".join(lines).encode())
    bench.expect(ran, DONE)
    ran = bench.tool("filter_documents", "work_dir=hostile", "num_workers=1", "filter.order=[gopher_repetition,gopher_quality]")
    return bench.expect(ran, DONE) + f", {ran.cpu_seconds:.1f} s"


# ---- memory

MEMORY = "memory without a bound"
LIMITED = ("prlimit", f"--as={3 << 30}")


@trial(MEMORY, "the page is refused by name under 3 GiB of address space")
def bz2_of_4_gb(bench: Bench) -> str:
    head = b'<mediawiki xml:lang="en"><page><title>T</title><ns>0</ns><revision><text>'
    bomb = bz2.compress(head + b"a" * (300 << 20))
    ran = extract(bench, "a.xml.bz2", bomb, prefix=LIMITED)
    got = bench.expect(ran, DONE)
    assert bench.counted() == {"page longer than 64 MiB": 1}, bench.counted()
    return got


@trial(MEMORY, "the line is refused by name under 3 GiB of address space")
def one_line_of_500_mb(bench: Bench) -> str:
    lines = b'{"id": "1", "text": "' + b"a" * (500 << 20) + b'"}\n' + b'{"id": "2", "text": "a sound line"}\n'
    ran = extract(bench, "a.jsonl.zst", zstandard.compress(lines), prefix=LIMITED)
    got = bench.expect(ran, DONE, "1 of 1 documents kept")
    assert bench.counted() == {"line longer than 64 MiB": 1}, bench.counted()
    return got


@trial(MEMORY, "its rows are read under 3 GiB of address space, or it is refused by name")
def parquet_row_group_of_2_gb(bench: Bench) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([f"Sentence {i} of a text. " * 4000 for i in range(20)])  # 92 KB each
    table = pa.table({"text": pa.chunked_array([texts] * 1300)})
    pq.write_table(table, bench.folder / "a.parquet", row_group_size=1 << 30, use_dictionary=False, compression="zstd")
    metadata = pq.read_metadata(bench.folder / "a.parquet")
    assert metadata.num_row_groups == 1
    assert metadata.row_group(0).total_byte_size > 2 << 30
    words = ("extract.inputs=[a.parquet]", "work_dir=hostile", "num_workers=1", "extract.source=t")
    ran = bench.tool("extract_documents", *words, prefix=LIMITED)
    assert ran.status == DONE or "a.parquet" in ran.output, ran.output[-800:]
    return bench.expect(ran, (DONE, CRASH, USER_ERROR)) + f", {bench.counted()}"


@trial(MEMORY, "counted as cut off; what came before is kept")
def zstd_stream_ends_early(bench: Bench) -> str:
    lines = b"".join(b'{"id": "%d", "text": "%s"}\n' % (i, os.urandom(200).hex().encode()) for i in range(2000))
    data = zstandard.compress(lines)
    ran = extract(bench, "a.jsonl.zst", data[: len(data) // 2])
    got = bench.expect(ran, DONE)
    assert sum(bench.counted().values()) == 1, bench.counted()
    return f"{got}: {', '.join(bench.counted())}"


@trial(MEMORY, "each damaged member is counted, with a few examples")
def masses_of_damaged_members(bench: Bench) -> str:
    members = []
    for i in range(20_000):
        member = bytearray(gzip.compress(warc(b"x%d" % i)))
        member[-12] ^= 0xFF
        members.append(bytes(member))
    ran = extract(bench, "a.warc.gz", b"".join([*members, gzip.compress(warc(GOOD_PAGE))]))
    size = sum(path.stat().st_size for path in (bench.folder / "hostile").rglob("*") if path.is_file())
    assert size < 1 << 20, f"{size:,} bytes of results"
    return bench.expect(ran, DONE, "1 of 1 documents kept") + f", {bench.counted()}, {ran.cpu_seconds:.1f} s"


# ---- trust

TRUST = "trust in what others give"


def spoil_checkpoint(bench: Bench, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change state.json and its sum in the manifest."""
    import hashlib

    folder = sorted((bench.folder / "run" / "checkpoints").glob("step_*"))[-1]
    state = read_json(folder / "state.json")
    change(state)
    write_json(folder / "state.json", state)
    manifest = read_json(folder / "manifest.json")
    data = (folder / "state.json").read_bytes()
    entry = manifest["files"]["state.json"]
    entry.update({"bytes" if "bytes" in entry else "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    write_json(folder / "manifest.json", manifest)
    return folder


@trial(TRUST, "one line names the file and the value, before anything of that size is built")
def checkpoint_with_a_hidden_size_of_1e9(bench: Bench) -> str:
    spoil_checkpoint(bench, lambda state: state["model"].update(hidden_size=10**9))
    ran = bench.tool("generate_text", "run_dir=run", "prompt=a", "max_tokens=2", prefix=("prlimit", f"--as={24 << 30}"))
    return bench.expect(ran, (USER_ERROR, CRASH), "error: ")


@trial(TRUST, "one line names the file")
def partition_with_a_cut_header(bench: Bench) -> str:
    folder = sorted((bench.folder / "run" / "checkpoints").glob("step_*"))[-1]
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:11])
    ran = bench.tool("inspect_checkpoints", "run_dir=run", "verify=true")
    return bench.expect(ran, CRASH, r"\.safetensors")


@trial(TRUST, "the path is refused")
def manifest_that_names_a_path_outside(bench: Bench) -> str:
    folder = sorted((bench.folder / "run" / "checkpoints").glob("step_*"))[-1]
    manifest = read_json(folder / "manifest.json")
    manifest["files"]["../../../etc/passwd"] = {**next(iter(manifest["files"].values()))}
    write_json(folder / "manifest.json", manifest)
    return bench.expect(bench.tool("inspect_checkpoints", "run_dir=run", "verify=true"), (USER_ERROR, CRASH), "passwd")


@trial(TRUST, "one line names the file and the field")
def owner_with_a_text_for_a_number(bench: Bench) -> str:
    write_json(bench.folder / "run" / "owner.json", {"incarnation": "1"})
    return bench.expect(bench.train("max_steps=6"), USER_ERROR, r"owner\.json", "incarnation")


@trial(TRUST, "refused with the rule")
def yaml_of_deep_nesting_aliases_and_nul(bench: Bench) -> str:
    texts = ["a: " + "[" * 5000, "a: &a [x]\nb: &b [" + "*a," * 9 + "]\nc: [" + "*b," * 9 + "]", "run_dir: a\x00b"]
    for i, text in enumerate(texts):
        (bench.folder / f"{i}.yaml").write_text(text)
        bench.expect(bench.tool("train_model", f"{i}.yaml"), USER_ERROR, rf"{i}\.yaml")
    return "three refused"


@trial(TRUST, "the query of the URL is in no output and no file")
def presigned_url(bench: Bench) -> str:
    url = "http://127.0.0.1:9/a.warc.gz?X-Amz-Signature=SECRET123"
    words = [f'extract.inputs=["{url}"]', "work_dir=hostile", "num_workers=1"]
    ran = bench.tool("extract_documents", *words)
    assert "SECRET123" not in ran.output, ran.output
    held = [path for path in (bench.folder / "hostile").rglob("*") if path.is_file() and b"SECRET123" in path.read_bytes()]
    assert not held, held
    return bench.expect(ran, (USER_ERROR, CRASH), "error: ")


@trial(TRUST, "escaped")
def control_characters_in_a_file_name(bench: Bench) -> str:
    ran = bench.tool("extract_documents", b"extract.inputs=['\x1b[2Jx.warc']".decode(), "work_dir=hostile")
    assert "\x1b[2J" not in ran.output
    return bench.expect(ran, USER_ERROR)


# ---- bad luck

LUCK = "bad luck of machines"


@trial(LUCK, "the run resumes; no step is lost")
def clock_set_back_a_year(bench: Bench) -> str:
    ran = bench.train("max_steps=6", prefix=("faketime", "-f", "-365d"))
    return bench.expect(ran, DONE, "done")


@trial(LUCK, "works, or names the limit")
def sixty_four_open_files(bench: Bench) -> str:
    bench.expect(bench.corpus("dedup_documents", "overwrite=true", prefix=("prlimit", "--nofile=64")), DONE)
    return bench.expect(
        bench.train("max_steps=6", prefix=("prlimit", "--nofile=64")), (DONE, CRASH), "done|Too many open files"
    )


@trial(LUCK, "one line, no traceback")
def little_address_space(bench: Bench) -> str:
    ran = bench.corpus("extract_documents", "overwrite=true", prefix=("prlimit", f"--as={400 << 20}"))
    return f"status {ran.status}: {(ran.output.strip().splitlines() or [''])[-1][:120]}"


@trial(LUCK, "results have the same bytes")
def one_core_umask_077_turkish_no_home(bench: Bench) -> str:
    before = {p.name: p.read_bytes() for p in (bench.folder / "corpus" / "extract").glob("*.jsonl.zst")}
    shutil.rmtree(bench.folder / "corpus")
    env = {"HOME": None, "LC_ALL": "tr_TR.UTF-8", "LANG": "tr_TR.UTF-8"}
    ran = bench.corpus("extract_documents", prefix=("taskset", "-c", "0", "sh", "-c", 'umask 077; exec "$0" "$@"'), env=env)
    got = bench.expect(ran, DONE)
    after = {p.name: p.read_bytes() for p in (bench.folder / "corpus" / "extract").glob("*.jsonl.zst")}
    assert after == before
    return got


@trial(LUCK, "the run resumes (loader threads need no shared memory)")
def shared_memory_of_1_mb(bench: Bench) -> str:
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" "$@"'
    return bench.expect(bench.train("max_steps=6", prefix=("unshare", "-m", "sh", "-c", script)), DONE, "done")


@trial(LUCK, "the tools work from a checkout that cannot be written, as another user")
def another_user_and_a_checkout_that_cannot_be_written(bench: Bench) -> str:
    shutil.rmtree(bench.folder / "corpus")
    for path in (bench.folder, *bench.folder.rglob("*")):
        os.chown(path, 65534, 65534)
    parents = [path for path in bench.folder.parents if path != Path("/") and not path.stat().st_mode & 0o001]
    for path in parents:
        path.chmod(path.stat().st_mode | 0o011)
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    script = f'mount --bind {PROJECT} {PROJECT} && mount -o remount,bind,ro {PROJECT} && exec "$0" "$@"'
    ran = bench.corpus("extract_documents", prefix=("unshare", "-m", "sh", "-c", script, *user), env={"HOME": None})
    return bench.expect(ran, DONE)


@trial(LUCK, "the message names the file, the need and what is free; earlier checkpoints stay")
def disk_full_while_saving(bench: Bench) -> str:
    place = bench.folder / "small"
    place.mkdir()
    script = f"mount -t tmpfs -o size=2m tmpfs {place} && cp -r run {place}/ && head -c 1000000 /dev/zero > {place}/fill"
    script += ' && exec "$0" "$@"'
    ran = bench.train("max_steps=40", "run_dir=small/run", prefix=("unshare", "-m", "sh", "-c", script))
    return bench.expect(ran, (CRASH, USER_ERROR), "error: ", r"small/run.* (KB|MB|B) ")


@trial(LUCK, "training reaches its last step; metrics.jsonl is complete")
def tracker_folder_on_a_full_disk(bench: Bench) -> str:
    place = bench.folder / "tiny"
    place.mkdir()
    script = f'mount -t tmpfs -o size=64k tmpfs {place} && (cat /dev/zero > {place}/fill || true) 2> /dev/null; exec "$0" "$@"'
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(place), "WANDB_DATA_DIR": str(place), "WANDB_CACHE_DIR": str(place)}
    words = ("max_steps=6", "monitor.wandb_project=t")
    return bench.expect(bench.train(*words, prefix=("unshare", "-m", "sh", "-c", script), env=env), DONE, "done")


@trial(LUCK, "the run ends by itself after the pause")
def a_process_that_is_stopped_for_seconds(bench: Bench) -> str:
    command = [sys.executable, str(PROJECT / "tools" / "train_model.py"), "run.yaml", "max_steps=12"]
    with subprocess.Popen(command, cwd=bench.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        time.sleep(4)
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        process.send_signal(signal.SIGCONT)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-800:]
    assert "Traceback" not in output
    return f"status 0: {output.strip().splitlines()[-1][:120]}"


def documents_of(corpus: Path) -> dict[Path, bytes]:
    """Bytes of every file of documents; parts that could not be removed do not count."""
    files = (path for path in corpus.rglob("*.jsonl.zst") if path.is_file() and ".parts" not in path.parts)
    return {path.relative_to(corpus): path.read_bytes() for path in files}


@trial(LUCK, "every stage and the run end as they do on a disk that lists at once")
def disk_that_lists_late(bench: Bench) -> str:
    library = bench.folder / "late_listing.so"
    source = PROJECT / "tests" / "support" / "late_listing.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    late = {"LD_PRELOAD": str(library), "LATE_SECONDS": "4", "LATE_BELOW": str(bench.folder)}
    before = documents_of(bench.folder / "corpus")
    shards = (bench.folder / "corpus" / "shards" / "train" / "shard_00000.bin").read_bytes()
    time.sleep(5)  # the dumps are old
    shutil.rmtree(bench.folder / "corpus")
    got = []
    for name in ("extract_documents", "filter_documents", "dedup_documents", "tokenize_documents"):
        got.append(bench.expect(bench.corpus(name, env=late), DONE))
    assert documents_of(bench.folder / "corpus") == before
    assert (bench.folder / "corpus" / "shards" / "train" / "shard_00000.bin").read_bytes() == shards
    bench.expect(bench.train("max_steps=8", env=late), DONE, "done")
    bench.expect(bench.train("max_steps=12", env=late), DONE, "done")
    return bench.expect(bench.tool("inspect_data", "run_dir=run"), DONE, "all as in the shards")


# ---- running them


def make_base(folder: Path) -> None:
    """A corpus of every stage and a run of four steps."""
    folder.mkdir(parents=True)
    shutil.copytree(FIXTURE / "dumps", folder / "dumps")
    shutil.copy(FIXTURE / "corpus.yaml", folder)
    bench = Bench(folder)
    for name in ("extract_documents", "filter_documents", "dedup_documents", "tokenize_documents"):
        bench.expect(bench.corpus(name), DONE)
    write_shards(folder / "toy")
    values = settings(Path("toy"), Path("run"), max_steps=24, save_every_steps=2, micro_batch_size=4)
    (folder / "run.yaml").write_text(json.dumps(values))
    bench.expect(bench.train("max_steps=4", "optim.schedule.warmup_steps=2"), DONE, "done")


def run_trials(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row per trial."""
    make_base(folder / "base")
    rows = []
    for name in names:
        kind, right, function = TRIALS[name]
        shutil.copytree(folder / "base", folder / name, symlinks=True)
        bench, began = Bench(folder / name), time.monotonic()
        try:
            got, passed = function(bench), True
        except (AssertionError, OSError, subprocess.SubprocessError, StopIteration) as error:
            got, passed = f"{type(error).__name__}: {error}"[:600], False
        row = {"trial": name.replace("_", " "), "kind": kind, "right": right, "got": got, "passed": passed}
        rows.append(row)
        print(f"{'ok  ' if passed else 'FAIL'} {name} ({time.monotonic() - began:.0f} s): {got}", flush=True)
        if passed:
            shutil.rmtree(folder / name, ignore_errors=True)
    return rows


def main() -> int:
    """All trials, or those that are named."""
    folder, wanted = Path(sys.argv[1]).resolve(), sys.argv[2:]
    names = [name for name in TRIALS if not wanted or any(word in name for word in wanted)]
    rows = run_trials(folder, names)
    failed = sum(not row["passed"] for row in rows)
    print(f"{len(rows)} trials, {failed} failed")
    if not wanted:
        about = (
            "Each trial spoils one thing and runs the tools as a user would. Right: what the tool has to do; got: what it did. "
            f"{len(rows)} trials, {failed} failed."
        )
        write_results(
            "rough_treatment", {"title": "Rough treatment", "about": about, "rows": rows, "lost": ""}, packages=["megagpt"]
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
