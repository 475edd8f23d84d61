"""Weights of transformers on disk: a folder of safetensors files, read tensor by tensor and written slice by slice."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megagpt.checkpoint.partitions import ITEM_BYTES, Run, read_partitions, safetensors_header, write_slices
from megagpt.config import UserError
from megagpt.convert.compare_logits import ConversionError
from megagpt.convert.families import Planned, join
from megagpt.engine.base import Partition
from megagpt.files import read_json, write_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SLICE_ELEMENTS = 1 << 22
"""Elements of a tensor that are in memory at a time, where it is written as it is read."""
DTYPES = {"fp32": ("F32", torch.float32), "bf16": ("BF16", torch.bfloat16)}
"""Ours -> safetensors' name and torch's."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor is."""

    file: Path
    name: str
    """In the file."""
    dtype: str
    shape: tuple[int, ...]


class WeightFolder:
    """The safetensors files of a model. Raises UserError on what is missing, torn, or no safetensors at all."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Stored] = {}
        self.deltas: Mapping[str, Tensor] = {}
        """What an adapter adds to a tensor, by name."""
        self.replaced: Mapping[str, Tensor] = {}
        """Tensors of an adapter that take the place of those of the files, in fp32, by name."""
        for file, names in self._files(folder).items():
            opened = self._open(file)
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                if name in self.tensors:
                    raise UserError(f"{file}: {name} is in {self.tensors[name].file.name} too")
                part = opened.get_slice(name)
                if part.get_dtype() not in ("F32", "BF16", "F16"):
                    raise UserError(f"{file}: {name} is {part.get_dtype()}: F32, BF16 and F16 can be converted")
                self.tensors[name] = Stored(file, name, part.get_dtype(), tuple(part.get_shape()))
            missing = sorted(names - self.tensors.keys())
            if missing:
                raise UserError(f"{file}: {missing[0]} is not in it, {INDEX} says it is")

    def read(self, name: str) -> Tensor:
        """A tensor, in the type it is stored in; in fp32 with what an adapter adds, or as it has it."""
        if name in self.replaced:
            return self.replaced[name]
        stored = self.tensors[name]
        found = self._open(stored.file).get_tensor(stored.name)
        return found.float() + self.deltas[name] if name in self.deltas else found

    def rename(self, name: str, new_name: str) -> None:
        """Let a tensor be found under another name."""
        self.tensors[new_name] = self.tensors.pop(name)

    @staticmethod
    def _files(folder: Path) -> dict[Path, set[str]]:
        """Each file with the tensors that the index says are in it."""
        if (folder / INDEX).is_file():
            weight_map = read_json(folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UserError(f"{folder / INDEX}: weight_map: a mapping of tensors to files is expected")
            files: dict[Path, set[str]] = {}
            for tensor, name in weight_map.items():
                files.setdefault(folder / Path(str(name)).name, set()).add(tensor)
            for file in files:
                if not file.is_file():
                    raise UserError(f"{folder / INDEX}: {file.name}: no such file in the folder")
            return dict(sorted(files.items()))
        if (folder / WHOLE).is_file():
            return {folder / WHOLE: set()}
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{folder}: weights are in {pickles[0]} only, a pickle, which can run code and is never opened: "
                f"save them as {WHOLE}"
            )
        raise UserError(f"{folder}: neither {WHOLE} nor {INDEX} is in it")

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{file}: is not a whole safetensors file ({error})") from None


class Parameters:
    """The fp32 parameters of a portable checkpoint, any part at a time."""

    def __init__(self, checkpoint: Path, index: dict[str, list[Run]], shapes: Mapping[str, Sequence[int]]) -> None:
        self._checkpoint, self._index, self.shapes = checkpoint, index, shapes
        self._held: dict[str, Tensor] = {}

    def hold(self, model: nn.Module) -> None:
        """Take the parameters from a model in memory."""
        self._held = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """Rows [first, first + count) of a parameter; None = all behind `first`."""
        if name in self._held:
            return self._held[name][first : None if count is None else first + count].clone()
        rows, *rest = self.shapes[name]
        width = int(np.prod(rest, dtype=np.int64))
        count = rows - first if count is None else count
        data = torch.empty(count * width)
        piece = Partition(data, first * width, rows * width)
        read_partitions(self._checkpoint, {f"param.{name}": piece}, index=self._index)
        return data.view(count, *rest)


def slices_of(planned: Planned, parameters: Parameters, dtype: torch.dtype) -> Iterator[Tensor]:
    """Their tensor in parts that follow each other, cast: by rows where it is one of ours as it is, else whole."""
    rows = planned.shape[0]
    if len(planned.ours) > 1 or planned.transposed:
        parts = {name: parameters.read(name) for name in planned.ours}
        yield join(planned, parts).to(dtype)
        return
    [name] = list(planned.ours)
    width = int(np.prod(planned.shape[1:], dtype=np.int64))
    step = max(1, SLICE_ELEMENTS // width)
    for first in range(0, rows, step):
        yield parameters.read(name, first, min(step, rows - first)).to(dtype)


def write_weights(
    folder: Path,
    plan: Sequence[Planned],
    parameters: Parameters,
    *,
    dtype: str,
    shard_bytes: int,
    part: tuple[int, int] = (0, 1),
) -> dict[str, dict[str, Any]]:
    """Write the tensors of a plan as safetensors files; returns file, sha256 and shape of each tensor written. Of `part` (i, n)
    every n-th file is written, from the i-th on; `write_index` comes after all of them.

    Never more than a slice, or of GPT-2 a joined tensor, is in memory.
    """
    name, torch_dtype = DTYPES[dtype]
    shards: list[list[Planned]] = [[]]
    used = 0
    for planned in plan:
        size = ITEM_BYTES[name] * int(np.prod(planned.shape, dtype=np.int64))
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(planned)
        used += size
    tensors: dict[str, dict[str, Any]] = {}
    mine, of = part
    for number, shard in enumerate(shards, start=1):
        if (number - 1) % of != mine:
            continue
        file = WHOLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header = safetensors_header({planned.theirs: (name, planned.shape) for planned in shard}, {"format": "pt"})
        digests: dict[str, str] = {}
        data = _bytes_of(shard, lambda planned: slices_of(planned, parameters, torch_dtype), header, digests)
        write_slices(folder / file, data)
        for planned in shard:
            shape = list(planned.shape)
            tensors[planned.theirs] = {"file": file, "dtype": name, "shape": shape, "sha256": digests[planned.theirs]}
    return tensors


def write_index(folder: Path, plan: Sequence[Planned], tensors: Mapping[str, Mapping[str, Any]], *, dtype: str) -> None:
    """Write the index of several weight files; one file has none."""
    weight_map = {planned.theirs: tensors[planned.theirs]["file"] for planned in plan}
    if set(weight_map.values()) != {WHOLE}:
        total = sum(ITEM_BYTES[DTYPES[dtype][0]] * int(np.prod(planned.shape, dtype=np.int64)) for planned in plan)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def check_weights_written(folder: Path, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Read every tensor back and compare its sha256 with that of its cast source. Raises ConversionError naming it."""
    headers: dict[str, tuple[int, dict[str, Any]]] = {}
    for name, entry in tensors.items():
        path = folder / entry["file"]
        if entry["file"] not in headers:
            headers[entry["file"]] = _header(path)
        base, header = headers[entry["file"]]
        first, last = header[name]["data_offsets"]
        digest = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(base + first)
            for start in range(first, last, 1 << 24):
                digest.update(file.read(min(1 << 24, last - start)))
        if digest.hexdigest() != entry["sha256"]:
            raise ConversionError(f"{path}: {name}: its bytes on disk are not those that were written")


def _bytes_of(
    shard: Sequence[Planned],
    slices: Callable[[Planned], Iterable[Tensor]],
    header: bytes,
    digests: dict[str, str],
) -> Iterator[memoryview]:
    yield memoryview(header)
    for planned in shard:
        digest = hashlib.sha256()
        for part in slices(planned):
            data = part.contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(data)
            yield data
        digests[planned.theirs] = digest.hexdigest()


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size))
