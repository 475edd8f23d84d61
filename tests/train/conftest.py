"""What the tests of training share: small shards, and an end to every process that a test started."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import STARTED, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    while STARTED:
        STARTED.pop().kill()
