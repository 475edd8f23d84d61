"""What the routes share: they turn a request into a job that fits the model's context."""

import secrets
from typing import cast

from megagpt.generate.sampling import SamplingConfig
from megagpt.serve.config import ServeConfig
from megagpt.serve.limits import Clients
from megagpt.serve.load import Served
from megagpt.serve.metrics import Metrics
from megagpt.serve.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest
from megagpt.serve.worker import Job, Worker
from megagpt.tokenizer.base import prompt_ids
from megagpt.tokenizer.chat_template import ChatError

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for /v1/completions; for a chat it is the room that is left in the context."""


class Api:
    """A model, its worker, its metrics, and the clients that may use it."""

    def __init__(self, served: Served, config: ServeConfig, keys: tuple[str, ...]) -> None:
        self.served, self.config, self.draining = served, config, False
        self.worker = Worker(
            served,
            num_slots=config.num_slots,
            max_waiting=config.max_waiting,
            max_prompt_tokens=config.max_prompt_tokens_per_step,
        )
        self.metrics = Metrics(self.worker)
        self.clients = Clients(keys, config.max_requests_per_minute)
        self.pieces = served.loaded.tokenizer.token_bytes()

    def check_model(self, request: GenerationRequest) -> None:
        """Raise ApiError (404) if the request names another model."""
        if request.model is not None and request.model != self.served.name:
            message = f"there is no model {request.model[:200]!r} here; GET /v1/models names {self.served.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def ids_of(self, request: GenerationRequest) -> list[int]:
        """The token ids that the generated text continues. Raises ApiError (400) naming what is wrong with the prompt."""
        if isinstance(request, ChatRequest):
            return self.chat_ids(request)
        assert isinstance(request, CompletionRequest)
        return self.completion_ids(request)

    def completion_ids(self, request: CompletionRequest) -> list[int]:
        """The prompt's ids. Raises ApiError (400) naming what is wrong with it."""
        prompt, tokenizer = request.prompt, self.served.loaded.tokenizer
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(400, "several prompts in a request are not supported", param="prompt", code="unsupported_value")
            prompt = prompt[0]
        if isinstance(prompt, str):
            return prompt_ids(tokenizer, prompt)
        ids = cast(list[int], prompt)
        if not ids:
            raise ApiError(400, "prompt: at least one token id is expected", param="prompt", code="invalid_value")
        wrong = next((i for i in ids if not 0 <= i < tokenizer.vocab_size), None)
        if wrong is not None:
            message = f"prompt: {wrong}: token ids are 0 to {tokenizer.vocab_size - 1}"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        return ids

    def chat_ids(self, request: ChatRequest) -> list[int]:
        """The conversation's ids. Raises ApiError (400) without a chat template, or if the template refuses the messages."""
        if self.served.chat is None:
            message = f"{self.served.name} has no chat template (chat_template.jinja beside its tokenizer): use /v1/completions"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        try:
            ids = self.served.chat.ids([message.for_template() for message in request.messages])
        except ChatError as error:
            message = f"the chat template refuses the messages: {str(error)[:300]}"
            raise ApiError(400, message, param="messages", code="invalid_value") from None
        if not ids:
            raise ApiError(400, "the chat template makes no text of the messages", param="messages", code="invalid_value")
        return ids

    def new_job(self, request: GenerationRequest, ids: list[int]) -> Job:
        """A job that fits the context. Raises ApiError (400) if prompt and max_tokens together are longer."""
        room = self.served.max_context - len(ids)
        chat = isinstance(request, ChatRequest)
        wanted, param = request.max_tokens, "max_tokens"
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            wanted, param = request.max_completion_tokens, "max_completion_tokens"
        prompt = "messages" if chat else "prompt"
        if room < 1:
            message = (
                f"the prompt has {len(ids)} tokens; the context has {self.served.max_context}, and at least one is generated"
            )
            raise ApiError(400, message, param=prompt, code="context_length_exceeded")
        if wanted is not None and wanted > room:
            message = (
                f"{param}={wanted}: must be at most {room}: the context has {self.served.max_context} tokens, and the prompt "
                f"takes {len(ids)}"
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        sampling = SamplingConfig(
            max_tokens=wanted or (room if chat else min(room, DEFAULT_COMPLETION_TOKENS)),
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            stop=request.stop_strings,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
        )
        at_start = isinstance(request, CompletionRequest) and request.prompt in ("", [""])
        return self.worker.new_job(
            ids,
            sampling,
            at_start=at_start,
            seconds=self.config.max_request_seconds,
            num_logprobs=num_logprobs(request),
        )


def num_logprobs(request: GenerationRequest) -> int | None:
    """How many likeliest tokens to report per token; None = no logprobs. Raises ApiError (400) for top_logprobs alone."""
    if isinstance(request, CompletionRequest):
        return request.logprobs
    assert isinstance(request, ChatRequest)
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs", code="invalid_value")
    return (request.top_logprobs or 0) if request.logprobs else None
