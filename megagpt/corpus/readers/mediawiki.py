"""Pages of MediaWiki's pages-articles XML: plain, bz2, and multistream bz2 from any stream on; reads damaged dumps too.

How it works. A dump is far too regular to need an XML parser: `<` never stands in a text, so a page is the text between
`<page>` and `</page>`, and its fields are found the same way. A damaged or cut page loses that page alone. bz2 streams are
independent: a block decompresses those that start in its range, and reads on only to complete a page that began there (streams
of a multistream dump hold whole pages; those of a parallel compressor do not).
"""

import bz2
import codecs
import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megagpt.corpus.runner.blocks import Block, MalformedRecord

CHUNK_BYTES = 1 << 20
MAX_PAGE_BYTES = 64 << 20
_STREAM_START = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
_PAGE, _PAGE_END = b"<page>", b"</page>"
_TEXT = re.compile(r"<text\b([^<>]*+)>")
_REVISION = re.compile(r"<revision\b[^<>]*+>")


@dataclass(frozen=True, slots=True)
class Page:
    """One page as the dump has it. `where` is "<file>:<offset>", or "<file>:<stream offset>+<offset inside>" in a bz2 file."""

    where: str
    title: str
    namespace: int
    page_id: str
    date: str
    model: str
    redirects: bool
    """The dump says so. Older dumps say it in the text alone."""
    text: str
    older_revisions: int = 0
    deleted: bool = False


def read_pages(block: Block) -> Iterator[Page | MalformedRecord]:
    """The pages that begin in a block, and a MalformedRecord for each damaged one."""
    name = Path(block.path).name
    with open(block.path, "rb") as file:
        pieces = _recoded(_pieces(file, name, block.start, block.end))
        buffer, places, base, owned = b"", list[tuple[int, str, int]](), 0, True
        limit = 0
        for piece in pieces:
            if isinstance(piece, MalformedRecord):
                yield piece
                continue
            label, offset, data, in_range = piece
            if owned and not in_range:  # what follows belongs to the next block, but for the rest of an open page
                owned = False
                limit = base + len(buffer)
            places.append((base + len(buffer), label, offset))
            buffer += data
            consumed, found = _cut(buffer)
            for start, page, fault in found:
                if not owned and base + start >= limit:
                    return
                where = _locate(places, base + start, name)
                yield MalformedRecord(fault, _readable(where)) if fault else _parse(page, where)
            buffer = buffer[consumed:]
            base += consumed
            while len(places) > 1 and places[1][0] <= base:
                places.pop(0)
            if not owned and base >= limit:
                return
            if len(buffer) > MAX_PAGE_BYTES:
                yield MalformedRecord("page longer than 64 MiB", _readable(_locate(places, base, name)))
                base, buffer = base + len(buffer), b""
                places = places[-1:]
        if _PAGE in buffer:
            yield MalformedRecord("truncated page", _readable(_locate(places, base + buffer.index(_PAGE), name)))


def split_dump(path: Path, block_bytes: int) -> list[tuple[int, int | None]]:
    """Byte ranges of about block_bytes for plain XML and for bz2 of many streams; one range for anything else."""
    size = path.stat().st_size
    if size <= block_bytes or read_head(path, recode=False).startswith("\ufffd"):
        return [(0, None)]
    with path.open("rb") as file:
        if file.read(3) == b"BZh" and _next_stream(file, 1, size) is None:
            return [(0, None)]
    starts = list(range(0, size, block_bytes))
    return [(start, start + block_bytes if start != starts[-1] else None) for start in starts]


# ---- bytes


def _pieces(
    file: IO[bytes], name: str, start: int, end: int | None
) -> Iterator[tuple[str, int, bytes, bool] | MalformedRecord]:
    """(label of the stream, offset inside it, data, whether the block owns it) from `start` to the end of the file."""
    magic = file.read(3)
    if magic == b"BZh" or name.endswith(".bz2"):
        yield from _bz2_pieces(file, name, start, end)
        return
    position = start
    file.seek(start)
    while data := file.read(CHUNK_BYTES if end is None or position >= end else min(CHUNK_BYTES, end - position)):
        yield f"{name}:", position, data, end is None or position < end
        position += len(data)


def _bz2_pieces(
    file: IO[bytes], name: str, start: int, end: int | None
) -> Iterator[tuple[str, int, bytes, bool] | MalformedRecord]:
    size = file.seek(0, 2)
    offset = 0 if start == 0 else _next_stream(file, start, size)
    while offset is not None:
        decoder, inside, position = bz2.BZ2Decompressor(), 0, offset
        file.seek(offset)
        damaged = False
        while not decoder.eof and not damaged:
            data = file.read(1 << 16) if decoder.needs_input else b""
            position += len(data)
            cut_off = decoder.needs_input and not data
            try:
                plain = decoder.decompress(data, CHUNK_BYTES)  # 6 KB of bz2 may hold 4.8 GB
            except OSError:
                damaged, plain = True, b""
                yield MalformedRecord("damaged bz2 stream", f"{name}: offset {offset}")
            if plain:
                yield f"{name}:{offset}+", inside, plain, end is None or offset < end
                inside += len(plain)
            if cut_off and not decoder.eof:
                yield MalformedRecord("truncated bz2 stream", f"{name}: offset {offset}")
                return
        following = offset + 1 if damaged else position - len(decoder.unused_data)
        if following >= size:
            return
        file.seek(following)
        found = following if _STREAM_START.match(file.read(10)) else _next_stream(file, following, size)
        if found != following and not damaged:
            yield MalformedRecord("garbage between bz2 streams", f"{name}: offset {following}")
        offset = found


def _next_stream(file: IO[bytes], offset: int, size: int) -> int | None:
    while offset < size:
        file.seek(offset)
        data = file.read(CHUNK_BYTES)
        if match := _STREAM_START.search(data):
            return offset + match.start()
        offset += max(1, len(data) - 9)
    return None


def _recoded(
    pieces: Iterator[tuple[str, int, bytes, bool] | MalformedRecord],
) -> Iterator[tuple[str, int, bytes, bool] | MalformedRecord]:
    """UTF-16 with a BOM, which some tools make of a dump, becomes UTF-8; offsets stay those of the file's own bytes."""
    decoder = None
    first = True
    for piece in pieces:
        if isinstance(piece, MalformedRecord):
            yield piece
            continue
        label, offset, data, in_range = piece
        if first and data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            decoder = codecs.getincrementaldecoder("utf-16")("replace")
        first = False
        yield label, offset, decoder.decode(data).encode() if decoder else data, in_range


def read_head(path: Path, *, recode: bool = True) -> str:
    """The first 64 KiB of the XML, where <siteinfo> is."""
    with path.open("rb") as file:
        pieces = _pieces(file, path.name, 0, None)
        piece = next(_recoded(pieces) if recode else pieces, None)
    return piece[2][: 1 << 16].decode("utf-8", "replace") if isinstance(piece, tuple) else ""


# ---- pages


def _cut(buffer: bytes) -> tuple[int, list[tuple[int, bytes, str | None]]]:
    """Whole pages in the buffer as (start, bytes, fault), and how many bytes are done with."""
    found: list[tuple[int, bytes, str | None]] = []
    position = 0
    while True:
        start = buffer.find(_PAGE, position)
        if start < 0:
            return max(position, len(buffer) - len(_PAGE) + 1), found
        end = buffer.find(_PAGE_END, start)
        another = buffer.find(_PAGE, start + len(_PAGE), end if end >= 0 else len(buffer))
        if another >= 0:
            found.append((start, b"", "truncated page"))
            position = another
        elif end < 0:
            return start, found
        else:
            position = end + len(_PAGE_END)
            found.append((start, buffer[start:position], None))


def _parse(page: bytes, where: str) -> Page:
    text = page.decode("utf-8", "replace").replace("\0", "")
    starts = [match.start() for match in _REVISION.finditer(text)] or [0]
    ends = [*starts[1:], len(text)]
    head = text[: starts[0]] if len(starts) > 1 else text[: _find(text, "<text", 0)]
    newest = max(zip(starts, ends, strict=True), key=lambda bounds: _field(text[bounds[0] : bounds[0] + 2000], "timestamp"))
    revision = text[newest[0] : newest[1]] if len(starts) > 1 else text
    opened = _TEXT.search(revision)
    attributes = opened[1] if opened else ""
    has_text = opened is not None and not attributes.endswith("/")
    content = html.unescape(revision[opened.end() : _find(revision, "</text>", opened.end())]) if opened and has_text else ""
    namespace = _field(head, "ns")
    return Page(
        where,
        html.unescape(_field(head, "title")),
        int(namespace) if namespace.lstrip("-").isdigit() else 0,
        _field(head, "id"),
        _field(revision, "timestamp"),
        _field(revision, "model") or "wikitext",
        "<redirect " in head,
        content,
        len(starts) - 1,
        "deleted=" in attributes,
    )


def _find(text: str, what: str, start: int) -> int:
    place = text.find(what, start)
    return len(text) if place < 0 else place


def _field(text: str, name: str) -> str:
    start = text.find(f"<{name}>")
    if start < 0:
        return ""
    start += len(name) + 2
    return text[start : text.find("<", start)]


def _locate(places: list[tuple[int, str, int]], position: int, name: str) -> str:
    """The label and offset of a position in what was read."""
    for begins, label, offset in reversed(places):
        if begins <= position:
            return f"{label}{offset + position - begins}"
    return f"{name}:{position}"


def _readable(where: str) -> str:
    name, _, offset = where.rpartition(":")
    return f"{name}: offset {offset}"
