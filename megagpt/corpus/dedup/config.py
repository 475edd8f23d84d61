"""The dedup section of a corpus."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field

from megagpt.config import Config
from megagpt.corpus.text.shingles import MinHashSettings

PartKind: TypeAlias = Literal["lines", "paragraphs"]


@dataclass(frozen=True, slots=True)
class Verification:
    """When a document counts as a copy of another: exact Jaccard of shingle sets or its estimate, against a threshold."""

    exact: bool
    threshold: float
    max_comparisons: int

    def min_estimate(self, num_rows: int) -> float:
        """Pairs of a lower estimate are not compared exactly: 4 standard errors below the threshold (1 in 30,000 is lost)."""
        return self.threshold - 4 * math.sqrt(self.threshold * (1 - self.threshold) / num_rows)


class DedupConfig(Config):
    """Settings of `tools/dedup_documents.py`."""

    inputs: tuple[str, ...] = ()
    """Document files or globs; default: the output of the filters. The earliest document in their sorted order is kept."""
    near: bool = True
    """Drop near duplicates too. Exact copies, also those that differ in white space and Unicode form only, are always
    dropped."""
    words_per_shingle: int = Field(default=5, ge=1)
    """Words per shingle. Documents are compared as sets of shingles; case, accents, punctuation and numbers are folded first.
    Vowel signs, vowel points and voicing marks are no accents."""
    fold_numbers: bool = True
    """Treat all numbers as equal. false: texts that differ in numbers (exercises, tables, years) differ."""
    min_words: int = Field(default=1, ge=1)
    """Texts of fewer words are no near duplicates: `C++ is fast` and `C is fast` have the same words."""
    num_bands: int = Field(default=14, ge=1)
    """FineWeb: 14 bands of 8 rows find .565 of the pairs of similarity .7, .924 at .8, .9996 at .9. RefinedWeb: 450 of 20."""
    rows_per_band: int = Field(default=8, ge=1)
    """Numbers of the signature that must all be equal for two documents to be compared."""
    threshold: float = Field(default=0.8, gt=0, le=1)
    """A document is dropped if its Jaccard similarity to a kept one is at least this."""
    verify: Literal["exact", "signature"] = "exact"
    """exact: Jaccard similarity of the shingle sets themselves. signature: its estimate from all rows."""
    max_comparisons: int = Field(default=1000, ge=1)
    """At most this many comparisons per band and document, earliest kept documents first; a document not compared is kept."""
    seed: int = Field(default=1, ge=0)
    """Seed of the MinHash functions."""
    against: tuple[Path, ...] = ()
    """work_dir of corpora that were deduplicated before with the same MinHash settings: copies of documents that they kept are
    dropped. These corpora are neither changed nor hashed again."""
    drop_repeated: PartKind | None = None
    """lines or paragraphs: also drop those that occurred before in any kept document (CCNet, arXiv 1911.00359)."""
    memory_bytes: int = Field(default=2 << 30, ge=1 << 20)
    """Memory for sorting and comparing, of all workers together, whatever the size of the corpus. Changes no result."""

    @property
    def minhash(self) -> MinHashSettings:
        """Parameters of the signatures."""
        return MinHashSettings(
            self.words_per_shingle, self.num_bands, self.rows_per_band, self.seed, self.fold_numbers, self.min_words
        )

    @property
    def recall_at_threshold(self) -> float:
        """Share of the pairs of similarity `threshold` that the bands propose; of more similar pairs they propose more."""
        return 1 - (1 - self.threshold**self.rows_per_band) ** self.num_bands

    @property
    def verification(self) -> Verification:
        """When a document counts as a copy."""
        return Verification(self.verify == "exact", self.threshold, self.max_comparisons)
