"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real dumps; a test that takes it carries the mark `realdata`."""
    folder = Path(os.environ.get("MEGAGPT_TEST_DATA", PROJECT.parent / "shared" / "data"))
    if not (folder / "MANIFEST.tsv").is_file():
        pytest.skip(f"real test data is not at {folder}; set MEGAGPT_TEST_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def project() -> Path:
    """The project's root."""
    return PROJECT
