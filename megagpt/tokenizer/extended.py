"""A tokenizer with additional special tokens for fine-tuning. Every id of the base tokenizer keeps its meaning.

The new tokens have names and ids but no text, and no text is encoded as one: `<|im_start|>` in a message stays text.
`special_tokens.json` and, for a chat model, `chat_template.jinja` are beside the base tokenizer's files.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from megagpt.config import UserError
from megagpt.files import read_json, write_json, write_text
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.bpe import BytePairs
from megagpt.tokenizer.hugging_face import HuggingFaceTokenizer
from megagpt.tokenizer.sentencepiece import SentencePiece

FILE_NAME, TEMPLATE_FILE = "special_tokens.json", "chat_template.jinja"
FORMAT = 1
"""Version of special_tokens.json."""


class Extended:
    """A base tokenizer, and special tokens by name."""

    def __init__(self, base: Tokenizer, tokens: Mapping[str, int], end_tokens: Sequence[str], template: str | None) -> None:
        """tokens: name -> id, an id of `base` or a new one after its ids. end_tokens: names of those that end a generated text.
        template: a chat template in Jinja, with `{% generation %}` around the text that is learned."""
        self.base, self.tokens, self.end_tokens, self.template = base, dict(tokens), tuple(end_tokens), template
        self.kind, self.eot_id, self.bos_id = base.kind, base.eot_id, base.bos_id
        self.dummy_prefix, self.lossless = base.dummy_prefix, base.lossless
        self.vocab_size = max(base.vocab_size, *(number + 1 for number in self.tokens.values()), 0)
        ends = (self.tokens[name] for name in self.end_tokens)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*base.eos_ids, *ends]))
        content = f"{base.fingerprint} {sorted(self.tokens.items())} {self.end_tokens} {template!r}"
        self.fingerprint = hashlib.sha256(content.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special ids."""
        return self.base.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as a uint32 array."""
        return self.base.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids. Special ids give no text."""
        return self.base.decode([number for number in ids if number < self.base.vocab_size])

    def token_bytes(self) -> list[bytes]:
        """The bytes of each id, b"" for special ids."""
        return [*self.base.token_bytes(), *([b""] * (self.vocab_size - self.base.vocab_size))]

    def save(self, directory: Path) -> None:
        """Copy what `open_tokenizer(directory)` needs into a directory."""
        self.base.save(directory)
        write_special_tokens(directory, self.tokens, self.end_tokens)
        if self.template is not None:
            write_text(directory / TEMPLATE_FILE, self.template)


def extend(tokenizer: Tokenizer, names: Sequence[str], end_tokens: Sequence[str], template: str | None) -> Extended:
    """Add special tokens with these names: names that `tokenizer` has keep their ids, new ones follow its last id.

    Raises UserError if a name is empty or repeated.
    """
    if len(set(names)) < len(names) or "" in names:
        raise UserError(f"special_tokens={list(names)}: names must be different, and not empty")
    base = tokenizer.base if isinstance(tokenizer, Extended) else tokenizer
    tokens = dict(tokenizer.tokens) if isinstance(tokenizer, Extended) else {}
    for name in names:
        if name not in tokens:
            known = _id_in(base, name)
            tokens[name] = max(base.vocab_size, *(number + 1 for number in tokens.values()), 0) if known is None else known
    return Extended(base, tokens, end_tokens, template)


def write_special_tokens(directory: Path, tokens: Mapping[str, int], end_tokens: Sequence[str]) -> None:
    """Beside a base tokenizer's files: what `with_special_tokens` reads."""
    write_json(directory / FILE_NAME, {"format": FORMAT, "tokens": dict(tokens), "end_tokens": list(end_tokens)})


def with_special_tokens(base: Tokenizer, folder: Path) -> Tokenizer:
    """`base`, extended by the `special_tokens.json` of a folder if there is one. Raises UserError naming a damaged file."""
    path, template = folder / FILE_NAME, folder / TEMPLATE_FILE
    if not path.is_file():
        return base
    value = read_json(path)
    try:
        tokens, end_tokens = dict(value["tokens"]), list(value["end_tokens"])
        ids = list(tokens.values())
        if value["format"] > FORMAT:
            raise UserError(f"{path}: format {value['format']} is of a later release; this one reads up to {FORMAT}")
        if any(type(number) is not int or number < 0 for number in ids) or len(set(ids)) < len(ids):
            raise UserError(f"{path}: tokens: every name needs a different number as id")
        if not set(end_tokens) <= set(tokens):
            raise UserError(f"{path}: end_tokens={end_tokens}: names of tokens are expected")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: a mapping of format, tokens and end_tokens is expected ({error!r})") from None
    return Extended(base, tokens, end_tokens, template.read_text(encoding="utf-8") if template.is_file() else None)


def extends(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Whether every id of `other` has the same meaning in `tokenizer`, which may have more ids."""
    named, before = _names(tokenizer), _names(other)
    return (
        tokenizer.eot_id == other.eot_id
        and tokenizer.vocab_size >= other.vocab_size
        and all(named.get(number, name) == name for number, name in before.items())
        and tokenizer.token_bytes()[: other.vocab_size] == other.token_bytes()
    )


def _names(tokenizer: Tokenizer) -> dict[int, str]:
    return {number: name for name, number in tokenizer.tokens.items()} if isinstance(tokenizer, Extended) else {}


def _id_in(base: Tokenizer, name: str) -> int | None:
    """The id of a special token that a tokenizer already has; None if it has none of that name."""
    if isinstance(base, SentencePiece):
        number = base.id_of(name)
        return number if number is not None and not base.token_bytes()[number] else None
    path = base.path if isinstance(base, HuggingFaceTokenizer) else base.files[0] if isinstance(base, BytePairs) else None
    if path is not None and path.name == "tokenizer.json":
        added = {token["content"]: token["id"] for token in read_json(path).get("added_tokens", []) if token["special"]}
        return added.get(name)
    return None
