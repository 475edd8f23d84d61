"""The device of a rank: GPUs that torch cannot use are an error, and no two ranks share one."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import free_port, run_ranks

from megagpt.config import UserError
from megagpt.distributed import device, node_check, world
from megagpt.distributed.determinism import NCCL_SETTINGS, make_deterministic, use_tf32
from megagpt.distributed.device import choose_device, cores_of_rank, gpus_of_all, promised_gpus, refuse_shared_gpus
from megagpt.distributed.node_check import CheckNodeConfig, check_gpus
from megagpt.distributed.world import World
from megagpt.engine.build import use_cores_for_offload
from megagpt.engine.config import DeepSpeedConfig, EngineConfig, FSDPConfig
from megagpt.generate.sampling import drawing_device


@pytest.mark.parametrize(
    ("local_rank", "wanted", "visible", "promised", "expected"),
    [
        (0, "auto", 0, "", "cpu"),
        (3, "auto", 8, "SLURM_GPUS_ON_NODE=8", "cuda:3"),
        (3, "auto", 1, "SLURM_GPUS_ON_NODE=8", "cuda:0"),
        (0, "cpu", 0, "SLURM_GPUS_ON_NODE=8", "cpu"),
        (1, "cpu", 8, "SLURM_GPUS_ON_NODE=8", "cpu"),
    ],
)
def test_the_device_of_a_rank(local_rank: int, wanted: device.Device, visible: int, promised: str, expected: str) -> None:
    assert choose_device(local_rank, wanted, visible=visible, promised=promised) == torch.device(expected)


def test_gpus_that_torch_cannot_use_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03\nGCC version: 12\n")
    monkeypatch.setattr(device, "DRIVER_FILE", driver)
    with pytest.raises(UserError) as error:
        choose_device(0, "auto", visible=0, promised="SLURM_GPUS_ON_NODE=8")
    assert "SLURM_GPUS_ON_NODE=8" in str(error.value)
    assert torch.__version__ in str(error.value)
    assert "535.54.03" in str(error.value)
    assert "device=cpu" in str(error.value)
    driver.unlink()
    with pytest.raises(UserError, match="no NVIDIA driver is loaded here"):
        choose_device(0, "auto", visible=0, promised="x")
    with pytest.raises(UserError, match="local rank 8 has no GPU: 8 are visible"):
        choose_device(8, "auto", visible=8, promised="")


@pytest.mark.parametrize(
    ("environment", "promised"),
    [
        ({}, ""),
        ({"SLURM_GPUS_ON_NODE": "4"}, "SLURM_GPUS_ON_NODE=4"),
        ({"SLURM_GPUS_ON_NODE": "0"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0"}, ""),  # deepspeed's launcher sets both, with or without GPUs
        ({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0", "SLURM_GPUS_ON_NODE": "2"}, "SLURM_GPUS_ON_NODE=2"),
    ],
)
def test_what_promises_gpus(environment: dict[str, str], promised: str, tmp_path: Path) -> None:
    assert promised_gpus(environment, tmp_path) == promised


def test_a_device_file_promises_gpus_unless_they_are_hidden(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert promised_gpus({}, tmp_path).endswith("nvidiactl exists")
    assert promised_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == ""


def test_ranks_that_share_a_gpu_are_named() -> None:
    refuse_shared_gpus([("n0", "GPU-a"), ("n0", "GPU-b"), ("n1", "GPU-a"), ("n1", "")])
    with pytest.raises(UserError, match="ranks 1, 2 share GPU GPU-b of n0"):
        refuse_shared_gpus([("n0", "GPU-a"), ("n0", "GPU-b"), ("n0", "GPU-b")])


def test_gpus_are_compared_before_there_is_a_group() -> None:
    """NCCL refuses a GPU that two ranks have without naming it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [dist.TCPStore("127.0.0.1", store.port, is_master=False) for _ in range(3)]
    with ThreadPoolExecutor(3) as ranks:
        own = [("n0", "GPU-a"), ("n0", "GPU-b"), ("n1", "GPU-a")]
        found = list(ranks.map(lambda rank: gpus_of_all(clients[rank], rank, 3, own[rank]), range(3)))
    assert found == [own] * 3


def test_a_rank_that_sees_one_gpu_keeps_its_number_on_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """LOCAL_RANK is the GPU's, which DeepSpeed reads; the number decides which rank of a node serves and reads for it."""
    monkeypatch.setattr(world, "choose_device", lambda *_, **__: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(world, "own_gpu", lambda _: ("n0", "GPU-a"))
    joined: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: joined.update(options, backend=backend))
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(world.StopRequest, "install", lambda self: None)
    assert world.init_world().local_rank == 3
    assert os.environ["LOCAL_RANK"] == "0"
    assert (joined["backend"], joined["rank"], joined["world_size"]) == ("cpu:gloo,cuda:nccl", 0, 1)


@pytest.mark.parametrize(
    ("environment", "cores", "gpus", "expected"),
    [
        ({"SRUN_CPUS_PER_TASK": "12"}, 12, 1, 12),
        ({"SRUN_CPUS_PER_TASK": "12"}, 4, 8, 4),  # bound to fewer
        ({"SLURM_CPUS_PER_TASK": "6"}, 96, 8, 6),
        ({}, 96, 8, 12),
        ({}, 4, 8, 1),
        ({"SRUN_CPUS_PER_TASK": ""}, 16, 0, 16),
    ],
)
def test_the_cores_of_a_rank(environment: dict[str, str], cores: int, gpus: int, expected: int) -> None:
    assert cores_of_rank(environment, cores, gpus) == expected


@pytest.mark.parametrize(
    ("engine", "kind", "expected"),
    [
        (FSDPConfig(cpu_offload=True), "cuda", 2),
        (DeepSpeedConfig(zero_stage=2, offload_optimizer=True), "cuda", 2),
        (FSDPConfig(), "cuda", 1),
        (FSDPConfig(cpu_offload=True), "cpu", 1),
    ],
)
def test_offloaded_states_are_updated_by_all_cores_of_a_rank(
    engine: EngineConfig, kind: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRUN_CPUS_PER_TASK", "2")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        use_cores_for_offload(engine, torch.device(kind))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_node_without_nvmls_module_is_not_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert node_check._nvml_problems_of("GPU-a", 90.0) == []


def device_or_error(world: World) -> str:
    return str(world.device)


@pytest.mark.slow
def test_promised_gpus_stop_every_rank_and_device_cpu_means_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_ranks(device_or_error, 2, tmp_path / "plain") == ["cpu", "cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(AssertionError, match="torch cannot use the GPUs of this machine"):
        run_ranks(device_or_error, 2, tmp_path / "promised")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a usable GPU")
def test_the_node_check_says_why_torch_cannot_use_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert list(check_gpus(CheckNodeConfig())) == []
    [problem] = check_gpus(CheckNodeConfig(num_gpus=2))
    assert problem.startswith("torch cannot use the GPUs (num_gpus=2): torch ")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    [problem] = check_gpus(CheckNodeConfig())
    assert "SLURM_GPUS_ON_NODE=8" in problem


def test_a_site_profile_cannot_undo_determinism(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.delenv("NCCL_PROTO", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        make_deterministic()
        assert {name: os.environ[name] for name in NCCL_SETTINGS} == NCCL_SETTINGS
        assert "NCCL_ALGO=Tree of the environment becomes Ring" in caplog.text
        assert drawing_device(torch.device("cuda")) == torch.device("cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert drawing_device(torch.device("cuda")) == torch.device("cuda")


def test_tf32_is_on_where_a_run_asks_for_it() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for wanted, precision in ((True, "high"), (False, "highest")):
            use_tf32(wanted)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
