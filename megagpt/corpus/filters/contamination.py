"""Decontamination: documents that contain passages of evaluation sets, found by equal n-grams of words.

Words are those of shingles.py, so case, accents, punctuation, digits of numbers and white space hide nothing. An evaluation
item is all text of its line; items with fewer than n words have no n-gram: they are counted, and not looked for.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from pydantic import Field

from megagpt.config import Config, UserError
from megagpt.corpus.filters.spec import Filter, FilterSpec
from megagpt.corpus.text.shingles import n_gram_hashes
from megagpt.corpus.text.words import Splitter
from megagpt.documents import Document, Rejected, open_lines

log = logging.getLogger(__name__)


class ContaminationConfig(Config):
    """Refuse documents that contain passages of evaluation sets."""

    files: tuple[Path, ...] = ()
    """Evaluation sets: .jsonl (all strings of a line are one item) or text (one item a line)."""
    words: int = Field(default=13, ge=4)
    """This many consecutive words in common are a hit. GPT-3 (arXiv 2005.14165, appendix C): 13."""
    min_hits: int = Field(default=1, ge=1)
    """A document with at least this many different hits is dropped."""


@dataclass(frozen=True, slots=True)
class Passages:
    """n-grams of evaluation items: hashes ascending (uint64), for each its file (index into names) and line (from 1)."""

    size: int
    names: tuple[str, ...]
    hashes: np.ndarray
    files: np.ndarray
    lines: np.ndarray


def contamination(document: Document, config: ContaminationConfig, *, passages: Passages) -> Document | Rejected:
    """Refuse a document that contains at least `min_hits` different n-grams of evaluation items.

    The reason names the evaluation set of the first hit, meta.contaminated_by the items.
    """
    hashes = n_gram_hashes(document.text, passages.size)
    places = np.minimum(np.searchsorted(passages.hashes, hashes), max(0, passages.hashes.size - 1))
    hits = np.unique(places[passages.hashes[places] == hashes]) if passages.hashes.size else places[:0]
    if hits.size < config.min_hits:
        return document
    items = sorted({(passages.names[passages.files[hit]], int(passages.lines[hit])) for hit in hits})
    meta = {**document.meta, "contaminated_by": [f"{name}: line {line}" for name, line in items[:20]]}
    return Rejected(replace(document, meta=meta), f"contamination:{items[0][0]}")


@functools.cache
def load_passages(files: tuple[Path, ...], size: int) -> Passages:
    """The n-grams of evaluation files: .jsonl (all strings of a line), or text (a line is an item), also .gz and .zst.

    Raises UserError if a file cannot be read or holds no item of n words.
    """
    hashes, origins, lines = [np.empty(0, np.uint64)], [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for index, path in enumerate(files):
        too_short = found = 0
        for line, item in _read_items(path):
            grams = n_gram_hashes(item, size)
            if grams.size == 0 or (grams.size == 1 and n_gram_hashes(item + " a", size).size == 1):  # fewer words than size
                too_short += 1
                continue
            found += 1
            hashes.append(grams)
            origins.append(np.full(grams.size, index, np.int32))
            lines.append(np.full(grams.size, line, np.int32))
        if not found:
            raise UserError(f"{path}: no evaluation item with {size} words or more")
        if too_short:
            log.info(
                "%s: %d of %d items have fewer than %d words and are not looked for", path, too_short, too_short + found, size
            )
    unique, first = np.unique(np.concatenate(hashes), return_index=True)
    return Passages(
        size, tuple(path.name for path in files), unique, np.concatenate(origins)[first], np.concatenate(lines)[first]
    )


def _read_items(path: Path) -> Iterator[tuple[int, str]]:
    as_json = ".jsonl" in path.suffixes or ".json" in path.suffixes
    with open_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not as_json:
                yield number, line.decode("utf-8", "replace")
                continue
            try:
                yield number, " ".join(_strings(orjson.loads(line)))
            except orjson.JSONDecodeError as error:
                raise UserError(f"{path}: line {number}: not valid JSON ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _bind(config: ContaminationConfig, _: Splitter) -> Filter:
    if not config.files:
        raise UserError("filter.contamination.files: required where order has contamination")
    passages = load_passages(config.files, config.words)
    return functools.partial(contamination, config=config, passages=passages)


CONTAMINATION = FilterSpec(ContaminationConfig, _bind)
