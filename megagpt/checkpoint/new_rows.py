"""Weights for a model with a larger vocabulary: rows of old ids are unchanged, rows of new ids get the mean of the old ones.

A new row at the mean gives a new token the average of all logits: it is neither likely nor impossible, and the loss of old
tokens hardly moves (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint.partitions import Run, read_partitions
from megagpt.distributed.world import World
from megagpt.engine.base import Partition

RESIZED = ("embedding.weight", "head.weight")
"""Parameters with a row per id."""
ROWS_AT_A_TIME = 4096


@dataclass(frozen=True, slots=True)
class NewRows:
    """`first`: ids below it keep their meaning, ids from it on are new. `width`: elements of a row."""

    first: int
    width: int


def read_with_new_rows(
    path: Path, partitions: Mapping[str, Partition], rows: NewRows, world: World | None, index: dict[str, list[Run]]
) -> None:
    """Fill `partitions` from a checkpoint whose vocabulary was smaller; all ranks call it together."""
    kept, resized = rows.first * rows.width, {f"param.{name}" for name in RESIZED}
    wanted = {}
    for key, partition in partitions.items():
        data = partition.data
        if key in resized:
            data = data[: max(0, kept - partition.start)]
        if len(data):
            wanted[key] = Partition(data, partition.start, partition.numel)
    read_partitions(path, wanted, world, index)
    with torch.no_grad():
        for key in sorted(resized & set(partitions)):
            partition = partitions[key]
            begin = max(0, kept - partition.start)
            if begin < len(partition.data):
                mean = _mean_row(path, key, rows, world, index)
                columns = torch.arange(partition.start + begin, partition.start + len(partition.data)) % rows.width
                partition.data[begin:] = mean[columns].to(partition.data)


def _mean_row(path: Path, key: str, rows: NewRows, world: World | None, index: dict[str, list[Run]]) -> Tensor:
    """[width] fp32: the mean of the old rows, summed in fp64, the same on every rank."""
    total = torch.zeros(rows.width, dtype=torch.float64)
    for first in range(0, rows.first, ROWS_AT_A_TIME):
        count = min(ROWS_AT_A_TIME, rows.first - first)
        data = torch.empty(count * rows.width)
        read_partitions(path, {key: Partition(data, first * rows.width, len(data))}, world, index)
        total += data.view(count, rows.width).double().sum(dim=0)
    return (total / rows.first).float()
