"""Scores of a classifier from counts of right and predicted classes: accuracy, precision, recall, F1, equal to scikit-learn's.

A class that is never predicted has precision 0, one without rows recall 0, one with neither F1 0 (scikit-learn's
zero_division=0). Macro means are over all classes of the model, also those without rows.
"""

from collections.abc import Sequence
from statistics import fmean

GROUP = "classes"
"""What stands before the metric of all classes, "classes.macro_f1"; of one class it is "classes.NAME.f1"."""
METRICS = ("precision", "recall", "f1")


def class_scores(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Group -> metric -> number from `confusion` [C, C], rows right classes, columns predicted ones: "classes" has accuracy and
    macro_precision, macro_recall, macro_f1; "classes.NAME" precision, recall, f1 and rows of each class."""
    right = [counts[i] for i, counts in enumerate(confusion)]
    rows = [sum(counts) for counts in confusion]
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    by_class = {}
    for i, name in enumerate(names):
        by_class[f"{GROUP}.{name}"] = {
            "precision": _ratio(right[i], predicted[i]),
            "recall": _ratio(right[i], rows[i]),
            "f1": _ratio(2 * right[i], predicted[i] + rows[i]),
            "rows": rows[i],
        }
    means = {f"macro_{metric}": fmean(found[metric] for found in by_class.values()) for metric in METRICS}
    return {GROUP: {"accuracy": _ratio(sum(right), sum(rows)), **means}, **by_class}


def metrics_of(names: Sequence[str]) -> list[str]:
    """What `best_by` may name of a classifier."""
    means = [f"{GROUP}.accuracy", *(f"{GROUP}.macro_{metric}" for metric in METRICS)]
    return [*means, *(f"{GROUP}.{name}.{metric}" for name in names for metric in METRICS)]


def describe_classes(scores: dict[str, dict[str, float]]) -> list[str]:
    """Lines of text, one for all classes and one for each."""
    return [
        f"  {group:<20} "
        + "  ".join(f"{key} {value:.4f}" if key != "rows" else f"of {value:,} rows" for key, value in found.items())
        for group, found in scores.items()
    ]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
