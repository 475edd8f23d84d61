"""Read GPUs through NVML: utilisation, memory, power, energy, temperature, clocks and reasons for low clocks, ECC errors,
row remaps, NVLink and PCIe traffic."""

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_THROTTLE_REASONS = {
    "nvmlClocksEventReasonSwPowerCap": "power_cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware_slowdown",
    "nvmlClocksEventReasonSwThermalSlowdown": "thermal",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "hardware_thermal",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power_brake",
}
"""NVML's name of a reason for low clocks -> ours. Idle and user-set clocks are not listed."""

ALL_LINKS = 2**32 - 1
"""NVML's scope for a field summed over all NVLinks of a GPU. Such a field counts KiB since the driver was loaded."""


def open_gpu(device: "torch.device") -> Any | None:
    """NVML's handle of a CUDA device; None, with a warning, without NVML or if it does not know the device."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        log.warning("no GPU readings: the module pynvml (package nvidia-ml-py) is not installed")
        return None
    import torch

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
    except pynvml.NVMLError as error:
        log.warning("no GPU readings: %s", error)
        return None


def read_gpu(handle: Any, device: "torch.device") -> dict[str, float | str]:
    """The current readings and the allocator's peak. It takes about a millisecond and does not synchronise the device."""
    import torch

    return {"peak_allocated_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2), **read_device(handle)}


def read_device(handle: Any, *, pcie: bool = False) -> dict[str, float | str]:
    """NVML's current readings of one GPU, by name with unit; readings that it does not report are left out.

    pcie: also read PCIe traffic, for which NVML waits 20 ms per direction: only for threads beside training.
    """
    import pynvml

    def memory() -> float:
        return round(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / 2**30, 2)

    def throttled() -> str:
        mask = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return ",".join(ours for theirs, ours in _THROTTLE_REASONS.items() if mask & getattr(pynvml, theirs))

    def uncorrected() -> int:
        kind, counter = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        return int(pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, counter))

    def remapped() -> int:
        corrected, uncorrected, _, _ = pynvml.nvmlDeviceGetRemappedRows(handle)
        return int(corrected) + int(uncorrected)

    def nvlink(field: int) -> float:
        (value,) = pynvml.nvmlDeviceGetFieldValues(handle, [(field, ALL_LINKS)])
        pynvml._nvmlCheckReturn(value.nvmlReturn)  # type: ignore[attr-defined]
        return round(value.value.ullVal / 2**20, 3)

    def pcie_traffic(counter: int) -> float:
        return round(pynvml.nvmlDeviceGetPcieThroughput(handle, counter) / 2**20, 4)

    def remap_state(number: int) -> int:
        return int(bool(pynvml.nvmlDeviceGetRemappedRows(handle)[number]))

    readings: dict[str, Callable[[], float | str]] = {
        "utilisation_percent": lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_used_gib": memory,
        "power_watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "energy_joules": lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
        "temperature_celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "throttled": throttled,
        "uncorrected_ecc_errors": uncorrected,
        "remapped_rows": remapped,
        "remap_pending": lambda: remap_state(2),
        "remap_failed": lambda: remap_state(3),
        "nvlink_sent_gib": lambda: nvlink(pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX),
        "nvlink_received_gib": lambda: nvlink(pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX),
    }
    if pcie:
        readings["pcie_sent_gib_per_second"] = lambda: pcie_traffic(pynvml.NVML_PCIE_UTIL_TX_BYTES)
        readings["pcie_received_gib_per_second"] = lambda: pcie_traffic(pynvml.NVML_PCIE_UTIL_RX_BYTES)
    result: dict[str, float | str] = {}
    for name, reading in readings.items():
        try:
            result[name] = reading()
        except pynvml.NVMLError:
            continue
    return result


def read_node() -> dict[str, dict[str, float | str]]:
    """The readings of all GPUs of this node that NVML shows, by number; {} without NVML. Only for threads beside training."""
    try:
        import pynvml
    except ImportError:
        return {}
    found = {}
    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            found[str(number)] = read_device(pynvml.nvmlDeviceGetHandleByIndex(number), pcie=True)
    except pynvml.NVMLError:
        pass  # a GPU has fallen off the bus, or there is no driver: keep what was read
    return found


SUMMARISED = (
    "utilisation_percent",
    "memory_used_gib",
    "power_watts",
    "temperature_celsius",
    "sm_clock_mhz",
    "pcie_sent_gib_per_second",
    "pcie_received_gib_per_second",
)
NAMED = 8
"""Most GPUs that a summary names."""


def summarise_nodes(nodes: Iterable[tuple[str, Mapping[str, Mapping[str, float | str]]]]) -> dict[str, Any]:
    """Summarise (host, its read_node()) of all nodes: median, minimum and maximum of each reading, with the GPUs of the last
    two; and which GPUs are throttled, have uncorrected ECC errors or remapped rows. {} if no GPU was read."""
    gpus = [(f"{host} gpu {number}", readings) for host, node in nodes for number, readings in node.items()]
    summary: dict[str, Any] = {"gpus": len(gpus)} if gpus else {}
    for name in SUMMARISED:
        values = [(float(readings[name]), gpu) for gpu, readings in gpus if name in readings]
        if values:
            (least, of_least), (most, of_most) = min(values), max(values)
            median = statistics.median(value for value, _ in values)
            summary[name] = {"median": median, "min": least, "min_gpu": of_least, "max": most, "max_gpu": of_most}
    for name in ("throttled", "uncorrected_ecc_errors", "remapped_rows", "remap_pending", "remap_failed"):
        named = [f"{gpu}: {readings[name]}" for gpu, readings in gpus if readings.get(name)]
        if named:
            more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
            summary[name] = "; ".join(named[:NAMED]) + more
    return summary
