"""Progress lines say what is counted, and nothing else."""

import logging

import pytest

from megagpt.corpus.runner import progress
from megagpt.corpus.runner.progress import Progress


def test_a_line_shows_what_was_counted(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "megagpt")
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with Progress("filter", 4_000_000) as bar:
        bar.add(1_000_000, kept=1200, rejected=7)
        bar.add(1_000_000, kept=1, rejected=0)
    with Progress("dedup: bands", 100) as bar:
        bar.add(100)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("filter: 25 %, ")
    assert [line.partition(" left")[2] for line in lines] == [
        ", 1,200 kept, 7 rejected",
        *2 * [", 1,201 kept, 7 rejected"],
        "",
        "",
    ]
    assert lines[-1].startswith("dedup: bands: 100 %, ")
