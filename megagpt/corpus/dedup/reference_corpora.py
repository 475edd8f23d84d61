"""Corpora deduplicated before, to compare a new crawl with: their indexes are copied, not computed again.

Of an old corpus only what it kept is of interest. Its index is copied without the dropped documents, so that the documents of a
block are those of one frame of its output, where their texts are read again if a new document comes near to them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.config import Config, UserError
from megagpt.corpus.dedup.index import (
    DOCUMENTS_PER_CHUNK,
    IndexedBlock,
    new_folder,
    open_array,
    open_blocks,
    read_raw,
    write_array,
)
from megagpt.corpus.runner.blocks import Block
from megagpt.corpus.runner.ownership import folder_of
from megagpt.corpus.runner.summary import stage_outputs
from megagpt.files import read_json, write_json
from megagpt.settings_record import filled

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KnownBlock:
    """A block of an old corpus: the frame of its output, and the old index, where its documents begin with number `first`."""

    output: Block
    index: Path
    folder: Path
    first: int
    first_own: int
    """The number in the old index that the old corpus's own documents begin with."""


@dataclass(frozen=True, slots=True)
class KnownCorpus:
    """An old corpus; `plan` identifies its documents and settings, `parts` are the folders of its lines or paragraphs."""

    plan: str
    blocks: tuple[KnownBlock, ...]
    parts: tuple[Path, ...]


def write_own(index: Path, settings: dict[str, Any], blocks: list[Block], own: list[IndexedBlock]) -> None:
    """Write the record in `index` from which a later run reads this corpus."""
    places = [[block.name, block.index, place.first] for block, place in zip(blocks, own, strict=True)]
    write_json(index / "own.json", {"settings": settings, "blocks": places})


def open_known(work_dir: Path, config: Config, compared: Sequence[str]) -> KnownCorpus:
    """A finished deduplication below `work_dir`. Raises UserError if there is none, or `compared` settings differ.

    One of format 1 folded all marks: what is a near duplicate of its texts with marks is not found, which is logged.
    """
    output_dir = work_dir / "dedup"
    stage_outputs(output_dir)
    marker = read_json(output_dir / "index" / "index.json")
    if marker.get("format", 1) < 2:
        log.warning(
            "dedup.against: %s was deduplicated in format 1, which dropped vowel signs and voicing marks: near duplicates of "
            "its texts in scripts that have them (Indic, Thai, Arabic, Hebrew, Japanese) are not all found",
            work_dir,
        )
    plan = marker["work"]
    index = folder_of(output_dir / "index", plan)
    own = read_json(index / "own.json")
    before = filled(type(config), own["settings"])
    for name in compared:
        if before[name] != getattr(config, name):
            raise UserError(
                f"dedup.against: {work_dir} was deduplicated with {name}={before[name]}, here it is {getattr(config, name)}: "
                "documents can be compared only if both are equal"
            )
    frames = {name: read_json(output_dir / f"{name}.done.json")["frames"] for name, _, _ in own["blocks"]}
    blocks = []
    for number, (name, at, first) in enumerate(own["blocks"]):
        bounds = [*frames[name], None]
        block = Block(str(output_dir / name), name, at, bounds[at], bounds[at + 1])
        blocks.append(KnownBlock(block, index, index / "blocks" / f"{number:06d}", first, own["blocks"][0][2]))
    parts = tuple(index / "parts" / f"{number:06d}" for number in range(len(blocks)))
    return KnownCorpus(plan, tuple(blocks), parts)


def copy_kept(known: KnownBlock, folder: Path, num_bands: int) -> int:
    """Write the index of an old block without the documents that the old corpus dropped; returns how many are left."""
    (old,) = open_blocks([known.folder])
    stays = open_array(known.index / "kept_by.i64", np.int64)[known.first : known.first + old.num_documents] < 0
    if (known.index / "emptied.u8").is_file():
        at = known.first - known.first_own
        stays &= open_array(known.index / "emptied.u8", np.uint8)[at : at + old.num_documents] == 0
    chosen = np.flatnonzero(stays)
    with new_folder(folder) as temporary:
        write_array(temporary / "exact.bin", np.fromfile(old.folder / "exact.bin", np.uint64).reshape(-1, 2)[chosen])
        write_array(temporary / "raw.u64", read_raw(old)[chosen])
        write_array(temporary / "shingles.u32", np.fromfile(old.folder / "shingles.u32", np.uint32)[chosen])
        keys = _read_keys(old, num_bands)[:, chosen]
        with (temporary / "keys.u64").open("wb") as file:
            for start in range(0, chosen.size, DOCUMENTS_PER_CHUNK):
                file.write(np.ascontiguousarray(keys[:, start : start + DOCUMENTS_PER_CHUNK]).tobytes())
        ids, ends = (old.folder / "ids.bin").read_bytes(), np.fromfile(old.folder / "id_ends.u64", np.uint64)
        starts = np.concatenate([np.zeros(1, np.uint64), ends])[:-1]
        (temporary / "ids.bin").write_bytes(b"".join(ids[starts[i] : ends[i]] for i in chosen))
        write_array(temporary / "id_ends.u64", np.cumsum(ends[chosen] - starts[chosen], dtype=np.uint64))
        write_json(temporary / "block.json", {"documents": int(chosen.size)})
    return int(chosen.size)


def _read_keys(block: IndexedBlock, num_bands: int) -> np.ndarray:
    """uint64 [bands, documents] of a block."""
    keys = np.fromfile(block.folder / "keys.u64", np.uint64)
    bounds = range(0, block.num_documents, DOCUMENTS_PER_CHUNK)
    chunks = [keys[num_bands * at : num_bands * (at + DOCUMENTS_PER_CHUNK)].reshape(num_bands, -1) for at in bounds]
    return np.concatenate([np.empty((num_bands, 0), np.uint64), *chunks], axis=1)
