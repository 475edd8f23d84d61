"""Chat templates: turn messages into ids with the Jinja template that came with the model.

Only the template can write special tokens. A message that contains the name of one (`<|im_end|>`) keeps it as text, so that no
user can write another role's turn.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.config import UserError
from megagpt.files import read_json
from megagpt.tokenizer.base import Tokenizer
from megagpt.tokenizer.bpe import BytePairs
from megagpt.tokenizer.extended import Extended
from megagpt.tokenizer.sentencepiece import SentencePiece

FILE_NAME = "chat_template.jinja"


class ChatError(Exception):
    """The template refuses these messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """A compiled template, with its tokenizer and special tokens."""

    template: Any
    """A jinja2.Template."""
    tokenizer: Tokenizer
    special: Mapping[str, int]
    """Name -> id of every special token."""

    def ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation, up to the place where the assistant's answer begins. Raises ChatError if the template
        refuses it."""
        import jinja2

        key = secrets.token_hex(8)
        hidden = {name: f"\ue000{key}{i}\ue001" for name, i in self.special.items()}
        names = {i: name for name, i in self.special.items()}
        shown = [{field: _replace(text, hidden) for field, text in message.items()} for message in messages]
        try:
            text = self.template.render(
                messages=shown,
                add_generation_prompt=True,
                bos_token=names.get(self.tokenizer.bos_id, "") if self.tokenizer.bos_id is not None else "",
                eos_token=names.get(self.tokenizer.eot_id, ""),
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError, LookupError) as error:
            raise ChatError(str(error) or type(error).__name__) from None
        back = {mark: name for name, mark in hidden.items()}
        ids: list[int] = []
        for part in re.split(_any_of(self.special), text) if self.special else [text]:
            if part in self.special:
                ids.append(self.special[part])
            elif part:
                ids += self.tokenizer.encode(_replace(part, back))
        if self.tokenizer.bos_id is not None and ids[:1] != [self.tokenizer.bos_id]:
            ids.insert(0, self.tokenizer.bos_id)
        return ids


def read_chat_template(path: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Read the template in a file; None if there is no such file. Raises UserError if it is not a template."""
    if not path.is_file():
        return None
    import jinja2

    try:
        template = _environment().from_string(path.read_text(encoding="utf-8"))
    except (jinja2.TemplateError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a chat template: {error}") from None
    return ChatTemplate(template, tokenizer, special_names(tokenizer))


def _environment() -> Any:
    """Jinja as configured in transformers: template tags leave no blank lines, and {% generation %} encloses answers."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """Renders the text inside {% generation %}, which training learns, like any other text."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise
    return environment


def special_names(tokenizer: Tokenizer) -> dict[str, int]:
    """Name -> id of a tokenizer's special tokens. Bytes only have the end of a text, as <|endoftext|>."""
    if isinstance(tokenizer, Extended):
        return special_names(tokenizer.base) | tokenizer.tokens
    if isinstance(tokenizer, SentencePiece):
        return tokenizer.special_names()
    if isinstance(tokenizer, BytePairs) and tokenizer.files[0].name == "tokenizer.json" and tokenizer.files[0].is_file():
        added = read_json(tokenizer.files[0]).get("added_tokens", [])
        return {token["content"]: token["id"] for token in added if token.get("special")}
    return {"<|endoftext|>": tokenizer.eot_id}


def _raise(message: str) -> None:
    raise ChatError(message)


def _any_of(names: Mapping[str, Any]) -> str:
    return "(" + "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) + ")"


def _replace(text: str, by: Mapping[str, str]) -> str:
    return re.sub(_any_of(by), lambda found: by[found[0]], text) if by else text
