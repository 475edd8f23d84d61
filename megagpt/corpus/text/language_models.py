"""Models that tell a text's language: lid.176 (fastText), CLD2, langid, their agreement, or a fastText model of yours.

They give ISO 639 codes: two letters where there are such, Chinese in either script zh, Hebrew he, Javanese jv, Norwegian
Bokmål no. Text in capitals is lower-cased first: models are made of ordinary text, and lid.176 takes capitals for other
languages.
"""

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from megagpt.config import UserError
from megagpt.corpus.text.fasttext_models import Predict, bundled_language_model, load_labels, load_language_model

ModelName: TypeAlias = Literal["lid.176", "cld2", "langid", "agreement"]
NAMES: tuple[ModelName, ...] = get_args(ModelName)
"""What `language.model` takes beside a path. agreement: the label that two of the three others give, else und."""
_CODES = {"iw": "he", "jw": "jv", "in": "id", "nb": "no", "mo": "ro", "zh-Hant": "zh", "wuu": "zh", "fil": "tl", "un": "und"}
_UNREADABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""What CLD2 refuses."""
HARDLY_FOUND: dict[str, dict[str, float]] = {
    "lid.176": {"an": 0.49, "bs": 0.01, "ia": 0.19, "li": 0.27, "mai": 0.0, "ms": 0.29, "oc": 0.43, "sc": 0.0},
    "cld2": {"bs": 0.29, "ia": 0.18, "ku": 0.0},
    "agreement": {"an": 0.49, "bs": 0.2, "ia": 0.07},
}
"""Model -> label -> recall, of the labels that it finds in fewer than half of the texts: bench/results/languages.json."""


@functools.cache
def open_language_model(name: str) -> Predict:
    """text -> (language, score from 0 to 1) of a model by name or path. Raises UserError if it is not there or not
    installed."""
    if name == "agreement":
        return _agreement(tuple(open_language_model(one) for one in NAMES[:3]))
    predict = {"cld2": _cld2, "langid": _langid}.get(name, functools.partial(_fasttext, name))()

    def lowered(text: str) -> tuple[str, float]:
        code, score = predict(text.lower() if is_in_capitals(text) else text)
        return _CODES.get(code, code), score

    return lowered


_NOT_SMALL = bytes(code for code in range(128) if not chr(code).islower())
_NOT_LARGE = bytes(code for code in range(128) if not chr(code).isupper())


def is_in_capitals(text: str) -> bool:
    """Whether most letters that have a case are capitals."""
    ascii_only = text.encode("ascii", "ignore")
    small, large = len(ascii_only.translate(None, _NOT_SMALL)), len(ascii_only.translate(None, _NOT_LARGE))
    if small >= large + len(text) - len(ascii_only):  # even if all other characters were capitals
        return False
    return sum(map(str.isupper, text)) > sum(map(str.islower, text))


def labels_of(name: str) -> frozenset[str]:
    """The languages that a model can give."""
    if name == "agreement":
        counts = Counter(code for one in NAMES[:3] for code in labels_of(one))
        return frozenset(code for code, count in counts.items() if count > 1)
    if name == "cld2":
        detected = _import("pycld2").DETECTED_LANGUAGES
        found = {code for language, code in _import("pycld2").LANGUAGES if language in detected}
    elif name == "langid":
        found = set(_langid_model().nb_classes)
    else:
        found = load_labels(_path(name))
    return frozenset(_CODES.get(code, code) for code in found)


def warnings(labels: tuple[str, ...], name: str) -> list[str]:
    """What to say of labels that a model cannot give, or hardly finds."""
    found, known = [], labels_of(name)
    for label in labels:
        recall = HARDLY_FOUND.get(name, {}).get(label)
        if label not in known:
            found.append(f"language.labels={label}: {name} has no such label, so it keeps no text{_better_models(name, label)}")
        elif recall is not None:
            found.append(f"language.labels={label}: {name} finds {recall:.0%} of the texts in it{_better_models(name, label)}")
    return found


def _better_models(name: str, label: str) -> str:
    """Advice that names the models which find the label. All of them are loaded, which takes half a second."""
    others = [other for other in NAMES if label in labels_of(other) and label not in HARDLY_FOUND.get(other, {})]
    return f": language.model={' or '.join(others)} does better" if others and name in NAMES else ""


def _fasttext(name: str) -> Predict:
    return load_language_model(_path(name))


def _path(name: str) -> Path:
    return bundled_language_model() if name == "lid.176" else Path(name)


def _cld2() -> Predict:
    pycld2 = _import("pycld2")

    def predict(text: str) -> tuple[str, float]:
        reliable, _, details = pycld2.detect(_UNREADABLE.sub(" ", text), isPlainText=True, bestEffort=True)
        _, code, percent, _ = details[0]
        return code, percent / (100 if reliable else 200)

    return predict


def _langid() -> Predict:
    model = _langid_model()

    def predict(text: str) -> tuple[str, float]:
        code, score = model.classify(_UNREADABLE.sub(" ", text))
        return code, min(1.0, score)

    return predict


@functools.cache
def _langid_model() -> Any:
    langid = _import("py3langid.langid")
    return langid.LanguageIdentifier.from_modelpath(Path(langid.MODEL_DIR) / langid.MODEL_FILE, norm_probs=True)


def _agreement(models: tuple[Predict, ...]) -> Predict:
    def predict(text: str) -> tuple[str, float]:
        found = [model(text) for model in models]
        (code, votes), *_ = Counter(code for code, _ in found).most_common()
        if votes == 1 or code == "und":
            return "und", 0.0
        return code, sum(score for other, score in found if other == code) / votes

    return predict


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"language.model needs {name.partition('.')[0]}: pip install -c constraints.txt '.[languages]'"
        ) from None
