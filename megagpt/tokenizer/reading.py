"""How to read a tokenizer's files that do not say it themselves: `reading.json` beside them.

A rank file (`.tiktoken`, Llama 3's `tokenizer.model`) has neither the pattern that cuts text nor special ids. Published files
are recognised by their sha256. Release 0.1 read every rank file with GPT-2's pattern, and every added token of a tokenizer.json
as special; the folders that it saved have no reading.json and are always read in this way. The fingerprint covers the reading.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from megagpt.config import UserError
from megagpt.files import read_json, sha256_file, write_json

FILE_NAME = "reading.json"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""The pattern with which GPT-2 cuts text before merging: `pat` in OpenAI's encoder.py, spelt as in tiktoken's r50k_base."""
CL100K_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
"""tiktoken's cl100k_base without possessive quantifiers, which other libraries read differently; Llama 3's is the same."""
O200K_PATTERN = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
"""The pattern of tiktoken's o200k_base."""
PATTERNS = {"gpt2": GPT2_PATTERN, "cl100k": CL100K_PATTERN, "o200k": O200K_PATTERN, "llama3": CL100K_PATTERN}
"""Names that the setting `pattern` accepts, besides regular expressions."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the files do not say. With the defaults, releases up to 0.1 read every rank file."""

    library: Literal["tiktoken", "tokenizers"] = "tiktoken"
    """The library that encodes; `tokenizers` reads a tokenizer.json that tiktoken cannot express."""
    pattern: str = GPT2_PATTERN
    """The expression that cuts text before merging (tiktoken)."""
    special: dict[str, int] = field(default_factory=dict)
    """Name -> id of the special tokens."""
    eot_id: int | None = None
    """Ends every document; None = the id after the last rank."""
    bos_id: int | None = None
    """Begins every document; None = there is no such id."""
    vocab_size: int = 0
    """Least number of ids."""

    @property
    def as_bytes(self) -> bytes:
        """The reading as part of the fingerprint; empty for the default, so that fingerprints of release 0.1 stay valid."""
        return b"" if self == Reading() else json.dumps(asdict(self), sort_keys=True).encode()


_LLAMA3_NAMES = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|reserved_special_token_4|>", "<|eot_id|>", *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)  # fmt: skip
KNOWN = {
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930": Reading(),  # r50k_base
    "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069": Reading(  # p50k_base
        special={"<|endoftext|>": 50256}, eot_id=50256
    ),
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": Reading(  # cl100k_base
        pattern=CL100K_PATTERN,
        special={
            "<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        eot_id=100257, vocab_size=100277,
    ),
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": Reading(  # o200k_base
        pattern=O200K_PATTERN, special={"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, eot_id=199999, vocab_size=200019
    ),
    "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55": Reading(  # Llama 3 and 3.1
        pattern=CL100K_PATTERN, special={name: 128_000 + i for i, name in enumerate(_LLAMA3_NAMES)},
        eot_id=128_001, bos_id=128_000, vocab_size=128_256,
    ),
}  # fmt: skip
"""sha256 of a published rank file -> its publisher's reading (tiktoken's `openai_public.py`, Meta's `tokenizer.py`)."""


def reading_of_ranks(path: Path, pattern: str | None, *, saved: bool) -> Reading:
    """How to read a rank file: from reading.json beside it, as release 0.1 (`saved`), with `pattern`, or from KNOWN, in turn.

    Raises UserError if none of these applies.
    """
    record = path.parent / FILE_NAME
    if record.is_file():
        return read_reading(record)
    if saved:
        return Reading()
    if pattern is not None:
        return Reading(pattern=pattern_of(pattern))
    known = KNOWN.get(sha256_file(path))
    if known is None:
        raise UserError(
            f"tokenizer {path}: a rank file does not say how text is cut before merging, and this one is none of r50k, p50k, "
            f"cl100k, o200k and Llama 3: give tokenize.pattern ({', '.join(PATTERNS)}, or a regular expression)"
        )
    return known


def pattern_of(pattern: str) -> str:
    """The expression for a name in PATTERNS; any other text is an expression itself."""
    return PATTERNS.get(pattern, pattern)


def read_reading(path: Path) -> Reading:
    """Read reading.json. Raises UserError naming the file."""
    try:
        return Reading(**read_json(path))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: not how a tokenizer is read ({error})") from None


def write_reading(folder: Path, reading: Reading) -> None:
    """Write reading.json into a folder; the default reading needs none."""
    if reading != Reading():
        write_json(folder / FILE_NAME, asdict(reading))
