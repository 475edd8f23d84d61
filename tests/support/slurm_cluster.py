"""A real SLURM on this host for the tests: one slurmctld and several slurmd on 127.0.0.1, without root and without munge."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import own_ports

CONF = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_continue
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=20
KillWait=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
JobRequeue=1
PropagateResourceLimits=NONE
FirstJobId={first_job}
NodeName=DEFAULT CPUs=2 RealMemory=4000 State=UNKNOWN
{nodes}
PartitionName=main Nodes=n[1-{num_nodes}] Default=YES MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=n[1-{num_nodes}] MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """The running cluster; its commands are run with `command`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "RANK", "WORLD_SIZE"))}
        self.environment["SLURM_CONF"] = str(folder / "slurm.conf")
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        """slurmctld, and one slurmd by the name of each node."""

    def start_node(self, name: str) -> None:
        """Start a node's slurmd, at the beginning or after it was killed."""
        self.daemons[name] = start_daemon(self, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """SIGKILL to a node's slurmd; what it has started lives on."""
        self.daemons[name].kill()
        self.daemons[name].wait()

    def submit(self, site: Path, *command: str, **environment: str) -> str:
        """Run a job script, or sbatch, in a project; the number of the job."""
        output = self.command(*command, cwd=site, timeout=900, **environment)
        return output.strip().split()[-1]

    def command(self, *words: str, cwd: Path | None = None, timeout: float = 900, **environment: str) -> str:
        """Run a SLURM command (or a script that calls some) and return what it prints. Raises CalledProcessError."""
        done = subprocess.run(
            words, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=timeout
        )
        try:
            done.check_returncode()
        except subprocess.CalledProcessError as error:
            error.add_note(done.stderr)
            raise
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What SLURM knows of a job: JobState, Restarts, ExitCode and so on."""
        words = self.command("scontrol", "show", "job", "-o", job_id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job_id: str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until a job is in one of the states; fails with the job's record when it ends otherwise or takes too long."""
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(job_id)
            if job["JobState"] in states:
                return job
            ended = job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            assert not ended, f"job ended as {job}"
            assert time.monotonic() < deadline, f"job is still {job}"
            time.sleep(0.3)


def skip_without_slurm() -> None:
    """Skip the test, with the reason, where SLURM is not installed."""
    if shutil.which("sbatch") is None or shutil.which("slurmctld", path="/usr/sbin:/sbin:/usr/bin") is None:
        pytest.skip("SLURM is not installed (docker/install.sh packages dev)")


@contextlib.contextmanager
def running_cluster(folder: Path, *, num_nodes: int) -> Iterator[Cluster]:
    """Start slurmctld and `num_nodes` slurmd, yield once all nodes are idle, stop everything that was started."""
    for name in ("run", "state", "log", "spool"):
        (folder / name).mkdir(parents=True)
    ports = own_ports(num_nodes + 1)
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}" for i, port in enumerate(ports[1:], start=1)
    )
    # Job numbers decide on rendezvous ports: two clusters on one host must not count from the same one.
    first_job = 1 + os.getpid() % 15_000
    text = CONF.format(
        host=host, port=ports[0], user=getpass.getuser(), folder=folder, nodes=nodes, num_nodes=num_nodes, first_job=first_job
    )
    (folder / "slurm.conf").write_text(text)
    cluster = Cluster(folder)
    try:
        cluster.daemons["slurmctld"] = start_daemon(cluster, "slurmctld", "-D", "-c")
        for i in range(1, num_nodes + 1):
            cluster.start_node(f"n{i}")
        deadline = time.monotonic() + 600
        while idle_nodes(cluster) < num_nodes:
            assert cluster.daemons["slurmctld"].poll() is None, (folder / "log" / "slurmctld.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the nodes did not become idle"
            time.sleep(0.2)
        yield cluster
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            cluster.command("scancel", "--user", getpass.getuser(), timeout=10)
            time.sleep(1)
        stop_daemons(list(cluster.daemons.values()))


def start_daemon(cluster: Cluster, *words: str) -> subprocess.Popen[bytes]:
    """Start one daemon in the foreground; it finds its settings by SLURM_CONF."""
    program = shutil.which(words[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert program is not None
    with (cluster.folder / "log" / "daemons.out").open("ab") as log:
        return subprocess.Popen([program, *words[1:]], env=cluster.environment, stdout=log, stderr=log)


def stop_daemons(daemons: list[subprocess.Popen[bytes]]) -> None:
    """End daemons, the last started first; a slurmd without its controller hears only SIGKILL."""
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in reversed(daemons):
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def idle_nodes(cluster: Cluster) -> int:
    """Nodes that are ready for work; 0 while the controller does not answer."""
    try:
        return cluster.command("sinfo", "-h", "-N", "-p", "main", "-o", "%T", timeout=5).split().count("idle")
    except subprocess.SubprocessError:
        return 0


def make_site(root: Path, project: Path, *, nodes: str = "2") -> Path:
    """A project as a site has it: the shipped files, and an env.sh with this cluster's options."""
    root.mkdir(parents=True)
    for name in ("tools", "configs", "megagpt"):
        (root / name).symlink_to(project / name)
    shutil.copytree(project / "slurm", root / "slurm")
    settings = (root / "slurm" / "env.sh").read_text()
    for old, new in (
        ("pretrain_options=(--nodes=1 --gpus-per-node=8 --time=24:00:00)", f"pretrain_options=(--nodes={nodes} --time=30)"),
        ("preprocess_options=(--nodes=1 --time=24:00:00)", f"preprocess_options=(--nodes={nodes} --time=30)"),
        ("serve_options=(--nodes=1 --gpus-per-node=1 --time=08:00:00)", "serve_options=(--nodes=1 --time=30)"),
        ("python=${python:-$PWD/.venv/bin/python}", f"python={sys.executable}"),
        ("master_addr=${master_addr:-}", "master_addr=127.0.0.1"),
    ):
        assert old in settings
        settings = settings.replace(old, new)
    (root / "slurm" / "env.sh").write_text(settings)
    return root


def processes_of(job_id: str, program: str = "tools/train_model.py", rank: int | None = None) -> list[int]:
    """The processes of a job's tasks that run a Python program, on this host; or those of one task."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        mine = f"SLURM_JOB_ID={job_id}".encode() in environment and program.encode() in words and b"python" in words[0]
        place = rank is None or f"SLURM_PROCID={rank}".encode() in environment
        if mine and place and any(word.startswith(b"SLURM_STEP_NUM_TASKS=") for word in environment):
            found.append(int(folder.name))
    return found
