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
    """Number of ids, including the 256 bytes, newline, <unk> and </s>."""
    split_digits: bool = True
    """Whether every digit is a separate token."""
    character_coverage: float = Field(default=0.9999, gt=0.9, le=1)
    """Share of the sample's characters that have their own ids; rarer characters are encoded as bytes."""
    max_characters: int = Field(default=100_000_000, ge=1)
    """Most characters of text to train on; SentencePiece needs about 10 bytes of memory for each."""
    max_files: int = Field(default=256, ge=1)
    """Most input files to read, evenly spaced over their sorted names."""
