"""RefinedWeb's line-wise corrections (arXiv 2306.01116, G.2), as DCLM's code reads them."""

import re
from typing import Annotated

from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.filters.spec import FilterSpec, Ratio, above, thresholds_only, with_text
from megagpt.corpus.text.languages import UNSPACED_LANGUAGES, language_of
from megagpt.documents import Document, Rejected


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


SOCIAL_COUNTERS: dict[str, str] = {
    "en": "likes|shares|comments|retweets|reposts|quotes|bookmarks|upvotes|downvotes|downloads|views|followers"
}
_COUNTERS = {
    language: re.compile(rf"^\W*\d(?:,|\.|\d)*(?:K|k|M|m|B|b)?\s+(?:{nouns})\W*$")
    for language, nouns in SOCIAL_COUNTERS.items()
}


def refinedweb(document: Document, config: RefinedWebConfig) -> Document | Rejected:
    """RefinedWeb's line-wise corrections (arXiv 2306.01116, G.2), as DCLM's code reads them: shares are of a line's length.

    Blank lines stay. Words are what white space separates.
    """
    language = language_of(document)
    counter = _COUNTERS.get(language) if config.drop_social_counters else None
    spaced = language not in UNSPACED_LANGUAGES
    kept, num_words, num_removed = [], 0, 0
    for line in document.text.split("\n"):
        words = len(line.split())
        size = words if spaced else len(line.strip())
        num_words += size
        bad = words > 0 and (
            above(sum(map(str.isupper, line)) / len(line), config.max_uppercase)
            or above(sum(map(str.isdigit, line)) / len(line), config.max_numeric)
            or (counter is not None and counter.search(line.lower()) is not None)
            or (spaced and config.min_words_per_line is not None and words < config.min_words_per_line)
        )
        if bad:
            num_removed += size
        else:
            kept.append(line)
    if num_words == num_removed:
        return Rejected(document, "refinedweb:empty")
    if above(num_removed / num_words, config.max_removed_words):
        return Rejected(document, "refinedweb:too_many_words_removed")
    return with_text(document, "\n".join(kept).strip())


REFINEDWEB = FilterSpec(
    RefinedWebConfig,
    thresholds_only(refinedweb),
    word_lists={"drop_social_counters": SOCIAL_COUNTERS},
    spaced_only=("min_words_per_line",),
)
