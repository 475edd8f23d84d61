"""Sizes as messages show them."""

import pytest

from megagpt.files import show_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (412_345, "412 KB"),
        (99_440, "99.4 KB"),
        (999_600, "1.0 MB"),
        (1.3e9, "1.3 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes_are_shown_in_a_unit_that_says_something(count: float, text: str) -> None:
    assert show_bytes(count) == text
