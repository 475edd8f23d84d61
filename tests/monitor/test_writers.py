"""Further writers: each row once, none slows training, what fails or hangs is left."""

import contextlib
import errno
import os
import socket
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from megagpt.config import UserError
from megagpt.monitor import config as config_module
from megagpt.monitor.config import MonitorConfig, check_monitor
from megagpt.monitor.metrics import METRICS_FILE, read_metrics
from megagpt.monitor.monitor import LineFile, Monitor
from megagpt.monitor.prometheus import PrometheusWriter, metric_name
from megagpt.monitor.tensorboard import FOLDER
from megagpt.monitor.writers import BackgroundWriter, flat


class Kept:
    """A writer that keeps rows; `gate` holds it up, `fail_at` makes it raise."""

    name = "kept"

    def __init__(self, *, fail_at: int = -1, gate: threading.Event | None = None) -> None:
        self.rows: list[tuple[str, int, dict[str, Any]]] = []
        self.closed, self._fail_at, self._gate = 0, fail_at, gate

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._gate is not None:
            self._gate.wait()
        if step == self._fail_at:
            raise OSError(errno.ENOSPC, "no space left on device")
        self.rows.append((kind, step, values))

    def close(self) -> None:
        self.closed += 1


def test_rows_arrive_in_order_and_the_end_waits_for_them() -> None:
    kept = Kept()
    writer = BackgroundWriter(kept)
    for step in range(500):
        writer.put("train", step, {"loss": step})
    writer.close(30)
    writer.close(30)
    assert kept.rows == [("train", step, {"loss": step}) for step in range(500)]
    assert (kept.closed, writer.dropped, writer.failed) == (1, 0, False)


def test_a_failing_writer_is_named_once_and_closed(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(fail_at=3)
    writer = BackgroundWriter(kept)
    for step in range(6):
        writer.put("train", step, {})
    writer.close(30)
    assert [step for _, step, _ in kept.rows] == [0, 1, 2]
    assert (kept.closed, writer.failed) == (1, True)
    assert caplog.messages == [
        "kept failed ([Errno 28] no space left on device): this attempt sends it no more rows; metrics.jsonl is complete"
    ]


def test_a_hanging_writer_drops_and_counts_and_is_left(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    kept = Kept(gate=gate)
    writer = BackgroundWriter(kept, max_rows=5)
    began = time.monotonic()
    for step in range(100):
        writer.put("train", step, {})
    writer.close(0.2)
    assert time.monotonic() - began < 10
    assert writer.dropped in (94, 95)  # five wait, and one may be with the writer already
    assert caplog.messages == [
        "kept does not keep up: 1 rows dropped; metrics.jsonl has them",
        "kept did not end within 0 s and is abandoned; metrics.jsonl is complete",
        f"kept: {writer.dropped} rows of this attempt were dropped; metrics.jsonl has them",
    ]
    gate.set()
    writer._thread.join(30)
    steps = [step for _, step, _ in kept.rows]
    assert steps[:5] == [0, 1, 2, 3, 4]  # a sixth is whichever came when the writer took the first
    assert len(steps) == 100 - writer.dropped
    assert steps == sorted(set(steps))
    assert kept.closed == 1


def test_training_goes_on_beside_a_hanging_writer(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, MonitorConfig(close_seconds=0.2), run_config={}, rank=0)
    gate = threading.Event()
    monitor._writers.append(BackgroundWriter(Kept(gate=gate), max_rows=2))
    began = time.process_time()
    for step in range(300):
        monitor.log("train", step, loss=1.0)
    monitor.close()
    gate.set()
    assert time.process_time() - began < 5
    assert [row["step"] for row in read_metrics(tmp_path).rows] == list(range(300))


def test_nested_values_are_flat() -> None:
    values = {"loss": 1.0, "sources": {"wiki": {"loss": 2.0}}, "skipped": [1]}
    assert flat("train", values) == [("train/loss", 1.0), ("train/sources/wiki/loss", 2.0)]


@pytest.mark.parametrize(
    ("options", "package", "setting"),
    [
        ({"tensorboard": True}, "tensorboard", "monitor.tensorboard=true"),
        ({"prometheus_port": 9400}, "prometheus_client", "monitor.prometheus_port=9400"),
    ],
)
def test_a_missing_package_is_said_before_the_run(
    options: dict[str, Any], package: str, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    message = rf"^{setting}: the package {package} is not installed \(pip install -c constraints\.txt '\.\[monitor\]'\)$"
    with pytest.raises(UserError, match=message):
        check_monitor(MonitorConfig.model_validate(options))
    check_monitor(MonitorConfig())


# TensorBoard


def test_tensorboard_reads_every_step_once_over_a_restart_and_a_rewind(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # from step 20 on, a second attempt does 30 and 40 again, and is set back to 40 by the guard
    first = [("start", 0), *(("train", step) for step in (10, 20, 30, 40))]
    second = [("start", 20), *(("train", step) for step in (30, 40, 50)), ("rewind", 40), ("train", 50), ("train", 60)]
    for kinds in (first, second):
        monitor = Monitor(tmp_path, MonitorConfig(tensorboard=True), run_config={}, rank=0)
        for kind, step in kinds:
            monitor.log(kind, step, loss=step / 2, text="x", grad_norm=float("nan"), sources={"wiki": {"loss": 1.5}})
        monitor.close()
        time.sleep(1.1)  # the files' names hold the second
    assert len(list((tmp_path / FOLDER).glob("events.out.tfevents.*"))) == 2
    events = EventAccumulator(str(tmp_path / FOLDER)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, step / 2) for step in (10, 20, 30, 40, 50, 60)
    ]
    assert {event.value for event in events.Scalars("train/sources/wiki/loss")} == {1.5}
    assert "train/grad_norm" not in events.Tags()["scalars"]


# Prometheus


def scrape(port: int) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {f"{sample.name}{sorted(sample.labels.items())}": sample.value for family in families for sample in family.samples}


def test_prometheus_gets_the_last_row_of_each_kind_and_the_gpus() -> None:
    gpus = {"0": {"power_watts": 640.0, "throttled": "thermal"}, "1": {"power_watts": 655.5, "sm_clock_mhz": 1980}}
    writer = PrometheusWriter(0, "127.0.0.1", {"run": "plays"}, lambda: gpus)
    try:
        writer.write("train", 10, {"loss": 3.5, "old": 1.0, "step_time": {"median_seconds": 0.25}, "slow": "rank 3"})
        writer.write("evaluate", 10, {"loss": 3.25})
        writer.write("train", 20, {"loss": 3.0, "step_time": {"median_seconds": 0.5}})
        found = scrape(writer.port)
    finally:
        writer.close()
    times = {name for name in found if "time_seconds" in name}
    assert {name: value for name, value in found.items() if name not in times} == {
        "megagpt_train_loss[('run', 'plays')]": 3.0,
        "megagpt_train_step[('run', 'plays')]": 20.0,
        "megagpt_train_step_time_median_seconds[('run', 'plays')]": 0.5,
        "megagpt_evaluate_loss[('run', 'plays')]": 3.25,
        "megagpt_evaluate_step[('run', 'plays')]": 10.0,
        "megagpt_gpu_power_watts[('gpu', '0'), ('run', 'plays')]": 640.0,
        "megagpt_gpu_power_watts[('gpu', '1'), ('run', 'plays')]": 655.5,
        "megagpt_gpu_sm_clock_mhz[('gpu', '1'), ('run', 'plays')]": 1980.0,
    }
    assert len(times) == 2
    with pytest.raises(OSError):
        scrape(writer.port)


def test_sources_whose_names_become_one_for_prometheus_are_told_apart() -> None:
    writer = PrometheusWriter(0, "127.0.0.1", {"run": "plays"}, dict)
    try:
        writer.write("train", 10, {"sources": {"a-b": {"loss": 3.0}, "a_b": {"loss": 2.0}, "c-d": {"loss": 1.0}}})
        both = scrape(writer.port)
        writer.write("train", 20, {"sources": {"a_b": {"loss": 1.5}}})
        one = scrape(writer.port)
    finally:
        writer.close()
    shared = "megagpt_train_sources_a_b_loss[('run', 'plays'), ('value', 'train/sources/{}/loss')]"
    assert {name: value for name, value in both.items() if "sources" in name} == {
        shared.format("a-b"): 3.0,
        shared.format("a_b"): 2.0,
        "megagpt_train_sources_c_d_loss[('run', 'plays')]": 1.0,
    }
    assert {name: value for name, value in one.items() if "sources" in name} == {shared.format("a_b"): 1.5}


def test_names_for_prometheus() -> None:
    assert metric_name("evaluate/sources/wiki-de/loss") == "megagpt_evaluate_sources_wiki_de_loss"


@pytest.mark.parametrize(("rank", "local_rank", "serves"), [(0, None, True), (8, 0, True), (9, 1, False), (9, None, False)])
def test_one_endpoint_per_node_on_this_machine(tmp_path: Path, rank: int, local_rank: int | None, serves: bool) -> None:
    monitor = Monitor(tmp_path, MonitorConfig(prometheus_port=0), run_config={}, rank=rank, local_rank=local_rank)
    try:
        assert len(monitor._writers) == serves
        for writer in monitor._writers:
            assert writer.writer._server.server_address[0] == "127.0.0.1"  # type: ignore[attr-defined]
    finally:
        monitor.close()


def test_a_taken_port_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        monitor = Monitor(tmp_path, MonitorConfig(prometheus_port=port), run_config={}, rank=0)
        monitor.log("train", 1, loss=1.0)
        monitor.close()
    (message,) = [message for message in caplog.messages if "prometheus" in message]
    assert message.startswith(f"monitor.prometheus_port={port}: no endpoint on 127.0.0.1 for this attempt: ")
    assert read_metrics(tmp_path).last_step == 1


# metrics.jsonl on a full disk


def test_rows_are_kept_while_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FullDisk:
        """Takes `room` bytes, then fails as a full disk does: what still fits is written first."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 10

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = self.file.write(data[: self.room])
            self.room -= written
            return written

        def close(self) -> None:
            self.file.close()

    path = tmp_path / METRICS_FILE
    path.write_bytes(b"torn")
    lines = LineFile(path)
    disk = lines._file = FullDisk(lines._file)
    lines.append(b"first line\n")
    lines.append(b"second line\n")
    assert path.read_bytes() == b"torn\nfirst lin"
    disk.room = 1000
    lines.append(b"third line\n")
    lines.close()
    assert path.read_bytes() == b"torn\nfirst line\nsecond line\nthird line\n"
    assert [message.removeprefix(f"{path}: ") for message in caplog.messages] == [
        "No space left on device: rows are kept in memory; training continues",
        "written again, 0 rows are lost",
    ]
