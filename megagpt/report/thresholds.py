"""Measure what each threshold of the filters is compared with, over a sample of documents, with the filters themselves.

A filter compares its statistics with the thresholds of its settings. Here it gets thresholds that record the compared values
and let everything pass. So one run over a document gives the value of every rule, of any filter in the registry, exactly as
the filter counts it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from megagpt import settings_record
from megagpt.config import Config
from megagpt.corpus.filters.registry import FILTERS, FilterConfig
from megagpt.corpus.filters.spec import Filter
from megagpt.corpus.text.words import DEFAULT_SPLITTER
from megagpt.documents import Document, Rejected
from megagpt.files import read_json

Rule: TypeAlias = str
"""filter.threshold, or filter.threshold.n if the setting has a threshold for each n."""

LINE_RULES = frozenset(
    ("c4.max_word_length", "c4.min_words_per_line", "refinedweb.max_uppercase", "refinedweb.max_numeric")
    + ("refinedweb.min_words_per_line",)
)
"""Thresholds for lines, not for documents."""
NOT_MEASURED = ("url", "language", "classifier", "contamination", "personal_data", "bad_words")
"""Filters that are not measured: they need lists or models besides the text."""
MAX_STEPS = 200
"""Most different values that are kept of a statistic; rare ones are merged."""


class Noting(float):
    """A threshold that records the values that it is compared with. It decides like its number, or lets everything pass."""

    def __new__(cls, value: float, note: Callable[[float, bool], None], *, decides: bool) -> "Noting":
        """note: called with the compared value, and whether it breaks the threshold."""
        made = super().__new__(cls, value)
        made.note, made.decides = note, decides
        return made

    note: Callable[[float, bool], None]
    decides: bool

    def _look(self, value: Any, breaks: bool) -> bool:
        self.note(float(value), breaks)
        return breaks and self.decides

    # `value > threshold` calls this: Python asks the right operand first if its class derives from the left one's class, and
    # second if the left one has no answer, as int has none for a float.
    def __lt__(self, value: Any) -> bool:
        """`value > threshold`"""
        return self._look(value, float(value) > float(self))

    def __gt__(self, value: Any) -> bool:
        """`value < threshold`"""
        return self._look(value, float(value) < float(self))

    __hash__ = float.__hash__


@dataclass(frozen=True, slots=True)
class Breach:
    """Why a text was dropped: the rule, the measured value and the threshold."""

    rule: Rule
    value: float
    limit: float


@dataclass(frozen=True, slots=True)
class Statistic:
    """The distribution of the value that one rule measures."""

    rule: Rule
    limit: float
    is_maximum: bool
    steps: Sequence[tuple[float, float]]
    """(value, share of the documents with it), by value; at most MAX_STEPS."""
    dropped: float
    """Share of the documents that the rule alone would drop."""
    num_documents: int
    """Number of measured documents. A rule may not apply to all, for example to languages for which it has no words."""


def read_settings(stage: Path) -> FilterConfig | None:
    """The settings of a filter stage; None if the stage did not record them. Raises UserError if they cannot be read."""
    path = stage / "stage.json"
    if not path.exists():
        return None
    found = read_json(path)
    settings = found.get("settings") if isinstance(found, dict) else None
    if settings is None:
        return None
    return settings_record.read_settings(FilterConfig, settings, source=str(path))


def thresholds(config: FilterConfig) -> Iterator[tuple[str, str, Rule, float]]:
    """(filter, field, rule, limit) of each threshold that is set, for the configured filters in their order."""
    for name in config.order:
        if name in NOT_MEASURED:
            continue
        section = getattr(config, name)
        for field in type(section).model_fields:
            value = getattr(section, field)
            if not field.startswith(("min_", "max_")) or f"{name}.{field}" in LINE_RULES or isinstance(value, bool):
                continue
            if isinstance(value, Mapping):
                yield from ((name, field, f"{name}.{field}.{n}", float(limit)) for n, limit in value.items())
            elif isinstance(value, int | float):
                yield name, field, f"{name}.{field}", float(value)


class Measure:
    """The configured filters, with thresholds that record values."""

    def __init__(self, config: FilterConfig, *, decides: bool = False) -> None:
        """decides: whether the rules drop documents as in the stage; otherwise all documents pass, so that all rules run."""
        self.limits = {rule: (limit, field.startswith("max_")) for _, field, rule, limit in thresholds(config)}
        self._noted: list[tuple[Rule, float, bool]] = []
        self.filters: dict[str, Filter] = {}
        for name in config.order:
            if name not in NOT_MEASURED:
                section = self._noting(config, name, decides)
                self.filters[name] = FILTERS[name].bind(section, DEFAULT_SPLITTER)

    def _noting(self, config: FilterConfig, name: str, decides: bool) -> Config:
        section, changed = getattr(config, name), {}
        for owner, field, rule, limit in thresholds(config):
            if owner != name:
                continue
            noting = Noting(limit, lambda value, breaks, rule=rule: self._noted.append((rule, value, breaks)), decides=decides)
            value = getattr(section, field)
            changed[field] = (
                {**changed.get(field, {}), int(rule.rpartition(".")[2]): noting} if isinstance(value, Mapping) else noting
            )
        return section.model_copy(update=changed)

    def values(self, document: Document) -> dict[Rule, float]:
        """The values that the rules measure for a document; each filter gets the text as the earlier ones changed it.

        If a rule measures several values, the worst one counts.
        """
        self._noted.clear()
        for apply in self.filters.values():
            outcome = apply(document)
            if isinstance(outcome, Rejected):
                break
            document = outcome
        found: dict[Rule, float] = {}
        for rule, value, _ in self._noted:
            worst = max if self.limits[rule][1] else min
            found[rule] = worst(found.get(rule, value), value)
        return found

    def breach(self, document: Document, reason: str) -> Breach | None:
        """The rule that drops a text for `reason`; None if no threshold does, or not this text (for example after a cut)."""
        apply = self.filters.get(reason.partition(":")[0])
        if apply is None:
            return None
        self._noted.clear()
        outcome = apply(document)
        if not isinstance(outcome, Rejected) or outcome.reason != reason or not self._noted or not self._noted[-1][2]:
            return None
        rule, value, _ = self._noted[-1]
        return Breach(rule, value, self.limits[rule][0])


def measure(
    measured: Iterable[tuple[Mapping[Rule, float], float]], limits: Mapping[Rule, tuple[float, bool]]
) -> list[Statistic]:
    """The distribution of each rule. measured: (values of a document by rule, number of documents that it stands for)."""
    values: dict[Rule, dict[float, float]] = {}
    counts: dict[Rule, int] = {}
    for found, weight in measured:
        for rule, value in found.items():
            of_rule = values.setdefault(rule, {})
            of_rule[value] = of_rule.get(value, 0.0) + weight
            counts[rule] = counts.get(rule, 0) + 1
    result = []
    for rule, (limit, is_maximum) in limits.items():
        if rule not in values:
            continue
        total = sum(values[rule].values())
        shares = [(value, weight / total) for value, weight in sorted(values[rule].items())]
        dropped = sum(share for value, share in shares if (value > limit if is_maximum else value < limit))
        result.append(Statistic(rule, limit, is_maximum, _fewer(shares), dropped, counts[rule]))
    return result


def _fewer(shares: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MAX_STEPS values: rare ones are merged, so that a value stands for all since the previous one."""
    if len(shares) <= MAX_STEPS:
        return shares
    result, gathered = [], 0.0
    for i, (value, share) in enumerate(shares):
        gathered += share
        if gathered >= 1.0001 / (MAX_STEPS - 1) or i == len(shares) - 1:
            result.append((value, gathered))
            gathered = 0.0
    return result
