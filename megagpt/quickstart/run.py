"""The quickstart: the whole way from dump to a served model, small, by running the same tools that a user runs.

Every step is a subprocess of tools/*.py whose command line is printed. The ranks of the training are started the way srun
starts them, one process each with RANK and WORLD_SIZE set, because torchrun hides their status after a stop signal.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from megagpt.command import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR
from megagpt.config import Config, UserError
from megagpt.distributed.ports import free_port
from megagpt.evaluate.results import read_results
from megagpt.files import read_json
from megagpt.monitor.metrics import read_metrics
from megagpt.quickstart.dumps import DemoConfig, Planted, build_demo_dumps
from megagpt.quickstart.hand_over import (
    HandOverError,
    missing_packages,
    text_of_generate,
    text_of_server,
    text_of_transformers,
)
from megagpt.shipped import IN_CHECKOUT, as_installed, tool_file

CORPUS_RECIPE = "configs/corpus/quickstart.yaml"
TRAIN_RECIPE = "configs/train/debug_cpu.yaml"
STAGES = ("extract_documents", "filter_documents", "dedup_documents", "train_tokenizer", "tokenize_documents")
SHORT_STEPS = 100
"""A run of fewer steps warms up in a fifth of them, not in those of the config."""
MIN_GAIN = 0.5
"""Nats per token by which the trained model must beat the frequencies of single tokens."""


NEXT = """\
Next, with your own data
  .venv/bin/python tools/quickstart.py warc='PATH/*.warc.gz' wiki='PATH/*.xml.bz2'
  .venv/bin/python tools/extract_documents.py configs/corpus/common_crawl.yaml \\
      work_dir=/data/cc extract.inputs='[/dumps/*.warc.gz]'
      ... then filter_documents, dedup_documents, train_tokenizer, tokenize_documents with the same words
  .venv/bin/torchrun --nproc-per-node 8 tools/train_model.py configs/train/gpt_124m.yaml data.sources.main.path=/data/cc/shards
"""
NEXT_ON_SLURM = """\
On SLURM: edit slurm/env.sh, then
  slurm/preprocess.sh configs/corpus/common_crawl.yaml work_dir=/data/cc extract.inputs='[/dumps/*.warc.gz]'
  slurm/pretrain.sh configs/train/gpt_1b3.yaml run_dir=/data/runs/first data.sources.main.path=/data/cc/shards
"""


class QuickstartConfig(Config):
    """The quickstart's few settings."""

    run_dir: Path = Path("runs/quickstart")
    """Output folder with dumps/, corpus/, train/ and export/; all but dumps/ are replaced by each run."""
    warc: str | None = None
    """Your own web dump (.warc.gz and so on; a path or a glob) instead of the one made from this machine's documentation."""
    wiki: str | None = None
    """Your own MediaWiki dump (.xml.bz2; a path or a glob)."""
    text_megabytes: float = Field(default=5.0, ge=2, le=100)
    """Size of the generated corpus in millions of bytes, before anything is planted or dropped."""
    max_steps: int = Field(default=300, ge=10)
    """Updates of the model."""
    num_ranks: int = Field(default=2, ge=1, le=8)
    """Processes to train on."""


class StepFailedError(Exception):
    """A tool ended with a status that stops the quickstart."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the closing table: what was expected, what was found in the output files."""

    name: str
    expected: str
    found: str
    good: bool


def run_quickstart(config: QuickstartConfig) -> int:
    """Run everything and print the closing table; the exit status (1 if something does not match)."""
    started = time.monotonic()
    corpus, run_dir, export = (config.run_dir / name for name in ("corpus", "train", "export"))
    for made in (corpus, run_dir, export):
        shutil.rmtree(made, ignore_errors=True)
    try:
        inputs, planted = prepare_dumps(config)
        for stage in STAGES:
            dumps = [f"extract.inputs={json.dumps(inputs)}"] if stage == "extract_documents" else []
            run_tool(stage, CORPUS_RECIPE, f"work_dir={corpus}", *dumps)
        train = [
            TRAIN_RECIPE,
            f"run_dir={run_dir}",
            f"data.sources.main.path={corpus / 'shards'}",
            f"max_steps={config.max_steps}",
            "monitor.wandb=offline",
            *([f"optim.schedule.warmup_steps={config.max_steps // 5}"] if config.max_steps < SHORT_STEPS else []),
        ]
        title(f"Train on {config.num_ranks} processes, stop half-way with SIGTERM, start again with the same command")
        status = run_ranks(train, run_dir, config.num_ranks, stop_at_step=config.max_steps // 2)
        if status != EXIT_STOPPED:
            raise StepFailedError(f"train_model received a stop signal and ended with status {status}, not {EXIT_STOPPED}", 1)
        status = run_ranks(train, run_dir, config.num_ranks, stop_at_step=None)
        if status != EXIT_DONE:
            raise StepFailedError(f"train_model ended with status {status}", status)
        run_tool("evaluate_model", f"run_dir={run_dir}", "step=best")
        run_tool("generate_text", f"run_dir={run_dir}", "prompt=The function returns", "max_tokens=80")
        run_tool("report_run", f"run_dir={run_dir}")
        handed_over = hand_over(run_dir, export)
    except StepFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    checks = [*check_corpus(corpus, planted), *check_run(run_dir, config.max_steps), *handed_over]
    print_summary(config, checks, seconds=time.monotonic() - started)
    return EXIT_DONE if all(check.good for check in checks) else 1


def prepare_dumps(config: QuickstartConfig) -> tuple[list[str], Planted | None]:
    """The dumps to use: the user's own, or ones made here with known faults. Raises UserError if a given one is missing."""
    given = [path for path in (config.warc, config.wiki) if path is not None]
    if given:
        for path in given:
            if not any(Path().glob(path) if not os.path.isabs(path) else Path("/").glob(path.lstrip("/"))):
                raise UserError(f"{'warc' if path == config.warc else 'wiki'}={path}: no such file")
        return given, None
    title("Make a web crawl and a wiki dump from the documentation on this machine, with known faults planted")
    dumps = config.run_dir / "dumps"
    planted = build_demo_dumps(DemoConfig(directory=dumps, text_megabytes=config.text_megabytes))
    print(f"{dumps}: {planted.responses:,} web pages, {planted.articles:,} articles")
    return [f"{dumps}/*.warc.gz", f"{dumps}/*.xml.bz2"], planted


# ---- running tools


def title(text: str) -> None:
    """A line between the steps."""
    print(f"\n=== {text}", flush=True)


def typed(name: str, words: Sequence[str]) -> str:
    """The command line of a tool as a user types it."""
    return as_installed(f"python tools/{name}.py {shlex.join(words)}")


def run_tool(name: str, *words: str) -> None:
    """Print a tool's command line and run it. Raises StepFailedError if it does not end with status 0."""
    title(typed(name, words))
    status = subprocess.run([sys.executable, str(tool_file(name)), *words]).returncode
    if status != EXIT_DONE:
        raise StepFailedError(f"{name} ended with status {status}", EXIT_USER_ERROR if status == EXIT_USER_ERROR else 1)


def run_ranks(words: Sequence[str], run_dir: Path, num_ranks: int, *, stop_at_step: int | None) -> int:
    """Start the ranks of a training, send all of them SIGTERM after a step if asked, wait; the first rank's exit status.

    Rank 0 speaks on this terminal, the others into run_dir/rank<n>.log.
    """
    print(f"{typed('train_model', words)}    (RANK=0..{num_ranks - 1} WORLD_SIZE={num_ranks})", flush=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    place = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(num_ranks):
        environment = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (run_dir / f"rank{rank}.log").open("ab") as log:
            output = log if rank else None
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(tool_file("train_model")), *words], env=environment, stdout=output, stderr=output
                )
            )
    try:
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.2)
            if stop_at_step is not None and last_step(run_dir) >= stop_at_step:
                print(f"quickstart: step {stop_at_step} is reached: SIGTERM to all ranks", flush=True)
                for rank in ranks:
                    rank.send_signal(signal.SIGTERM)
                stop_at_step = None
        return wait_for_all(ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()


def wait_for_all(ranks: Sequence[subprocess.Popen[bytes]], timeout_seconds: float = 120.0) -> int:
    """Wait for the ranks once one has ended; a rank left over is killed. The first status that is not 0, else 0."""
    deadline = time.monotonic() + timeout_seconds
    for rank in ranks:
        try:
            rank.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
    return next((rank.returncode for rank in ranks if rank.returncode), EXIT_DONE)


def last_step(run_dir: Path) -> int:
    """The newest step in the run's metrics, 0 before there are any."""
    return max(read_metrics(run_dir).last_step, 0) if (run_dir / "metrics.jsonl").is_file() else 0


def hand_over(run_dir: Path, export: Path) -> list[Check]:
    """Export the model, open it with transformers, serve it: whether both continue a text as generate_text does. Raises
    StepFailedError. Without the packages of megagpt[convert,serve] it says so and checks nothing."""
    missing = missing_packages()
    if missing:
        title(f"Not exported and not served: {', '.join(missing)} not installed (megagpt[convert,serve])")
        return []
    run_tool("export_model", f"run_dir={run_dir}", f"output_dir={export}", "dtype=fp32")
    title("The likeliest continuation of one text by generate_text, by transformers from the export, and by serve_model")
    try:
        ours = text_of_generate(run_dir)
        print(ours)
        others = {"transformers' text": text_of_transformers(export), "served text": text_of_server(run_dir)}
    except HandOverError as error:
        raise StepFailedError(str(error), 1) from None
    return [
        Check(name, "that of generate_text", "equal" if text == ours else f"another: {text!r}", text == ours)
        for name, text in others.items()
    ]


# ---- what came out


def check_corpus(corpus: Path, planted: Planted | None) -> list[Check]:
    """What the stages' summaries report, beside what was planted."""
    if planted is None:
        return []
    extract, filtered, dedup = (read_json(corpus / stage / "summary.json") for stage in ("extract", "filter", "dedup"))
    pairs: list[tuple[str, int, int]] = [
        ("web pages read", planted.responses, extract["records"].get("response", 0)),
        ("wiki pages read", planted.wiki_pages, extract["records"].get("page", 0)),
        ("redirects", planted.redirects, extract["rejected"].get("source:redirect", 0)),
        ("pages of other namespaces", planted.other_namespaces, extract["rejected"].get("source:namespace", 0)),
        ("undecodable pages", planted.undecodable_pages, extract["rejected"].get("source:undecodable", 0)),
        ("records cut off", planted.cut_off_records, extract["faults"].get("truncated record", 0)),
        ("pages not in English", planted.other_languages, filtered["rejected"].get("language:other", 0)),
        ("exact copies", planted.exact_copies, dedup["rejected"].get("dedup:exact", 0)),
        ("near copies", planted.near_copies, dedup["rejected"].get("dedup:near", 0)),
    ]
    return [Check(name, f"{put:,} planted", f"{found:,} found", put == found) for name, put, found in pairs]


def check_run(run_dir: Path, max_steps: int) -> list[Check]:
    """The restart, the last step, and the validation loss beside the entropy of single tokens."""
    metrics = read_metrics(run_dir)
    starts = [row for row in metrics.all_rows if row["kind"] == "start"]
    resumed = [row["step"] for row in starts if row.get("resumed")]
    evaluation: dict[str, Any] = read_results(max((run_dir / "evaluations").glob("step_*.json")))[-1]
    loss, entropy = evaluation["loss"], evaluation["sources"]["main"]["unigram_entropy"]
    return [
        Check(
            "starts of the run",
            "2, resumed once",
            f"{len(starts)}, resumed at step {resumed}",
            len(starts) == 2 and len(resumed) == 1,
        ),
        Check("last step", str(max_steps), str(metrics.last_step), metrics.last_step == max_steps),
        Check(
            "validation loss", f"< {entropy:.2f} - {MIN_GAIN} nats/token", f"{loss:.3f} nats/token", loss < entropy - MIN_GAIN
        ),
    ]


def print_summary(config: QuickstartConfig, checks: Sequence[Check], *, seconds: float) -> None:
    """The closing table, where everything is, and what to type next."""
    title(f"Summary (after {seconds:.0f} s)")
    for check in checks:
        print(f"  {'ok ' if check.good else 'BAD'}  {check.name:<26} {check.expected:<28} {check.found}")
    stages = {stage: read_json(config.run_dir / "corpus" / stage / "summary.json") for stage in ("extract", "filter", "dedup")}
    funnel = " -> ".join(f"{stages[stage]['kept']:,} after {stage}" for stage in stages)
    print(f"\nDocuments: {stages['extract']['documents_in']:,} in the dumps -> {funnel}")
    print(f"""
What was made, below {config.run_dir}/
  corpus/extract|filter|dedup   documents of each stage, with counts, reasons and examples of what was dropped
  corpus/tokenizer, shards      the SentencePiece tokenizer, and Megatron .bin/.idx shards
  train/                        checkpoints, metrics.jsonl, W&B files (offline), ledger
  train/report.html             the loss curve and the data funnel: open it in a browser
  export/                       the model for transformers and vLLM
""")
    print(as_installed(NEXT).rstrip())
    if IN_CHECKOUT:
        print(NEXT_ON_SLURM.rstrip())
