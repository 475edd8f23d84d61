"""Scores of generated answers against right ones: exact match and token F1 by SQuAD's rules, ROUGE, BLEU, final numbers.

Exact match and F1 (arXiv 1606.05250) compare lower-case words without punctuation and English articles. ROUGE is rouge-score's,
BLEU sacrebleu's; both come with megagpt[evaluate].
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from statistics import fmean
from typing import Any

from megagpt.config import UserError
from megagpt.evaluate.tasks import standard_error

ROUGE_KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORDS = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)


@dataclass(frozen=True, slots=True)
class TextScores:
    """Means over answers, from 0 to 1, of the best right answer each; BLEU is of all answers together, from 0 to 100."""

    answers: int
    exact_match: float
    f1: float
    rouge1: float
    rouge2: float
    rougeL: float  # noqa: N815 (its name everywhere)
    rougeLsum: float  # noqa: N815
    bleu: float
    bleu_signature: str
    """What sacrebleu was told: two BLEU scores are comparable if their signatures are the same."""
    final_number: float | None
    """Share of the answers whose final number equals a right answer's (GSM8K), of those to which a right answer has one; None
    where none has."""
    standard_errors: dict[str, float | None]
    """Of the means: deviation of the sample / sqrt(answers); None of a single answer."""


def score_texts(generated: Sequence[str], right: Sequence[Sequence[str]]) -> TextScores:
    """Score each text against its right answers, at least one each. Raises UserError if a library is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: scores of generated answers need megagpt[evaluate]") from None
    rouge = RougeScorer(list(ROUGE_KINDS), tokenizer=_Words())
    values: dict[str, list[float]] = {name: [] for name in ("exact_match", "f1", *ROUGE_KINDS)}
    numbers: list[float] = []
    for text, answers in zip(generated, right, strict=True):
        values["exact_match"].append(max(exact_match(text, answer) for answer in answers))
        values["f1"].append(max(token_f1(text, answer) for answer in answers))
        expected = {final_number(answer) for answer in answers} - {None}
        if expected:
            numbers.append(float(final_number(text) in expected))
        for kind, found in rouge.score_multi(list(answers), text).items():
            values[kind].append(found.fmeasure)
    bleu = BLEU()
    most = max(len(answers) for answers in right)
    streams: list[list[Any]] = [[answers[i] if i < len(answers) else None for answers in right] for i in range(most)]
    found = bleu.corpus_score(list(generated), streams)
    return TextScores(
        answers=len(generated),
        **{name: fmean(each) for name, each in values.items()},
        bleu=found.score,
        bleu_signature=str(bleu.get_signature()),
        final_number=fmean(numbers) if numbers else None,
        standard_errors={name: standard_error(each) for name, each in {**values, "final_number": numbers}.items() if each},
    )


def final_number(text: str) -> Decimal | None:
    """The number after the last "####" (GSM8K's mark), or without that mark the last one of the text; None if there is none.
    Commas between digits are left out: 1,000 is 1000."""
    _, mark, tail = text.rpartition("####")
    found = _NUMBER.findall(tail)
    if not found:
        return None
    return Decimal((found[0] if mark else found[-1]).replace(",", ""))


def exact_match(text: str, answer: str) -> float:
    """1.0 if both are the same words, else 0.0."""
    return float(_words(text) == _words(answer))


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words; where one of the two has none, whether the other has none either."""
    words, expected = _words(text), _words(answer)
    if not words or not expected:
        return float(words == expected)
    common = (Counter(words) & Counter(expected)).total()
    if not common:
        return 0.0
    precision, recall = common / len(words), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


class _Words:
    """ROUGE's tokenizer: of ASCII text the same words as rouge-score's own, which drops every other letter. Han and kana
    characters stand alone."""

    def tokenize(self, text: str) -> list[str]:
        """Lower-case words."""
        return _WORDS.findall(text.lower())
