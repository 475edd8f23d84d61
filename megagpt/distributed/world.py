"""This process among its peers: rank, size, device, agreement over small integers, and requests to stop."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from types import FrameType
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megagpt.command import EXIT_STOPPED
from megagpt.config import Failure, UserError
from megagpt.distributed.device import Device, choose_device, gpus_of_all, own_gpu, promised_gpus, refuse_shared_gpus
from megagpt.distributed.malloc import keep_freed_memory
from megagpt.distributed.ports import free_port

log = logging.getLogger(__name__)

T = TypeVar("T")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""SLURM's preemption sends SIGTERM only, its time limit what --signal asks for, a terminal SIGINT: all mean save and end."""

WATCHED_WAIT = timedelta(days=7)
"""The longest wait for another rank where a watchdog looks at what the ranks get done."""

RECORDER_SETTINGS = {"TORCH_FR_BUFFER_SIZE": "500", "TORCH_NCCL_ENABLE_TIMING": "1"}
"""Collectives that torch's flight recorder keeps per rank; with NCCL it knows which of them run (see flight_recorder.py)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a launcher put this process."""

    rank: int
    size: int
    local_rank: int
    launcher: str


class Stopped(Exception):  # noqa: N818 (it is what happened, an error is a program's)
    """A stop signal has reached some rank; raised on all of them at the same place."""


class StopRequest:
    """Remembers the first stop signal; the loop, evaluation and sampling ask for it. A second SIGINT interrupts at once.

    While there is nothing to save (`end_at_once`), the signal itself ends the process: a thread hears it through Python's
    wakeup descriptor even while the main thread is inside a library, loading, joining a process group or compiling.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._ends_at_once, self._last_words = False, _nothing
        self._thread: threading.Thread | None = None

    def install(self) -> None:
        """Handle STOP_SIGNALS from now on (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def end_at_once(self, last_words: "Callable[[str], None] | None" = None) -> None:
        """From here on there is nothing to save: a stop signal ends the process with EXIT_STOPPED (main thread only).

        `last_words` gets the signal's name before that; nothing it does may wait for long.
        """
        self._last_words, self._ends_at_once = last_words or _nothing, True
        if self._thread is None:
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, args=(reader,), name="stop signals", daemon=True)
            self._thread.start()
        if self.signal_name:
            self._end(self.signal_name)

    def nothing_to_save(self) -> None:
        """After `remember`: from here on there is nothing to save again (main thread only)."""
        if self._thread is not None:
            self._ends_at_once = True
            if self.signal_name:
                self._end(self.signal_name)

    def remember(self) -> None:
        """From here on there is something to save: a stop signal is remembered until it is asked for."""
        self._ends_at_once = False

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if number in STOP_SIGNALS and self._ends_at_once:
                    self._end(signal.Signals(number).name)

    def _end(self, name: str) -> None:
        os.write(2, f"{name}: nothing is to be saved yet, the process ends with status {EXIT_STOPPED}\n".encode())
        with contextlib.suppress(Exception):
            self._last_words(name)
        os._exit(EXIT_STOPPED)

    def ignore(self) -> None:
        """Ignore STOP_SIGNALS for good: when a rank has ended with a status, srun sends SIGTERM to those that are about to, and
        a Python that is ending would die of it with another status."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def request(self, reason: str) -> None:
        """Ask for a stop without a signal: the first reason counts."""
        self.signal_name = self.signal_name or reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name


def _nothing(*_: object) -> None:
    pass


class Progress:
    """Counts what gets done inside long activities: a batch evaluated, a slice written, a file read. The watchdog judges by the
    time since it moved."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        """Something more is done."""
        self.count += 1


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of one run. Collectives here are on CPU over their own gloo group, so they never wait for a GPU."""

    rank: int
    size: int
    local_rank: int
    """Number of this process on its node, also where it sees one GPU only."""
    device: torch.device
    launcher: str
    control: Any
    stop: StopRequest = field(default_factory=StopRequest)
    progress: Progress = field(default_factory=Progress)
    cp_size: int = 1
    """Ranks that hold parts of the same samples; see mesh.py, which also makes their group."""
    cp_group: Any = None

    @property
    def dp_size(self) -> int:
        """Groups that samples are dealt to."""
        return self.size // self.cp_size

    @property
    def dp_rank(self) -> int:
        """Number of this rank's group."""
        return self.rank // self.cp_size

    @property
    def cp_rank(self) -> int:
        """Which part of its group's samples this rank has."""
        return self.rank % self.cp_size

    @property
    def counts(self) -> int:
        """1 on one rank of each context-parallel group, 0 on the others: what is a sample's is counted once."""
        return int(self.cp_rank == 0)

    def with_own_group(self) -> "World":
        """The same ranks with a gloo group of their own, for collectives in another thread that wait as long as these."""
        if self.size == 1:
            return self
        limit = self.control._get_backend(torch.device("cpu")).options._timeout
        return replace(self, control=dist.new_group(backend="gloo", timeout=limit))

    def leave_hangs_to_a_watchdog(self) -> None:
        """From here on collectives wait for a rank that gets on, however long it takes; a watchdog ends those that do not."""
        if self.size > 1:
            set_timeout: Any = dist.distributed_c10d._set_pg_timeout
            set_timeout(WATCHED_WAIT, self.control)

    def sum(self, values: Sequence[int]) -> list[int]:
        """Sums of int64 values over all ranks (modulo 2^64)."""
        return self.begin_sum(values)()

    def begin_sum(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """As `sum`, without waiting for the other ranks: what is returned waits for them and gives the sums. Call it once."""
        tensor = torch.tensor(values, dtype=torch.int64)
        work = dist.all_reduce(tensor, group=self.control, async_op=True) if self.size > 1 else None

        def wait() -> list[int]:
            if work is not None:
                work.wait()
            return tensor.tolist()

        return wait

    def any(self, claim: bool) -> bool:
        """Whether the claim holds on some rank."""
        return self.sum([int(claim)])[0] > 0

    def agree(self, problem: Exception | None = None) -> None:
        """Go on only if every rank can; all ranks call it together, each with its `problem` if it has one.

        Raises on all of them: Failure (UserError if that is what it is) if some rank has a problem, else Stopped if some rank
        was told to stop.
        """
        failed, stopped = self.sum([problem is not None, bool(self.stop.signal_name)])
        if failed:
            texts = self.gather(None if problem is None else (isinstance(problem, UserError), str(problem)))
            is_usage, text = next(text for text in texts if text is not None)
            raise (UserError if is_usage else Failure)(text) from problem
        if stopped:
            raise Stopped

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns on this rank, once it has succeeded on all ranks; all call it together.

        `action` waits for no other rank. What it raises for one that cannot read or write something is raised on all of them,
        as `agree` does; a single process gets its own exception.
        """
        try:
            result, problem = action(), None
        except (UserError, Failure, OSError) as error:
            if self.size == 1:
                raise
            result, problem = None, error
        self.agree(problem)
        return cast("T", result)

    def refuse_difference(self, where: str, found: Mapping[str, Any]) -> None:
        """Raise UserError on every rank, naming `where` and the first key that differs, unless all have found the same.

        All ranks call it together.
        """
        first, *others = self.gather(dict(found))
        for rank, other in enumerate(others, start=1):
            for name in first:
                if other.get(name) != first[name]:
                    raise UserError(f"{where}: rank {rank} finds {name}={other.get(name)}, rank 0 {first[name]}")

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values


LAUNCHERS: dict[str, tuple[str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpirun_rsh": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "flux": ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    "jsrun": ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}
"""Rank, size and local rank by launcher: torchrun and deepspeed, Open MPI, MVAPICH, Hydra (MPICH, Intel MPI), flux, jsrun,
srun. The first whose variables are there started the process: what stands further down may start the daemons of those above."""

SIZELESS = ("PMI_RANK", "PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE")
"""These say that a process is one of several, and not everything that must be known of the others."""


def place_from_environment(environment: dict[str, str]) -> Place:
    """Rank and size from the variables of one of LAUNCHERS; alone without any of them.

    Raises UserError if a launcher's variables are there only in part, if another launcher has started more processes than the
    first one knows of, or if this is one of several processes by a launcher that does not say how many: each would train alone.
    """
    places = [place for launcher in LAUNCHERS if (place := _place_by(launcher, environment)) is not None]
    if not places:
        for name in SIZELESS:
            if name in environment:
                raise UserError(
                    f"environment: {name}={environment[name]!r} says that this is one of several processes, not of how many or "
                    "which on its node: set RANK, WORLD_SIZE and LOCAL_RANK in the command that is launched"
                )
        return Place(0, 1, 0, "none")
    place, *others = places
    known, said_by = place.size, LAUNCHERS[place.launcher][1]
    if place.launcher == "torchrun" and "GROUP_WORLD_SIZE" in environment:  # there may be one torchrun per node
        known, said_by = int(environment["GROUP_WORLD_SIZE"]), "GROUP_WORLD_SIZE"
    for other in others:
        if other.size > known:
            raise UserError(
                f"environment: {other.launcher} has started {other.size} processes ({LAUNCHERS[other.launcher][1]}), but "
                f"{place.launcher} knows of {known} ({said_by}): each would train by itself"
            )
    return place


def _place_by(launcher: str, environment: dict[str, str]) -> Place | None:
    """What one launcher's variables say; None if this is not its process."""
    names = LAUNCHERS[launcher]
    rank_name, size_name, local_name = names
    # A batch script has SLURM_PROCID without srun, srun sets PMI_RANK and PMI_SIZE too: the third name tells.
    tell = {"srun": (size_name,), "mpiexec": (local_name,)}.get(launcher, (rank_name, size_name))
    if not any(name in environment for name in tell):
        return None
    missing = [name for name in names if name not in environment]
    if missing:
        raise UserError(f"environment: {launcher} sets {', '.join(names)} together, but {', '.join(missing)} is missing")
    try:
        rank, size, local_rank = (int(environment[name]) for name in names)
    except ValueError:
        raise UserError(f"environment: {', '.join(f'{n}={environment[n]!r}' for n in names)}: whole numbers expected") from None
    if not 0 <= rank < size:
        raise UserError(f"environment: {rank_name}={rank} is not below {size_name}={size}")
    return Place(rank, size, local_rank, launcher)


def init_world(*, timeout_seconds: float = 1800.0, stop: StopRequest | None = None, wanted_device: Device = "auto") -> World:
    """Join the process group (NCCL for GPU tensors, gloo for CPU tensors) and answer stop signals from here on, by `stop`.

    Also sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which libraries read. Raises UserError if the
    rendezvous address is not given or not reachable, or if torch cannot use the GPUs of this machine.
    """
    stop = stop or StopRequest()
    stop.install()
    place = place_from_environment(dict(os.environ))
    if place.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"environment: {name} is not set; {place.launcher} needs it (slurm/pretrain.sh sets it)")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = choose_device(place.local_rank, wanted_device, visible=visible, promised=promised_gpus(os.environ))
    index = device.index if device.type == "cuda" else place.local_rank  # DeepSpeed uses cuda:LOCAL_RANK
    os.environ.update(RANK=str(place.rank), WORLD_SIZE=str(place.size), LOCAL_RANK=str(index))
    for name, value in RECORDER_SETTINGS.items():
        os.environ.setdefault(name, value)
    timeout = timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        # NCCL joins as the group is made, and of a GPU that two ranks have it says no more than "invalid usage".
        refuse_shared_gpus(gpus_of_all(store, place.rank, place.size, own_gpu(device)))
        # CPU tensors too: with cpu_offload, FSDP's gradients and their norm are on the CPU.
        options: dict[str, Any] = {"store": store, "rank": place.rank, "world_size": place.size, "timeout": timeout}
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, **options)
        control = dist.new_group(backend="gloo", timeout=timeout) if place.size > 1 else None
    else:
        if not keep_freed_memory():
            log.info("this C library returns freed memory to the kernel: every step on this CPU pays for page faults")
        dist.init_process_group("gloo", timeout=timeout)
        control = dist.group.WORLD if place.size > 1 else None
    return World(place.rank, place.size, place.local_rank, device, place.launcher, control, stop)


def close_world() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def abort_world() -> None:
    """Leave the process group without waiting for collectives in flight: they may never end."""
    if dist.is_initialized():
        abort: Any = dist.distributed_c10d._abort_process_group
        abort()


def lone_world(device: torch.device) -> World:
    """A world of one process that is in no process group, for tools."""
    return World(0, 1, 0, device, "none", None)


@contextlib.contextmanager
def joined_world(device: Literal["auto", "cpu", "cuda"] = "auto") -> Iterator[World]:
    """The ranks that a launcher has started a tool on, or one process alone.

    Raises UserError as init_world and pick_device do.
    """
    if place_from_environment(dict(os.environ)).size == 1:
        yield lone_world(pick_device(device))
        return
    try:
        world = init_world(wanted_device="cpu" if device == "cpu" else "auto")
        if device == "cuda" and world.device.type != "cuda":
            raise UserError("device=cuda: torch sees no GPU on this machine")
        yield world
    finally:
        close_world()


def pick_device(name: str = "auto") -> torch.device:
    """The device of a tool that runs on one process: `auto` is the GPU if there is one. Raises UserError if `cuda` is not."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU on this machine")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def utc_now() -> str:
    """The time as ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
