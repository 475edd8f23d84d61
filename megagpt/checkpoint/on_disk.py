"""Committed checkpoints of a run on disk: their steps, their state.json, and whether their files are whole. Needs no torch."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.files import check_fields, read_json, read_object, sha256_file

FORMAT = 1
"""Of state.json; it grows when an earlier release could not read what is written."""

STATE_FIELDS = {"train_state": dict, "updates": int}
"""The fields of every state.json; `config` and `model` (dict) are added by the trainer."""


def read_state(path: Path, *, of_model: bool = False) -> dict[str, Any]:
    """A checkpoint's state.json. Raises UserError that names file, field and rule if it is malformed.

    Refuses a later format than this release reads. `of_model`: the settings of model and run are required as well.
    """
    saved = read_object(path / "state.json")
    later = saved.get("format", 1)
    if isinstance(later, int) and later > FORMAT:
        raise UserError(f"{path / 'state.json'}: format {later} is of a later release; this one reads up to {FORMAT}")
    check_fields(path / "state.json", saved, STATE_FIELDS | ({"config": dict, "model": dict} if of_model else {}))
    return saved


def saved_field(path: Path, name: str) -> Any:
    """A field of a checkpoint's state.json; None if it cannot be read."""
    try:
        return read_json(path / "state.json")[name]
    except (UserError, KeyError, TypeError):
        return None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Committed checkpoints, oldest first; not verified."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


def require_checkpoint(path: Path) -> None:
    """Raise UserError if the path is not that of a checkpoint."""
    if not (path.name.startswith("step_") and path.name[5:].isdigit() and path.is_dir()):
        raise UserError(f"{path}: not a checkpoint; run_dir/checkpoints/step_<number> is expected")


def verify(path: Path, rank: int = 0, size: int = 1, progress: Callable[[], object] | None = None) -> list[str]:
    """Problems of a checkpoint, one line each; [] = good. With size > 1 only every size-th file is read.

    `progress` is called as the files are read.
    """
    manifest_path = path / "manifest.json"
    try:
        files = read_json(manifest_path)["files"]
        items = sorted((str(name), int(entry["size"]), str(entry["sha256"])) for name, entry in files.items())
    except (UserError, KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{manifest_path}: {error}"]
    outside = [name for name, _, _ in items if Path(name).name != name]
    if outside:
        return [f"{manifest_path}: names {outside[0]!r}, which is not a file of the checkpoint's folder"]
    # What is loaded must be summed: an altered state would feed samples twice.
    there = [*(file.name for file in path.glob("pieces_*")), "state.json"]
    extra = sorted(name for name in there if name not in files) if rank == 0 else []
    with ThreadPoolExecutor(max_workers=4) as threads:  # hashing lets go of the interpreter
        found = threads.map(lambda item: _problem_of(path / item[0], item[1], item[2], progress), items[rank::size])
        return [f"{path / name}: is not in the manifest" for name in extra] + [problem for problem in found if problem]


def _problem_of(file: Path, size: int, sha256: str, progress: Callable[[], object] | None) -> str:
    """The problem of one file; "" if there is none."""
    if not file.is_file():
        return f"{file}: missing"
    if file.stat().st_size != size:
        return f"{file}: {file.stat().st_size} bytes, the manifest says {size}"
    if sha256_file(file, progress) != sha256:
        return f"{file}: its sha256 is not the manifest's: bytes changed since it was written"
    return ""
