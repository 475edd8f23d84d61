"""The tokenize section of a corpus."""

from typing import Literal

from pydantic import Field, model_validator

from megagpt.config import Config
from megagpt.documents import check_classes
from megagpt.tokenizer.bpe import Encoder


class SupervisedConfig(Config):
    """Rows of fine-tuning data instead of documents: a prompt, and the answer to learn (docs/finetuning.md)."""

    format: Literal["chat", "prompt_completion", "dialogue_summary", "question_answer", "text_label"]
    """The contents of a row: messages (chat), or the two fields that the format names. text_label is also read from .tsv files
    of two columns."""
    prompt: str | None = None
    """The prompt, with the field in braces: "Is this review positive? {text}"; null = the field alone, for a summary an
    instruction before it."""
    system: str | None = None
    """A system message before each row; null = none but a chat's own."""
    labels: dict[str, str] = Field(default={})
    """text_label: the answer for each label, {"0": negative, "1": positive}; another label is a malformed row. Empty: the label
    itself is the answer."""
    classes: tuple[str, ...] = ()
    """text_label: names of the answers, in the order of a classifier's model.classes. A row is then the text alone, and its
    target the number of its class. Needs template=plain. Empty: the answer is text that a language model learns."""
    template: str = "chatml"
    """chatml; plain (prompt and answer as one text, then the end of text); or the path of a Hugging Face chat template (Jinja)
    with {% generation %} around the answer."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens of a template that is a file; text never gives their ids. ChatML has <|im_start|> and <|im_end|>."""
    end_tokens: tuple[str, ...] = ()
    """Those of special_tokens that end a generated answer."""
    padding: Literal["packed", "padded"] = "packed"
    """packed: several rows in a sample, by best fit, none cut; training needs data.document_mask=true. padded: one in each."""
    split: str = "train"
    """Of inputs that are `datasets:NAME`: the split whose rows are read."""
    max_malformed: int = Field(default=100, ge=0)
    """At most this many malformed rows; malformed.jsonl names each by file and line."""

    @model_validator(mode="after")
    def _check(self) -> "SupervisedConfig":
        field = {"prompt_completion": "prompt", "dialogue_summary": "dialogue", "question_answer": "question"}
        name = field.get(self.format, "text")
        if self.prompt is not None and (self.format == "chat" or f"{{{name}}}" not in self.prompt):
            rule = "a chat has its own" if self.format == "chat" else f"{{{name}}} must be in it"
            raise ValueError(f"prompt={self.prompt!r}: {rule}")
        if self.labels and self.format != "text_label":
            raise ValueError(f"labels are for format=text_label, not {self.format}")
        check_classes(self.classes)
        if self.classes and (self.format, self.template, self.system) != ("text_label", "plain", None):
            raise ValueError("classes need format=text_label, template=plain and no system message: rows are texts alone")
        unknown = sorted(set(self.labels.values()) - set(self.classes)) if self.classes else []
        if unknown:
            raise ValueError(f"labels: {unknown[0]!r} is not one of classes {list(self.classes)}")
        if self.template in ("chatml", "plain") and (self.special_tokens or self.end_tokens):
            raise ValueError(f"special_tokens and end_tokens are for a template that is a file, not {self.template}")
        unknown = sorted(set(self.end_tokens) - set(self.special_tokens))
        if unknown:
            raise ValueError(f"end_tokens: {unknown[0]!r} is not one of special_tokens")
        return self


class TokenizeConfig(Config):
    """Settings of `tools/tokenize_documents.py`."""

    inputs: tuple[str, ...] = ()
    """Document files (.jsonl, .jsonl.gz, .jsonl.zst) or globs, with `supervised` also datasets:NAME (a folder, or a name on the
    hub); empty = the output of deduplication."""
    tokenizer: str | None = None
    """`bytes`, or the path of a tokenizer; null = the one that tools/train_tokenizer.py left in work_dir/tokenizer."""
    pattern: str | None = None
    """How a rank file (.tiktoken), or vocab.json with merges.txt, cuts text before merging: gpt2, cl100k, o200k, llama3 or a
    regular expression. null = as the publisher does; a file that is not known is refused."""
    encoder: Encoder = "tiktoken"
    """The library that encodes byte-level BPE: tiktoken, or fastokens (several times as fast; compared with tiktoken at every
    start)."""
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
    supervised: SupervisedConfig | None = None
    """Read rows of fine-tuning data; null = documents. Needs pack_seq_len, and split_by=hash, which splits by row."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizeConfig":
        if self.supervised is not None and self.pack_seq_len is None:
            raise ValueError("supervised needs pack_seq_len, the tokens of a training sample")
        if self.supervised is not None and self.split_by != "hash":
            raise ValueError(f"supervised with split_by={self.split_by}: rows are split by hash, one is never cut")
        return self
