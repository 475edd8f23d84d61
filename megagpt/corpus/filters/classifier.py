"""Quality classifiers: documents with a high probability of a label under a fastText model of the user's stay."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from megagpt.config import Config, UserError
from megagpt.corpus.filters.spec import Filter, FilterSpec, Ratio
from megagpt.corpus.text.fasttext_models import load_classifier
from megagpt.corpus.text.words import Splitter
from megagpt.documents import Document, Rejected


class ClassifierConfig(Config):
    """Keep documents that your fastText classifier scores high."""

    model: Path | None = None
    """A supervised fastText model, .bin or .ftz."""
    label: str = "hq"
    """The label whose probability is the score."""
    min_score: Ratio = 0.018112
    """Documents below are refused. DCLM with its own model (fasttext-oh-eli5): 0.018112; yours has another scale."""
    top_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Instead of min_score: keep this fraction of the documents that reach the classifier, the best ones (DCLM: 0.1). They are
    read and filtered twice, first to find the score."""
    name: str = Field(default="quality", pattern=r"^[a-z_]+$")
    """The score is noted as meta.<name>_score."""


def classifier(document: Document, config: ClassifierConfig, *, score: Callable[[str], float]) -> Document | Rejected:
    """Score the text with the user's config.model, note the score in meta[<name>_score], keep what reaches `min_score`."""
    value = score_of(document, score)
    scored = replace(document, meta={**document.meta, f"{config.name}_score": round(value, 5)})
    return scored if value >= config.min_score else Rejected(scored, f"classifier:{config.name}_score")


def score_of(document: Document, score: Callable[[str], float]) -> float:
    """A classifier's score of a document: fastText reads one line."""
    return score(" ".join(document.text.split()))


def _bind(config: ClassifierConfig, _: Splitter) -> Filter:
    if config.model is None:
        raise UserError("filter.classifier.model: required where order has classifier")
    return functools.partial(classifier, config=config, score=load_classifier(config.model, config.label))


CLASSIFIER = FilterSpec(ClassifierConfig, _bind)
