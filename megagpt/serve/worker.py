"""The thread that generates: it takes requests from a queue into the batch, and hands their text back to the event loop.

One thread does all forward passes. Between two steps it removes cancelled and late jobs, fills free slots, and gives the
sampled tokens to their jobs. Events reach the event loop once per step, for any number of texts.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megagpt.generate.batch import Batch, Drawn, Logprob, Text
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.text_stream import StreamDecoder, TextStream
from megagpt.model.cache import Cache
from megagpt.serve.load import Served
from megagpt.serve.protocol import ApiError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenText:
    """A generated token: its probability, and where its text begins in the answer, in characters."""

    logprob: Logprob
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a job's answer: text that is final; the last piece has the reason why the job ended."""

    text: str
    tokens: tuple[TokenText, ...] = ()
    finish_reason: str | None = None


@dataclass(eq=False)
class Job:
    """A request and its state."""

    ids: list[int]
    sampling: SamplingConfig
    stream: TextStream
    deadline: float
    """In seconds of time.monotonic."""
    num_logprobs: int | None = None
    events: asyncio.Queue[Piece | ApiError] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    num_generated: int = 0
    held: list[TokenText] = field(default_factory=list)
    """Tokens whose text has not been sent yet."""
    released: int = 0
    """Characters that have been sent."""


class Worker:
    """The thread that generates, with its batch and its queue."""

    def __init__(self, served: Served, *, num_slots: int, max_waiting: int, max_prompt_tokens: int) -> None:
        loaded = served.loaded
        self._tokenizer, self.max_waiting = loaded.tokenizer, max_waiting
        self._batch = Batch(
            loaded.model,
            Cache(loaded.model_config.num_layers, num_slots, served.max_context),
            served.max_context,
            served.device,
            loaded.tokenizer.vocab_size,
            max_prompt_tokens,
        )
        self._waiting: deque[Job] = deque()
        self._jobs: dict[Text, Job] = {}
        self._wake, self._ending = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_failure: Callable[[], None] = lambda: None
        self._out: list[tuple[Job, Piece | ApiError]] = []
        self.failure: BaseException | None = None
        self.num_generated = self.num_prompt = 0
        """Tokens over all jobs so far."""

    def start(self, on_failure: Callable[[], None]) -> None:
        """Start the thread; `on_failure` is called in the event loop if a forward pass fails."""
        self._loop, self._on_failure = asyncio.get_running_loop(), on_failure
        self._thread.start()

    def new_job(
        self, ids: list[int], sampling: SamplingConfig, *, at_start: bool, seconds: float, num_logprobs: int | None
    ) -> Job:
        """A job that is not submitted yet; `seconds` is its time limit from now."""
        stream = TextStream(StreamDecoder(self._tokenizer, at_start=at_start), sampling.stop)
        return Job(ids, sampling, stream, time.monotonic() + seconds, num_logprobs)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ApiError (429) if the queue is full, 503 if the worker has ended."""
        with self._wake:
            if self.failure is not None or self._ending:
                raise ApiError(503, "the server is ending", code="shutting_down", headers={"Retry-After": "5"})
            free = self._batch.num_slots - len(self._batch.texts)
            if len(self._waiting) >= self.max_waiting + max(0, free):
                message = f"{len(self._waiting)} requests are waiting: try again later"
                raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Cancel a job; its slot is freed before the next step."""
        job.cancelled = True

    @property
    def num_slots(self) -> int:
        """Texts that can be generated at the same time."""
        return self._batch.num_slots

    @property
    def num_running(self) -> int:
        """Texts that have a slot."""
        return len(self._jobs)

    @property
    def num_waiting(self) -> int:
        """Jobs without a slot."""
        return len(self._waiting)

    def end(self) -> None:
        """End the thread; remaining jobs get an error."""
        with self._wake:
            self._ending = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._turn()
                    self._deliver()
        except Exception as failure:
            log.exception("generation failed")
            self.failure = failure
        error = ApiError(503, "the server ended before the text was complete", code="shutting_down")
        if self.failure is not None:
            error = ApiError(500, "generation failed; the server's log says why", code="internal_error")
        with self._wake:
            self._ending = True
            self._out += [(job, error) for job in (*self._jobs.values(), *self._waiting)]
            self._waiting.clear()
            self._jobs.clear()
        self._deliver()
        if self.failure is not None:
            self._call(self._on_failure)

    def _wait(self) -> bool:
        """Wait until there is work; False when the server ends."""
        with self._wake:
            while not (self._waiting or self._jobs or self._ending):
                self._wake.wait()
            return not self._ending

    def _turn(self) -> None:
        """Remove cancelled and late jobs, fill free slots, and do one step."""
        now = time.monotonic()
        for text, job in list(self._jobs.items()):
            if job.cancelled or now > job.deadline:
                self._finish(text, job, None if job.cancelled else _late())
        with self._wake:
            for job in list(self._waiting):
                if job.cancelled or now > job.deadline:
                    self._waiting.remove(job)
                    if not job.cancelled:
                        self._out.append((job, _late()))
            new = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._batch.num_slots - self.num_running))]
        for job in new:
            self._jobs[self._batch.add(job.ids, job.sampling, num_logprobs=job.num_logprobs)] = job
            self.num_prompt += len(job.ids)
        for drawn in self._batch.step() if self._jobs else ():
            self._take(drawn, self._jobs[drawn.text])

    def _take(self, drawn: Drawn, job: Job) -> None:
        """Give a token to its job."""
        self.num_generated += 1
        job.num_generated += 1
        if drawn.token in self._tokenizer.eos_ids:
            self._finish(drawn.text, job, _rest(job, "stop"))
            return
        if drawn.logprob is not None:
            job.held.append(TokenText(drawn.logprob, job.stream.num_characters))
        text = job.stream.push(drawn.token)
        job.released += len(text)
        if job.stream.stopped:
            job.held = [token for token in job.held if token.offset < job.stream.num_characters]
            self._finish(drawn.text, job, Piece(text, tuple(job.held), "stop"))
        elif job.num_generated == job.sampling.max_tokens:
            self._finish(drawn.text, job, _rest(job, "length", text))
        else:
            certain = [token for token in job.held if token.offset < job.released]
            job.held = job.held[len(certain) :]
            if text or certain:
                self._out.append((job, Piece(text, tuple(certain))))

    def _finish(self, text: Text, job: Job, last: Piece | ApiError | None) -> None:
        self._batch.remove(text)
        del self._jobs[text]
        if last is not None:
            self._out.append((job, last))

    def _deliver(self) -> None:
        """Hand everything to the event loop in one call."""
        if self._out:
            out, self._out = self._out, []
            self._call(lambda: [job.events.put_nowait(event) for job, event in out])

    def _call(self, function: Callable[[], object]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: nobody reads events any more
            log.debug("the event loop is closed")


def _rest(job: Job, reason: str, text: str = "") -> Piece:
    """The last piece of a job that no stop string ended."""
    return Piece(text + job.stream.finish(), tuple(job.held), reason)


def _late() -> ApiError:
    return ApiError(504, "the request took longer than the server allows", code="timeout")
