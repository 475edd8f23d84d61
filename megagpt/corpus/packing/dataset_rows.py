"""Rows of Hugging Face datasets (`datasets:NAME`): written once as JSON lines beside the shards, and read as any other file."""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import orjson

from megagpt.config import UserError
from megagpt.corpus.packing.config import SupervisedConfig
from megagpt.corpus.packing.rows import FIELDS
from megagpt.corpus.readers.records import DATASETS, dataset_batches
from megagpt.files import atomic_path

log = logging.getLogger(__name__)


def with_datasets_as_files(
    inputs: Sequence[str], folder: Path, config: SupervisedConfig | None, *, overwrite: bool = False
) -> tuple[str, ...]:
    """The inputs with a file below `folder` in the place of each `datasets:NAME`; a file that is there is used again, unless
    `overwrite`.

    Raises UserError if a dataset cannot be loaded, lacks a column of the rows' format, or `config` is None.
    """
    return tuple(
        str(_file_of(name, folder, config, overwrite=overwrite)) if name.startswith(DATASETS) else name for name in inputs
    )


def _file_of(name: str, folder: Path, config: SupervisedConfig | None, *, overwrite: bool) -> Path:
    if config is None:
        raise UserError(
            f"tokenize.inputs: {name}: a dataset is read here as rows of fine-tuning data, and tokenize.supervised is not set; "
            "its documents are read by extract.inputs"
        )
    place = name.removeprefix(DATASETS)
    of_name = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{place}_{config.split}").strip("._")[-80:]
    path = folder / f"{of_name}_{hashlib.sha256(f'{place} {config.split} {config.format}'.encode()).hexdigest()[:8]}.jsonl"
    if path.is_file() and not overwrite:
        log.info("%s: read from %s, which an earlier call made", name, path)
        return path
    batches, count = _batches(name, place, config), 0
    first = list(islice(batches, 1))  # before the folder is made: what cannot be read leaves nothing behind
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for batch in chain(first, batches):
            for row in batch.to_pylist():
                file.write(orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE))
                count += 1
    log.info("%s: %s rows of split %s in %s", name, f"{count:,}", config.split, path)
    return path


def _batches(name: str, place: str, config: SupervisedConfig) -> Iterator[Any]:
    """Arrow batches of the columns that the rows' format needs."""
    columns = FIELDS.get(config.format, ("messages",))
    for batch in dataset_batches(place, config.split, f"{name}: cannot be loaded (tokenize.supervised.split={config.split})"):
        missing = [column for column in columns if column not in batch.column_names]
        if missing:
            raise UserError(
                f"{name}: has no column {missing[0]!r}, which tokenize.supervised.format={config.format} needs; "
                f"it has {sorted(batch.column_names)}"
            )
        yield batch.select(list(columns))
