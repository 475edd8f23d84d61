"""Fuzzing: atheris (libFuzzer) changes sound inputs of what strangers write and what disks keep, guided by coverage.

    python tests/soak/fuzz.py [TARGET ...] [seconds=1800] [folder=FOLDER]     every target, or those named, for so long each

`seconds` counts CPU time, so a busy machine takes longer and tests no less. A target is run in rounds, each with the next
random seed on the inputs that the rounds before have found; the same command with the same FOLDER resumes where it stopped.

A target reads bytes as a tool would. It fails on any exception but those that a tool prints in one line (UserError, Failure),
on one input that takes more than 20 CPU seconds, or 10 minutes by the clock, and on more than 3 GiB of memory. What failed is
kept in FOLDER and printed: `python tests/soak/fuzz.py TARGET input=FILE` tries one file. Seeds are made here, the same each
time. The counts go to bench/results/fuzz.json, which keeps those of targets that were not run. tests/test_fuzz.py runs a short
form.
"""

import bz2
import contextlib
import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "support")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from megagpt.files import read_json, write_json  # noqa: E402
from megagpt.measurement import RESULTS, write_results  # noqa: E402

FIXTURE = PROJECT / "tests" / "fixtures" / "release_0_1"
MAX_BYTES = 1 << 16
"""Longest input."""
MAX_CPU_SECONDS = 20
"""For one input."""
MAX_SECONDS = 600
"""For one input, by the clock: it hangs."""
ROUND_SECONDS = 300
"""CPU time of a round."""
MAX_MEGABYTES = 3072
Test = Callable[[bytes], None]


# ---- seeds


def http(body: bytes, headers: str = "Content-Type: text/html; charset=utf-8") -> bytes:
    """An HTTP response."""
    return f"HTTP/1.1 200 OK\r\n{headers}\r\n\r\n".encode() + body


def warc_record(content: bytes, kind: str = "response", mime: str = "application/http; msgtype=response") -> bytes:
    """One WARC record."""
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://a.example/\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
        f"WARC-Date: 2026-01-01T00:00:00Z\r\nContent-Type: {mime}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content + b"\r\n\r\n"


PAGE = (
    "<!doctype html><html lang=en><head><title>A page</title><meta charset=utf-8><style>p{}</style></head><body class=x>"
    '<nav><ul><li><a href="/a">Home</a></ul></nav><article id=main><h1>Heading</h1>'
    + "<p>A sentence of a page that is long enough, with <b>bold</b> and <a href='#'>a link</a>, and goes on. "
    * 6
    + "<table><tr><th>a<th>b<tr><td>1<td>2</table><pre><code class=language-c>int x;\n  return;</code></pre><ul><li>x<li>y</ul>"
    "<math><mi>x</mi><annotation encoding='application/x-tex'>x^2</annotation></math> 10<sup>6</sup> &amp;amp; &#0; &notin;"
    "<ruby>漢<rt>kan</rt></ruby></article><div class=comments><div class=post>One says this.</div><div class=post>2</div></div>"
    '<script type="application/ld+json">{"@type":"Article","articleBody":"Text of it."}</script>'
    '<template shadowrootmode="open"><p>shadow</p></template><footer>(c) 2026</footer></body></html>'
)
WIKITEXT = (
    "{{Infobox x|a=1|b={{convert|5|km|mi}}}}\n'''Title''' is a [[link|shown]] thing<ref name=a>{{cite web|url=x}}</ref> of "
    "{{val|1.5|e=3|u=m}}.\n== Heading ==\n* item {{langx|de|Haus}}\n** two\n{| class=wikitable\n! a !! b\n|-\n| 1 || 2\n|}\n"
    "<math>x^2</math> -{zh-cn:a;zh-tw:b}- <nowiki>[[x]]</nowiki> [[File:a.png|thumb|A [[b]] c]] [http://x y] &nbsp; &lt;\n"
    "{{#if: a | b | c }} {{formatnum:{{#expr: 1 + 2 }}}}\n<gallery>\nA.png|t\n</gallery>\n[[Category:X]]\n"
) * 2
DUMP = (
    '<mediawiki xml:lang="en"><siteinfo><base>https://en.wikipedia.org/wiki/Main</base><namespaces><namespace key="14">Category'
    "</namespace></namespaces></siteinfo><page><title>T</title><ns>0</ns><id>1</id><revision><id>1</id><timestamp>2026-01-01T00:00"
    "</timestamp><model>wikitext</model><text>{}</text></revision></page></mediawiki>"
)
TRAIN = (PROJECT / "configs" / "train" / "gpt_124m.yaml", PROJECT / "configs" / "finetune" / "lora.yaml")
ROWS = (
    b'{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, '
    b'{"role": "assistant", "content": "c"}]}\n'
    b'{"prompt": "a", "completion": "b"}\n{"dialogue": "A: x", "summary": "y"}\n{"question": "1+1", "answer": "#### 2"}\n'
)
FILE_TREES = {"shards": FIXTURE / "corpus" / "shards" / "train", "checkpoints": FIXTURE / "trained" / "fsdp"}


def tree_files(target: str) -> list[Path]:
    """The files that a target damages, in a fixed order; relative paths."""
    root = FILE_TREES[target]
    return sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())


def seeds(target: str) -> Iterator[bytes]:
    """Sound inputs to begin with. The first byte chooses a form where there are several."""
    page = PAGE.encode()
    match target:
        case "warc":
            records = (
                warc_record(http(page))
                + warc_record(b"plain words", "conversion", "text/plain")
                + warc_record(b"x", "warcinfo")
            )
            arc = b"filedesc://a 0 20260101000000 text/plain 20\n1 0 x\nURL IP-address\n"
            arc += b"http://a/ 1.1.1.1 20260101000000 text/html 9\n<p>x</p>\n"
            yield from (b"\0" + records, b"\1" + records, b"\0" + arc, b"\1" + arc)
            yield b"\2" + gzip.compress(records) + gzip.compress(warc_record(http(page[:500])))
        case "http":
            yield http(page)
            yield http(
                b"5\r\nhello\r\n0\r\n\r\n", "Transfer-Encoding: chunked\r\nContent-Type: text/plain; charset=iso-2022-jp"
            )
            yield http(gzip.compress(page), "Content-Encoding: gzip")
            yield b"HTTP/1.1 100 Continue\r\n\r\n" + http(
                "Käse".encode("latin-1"), "Content-Type: text/html, text/plain; charset=l1"
            )
            import zstandard

            yield http(zstandard.compress(page), "Content-Encoding: zstd, identity")
        case "html":
            yield from (b"\0" + page, b"\1" + page, b"\2" + page, b"\0<p>" + page[400:900])
        case "wikitext":
            yield from (b"\0" + WIKITEXT.encode(), b"\1" + DUMP.format(WIKITEXT.replace("<", "&lt;")).encode())
            yield b"\2" + bz2.compress(DUMP.format("A sentence.").encode())
        case "documents":
            lines = b'{"id": "a", "text": "words", "source": "s", "url": "http://a", "meta": {"k": [1, null, 1.5]}}\n' * 3
            import zstandard

            yield from (b"\0" + lines, b"\1" + zstandard.compress(lines), b"\2" + gzip.compress(lines), b"\3" + ROWS)
        case "shards" | "checkpoints":
            for number, path in enumerate(tree_files(target)):
                content = (FILE_TREES[target] / path).read_bytes()
                yield from (bytes([number]) + content, bytes([number | 128]) + content)
        case "configs":
            yield from (path.read_bytes() for path in TRAIN)
            yield b"a: &x [1, 2]\nb: *x\nc: {<<: *x}\nrun_dir: !!python/object a\nmax_steps: 1_000\nlr: .inf\n"
        case _:
            raise SystemExit(f"{target}: no such target; known are {' '.join(TARGETS)}")


# ---- targets


def read_crawl(folder: Path) -> Test:
    """WARC, ARC; plain and gzip; pages of them extracted."""
    from megagpt.corpus.extraction.config import ExtractConfig
    from megagpt.corpus.extraction.extract_documents import web_outcomes
    from megagpt.corpus.runner.blocks import Block

    config = ExtractConfig(inputs=("x",), source="s")

    def test(data: bytes) -> None:
        kind, content = data[:1], data[1:]
        path = folder / ("a.warc" if kind == b"\0" else "a.warc.gz")
        path.write_bytes(gzip.compress(content, 1) if kind == b"\1" else content)
        for outcome in web_outcomes(Block(str(path), "a"), config):
            assert not getattr(outcome, "reason", "").startswith("source:extractor_failed"), outcome

    return test


def read_http(folder: Path) -> Test:
    """An HTTP message: headers, transfer and content encodings, charset."""
    from megagpt.corpus.readers.http import charset_of, decode_body, decode_text, parse_message

    def test(data: bytes) -> None:
        message = parse_message(data)
        body, _ = decode_body(message)
        decode_text(body, charset_of(message.headers.get("content-type", ""))).text.encode("utf-8")

    return test


def read_html(folder: Path) -> Test:
    """The main text of a page in every form; and the depth of what the guard lets through, with deep tags behind it."""
    from parsed_depth import DEEP, MOST, parsed_depth

    from megagpt.corpus.extraction.html import extract_html

    def test(data: bytes) -> None:
        from megagpt.corpus.extraction.page_guard import MAX_DEPTH, guard_page  # compiled: atheris cannot instrument it

        kind = data[0] if data else 0
        page = data[1:].decode("utf-8", "replace")
        if kind & 4:
            depth = parsed_depth(guard_page(page + DEEP[kind >> 3 & 3] * MOST).encoded)
            assert depth < MAX_DEPTH + 60, f"the page is parsed {depth} deep"
        text = extract_html(
            page, "http://a.example/x", markup="markdown" if kind & 1 else "text", comments="keep" if kind & 2 else "drop"
        )
        text.text.encode("utf-8")

    return test


def read_wiki(folder: Path) -> Test:
    """Wikitext of one article; dumps as XML and bz2."""
    from megagpt.corpus.extraction.wiki_pages import wiki_outcomes
    from megagpt.corpus.extraction.wikitext import read_wikitext
    from megagpt.corpus.runner.blocks import Block

    def test(data: bytes) -> None:
        kind, content = data[:1], data[1:]
        if kind in (b"\1", b"\2"):
            path = folder / ("a.xml" if kind == b"\1" else "a.xml.bz2")
            path.write_bytes(content)
            for _ in wiki_outcomes(Block(str(path), "a"), "s"):
                pass
        else:
            read_wikitext(content.decode("utf-8", "replace")).text.encode("utf-8")

    return test


def read_lines(folder: Path) -> Test:
    """Documents in JSON lines (plain, zstd, gzip) as input of extraction and of later stages; rows of fine-tuning data."""
    from megagpt.corpus.packing.config import SupervisedConfig
    from megagpt.corpus.packing.rows import read_rows
    from megagpt.corpus.readers.records import jsonl_outcomes
    from megagpt.corpus.runner.blocks import Block
    from megagpt.documents import read_documents

    configs = [SupervisedConfig(format=name) for name in ("chat", "prompt_completion", "dialogue_summary", "question_answer")]

    def test(data: bytes) -> None:
        kind, content = data[:1], data[1:]
        path = folder / ("a.jsonl.zst" if kind == b"\1" else "a.jsonl.gz" if kind == b"\2" else "a.jsonl")
        path.write_bytes(content)
        if kind == b"\3":
            for config in configs:
                refused(lambda config=config: list(read_rows(path, config, lambda *_: None)))
            return
        refused(lambda: list(jsonl_outcomes(Block(str(path), "a"), "s", "text")))
        refused(lambda: list(read_documents(path)))

    return test


def damaged(target: str, folder: Path, data: bytes) -> bool:
    """A fresh copy of a tree with one file replaced; whether the sums in its manifest are to be made right again."""
    names = tree_files(target)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(FILE_TREES[target], folder)
    if data:
        (folder / names[(data[0] & 127) % len(names)]).write_bytes(data[1:])
    return bool(data) and data[0] >= 128


def read_shards(folder: Path) -> Test:
    """A folder of shards with one damaged file; in half of the inputs the manifest's sums are those of the damaged file."""
    import xxhash

    from megagpt.data.shards import BLOCK_BYTES, open_shard, read_manifest, verify_shard
    from megagpt.files import sha256_file

    tree = folder / "train"

    def resum() -> None:
        try:
            manifest = json.loads((tree / "manifest.json").read_bytes())
            for shard in manifest["shards"]:
                base = tree / Path(shard["name"]).name
                content = base.with_suffix(".bin").read_bytes()
                pieces = [content[at : at + BLOCK_BYTES] for at in range(0, len(content), BLOCK_BYTES)]
                shard["blocks_xxh3"] = "".join(xxhash.xxh3_64_hexdigest(piece) for piece in pieces)
                shard["bin_bytes"] = len(content)
                for kind, ending in (("idx", ".idx"), ("docs", ".docs.parquet")):
                    file = Path(f"{base}{ending}")
                    shard[f"{kind}_bytes"], shard[f"{kind}_sha256"] = file.stat().st_size, sha256_file(file)
            (tree / "manifest.json").write_text(json.dumps(manifest))
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            pass  # the manifest itself is the damaged file

    def test(data: bytes) -> None:
        if damaged("shards", tree, data):
            resum()

        def look() -> None:
            manifest = read_manifest(tree)
            for info in manifest.shards:
                for _ in verify_shard(tree, info, manifest.dtype):
                    pass
                shard = open_shard(tree, info, manifest.dtype)
                shard.document_offsets()
                shard.read(0, min(len(shard), 1000))

        refused(look)

    return test


def read_checkpoint(folder: Path) -> Test:
    """A run with one damaged file, its manifest summed anew in half of the inputs: listed, verified, loaded, its rows read."""
    import torch

    from megagpt.checkpoint.admin import InspectConfig, inspect
    from megagpt.checkpoint.load_model import load_model
    from megagpt.checkpoint.on_disk import list_checkpoints
    from megagpt.checkpoint.ownership import take_ownership
    from megagpt.checkpoint.save_load import seal
    from megagpt.distributed.world import lone_world
    from megagpt.files import sha256_file
    from megagpt.monitor.metrics import read_metrics

    run = folder / "run"
    lone = lone_world(torch.device("cpu"))

    def test(data: bytes) -> None:
        if damaged("checkpoints", run, data):
            for path in list_checkpoints(run):
                pieces = {
                    file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)} for file in path.glob("pieces_*")
                }
                seal(path, pieces)
        refused(lambda: inspect(InspectConfig(run_dir=run)))
        refused(lambda: load_model(run))
        refused(lambda: read_metrics(run / "metrics.jsonl"))
        refused(lambda: take_ownership(run, lone))

    return test


def read_config(folder: Path) -> Test:
    """A training config file."""
    from megagpt.config import load
    from megagpt.train.config import TrainConfig

    path = folder / "a.yaml"

    def test(data: bytes) -> None:
        path.write_bytes(data)
        refused(lambda: load(TrainConfig, [str(path)]))

    return test


TARGETS: dict[str, Callable[[Path], Test]] = {
    "warc": read_crawl,
    "http": read_http,
    "html": read_html,
    "wikitext": read_wiki,
    "documents": read_lines,
    "shards": read_shards,
    "checkpoints": read_checkpoint,
    "configs": read_config,
}


def refused(action: Callable[[], object]) -> None:
    """Do something that may be refused in one line."""
    from megagpt.config import Failure, UserError

    try:
        action()
    except (UserError, Failure) as error:
        if not str(error).strip():
            raise AssertionError("an error without words") from error


# ---- running them


def run_target(target: str, folder: Path, words: list[str]) -> None:
    """In a process of its own: libFuzzer's loop, which ends the process."""
    import atheris  # pyright: ignore[reportMissingModuleSource]

    with atheris.instrument_imports(  # pyright: ignore[reportAttributeAccessIssue]
        include=["megagpt"]
    ):
        test = TARGETS[target](folder)

    def timed(data: bytes) -> None:
        began = time.process_time()
        test(data)
        took = time.process_time() - began
        assert took < MAX_CPU_SECONDS, f"one input took {took:.0f} s of CPU time"

    atheris.Setup([sys.argv[0], *words], timed)
    atheris.Fuzz()


def fuzz(target: str, folder: Path, *, seconds: float, runs: int = -1, seed: int = 1) -> dict[str, Any]:
    """Fuzz one target for `seconds` of CPU time, or `runs` inputs; a row of counts. `fault` is what failed, "" if nothing."""
    corpus, found, work = folder / target / "corpus", folder / target / "found", folder / target / "work"
    for path in (corpus, found, work):
        path.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds(target)):
        (corpus / f"seed_{number:02d}").write_bytes(data)
    words = [
        str(corpus),
        f"-artifact_prefix={found}/",
        f"-seed={seed}",
        f"-runs={runs}",
        f"-max_len={MAX_BYTES}",
        f"-timeout={MAX_SECONDS}",
        f"-rss_limit_mb={MAX_MEGABYTES}",
        "-print_final_stats=1",
        "-reload=0",
    ]
    began, cpu = time.monotonic(), 0.0
    with tempfile.TemporaryDirectory(dir=work) as scratch, (folder / target / "log").open("wb") as log:
        command = [sys.executable, __file__, f"target={target}", f"scratch={scratch}", *words]
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
            child = psutil.Process(process.pid)
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    times = child.cpu_times()
                    cpu = times.user + times.system or cpu
                if cpu >= seconds:
                    process.send_signal(signal.SIGUSR1)  # libFuzzer ends after the input at hand, with status 0
                    seconds = math.inf
                time.sleep(0.2)
        status = process.returncode
    output = (folder / target / "log").read_text(errors="replace")
    inputs = re.search(r"number_of_executed_units:\s*(\d+)|Done (\d+) ", output)
    peak = re.search(r"peak_rss_mb:\s*(\d+)", output)
    fault = "" if status == 0 else _fault(output, status)
    return {
        "target": target,
        "seeds": len([*seeds(target)]),
        "rounds": 1,
        "cpu_s": round(cpu),
        "seconds_s": round(time.monotonic() - began),
        "inputs": int(inputs[1] or inputs[2]) if inputs else 0,
        "peak_memory_mb": int(peak[1]) if peak else 0,
        "fault": fault,
    }


def fuzz_in_rounds(target: str, folder: Path, seconds: float) -> dict[str, Any]:
    """Rounds until the target has had its CPU time, those of earlier calls in the same folder included; their sum."""
    path = folder / target / "total.json"
    total = read_json(path) if path.exists() else None
    while total is None or (total["cpu_s"] < seconds and not total["fault"]):
        done = total or {"rounds": 0, "cpu_s": 0, "seconds_s": 0, "inputs": 0, "peak_memory_mb": 0}
        row = fuzz(target, folder, seconds=min(ROUND_SECONDS, seconds - done["cpu_s"]), seed=1 + done["rounds"])
        sums = {key: done[key] + row[key] for key in ("rounds", "cpu_s", "seconds_s", "inputs")}
        total = {**row, **sums, "peak_memory_mb": max(done["peak_memory_mb"], row["peak_memory_mb"])}
        write_json(path, total)
    return total


def _fault(output: str, status: int) -> str:
    lines = [
        line for line in output.splitlines() if re.match(r"\w*(Error|Exception|Interrupt)|==\d+== ERROR|ALARM", line.strip())
    ]
    kept = re.search(r"Test unit written to (\S+)", output)
    return f"status {status}: {' '.join(lines)[:300]} {kept[1] if kept else ''}".strip()


def main() -> int:
    """See the module's text."""
    options = dict(word.split("=", 1) for word in sys.argv[1:] if re.match(r"[a-z]+=", word))
    if "target" in options:  # the process that fuzz() starts
        run_target(
            options["target"], Path(options["scratch"]), [word for word in sys.argv[1:] if not re.match(r"[a-z]+=", word)]
        )
    names = [word for word in sys.argv[1:] if "=" not in word] or list(TARGETS)
    if "input" in options:
        with tempfile.TemporaryDirectory() as scratch:
            TARGETS[names[0]](Path(scratch))(Path(options["input"]).read_bytes())
        return 0
    folder = Path(options.get("folder") or tempfile.mkdtemp(prefix="fuzz_"))
    old = RESULTS / "fuzz.json"
    rows = {row["target"]: row for row in (read_json(old)["results"]["rows"] if old.exists() else [])}
    failed = 0
    for name in names:
        rows[name] = fuzz_in_rounds(name, folder, float(options.get("seconds", 1800)))
        failed += bool(rows[name]["fault"])
        print(rows[name], flush=True)
        about = (
            f"libFuzzer through atheris on {len(rows)} kinds of input, in rounds of {ROUND_SECONDS} s of CPU time with seeds "
            f"1, 2, 3 and so on. An input fails on a traceback, over {MAX_CPU_SECONDS} s of CPU time, and over {MAX_MEGABYTES} "
            "MB. Inputs per second depend on the machine."
        )
        results = {"title": "Fuzzing", "about": about, "rows": [rows[key] for key in TARGETS if key in rows], "lost": ""}
        write_results("fuzz", results, packages=["atheris", "megagpt"])
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
