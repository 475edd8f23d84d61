"""Answers in OpenAI's format: complete, and as chunks of a stream."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megagpt.serve.worker import Piece, TokenText


@dataclass(frozen=True)
class Shape:
    """The format of an answer (chat or completion) and its constant fields."""

    chat: bool
    model: str
    pieces: Sequence[bytes]
    """The bytes of each token, by id."""
    logprobs: bool
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The complete answer, without a stream."""
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs([token for piece in pieces for token in piece.tokens])
        choice: dict[str, Any] = {"index": 0, "logprobs": logprobs, "finish_reason": pieces[-1].finish_reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def first_chunk(self) -> dict[str, Any] | None:
        """The chunk before the text; None for a completion, which has none."""
        if not self.chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": 0, "delta": delta, "logprobs": None, "finish_reason": None})

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A chunk of a stream."""
        rest = {"index": 0, "logprobs": self._logprobs(piece.tokens), "finish_reason": piece.finish_reason}
        if self.chat:
            return self._chunk({**rest, "delta": {"content": piece.text} if piece.text else {}})
        return self._chunk({**rest, "text": piece.text})

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk after the text with the token counts, for stream_options.include_usage."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, chat_object: str) -> dict[str, Any]:
        name = chat_object if self.chat else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        if self.chat:
            return {"content": [self._chat_token(token) for token in tokens], "refusal": None}
        return {
            "tokens": [self._text(token.logprob.token) for token in tokens],
            "token_logprobs": [token.logprob.logprob for token in tokens],
            "top_logprobs": [{self._text(i): value for i, value in reversed(t.logprob.likeliest)} for t in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _chat_token(self, token: TokenText) -> dict[str, Any]:
        likeliest = [self._entry(i, value) for i, value in token.logprob.likeliest]
        return {**self._entry(token.logprob.token, token.logprob.logprob), "top_logprobs": likeliest}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(token), "logprob": logprob, "bytes": list(self.pieces[token])}

    def _text(self, token: int) -> str:
        piece = self.pieces[token]
        try:
            return piece.decode("utf-8")
        except UnicodeDecodeError:  # part of a character: written as OpenAI does, so that tokens stay distinct
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def new_id(*, chat: bool) -> str:
    """A new random id of an answer."""
    return ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex


def usage_of(num_prompt: int, num_generated: int) -> dict[str, int]:
    """The token counts of a request as OpenAI's `usage`."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n\n"


DONE = b"data: [DONE]\n\n"
