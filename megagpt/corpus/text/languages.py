"""Languages of documents: which one a document is in, and what its script has: spaces, end marks, dense characters."""

import functools
import re

from megagpt.documents import Document

UNSPACED_LANGUAGES = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "dz", "wuu", "yue"})
"""Languages written without spaces: rules about the number and the length of words do not apply to them."""
UNPUNCTUATED_LANGUAGES = frozenset({"th", "lo"})
"""Languages whose sentences end without a mark: rules about marks and sentences do not apply to them."""
DENSE_LANGUAGES = frozenset({"zh", "ja", "wuu", "yue"})
DENSE_WEIGHT = 2.5
"""One character of a dense language stands for about this many Latin ones: limits in characters are divided by it."""

_SAMPLE_CHARACTERS = 2000
_SCRIPTS = {
    "en": re.compile("[A-Za-z\u00c0-\u024f]"),
    "th": re.compile("[\u0e00-\u0e7f]"),
    "lo": re.compile("[\u0e80-\u0eff]"),
    "bo": re.compile("[\u0f00-\u0fff]"),
    "my": re.compile("[\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f]"),
    "km": re.compile("[\u1780-\u17ff]"),
    "ja": re.compile("[\u3040-\u30ff]"),
    "zh": re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"),
}
_LETTER = re.compile(r"[^\W\d_]")


def language_of(document: Document) -> str:
    """The language a document was found to be in. Where no stage has looked: what its script tells, else English.

    A text mostly in a script that no language here stands for is "und" (undetermined).
    """
    found = document.meta.get("language")
    if isinstance(found, str) and found:
        return found
    return "en" if document.text.isascii() else language_of_script(document.text)


@functools.lru_cache(maxsize=4)
def language_of_script(text: str) -> str:
    """Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese by their scripts; English for Latin; "und" for any other."""
    sample = text[:_SAMPLE_CHARACTERS]
    counts = {code: len(pattern.findall(sample)) for code, pattern in _SCRIPTS.items()}
    if counts["ja"] * 10 >= counts["zh"] > 0:  # Japanese is a mixture of Kana and Han
        counts["ja"] += counts.pop("zh")
    code = max(counts, key=lambda key: counts[key])
    letters = len(_LETTER.findall(sample))
    return code if 2 * counts[code] >= letters else "und"
