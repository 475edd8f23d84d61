"""The data section of a run: sources, weights and order, opened and checked against each other."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from megagpt.config import Config, UserError
from megagpt.data.dataset import TokenDataset
from megagpt.data.mixture import Mixture
from megagpt.data.permutation import mix
from megagpt.files import sha256_file
from megagpt.output_list import refuse_lost_splits
from megagpt.settings_record import recorded
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.open_tokenizer import open_tokenizer


class SourceConfig(Config):
    """One corpus to train on."""

    path: Path
    """Folder of tokenized shards, with train/, validation/ and tokenizer/ in it (tools/tokenize_documents.py writes it)."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the training samples, relative to the other sources' weights."""


class WeightChange(Config):
    """New weights of the sources, from one sample of the run on."""

    from_sample: int = Field(ge=1)
    """Global sample index: without batch_warmup step s begins at sample s x global_batch_size (and what the guard left out)."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    """By source; a source that is not named keeps its weight. 0: nothing is drawn from it."""


class DataConfig(Config):
    """The training data, and the order of its samples."""

    sources: dict[str, SourceConfig] = Field(min_length=1)
    """The corpora by name; validation loss is reported per name."""
    weight_changes: tuple[WeightChange, ...] = ()
    """When the weights of the sources change, in order. What a source has given before is not given again."""
    seq_len: int = Field(default=1024, ge=1)
    """Tokens per sample."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens from the start of one sample to the next; null = seq_len, less gives overlapping samples."""
    seed: int = 0
    """Key of the order of samples."""
    shuffle_block: int = Field(default=64, ge=1)
    """Samples that stay together when the order is permuted: long reads for network disks. 1 = every sample on its own, right
    for a small corpus whose documents were not shuffled."""
    document_mask: bool = False
    """Attention does not cross documents inside a sample."""
    document_end_loss: bool = True
    """Whether the first token of a document is a target after the end of the document before it; with document_mask nothing
    but that end can tell it. true is the habit of Megatron (without --eod-mask-loss) and torchtitan; false leaves it out of the
    loss, in training and evaluation, as --eod-mask-loss does."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        starts = [change.from_sample for change in self.weight_changes]
        if starts != sorted(set(starts)):
            raise ValueError(f"weight_changes: from_sample must ascend, not {starts}")
        for change in self.weight_changes:
            unknown = sorted(set(change.weights) - set(self.sources))
            if unknown:
                raise ValueError(f"weight_changes: {unknown[0]!r} is not one of the sources {sorted(self.sources)}")
        for start, weights in self.phases():
            if not any(weights):
                raise ValueError(f"weight_changes: from_sample={start}: every source has weight 0")
        return self

    def phases(self) -> list[tuple[int, list[float]]]:
        """(first sample, weights in the order of the sources) from the start and from each change on."""
        weights = {name: source.weight for name, source in self.sources.items()}
        found = [(0, list(weights.values()))]
        for change in self.weight_changes:
            weights = {**weights, **change.weights}
            found.append((change.from_sample, list(weights.values())))
        return found


@dataclass(frozen=True)
class Data:
    """The opened data that training and evaluation use."""

    train: Mixture
    validation: dict[str, TokenDataset]
    """By source name; a source without validation documents is not in it."""
    tokenizer: Tokenizer
    vocab_size: int
    eot_id: int
    fingerprint: str
    """sha256 of manifests, weights, seed and sample geometry: equal fingerprints give equal samples."""
    manifests: dict[str, str]
    """sha256 of each source's manifest of training shards, by name."""


def refuse_rows_that_see_each_other(dataset: TokenDataset, *, document_mask: bool) -> None:
    """Raise UserError if samples hold several rows of fine-tuning data and attention would cross them."""
    if dataset.manifest.supervised == "packed" and not document_mask:
        raise UserError(
            f"data.document_mask=false: {dataset.directory} has several rows in a sample, which would see each other: "
            "set data.document_mask=true, or tokenize with supervised.padding=padded"
        )


def refuse_other_classes(dataset: TokenDataset, classes: Sequence[str]) -> None:
    """Raise UserError unless the targets of a split are what a model with these classes (none: a language model) scores."""
    if tuple(classes) != dataset.manifest.classes:
        theirs = list(dataset.manifest.classes) if dataset.manifest.classes else "no classes, its targets are tokens"
        raise UserError(
            f"model.classes={list(classes)}: {dataset.directory} has {theirs} (tokenize.supervised.classes): both have to be "
            "the same names in the same order"
        )


def open_data(config: DataConfig) -> Data:
    """Open every source and check that they fit together. Raises UserError before any token is read."""
    train, validation, manifests, digest = {}, {}, {}, hashlib.sha256()
    settings = {**recorded(config), "stride": config.stride or config.seq_len}
    sources = settings.pop("sources")
    digest.update(json.dumps(settings, sort_keys=True).encode())
    geometry: dict[str, Any] = {
        "seq_len": config.seq_len,
        "stride": config.stride,
        "shuffle_block": config.shuffle_block,
        "document_end_loss": config.document_end_loss,
    }
    for number, (name, source) in enumerate(config.sources.items()):
        refuse_lost_splits(source.path)
        train[name] = TokenDataset(source.path / "train", seed=mix(config.seed, number), base_seed=config.seed, **geometry)
        if len(train[name]) == 0:
            tokens = train[name].num_tokens
            raise UserError(f"{source.path / 'train'}: {tokens} tokens, one sample needs seq_len + 1 = {config.seq_len + 1}")
        later = {key: value for key, value in sources[name].items() if key not in ("path", "weight")}
        manifests[name] = manifest_sha256 = sha256_file(source.path / "train" / "manifest.json")
        digest.update(f"{name} {source.weight!r} {manifest_sha256}{json.dumps(later) if later else ''}".encode())
        if (source.path / "validation").is_dir():
            dataset = TokenDataset(source.path / "validation", seed=config.seed, **geometry)
            if dataset.num_windows() > 0:
                validation[name] = dataset
    for dataset in (*train.values(), *validation.values()):
        refuse_rows_that_see_each_other(dataset, document_mask=config.document_mask)
    first = next(iter(train.values())).manifest
    for dataset in (*train.values(), *validation.values()):
        for field in ("tokenizer_sha256", "vocab_size", "eot_id"):
            if getattr(dataset.manifest, field) != getattr(first, field):
                where, other = dataset.directory, next(iter(train.values())).directory
                values = f"{field}={getattr(dataset.manifest, field)} but {getattr(first, field)} in {other}"
                raise UserError(f"{where}: {values}: all sources need the same tokenizer")
    tokenizer = open_tokenizer(next(iter(config.sources.values())).path / "tokenizer", saved=True)
    if tokenizer.fingerprint != first.tokenizer_sha256:
        where = next(iter(config.sources.values())).path
        raise UserError(f"{where / 'tokenizer'}: sha256 {tokenizer.fingerprint} is not the shards' {first.tokenizer_sha256}")
    (_, weights), *changes = config.phases()
    mixture = Mixture(list(train.values()), weights, changes, names=list(train))
    return Data(mixture, validation, tokenizer, first.vocab_size, first.eot_id, digest.hexdigest(), manifests)
