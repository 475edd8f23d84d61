"""The tensors of a checkpoint on disk: runs of flattened fp32 tensors in safetensors files, one file per writing rank."""

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.checkpoint.on_disk import verify
from megagpt.config import Failure
from megagpt.distributed.world import World
from megagpt.engine.base import Partition

Shares: TypeAlias = dict[str, tuple[int, Tensor]]
"""The share of one rank: by name, the offset in the flattened tensor and the 1-D fp32 elements from there."""


class CheckpointError(Failure):
    """A checkpoint that is torn, changed, or does not fit; the message names the file and the rule."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run of consecutive elements of one flattened tensor, on disk: `file` holds elements [start, start + length)."""

    file: str
    start: int
    length: int


def problems_of(path: Path, world: World) -> list[str]:
    """Problems of a checkpoint, one line for each rank that found some, the same on every rank; [] = good.

    The ranks share the reading and call it together.
    """
    return [text for text in world.gather("; ".join(verify(path, world.rank, world.size, world.progress))) if text]


def read_partitions(
    path: Path,
    partitions: Mapping[str, Partition],
    world: World | None = None,
    index: dict[str, list[Run]] | None = None,
) -> None:
    """Fill `partitions` in place from the files that overlap with them. Raises CheckpointError if elements are missing.

    Pass `index` to read the same checkpoint many times without reading all headers again.
    """
    if index is None:
        index = index_of(path) if world is None or world.rank == 0 else None
        index = world.broadcast(index) if world is not None else index
    index = index or {}
    wanted: dict[str, list[tuple[str, Partition, Run]]] = {}
    for key, partition in partitions.items():
        covered = 0
        for run in index.get(key, ()):
            overlap = min(run.start + run.length, partition.start + len(partition.data)) - max(run.start, partition.start)
            if overlap > 0:
                wanted.setdefault(run.file, []).append((key, partition, run))
                covered += overlap
        if covered != len(partition.data):
            raise CheckpointError(
                f"{path}: holds {covered} of the {len(partition.data)} elements of {key} that this rank needs"
            )
    with torch.no_grad():
        for name, reads in sorted(wanted.items()):
            with _opened(path / name, "pt") as file:
                for key, partition, run in reads:
                    first = max(run.start, partition.start)
                    last = min(run.start + run.length, partition.start + len(partition.data))
                    source = file.get_slice(key)[first - run.start : last - run.start]
                    partition.data[first - partition.start : last - partition.start].copy_(source)
                    if world is not None:
                        world.progress()


def write_partitions(
    folder: Path, rank: int, shares: Shares, progress: Callable[[], object] | None = None
) -> tuple[str, dict[str, Any]]:
    """Write this rank's file; returns its name and its entry in the manifest. `progress` is called for every slice written."""
    name = f"pieces_{rank:05d}.safetensors"
    tensors = {key: data for key, (_, data) in shares.items() if len(data)}
    starts = {key: str(start) for key, (start, data) in shares.items() if len(data)}
    size, digest = write_safetensors(folder / name, tensors, starts, progress)
    return name, {"size": size, "sha256": digest}


def own_share(partition: Partition) -> tuple[int, Tensor]:
    """(start, data) that this rank writes: all of a partition, or its part of one that several ranks hold."""
    length = len(partition.data)
    first, last = length * partition.copy // partition.copies, length * (partition.copy + 1) // partition.copies
    return partition.start + first, partition.data[first:last]


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], progress: Callable[[], object] | None = None
) -> tuple[int, str]:
    """Write 1-D tensors of fp32, or of bf16 as fp32, tensor by tensor, fsync; returns (bytes, sha256). https://huggingface.co/docs/safetensors.

    The library's own writer needs all of them as bytes in memory at once and a second read for the checksum.
    """
    header = safetensors_header({key: ("F32", (len(tensor),)) for key, tensor in tensors.items()}, metadata)
    return write_slices(path, _slices(header, tensors.values()), progress)


ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
"""Bytes of an element, by safetensors' name of the type."""


def safetensors_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file whose tensors (type, shape) follow each other in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, (dtype, shape) in tensors.items():
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_slices(path: Path, slices: Iterable[memoryview], progress: Callable[[], object] | None = None) -> tuple[int, str]:
    """Write a file slice by slice, fsync; returns (bytes, sha256). `progress` is called for every slice written."""
    digest, size, hashing = hashlib.sha256(), 0, deque[Future[None]]()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as hasher:
        for data in slices:
            hashing.append(hasher.submit(digest.update, data))
            _write_all(file, data)
            os.posix_fadvise(file.fileno(), size, len(data), os.POSIX_FADV_DONTNEED)  # the disk begins now, not at the fsync
            size += len(data)
            if progress is not None:
                progress()
            if len(hashing) > HASHED_LATER:
                hashing.popleft().result()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


SLICE_BYTES, HASHED_LATER = 16 << 20, 16
"""Bytes of one write, and how many writes the checksum may lag behind."""


def _slices(header: bytes, tensors: Iterable[Tensor]) -> Iterable[memoryview]:
    yield memoryview(header)
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise CheckpointError(f"a partition is {tensor.dtype}, checkpoints hold fp32")
        data = tensor.detach().cpu().float().contiguous().numpy().view(np.uint8).data
        for start in range(0, len(data), SLICE_BYTES):
            yield data[start : start + SLICE_BYTES]


def _write_all(file: FileIO, data: memoryview) -> None:
    """A full disk may take a part of the data; the next write then raises."""
    while data:
        data = data[file.write(data) :]


def index_of(path: Path) -> dict[str, list[Run]]:
    """Where each tensor's runs are, from the headers of a checkpoint's files. Raises CheckpointError on other files."""
    index: dict[str, list[Run]] = {}
    for file in sorted(path.glob("pieces_*.safetensors")):
        with _opened(file, "np") as opened:
            starts = opened.metadata() or {}
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                shape, start = opened.get_slice(key).get_shape(), str(starts.get(key))
                if len(shape) != 1 or not start.isdecimal():
                    raise CheckpointError(f"{file}: {key}: not a run of a tensor: shape {shape}, start {start} in its metadata")
                index.setdefault(key, []).append(Run(file.name, int(start), shape[0]))
    return index


def _opened(file: Path, framework: str) -> Any:
    """The file, if it is safetensors. No other format is ever tried, least of all one that holds code."""
    try:
        return safe_open(file, framework=framework)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: is not a safetensors file ({error})") from None
