"""The ledger of a run: one line per update with a hash of the samples that all ranks really fed to the model.

inspect_data recomputes the hashes from the shards; equal hashes over steps that follow each other prove that every sample
was used exactly once, whatever restarts and changes of layout came between.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megagpt.data.sample_hash import HASH_MASK
from megagpt.data.state import TrainState, Window, sample_indices

LEDGER_FILE = "ledger.jsonl"

_NAMES_ON_DISK = {"attempt": "incarnation"}
"""Field of an entry -> its name in the file, where release 0.1 called it something else."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One update: its number from 0, global index of its first sample, how many samples, their hash, which start made it."""

    step: int
    first_sample: int
    num_samples: int
    fed_hash: int
    attempt: int
    skipped: tuple[Window, ...] = ()
    """Samples left out between its first and its last one."""

    @property
    def state(self) -> TrainState:
        """The position of the run before this update, in samples."""
        return TrainState(step=self.step, samples=self.first_sample, skipped=self.skipped)

    def ranges(self) -> list[tuple[int, int]]:
        """Its samples as [start, end)."""
        starts = [self.first_sample, *(window.start + window.count for window in self.skipped)]
        ends = [window.start for window in self.skipped]
        used = sum(end - start for start, end in zip(starts, ends, strict=False))
        return list(zip(starts, [*ends, starts[-1] + self.num_samples - used], strict=True))


def entry_of(state: TrainState, num_samples: int, fed_hash: int, attempt: int) -> Entry:
    """The entry of the update that begins at `state`."""
    indices = sample_indices(state, num_samples)
    inside = tuple(window for window in state.skipped if indices[0] < window.start < indices[-1])
    return Entry(state.step, indices[0], num_samples, fed_hash & HASH_MASK, attempt, inside)


class LedgerWriter:
    """Appends entries. It first ends a line that a kill has torn, so that no other line is lost."""

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / LEDGER_FILE
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("ab", buffering=0)
        if torn:
            self._file.write(b"\n")

    def write(self, entry: Entry) -> None:
        """Write one line and flush it, so that a kill of the process loses nothing."""
        row = {_NAMES_ON_DISK.get(name, name): value for name, value in asdict(entry).items()}
        self._file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_ledger(run_dir: Path) -> list[Entry]:
    """The entries that stand, in the order of their steps: of a step done twice the later start's, since its weights count."""
    standing: dict[int, Entry] = {}
    path = run_dir / LEDGER_FILE
    for line in path.read_bytes().splitlines() if path.exists() else ():
        entry = _parse(line)
        if entry is not None and (entry.step not in standing or entry.attempt >= standing[entry.step].attempt):
            standing[entry.step] = entry
    return [standing[step] for step in sorted(standing)]


def _parse(line: bytes) -> Entry | None:
    """The entry in a line, None for a torn one."""
    try:
        value: dict[str, Any] = orjson.loads(line)
        values = {
            name: value[_NAMES_ON_DISK.get(name, name)]
            for name in ("step", "first_sample", "num_samples", "fed_hash", "attempt")
        }
        return Entry(**values, skipped=tuple(Window(**window) for window in value.get("skipped", ())))
    except (orjson.JSONDecodeError, TypeError, KeyError):
        return None
