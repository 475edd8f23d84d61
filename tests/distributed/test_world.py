"""Which rank this is, from each launcher's variables; collectives over real ranks; stop signals."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from megagpt.config import UserError
from megagpt.distributed.malloc import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, keep_freed_memory
from megagpt.distributed.ports import free_ports
from megagpt.distributed.world import WATCHED_WAIT, Place, StopRequest, World, place_from_environment

SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1"}
FLUX = {"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "4", "FLUX_TASK_LOCAL_ID": "1"}
DAEMON = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


FREED = """
import resource, sys, torch
from megagpt.distributed.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for number in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("mode", "few"), [("kept", True), ("default", False)])
def test_freed_memory_is_used_again_without_page_faults(mode: str, few: bool) -> None:
    """80 MB are 19,532 pages, or 40 huge ones. glibc 2.36 needs some rounds: an aligned block does not fit where one was."""
    done = subprocess.run([sys.executable, "-c", FREED, mode], capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 10) == few, done.stdout


class OldLibrary:
    """A C library whose mallopt takes no mmap threshold above 32 MiB, or none, as glibc before 2.35."""

    def __init__(self, limit: int) -> None:
        self.limit, self.taken = limit, {}

    def mallopt(self, name: int, value: int) -> int:
        if name == M_MMAP_THRESHOLD and value > self.limit:
            return 0
        self.taken[name] = value
        return 1


@pytest.mark.parametrize(("limit", "kept"), [(1 << 25, True), (0, False)])
def test_an_older_c_library_keeps_what_it_can(limit: int, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    library = OldLibrary(limit)
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    assert keep_freed_memory() == kept
    assert library.taken == {M_TRIM_THRESHOLD: 1 << 30, **({M_MMAP_THRESHOLD: 1 << 25} if kept else {})}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0, "none")),
        (SRUN, Place(3, 4, 1, "srun")),
        (TORCHRUN, Place(3, 4, 1, "torchrun")),
        ({**SRUN, **TORCHRUN, "RANK": "2"}, Place(2, 4, 1, "torchrun")),
        (OPEN_MPI, Place(3, 4, 1, "mpirun")),
        (
            {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "1"},
            Place(1, 2, 1, "mpirun_rsh"),
        ),
        (HYDRA, Place(3, 4, 1, "mpiexec")),
        (FLUX, Place(3, 4, 1, "flux")),
        ({"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_LOCAL_RANK": "1"}, Place(1, 2, 1, "jsrun")),
        # Inside a SLURM job these start a daemon per node with srun, and flux sets PMI's variables.
        ({**OPEN_MPI, **DAEMON, "PMIX_RANK": "3"}, Place(3, 4, 1, "mpirun")),
        ({**HYDRA, **DAEMON}, Place(3, 4, 1, "mpiexec")),
        ({**FLUX, **DAEMON, "PMI_RANK": "3", "PMI_SIZE": "4"}, Place(3, 4, 1, "flux")),
        # srun --mpi=pmi2, --mpi=pmix
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "4"}, Place(3, 4, 1, "srun")),
        ({**SRUN, "PMIX_RANK": "3"}, Place(3, 4, 1, "srun")),
        # srun starts one torchrun per node
        ({**TORCHRUN, **DAEMON, "TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2"}, Place(3, 4, 1, "torchrun")),
        # A batch script's own variables, without srun: this process is alone.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Place(0, 1, 0, "none")),
    ],
)
def test_place(environment: dict[str, str], place: Place) -> None:
    assert place_from_environment(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is missing"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='x'"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "SLURM_LOCALID is missing"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_LOCAL_RANK is missing"),
        ({"FLUX_TASK_RANK": "0"}, "FLUX_JOB_SIZE, FLUX_TASK_LOCAL_ID is missing"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK='1' says that this is one of several processes"),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "x"}, "PMIX_RANK='0' says that this is one of several processes"),
        ({"PALS_RANKID": "0"}, "PALS_RANKID='0' says"),
        ({**OPEN_MPI, **ALONE}, "mpirun has started 4 processes (OMPI_COMM_WORLD_SIZE), but torchrun knows of 1 (WORLD_SIZE)"),
        ({**FLUX, **ALONE}, "flux has started 4 processes (FLUX_JOB_SIZE)"),
        (
            {**SRUN, **ALONE},
            "srun has started 4 processes (SLURM_STEP_NUM_TASKS), but",
        ),
        # srun -N2 torchrun --nproc-per-node=4, without --nnodes
        ({**DAEMON, **TORCHRUN, "TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1"}, "torchrun knows of 1 (GROUP_WORLD_SIZE)"),
    ],
)
def test_half_an_environment_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        place_from_environment(environment)
    assert message in str(raised.value)


def collectives(world: World) -> tuple[list[int], bool, bool, object, list[object], int, int]:
    own = world.with_own_group()
    own.progress()
    return (
        world.sum([world.rank, -(2**62), 2**62 + 1]),
        world.any(world.rank == 1),
        world.any(False),
        world.broadcast(f"from {world.rank}"),
        world.gather(world.rank * 10),
        own.sum([1])[0],
        world.progress.count,  # of a thread with a group of its own, too: the watchdog looks at one number
    )


@pytest.mark.slow
def test_collectives_agree(tmp_path: Path) -> None:
    expected = ([1, -(2**63), -(2**63) + 2], True, False, "from 0", [0, 10], 2, 1)
    assert run_ranks(collectives, 2, tmp_path) == [expected, expected]


def waits(world: World) -> list[timedelta]:
    groups = [world, world.with_own_group()]
    world.leave_hangs_to_a_watchdog()
    groups.append(world.with_own_group())
    return [group.control._get_backend(torch.device("cpu")).options._timeout for group in groups]


@pytest.mark.slow
def test_under_a_watchdog_collectives_wait_and_so_do_those_of_a_thread(tmp_path: Path) -> None:
    joined = timedelta(seconds=300)  # as run_ranks joins
    assert run_ranks(waits, 2, tmp_path) == [[WATCHED_WAIT, joined, WATCHED_WAIT]] * 2


def test_the_first_stop_signal_is_remembered_and_a_second_interrupt_interrupts() -> None:
    stop = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stop.install()
        assert stop.signal_name == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal_name == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ports_are_free_distinct_and_not_the_kernels() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    assert max(ports) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[0]))
        assert ports[0] not in free_ports(10_000)
    shares = [set(free_ports(10_000, part=part, parts=2)) for part in (0, 1)]
    assert all(shares)
    assert not shares[0] & shares[1]


def fails_on_rank_1(world: World) -> None:
    if world.rank == 1:
        raise ValueError("rank 1 is broken")
    world.barrier()


def test_a_rank_that_fails_is_shown_and_not_waited_for(tmp_path: Path) -> None:
    """The tests' own harness: rank 0 would wait for its peer for minutes."""
    started = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 is broken"):
        run_ranks(fails_on_rank_1, 2, tmp_path)
    assert time.monotonic() - started < 300
