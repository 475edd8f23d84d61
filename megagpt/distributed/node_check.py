"""Is this node fit for training: GPUs, their memory, clocks and arithmetic, disks, and an all-reduce over all nodes.

Run one task per node. Each node prints one line, `check_node: NAME good` or `check_node: NAME bad: reasons`, which
slurm/pretrain.sh reads. A node that prints nothing in time counts as bad.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field

from megagpt.config import Config
from megagpt.distributed.device import build_and_driver, promised_gpus
from megagpt.distributed.world import close_world, init_world, place_from_environment

MATRIX = 2048
"""Side of the matrices whose product is compared with the CPU's."""
PROBE_BYTES = 16 << 20
TORCH_WITHOUT_GPUS = "torch cannot use the GPUs"
"""slurm/pretrain.sh ends with status 2 where every node reports this: another node would not help."""


class CheckNodeConfig(Config):
    """What is asked of a node."""

    run_dir: Path | None = None
    """Folder on the shared disk in which a file is written, synced and read back; null = not looked at."""
    num_gpus: int | None = Field(default=None, ge=0)
    """GPUs that the node must have; null = SLURM_GPUS_ON_NODE of this job, or any number without it."""
    max_temperature_celsius: float = Field(default=90.0, gt=0)
    """A GPU that is hotter than this before any work is badly cooled."""
    min_tmp_gib: float = Field(default=1.0, ge=0)
    """Free space that /tmp must have."""
    local: bool = True
    """Whether the node is looked at by itself."""
    network: bool = True
    """Whether the nodes do an all-reduce together; one bad node fails all of them in this."""
    timeout_seconds: float = Field(default=120.0, gt=0)
    """How long the all-reduce over all nodes may take, start of the slowest task included."""


def check_node(config: CheckNodeConfig) -> list[str]:
    """What is wrong with this node, one line each; [] = good."""
    checks: list[Callable[[], Iterator[str]]] = []
    if config.local:
        checks += [lambda: check_gpus(config), lambda: check_disk(Path("/tmp"), config.min_tmp_gib)]
        run_dir = config.run_dir
        checks += [lambda: check_disk(run_dir, 0.0)] if run_dir is not None else []
    if config.network:
        checks.append(lambda: check_network(config.timeout_seconds))
    return [problem for check in checks for problem in _problems(check)]


def node_name() -> str:
    """SLURM's name of this node, or the host's."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def check_gpus(config: CheckNodeConfig) -> Iterator[str]:
    """Number, arithmetic, and NVML's reports: memory errors, rows to be remapped, heat, clocks held down by the hardware."""
    wanted = config.num_gpus if config.num_gpus is not None else _slurm_gpus()
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found == 0:
        promised = promised_gpus(os.environ) or (f"num_gpus={wanted}" if wanted else "")
        if promised:
            yield f"{TORCH_WITHOUT_GPUS} ({promised}): {build_and_driver()}"
        return
    if wanted is not None and found != wanted:
        yield f"{found} GPUs, {wanted} are expected"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(MATRIX, MATRIX, generator=generator) for _ in range(2))
    expected = left @ right
    for index in range(found):
        device = torch.device("cuda", index)
        product = (left.to(device) @ right.to(device)).cpu()
        # TF32 or not: sums of 2048 products of unit normals, whose own spread is 45.
        error = float((product - expected).abs().max())
        if not error < 1.0:
            yield f"GPU {index}: a matrix product is wrong by {error:.3g}"
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        for problem in _nvml_problems_of(uuid, config.max_temperature_celsius):
            yield f"GPU {index}: {problem}"


def _nvml_problems_of(uuid: str, max_temperature_celsius: float) -> list[str]:
    """The defects that NVML reports of a GPU; none where NVML is absent or does not know it (a MIG slice, say)."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
    except pynvml.NVMLError:
        return []
    return list(nvml_problems(pynvml, handle, max_temperature_celsius))


def nvml_problems(nvml: Any, handle: Any, max_temperature_celsius: float) -> Iterator[str]:
    """Defects that NVML reports; a field that a GPU does not report is no defect."""

    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except nvml.NVMLError:
            return None

    errors = ask(
        lambda: nvml.nvmlDeviceGetTotalEccErrors(handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    )
    if errors:
        yield f"{errors} uncorrected memory errors since the last reset"
    rows = ask(lambda: nvml.nvmlDeviceGetRemappedRows(handle))
    if rows is not None:
        _, _, pending, failed = rows
        if pending:
            yield "memory rows wait to be remapped: it needs a reset"
        if failed:
            yield "remapping of memory rows has failed: it needs a replacement"
    temperature = ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    if temperature is not None and temperature > max_temperature_celsius:
        yield f"{temperature} °C before any work"
    reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    for name, text in (
        ("nvmlClocksThrottleReasonHwThermalSlowdown", "heat"),
        ("nvmlClocksThrottleReasonHwPowerBrakeSlowdown", "the power supply"),
    ):
        if reasons & getattr(nvml, name):
            yield f"clocks are held down by {text}"


def check_disk(folder: Path, min_free_gib: float) -> Iterator[str]:
    """Write, sync and read back a file; free space."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free / 2**30
    if free < min_free_gib:
        yield f"{existing}: {free:.1f} GiB are free, {min_free_gib:g} are asked for"
    path = existing / f".check_node-{node_name()}-{os.getpid()}"
    data = os.urandom(PROBE_BYTES)
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != data:
            yield f"{existing}: a file reads back with other bytes than were written"
    finally:
        path.unlink(missing_ok=True)


def check_network(timeout_seconds: float) -> Iterator[str]:
    """An all-reduce over the tasks of this step, one per node, on GPUs where there are any."""
    if place_from_environment(dict(os.environ)).size == 1:
        return
    world = init_world(timeout_seconds=timeout_seconds)
    try:
        mine = torch.full((1 << 20,), float(world.rank + 1), device=world.device)
        dist.all_reduce(mine)
        expected = world.size * (world.size + 1) / 2
        if not bool((mine == expected).all()):
            yield "an all-reduce over all nodes gives a wrong sum"
    finally:
        close_world()


def _slurm_gpus() -> int | None:
    text = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(text) if text.isdigit() else None


def _problems(check: Callable[[], Iterator[str]]) -> list[str]:
    """A check that itself fails is a fault of the node."""
    began = time.monotonic()
    try:
        return list(check())
    except Exception as error:  # whatever breaks here would break training
        return [
            f"{type(error).__name__} after {time.monotonic() - began:.0f} s: {str(error).splitlines()[0] if str(error) else ''}"
        ]
