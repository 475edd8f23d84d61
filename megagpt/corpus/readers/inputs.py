"""Inputs of a corpus: the list of files, the format of each, and its blocks.

To add a format: a name in SourceFormat (config.py), a row in FORMATS, a case in `_ranges` and in
extract_documents.read_outcomes (the type checker names them), a reader beside this file, and an example in
tests/corpus/readers/test_formats.py.
"""

import contextlib
import shutil
import tempfile
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import assert_never

import zstandard

from megagpt.config import UserError
from megagpt.corpus.readers.config import Format, SourceFormat
from megagpt.corpus.readers.mediawiki import split_dump
from megagpt.corpus.readers.records import DATASETS
from megagpt.corpus.readers.warc import split_gzip
from megagpt.corpus.runner.blocks import Block, output_name
from megagpt.documents import open_lines
from megagpt.files import matching_files
from megagpt.terminal import without_secrets

DOWNLOAD_ATTEMPTS = 5
COMPRESSIONS = (".gz", ".zst", ".bz2")


@dataclass(frozen=True, slots=True)
class FileNames:
    """How the names of a format's files end."""

    endings: tuple[str, ...]
    """In lower case, without that of a compression."""
    unread: tuple[str, ...] = ()
    """Compressions that the format's reader does not know."""


FORMATS: dict[SourceFormat, FileNames] = {
    "web": FileNames((".warc", ".arc", ".wet", ".warc.bad"), unread=(".bz2",)),
    "wikipedia": FileNames((".xml",), unread=(".gz", ".zst")),
    "jsonl": FileNames((".jsonl", ".ndjson"), unread=(".bz2",)),
    "text": FileNames((".txt", ".text", ".md"), unread=(".bz2",)),
    "parquet": FileNames((".parquet",), unread=(".gz", ".bz2", ".zst")),
    "datasets": FileNames(()),
}
"""A name that ends in none of these needs extract.format; datasets are named `datasets:NAME`."""


def list_inputs(patterns: tuple[str, ...], root: str = "") -> list[str]:
    """Files and URLs named by paths, globs, `datasets:NAME` and lists of paths (`*.paths`, `*.paths.gz`), in order, each once.

    Lines of a list are taken below `root` (a folder or a URL) if one is given, else below the list's own folder. Raises
    UserError for a pattern that matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if _is_remote(pattern) and _is_list(pattern):
            with local_copy(pattern) as path:
                found |= dict.fromkeys(
                    _read_list(Path(path), root or without_secrets(pattern).rpartition("/")[0], without_secrets(pattern))
                )
        elif _is_remote(pattern):
            found[pattern] = None
        else:
            for path in matching_files(pattern, "extract.inputs"):
                found |= dict.fromkeys(_read_list(Path(path), root) if _is_list(path) else [path])
    return list(found)


def format_of(path: str, declared: Format) -> SourceFormat:
    """The format of an input: as declared, or by its name. Raises UserError if the name has no known ending."""
    if path.startswith(DATASETS):
        return "datasets"
    if declared != "auto":
        return declared
    stem = without_secrets(path).lower()
    for ending in COMPRESSIONS:
        stem = stem.removesuffix(ending)
    for name, file_names in FORMATS.items():
        if stem.endswith(file_names.endings):
            return name
    names = ", ".join(name for name, file_names in FORMATS.items() if file_names.endings)
    shown = without_secrets(path)
    raise UserError(f"{shown}: the name does not tell its format: set extract.format (one of {names})")


def input_blocks(paths: list[str], declared: Format, block_bytes: int) -> list[Block]:
    """Blocks over all inputs. Raises UserError for a missing file or an unknown format."""
    blocks: list[Block] = []
    for path in paths:
        name = output_name(
            path.removeprefix(DATASETS).replace("/", "_") if path.startswith(DATASETS) else without_secrets(path)
        )
        blocks += [
            replace(Block(path, name, i), start=s, end=e) for i, (s, e) in enumerate(_ranges(path, declared, block_bytes))
        ]
    return blocks


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local file for a path or URL; a fetched file (with retries) is removed afterwards. Raises OSError naming the URL.

    What follows a URL's `?` may be a signature: it is sent to the server and appears nowhere else.
    """
    if "://" not in path:
        yield path
        return
    import fsspec

    with tempfile.TemporaryDirectory(prefix="megagpt-") as folder:
        local = Path(folder, urllib.parse.urlsplit(path).path.rpartition("/")[2])
        for attempt in range(DOWNLOAD_ATTEMPTS):
            try:
                with fsspec.open(path, "rb") as remote, local.open("wb") as file:
                    shutil.copyfileobj(remote, file, 1 << 20)  # type: ignore[arg-type]
                break
            except FileNotFoundError:
                raise UserError(f"{without_secrets(path)}: not found") from None
            except Exception as error:  # every file system has its own: all are tried again, the last one is raised
                if attempt + 1 == DOWNLOAD_ATTEMPTS:
                    text = without_secrets(f"{path} : not read after {DOWNLOAD_ATTEMPTS} attempts: {error}")
                    raise OSError(text.replace(" : ", ": ", 1)) from None
                time.sleep(2**attempt)
        yield str(local)


# ---- listing and splitting


def _is_list(path: str) -> bool:
    return without_secrets(path).endswith((".paths", ".paths.gz", ".paths.txt"))


def _is_remote(path: str) -> bool:
    return "://" in path or path.startswith(DATASETS)


def _read_list(path: Path, root: str, shown: str = "") -> list[str]:
    """The lines of a list of paths; `shown` is its name for the user if that is not the path."""
    names: list[str] = []
    try:
        with open_lines(path) as lines:
            names.extend(line.decode("utf-8").strip("\ufeff \t\r\n") for line in lines)
    except (EOFError, zlib.error, zstandard.ZstdError, UnicodeDecodeError) as error:
        raise UserError(f"{shown or path}: a list of paths, cut off or damaged after line {len(names)}: {error}") from None
    if not any(names):
        raise UserError(f"{shown or path}: a list of paths with no path in it")
    folder = root.rstrip("/") if root else str(path.parent)
    return [name if _is_remote(name) or name.startswith("/") else f"{folder}/{name}" for name in names if name]


def _ranges(path: str, declared: Format, block_bytes: int) -> list[tuple[int, int | None]]:
    kind = format_of(path, declared)
    if not path.startswith(DATASETS) and (ending := Path(without_secrets(path)).suffix.lower()) in FORMATS[kind].unread:
        raise UserError(f"{without_secrets(path)}: {kind} is not read from {ending} files: decompress it first")
    if _is_remote(path):
        _check_protocol(path)
        return [(0, None)]
    local = Path(path)
    if not local.is_file():
        raise UserError(f"{path}: no such file")
    match kind:
        case "web":
            return split_gzip(local, block_bytes)
        case "wikipedia":
            return split_dump(local, block_bytes)
        case "jsonl":
            whole = local.suffix.lower() in COMPRESSIONS
            return [(0, None)] if whole else _even_ranges(local.stat().st_size, block_bytes)
        case "parquet":
            return _even_ranges(local.stat().st_size, block_bytes)
        case "text" | "datasets":
            return [(0, None)]
        case _:
            assert_never(kind)


def _check_protocol(path: str) -> None:
    """Raise UserError if nothing that is installed can read a URL of this kind."""
    if "://" not in path:
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(path.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise UserError(f"{without_secrets(path)}: cannot be read here: {error}") from None


def _even_ranges(size: int, block_bytes: int) -> list[tuple[int, int | None]]:
    starts = list(range(0, max(size, 1), block_bytes))
    return [(start, start + block_bytes if start != starts[-1] else None) for start in starts]
