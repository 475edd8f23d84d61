"""Requests of OpenAI's interface: their parameters, which of them are supported, and errors in OpenAI's format."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20


class ApiError(Exception):
    """An answer with a status of 400 or above: {"error": {message, type, param, code}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """The parameters of both kinds of requests. OpenAI has no top_k, min_p and repetition_penalty; they are as in vLLM."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=1, le=10)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]] = ""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def for_template(self) -> dict[str, str]:
        """The message as a chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content, **({"name": self.name} if self.name is not None else {})}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}
"""OpenAI's parameters that are not supported -> values that are accepted because they change nothing (null always is)."""

R = TypeVar("R", bound=GenerationRequest)


def parse_request(kind: type[R], body: bytes) -> R:
    """Parse the request in a body. Raises ApiError with status 400 that names the parameter and the rule."""
    values = parse_json(body)
    for name, neutral in UNSUPPORTED.items():
        if name in values:
            value = values.pop(name)
            if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                only = f"; only {json.dumps(neutral[0])} is" if neutral else ""
                raise ApiError(400, f"{name} is not supported{only}", param=name, code="unsupported_parameter")
    # null stands for the default everywhere in OpenAI's interface
    values = {name: value for name, value in values.items() if value is not None}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _api_error(error) from None


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse the JSON object in a body. Raises ApiError (400) if it is not a JSON object or UTF-8 cannot hold its text."""
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half of a surrogate pair, which is not a character", code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        message = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, f"the body is not valid JSON: {message}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _api_error(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_context=False)
    param = str(found[0]["loc"][0]) if found[0]["loc"] else None
    # A parameter with several forms has an error for each form. The form that matches deepest has the most useful one.
    same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
    first = max(same, key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    path = [str(part) for part in first["loc"]]
    names = [part for part in path[1:] if part not in ("str", "int") and (part.isdigit() or part.isidentifier())]
    where = ".".join([*path[:1], *names])[:200]
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{where[:200]}: no such parameter", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(400, f"{where}: required, and not given", param=param, code="missing_parameter")
    return ApiError(400, f"{where}: {first['msg']}", param=param, code="invalid_value")
