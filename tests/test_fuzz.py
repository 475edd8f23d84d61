"""A short form of tests/soak/fuzz.py: the same inputs each time, since the seed and their number are fixed."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "soak"))

import fuzz

INPUTS = {
    "warc": 20_000,
    "http": 200_000,
    "html": 20_000,
    "wikitext": 25_000,
    "documents": 60_000,
    "shards": 10_000,
    "checkpoints": 400,
    "configs": 20_000,
}
"""Half a minute of each on one core."""


def test_every_target_has_a_short_form() -> None:
    assert INPUTS.keys() == fuzz.TARGETS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("target", INPUTS)
def test_the_short_form_of_fuzzing(target: str, tmp_path: Path) -> None:
    row = fuzz.fuzz(target, tmp_path, seconds=150, runs=INPUTS[target])
    assert row["fault"] == ""
    assert row["inputs"] > INPUTS[target] // 10
    assert row["peak_memory_mb"] < fuzz.MAX_MEGABYTES
