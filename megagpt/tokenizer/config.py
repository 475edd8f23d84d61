"""The tokenizer section of a corpus."""

from typing import Literal

from pydantic import Field

from megagpt.config import Config


class TokenizerConfig(Config):
    """Settings of `tools/train_tokenizer.py`."""

    inputs: tuple[str, ...] = ()
    """Document files (.jsonl, .jsonl.gz, .jsonl.zst) or globs; empty = the output of deduplication."""
    model_type: Literal["bpe", "unigram"] = "bpe"
    """SentencePiece's algorithm; unigram takes about fifteen times as long to train."""
    vocab_size: int = Field(default=32_000, ge=300)
    """Ids, the 256 bytes, newline, <unk> and </s> included."""
    split_digits: bool = True
    """Every digit is a token of its own."""
    character_coverage: float = Field(default=0.9999, gt=0.9, le=1)
    """Share of the sample's characters that get ids of their own; rarer ones are spelt in bytes."""
    max_characters: int = Field(default=100_000_000, ge=1)
    """Characters of text to train on; SentencePiece takes roughly 10 bytes of memory for each."""
    max_files: int = Field(default=256, ge=1)
    """The largest number of input files that are read, evenly spaced over their sorted names."""
