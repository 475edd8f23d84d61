"""The ledger of a run: one line per update with a hash of the samples that all ranks really fed to the model.

inspect_data recomputes the hashes from the shards; equal hashes over steps that follow each other prove that every sample
was used exactly once, whatever restarts and changes of layout came between.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

LEDGER_FILE = "ledger.jsonl"


@dataclass(frozen=True, slots=True)
class Entry:
    """One update: its number from 0, the global index of its first sample, how many samples, their hash, which start made it."""

    step: int
    first_sample: int
    num_samples: int
    fed_hash: int
    incarnation: int


class LedgerWriter:
    """Appends entries; a line that a kill tore is ended first, so that it costs no other line."""

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / LEDGER_FILE
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("ab", buffering=0)
        if torn:
            self._file.write(b"\n")

    def write(self, entry: Entry) -> None:
        """One line, handed to the system at once: a kill of the process loses nothing."""
        self._file.write(orjson.dumps(asdict(entry), option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_ledger(run_dir: Path) -> list[Entry]:
    """The entries that stand, in the order of their steps: of a step done twice the later start's, since its weights count."""
    standing: dict[int, Entry] = {}
    path = run_dir / LEDGER_FILE
    for line in path.read_bytes().splitlines() if path.exists() else ():
        entry = _parse(line)
        if entry is not None and (entry.step not in standing or entry.incarnation >= standing[entry.step].incarnation):
            standing[entry.step] = entry
    return [standing[step] for step in sorted(standing)]


def _parse(line: bytes) -> Entry | None:
    """The entry in a line, None for a torn one."""
    try:
        value: dict[str, Any] = orjson.loads(line)
        return Entry(**value)
    except (orjson.JSONDecodeError, TypeError):
        return None
