"""A training job on a real SLURM of three nodes: whatever happens, it ends with the weights of a run left in peace."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import chaos
import pytest
import torch
from ranks import Ranks, wait_until
from slurm_cluster import Cluster, make_site, processes_of, running_cluster, skip_without_slurm

from megagpt.checkpoint.load_model import load_model
from megagpt.checkpoint.on_disk import list_checkpoints, step_of
from megagpt.files import read_json
from megagpt.monitor.metrics import read_metrics
from megagpt.report.inspect_data import check_ledger

PROJECT = Path(__file__).resolve().parents[2]
SHORT = ["stop_in_evaluation", "torn_checkpoint", "rank_stopped", "preempt"]
"""The four faults of the soak's short form: tests/soak/chaos.py has more kinds, and more of each. Evaluations that hang or take
long are in tests/watchdog."""
SEED_OF_ONE_NODE = 0
"""With it, the soak drains two of three nodes before its first fault."""

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    skip_without_slurm()
    with running_cluster(tmp_path_factory.mktemp("slurm") / "lab", num_nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chaos.make_shards(tmp_path_factory.mktemp("corpus"))


def test_faults_in_a_row_change_no_bit(cluster: Cluster, tmp_path: Path) -> None:
    sources = chaos.make_sources(tmp_path / "corpus")
    soak = chaos.soak_run(cluster, tmp_path, sources, SHORT)
    found = chaos.compare(soak, tmp_path / "clean", sources)
    assert found["weights_equal"]
    assert found["losses_equal"]
    assert "all as in the shards" in found["ledger"][0]
    assert not any("used twice" in line for line in found["ledger"])
    verdicts = {outcome.fault: outcome.verdict for outcome in soak.table}
    assert verdicts["stop_in_evaluation"] == "stop: SIGUSR1, in ['evaluate']"
    rewinds = read_metrics(soak.run_dir).of_kind("rewind")
    assert rewinds, "there is noise in the data"
    planned = [row["step"] for row in read_metrics(soak.run_dir).of_kind("planned")]
    assert len(set(planned)) > 1
    late = [row["bad_step"] - step for row in rewinds for step in planned]
    assert not [steps for steps in late if 0 <= steps <= 40], "a planned change is taken for noise"  # judged after 32
    assert verdicts["rank_stopped"].startswith("watchdog: silent, rank ")
    assert "ended with status 76" in soak.log()
    assert soak.log().count("passing SIGUSR1 on to the ranks") == 1
    assert read_metrics(soak.run_dir).of_kind("damaged")


def test_faults_on_changing_nodes_whose_ranks_share_samples_change_no_bit(cluster: Cluster, tmp_path: Path) -> None:
    """Two ranks per node, engine.context_parallel_size=2; the job goes from two nodes to one."""
    sources = chaos.make_sources(tmp_path / "corpus")
    soak = chaos.soak_run(cluster, tmp_path, sources, ["node_lost"], seed=SEED_OF_ONE_NODE, layout=chaos.SHARED_SAMPLES)
    found = chaos.compare(soak, tmp_path / "clean", sources)
    assert found["ranks"] == [4, 2]
    assert found["weights_equal"]
    assert found["losses_equal"]
    assert "all as in the shards" in found["ledger"][0]
    assert not any("used twice" in line for line in found["ledger"])


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir).of_kind("train")}


def uninterrupted(folder: Path, shards: Path, max_steps: int, size: int, *changes: str) -> Path:
    """The same run on this machine, without SLURM."""
    config, *words = chaos.settings(folder / "run", shards, max_steps)
    ranks = Ranks([str(PROJECT / "tools" / "train_model.py"), str(PROJECT / config), *words, *changes], size, folder / "logs")
    assert ranks.wait() == [0] * size, ranks.output()
    return folder / "run"


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_model(run_dir).model.state_dict()


def assert_as_if_nothing_had_happened(run_dir: Path, clean: Path) -> None:
    """Weights and losses are bitwise those of the uninterrupted run, and every sample was fed once."""
    ours, expected = weights(run_dir), weights(clean)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert losses(run_dir) == losses(clean)
    assert "all as in the shards" in next(iter(check_ledger(run_dir)))


def is_running(pid: int) -> bool:
    """Whether any thread of a process is there and has not ended.

    A first thread that is a zombie does not say so: the kernel wakes the stopped children when the last thread ends.
    """
    try:
        states = [stat.read_text().rpartition(") ")[2][0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return is_running(pid)  # a thread ended between the listing and the reading
    return any(state not in "ZX" for state in states)


def read_attempt(run_dir: Path) -> int:
    return int(read_json(run_dir / "owner.json")["incarnation"]) if (run_dir / "owner.json").exists() else 0


def last_step(run_dir: Path, attempt: int) -> int:
    if not (run_dir / "metrics.jsonl").exists():
        return -1
    rows = read_metrics(run_dir).all_rows
    return max((row["step"] for row in rows if row["incarnation"] == attempt and row["kind"] == "train"), default=-1)


def test_a_rank_left_over_on_a_lost_node_commits_nothing(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """slurmd dies, its rank and batch script train on while SLURM starts the job elsewhere."""
    site, run_dir, steps = make_site(tmp_path / "project", PROJECT, nodes="1"), tmp_path / "run", 700
    job_id = cluster.submit(site, "slurm/pretrain.sh", *chaos.settings(run_dir, shards, steps))
    wait_until(lambda: last_step(run_dir, 1) >= 60)
    node = cluster.job(job_id)["NodeList"]
    ghosts = processes_of(job_id)
    # It waits, so that it still lives when the next start has saved; then it goes on.
    for pid in ghosts:
        os.kill(pid, signal.SIGSTOP)
    cluster.kill_node(node)
    try:
        wait_until(lambda: read_attempt(run_dir) == 2 and last_step(run_dir, 2) >= 0)
        assert cluster.job(job_id)["NodeList"] != node
        for pid in ghosts:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ghosts))
        cluster.wait_for(job_id, "COMPLETED", timeout=900)
    finally:
        for pid in ghosts:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        cluster.start_node(node)
    assert cluster.job(job_id)["Restarts"] == "1", "the left-over batch script must not requeue the job"
    # Whatever it trained beside the new start (srun may have ended it before), it ended when it wanted to commit.
    rows = read_metrics(run_dir).all_rows
    started_again = next(i for i, row in enumerate(rows) if row["kind"] == "start" and row["incarnation"] == 2)
    left_over = [row["step"] for row in rows[started_again:] if row["incarnation"] == 1]
    assert max(left_over, default=0) <= 200 < steps
    saved_by = {step_of(path): read_json(path / "state.json")["incarnation"] for path in list_checkpoints(run_dir)}
    assert {by for step, by in saved_by.items() if step > 50} == {2}, saved_by
    assert_as_if_nothing_had_happened(run_dir, uninterrupted(tmp_path / "clean", shards, steps, 1))


def test_a_dead_step_daemon_whose_rank_hangs_is_seen_by_the_watchdog_alone(
    cluster: Cluster, shards: Path, tmp_path: Path
) -> None:
    """SLURM goes on believing in the step, and no connection of the rank closes."""
    site, run_dir, steps = make_site(tmp_path / "project", PROJECT), tmp_path / "run", 240
    job_id = cluster.submit(site, "slurm/pretrain.sh", *chaos.settings(run_dir, shards, steps))
    wait_until(lambda: last_step(run_dir, 1) >= 60)
    hung = processes_of(job_id, rank=1)
    daemons = [chaos.parent(pid) for pid in hung]
    chaos.kill(daemons, signal.SIGKILL)
    wait_until(lambda: not any(is_running(pid) for pid in daemons))
    chaos.kill(hung, signal.SIGSTOP)  # once its parent has ended: the kernel would wake it with SIGHUP
    try:
        cluster.wait_for(job_id, "COMPLETED", timeout=900)
    finally:
        chaos.kill(hung, signal.SIGKILL)
    log = (site / f"megagpt-{job_id}.log").read_text()
    endings = [line.partition("ended with status ")[2][:2] for line in log.splitlines() if "ended with" in line]
    assert endings == ["76", "0,"], log
    verdict = read_metrics(run_dir).of_kind("watchdog")[0]
    assert (verdict["rank"], verdict["cause"]) == (1, "silent")
    assert_as_if_nothing_had_happened(run_dir, uninterrupted(tmp_path / "clean", shards, steps, 2))


def test_it_goes_on_with_the_nodes_that_there_are(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    """--nodes=1-3: two nodes, then one, then three, as the partition has them."""
    site, run_dir, steps = make_site(tmp_path / "project", PROJECT, nodes="1-3"), tmp_path / "run", 240

    def drain(*nodes: str) -> None:
        for node in ("n1", "n2", "n3"):
            words = ["state=drain", "reason=test"] if node in nodes else ["state=resume"]
            with contextlib.suppress(subprocess.CalledProcessError):  # resuming one that is not drained
                cluster.command("scontrol", "update", f"nodename={node}", *words)

    # Small steps of SGD: training is chaotic, and at higher rates the last bits of fp32 sums grow tenfold every 60 updates
    changes = ("optim.kind=sgd", "optim.lr=0.01")
    drain("n3")
    job_id = cluster.submit(site, "slurm/pretrain.sh", *chaos.settings(run_dir, shards, steps), *changes)
    for attempt, drained in ((1, ("n2", "n3")), (2, ())):
        wait_until(lambda i=attempt: last_step(run_dir, i) >= 60 * i)
        drain(*drained)
        cluster.command("scontrol", "requeue", job_id)
    cluster.wait_for(job_id, "COMPLETED", timeout=900)
    sizes = [read_json(path)["world_size"] for path in sorted((run_dir / "starts").glob("*.json"))]
    assert sizes == [2, 1, 3]
    clean = uninterrupted(tmp_path / "clean", shards, steps, 2, *changes)
    found, expected = losses(run_dir), losses(clean)
    # fp32 sums in another order
    assert max(abs(found[step] - expected[step]) for step in expected) <= 1e-5
    ours, theirs = weights(run_dir), weights(clean)
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    assert (difference / sum(float(tensor.square().sum()) for tensor in theirs.values())) ** 0.5 <= 1e-4
    assert "all as in the shards" in next(iter(check_ledger(run_dir)))


def test_a_bad_node_is_left_out_by_a_successor(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    site, run_dir = make_site(tmp_path / "project", PROJECT), tmp_path / "run"
    launcher = tmp_path / "launch.sh"
    launcher.write_text('#!/bin/bash\ncase "$SLURMD_NODENAME $*" in "n1 "*check_node*) exit 1 ;; esac\nexec "$@"\n')
    launcher.chmod(0o755)
    settings = site / "slurm" / "env.sh"
    settings.write_text(settings.read_text().replace("launch=()", f"launch=({launcher})"))
    job_id = cluster.submit(site, "slurm/pretrain.sh", *chaos.settings(run_dir, shards, 30), node_check_seconds="60")
    cluster.wait_for(job_id, "FAILED", timeout=900)
    successor = str(int(job_id) + 1)
    job = cluster.wait_for(successor, "COMPLETED", timeout=900)
    assert (job["NodeList"], job["ExcNodeList"]) == ("n[2-3]", "n1")
    assert "bad nodes: n1" in (site / f"megagpt-{job_id}.log").read_text()
    assert last_step(run_dir, 1) == 30


@pytest.mark.parametrize("script", ["pretrain.sh", "preprocess.sh"])
def test_sbatch_would_take_the_script(script: str, cluster: Cluster, tmp_path: Path) -> None:
    site = make_site(tmp_path / "project", PROJECT)
    words = ("--test-only", "--nodes=2", "--parsable", f"slurm/{script}", "configs/train/debug_cpu.yaml")
    assert cluster.command("sbatch", *words, cwd=site) == ""  # accepted: nothing is submitted, and a refusal would raise


LACKING = [
    ("--nodes=9", "More processors requested than permitted"),
    ("--nodes=2 --gpus-per-node=8", "Invalid generic resource"),
    ("--nodes=2 --partition=none", "partition"),
]
"""Options that this cluster cannot meet, and what sbatch says of them."""


@pytest.mark.parametrize(("options", "named"), LACKING)
def test_what_the_cluster_does_not_have_is_told_without_submitting(
    options: str, named: str, cluster: Cluster, tmp_path: Path
) -> None:
    site = make_site(tmp_path / "project", PROJECT)
    with pytest.raises(subprocess.CalledProcessError) as error:
        cluster.command("sbatch", "--test-only", *options.split(), "slurm/pretrain.sh", "debug_cpu.yaml", cwd=site)
    assert named in error.value.stderr


def test_too_few_gpus_are_refused_at_submission(cluster: Cluster, shards: Path, tmp_path: Path) -> None:
    site, (options, named) = make_site(tmp_path / "project", PROJECT), LACKING[1]
    settings = site / "slurm" / "env.sh"
    settings.write_text(settings.read_text().replace("pretrain_options=(--nodes=2 --time=30)", f"pretrain_options=({options})"))
    with pytest.raises(subprocess.CalledProcessError) as error:
        cluster.submit(site, "slurm/pretrain.sh", *chaos.settings(tmp_path / "run", shards, 40))
    assert named in error.value.stderr
    heads = ["plan", "batch", "memory", "speed", "time", "checkpoints"]
    assert [line.partition(":")[0] for line in error.value.stdout.splitlines() if line.partition(":")[0] in heads] == heads
