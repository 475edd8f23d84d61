"""Which device a rank computes on. A machine whose GPUs torch cannot use is an error, never a silent run on its CPU."""

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from megagpt.config import UserError

Device: TypeAlias = Literal["auto", "cpu"]
"""auto: a GPU per rank where the machine has GPUs, else the CPU. cpu: the CPU, whatever the machine has."""

DRIVER_FILE = Path("/proc/driver/nvidia/version")


def choose_device(local_rank: int, wanted: Device, *, visible: int, promised: str) -> torch.device:
    """The device of the rank that is number `local_rank` on its node.

    visible: GPUs that torch can use. promised: why this machine should have GPUs (`promised_gpus`), empty if nothing says so.
    A single visible GPU is this rank's own: `--gpus-per-task=1`, `--gpu-bind` and a CUDA_VISIBLE_DEVICES per task show each
    rank one GPU (`refuse_shared_gpus` finds ranks that were given the same one).

    Raises UserError where GPUs are promised and torch can use none, or where a rank has no GPU.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if visible == 0:
        if promised:
            raise UserError(
                f"torch cannot use the GPUs of this machine ({promised}): {build_and_driver()}; device=cpu uses the CPU"
            )
        return torch.device("cpu")
    if visible > 1 and local_rank >= visible:
        raise UserError(f"local rank {local_rank} has no GPU: {visible} are visible on this node; start one rank per GPU")
    return torch.device("cuda", 0 if visible == 1 else local_rank)


def promised_gpus(environment: Mapping[str, str], dev: Path = Path("/dev")) -> str:
    """What says that this machine has NVIDIA GPUs; empty if nothing does."""
    on_node = environment.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isdigit() and int(on_node) > 0:
        return f"SLURM_GPUS_ON_NODE={on_node}"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if "CROSS_RANK" in environment:  # deepspeed's launcher numbers its ranks there, on machines without GPUs too
        visible = None
    if visible not in (None, "", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={visible}"
    if visible is None and (dev / "nvidiactl").exists():
        return f"{dev / 'nvidiactl'} exists"
    return ""


def build_and_driver() -> str:
    """torch's build and the driver's version in words: the two that have to fit together."""
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
    try:
        driver = DRIVER_FILE.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
    except (OSError, IndexError):
        driver = "no NVIDIA driver is loaded here (in a container: start it with its GPU option)"
    return f"torch {torch.__version__} is {build}; {driver}"


def cores_of_rank(environment: Mapping[str, str], cores: int, gpus: int) -> int:
    """Cores that a rank beside a GPU may use: those that srun gave its task, else its part of the `cores` of this process."""
    given = environment.get("SRUN_CPUS_PER_TASK") or environment.get("SLURM_CPUS_PER_TASK", "")
    return min(int(given), cores) if given.isdigit() and int(given) else max(1, cores // max(1, gpus))


def refuse_shared_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """Raise UserError if two ranks have the same GPU. gpus: (node, UUID) of every rank in rank order, UUID empty for a CPU."""
    ranks: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, gpu in enumerate(gpus):
        if gpu[1]:
            ranks[gpu].append(rank)
    for (node, uuid), sharing in ranks.items():
        if len(sharing) > 1:
            raise UserError(f"ranks {', '.join(map(str, sharing))} share GPU {uuid} of {node}: start one rank per GPU")


def gpus_of_all(store: Any, rank: int, size: int, own: tuple[str, str]) -> list[tuple[str, str]]:
    """`own_gpu` of every rank in rank order, exchanged through torch's store, before there is a process group."""
    store.set(f"gpu {rank}", json.dumps(own))
    return [tuple(json.loads(text)) for text in store.multi_get([f"gpu {number}" for number in range(size)])]


def own_gpu(device: torch.device) -> tuple[str, str]:
    """(name of this node, UUID of the GPU); the UUID is empty for a CPU."""
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    return os.uname().nodename, uuid
