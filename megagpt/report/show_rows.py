"""Show a sample of fine-tuning data: its rows, special tokens by name, and marks around the text that is learned."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megagpt.config import UserError
from megagpt.data.dataset import TokenDataset
from megagpt.data.shards import Manifest, read_manifest
from megagpt.documents import IGNORE
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.extended import Extended
from megagpt.tokenizer.open_tokenizer import open_tokenizer

LEARNED, END = "⟦", "⟧"
"""Marks around targets; a terminal shows a colour instead (`coloured`)."""


def show_sample(directory: Path, index: int) -> Iterator[str]:
    """Show sample `index` of a split of rows, in the order of the shards. Raises UserError if the split has no rows or no
    such sample."""
    manifest = read_manifest(directory)
    if manifest.supervised is None or manifest.pack_seq_len is None:
        raise UserError(f"{directory}: has documents, whose tokens are all targets; sample= shows rows of fine-tuning data")
    dataset = TokenDataset(directory, seq_len=manifest.pack_seq_len)
    if index >= len(dataset):
        raise UserError(f"{directory}: sample={index}: the split has {len(dataset)} samples")
    tokenizer = open_tokenizer(directory.parent / "tokenizer")
    names = {number: name for name, number in tokenizer.tokens.items()} if isinstance(tokenizer, Extended) else {}
    names |= {manifest.eot_id: "<end of text>"}
    sample = dataset.window(index)
    is_target = np.concatenate([[False], sample.targets[:-1] != IGNORE])
    yield (
        f"{directory}: sample {index} of {len(dataset):,}: {len(sample.doc_lengths)} rows, "
        f"{int(is_target.sum())} of {dataset.seq_len} tokens are targets ({LEARNED}between these marks{END})"
    )
    start = index * dataset.seq_len
    for row, length in enumerate(sample.doc_lengths.tolist()):
        first = int(sample.doc_lengths[:row].sum())
        yield f"row {row}: {_name_of(dataset, start + first)}, {length} tokens"
        ids, marks = sample.inputs[first : first + length], is_target[first : first + length]
        if manifest.classes:  # the class that a classifier learns is shown before the row's text
            [place] = np.flatnonzero(marks)
            yield f"  class {LEARNED}{manifest.classes[sample.targets[first + place - 1]]}{END}"
            marks = np.zeros(len(marks), np.bool_)
        yield from (f"  {line}" for line in _text(ids, marks, tokenizer, names, manifest.eot_id).split("\n"))


def rows_problems(directory: Path, manifest: Manifest, number: int) -> Iterator[str]:
    """Messages about a shard of rows whose bytes are sound but whose contents break the rules of such a shard."""
    dataset = TokenDataset(directory, seq_len=manifest.pack_seq_len or 1)
    info, path = manifest.shards[number], directory / f"{manifest.shards[number].name}.bin"
    before = sum(shard.tokens for shard in manifest.shards[:number])
    if info.tokens % dataset.seq_len:
        yield f"{path}: {info.tokens} tokens are not a whole number of samples of {dataset.seq_len}"
        return
    for index in range(before // dataset.seq_len, (before + info.tokens) // dataset.seq_len):
        sample = dataset.window(index)
        ends = np.cumsum(sample.doc_lengths)
        where = f"{path}: sample {index}"
        if int(ends[-1] if len(ends) else 0) != dataset.seq_len:
            yield f"{where}: a row continues after its end"
        elif np.any(sample.inputs[ends - 1] != manifest.eot_id):
            yield f"{where}: a row does not end with the end of text"
        elif np.any(sample.targets[ends - 1] != IGNORE):
            yield f"{where}: the first token of a row is a target"
        elif manifest.classes and int(sample.targets.max()) >= len(manifest.classes):
            yield f"{where}: has class {sample.targets.max()}, but there are {len(manifest.classes)} classes"
        elif int(sample.inputs.max()) >= manifest.vocab_size:
            yield f"{where}: has id {sample.inputs.max()}, but the vocabulary has {manifest.vocab_size} ids"


def coloured(line: str) -> str:
    """A line in which the marked text is green, for a terminal."""
    return line.replace(LEARNED, "\x1b[32m").replace(END, "\x1b[0m")


def _name_of(dataset: TokenDataset, token: int) -> str:
    import pyarrow.parquet as pq

    path, number, _ = dataset.document(token)
    return str(pq.read_table(path, columns=["id"])["id"][number])


def _text(ids: np.ndarray, marks: np.ndarray, tokenizer: Tokenizer, names: dict[int, str], eot_id: int) -> str:
    padding = len(ids) - 1 - int(np.max(np.flatnonzero((ids != eot_id) | marks), initial=-1))  # ends of text after the row
    shown, waiting, learned = "", list[int](), False
    for token, is_target in [*zip(ids[: len(ids) - padding].tolist(), marks.tolist(), strict=False), (-1, False)]:
        if waiting and (token in names or token < 0 or is_target != learned):
            shown, waiting = shown + tokenizer.decode(waiting), []
        if is_target != learned:
            shown, learned = shown + (LEARNED if is_target else END), is_target
        if token in names:
            shown += names[token]
        elif token >= 0:
            waiting.append(token)
    return shown + f"<end of text> x {padding}" * (padding > 0)
