"""The file of a checkpoint's evaluations, run_dir/evaluations/step_<step>.json: one result for each thing that was measured.

A result is kept under a digest of what it was measured on (`measured`: checkpoint, validation set, task files, samples). The
same measurement replaces its result; any other one stands beside it.
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megagpt.files import read_json, write_json

log = logging.getLogger(__name__)

FORMAT = 2


def keep_result(path: Path, result: dict[str, Any]) -> None:
    """Add a result, with `step` and `measured`, to the file, or replace that of the same measurement. Results that several
    processes add at the same time are all kept."""
    key = hashlib.sha256(json.dumps(result["measured"], sort_keys=True).encode()).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(path.with_name(".lock")):
        others = {name: found for name, found in _read(path).items() if name != key}
        write_json(path, {"format": FORMAT, "step": result["step"], "results": {**others, key: result}})


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same file."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a network disk without locks
            log.warning("%s: %s: results that are written at the same time may be lost", lock, error.strerror)
        yield


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a file, the last written one last; [] if there is no file. Release 0.1 wrote one, without `measured`."""
    return list(_read(path).values())


def measured_checkpoint(result: dict[str, Any]) -> str | None:
    """The sha256 of the manifest of the checkpoint that a result is of; None of release 0.1's, which do not say it."""
    measured = result.get("measured")
    return str(measured["checkpoint"]) if isinstance(measured, dict) and "checkpoint" in measured else None


def _read(path: Path) -> dict[str, dict[str, Any]]:
    value = read_json(path) if path.exists() else {"results": {}}
    return value.get("results", {"release 0.1": value})
