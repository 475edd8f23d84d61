"""The table of filters, and the settings that are made of it. The stage that runs the filters is in filter_documents.py.

To add a filter: write a file with its settings, its function and its FilterSpec (gopher.py shows all there is), add one row to
FILTERS, a row to docs/filters.md, a dropped text to the table of tests/corpus/filters/test_registry.py, and the rows of
settings_fields.LATER that tests/test_settings_record.py prints. docs/extending.md has the steps.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, Field, create_model

from megagpt.config import Config
from megagpt.corpus.filters.c4 import C4
from megagpt.corpus.filters.classifier import CLASSIFIER
from megagpt.corpus.filters.clean import CLEAN
from megagpt.corpus.filters.contamination import CONTAMINATION
from megagpt.corpus.filters.fineweb import FINEWEB
from megagpt.corpus.filters.gopher import GOPHER_QUALITY, GOPHER_REPETITION
from megagpt.corpus.filters.language import LANGUAGE
from megagpt.corpus.filters.personal_data import PERSONAL_DATA
from megagpt.corpus.filters.refinedweb import REFINEDWEB
from megagpt.corpus.filters.simple import BAD_WORDS, MIN_LENGTH
from megagpt.corpus.filters.spec import Filter, FilterSpec
from megagpt.corpus.filters.url import URL
from megagpt.corpus.text.languages import UNPUNCTUATED_LANGUAGES, UNSPACED_LANGUAGES
from megagpt.corpus.text.words import DEFAULT_SPLITTER, Splitter
from megagpt.documents import Document, Rejected

FILTERS: dict[str, FilterSpec[Any]] = {
    "url": URL,
    "language": LANGUAGE,
    "clean": CLEAN,
    "min_length": MIN_LENGTH,
    "gopher_repetition": GOPHER_REPETITION,
    "gopher_quality": GOPHER_QUALITY,
    "c4": C4,
    "fineweb": FINEWEB,
    "refinedweb": REFINEDWEB,
    "bad_words": BAD_WORDS,
    "classifier": CLASSIFIER,
    "contamination": CONTAMINATION,
    "personal_data": PERSONAL_DATA,
}
"""Name, which is also that of its section of the settings and the first part of its reasons -> the filter."""
DEFAULT_ORDER = ("clean", "url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "personal_data")
"""FineWeb's."""

if TYPE_CHECKING:
    FilterName: TypeAlias = str
else:
    FilterName = Literal[tuple(FILTERS)]

C = TypeVar("C", bound=Config)


def _each_once(order: tuple[FilterName, ...]) -> tuple[FilterName, ...]:
    repeated = sorted({name for name in order if order.count(name) > 1})
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: each filter may be named once")
    return order


class _FilterSettings(Config):
    """Settings of `tools/filter_documents.py`."""

    inputs: tuple[str, ...] = ()
    """Document files or globs; default: the output of the extraction."""
    order: Annotated[tuple[FilterName, ...], AfterValidator(_each_once)] = Field(
        default=DEFAULT_ORDER,
        description="The filters that run, in this order (FineWeb's by default). The rest: "
        f"{', '.join(name for name in FILTERS if name not in DEFAULT_ORDER)}.",
    )

    def section(self, config_class: type[C]) -> C:
        """The settings of the filter that has this class of settings."""
        (found,) = (value for value in (getattr(self, name) for name in FILTERS) if type(value) is config_class)
        return found


if TYPE_CHECKING:
    FilterConfig: TypeAlias = _FilterSettings
else:
    FilterConfig = create_model(
        "FilterConfig",
        __base__=_FilterSettings,
        __module__=__name__,
        __doc__=_FilterSettings.__doc__,
        **{name: (spec.config_class, spec.config_class()) for name, spec in FILTERS.items()},
    )


def build_filters(config: FilterConfig, *, splitter: Splitter = DEFAULT_SPLITTER) -> list[Filter]:
    """The filters of `config.order`. With another package's splitter the published rules give that package's verdicts.

    Raises UserError if a list or a model cannot be read.
    """
    return [FILTERS[name].bind(getattr(config, name), splitter) for name in config.order]


def apply_filters(document: Document, filters: Sequence[Filter]) -> Document | Rejected:
    """Pass a document through the filters until one rejects it."""
    for apply in filters:
        outcome = apply(document)
        if isinstance(outcome, Rejected):
            return outcome
        document = outcome
    return document


def rules_passed(language: str) -> list[str]:
    """Names of the rules that let every document of `language` pass: it has no word lists for them, no spaces,
    or no marks at the ends of sentences."""
    without_words = [f"{n}.{t}" for n, spec in FILTERS.items() for t, lists in spec.word_lists.items() if language not in lists]
    found = without_words
    if language in UNSPACED_LANGUAGES:
        found += [f"{name}.{threshold}" for name, spec in FILTERS.items() for threshold in spec.spaced_only]
    if language in UNPUNCTUATED_LANGUAGES:
        found += [f"{name}.{threshold}" for name, spec in FILTERS.items() for threshold in spec.punctuated_only]
    return found
