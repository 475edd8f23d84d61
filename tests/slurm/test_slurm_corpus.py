"""The corpus on a real SLURM: over two nodes, on Dask, as an array; whatever happens, the bytes are those of one machine."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import wait_until
from slurm_cluster import Cluster, make_site, processes_of, running_cluster, skip_without_slurm

from megagpt.documents import Document, write_documents

PROJECT = Path(__file__).resolve().parents[2]
STAGES = ("extract_documents", "filter_documents", "dedup_documents", "train_tokenizer", "tokenize_documents")
RESULTS = ("dedup/*.jsonl.zst", "tokenizer/tokenizer.model", "shards/*/*.bin", "shards/*/*.idx")

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_without_slurm()
    with running_cluster(tmp_path_factory.mktemp("slurm") / "lab", num_nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Some small inputs; the settings for them."""
    folder = tmp_path_factory.mktemp("corpus")
    text = (PROJECT / "LICENSE").read_text(encoding="utf-8")
    paragraphs = [part for part in text.split("\n\n") if len(part) > 40]
    for name in "abcd":
        documents = [Document(f"{name}:{i}", f"{part}\n{name}", "text") for i, part in enumerate(paragraphs)]
        write_documents(folder / f"{name}.jsonl.zst", [*documents, documents[0]])
    words = [f"extract.inputs=[{folder}/*.jsonl.zst]", "filter.order=[clean]", "block_bytes=5000", "dedup.threshold=0.5"]
    return [*words, "tokenizer.vocab_size=400", "tokenize.validation_fraction=0.2"]


@pytest.fixture(scope="module")
def one_machine(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work_dir of all stages on this machine, without SLURM."""
    folder = tmp_path_factory.mktemp("one")
    for stage in STAGES:
        command = [sys.executable, f"tools/{stage}.py", f"work_dir={folder}", "num_workers=1", *words]
        subprocess.run(command, cwd=PROJECT, check=True, timeout=900)
    return folder


def files(folder: Path, *patterns: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for pattern in patterns for p in sorted(folder.glob(pattern))}


def test_over_two_nodes_and_past_a_time_limit(cluster: Cluster, words: list[str], one_machine: Path, tmp_path: Path) -> None:
    """The signal that precedes the time limit comes in the middle: back to the queue, and on from what is committed."""
    site, work_dir = make_site(tmp_path / "project", PROJECT), tmp_path / "two"
    job_id = cluster.submit(site, "slurm/preprocess.sh", f"work_dir={work_dir}", *words)
    wait_until(lambda: (work_dir / "filter" / "stage.json").is_file())
    cluster.command("scancel", "--signal=USR1", "--batch", job_id)
    job = cluster.wait_for(job_id, "COMPLETED", timeout=900)
    assert job["Restarts"] == "1"
    log = (site / f"megagpt-corpus-{job_id}.log").read_text()
    assert log.count("the time limit is near: goes back to the queue") == 1
    assert "complete" in log.splitlines()[-1]
    assert files(work_dir, *RESULTS) == files(one_machine, *RESULTS) != {}


def test_on_dask_it_survives_a_lost_node(cluster: Cluster, words: list[str], one_machine: Path, tmp_path: Path) -> None:
    """All of one node's workers are killed with their step daemon; the other node does the rest."""
    site, work_dir = make_site(tmp_path / "project", PROJECT), tmp_path / "two"
    environment = {"executor": "dask", "dask_host": "127.0.0.1"}
    job_id = cluster.submit(site, "slurm/preprocess.sh", f"work_dir={work_dir}", *words, **environment)
    wait_until((work_dir / "extract").is_dir)
    workers = processes_of(job_id, "distributed.cli.dask_worker", rank=1)
    assert workers
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cluster.wait_for(job_id, "COMPLETED", timeout=900)
    assert "tls://" in (site / "runs" / "dask" / job_id / "scheduler.log").read_text()
    assert files(work_dir, *RESULTS) == files(one_machine, *RESULTS) != {}


def test_an_array_completes_but_for_the_task_that_fails(
    cluster: Cluster, words: list[str], one_machine: Path, tmp_path: Path
) -> None:
    """Task 1 of 3 fails once; run again, it alone has work to do."""
    site = make_site(tmp_path / "project", PROJECT)
    launcher = tmp_path / "launch.sh"
    launcher.write_text(f'#!/bin/bash\ncase "$*" in *part=1/3*) [ -e {tmp_path}/mended ] || exit 1 ;; esac\nexec "$@"\n')
    launcher.chmod(0o755)
    settings = site / "slurm" / "env.sh"
    settings.write_text(settings.read_text().replace("launch=()", f"launch=({launcher})"))
    sbatch = ["sbatch", "--parsable", "--array=0-2", "--nodes=1", "slurm/preprocess.sh", f"work_dir={tmp_path}/array", *words]
    first = cluster.submit(site, *sbatch, stages="extract_documents")
    cluster.wait_for(f"{first}_1", "FAILED", timeout=900)
    for task in (0, 2):
        cluster.wait_for(f"{first}_{task}", "COMPLETED", timeout=900)
    (tmp_path / "mended").touch()
    second = cluster.submit(site, *sbatch, stages="extract_documents")
    for task in range(3):
        cluster.wait_for(f"{second}_{task}", "COMPLETED", timeout=900)
    assert files(tmp_path / "array", "extract/*.jsonl.zst") == files(one_machine, "extract/*.jsonl.zst") != {}
