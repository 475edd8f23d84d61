"""Seconds on a device: with events, of which a GPU's are played here by a clock that the test moves."""

import pytest
import torch

from megagpt.distributed.device_timer import DeviceTimer


class Device:
    """A device that is `now` as far: events pass when it comes to the place where they were recorded."""

    def __init__(self) -> None:
        self.launched, self.now, self.made = 0.0, 0.0, 0

    def event(self, *, enable_timing: bool) -> "Event":
        assert enable_timing
        self.made += 1
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.at = self.device.launched

    def query(self) -> bool:
        return self.device.now >= self.at

    def elapsed_time(self, last: "Event") -> float:
        return (last.at - self.at) * 1000


def test_the_devices_time_counts_once_it_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    timer = DeviceTimer(torch.device("cuda", 0))
    for seconds in (2.0, 3.0):
        with timer():
            device.launched += seconds
        device.launched += 10.0
    assert (timer.seconds, timer.count) == (0.0, 0)
    device.now = 2.0
    assert (timer.seconds, timer.count) == (2.0, 1)
    device.now = 20.0
    assert (timer.seconds, timer.count) == (5.0, 2)
    with timer():
        device.launched += 1.0
    device.now = 30.0
    assert (timer.seconds, timer.count, device.made) == (6.0, 3, 4)


def test_a_cpu_counts_the_hosts_time() -> None:
    timer = DeviceTimer(torch.device("cpu"))
    assert (timer.seconds, timer.count) == (0.0, 0)
    with timer():
        sum(range(10_000))
    assert timer.seconds > 0
    assert timer.count == 1
