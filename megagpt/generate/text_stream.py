"""Tokens to text as they come: whole characters, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

from megagpt.tokenizer.base import Tokenizer


class StreamDecoder:
    """Tokens to text, one at a time: a character is returned when its last byte is known; invalid UTF-8 becomes U+FFFD.

    `at_start`: the tokens begin a document, so that a tokenizer's dummy prefix is left out.
    """

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool = False) -> None:
        self._pieces, self._drop_space = tokenizer.token_bytes(), at_start and tokenizer.dummy_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes, maybe none."""
        piece = self._pieces[token]
        if self._drop_space and piece:
            piece, self._drop_space = piece.removeprefix(b" "), False
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD if the last character is incomplete."""
        return self._decoder.decode(b"", final=True)


class TextStream:
    """The text of a generated token sequence, released as soon as it is certain: what may begin a stop string is held back."""

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop, self._held = decoder, tuple(stop), ""
        self.num_characters = 0
        """Of the text so far, what is held back included."""
        self.stopped = False
        """Whether a stop string was found: the text is over."""

    def push(self, token: int) -> str:
        """The text that this token makes certain, maybe none."""
        return self._release(self._decoder.push(token), last=False)

    def finish(self) -> str:
        """What is left when no token follows: text held back, U+FFFD for an incomplete character."""
        return "" if self.stopped else self._release(self._decoder.finish(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        held = len(self._held)
        self._held, self.num_characters = self._held + text, self.num_characters + len(text)
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, cut = True, min(found)
            self.num_characters += cut - held - len(text)
        else:
            cut = len(self._held) if last else len(self._held) - self._beginning()
        released, self._held = self._held[:cut], "" if found else self._held[cut:]
        return released

    def _beginning(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = min(len(self._held), max((len(stop) for stop in self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
