"""GPU readings through the real pynvml, which loads a library of our own in place of NVIDIA's."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megagpt.monitor.nvml import summarise_nodes

LIBRARY = r"""
// Two GPUs. The second one answers NVML_ERROR_GPU_IS_LOST (15) where FAKE_NVML says so, and has no NVLink (3).
#include <stdlib.h>
#include <string.h>
static int lost(void *device, const char *name) {
    const char *which = getenv("FAKE_NVML");
    return device == (void *)2 && which && strstr(which, name) ? 15 : 0;
}
#define OR_LOST(name) int error = lost(device, name); if (error) return error;
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) {
    *device = (void *)(unsigned long)(i + 1);
    return lost(*device, "handle");
}
typedef unsigned long long wide;
int nvmlDeviceGetUtilizationRates(void *device, unsigned *r) { OR_LOST("utilisation") r[0] = 97; r[1] = 40; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, wide *bytes) {
    bytes[0] = 80ull << 30; bytes[1] = 20ull << 30; bytes[2] = 60ull << 30;
    return 0;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *mw) { OR_LOST("power") *mw = 640500; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, wide *mj) { OR_LOST("energy") *mj = 5000000000000ull; return 0; }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *c) { OR_LOST("temperature") *c = 71; return 0; }
int nvmlDeviceGetClockInfo(void *device, int clock, unsigned *mhz) { OR_LOST("clock") *mhz = clock == 1 ? 1755 : 0; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, wide *mask) { *mask = device == (void *)2 ? 0x24 : 0; return 0; }
int nvmlDeviceGetRemappedRows(void *device, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    OR_LOST("rows") *corrected = 1; *uncorrected = 2; *pending = 1; *failed = 0;
    return 0;
}
int nvmlDeviceGetPcieThroughput(void *device, int counter, unsigned *kib) {
    OR_LOST("pcie") *kib = counter == 0 ? 3 << 20 : 1 << 19;
    return 0;
}
typedef struct { unsigned field, scope; long long at; long took; unsigned kind, error; wide value; } Field;
int nvmlDeviceGetFieldValues(void *device, int count, Field *fields) {
    for (int i = 0; i < count; i++) {
        if (fields[i].scope != 0xffffffffu || fields[i].field < 138 || fields[i].field > 139) return 2;
        fields[i].value = fields[i].field == 138 ? 5ull << 20 : 7ull << 19;
        fields[i].error = device == (void *)2 ? 3 : 0;
    }
    return 0;
}
int nvmlDeviceGetTotalEccErrors(void *device, int kind, int counter, wide *n) {
    *n = kind == 1 && counter == 0 ? 3 : 99;
    return 0;
}
"""

WHOLE: dict[str, Any] = {
    "utilisation_percent": 97,
    "memory_used_gib": 60.0,
    "power_watts": 640.5,
    "energy_joules": 5e9,
    "temperature_celsius": 71,
    "sm_clock_mhz": 1755,
    "throttled": "",
    "uncorrected_ecc_errors": 3,
    "remapped_rows": 3,
    "remap_pending": 1,
    "remap_failed": 0,
    "pcie_sent_gib_per_second": 3.0,
    "pcie_received_gib_per_second": 0.5,
}
NVLINK = {"nvlink_sent_gib": 5.0, "nvlink_received_gib": 3.5}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(LIBRARY)
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(folder / "nvml.c")]
    subprocess.run(command, check=True)
    return folder


def read(library: Path, lost: str = "") -> dict[str, dict[str, Any]]:
    code = "import json; from megagpt.monitor.nvml import read_node; print(json.dumps(read_node()))"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "FAKE_NVML": lost}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_every_gpu_of_the_node_is_read_and_what_is_absent_is_left_out(library: Path) -> None:
    assert read(library) == {"0": WHOLE | NVLINK, "1": {**WHOLE, "throttled": "power_cap,thermal"}}


def test_a_gpu_that_fails_half_way_keeps_what_it_said(library: Path) -> None:
    found = read(library, "power,energy,clock,rows,pcie")
    assert found["0"] == WHOLE | NVLINK
    missing = {"power_watts", "energy_joules", "sm_clock_mhz", *(name for name in WHOLE if name.startswith(("remap", "pcie")))}
    kept = {name: value for name, value in WHOLE.items() if name not in missing}
    assert found["1"] == {**kept, "throttled": "power_cap,thermal"}


def test_a_gpu_that_is_lost_does_not_hide_the_others(library: Path) -> None:
    assert read(library, "handle") == {"0": WHOLE | NVLINK}


def test_without_a_library_there_are_no_readings(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"")
    assert read(tmp_path) == {}


def test_the_summary_of_nodes_names_the_extremes_and_the_faults() -> None:
    nodes = [(f"n{i}", {str(j): {"power_watts": 600.0 + 10 * i + j, "throttled": ""} for j in range(2)}) for i in range(3)]
    nodes[1][1]["1"] |= {"throttled": "thermal", "uncorrected_ecc_errors": 2}
    nodes[2][1]["0"] = {"uncorrected_ecc_errors": 0}
    assert summarise_nodes(nodes) == {
        "gpus": 6,
        "power_watts": {"median": 610.0, "min": 600.0, "min_gpu": "n0 gpu 0", "max": 621.0, "max_gpu": "n2 gpu 1"},
        "throttled": "n1 gpu 1: thermal",
        "uncorrected_ecc_errors": "n1 gpu 1: 2",
    }
    assert summarise_nodes([]) == {}
    many = [("n0", {str(j): {"throttled": "thermal"} for j in range(10)})]
    assert summarise_nodes(many)["throttled"].endswith("n0 gpu 7: thermal; and 2 more")
