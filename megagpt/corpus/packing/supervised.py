"""Rows of fine-tuning data to token ids, each with a mark whether it is a target.

A row is rendered by its template (templates.py). Text between two special tokens is encoded as one, as transformers does, and
the ids are those of `apply_chat_template`; a token is a target if it begins where an answer has begun. The first token of a
row never is one. Every row ends with the end of text, which is a target only where the template puts it into the answer.

A row of a classifier is a text; the number of its class stands in the place of the end of text and is its only target.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megagpt.config import UserError
from megagpt.corpus.packing.config import SupervisedConfig
from megagpt.corpus.packing.templates import BOS, CHATML, CHATML_END, CHATML_TOKENS, EOS, PLAIN, Span, Template, TemplateError
from megagpt.documents import Document
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.extended import Extended, extend

PROBE = "  \ufb01 a\u3000\u00bd\n\n\tb  "
"""What a tokenizer that rewrites text (NFKC, dropped spaces) does not give back."""


def template_of(config: SupervisedConfig) -> str:
    """The text of the template that a configuration names. Raises UserError if its file cannot be read."""
    if config.template in ("chatml", "plain"):
        return CHATML if config.template == "chatml" else PLAIN
    try:
        return Path(config.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenize.supervised.template={config.template}: cannot be read ({error})") from None


def tokenizer_for(base: Tokenizer, config: SupervisedConfig) -> Tokenizer:
    """`base` with the special tokens of the template. Raises UserError if it rewrites text: masks are found by bytes. (A space
    that it puts in front of every text is known, and no loss.)"""
    if base.decode(base.encode(PROBE)) != PROBE:
        raise UserError("tokenize.supervised: the tokenizer rewrites or drops text, so no answer could be found in it")
    if config.template == "plain":
        return base
    names, ends = (CHATML_TOKENS, CHATML_END) if config.template == "chatml" else (config.special_tokens, config.end_tokens)
    return extend(base, names, ends, template_of(config))


class RowEncoder:
    """Encodes rows for samples of `seq_len` tokens. `num_truncated` counts those that were cut to fit."""

    def __init__(self, tokenizer: Tokenizer, config: SupervisedConfig, seq_len: int) -> None:
        self.num_truncated = 0
        self._tokenizer, self._seq_len, self._classes = tokenizer, seq_len, config.classes
        self._lengths = np.array([len(piece) for piece in tokenizer.token_bytes()], np.int64)
        self._ids = dict(tokenizer.tokens) if isinstance(tokenizer, Extended) and config.template != "plain" else {}
        self._ids |= {EOS: tokenizer.eot_id} | ({} if tokenizer.bos_id is None else {BOS: tokenizer.bos_id})
        name = config.template if config.template in ("chatml", "plain") else f"template {config.template}"
        self._template = Template(template_of(config), [name for name in self._ids if name not in (BOS, EOS)], name=name)

    def encode(self, row: Document, report: Callable[[str, str], object]) -> tuple[np.ndarray, np.ndarray] | None:
        """(ids without the token that ends the row, for each id and that end whether it is a target); None for a row that
        was reported (kind, what is wrong) instead. The end is the end of text, or `end_of`."""
        if self._classes:
            return self._encode_text(row.meta["messages"][0]["content"])
        try:
            spans = self._template.render(row.meta["messages"])
        except TemplateError as error:
            report("template", str(error))
            return None
        ids, targets = self._encode(spans)
        if self._tokenizer.bos_id is not None and ids[:1] != [self._tokenizer.bos_id]:
            ids, targets = [self._tokenizer.bos_id, *ids], [False, *targets]
        if ids and ids[-1] == self._tokenizer.eot_id:
            ids, end = ids[:-1], targets[-1]
            targets = targets[:-1]
        else:
            end = False
        if len(ids) + 1 > self._seq_len:
            length, ids = len(ids) + 1, ids[: self._seq_len - 1]
            targets, end = targets[: self._seq_len - 1], False
            if not any(targets[1:]):
                report("no_target", f"its prompt fills the {self._seq_len} tokens of a sample (the row has {length})")
                return None
            self.num_truncated += 1
        marks = np.array([*targets, end], np.bool_)
        marks[0] = False
        if not marks.any():
            report("no_target", "the template marks nothing of it as an answer")
            return None
        return np.array(ids, np.uint32), marks

    def end_of(self, row: Document) -> int | None:
        """The number of its class, which ends a row of a classifier; None = the end of text."""
        return self._classes.index(row.meta["messages"][-1]["content"]) if self._classes else None

    def _encode_text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A text whose class is its only target."""
        bos_id = self._tokenizer.bos_id
        ids = [*(() if bos_id is None else (bos_id,)), *self._tokenizer.encode(text)]
        self.num_truncated += len(ids) + 1 > self._seq_len
        ids = ids[: self._seq_len - 1]
        return np.array(ids, np.uint32), np.arange(len(ids) + 1) == len(ids)

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        """What a model is given to answer these messages: the template's `add_generation_prompt`. Raises TemplateError."""
        ids, _ = self._encode(self._template.render(messages, add_generation_prompt=True))
        bos_id = self._tokenizer.bos_id
        return ids if bos_id is None or ids[:1] == [bos_id] else [bos_id, *ids]

    def _encode(self, spans: list[Span]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        targets: list[bool] = []
        text: list[Span] = []
        for span in [*spans, None]:
            if span is not None and not span.is_special:
                text.append(span)
                continue
            if text:
                found = self._tokenizer.encode("".join(part.text for part in text))
                ids += found
                targets += self._marks(found, text)
                text = []
            if span is not None and (span.text != BOS or BOS in self._ids):  # a tokenizer without a begin of text has none
                ids.append(self._ids[span.text])
                targets.append(span.is_target)
        return ids, targets

    def _marks(self, ids: list[int], parts: list[Span]) -> list[bool]:
        """Whether each token of a joined text begins inside a part that is learned."""
        begins = np.cumsum(self._lengths[ids]) - self._lengths[ids] - (1 if self._tokenizer.dummy_prefix else 0)
        ends = np.cumsum([len(part.text.encode()) for part in parts])
        which = np.searchsorted(ends, np.maximum(begins, 0), side="right").clip(max=len(parts) - 1)
        return [parts[i].is_target for i in which.tolist()]
