"""A short form of tests/soak/rough_treatment.py: one or two trials of each kind."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "soak"))

import rough_treatment

SHORT = (
    "record_of_a_finished_file_is_lost",
    "finished_file_is_flipped",
    "state_of_a_checkpoint_is_altered",
    "page_of_open_elements",
    "bz2_of_4_gb",
    "checkpoint_with_a_hidden_size_of_1e9",
    "owner_with_a_text_for_a_number",
    "one_core_umask_077_turkish_no_home",
)


@pytest.mark.slow
def test_the_short_form_of_rough_treatment(tmp_path: Path) -> None:
    rows = rough_treatment.run_trials(tmp_path / "rough", SHORT)
    assert [row for row in rows if not row["passed"]] == []


def test_every_trial_says_what_is_right() -> None:
    assert all(kind and right and function.__name__ == name for name, (kind, right, function) in rough_treatment.TRIALS.items())
    assert {*SHORT} <= rough_treatment.TRIALS.keys()
    kinds = {kind for kind, _, _ in rough_treatment.TRIALS.values()}
    assert {rough_treatment.TRIALS[name][0] for name in SHORT} == kinds
