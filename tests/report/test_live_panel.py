"""The panel on the terminal of the training: drawn as rows come, log lines above it, nothing of it elsewhere."""

import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from megagpt.monitor.config import MonitorConfig
from megagpt.monitor.metrics import read_metrics
from megagpt.monitor.monitor import Monitor
from megagpt.report import live_panel
from megagpt.report.live_panel import LivePanel, pause_after


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[bytearray, TextIO]]:
    """What has been written to it, and the file to write to."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    reading, writing = os.openpty()
    written = bytearray()

    def drain() -> None:  # a terminal takes 4 KiB, then writers wait
        with contextlib.suppress(OSError):
            while piece := os.read(reading, 1 << 16):
                written.extend(piece)

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(writing, "w", buffering=1) as stream:
        yield written, stream
    reader.join(10)
    os.close(reading)


def train(run_dir: Path, *, is_on: bool) -> None:
    """A run that logs five rows, and a line in between."""
    config = MonitorConfig(panel=is_on)
    monitor = Monitor(run_dir, config, run_config={}, rank=0, max_steps=5, open_panel=LivePanel)
    monitor.log("start", 0, tokens=0, resumed=False)
    for step in range(1, 6):
        monitor.log("train", step, loss=5.5 - step, tokens=step * 100)
        logging.getLogger("megagpt").warning("noticed at step %d", step)
    monitor.log("done", 5)
    monitor.close()
    assert len(read_metrics(run_dir).of_kind("train")) == 5


def test_rows_are_drawn_and_log_lines_stand_above(
    tmp_path: Path, terminal: tuple[bytearray, TextIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, stream = terminal
    monkeypatch.setattr(sys, "stderr", stream)  # not in the fixture: pytest sets it anew for the call
    monkeypatch.setattr(live_panel, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(live_panel, "SHARE", 1e9)
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        train(tmp_path, is_on=True)
    finally:
        logging.getLogger().removeHandler(handler)
    assert sys.stderr is stream, "as before"
    assert handler.stream is stream
    time.sleep(0.2)  # until it is read
    shown = written.decode()
    assert "0.5000" in shown
    assert "finished" in shown
    assert "╭" in shown
    assert all(f"noticed at step {step}\r\n" in shown for step in range(1, 6))
    assert "train 3/5" not in shown, "the panel shows the rows"


def test_without_the_setting_or_a_terminal_rows_are_lines(
    tmp_path: Path, terminal: tuple[bytearray, TextIO], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal[1])
    train(tmp_path / "off", is_on=False)
    time.sleep(0.2)
    shown = terminal[0].decode()
    assert "train 3/5" in shown
    assert "╭" not in shown
    text = io.StringIO()
    monkeypatch.setattr(sys, "stderr", text)
    with caplog.at_level(logging.INFO):
        train(tmp_path / "no terminal", is_on=True)
    assert "train 3/5" in caplog.text
    assert "╭" not in text.getvalue() + caplog.text


def test_dear_drawings_are_rare() -> None:
    assert pause_after(0.001) == 2.0
    assert pause_after(0.1) == pytest.approx(20.0)
