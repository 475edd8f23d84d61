"""Documents, the unit of the corpus half, and their `.jsonl.zst` files: one object a line, readable by the field's tools."""

import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

import orjson
import zstandard

from megagpt.config import UserError
from megagpt.files import atomic_path

INPUT_BYTES = 4096
"""Compressed bytes that are decompressed at once: at most 128 MiB of zstd, 4 MiB of gzip."""
MAX_WINDOW_BYTES = 1 << 31
"""The largest window that zstd writes (--ultra --long=31); a reader needs so much memory."""
MAX_DICTIONARY_BYTES = 64 << 20
_DICTIONARY_FRAME, _ZSTD_FRAME = b"\x5d\x2a\x4d\x18", b"\x28\xb5\x2f\xfd"

JsonValue: TypeAlias = Any
"""What JSON can hold; spelled Any because a recursive alias helps no reader."""
IGNORE = -100
"""A target without a loss, as torch's cross_entropy has it by default."""


def check_classes(names: Sequence[str]) -> None:
    """Raise ValueError unless names of classes are none, or at least two different ones that are not empty."""
    if len(names) == 1 or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise ValueError(f"classes={list(names)}: at least two different names are expected")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with an id. `id` is `<source file>:<record offset>`; `source` names the corpus or crawl it came from."""

    id: str
    text: str
    source: str
    url: str | None = None
    meta: dict[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A document that a stage dropped, and why: `<filter>:<what>`."""

    document: Document
    reason: str


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a `.jsonl`, `.jsonl.gz` or `.jsonl.zst` file. Raises UserError naming file, line and rule."""
    number = 0
    with open_lines(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                yield parse_document(line, where=f"{path}: line {number}")
        except (EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{path}: cut off or damaged after line {number}: {error}") from None


def parse_json(line: bytes) -> Any:
    """The value of a JSON line. NaN and infinities, which JSON has not, become null; lone surrogates become U+FFFD.

    Raises orjson.JSONDecodeError.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        if b"NaN" not in line and b"Infinity" not in line and b"\\u" not in line:
            raise
        try:
            value = json.loads(line, parse_constant=lambda _: None, parse_int=_number)
        except (ValueError, RecursionError):
            value = None
        if value is None:
            raise
        return _without_surrogates(value)


def _number(digits: str) -> int | float:
    """As orjson has it: integers of more than 64 bits become floats."""
    value = int(digits)
    return value if -(1 << 63) <= value < 1 << 64 else float(value)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value


def parse_document(line: bytes, *, where: str) -> Document:
    """The document in one JSON line. Raises UserError that begins with `where`."""
    try:
        value = parse_json(line)
        document = Document(value["id"], value["text"], value["source"], value.get("url"), value.get("meta") or {})
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    except KeyError as error:
        raise UserError(f"{where}: a document needs the field {error}") from None
    except (TypeError, AttributeError):
        raise UserError(f"{where}: a document is a JSON object") from None
    # No isinstance: this is done for every document of every stage.
    if not type(document.id) is type(document.text) is type(document.source) is str:
        name = next(name for name in ("id", "text", "source") if type(value[name]) is not str)
        raise UserError(f"{where}: {name} is a {type(value[name]).__name__}, text is expected")
    if not (document.url is None or type(document.url) is str) or type(document.meta) is not dict:
        raise UserError(f"{where}: url is text or null, meta an object")
    return document


def format_document(document: Document) -> bytes:
    """One JSON line, newline included. Lone surrogates, which UTF-8 cannot hold, become U+FFFD."""
    value = {"id": document.id, "text": document.text, "source": document.source, "url": document.url, "meta": document.meta}
    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        value["text"] = document.text.encode("utf-8", "replace").decode("utf-8")
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)


def write_documents(path: Path, documents: Iterable[Document], *, level: int = 3) -> int:
    """Write a whole `.jsonl.zst` file atomically; returns how many documents. Readers see all of it or nothing."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("wb") as raw:
        with zstandard.ZstdCompressor(level=level).stream_writer(raw, closefd=False) as stream:
            for document in documents:
                stream.write(format_document(document))
                count += 1
    return count


def open_lines(path: Path) -> IO[bytes]:
    """A file of lines, decompressed by its name's ending (.zst: all frames, .gz: all members). Raises UserError if missing.

    Reading raises EOFError where the file is cut off, zlib.error or zstandard.ZstdError where it is damaged.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if path.suffix in (".zst", ".gz"):
        return io.BufferedReader(_Plain(raw, path.suffix), 1 << 20)
    return raw


def decompressed(raw: IO[bytes], ending: str) -> Iterator[bytes]:
    """Plain bytes of a `.gz` or `.zst` file in pieces, all members or frames of it. Raises as `open_lines` says.

    Library readers of zstd take a cut-off frame for the end of the file; this does not.
    """
    decoder: Any = None
    dictionary, data = _read_dictionary(raw) if ending == ".zst" else (None, b"")
    while data := data or raw.read(4 * INPUT_BYTES):
        if decoder is None:
            data = data.lstrip(b"\0") if ending == ".gz" else data  # tape padding between gzip members
            if not data:
                continue
            decoder = zlib.decompressobj(wbits=31) if ending == ".gz" else _zstd(dictionary)
        # A zstd block of 4 bytes may hold 128 KiB, a byte of gzip 1 KiB: what comes out at once is bounded by what goes in.
        now, later = data[:INPUT_BYTES], data[INPUT_BYTES:]
        plain = decoder.decompress(now)
        data, decoder = (decoder.unused_data + later, None) if decoder.eof else (later, decoder)
        if plain:
            yield plain
    if decoder is not None:
        raise EOFError("the file ends inside a compressed stream")


def _zstd(dictionary: zstandard.ZstdCompressionDict | None) -> Any:
    options: dict[str, Any] = {"dict_data": dictionary} if dictionary else {}
    return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES, **options).decompressobj()


def _read_dictionary(raw: IO[bytes]) -> tuple[zstandard.ZstdCompressionDict | None, bytes]:
    """(the dictionary that the first frame holds, what follows), as the WARC-zstd draft has it: a skippable frame 0x184D2A5D
    with the dictionary, plain or itself compressed; (None, the first bytes) where there is none."""
    head = raw.read(8)
    size = int.from_bytes(head[4:], "little")
    if head[:4] != _DICTIONARY_FRAME or size > MAX_DICTIONARY_BYTES:
        return None, head
    content = raw.read(size)
    if len(content) < size:
        raise EOFError("the file ends inside its dictionary")
    if content.startswith(_ZSTD_FRAME):
        content = zstandard.ZstdDecompressor().stream_reader(content).read(MAX_DICTIONARY_BYTES)
    return zstandard.ZstdCompressionDict(content), b""


class _Plain(io.RawIOBase):
    """The raw stream below a BufferedReader over `decompressed`."""

    def __init__(self, raw: IO[bytes], ending: str) -> None:
        self._raw, self._pieces, self._rest = raw, decompressed(raw, ending), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()
