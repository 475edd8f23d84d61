"""Scores of classifiers are scikit-learn's on the same predictions, classes without rows or predictions among them."""

import numpy as np
import pytest

from megagpt.evaluate.classes import class_scores, describe_classes, metrics_of

NAMES = ("bad", "fair", "good", "unused")


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    rng = np.random.default_rng(seed)
    right, predicted = rng.integers(0, 3, 50), rng.choice([0, 1, 1, 2] if seed else [1, 2], 50)  # seed 0: nothing is bad
    labels = list(range(len(NAMES)))
    found = class_scores(confusion_matrix(right, predicted, labels=labels).tolist(), NAMES)
    expected = precision_recall_fscore_support(right, predicted, labels=labels, zero_division=0)
    for i, name in enumerate(NAMES):
        assert list(found[f"classes.{name}"].values()) == [values[i] for values in expected]
    macro = precision_recall_fscore_support(right, predicted, labels=labels, zero_division=0, average="macro")
    means = {f"macro_{key}": value for key, value in zip(("precision", "recall", "f1"), macro[:3], strict=True)}
    assert found["classes"] == pytest.approx({"accuracy": accuracy_score(right, predicted), **means}, abs=1e-15)
    assert {f"{group}.{key}" for group, values in found.items() for key in values if key != "rows"} == set(metrics_of(NAMES))
    assert len(describe_classes(found)) == 5


def test_no_rows_score_nothing() -> None:
    assert class_scores([[0, 0], [0, 0]], ("a", "b"))["classes"] == {
        "accuracy": 0.0, "macro_precision": 0.0, "macro_recall": 0.0, "macro_f1": 0.0,
    }  # fmt: skip
