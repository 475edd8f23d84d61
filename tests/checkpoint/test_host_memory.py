"""Host memory for background saves: one block, exactly as large as needed, counted against what a node has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from megagpt.checkpoint.host_memory import HostCopy, available_bytes, bytes_of_copy, lock_pages, refuse_full_nodes
from megagpt.config import UserError
from megagpt.engine.base import Partition

MIB = 2**20


class Driver:
    """The part of CUDA's runtime that locks pages."""

    def __init__(self, error: int = 0) -> None:
        self.locked: dict[int, int] = {}
        self.error = error

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if not self.error:
            self.locked[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    played = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: played)
    return played


def test_all_parts_are_in_one_block_of_their_size_which_is_kept(driver: Driver) -> None:
    lengths = {"param.a": 1025, "exp_avg.a": 7, "param.none": 0, "exp_avg_sq.a": 3_000_000}
    memory = HostCopy()
    parts = memory.parts(lengths, page_locked=True)
    assert {name: len(part) for name, part in parts.items()} == lengths
    first = parts["param.a"]
    assert driver.locked == {first.data_ptr(): 4 * sum(lengths.values())}
    assert parts["exp_avg.a"].data_ptr() == first.data_ptr() + 4 * 1025
    parts["exp_avg_sq.a"].fill_(3)
    again = memory.parts(lengths, page_locked=True)
    assert again["exp_avg_sq.a"].data_ptr() == parts["exp_avg_sq.a"].data_ptr()
    assert bool((again["exp_avg_sq.a"] == 3).all())
    other = memory.parts({"param.a": 5}, page_locked=True)
    assert driver.locked == {other["param.a"].data_ptr(): 20}
    memory.release()
    assert driver.locked == {}
    assert HostCopy().parts({}, page_locked=True) == {}
    HostCopy().parts(lengths, page_locked=False)
    assert driver.locked == {}


def test_a_driver_that_refuses_is_a_warning(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.error = 2
    assert lock_pages(torch.empty(1 << 20)) is None
    assert "4.2 MB of host memory cannot be page-locked (2)" in caplog.text


def test_a_rank_copies_what_it_writes() -> None:
    parts = {"param.a": Partition(torch.zeros(10), 0, 10), "param.b": Partition(torch.zeros(9), 0, 9, copy=1, copies=2)}
    assert bytes_of_copy(parts) == 4 * (10 + 5)


def test_a_node_with_too_little_memory_is_refused() -> None:
    ranks = [("n1", 60, 100), ("n2", 60, 125), ("n2", 60, 121)]
    refuse_full_nodes(ranks)
    with pytest.raises(UserError, match=r"the copies of 2 ranks on n2 need .* of host memory.*save_in_background=false"):
        refuse_full_nodes([*ranks[:2], ("n2", 62, 121)])


def write_group(folder: Path, limit: str, current: int, cached: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 1\nactive_file {cached}\ninactive_file 0\n")


def test_the_limit_of_a_job_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free: Any = SimpleNamespace(available=1000 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    own = tmp_path / "own"
    assert available_bytes(tmp_path / "groups", own) == 1000 * MIB
    own.write_text("4:memory:/old\n")
    assert available_bytes(tmp_path / "groups", own) == 1000 * MIB
    own.write_text("0::/job_7/step_0\n")
    write_group(tmp_path / "groups" / "job_7" / "step_0", "max", 0, 0)
    assert available_bytes(tmp_path / "groups", own) == 1000 * MIB
    write_group(tmp_path / "groups" / "job_7", str(500 * MIB), 300 * MIB, 100 * MIB)
    assert available_bytes(tmp_path / "groups", own) == 300 * MIB
    free.available = 200 * MIB
    assert available_bytes(tmp_path / "groups", own) == 200 * MIB
