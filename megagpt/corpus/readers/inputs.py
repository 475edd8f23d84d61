"""Inputs of a corpus: which files there are, how each is split into blocks, and readers of files that hold text already."""

import codecs
import contextlib
import json
import os
import shutil
import tempfile
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import orjson
import zstandard

from megagpt.config import UserError
from megagpt.corpus.readers.http import decode_text
from megagpt.corpus.readers.mediawiki import split_dump
from megagpt.corpus.readers.warc import split_gzip
from megagpt.corpus.runner.blocks import Block, Fault, Outcome, Seen, output_name
from megagpt.documents import Document, Rejected, open_lines

Format: TypeAlias = Literal["auto", "web", "wikipedia", "jsonl", "text", "parquet", "datasets"]
TextUnit: TypeAlias = Literal["file", "paragraph", "line"]

DOWNLOAD_ATTEMPTS = 5
_DATASETS = "datasets:"
_ENDINGS: dict[str, tuple[str, ...]] = {
    "web": (".warc", ".arc", ".wet", ".warc.bad"),
    "wikipedia": (".xml",),
    "jsonl": (".jsonl", ".ndjson"),
    "text": (".txt", ".text", ".md"),
    "parquet": (".parquet",),
}


_UNREAD: dict[str, tuple[str, ...]] = {
    "web": (".bz2",),
    "wikipedia": (".gz", ".zst"),
    "jsonl": (".bz2",),
    "text": (".bz2",),
    "parquet": (".gz", ".bz2", ".zst"),
}
"""Compressions that a format's reader does not know."""


def list_inputs(patterns: tuple[str, ...], root: str = "") -> list[str]:
    """Files and URLs named by paths, globs, `datasets:NAME` and lists of paths (`*.paths`, `*.paths.gz`), in order, each once.

    Lines of a list are taken below `root` (a folder or a URL) if one is given, else below the list's own folder. Raises
    UserError for a pattern that matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if _is_remote(pattern) and _is_list(pattern):
            with local_copy(pattern) as path:
                found |= dict.fromkeys(_read_list(Path(path), root or pattern.rpartition("/")[0], pattern))
        elif _is_remote(pattern):
            found[pattern] = None
        else:
            for path in matching_files(pattern, "extract.inputs"):
                found |= dict.fromkeys(_read_list(Path(path), root) if _is_list(path) else [path])
    return list(found)


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


def format_of(path: str, declared: Format) -> Format:
    """The format of an input: as declared, or by its name. Raises UserError if the name does not tell."""
    if path.startswith(_DATASETS):
        return "datasets"
    if declared != "auto":
        return declared
    stem = path.lower()
    for ending in (".gz", ".zst", ".bz2"):
        stem = stem.removesuffix(ending)
    for name, endings in _ENDINGS.items():
        if stem.endswith(endings):
            return name  # type: ignore[return-value]
    raise UserError(
        f"{path}: the name does not tell its format: set extract.format (one of web, wikipedia, jsonl, text, parquet)"
    )


def input_blocks(paths: list[str], declared: Format, block_bytes: int) -> list[Block]:
    """Blocks over all inputs. Raises UserError for a missing file or a format that cannot be told."""
    blocks: list[Block] = []
    for path in paths:
        name = output_name(path.removeprefix(_DATASETS).replace("/", "_") if path.startswith(_DATASETS) else path)
        blocks += [
            replace(Block(path, name, i), start=s, end=e) for i, (s, e) in enumerate(_ranges(path, declared, block_bytes))
        ]
    return blocks


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local file for a path or URL; what was fetched (with retries) is removed afterwards. Raises OSError naming the URL."""
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
                raise UserError(f"{path}: not found") from None
            except Exception as error:  # every file system has its own: all are tried again, the last one is raised
                if attempt + 1 == DOWNLOAD_ATTEMPTS:
                    raise OSError(f"{path}: not read after {DOWNLOAD_ATTEMPTS} attempts: {error}") from error
                time.sleep(2**attempt)
        yield str(local)


# ---- readers of text


def jsonl_outcomes(block: Block, source: str, text_field: str) -> Iterator[Outcome]:
    """Documents of a .jsonl file (plain, gz, zst): the text in `text_field`, url if there is one, other fields under meta."""
    name = Path(block.path).name
    for offset, line in _lines(block, name):
        if isinstance(line, Fault):
            yield line
            continue
        if not line.strip():
            continue
        yield Seen("line")
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            yield Fault("line that is not JSON", f"{name}: offset {offset}")
            continue
        text = value.get(text_field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            yield Fault(f"line without a text in {text_field!r}", f"{name}: offset {offset}")
            continue
        yield _from_fields(f"{name}:{offset}", value, text, source, text_field)


def text_outcomes(block: Block, source: str, unit: TextUnit) -> Iterator[Outcome]:
    """Documents of a text file: the file, or its paragraphs (between blank lines), or its lines."""
    name = Path(block.path).name
    pieces = [line for line in _lines(block, name) if not isinstance(line[1], Fault)]
    yield from (line for _, line in _lines(block, name) if isinstance(line, Fault))
    decoded = decode_text(b"".join(line for _, line in pieces if isinstance(line, bytes)), None)
    for problem in decoded.problems:
        yield Fault(problem, f"{name}: offset 0")
    separators = {"file": None, "paragraph": "\n\n", "line": "\n"}
    separator = separators[unit]
    text = decoded.text.replace("\r\n", "\n")
    offset = 0
    for piece in [text] if separator is None else text.split(separator):
        where = f"{name}:{offset}"
        offset += len(piece.encode("utf-8", "replace")) + (len(separator) if separator else 0)
        if piece.strip():
            yield Seen(unit)
            yield Document(where, piece.strip("\n"), source)
        elif separator is None:
            yield Seen(unit)
            yield Rejected(Document(where, "", source), "source:empty")


def parquet_outcomes(block: Block, source: str, text_field: str) -> Iterator[Outcome]:
    """Documents of the row groups of a Parquet file that begin in the block; id is the row's number."""
    import pyarrow
    import pyarrow.parquet

    name = Path(block.path).name
    try:
        yield from _parquet_rows(pyarrow.parquet.ParquetFile(block.path), block, name, source, text_field)
    except (pyarrow.ArrowException, OSError) as error:
        yield Fault("damaged Parquet file", f"{name}: {error}")


def _parquet_rows(opened: Any, block: Block, name: str, source: str, text_field: str) -> Iterator[Outcome]:
    with opened as file:
        if text_field not in file.schema_arrow.names:
            raise UserError(
                f"{block.path}: has no column {text_field!r} (extract.text_field); it has {file.schema_arrow.names}"
            )
        row = 0
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            if block.start <= _group_offset(metadata) and (block.end is None or _group_offset(metadata) < block.end):
                position = row
                for batch in file.iter_batches(1024, row_groups=[group]):
                    for value in batch.to_pylist():
                        yield from _row(f"{name}:{position}", value, source, text_field)
                        position += 1
            row += metadata.num_rows


def datasets_outcomes(block: Block, source: str, text_field: str, split: str) -> Iterator[Outcome]:
    """Documents of a Hugging Face dataset: `datasets:` and a folder (saved, or with data files) or a name on the hub."""
    import datasets

    place = block.path.removeprefix(_DATASETS)
    try:
        if Path(place, "dataset_dict.json").is_file() or Path(place, "dataset_info.json").is_file():
            loaded: Any = datasets.load_from_disk(place)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(place, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{block.path}: cannot be loaded (extract.split={split}): {error}") from None
    for number, value in enumerate(rows):
        yield from _row(f"{place}:{number}", value, source, text_field)


def _row(where: str, value: Any, source: str, text_field: str) -> Iterator[Outcome]:
    yield Seen("row")
    text = value.get(text_field)
    if isinstance(text, str) and text:
        yield _from_fields(where, value, text, source, text_field)
    elif text_field not in value:
        raise UserError(f"{where}: has no field {text_field!r} (extract.text_field); it has {sorted(value)}")
    else:
        yield Rejected(Document(where, "", source, _text_or_none(value.get("url"))), "source:empty")


def _from_fields(where: str, value: dict[str, Any], text: str, source: str, text_field: str) -> Document:
    meta = value["meta"] if isinstance(value.get("meta"), dict) else {}
    others = {key: item for key, item in value.items() if key not in (text_field, "url", "meta", "id", "source")}
    if "id" in value:
        others["original_id"] = value["id"]
    simple = json.loads(json.dumps({**others, **meta}, default=str))
    return Document(where, text, source, _text_or_none(value.get("url")), simple)


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _lines(block: Block, name: str) -> Iterator[tuple[int, bytes] | tuple[int, Fault]]:
    """(offset, line) of the lines that begin in a block; of a compressed file the offset is that of the plain text."""
    with open_lines(Path(block.path)) as file:
        offset = _first_line(file, block.start)
        while block.end is None or offset < block.end:
            try:
                line = file.readline()
            except (EOFError, zlib.error, zstandard.ZstdError) as error:
                kind = "truncated file" if isinstance(error, EOFError) else "damaged compressed data"
                yield offset, Fault(kind, f"{name}: offset {offset}")
                return
            if not line:
                return
            yield offset, line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
            offset += len(line)


def _first_line(file: IO[bytes], start: int) -> int:
    """Move to the first line that begins at or after `start`."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + len(file.readline())


# ---- listing and splitting


def _is_list(path: str) -> bool:
    return path.endswith((".paths", ".paths.gz", ".paths.txt"))


def _is_remote(path: str) -> bool:
    return "://" in path or path.startswith(_DATASETS)


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
    if not path.startswith(_DATASETS) and (ending := Path(path).suffix.lower()) in _UNREAD.get(kind, ()):
        raise UserError(f"{path}: {kind} is not read from {ending} files: decompress it first")
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
        case "jsonl" if local.suffix not in (".gz", ".zst"):
            return _even_ranges(local.stat().st_size, block_bytes)
        case "parquet":
            return _even_ranges(local.stat().st_size, block_bytes)
    return [(0, None)]


def _check_protocol(path: str) -> None:
    """Raise UserError if nothing that is installed can read a URL of this kind."""
    if "://" not in path:
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(path.partition("://")[0])
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: cannot be read here: {error}") from None


def _even_ranges(size: int, block_bytes: int) -> list[tuple[int, int | None]]:
    starts = list(range(0, max(size, 1), block_bytes))
    return [(start, start + block_bytes if start != starts[-1] else None) for start in starts]


def _group_offset(metadata: Any) -> int:
    column = metadata.column(0)
    return column.dictionary_page_offset or column.data_page_offset
