"""Readers of files that hold text already: jsonl, text, Parquet, Hugging Face datasets."""

import codecs
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson
import zstandard

from megagpt.config import UserError
from megagpt.corpus.readers.config import TextUnit
from megagpt.corpus.readers.http import decode_text
from megagpt.corpus.runner.blocks import Block, MalformedRecord, Outcome, Seen
from megagpt.documents import Document, Rejected, open_lines, parse_json

MAX_LINE_BYTES = 64 << 20
MAX_TEXT_BYTES = 1 << 30
"""What of a text file is read; the rest is left, and a MalformedRecord says so."""
DATASETS = "datasets:"
"""The prefix of an input that is a data set, not a file."""
_UNREADABLE = object()


def jsonl_outcomes(block: Block, source: str, text_field: str) -> Iterator[Outcome]:
    """Documents of a .jsonl file (plain, gz, zst): the text in `text_field`, url if there is one, other fields under meta."""
    name = Path(block.path).name
    for offset, line in _lines(block, name):
        if isinstance(line, MalformedRecord):
            yield line
            continue
        if not line.strip():
            continue
        yield Seen("line")
        try:
            value = parse_json(line)
        except orjson.JSONDecodeError:
            yield MalformedRecord("line that is not JSON", f"{name}: offset {offset}")
            continue
        text = value.get(text_field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            yield MalformedRecord(f"line without a text in {text_field!r}", f"{name}: offset {offset}")
            continue
        yield _from_fields(f"{name}:{offset}", value, text, source, text_field)


def text_outcomes(block: Block, source: str, unit: TextUnit) -> Iterator[Outcome]:
    """Documents of a text file: the file, or its paragraphs (between blank lines), or its lines."""
    name = Path(block.path).name
    lines, size = list[bytes](), 0
    for offset, line in _lines(block, name):
        if isinstance(line, MalformedRecord):
            yield line
            continue
        size += len(line)
        if size > MAX_TEXT_BYTES:
            yield MalformedRecord("text file longer than 1 GiB", f"{name}: offset {offset}")
            break
        lines.append(line)
    decoded = decode_text(b"".join(lines), None)
    for problem in decoded.problems:
        yield MalformedRecord(problem, f"{name}: offset 0")
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
        yield MalformedRecord("damaged Parquet file", f"{name}: {error}")


def _parquet_rows(opened: Any, block: Block, name: str, source: str, text_field: str) -> Iterator[Outcome]:
    """Rows group by group: what cannot be read costs a group, a column of a group, or a cell, never the file."""
    import pyarrow

    with opened as file:
        if text_field not in file.schema_arrow.names:
            raise UserError(
                f"{block.path}: has no column {text_field!r} (extract.text_field); it has {file.schema_arrow.names}"
            )
        row = 0
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            if block.start <= _group_offset(metadata) and (block.end is None or _group_offset(metadata) < block.end):
                try:
                    columns, faults = _readable_columns(file, group, name)
                    yield from faults
                    if text_field not in columns:
                        continue
                    position = row
                    for batch in file.iter_batches(1024, row_groups=[group], columns=columns):
                        yield from _batch_rows(batch, name, position, source, text_field)
                        position += len(batch)
                except (pyarrow.ArrowException, OSError) as error:
                    yield MalformedRecord("damaged row group", f"{name}: row group {group}: {error}")
                finally:
                    row += metadata.num_rows
            else:
                row += metadata.num_rows


def _readable_columns(file: Any, group: int, name: str) -> tuple[list[str], list[MalformedRecord]]:
    """The columns of a row group that can be read, by trying its first rows; a MalformedRecord for each that cannot."""
    import pyarrow

    names = list(dict.fromkeys(file.schema_arrow.names))
    try:
        next(file.iter_batches(1, row_groups=[group]), None)
    except (pyarrow.ArrowException, OSError):
        pass
    else:
        return names, []
    found, faults = [], []
    for column in names:
        try:
            next(file.iter_batches(1, row_groups=[group], columns=[column]), None)
            found.append(column)
        except (pyarrow.ArrowException, OSError) as error:
            faults.append(MalformedRecord("column that cannot be read", f"{name}: row group {group}, column {column}: {error}"))
    return found, faults


def _batch_rows(batch: Any, name: str, position: int, source: str, text_field: str) -> Iterator[Outcome]:
    columns = {column: _cells(batch.column(i)) for i, column in enumerate(batch.schema.names)}
    for number in range(len(batch)):
        where = f"{name}:{position + number}"
        value = {column: cells[number] for column, cells in columns.items()}
        for column in [column for column, cell in value.items() if cell is _UNREADABLE]:
            yield MalformedRecord("cell that cannot be read", f"{name}: row {position + number}, column {column}")
            value[column] = None
            if column == text_field:
                break
        else:
            yield from _row(where, value, source, text_field)


def _cells(column: Any) -> list[Any]:
    """The values of a column; _UNREADABLE for those that are no value of its type. Binary cells are read as UTF-8."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or pyarrow.types.is_fixed_size_binary(kind):
        return [_decoded(cell) for cell in column.to_pylist()]
    try:
        return column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError, pyarrow.ArrowException):
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    import pyarrow

    try:
        return scalar.as_py()
    except (UnicodeDecodeError, ValueError, OverflowError, pyarrow.ArrowException):
        return _UNREADABLE


def _decoded(cell: bytes | None) -> Any:
    try:
        return cell if cell is None else cell.decode("utf-8")
    except UnicodeDecodeError:
        return _UNREADABLE


def datasets_outcomes(block: Block, source: str, text_field: str, split: str) -> Iterator[Outcome]:
    """Documents of a Hugging Face dataset: `datasets:` and a folder (saved, or with data files) or a name on the hub.

    Cells are read as stored: images and sound are left out, and a malformed cell loses at most its row.
    """
    import pyarrow

    place, position = block.path.removeprefix(DATASETS), 0
    try:
        for batch in dataset_batches(place, split, f"{block.path}: cannot be loaded (extract.split={split})"):
            yield from _batch_rows(batch, place, position, source, text_field)
            position += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        yield MalformedRecord("damaged dataset", f"{place}: after row {position}: {error}")


def dataset_batches(place: str, split: str, refusal: str) -> Iterator[Any]:
    """The rows of a Hugging Face dataset in Arrow record batches: a folder (saved, or with data files) or a name on the hub.

    Cells are as stored; columns of images and sound are left out. Raises UserError, beginning with `refusal`, if it cannot be
    loaded; damaged data end it with pyarrow's exception.
    """
    import datasets

    try:
        if Path(place, "dataset_dict.json").is_file() or Path(place, "dataset_info.json").is_file():
            loaded: Any = datasets.load_from_disk(place)
            rows: Any = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(place, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{refusal}: {error}") from None
    media = [name for name, feature in (rows.features or {}).items() if isinstance(feature, datasets.Image | datasets.Audio)]
    for table in rows.remove_columns(media).with_format("arrow").iter(1024):
        yield from table.to_batches()


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


def _lines(block: Block, name: str) -> Iterator[tuple[int, bytes] | tuple[int, MalformedRecord]]:
    """(offset, line) of the lines that begin in a block; of a compressed file the offset is that of the plain text.

    A line longer than MAX_LINE_BYTES is passed over, and a MalformedRecord says so.
    """
    with open_lines(Path(block.path)) as file:
        offset = _first_line(file, block.start)
        while block.end is None or offset < block.end:
            try:
                line = file.readline(MAX_LINE_BYTES + 1)
                size = len(line)
                if size > MAX_LINE_BYTES:
                    size += _rest_of_line(file) if not line.endswith(b"\n") else 0
            except (EOFError, zlib.error, zstandard.ZstdError) as error:
                kind = "truncated file" if isinstance(error, EOFError) else "damaged compressed data"
                yield offset, MalformedRecord(kind, f"{name}: offset {offset}")
                return
            if not line:
                return
            if size > MAX_LINE_BYTES:
                yield offset, MalformedRecord("line longer than 64 MiB", f"{name}: offset {offset}")
            else:
                yield offset, line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
            offset += size


def _first_line(file: IO[bytes], start: int) -> int:
    """Move to the first line that begins at or after `start`."""
    if start == 0:
        return 0
    file.seek(start - 1)
    return start - 1 + _rest_of_line(file)


def _rest_of_line(file: IO[bytes]) -> int:
    """Pass over the rest of a line; returns its length."""
    size = 0
    while piece := file.readline(1 << 20):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def _group_offset(metadata: Any) -> int:
    column = metadata.column(0)
    return column.dictionary_page_offset or column.data_page_offset
