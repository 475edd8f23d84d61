"""The tokenize section of a corpus."""

from typing import Literal

from pydantic import Field

from megagpt.config import Config
from megagpt.tokenizer.bpe import Encoder


class TokenizeConfig(Config):
    """Settings of `tools/tokenize_documents.py`."""

    inputs: tuple[str, ...] = ()
    """Document files (.jsonl, .jsonl.gz, .jsonl.zst) or globs; empty = the output of deduplication."""
    tokenizer: str | None = None
    """`bytes`, or the path of a tokenizer; null = the one that tools/train_tokenizer.py left in work_dir/tokenizer."""
    pattern: str | None = None
    """How a rank file (.tiktoken), or vocab.json with merges.txt, cuts text before merging: gpt2, cl100k, o200k, llama3 or a
    regular expression. null = as the publisher does; a file that is not known is refused."""
    encoder: Encoder = "tiktoken"
    """What encodes byte-level BPE: tiktoken, or fastokens (several times as fast; compared with tiktoken at every start)."""
    split_by: Literal["hash", "tail"] = "hash"
    """hash: validation documents are chosen by a hash of their id, and stay chosen when data is added. tail: the last part of
    each source's text, in the order of the files, counted in characters; the document at the cut is cut in two."""
    validation_fraction: float = Field(default=0.005, ge=0, lt=1)
    """Share of the documents (hash) or of each source's characters (tail) that goes to validation."""
    separate_sources: bool = False
    """One folder of shards per document source, to weigh them in training and to see a validation loss for each."""
    shard_tokens: int = Field(default=1 << 27, ge=1)
    """Tokens in a shard, about; one worker holds the rows of one shard in memory, not its tokens."""
    pack_seq_len: int | None = Field(default=None, ge=2)
    """Place documents so that samples of this length (training's data.seq_len) cut few of them; null: keys alone decide."""
    overlap_threshold: float | None = Field(default=0.8, gt=0, le=1)
    """Training documents whose Jaccard similarity (sets of 5 words) to a validation document is at least this are dropped; each
    is compared with every validation document that could reach it. null = no check."""
    seed: int = Field(default=0, ge=0)
    """Key of the global order of documents."""
    require_lossless: bool = True
    """Refuse a tokenizer that rewrites or drops text (a SentencePiece model without byte fallback, or with NFKC)."""
