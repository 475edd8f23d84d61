"""Token shards, the contract between the corpus half and the training half: Megatron's `.bin` + `.idx` and a manifest.

A split is one folder: `manifest.json`, and per shard `<name>.bin` (little-endian tokens, no header), `<name>.idx` (Megatron's
index, byte for byte) and `<name>.docs.parquet` (one row per document: id, url, source, tokens, bytes). Every document ends with
the end-of-text token, which counts as one of its tokens. The manifest is written last, so a folder without one is unfinished.
Rows of fine-tuning data have `<name>.mask` besides: one bit per token, lowest first, 1 = a target (Manifest.supervised). Where
rows are texts of a classifier, the number of its class ends each in the place of the end of text (Manifest.classes).

Opening a split checks the manifest and the size of every file. A shard's index is checked when the shard is first touched, and
each 4 MiB block of tokens (xxh3) when it is first read: nothing is read before it is needed, and nothing unverified is used.
"""

import contextlib
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from megagpt.config import UserError
from megagpt.data.arrow import number_column, text_column
from megagpt.files import read_json, sha256_file, sync, write_json

BLOCK_BYTES = 4 << 20
MAGIC, OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX"
HEADER_BYTES = 34
DTYPE_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
FORMAT, SUPERVISED_FORMAT, CLASSES_FORMAT = 1, 2, 3
"""Versions of manifest.json; the second has masks, which a release that knows the first one only would leave out, and in the
third the targets are numbers of classes."""
INDEX_HASH_BYTES = 64 << 20
"""An index up to this size is hashed when its shard is first touched; a larger one by `verify_shard` (header, size always)."""


class ShardError(UserError):
    """A shard that is damaged or does not fit its manifest; the message names the file and the rule."""


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The entry of one shard in the manifest; sizes in bytes, hashes in hex."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of source text, for bits per byte."""
    bin_bytes: int
    idx_bytes: int
    docs_bytes: int
    idx_sha256: str
    docs_sha256: str
    blocks_xxh3: str
    """16 hex digits per 4 MiB block of `.bin`, concatenated."""
    targets: int | None = None
    """Tokens that are targets; None: no mask says so, all are."""
    mask_bytes: int | None = None
    mask_sha256: str | None = None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of its files."""
        return (".bin", ".idx", ".docs.parquet", *(() if self.mask_sha256 is None else (".mask",)))


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json of one split."""

    split: str
    dtype: str
    vocab_size: int
    eot_id: int
    tokenizer_sha256: str
    config_sha256: str
    shards: tuple[ShardInfo, ...]
    format: int = FORMAT
    pack_seq_len: int | None = None
    """Documents were placed so that samples of this many tokens cut few of them; None: they were not."""
    supervised: Literal["packed", "padded"] | None = None
    """Rows of fine-tuning data with masks, in samples of pack_seq_len tokens: several in one, or one. None: documents."""
    classes: tuple[str, ...] = ()
    """Names of classes: the one target of each row stands in the place of its end of text and is the number of its class."""

    @property
    def tokens(self) -> int:
        """Tokens in all shards, end-of-text included."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text in all shards."""
        return sum(shard.text_bytes for shard in self.shards)


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule: uint16 below 65,500 ids (added ones included), else int32."""
    return np.dtype("<u2") if vocab_size < 65_500 else np.dtype("<i4")


def manifest_json(manifest: Manifest) -> dict[str, Any]:
    """A manifest as JSON; what only rows of fine-tuning data have is absent from others, which stay as they were."""
    value = asdict(manifest)
    if not manifest.classes:
        del value["classes"]
    if manifest.supervised is None:
        del value["supervised"]
        later = ("targets", "mask_bytes", "mask_sha256")
        value["shards"] = [{k: v for k, v in shard.items() if k not in later} for shard in value["shards"]]
    return value


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json: from now on the split is complete."""
    write_json(directory / "manifest.json", manifest_json(manifest))


def read_manifest(directory: Path) -> Manifest:
    """Read manifest.json and check the size of every file it names. Raises ShardError naming the file."""
    manifest = parse_manifest(directory / "manifest.json")
    for info in manifest.shards:
        _check_sizes(directory, info, np.dtype(manifest.dtype))
    return manifest


def parse_manifest(path: Path) -> Manifest:
    """What a manifest.json says, whatever has become of the files it names. Raises ShardError naming it."""
    if not path.is_file():
        hint = "no manifest.json here: a folder of finished shards has one (tools/tokenize_documents.py writes it last)"
        raise ShardError(f"{path.parent}: {hint}")
    try:
        values = read_json(path)
    except UserError as error:
        raise ShardError(str(error)) from None
    try:
        if values["format"] not in (FORMAT, SUPERVISED_FORMAT, CLASSES_FORMAT):
            known = f"this version reads formats {FORMAT} to {CLASSES_FORMAT}"
            raise ShardError(f"{path}: format={values['format']}, {known}")
        shards, classes = tuple(ShardInfo(**shard) for shard in values["shards"]), tuple(values.get("classes", ()))
        manifest = Manifest(**{**values, "shards": shards, "classes": classes})
        np.dtype(manifest.dtype)
    except (KeyError, TypeError) as error:
        raise ShardError(f"{path}: not a shard manifest ({error})") from None
    return manifest


class Shard:
    """One open shard. `read` gives tokens, memory-mapped, each block verified when it is first read."""

    def __init__(self, directory: Path, info: ShardInfo, dtype: str) -> None:
        self.path = directory / f"{info.name}.bin"
        self.info = info
        self.dtype = np.dtype(dtype)
        check_index(directory / f"{info.name}.idx", info, self.dtype)
        self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r") if info.bin_bytes else np.zeros(0, np.uint8)
        if self._bytes.size != info.bin_bytes:
            raise ShardError(f"{self.path}: {self._bytes.size} bytes, the manifest says {info.bin_bytes}")
        self._tokens = self._bytes.view(self.dtype)
        self._verified = bytearray(_num_blocks(info.bin_bytes))
        self._mask: np.ndarray | None = None

    def __len__(self) -> int:
        return self.info.tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) in the shard's dtype. Raises ShardError on a damaged block or a range outside."""
        if start < 0 or start + count > self.info.tokens:
            raise ShardError(f"{self.path}: tokens {start} to {start + count} asked of a shard with {self.info.tokens}")
        if count > 0:
            width = self.dtype.itemsize
            for block in range(start * width // BLOCK_BYTES, ((start + count) * width - 1) // BLOCK_BYTES + 1):
                if not self._verified[block]:
                    self.verify_block(block)
        return self._tokens[start : start + count]

    def targets(self, start: int, count: int) -> np.ndarray:
        """(count,) bool: which of the tokens from `start` on are targets. Raises ShardError on a damaged mask."""
        if self._mask is None:
            path = self.path.with_suffix(".mask")
            problem = mask_problem(path, self.info)
            if problem:
                raise ShardError(problem)
            self._mask = np.fromfile(path, np.uint8)
        first, last = start // 8, -(-(start + count) // 8)
        bits = np.unpackbits(self._mask[first:last], bitorder="little")
        return bits[start - 8 * first :][:count].astype(np.bool_)

    def verify_block(self, block: int) -> None:
        """Compare one 4 MiB block with the manifest's xxh3. Raises ShardError naming file, block and rule."""
        piece = self._bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
        found, expected = xxhash.xxh3_64_hexdigest(piece.data), self.info.blocks_xxh3[block * 16 : block * 16 + 16]
        if found != expected:
            where = f"block {block} (bytes {block * BLOCK_BYTES} to {block * BLOCK_BYTES + piece.size})"
            raise ShardError(
                f"{self.path}: {where} has xxh3 {found}, the manifest says {expected}: the file changed after it was written; "
                "restore it or tokenize again"
            )
        self._verified[block] = 1

    def document_offsets(self) -> np.ndarray:
        """(documents + 1,) int64: the first token of each document, and the end; read from `.idx`."""
        return document_offsets(self.path.with_suffix(".idx"), self.dtype)


def open_shard(directory: Path, info: ShardInfo, dtype: str) -> Shard:
    """Map one shard; checks its index and sizes. Raises ShardError naming the file and the rule."""
    _check_sizes(directory, info, np.dtype(dtype))
    return Shard(directory, info, dtype)


def verify_shard(directory: Path, info: ShardInfo, dtype: str) -> Iterator[str]:
    """Check everything about one shard; yields one message per fault, nothing when it is sound."""
    try:
        shard = open_shard(directory, info, dtype)
    except ShardError as error:
        yield str(error)
        return
    for block in range(_num_blocks(info.bin_bytes)):
        try:
            shard.verify_block(block)
        except ShardError as error:
            yield str(error)
    for suffix, expected in ((".idx", info.idx_sha256), (".docs.parquet", info.docs_sha256)):
        path = directory / f"{info.name}{suffix}"
        found = sha256_file(path)
        if found != expected:
            yield f"{path}: sha256 {found}, the manifest says {expected}"
    if info.mask_sha256 is not None:
        problem = mask_problem(directory / f"{info.name}.mask", info)
        if problem:
            yield problem
    offsets = shard.document_offsets()
    if int(offsets[-1]) != info.tokens:
        yield f"{shard.path.with_suffix('.idx')}: its documents hold {offsets[-1]} tokens, the manifest says {info.tokens}"


def mask_problem(path: Path, info: ShardInfo) -> str:
    """What is wrong with the mask of a shard, "" if nothing: its sha256 and the number of targets are compared."""
    if info.mask_sha256 is None:
        return f"{path}: the manifest names no mask for this shard"
    found = sha256_file(path) if path.is_file() else "missing"
    if found != info.mask_sha256:
        return f"{path}: sha256 {found}, the manifest says {info.mask_sha256}"
    targets = int(np.bitwise_count(np.fromfile(path, np.uint8)).sum())
    return "" if targets == info.targets else f"{path}: {targets} targets, the manifest says {info.targets}"


def check_index(path: Path, info: ShardInfo, dtype: np.dtype) -> None:
    """Check magic, version, dtype, counts, size and (up to 64 MiB) sha256 of an index. Raises ShardError."""
    found_dtype, sequences, documents = read_index_header(path)
    if found_dtype != dtype:
        raise ShardError(f"{path}: holds {found_dtype} tokens, the manifest says {dtype}")
    if documents != info.documents:
        raise ShardError(f"{path}: {documents} documents, the manifest says {info.documents}")
    expected = HEADER_BYTES + 12 * sequences + 8 * (documents + 1)
    if path.stat().st_size != expected:
        raise ShardError(f"{path}: {path.stat().st_size} bytes, {expected} are needed for {sequences} sequences: truncated?")
    if expected <= INDEX_HASH_BYTES and sha256_file(path) != info.idx_sha256:
        raise ShardError(f"{path}: sha256 differs from the manifest's {info.idx_sha256}: the file changed after it was written")


def read_index_header(path: Path) -> tuple[np.dtype, int, int]:
    """(token dtype, sequences, documents) of a Megatron `.idx`. Raises ShardError on anything else."""
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}") from None
    if header.startswith(OLD_MAGIC):
        raise ShardError(f"{path}: magic TNTIDX, the old fairseq index format: convert it with Megatron's own tools first")
    if not header.startswith(MAGIC):
        raise ShardError(f"{path}: does not begin with MMIDIDX: not a Megatron index")
    if len(header) < HEADER_BYTES:
        raise ShardError(f"{path}: {len(header)} bytes, the header alone has {HEADER_BYTES}: truncated")
    version, code, sequences, ends = struct.unpack("<QBQQ", header[len(MAGIC) :])
    if version != 1:
        raise ShardError(f"{path}: index version {version}, only version 1 is known")
    if code not in DTYPE_CODES:
        raise ShardError(f"{path}: dtype code {code}, known are 1 to 8")
    if ends < 1:
        raise ShardError(f"{path}: {ends} document ends, the list has one more than there are documents")
    return np.dtype(DTYPE_CODES[code]).newbyteorder("<"), sequences, ends - 1


def document_offsets(path: Path, dtype: np.dtype) -> np.ndarray:
    """(documents + 1,) int64 token offsets from a Megatron `.idx`: the first token of each document, and the end."""
    _, sequences, documents = read_index_header(path)
    if path.stat().st_size != HEADER_BYTES + 12 * sequences + 8 * (documents + 1):
        raise ShardError(
            f"{path}: {path.stat().st_size} bytes do not fit {sequences} sequences, {documents} documents: truncated?"
        )
    starts = np.zeros(sequences + 1, np.int64)
    lengths = np.memmap(path, "<i4", "r", HEADER_BYTES, (sequences,)) if sequences else np.zeros(0, np.int32)
    np.cumsum(lengths, out=starts[1:], dtype=np.int64)
    ends = np.fromfile(path, "<i8", documents + 1, offset=HEADER_BYTES + 12 * sequences)
    if ends[0] != 0 or ends[-1] != sequences or np.any(ends[1:] < ends[:-1]) or np.any(lengths < 0):
        raise ShardError(f"{path}: document ends are not ascending from 0 to {sequences}: the file is damaged")
    return starts[ends]


class ShardWriter:
    """Writes one shard in a `.tmp-*` folder of its own; nothing has its final name before `close`.

    Memory does not grow with the shard: lengths go to a file, blocks are hashed as they fill. Use it in a `with`.
    `masked`: each document comes with its targets.
    """

    def __init__(self, directory: Path, name: str, dtype: np.dtype, *, masked: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.name, self.dtype = directory, name, dtype
        self.tokens = self.documents = self.sequences = self.text_bytes = 0
        self._temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{name}-", dir=directory))
        self._bin = (self._temporary / "bin").open("wb")
        self._lengths = (self._temporary / "lengths").open("w+b")
        self._ends = (self._temporary / "ends").open("w+b")
        self._ends.write(struct.pack("<q", 0))
        self._marks = (self._temporary / "marks").open("w+b") if masked else None
        self._hash, self._hash_bytes, self._blocks = xxhash.xxh3_64(), 0, []
        self._rows: dict[str, list[Any]] = {column: [] for column in ("id", "url", "source", "tokens", "bytes")}
        self._docs: Any = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.abandon()

    def add(self, tokens: np.ndarray, *, id: str, url: str | None = None, source: str = "", text_bytes: int = 0) -> None:
        """Append one document, its end-of-text token included; an empty one has no sequence."""
        self.add_many(tokens, [len(tokens)], {"id": [id], "url": [url], "source": [source], "bytes": [text_bytes]})

    def add_many(
        self, tokens: np.ndarray, lengths: Any, rows: Mapping[str, list[Any]], targets: np.ndarray | None = None
    ) -> None:
        """Append documents: flat `tokens`, their `lengths`, and per document id, url, source, bytes (of UTF-8 text); `targets`
        of a masked shard: a bool per token."""
        lengths = np.asarray(lengths, np.int64)
        if self._marks is not None:
            assert targets is not None
            assert len(targets) == len(tokens)
            self._marks.write(np.ascontiguousarray(targets, np.bool_).data)
        if tokens.size and (int(tokens.max()) > np.iinfo(self.dtype).max or int(tokens.min()) < 0):
            raise ShardError(f"{self.directory / self.name}: token id {tokens.max()} does not fit {self.dtype}")
        data = np.ascontiguousarray(tokens, self.dtype).tobytes()
        self._bin.write(data)
        self._hash_blocks(memoryview(data))
        filled = lengths[lengths > 0]
        self._lengths.write(filled.astype("<i4").tobytes())
        self._ends.write((self.sequences + np.cumsum(lengths > 0)).astype("<i8").tobytes())
        self.sequences += len(filled)
        self.tokens += int(lengths.sum())
        self.documents += len(lengths)
        self.text_bytes += sum(rows["bytes"])
        for column, values in (*rows.items(), ("tokens", lengths.tolist())):
            self._rows[column].extend(values)
        if len(self._rows["id"]) >= 65_536:
            self._flush_rows()

    def close(self) -> ShardInfo:
        """Finish: index, rows and hashes are written, synced and renamed. Returns the manifest's entry."""
        self._bin.close()
        if self._hash_bytes:
            self._blocks.append(self._hash.hexdigest())
        self._write_index()
        self._flush_rows()
        self._docs.close()
        suffixes = (".bin", ".idx", ".docs.parquet", *(() if self._marks is None else (".mask",)))
        paths = {suffix: self._temporary / suffix[1:] for suffix in suffixes}
        targets = None if self._marks is None else self._write_mask(self._marks)
        info = ShardInfo(
            name=self.name,
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            bin_bytes=paths[".bin"].stat().st_size,
            idx_bytes=paths[".idx"].stat().st_size,
            docs_bytes=paths[".docs.parquet"].stat().st_size,
            idx_sha256=sha256_file(paths[".idx"]),
            docs_sha256=sha256_file(paths[".docs.parquet"]),
            blocks_xxh3="".join(self._blocks),
            targets=targets,
            mask_bytes=None if targets is None else paths[".mask"].stat().st_size,
            mask_sha256=None if targets is None else sha256_file(paths[".mask"]),
        )
        for suffix, path in paths.items():
            sync(path)
            path.replace(self.directory / f"{self.name}{suffix}")
        sync(self.directory)
        self.abandon()
        return info

    def abandon(self) -> None:
        """Remove what was not finished; after `close` only the helper files are left to remove."""
        for file in (self._bin, self._lengths, self._ends, *(() if self._marks is None else (self._marks,))):
            # A full disk fails again when the buffer is flushed; that must not hide the first error nor leave the folder.
            with contextlib.suppress(OSError):
                file.close()
        if self._docs is not None:
            with contextlib.suppress(OSError):
                self._docs.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _hash_blocks(self, data: memoryview) -> None:
        while len(data):
            piece = data[: BLOCK_BYTES - self._hash_bytes]
            self._hash.update(piece)
            self._hash_bytes += len(piece)
            data = data[len(piece) :]
            if self._hash_bytes == BLOCK_BYTES:
                self._blocks.append(self._hash.hexdigest())
                self._hash, self._hash_bytes = xxhash.xxh3_64(), 0

    def _write_mask(self, marks: Any) -> int:
        """Pack a byte per token into bits; returns how many are targets."""
        targets = 0
        with (self._temporary / "mask").open("wb") as file:
            for chunk in _chunks(marks):  # of 2^20 bytes, a multiple of 8
                found = np.frombuffer(chunk, np.bool_)
                targets += int(np.count_nonzero(found))
                file.write(np.packbits(found, bitorder="little").tobytes())
        return targets

    def _write_index(self) -> None:
        code = next(code for code, name in DTYPE_CODES.items() if np.dtype(name) == self.dtype)
        with (self._temporary / "idx").open("wb") as file:
            file.write(MAGIC + struct.pack("<QBQQ", 1, code, self.sequences, self.documents + 1))
            for chunk in _chunks(self._lengths):
                file.write(chunk)
            position = 0
            for chunk in _chunks(self._lengths):
                ends = position + np.cumsum(np.frombuffer(chunk, "<i4"), dtype=np.int64) * self.dtype.itemsize
                file.write(np.concatenate([[position], ends[:-1]]).astype("<i8").tobytes())
                position = int(ends[-1])
            for chunk in _chunks(self._ends):
                file.write(chunk)

    def _flush_rows(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        texts, numbers = ("id", "url", "source"), ("tokens", "bytes")
        schema = pa.schema([*((name, pa.string()) for name in texts), *((name, pa.int64()) for name in numbers)])
        if self._docs is None:
            self._docs = pq.ParquetWriter(
                self._temporary / "docs.parquet",
                schema,
                compression="zstd",
                use_dictionary=["source"],  # pyright: ignore[reportArgumentType] (its stub says bool)
            )
        if self._rows["id"]:
            columns = [text_column(self._rows[name]) for name in texts] + [number_column(self._rows[name]) for name in numbers]
            self._docs.write_table(pa.table(columns, schema=schema))
            self._rows = {column: [] for column in self._rows}


def _chunks(file: Any) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(1 << 20):
        yield chunk


def _num_blocks(size: int) -> int:
    return -(-size // BLOCK_BYTES)


def _check_sizes(directory: Path, info: ShardInfo, dtype: np.dtype) -> None:
    if info.tokens * dtype.itemsize != info.bin_bytes or len(info.blocks_xxh3) != 16 * _num_blocks(info.bin_bytes):
        raise ShardError(f"{directory / 'manifest.json'}: {info.name}: tokens, bin_bytes and blocks_xxh3 do not agree")
    sizes = [(".bin", info.bin_bytes), (".idx", info.idx_bytes), (".docs.parquet", info.docs_bytes)]
    sizes += [] if info.mask_bytes is None else [(".mask", info.mask_bytes)]
    for suffix, expected in sizes:
        path = directory / f"{info.name}{suffix}"
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror}, but the manifest names it") from None
        if size != expected:
            raise ShardError(f"{path}: {size} bytes, the manifest says {expected}: truncated or overwritten")
