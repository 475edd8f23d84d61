"""Loss, perplexity, bits per byte and token accuracy on validation data; what the training loop calls."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.config import Failure, UserError
from megagpt.data.dataset import TokenDataset
from megagpt.data.loader import MicroBatch, eval_batches
from megagpt.distributed.world import World
from megagpt.evaluate.classes import class_scores
from megagpt.files import sha256_file
from megagpt.model.gpt import GPT
from megagpt.tokenizer.base import Tokenizer, token_lengths


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the targets of a text, and what follows from them."""

    nats: float
    """Sum of -log p(target)."""
    tokens: int
    """Targets counted, end-of-text tokens included."""
    text_bytes: int
    """UTF-8 bytes of the text that the targets stand for (end-of-text tokens stand for none)."""
    hits: int
    """Targets that were the likeliest token, or class."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """Of a classifier: rows by right class (row) and likeliest class (column)."""
    classes: tuple[str, ...] = ()
    """Names of the classes; a target is then a row's class."""

    @property
    def loss(self) -> float:
        """Mean nats per target token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the whole text takes, document ends included, per byte of text: comparable between tokenizers."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else None

    @property
    def accuracy(self) -> float:
        """Share of targets that were the likeliest token."""
        return self.hits / self.tokens

    def summary(self) -> dict[str, float | int | None]:
        """loss, perplexity, bits_per_byte, accuracy, tokens, text_bytes: as metrics.jsonl and the tool's result have them."""
        names = ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens", "text_bytes")
        return {name: getattr(self, name) for name in names}

    def class_scores(self) -> dict[str, dict[str, float]]:
        """Accuracy, precision, recall and F1 (see evaluate/classes.py); {} of a language model."""
        return class_scores(self.confusion, self.classes) if self.confusion else {}


def evaluate_sources(
    model: Callable[..., Tensor],
    module: GPT,
    datasets: Mapping[str, TokenDataset],
    tokenizer: Tokenizer,
    world: World,
    *,
    micro_batch_size: int,
    max_samples: int | None = None,
    document_mask: bool = False,
    full_rows: bool = False,
) -> dict[str, Score]:
    """The score of each source; all ranks call it together and all get the same. Raises as `evaluate` does. `full_rows`: see
    megagpt.data.loader.filled_up.

    `model(ids, targets, doc_lengths)` gives the summed loss; `module` is what is behind it, put into evaluation mode meanwhile.
    """
    lengths = token_lengths(tokenizer)
    scores = {}
    with evaluation_mode(module):
        for name, dataset in datasets.items():
            batches = eval_batches(
                dataset,
                micro_batch_size=micro_batch_size,
                rank=world.dp_rank,
                size=world.dp_size,
                max_samples=max_samples,
                document_mask=document_mask,
                token_lengths=lengths,
                full_rows=full_rows,
            )
            scores[name] = evaluate(model, module, batches, world)
    return scores


@torch.no_grad()
def evaluate(model: Callable[..., Tensor], module: GPT, batches: Iterable[MicroBatch], world: World) -> Score:
    """Sum the loss over the batches of all ranks. The loss is summed in fp64 and fetched from the device once, at the end.
    What a forward pass has hit is counted with its loss, chunk by chunk, and asked of `module`.

    Raises Stopped on all ranks before the next batch once one was told to stop, and what was wrong with a rank's data on all.
    """
    nats = torch.zeros((), dtype=torch.float64, device=world.device)
    hits = torch.zeros((), dtype=torch.int64, device=world.device)
    classes = module.config.classes
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=world.device)
    tokens = text_bytes = 0
    for batch in _together(batches, world):
        lengths = None if batch.doc_lengths is None else batch.doc_lengths.to(world.device)
        nats += model(batch.ids.to(world.device), batch.targets.to(world.device), lengths)
        terms = module.loss_terms()
        hits += terms["hits"]
        if classes:
            confusion += terms["confusion"]
        tokens, text_bytes = tokens + batch.num_targets, text_bytes + batch.num_bytes
    # The nats and hits are of this rank's part of the tokens.
    counts = tuple(tuple(row) for row in confusion.tolist())
    sums = (float(nats), world.counts * tokens, world.counts * text_bytes, int(hits), counts, classes)
    return combine(Score(*parts) for parts in world.gather(sums))


def _together(batches: Iterable[MicroBatch], world: World) -> Iterator[MicroBatch]:
    """The batches, each once all ranks have theirs: a forward pass may need all of them."""
    remaining = iter(batches)
    while True:
        batch, problem = None, None
        try:
            batch = next(remaining, None)
        except (UserError, Failure, OSError) as error:
            problem = error
        world.agree(problem)
        world.progress()
        if batch is None:
            return
        yield batch


def validation_set(datasets: Mapping[str, TokenDataset], *, max_samples: int | None, document_mask: bool) -> str:
    """A name for what evaluate_sources measures on, 16 hex digits: losses are comparable if it is the same."""
    measured: dict[str, Any] = {
        "sources": {name: sha256_file(dataset.directory / "manifest.json") for name, dataset in datasets.items()},
        "seq_lens": {name: dataset.seq_len for name, dataset in datasets.items()},
        "max_samples": max_samples,
        "mask_documents": document_mask,  # the name of release 0.1: scores are compared by this hash
    }
    if not all(dataset.document_end_loss for dataset in datasets.values()):
        measured["document_end_loss"] = {name: dataset.document_end_loss for name, dataset in datasets.items()}
    return hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]


def combine(scores: Iterable[Score]) -> Score:
    """The score of several texts together: sums, so each token counts the same."""
    scores = list(scores)
    confusions = [score.confusion for score in scores]
    return Score(
        math.fsum(score.nats for score in scores),
        sum(score.tokens for score in scores),
        sum(score.text_bytes for score in scores),
        sum(score.hits for score in scores),
        tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*confusions, strict=True)),
        scores[0].classes if scores else (),
    )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Without dropout and z-loss; the module's mode is restored."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
