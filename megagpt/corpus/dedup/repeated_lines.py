"""Drop lines or paragraphs that occurred before in any kept document: CCNet (arXiv 1911.00359, section 3.2).

Parts are compared as CCNet does, without case, accents, punctuation and digits of numbers; those without a word stay. Documents
are taken in order and every part but its first occurrence goes; a document that loses all its words goes as a whole. Keys (64
bits) of the parts of each block are written to disk and sorted externally, so memory is bounded.

    index/parts/000000/     per block: keys.u64, the parts of its kept documents; counts.u32, how many each document has
    index/repeated.u8       per part of all blocks: 1 = it occurred before
    index/emptied.u8        per document of all blocks: 1 = no part is left
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megagpt.corpus.dedup.config import PartKind
from megagpt.corpus.dedup.external_join import equal_key_pairs
from megagpt.corpus.dedup.index import IndexedBlock, new_array, new_folder, open_array, write_array
from megagpt.corpus.runner.blocks import Block, read_block
from megagpt.corpus.text.shingles import n_gram_hashes
from megagpt.files import atomic_path

KEYS_PER_READ = 1 << 20
_BORDERS = {"lines": re.compile(r"(\n)"), "paragraphs": re.compile(r"(\n[^\S\n]*\n\s*)")}
_WHOLE = 1 << 30


def part_keys(text: str, kind: PartKind, *, fold_numbers: bool = True) -> list[int | None]:
    """The key of each part of a text; None for a part without a word."""
    found = (n_gram_hashes(part, _WHOLE, fold_numbers=fold_numbers) for part in _BORDERS[kind].split(text)[::2])
    return [int(keys[0]) if keys.size else None for keys in found]


def without_parts(text: str, kind: PartKind, dropped: Sequence[bool]) -> str:
    """The text without the parts that are `dropped` (one value per part), and without the gaps that they would leave."""
    pieces = [*_BORDERS[kind].split(text), ""]
    kept = "".join(part + border for part, border, gone in zip(pieces[::2], pieces[1::2], dropped, strict=True) if not gone)
    return re.sub(r"\n{3,}", "\n\n", kept).strip("\n") if any(dropped) else text


def index_parts(block: Block, place: IndexedBlock, kept_by: Path, kind: PartKind, fold_numbers: bool, folder: Path) -> int:
    """Write the keys of the parts of a block's kept documents to `folder`; returns how many parts there are."""
    stays = open_array(kept_by, np.int64)[place.first : place.first + place.num_documents] < 0
    counts = np.zeros(place.num_documents, np.uint32)
    with new_folder(folder) as temporary:
        with (temporary / "keys.u64").open("wb") as file:
            for number, document in enumerate(read_block(block)):
                if stays[number]:
                    keys = [key for key in part_keys(document.text, kind, fold_numbers=fold_numbers) if key is not None]
                    file.write(np.array(keys, np.uint64).tobytes())
                    counts[number] = len(keys)
        write_array(temporary / "counts.u32", counts)
    return int(counts.sum())


def mark_repeated(old: Sequence[Path], folders: Sequence[Path], index: Path, memory_bytes: int) -> int:
    """Write repeated.u8 and emptied.u8 for the blocks in `folders`; what is in `old` blocks comes before them.

    Returns how many parts occurred before.
    """
    first_new, count = sum(_num_keys(folder) for folder in old), 0
    with new_array(index / "repeated.u8", np.uint8, sum(_num_keys(folder) for folder in folders), 0) as repeated:
        for pairs in equal_key_pairs(_read_keys([*old, *folders]), memory_bytes=memory_bytes, scratch=index):
            again = pairs[pairs[:, 1] >= first_new, 1] - first_new
            repeated[again] = 1
            count += again.size
    flags, at = open_array(index / "repeated.u8", np.uint8), 0
    with atomic_path(index / "emptied.u8") as temporary, temporary.open("wb") as file:
        for folder in folders:
            counts, size = np.fromfile(folder / "counts.u32", np.uint32).astype(np.int64), _num_keys(folder)
            ends = np.cumsum(counts)
            gone = np.concatenate([[0], np.cumsum(flags[at : at + size], dtype=np.int64)])
            file.write(((counts > 0) & (gone[ends] - gone[ends - counts] == counts)).tobytes())
            at += size
    return count


def first_parts(folders: Sequence[Path]) -> list[int]:
    """The number of each block's first part."""
    return [0, *itertools.accumulate(_num_keys(folder) for folder in folders)][:-1]


def drop_parts(text: str, kind: PartKind, flags: Iterator[int]) -> tuple[str, int, bool]:
    """(the text without its repeated parts, how many they were, whether no other is left). Takes a flag for each part with a
    word."""
    repeated = [None if key is None else bool(next(flags)) for key in part_keys(text, kind)]
    emptied = True in repeated and False not in repeated
    return without_parts(text, kind, [again is True for again in repeated]), sum(again is True for again in repeated), emptied


def _num_keys(folder: Path) -> int:
    return (folder / "keys.u64").stat().st_size // 8


def _read_keys(folders: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(keys, numbers of the parts), chunk by chunk."""
    first = 0
    for folder in folders:
        with (folder / "keys.u64").open("rb") as file:
            while (keys := np.fromfile(file, np.uint64, KEYS_PER_READ)).size:
                yield keys, np.arange(first, first + keys.size)
                first += keys.size
