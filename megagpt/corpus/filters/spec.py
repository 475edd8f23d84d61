"""The entry of a filter in the table: its settings, how they become a filter, and which languages its rules apply to.

A filter is a pure function that takes a document and its settings. Lists and models that it needs are loaded when it is bound,
once per process, and passed in.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Generic, TypeAlias, TypeVar

from pydantic import Field

from megagpt.config import Config, UserError
from megagpt.corpus.text.words import Splitter
from megagpt.documents import Document, Rejected

Filter: TypeAlias = Callable[[Document], Document | Rejected]
Ratio: TypeAlias = Annotated[float, Field(ge=0, le=1)]
C = TypeVar("C", bound=Config)


@dataclass(frozen=True, slots=True)
class FilterSpec(Generic[C]):
    """One filter."""

    config_class: type[C]
    """Its section of the settings; the fields are the thresholds of its rules, null switches a rule off."""
    bind: Callable[[C, Splitter], Filter]
    """Settings and the splitter of words -> the filter. Raises UserError if a list or a model cannot be read."""
    word_lists: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Threshold -> languages that its rule has words for; documents in others pass the rule."""
    spaced_only: tuple[str, ...] = ()
    """Thresholds whose rules pass documents in languages that are written without spaces."""
    punctuated_only: tuple[str, ...] = ()
    """Thresholds whose rules pass documents in languages whose sentences end without a mark."""


def thresholds_only(function: Callable[..., Document | Rejected]) -> Callable[[Config, Splitter], Filter]:
    """`bind` of a filter that needs nothing but its settings."""
    return lambda config, _: functools.partial(function, config=config)


def thresholds_and_splitter(function: Callable[..., Document | Rejected]) -> Callable[[Config, Splitter], Filter]:
    """`bind` of a filter that counts words or sentences."""
    return lambda config, splitter: functools.partial(function, config=config, splitter=splitter)


def above(value: float, limit: float | None) -> bool:
    """Whether a value breaks a maximum; None is no limit."""
    return limit is not None and value > limit


def below(value: float, limit: float | None) -> bool:
    """Whether a value breaks a minimum; None is no limit."""
    return limit is not None and value < limit


def with_text(document: Document, text: str) -> Document:
    """The document with another text."""
    return document if text == document.text else replace(document, text=text)


def read_list(path: Path) -> list[str]:
    """The entries of a list file: one a line; blank lines and lines that begin with # do not count. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]
