"""The job scripts: static checks, refusals before submission, and runs on a real SLURM on this host."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import own_ports, wait_until
from served import write_run
from slurm_cluster import Cluster, make_site, processes_of, running_cluster, skip_without_slurm

from megagpt.documents import Document, write_documents
from megagpt.monitor.metrics import read_metrics

PROJECT = Path(__file__).resolve().parents[2]
SCRIPTS = ("pretrain.sh", "preprocess.sh", "serve.sh")
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


@pytest.mark.parametrize("name", [*SCRIPTS, "env.sh", "resubmit.sh", "compiled.sh"])
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


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        ([], 2, "usage: slurm/serve.sh run_dir=RUN|export=FOLDER"),
        (["run_dir=a", "export=b"], 2, "run_dir=RUN or export=FOLDER, one of them"),
    ],
)
def test_serve_finds_mistakes_before_submission(words: list[str], status: int, named: str) -> None:
    environment = {**os.environ, "python": sys.executable}
    done = subprocess.run(["slurm/serve.sh", *words], cwd=PROJECT, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == status
    assert named in done.stderr
    assert "sbatch" not in done.stderr, "it went as far as submitting"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "runs/corpus/shards"),
        (["none.yaml"], "none.yaml"),
        (["configs/train/debug_cpu.yaml", "data.sources.main.path=/nonexistent/shards"], "/nonexistent/shards"),
    ],
)
def test_mistakes_are_found_before_submission(words: list[str], named: str) -> None:
    command = ["slurm/pretrain.sh", *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=900)
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
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=900)
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
    subprocess.run([sys.executable, "tools/tokenize_documents.py", *words], cwd=PROJECT, check=True, timeout=900)
    return tmp_path / "shards"


def submit(cluster: Cluster, site: Path, script: str, *words: str) -> str:
    """Run a job script as a user does; the number of the job."""
    output = cluster.command(f"slurm/{script}", *words, cwd=site, timeout=900)
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
    job = cluster.wait_for(wrong, "FAILED", timeout=900)
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
    assert "seed='abc'" in log_of(site, f"megagpt-{wrong}.log")

    # A rank that cannot reach the others crashes at every start.
    crashing = cluster.command(*sbatch, *words, cwd=site, max_starts_without_progress="2", GLOO_SOCKET_IFNAME="none0").strip()
    job = cluster.wait_for(crashing, "FAILED", timeout=900)
    assert (job["ExitCode"], job["Restarts"]) == ("1:0", "1")
    assert "2 starts in a row without a newer checkpoint" in log_of(site, f"megagpt-{crashing}.log")


GPUS, NODES = ["--exclusive", "--nodes=1", "--gpus-per-node=8"], ["--mem=0", "--nodes=2-4", "--time=30"]


@pytest.mark.parametrize(
    ("options", "job", "missing"),
    [
        (GPUS, {"SLURM_JOB_NUM_NODES": "1"}, "no GPUs"),
        (GPUS, {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "1"}, ""),
        (["--gres=gpu:8"], {"SLURM_JOB_NUM_NODES": "1"}, "no GPUs"),
        (NODES, {"SLURM_JOB_NUM_NODES": "1"}, "1 of 2 nodes"),
        (NODES, {"SLURM_JOB_NUM_NODES": "2"}, ""),
        (["-N", "3"], {"SLURM_JOB_NUM_NODES": "2"}, "2 of 3 nodes"),
        (["--nodes", "3", "--mem=0"], {"SLURM_JOB_NUM_NODES": "2"}, "2 of 3 nodes"),
        (["--time=30"], {"SLURM_JOB_NUM_NODES": "1"}, ""),
        (GPUS, {"SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_TASK_COUNT": "3"}, ""),
    ],
)
def test_what_a_plain_submission_lacks(options: list[str], job: dict[str, str], missing: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | job
    command = ["bash", "-uc", 'source slurm/resubmit.sh; missing_resources "$@"', "-", *options]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == (missing, "")


def in_a_job(site: Path, node: str, commands: str) -> str:
    """Run functions of compiled.sh on a node of one, whose disk is site/node."""
    script = f"""
        say() {{ echo "$*"; }}
        srun() {{ while [[ $1 == --* ]]; do shift; done; "$@"; }}
        SLURM_JOB_NUM_NODES=1 SLURM_JOB_ID=7
        compiled_archive={site}/cache/compiled.tar compiled_here={site}/{node}/compiled
        source slurm/compiled.sh
        {commands}"""
    done = subprocess.run(["bash", "-uc", script], cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def test_what_one_node_has_compiled_is_on_the_next_ones_disk(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert in_a_job(tmp_path, "a", "seed_compiled; keep_compiled") == ""
    folder, archive = tmp_path / "a" / "compiled", tmp_path / "cache" / "compiled.tar"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert not archive.exists()
    (folder / "triton").mkdir()
    (folder / "triton" / "kernel").write_text("one")
    assert in_a_job(tmp_path, "a", "keep_compiled") == ""
    (tmp_path / "b").mkdir()
    assert in_a_job(tmp_path, "b", "seed_compiled") == ""
    assert (tmp_path / "b" / "compiled" / "triton" / "kernel").read_text() == "one"
    packed = archive.stat().st_mtime_ns
    assert in_a_job(tmp_path, "b", "keep_compiled") == ""
    assert archive.stat().st_mtime_ns == packed, "nothing is newer"
    (tmp_path / "b" / "compiled" / "triton" / "other").write_text("two")
    assert in_a_job(tmp_path, "b", "keep_compiled; seed_compiled") == ""
    assert in_a_job(tmp_path, "a", "seed_compiled; ls $compiled_here/triton") == "kernel\n", "a node keeps its own"
    assert [path.name for path in archive.parent.iterdir()] == ["compiled.tar"]
    assert "kernels are compiled anew" in in_a_job(tmp_path, "c", "compiled_here=/proc/none; seed_compiled")


def with_words(site: Path, name: str, words: list[str]) -> None:
    """Let env.sh name the words of a script."""
    path = site / "slurm" / "env.sh"
    text, count = re.subn(rf"^{name}_words=.*$", f"{name}_words=({' '.join(words)})", path.read_text(), flags=re.MULTILINE)
    assert count == 1
    path.write_text(text)


@pytest.mark.slurm
@pytest.mark.slow
def test_a_plain_submission_runs_what_env_sh_names_and_submits_itself_once(
    cluster: Cluster, site: Path, shards: Path, tmp_path: Path
) -> None:
    words = [
        "configs/train/debug_cpu.yaml",
        f"run_dir={tmp_path}/run",
        f"data.sources.main.path={shards}",
        "max_steps=24",
        *TINY,
    ]
    with_words(site, "pretrain", words)
    plain = cluster.command("sbatch", "--parsable", "slurm/pretrain.sh", cwd=site).strip()
    cluster.wait_for(plain, "COMPLETED", timeout=900)
    log = log_of(site, f"megagpt-{plain}.log")
    found = re.search(r"has 1 of 2 nodes: submitted again .*--nodes=2.*: Submitted batch job (\d+); this one ends", log)
    assert found is not None, log
    job = cluster.wait_for(found[1], "COMPLETED", timeout=900)
    assert job["NumNodes"] == "2"
    assert "submitted again" not in log_of(site, f"megagpt-{found[1]}.log")
    assert read_metrics(tmp_path / "run").last_step == 24

    # A job with fewer nodes than env.sh names, on purpose: it trains nothing here, as the run is complete.
    alone = cluster.command("sbatch", "--parsable", "slurm/pretrain.sh", cwd=site, resubmit="no").strip()
    cluster.wait_for(alone, "COMPLETED", timeout=900)
    assert "start 0 of job" in log_of(site, f"megagpt-{alone}.log")


@pytest.mark.slurm
@pytest.mark.slow
def test_a_plain_submission_of_a_corpus_does_the_same(cluster: Cluster, site: Path, shards: Path, tmp_path: Path) -> None:
    inputs = f"tokenize.inputs=[{tmp_path}/in/*.zst]"
    with_words(site, "preprocess", [f"work_dir={tmp_path}/corpus", f"'{inputs}'", "tokenize.tokenizer=bytes"])
    plain = cluster.command("sbatch", "--parsable", "slurm/preprocess.sh", cwd=site, stages="tokenize_documents").strip()
    cluster.wait_for(plain, "COMPLETED", timeout=900)
    found = re.search(r"1 of 2 nodes: .*Submitted batch job (\d+)", log_of(site, f"megagpt-corpus-{plain}.log"))
    assert found is not None, log_of(site, f"megagpt-corpus-{plain}.log")
    cluster.wait_for(found[1], "COMPLETED", timeout=900)
    assert (tmp_path / "corpus" / "shards" / "train" / "manifest.json").is_file()


@pytest.mark.slurm
@pytest.mark.slow
def test_a_job_that_gets_sigterm_saves_and_goes_on_and_a_cancelled_one_stays_cancelled(
    cluster: Cluster, site: Path, shards: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = ["configs/train/debug_cpu.yaml", f"run_dir={run_dir}", f"data.sources.main.path={shards}", "max_steps=5000", *TINY]
    job_id = submit(cluster, site, "pretrain.sh", *words)
    wait_for_step(cluster, job_id, run_dir, 5)
    cluster.command("scancel", "--batch", "--signal=TERM", job_id)  # the script alone gets it
    wait_until(lambda: cluster.job(job_id)["Restarts"] == "1" and cluster.job(job_id)["JobState"] != "COMPLETING", 120)
    saved = max(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))
    assert saved >= 5
    wait_for_step(cluster, job_id, run_dir, saved + 2)
    cluster.command("scancel", job_id)
    cluster.wait_for(job_id, "CANCELLED", timeout=900)
    wait_until(lambda: not processes_of(job_id), 60)
    time.sleep(3)  # what is left of the script would put the job back now
    job = cluster.job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "1")


def ask(port: int, **values: Any) -> Any:
    """The open answer of a server to a completion."""
    body = json.dumps({"prompt": "a", "temperature": 0, **values}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=900)


@pytest.mark.slurm
@pytest.mark.slow
def test_a_model_is_served_and_the_end_of_the_job_drains(cluster: Cluster, site: Path, tmp_path: Path) -> None:
    """Of two jobs one gets the signal before its time limit, the other is cancelled: streams that run go on to their ends."""
    run_dir, ports = write_run(tmp_path / "tiny", seq_len=2048), own_ports(2)
    jobs = [
        submit(cluster, site, "serve.sh", f"run_dir={run_dir}", f"port={port}", "device=cpu", "num_slots=2") for port in ports
    ]
    logs = [f"megagpt-serve-{job}.log" for job in jobs]
    for job, log, port in zip(jobs, logs, ports, strict=True):
        wait_until(lambda log=log: "serving tiny on" in log_of(site, log) or "ended with status" in log_of(site, log))
        assert f"ssh -N -L {port}:127.0.0.1:{port}" in log_of(site, log), log_of(site, log)
        assert cluster.job(job)["JobState"] == "RUNNING"
    first, second = (json.load(ask(port, max_tokens=20))["choices"][0]["text"] for port in ports)
    assert first == second != ""
    streams = [ask(port, max_tokens=1500, stream=True) for port in ports]
    heads = [stream.readline() for stream in streams]
    cluster.command("scancel", "--batch", "--signal=USR1", jobs[0])
    cluster.command("scancel", jobs[1])
    for head, stream in zip(heads, streams, strict=True):
        assert head.startswith(b"data: {")
        assert stream.read().endswith(b"data: [DONE]\n\n")
    job = cluster.wait_for(jobs[0], "COMPLETED", timeout=900)
    assert job["ExitCode"] == "0:0"
    assert "the job ends: draining" in log_of(site, logs[0])
    assert "the server ended with status 0" in log_of(site, logs[0])
    cluster.wait_for(jobs[1], "CANCELLED", timeout=900)
    wait_until(lambda: not processes_of(jobs[1], "tools/serve_model.py"), 60)
