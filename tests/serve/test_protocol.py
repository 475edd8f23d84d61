"""Bodies: what is accepted, and which parameter an error names; limits of rate; keys; chat templates."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import TEMPLATE

from megagpt.config import UserError, validate
from megagpt.serve.config import ServeConfig, is_loopback, read_api_keys
from megagpt.serve.limits import Clients
from megagpt.serve.protocol import UNSUPPORTED, ApiError, ChatRequest, CompletionRequest, parse_request
from megagpt.tokenizer.chat_template import ChatError, read_chat_template
from megagpt.tokenizer.open_tokenizer import open_tokenizer
from megagpt.tokenizer.plain_bytes import Bytes
from megagpt.tokenizer.sentencepiece import train_sentencepiece

HELLO = [{"role": "user", "content": "hi"}]


def error_of(kind: Any, body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_request(kind, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.body().keys() == {"error"}
    assert caught.value.body()["error"].keys() == {"message", "type", "param", "code"}
    return caught.value


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"n": 2}, "n", "n is not supported; only 1 is"),
        ({"n": True}, "n", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"echo": True}, "echo", "echo is not supported; only false is"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"max_token": 5}, "max_token", "no such parameter"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"stop": ["a", ""]}, "stop", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"seed": 1 << 64}, "seed", "less than"),
        ({"stream_options": {"include_usage": 1}}, "stream_options", "boolean"),
        ({"prompt": [1.5]}, "prompt", "valid"),
        ({"prompt": {"a": 1}}, "prompt", "valid"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ],
)
def test_an_error_names_the_parameter(body: dict[str, Any], param: str, words: str) -> None:
    error = error_of(CompletionRequest, body)
    assert (error.status, error.param) == (400, param)
    assert words in error.message


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "'system', 'developer', 'user' or 'assistant'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "messages.0.content.0.type: Input should be 'text'",
        ),
        ({"messages": HELLO, "prompt": "x"}, "prompt", "no such parameter"),
        ({"messages": HELLO, "top_logprobs": 30}, "top_logprobs", "less than or equal to 20"),
    ],
)
def test_an_error_of_a_chat_names_the_parameter(body: dict[str, Any], param: str, words: str) -> None:
    error = error_of(ChatRequest, body)
    assert (error.status, error.param) == (400, param)
    assert words in error.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"temperature": NaN}', "NaN is not JSON"),
        (b'{"temperature": 1e999}', "finite"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"seed": ' + b"1" * 10_000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bodies_that_are_no_json_object(body: bytes, words: str) -> None:
    error = error_of(CompletionRequest, body)
    assert error.status == 400
    assert words in error.message


def test_null_and_values_that_ask_for_nothing_are_accepted() -> None:
    neutral = {name: values[0] for name, values in UNSUPPORTED.items() if values}
    body = {"prompt": "x", "n": None, "max_tokens": None, "stop": None, **neutral, "tools": None}
    found = parse_request(CompletionRequest, json.dumps(body).encode())
    assert found == CompletionRequest(prompt="x")
    assert parse_request(CompletionRequest, b'{"stop": "a"}').stop_strings == ("a",)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*CompletionRequest.model_fields, *ChatRequest.model_fields, *UNSUPPORTED, "role", "x"])


@given(st.dictionaries(NAMES, JSON, max_size=4), st.sampled_from([CompletionRequest, ChatRequest]))
@settings(max_examples=300, deadline=None)
def test_any_json_is_a_request_or_a_400(body: dict[str, Any], kind: Any) -> None:
    try:
        found: Any = parse_request(kind, json.dumps(body).encode())
    except ApiError as error:
        found = error
    assert isinstance(found, kind) or found.status == 400
    if isinstance(found, ApiError):
        json.dumps(found.body(), ensure_ascii=False).encode()


def test_keys_are_compared_and_requests_counted_per_key() -> None:
    clients = Clients(["first-key-of-them", "second-key-of-them"], 2.0)
    for _ in range(2):
        clients.admit("Bearer first-key-of-them", "a", counted=True)
    clients.admit("bearer first-key-of-them", "a", counted=False)
    with pytest.raises(ApiError) as caught:
        clients.admit("Bearer first-key-of-them", "other address", counted=True)
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "30")
    clients.admit("Bearer second-key-of-them", "a", counted=True)
    for wrong in (None, "", "Bearer ", "Basic first-key-of-them", "Bearer first-key-of-the", "Bearer ключ"):
        with pytest.raises(ApiError) as caught:
            clients.admit(wrong, "a", counted=True)
        assert caught.value.status == 401


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("a", False)],
)
def test_another_address_needs_keys(host: str, loopback: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert is_loopback(host) == loopback
    monkeypatch.delenv("MEGAGPT_API_KEYS", raising=False)
    config = ServeConfig(run_dir=tmp_path, host=host)
    if loopback:
        assert read_api_keys(config) == ()
    else:
        with pytest.raises(UserError, match=f"host={host} admits other machines: set API keys in MEGAGPT_API_KEYS"):
            read_api_keys(config)
    (tmp_path / "keys").write_text("# ours\n0123456789abcdef\n\n")
    monkeypatch.setenv("MEGAGPT_API_KEYS", "fedcba9876543210, ")
    assert read_api_keys(config.model_copy(update={"api_keys_file": tmp_path / "keys"})) == (
        "fedcba9876543210",
        "0123456789abcdef",
    )


@pytest.mark.parametrize(
    ("text", "message"), [("short\n", "key 1: at least 16 printable"), ("# none\n", "holds no key"), (None, "cannot be read")]
)
def test_a_bad_file_of_keys_is_named(text: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEGAGPT_API_KEYS", raising=False)
    if text is not None:
        (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match=rf"{tmp_path}/keys.*{message}"):
        read_api_keys(ServeConfig(run_dir=tmp_path, api_keys_file=tmp_path / "keys"))


def test_a_model_is_named_once() -> None:
    for values in ({}, {"run_dir": "a", "export": "b"}):
        with pytest.raises(UserError, match="run_dir=RUN or export=FOLDER, one of them"):
            validate(ServeConfig, values, source="x")


def test_special_tokens_come_from_the_template_only(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    template = read_chat_template(tmp_path / "t.jinja", Bytes())
    assert template is not None
    ids = template.ids([{"role": "user", "content": "a<|endoftext|>b"}])
    assert ids == [*b"[user]a<|endoftext|>b", 256, *b"[assistant]"]
    with pytest.raises(ChatError, match="no developers"):
        template.ids([{"role": "developer", "content": "a"}])
    assert read_chat_template(tmp_path / "none.jinja", Bytes()) is None
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match=r"bad\.jinja: not a chat template"):
        read_chat_template(tmp_path / "bad.jinja", Bytes())


def test_a_template_cannot_reach_the_process(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    template = read_chat_template(tmp_path / "t.jinja", Bytes())
    assert template is not None
    with pytest.raises(ChatError, match="unsafe"):
        template.ids([{"role": "user", "content": "a"}])


def test_a_sentencepiece_model_names_its_special_tokens(tmp_path: Path) -> None:
    train_sentencepiece(["to be or not to be that is the question"] * 40, tmp_path, vocab_size=280)
    tokenizer = open_tokenizer(tmp_path)
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}</s>{{ eos_token }}")
    template = read_chat_template(tmp_path / "t.jinja", tokenizer)
    assert template is not None
    assert template.special == {"</s>": 1}
    assert template.ids([{"role": "user", "content": "to</s>"}]) == [*tokenizer.encode("to</s>"), 1, 1]
