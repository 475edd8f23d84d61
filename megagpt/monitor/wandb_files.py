"""Find the rows of metrics.jsonl that W&B's .wandb files lack after a kill.

W&B writes in another process, some seconds later. After SIGKILL, or the loss of a node, its file lacks the last rows of
metrics.jsonl. The file is a LevelDB log (github.com/google/leveldb, doc/log_format.md) of protobuf records; its tail may be
torn.
"""

import binascii
import json
import logging
import os
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.monitor.metrics import Metrics, Row

log = logging.getLogger(__name__)

BLOCK_BYTES, FILE_HEADER_BYTES = 32768, 7
CHUNK_HEADER = struct.Struct("<IHB")
WRITER_SECONDS = 30.0
"""How long to wait for W&B's process of a killed attempt: it writes its remaining data and ends."""


@dataclass(frozen=True, slots=True)
class Missing:
    """The rows to send again."""

    rows: tuple[Row, ...]
    """Rows of metrics.jsonl, by step."""
    last_step: int
    """The last step that W&B has once `rows` are sent; -1 if none."""


def missing_rows(earlier: Metrics, run_dir: Path, server_step: int | None = None) -> Missing:
    """The rows of earlier attempts that W&B does not have.

    An attempt's `start` row names the folder of its .wandb file; rows that are not in the file are missing. An attempt without
    a file there (of an older version, or synced and cleaned) has sent everything. server_step: the last step on the W&B server,
    for attempts that were online; None if it was not asked.
    """
    starts = {row["incarnation"]: row["wandb"] for row in earlier.all_rows if row["kind"] == "start" and row.get("wandb")}
    known: set[int] = set()
    sent_to: dict[int, float] = {}
    for attempt, facts in starts.items():
        path = _file_of(run_dir, facts)
        if facts.get("mode") == "online" and server_step is not None:
            sent_to[attempt] = server_step
        elif path is None:
            sent_to[attempt] = float("inf")
        else:
            wait_for_writer(path)
            steps = history_steps(path)
            known |= set(steps)
            sent_to[attempt] = max(steps, default=-1)
    rows = [
        row
        for row in earlier.rows
        if row["incarnation"] in starts and row["step"] > sent_to[row["incarnation"]] and row["step"] not in known
    ]
    last = max((row["step"] for row in earlier.all_rows if row["incarnation"] in starts), default=-1)
    return Missing(tuple(sorted(rows, key=lambda row: row["step"])), last)


def values_of(row: Row) -> dict[str, Any]:
    """The values of a row of metrics.jsonl without its head, as they are sent to W&B."""
    return {name: value for name, value in row.items() if name not in ("kind", "step", "time", "incarnation")}


def history_steps(path: Path) -> list[int]:
    """The steps in a .wandb file, in file order, up to the place where it is torn."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    steps = []
    for payload in records(path.read_bytes()):
        record = Record.FromString(payload)
        if record.WhichOneof("record_type") == "history":
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(record.history.step.num or int(json.loads(values.get("_step", "0"))))
    return steps


def records(data: bytes) -> Iterator[bytes]:
    """Payloads of a LevelDB log after W&B's file header, up to the first record that is torn or fails its checksum."""
    position, parts = FILE_HEADER_BYTES, b""
    while data[:4] == b":W&B" and position + CHUNK_HEADER.size <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK_HEADER.size:
            position += left
            continue
        checksum, length, kind = CHUNK_HEADER.unpack_from(data, position)
        chunk = data[position + CHUNK_HEADER.size : position + CHUNK_HEADER.size + length]
        if len(chunk) < length or kind == 0 or checksum != binascii.crc32(bytes([kind]) + chunk):
            return
        position += CHUNK_HEADER.size + length
        parts = chunk if kind in (1, 2) else parts + chunk
        if kind in (1, 4):
            yield parts


def wait_for_writer(path: Path) -> None:
    """Wait while a process of this machine has the file open, for at most WRITER_SECONDS."""
    deadline = time.monotonic() + WRITER_SECONDS
    while (writers := _open_in(path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if writers:
        log.warning("%s: process %s still writes it: W&B may get its next rows twice", path, writers[0])


def _open_in(path: Path) -> list[str]:
    """Ids of the processes of this machine that have a file open; other users' processes cannot be checked."""
    target, found = os.path.realpath(path), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(entry) == target for entry in (folder / "fd").iterdir()):
                found.append(folder.name)
        except OSError:  # it has ended, or is another user's
            continue
    return found


def _file_of(run_dir: Path, facts: Mapping[str, Any]) -> Path | None:
    folder = str(facts.get("folder") or "")
    if not folder or Path(folder).name != folder:
        return None
    return next(iter(sorted((run_dir / "wandb" / folder).glob("run-*.wandb"))), None)
