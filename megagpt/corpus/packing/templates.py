"""Chat templates: messages to text with special tokens in it, and which part of it is learned.

A template is Jinja as transformers has it (`messages`, `bos_token`, `eos_token`, `add_generation_prompt`, `raise_exception`),
run in Jinja's sandbox. `{% generation %}...{% endgeneration %}` stands around the answers, whose tokens are the targets.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megagpt.config import UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""OpenAI's ChatML, as most instruction-tuned models have it."""
CHATML_TOKENS, CHATML_END = ("<|im_start|>", "<|im_end|>"), ("<|im_end|>",)
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
"""Prompt and answer as one text without special tokens but the end of text."""

BOS, EOS = "\ufdd0bos\ufdd0", "\ufdd0eos\ufdd0"
"""What `bos_token` and `eos_token` are in a template: noncharacters, which no exchange of text contains."""
_MARKS = [chr(code) for code in range(0xFDD1, 0xFDF0)]


class TemplateError(ValueError):
    """A row that a template does not take, by its own `raise_exception` or because it asks for what the row has not."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a rendered row: a special token by its name (BOS and EOS included), or text; and whether it is learned."""

    text: str
    is_special: bool
    is_target: bool


class Template:
    """A compiled chat template."""

    def __init__(self, text: str, special_tokens: Sequence[str], *, name: str) -> None:
        """`name` is what errors call it. Raises UserError if it is no Jinja, or marks no answer."""
        import jinja2

        self._environment = _environment()
        if not re.search(r"\{%-?\s*generation\s*-?%\}", text):
            raise UserError(
                f"{name}: has no {{% generation %}} ... {{% endgeneration %}} around the answer: nothing is learned"
            )
        try:
            self._template = self._environment.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}: line {error.lineno}: not a Jinja template ({error.message})") from None
        self._text, self._names = text, tuple(sorted({*special_tokens, BOS, EOS}, key=lambda name: (-len(name), name)))

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False) -> list[Span]:
        """The row in order. Special tokens that a message spells out are text. Raises TemplateError."""
        import jinja2

        whole = self._text + "".join(value for message in messages for value in message.values())
        free = [mark for mark in _MARKS if mark not in whole]
        if len(free) < 3:
            raise TemplateError("holds nearly all of the noncharacters U+FDD1 to U+FDEF")
        start, end, guard = free[:3]
        guarded = [{key: self._guard(value, guard) for key, value in message.items()} for message in messages]
        self._environment.globals["generation_marks"] = (start, end)
        try:
            values = {"bos_token": BOS, "eos_token": EOS, "add_generation_prompt": add_generation_prompt}
            text = self._template.render(messages=guarded, **values)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise TemplateError(f"the template refuses it ({error})") from None
        spans, is_target = [], False
        for part in re.split("(" + "|".join(map(re.escape, (*self._names, start, end))) + ")", text):
            if part in (start, end):
                is_target = part == start
            elif part:
                is_special = part in self._names
                spans.append(Span(part if is_special else part.replace(guard, ""), is_special, is_target))
        return spans

    def _guard(self, text: str, guard: str) -> str:
        for name in self._names:
            text = text.replace(name, name[0] + guard + name[1:])
        return text


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: its output stands between two marks."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            start, end = self.environment.globals["generation_marks"]
            return f"{start}{caller()}{end}"

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    return environment
