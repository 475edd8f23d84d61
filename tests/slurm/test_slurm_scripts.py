"""The job scripts: static checks, refusals before submission, and runs on a real SLURM on this host."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import wait_until
from slurm_cluster import Cluster, make_site, processes_of, running_cluster, skip_without_slurm

from megagpt.documents import Document, write_documents
from megagpt.monitor.metrics import read_metrics

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = ("pretrain.sh", "preprocess.sh")
TINY = (
    "model.vocab_size=257",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.seq_len=32",
    "data.seq_len=32",
    "global_batch_size=4",
    "micro_batch_size=2",
    "monitor.log_every_steps=5",
    "evaluate_every_steps=0",
    "evaluate_max_samples=4",
    "sample_every_steps=0",
    "save_every_steps=1000",
)


@pytest.mark.parametrize("name", [*SCRIPTS, "env.sh"])
def test_shellcheck(name: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", f"slurm/{name}"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_has_what_restarts_need_and_nothing_that_breaks_them(name: str) -> None:
    header = re.findall(r"^#SBATCH (.*)$", (PROJECT / "slurm" / name).read_text(), re.MULTILINE)
    options = dict(option.partition("=")[::2] for option in header)
    assert options["--signal"].startswith("B:USR1@")
    assert "--requeue" in options
    assert options["--open-mode"] == "append"
    assert not {"--ntasks-per-node", "--ntasks", "--gpus-per-task"} & options.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "usage: slurm/pretrain.sh CONFIG"),
        (["none.yaml"], "none.yaml"),
        (["configs/train/debug_cpu.yaml", "data.sources.main.path=/nonexistent/shards"], "/nonexistent/shards"),
    ],
)
def test_mistakes_are_found_before_submission(words: list[str], named: str) -> None:
    command = ["slurm/pretrain.sh", *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert named in done.stderr
    assert "sbatch" not in done.stderr, "it went as far as submitting"


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ("train_tokenizer", "submit it without --array"),
        ("filter_documents dedup_documents", "an array runs one stage"),
        ("filter_documents", "task numbers must follow each other"),
    ],
)
def test_an_array_is_refused_where_it_has_no_parts(stages: str, named: str, tmp_path: Path) -> None:
    """`--array=0-6:2`: four tasks, from 0 to 6."""
    array = {"SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "6"}
    environment = {**os.environ, **array, "stages": stages}
    command = ["slurm/preprocess.sh", f"work_dir={tmp_path}"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert named in done.stderr


# ---- on a real SLURM


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_without_slurm()
    with running_cluster(tmp_path_factory.mktemp("slurm") / "lab", num_nodes=2) as cluster:
        yield cluster


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A project as a site has it."""
    return make_site(tmp_path / "project", PROJECT)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of shards of bytes."""
    text = (PROJECT / "LICENSE").read_text(encoding="utf-8")
    write_documents(tmp_path / "in" / "text.jsonl.zst", [Document(f"text:{i}", text[i * 500 :], "text") for i in range(20)])
    words = [f"work_dir={tmp_path}", f"tokenize.inputs=[{tmp_path}/in/*.zst]", "tokenize.tokenizer=bytes"]
    words += ["tokenize.validation_fraction=0.2", "num_workers=1"]
    subprocess.run([sys.executable, "tools/tokenize_documents.py", *words], cwd=PROJECT, check=True, timeout=300)
    return tmp_path / "shards"


def submit(cluster: Cluster, site: Path, script: str, *words: str) -> str:
    """Run a job script as a user does; the number of the job."""
    output = cluster.command(f"slurm/{script}", *words, cwd=site, timeout=300)
    found = re.search(r"Submitted batch job (\d+)", output)
    assert found is not None, output
    return found[1]


def log_of(site: Path, name: str) -> str:
    path = site / name
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def wait_for_step(cluster: Cluster, job_id: str, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not (run_dir / "metrics.jsonl").is_file() or read_metrics(run_dir).last_step < step:
        job = cluster.job(job_id)
        assert job["JobState"] in ("PENDING", "CONFIGURING", "RUNNING"), job
        assert time.monotonic() < deadline, f"step {step} was not reached: {job}"
        time.sleep(0.2)


@pytest.mark.slurm
@pytest.mark.slow
def test_a_mistake_ends_the_job_and_a_crash_is_retried_so_often(
    cluster: Cluster, site: Path, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = ["configs/train/debug_cpu.yaml", f"run_dir={run_dir}", f"data.sources.main.path={shards}", "max_steps=100", *TINY]
    sbatch = ["sbatch", "--parsable", "--nodes=2", "slurm/pretrain.sh"]
    wrong = cluster.command(*sbatch, *words, "seed=abc", cwd=site).strip()
    job = cluster.wait_for(wrong, "FAILED", timeout=300)
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
    assert "seed='abc'" in log_of(site, f"megagpt-{wrong}.log")

    # A rank that cannot reach the others crashes at every start.
    crashing = cluster.command(*sbatch, *words, cwd=site, max_starts_without_progress="2", GLOO_SOCKET_IFNAME="none0").strip()
    job = cluster.wait_for(crashing, "FAILED", timeout=600)
    assert (job["ExitCode"], job["Restarts"]) == ("1:0", "1")
    assert "2 starts in a row without a newer checkpoint" in log_of(site, f"megagpt-{crashing}.log")


@pytest.mark.slurm
@pytest.mark.slow
def test_a_cancelled_job_stays_cancelled(cluster: Cluster, site: Path, shards: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ["configs/train/debug_cpu.yaml", f"run_dir={run_dir}", f"data.sources.main.path={shards}", "max_steps=5000", *TINY]
    job_id = submit(cluster, site, "pretrain.sh", *words)
    wait_for_step(cluster, job_id, run_dir, 5)
    cluster.command("scancel", job_id)
    cluster.wait_for(job_id, "CANCELLED", timeout=120)
    wait_until(lambda: not processes_of(job_id), 60)
    time.sleep(3)  # what is left of the script would put the job back now
    job = cluster.job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
