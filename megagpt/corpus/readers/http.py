"""HTTP messages as crawlers stored them: headers, transfer and content encodings, charset.

Crawlers often keep the server's headers over a body they have already decoded, so every encoding is tried and, where the body
shows that it is not there, left alone. What was wrong is returned as a list of short kinds, for the caller to count.
"""

import codecs
import re
import zlib
from dataclasses import dataclass

import webencodings

MAX_BODY_BYTES = 64 << 20
MAX_INTERIM = 8
MAX_WINDOW_BYTES = 128 << 20
MIN_CUT_BYTES = 64  # what a Brotli decoder gives before it fails is text only from here on: noise too begins to decode
GZIP = 31  # zlib's number for gzip
LONG_BODY, CUT_BODY = "body longer than 64 MiB", "truncated or damaged compressed body"

_META_CHARSET = re.compile(
    rb"""<(?:meta|\?xml)\b[^>]{0,400}?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,40})""", re.I
)
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_CODECS = {
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc-kr": "cp949",
    "iso-2022-jp": "iso2022_jp_ext",
    "iso-8859-8-i": "iso8859_8",
    "utf-16le": "utf-16-le",
    "utf-16be": "utf-16-be",
    "x-user-defined": "cp1252",
}
"""Python's codec for encodings of the web where it has another name or where a larger one reads the same bytes."""
_CHARSETS = re.compile(
    r"(utf_?8(_sig)?|utf_16(_[bl]e)?|utf_32(_[bl]e)?|cp\d+|iso8859_\d+|koi8_[rut]|gb\w+|big5\w*|euc_\w+|shift_jis\w*|iso2022_\w+"
    r"|johab|mac_\w+|hz|tis_620|ptcp154|kz1048|ascii)"
)


@dataclass(frozen=True, slots=True)
class Message:
    """An HTTP response: status (None if the first line is none), headers with lower-case names, body as stored."""

    status: int | None
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Decoded:
    """Text of a body: the charset used (Python's name), and the share of characters that could not be read."""

    text: str
    charset: str
    unreadable: float
    problems: tuple[str, ...]


def parse_message(raw: bytes) -> Message:
    """Split a stored response into status, headers and body; interim responses (100 Continue) before it are passed over.

    A block without a status line is all body.
    """
    for _ in range(MAX_INTERIM):
        message = _parse_one(raw)
        if message.status is None or not 100 <= message.status < 200 or not _is_response(message.body):
            return message
        raw = message.body
    return _parse_one(raw)


def _is_response(raw: bytes) -> bool:
    return raw[:5].upper().startswith(b"HTTP/") or raw[:4] == b"ICY "


def _parse_one(raw: bytes) -> Message:
    if not _is_response(raw):
        return Message(None, {}, raw)
    end = re.search(rb"\r?\n\r?\n", raw)
    head, body = (raw, b"") if end is None else (raw[: end.start()], raw[end.end() :])
    first, *lines = head.decode("latin-1").splitlines()
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    status = re.match(r"\S+\s+(\d{3})", first)
    return Message(int(status[1]) if status else None, headers, body)


def decode_body(message: Message) -> tuple[bytes, list[str]]:
    """Undo chunked transfer and content encodings as far as the body really has them; returns what was wrong beside it."""
    body, problems = message.body, list[str]()
    if "chunked" in message.headers.get("transfer-encoding", "").lower():
        body, problem = _dechunk(body)
        problems += [problem] if problem else []
    encodings = re.split(r"[,\s]+", message.headers.get("content-encoding", "").lower().strip())
    for encoding in reversed([name for name in encodings if name not in ("", "identity", "none")]):
        body, problem = _decompress(body, encoding)
        problems += [problem] if problem else []
    return body, problems


def decode_text(body: bytes, declared: str | None) -> Decoded:
    """Bytes to text by the BOM, the declared charset, the page's meta element, else detection.

    A BOM wins over the header, as browsers have it. Text that is valid UTF-8 with multi-byte characters is UTF-8 whatever was
    declared: the other way round it hardly ever happens. Bytes that the charset cannot hold become U+FFFD.
    """
    problems: list[str] = []
    for bom, charset in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if body.startswith(bom):
            return _decoded(body[len(bom) :], charset, problems)
    meta = _META_CHARSET.search(body[:4096])
    names = [declared, meta[1].decode("ascii") if meta else None]
    for name in names:
        charset = _charset(name)
        if name and charset is None:
            problems.append("unknown charset")
        if charset is None or (charset.startswith("utf-16") and b"\0" not in body[:512]):
            continue
        if charset in ("utf-8", "cp1252") and body.isascii() and _ISO_2022.search(body):
            break
        if charset != "utf-8" and _is_utf8(body):
            return _decoded(body, "utf-8", problems)
        return _decoded(body, charset, problems)
    if _is_utf8(body) or (body.isascii() and not _ISO_2022.search(body)):
        return _decoded(body, "utf-8", problems)
    return _decoded(body, _detect(body), problems)


def charset_of(content_type: str) -> str | None:
    """The charset parameter of a Content-Type."""
    match = re.search(r"charset\s*+=\s*+[\"']?\s*+([^\s\"';,]++)", content_type, re.I)
    return match[1] if match else None


def _charset(name: str | None) -> str | None:
    """Python's codec for a label of the web, None if there is none. Only charsets: Python has other codecs too."""
    if not name:
        return None
    known = webencodings.lookup(name)
    if known is not None and known.name != "replacement":
        return _CODECS.get(known.name) or _codec(known.codec_info.name)
    return _codec(name.strip().lower())


def _codec(name: str) -> str | None:
    try:
        found = codecs.lookup(name).name.replace("-", "_")
    except (LookupError, ValueError):
        return None
    if not _CHARSETS.fullmatch(found):
        return None
    return "utf-8" if found in ("utf_8", "utf_8_sig") else found.replace("utf_16_", "utf-16-")


def _is_utf8(body: bytes) -> bool:
    """Whether it has multi-byte characters and is UTF-8: all of it (but a cut last character) or all but a few bytes."""
    if body.isascii() or _ISO_2022.search(body, 0, 4096):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(body)
    except UnicodeDecodeError:
        characters = len(body) - len(body.translate(None, _UTF8_LEADS))
        damaged = body.decode("utf-8", "replace").count("\ufffd") - body.count(b"\xef\xbf\xbd")
        return characters >= DAMAGED_UTF8 * damaged
    return True


def _detect(body: bytes) -> str:
    """The charset of bytes that declare none."""
    from resiliparse.parse.encoding import detect_encoding

    if match := _ISO_2022.search(body):
        return "iso2022_kr" if match[0] == b"\x1b$)C" else "iso2022_jp_ext"
    found = _charset(detect_encoding(body)) or "utf-8"
    return max(_HAN_CODECS, key=lambda codec: _commonness(body, codec)) if found in _HAN_CODECS else found


def _commonness(body: bytes, codec: str) -> float:
    """Share of common ones among a text's ideographs if it is in this charset; damaged characters count against it."""
    text = body[:20000].decode(codec, "replace")
    num_ideographs = sum("\u4e00" <= character <= "\u9fff" for character in text)
    common = sum(map(text.count, _COMMON_IDEOGRAPHS))
    return (common - 5 * text.count("\ufffd")) / max(1, num_ideographs)


_ISO_2022 = re.compile(rb"\x1b\$(?:[@B]|\)C|\([A-D])")
_UTF8_LEADS = bytes(range(0xC2, 0xF5))
DAMAGED_UTF8 = 10  # whole multi-byte characters per damaged one from which a text counts as UTF-8
_HAN_CODECS = ("gb18030", "big5hkscs")
_COMMON_IDEOGRAPHS = (
    "的一是不了人在有我他这這中大来來上个個国國到说說们們为為子和你地出道也时時年得就那要下以生会會自着著去之过過家学學对對可里後后么麼心"
    "多天而能好都然没沒日于於起还還发發成事只作当當想看文无無开開手十用主行方又如前所本见見经經头頭面公同三已老从從动動两兩长長"
)


def _decoded(body: bytes, charset: str, problems: list[str]) -> Decoded:
    text = body.decode(charset, "replace")
    num_replaced = text.count("\ufffd")
    if num_replaced:
        problems.append("invalid UTF-8" if charset == "utf-8" else "bytes that the charset cannot hold")
    num_controls = 0
    if charset != "utf-8" or _holds_controls(body):
        num_controls = len(_CONTROLS.findall(text))
    if num_controls:
        text = _CONTROLS.sub(" ", text)
    return Decoded(text, charset, (num_replaced + num_controls) / max(1, len(text)), tuple(problems))


_CONTROLS = re.compile(r"[\0-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")
_CONTROL_BYTES = bytes([*range(9), 11, *range(14, 32), 127])
_UTF8_CONTROLS = re.compile(rb"\xc2[\x80-\x84\x86-\x9f]")


def _holds_controls(body: bytes) -> bool:
    """Whether UTF-8 holds what _CONTROLS matches, told from its bytes: many times as fast."""
    return len(body.translate(None, _CONTROL_BYTES)) < len(body) or _UTF8_CONTROLS.search(body) is not None


def _dechunk(body: bytes) -> tuple[bytes, str | None]:
    """The payload of a chunked body, or the body itself if it does not begin with a chunk."""
    pieces: list[bytes] = []
    position = 0
    while match := _CHUNK_SIZE.match(body, position):
        size = int(match[1], 16)
        if size == 0:
            return b"".join(pieces), None
        piece = body[match.end() : match.end() + size]
        position = match.end() + size
        following = body[position : position + 2]
        if not pieces and len(piece) == size and following and following[:1] not in b"\r\n":
            return body, "wrong Transfer-Encoding: the body is not chunked"
        pieces.append(piece)
        if len(piece) < size:
            break
        position += 2 if following == b"\r\n" else 1
    if not pieces:
        return body, "wrong Transfer-Encoding: the body is not chunked" if body else None
    return b"".join(pieces), "truncated chunked body"


def _decompress(body: bytes, encoding: str) -> tuple[bytes, str | None]:
    wrong = f"wrong Content-Encoding: the body is not {encoding}"
    if not body:
        return body, None
    match encoding:
        case "gzip" | "x-gzip":
            return _inflate(body, GZIP) if body[:2] == b"\x1f\x8b" else (body, wrong)
        case "deflate":
            plain, problem = _inflate(body, 15)
            if plain is body:
                plain, problem = _inflate(body, -15)
            return (body, wrong) if plain is body else (plain, problem)
        case "br":
            return _unbrotli(body, wrong)
        case "zstd":
            return _unzstd(body, wrong)
    return body, "unknown Content-Encoding"


def _inflate(body: bytes, wbits: int) -> tuple[bytes, str | None]:
    """Decompress all members as far as it goes; the body itself if nothing comes out."""
    pieces: list[bytes] = []
    size, rest, is_whole = 0, body, False
    try:
        while rest and (not pieces or rest[:2] == b"\x1f\x8b"):
            decoder, is_whole, at = zlib.decompressobj(wbits), False, 0
            while at < len(rest) and not decoder.eof:
                pieces.append(decoder.decompress(rest[at : at + 4096], MAX_BODY_BYTES))
                size += len(pieces[-1])
                at += 4096
                if size > MAX_BODY_BYTES:
                    return b"".join(pieces)[:MAX_BODY_BYTES], LONG_BODY
            if not decoder.eof:
                break
            is_whole, rest = True, decoder.unused_data + rest[at:]
            if wbits != GZIP:
                break
    except zlib.error:
        is_whole = False
    plain = b"".join(pieces)
    if is_whole:
        return plain, None
    return (plain, CUT_BODY) if plain else (body, "damaged compressed body")


def _unbrotli(body: bytes, wrong: str) -> tuple[bytes, str | None]:
    import brotli

    if body.lstrip()[:1] == b"<":
        return body, wrong
    decoder, pieces, size = brotli.Decompressor(), [], 0
    try:
        for start in range(0, len(body), 4096):
            pieces.append(decoder.process(body[start : start + 4096], output_buffer_limit=MAX_BODY_BYTES))
            size += len(pieces[-1])
            if size >= MAX_BODY_BYTES:
                return b"".join(pieces)[:MAX_BODY_BYTES], LONG_BODY
    except brotli.error:
        return (b"".join(pieces), CUT_BODY) if size >= MIN_CUT_BYTES else (body, wrong)
    if decoder.is_finished():
        return b"".join(pieces), None
    return (b"".join(pieces), CUT_BODY) if size >= MIN_CUT_BYTES else (body, wrong)


def _unzstd(body: bytes, wrong: str) -> tuple[bytes, str | None]:
    """Decompress all frames."""
    import zstandard

    pieces: list[bytes] = []
    size, rest = 0, body
    try:
        while rest:
            decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
            for at in range(0, len(rest), 4096):
                pieces.append(decoder.decompress(rest[at : at + 4096]))
                size += len(pieces[-1])
                if size > MAX_BODY_BYTES:
                    return b"".join(pieces)[:MAX_BODY_BYTES], LONG_BODY
                if decoder.eof:
                    rest = decoder.unused_data + rest[at + 4096 :]
                    break
            else:
                return (b"".join(pieces), CUT_BODY) if size else (body, wrong)
    except zstandard.ZstdError:
        return (b"".join(pieces), CUT_BODY) if size else (body, wrong)
    return b"".join(pieces), None
