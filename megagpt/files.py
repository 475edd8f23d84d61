"""Files that are either whole or absent: written under a temporary name, synced, renamed."""

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any

from megagpt.config import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and renamed to `path`, on any error removed.

    A reader sees the old file or the new one, never a part. Raises OSError of the write with the final path in `filename`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".tmp-{path.name}-{_writer()}-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folders: Iterable[Path]) -> None:
    """Remove unfinished files of `atomic_path` whose writers are gone: killed on this machine, or idle for an hour."""
    for path in [path for folder in folders for path in folder.glob(".tmp-*")]:
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and (_writer_is_dead(path.name) or path.stat().st_mtime < time.time() - 3600):
                path.unlink()


def _writer() -> str:
    """Who writes: a hash of the machine's name, the process, and when it began."""
    return f"{hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]}.{os.getpid()}.{process_begun(os.getpid())}"


def _writer_is_dead(name: str) -> bool:
    machine, *process = name.rsplit("-", 2)[-2].split(".")
    if machine != _writer().partition(".")[0] or len(process) != 2 or not process[0].isdecimal():
        return False
    try:
        os.kill(int(process[0]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's, of which /proc may say nothing
        return False
    return str(process_begun(int(process[0]))) != process[1]


def process_begun(process: int) -> int:
    """When a process of this machine began, in ticks since the start of the system (proc(5)); -1 if it is gone or ending."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return -1
    state, *fields = text.rpartition(") ")[2].split()
    return -1 if state in "ZX" else int(fields[18])


def sync(path: Path) -> None:
    """fsync a file or a directory (after a rename the directory must be synced too)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises UserError that names the file if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of 5,000 digits, 10,000 brackets
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_object(path: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """The JSON object in `path`, which has these fields, each of these types.

    Raises UserError that names the file, and the field and the rule, on anything else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, an object is expected")
    check_fields(path, value, fields or {})
    return value


def check_fields(path: Path, value: Mapping[str, Any], fields: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise UserError that names the file, the field and the rule if one is missing or of another type (`bool` is no `int`)."""
    for name, kinds in fields.items():
        if name not in value:
            raise UserError(f"{path}: {name} is missing")
        found = value[name]
        if not isinstance(found, kinds) or (isinstance(found, bool) and kinds is int):
            wanted = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise UserError(f"{path}: {name} is a {type(found).__name__}, {wanted} is expected")


def sha256_file(path: Path, progress: Callable[[], object] | None = None) -> str:
    """sha256 (hex) of a file's bytes; `progress` is called for every 16 MiB."""
    digest, buffer, reads = hashlib.sha256(), memoryview(bytearray(1 << 18)), 0
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            reads += 1
            if progress is not None and reads % 64 == 0:
                progress()
    return digest.hexdigest()


def _umask() -> int:
    """Reading it means setting it: in two threads at once it would be lost."""
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask


_UMASK = threading.Lock()


def matching_files(pattern: str, field: str) -> list[str]:
    """The local files of a path (whatever characters are in it) or else of a glob, sorted.

    Raises UserError, naming `field`, if there is none, or if a file's name, of which ids are made, is not UTF-8.
    """
    matches = [pattern] if os.path.isfile(pattern) else [path for path in glob(pattern, recursive=True) if os.path.isfile(path)]
    if not matches and os.path.isdir(pattern):
        raise UserError(f"{field}: {pattern!r} is a folder: say which files, such as {pattern.rstrip('/')}/*")
    if not matches:
        raise UserError(f"{field}: no file matches {pattern!r}")
    for path in matches:
        if not _is_utf8(os.path.basename(path)):
            raise UserError(f"{field}: the file name {os.fsencode(path)!r} is not UTF-8, and ids are made of it: rename it")
    return sorted(matches)


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def show_bytes(count: float) -> str:
    """A number of bytes with the unit in which it has one to three digits before the point: `412 KB`, `1.3 GB`."""
    value, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while abs(value) >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" or abs(value) >= 99.5 else f"{value:.1f} {units[0]}"
