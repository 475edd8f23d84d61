"""The server as a process: answers, streams, batching, errors in OpenAI's form, clients that vanish, draining."""

import contextlib
import json
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import TEMPLATE, Server, events_of, running_server, write_run
from test_protocol import JSON, NAMES

from megagpt.checkpoint.load_model import load_model
from megagpt.generate.sampling import SamplingConfig
from megagpt.generate.streams import stream_texts

SEQ_LEN = 256
WORDS = ("num_slots=4", "max_prompt_tokens_per_step=24", "max_waiting=6", "max_body_bytes=20000")
PROMPTS = ["", "a", "the cat", "to be or not", "x" * 60, "é🙂", "\n\n", "0123456789" * 9]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("served") / "tiny", template=TEMPLATE, seq_len=SEQ_LEN)


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[Server]:
    with running_server(run_dir.parent, f"run_dir={run_dir}", *WORDS) as server:
        yield server


def alone(run_dir: Path, prompts: list[str], **values: Any) -> list[str]:
    """What generate_text gives, one prompt after another."""
    loaded, sampling = load_model(run_dir), SamplingConfig(**{"temperature": 0.0, **values})
    return ["".join(piece for _, piece in stream_texts(loaded, [prompt], sampling)) for prompt in prompts]


def wait_for(condition: Any, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def test_greedy_texts_are_those_generated_alone_while_others_run(server: Server, run_dir: Path) -> None:
    expected = alone(run_dir, PROMPTS, max_tokens=60)
    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(lambda prompt: server.complete(prompt=prompt, max_tokens=60, temperature=0), PROMPTS))
    assert [answer["choices"][0]["text"] for answer in found] == expected
    assert len(set(expected)) > 4
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert answer["usage"]["prompt_tokens"] == max(1, len(prompt.encode()))
        assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


def test_a_seed_gives_one_text_and_settings_are_those_of_generate_text(server: Server, run_dir: Path) -> None:
    values = {"seed": 5, "temperature": 1.5, "top_p": 0.9, "min_p": 0.02, "top_k": 40, "max_tokens": 40}
    values |= {"frequency_penalty": 0.7, "presence_penalty": -0.3}
    expected = alone(run_dir, ["ab"], **values)[0]
    assert server.complete(prompt="ab", **values)["choices"][0]["text"] == expected
    assert server.complete(prompt="ab", **{**values, "seed": 6})["choices"][0]["text"] != expected
    unseeded = {server.complete(prompt="ab", temperature=2, max_tokens=40)["choices"][0]["text"] for _ in range(3)}
    assert len(unseeded) == 3


def test_a_stop_string_ends_the_text_and_is_not_part_of_it(server: Server) -> None:
    whole = server.complete(prompt="ab", temperature=0, max_tokens=40)["choices"][0]["text"]
    stop = next(whole[i : i + 2] for i in range(5, 30) if "\ufffd" not in whole[i : i + 2])
    body = {"prompt": "ab", "temperature": 0, "max_tokens": 40, "stop": [stop, "never there"], "logprobs": 0}
    answer = server.complete(**body)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
    assert all(offset < len(choice["text"]) for offset in choice["logprobs"]["text_offset"])
    status, text, headers = server.request("POST", "/v1/completions", {**body, "stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    *chunks, done = events_of(text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == choice["logprobs"]["text_offset"]


def test_logprobs_are_the_models_own(server: Server, run_dir: Path) -> None:
    choice = server.complete(prompt="ab", temperature=0, max_tokens=6, logprobs=3)["choices"][0]
    ids = list(b"ab")
    model = load_model(run_dir).model
    for number, logprob in enumerate(choice["logprobs"]["token_logprobs"]):
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0, -1, :257].log_softmax(dim=-1)
        # with and without a cache: other orders of fp32 sums
        assert logprob == pytest.approx(float(expected.max()), abs=1e-4)
        assert list(choice["logprobs"]["top_logprobs"][number].values())[-1] == logprob
        ids.append(int(expected.argmax()))
    assert number == 5


def test_a_chat_is_its_template_and_answers_in_its_own_form(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "temperature": 0, "max_tokens": 12}
    status, answer, _ = server.request("POST", "/v1/chat/completions", {**body, "logprobs": True, "top_logprobs": 2})
    assert status == 200
    ids = [*b"[user]hi", 256, *b"[assistant]"]
    plain = server.complete(prompt=ids, temperature=0, max_tokens=12)
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": plain["choices"][0]["text"], "refusal": None}
    assert answer["usage"] == plain["usage"]
    assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [2] * 12
    _, text, _ = server.request(
        "POST", "/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    first, *chunks, usage, done = events_of(text)
    assert (first["choices"][0]["delta"], done) == ({"role": "assistant", "content": ""}, "[DONE]")
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == choice["message"]["content"]
    assert (usage["choices"], usage["usage"]) == ([], plain["usage"])
    for wrong in ([{"role": "developer", "content": "x"}], [{"role": "user", "content": "x" * 300}]):
        status, answer, _ = server.request("POST", "/v1/chat/completions", {"messages": wrong})
        assert (status, answer["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("POST", "/v1/completions", b"{", {}, 400, "invalid_json"),
        ("POST", "/v1/completions", {"prompt": "a", "n": 2}, {}, 400, "unsupported_parameter"),
        ("POST", "/v1/completions", {"prompt": ["a", "b"]}, {}, 400, "unsupported_value"),
        ("POST", "/v1/completions", {"prompt": [[1, 257]]}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"prompt": [-1]}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"prompt": []}, {}, 400, "invalid_value"),
        ("POST", "/v1/completions", {"prompt": "a" * 256}, {}, 400, "context_length_exceeded"),
        ("POST", "/v1/completions", {"prompt": "a" * 200, "max_tokens": 57}, {}, 400, "context_length_exceeded"),
        ("POST", "/v1/completions", {"model": "gpt-9"}, {}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"prompt": "a" * 20000}, {}, 413, "body_too_large"),
        ("POST", "/v1/completions", {"prompt": "a"}, {"Content-Type": "text/plain"}, 415, "invalid_content_type"),
        ("POST", "/v1/chat/completions", {"messages": []}, {}, 400, "invalid_value"),
        ("GET", "/v1/models/none", None, {}, 404, "model_not_found"),
        ("GET", "/v1/completions", None, {}, 405, None),
        ("GET", "/none", None, {}, 404, None),
    ],
)
def test_errors_have_openais_form(
    server: Server, method: str, path: str, body: Any, headers: dict[str, str], status: int, code: str | None
) -> None:
    found, answer, _ = server.request(method, path, body, headers)
    assert (found, answer["error"]["code"]) == (status, code)
    assert answer["error"].keys() == {"message", "type", "param", "code"}


def test_a_body_without_a_length_is_cut_off(server: Server) -> None:
    parts = (b"x" * 4096 for _ in range(6))
    with contextlib.closing(server.connection()) as connection:
        connection.request("POST", "/v1/completions", parts, {"Content-Type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413


@given(st.dictionaries(NAMES, JSON, max_size=3) | JSON, st.sampled_from(["/v1/completions", "/v1/chat/completions"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_body_gives_a_5xx(server: Server, body: Any, path: str) -> None:
    values = {"max_tokens": 1, "messages": [{"role": "user", "content": "x"}], **body} if isinstance(body, dict) else body
    status, _, _ = server.request("POST", path, json.dumps(values).encode())
    assert status in (200, 400, 404)


def test_more_requests_than_the_queue_holds_are_told_to_come_back(server: Server) -> None:
    body = {"prompt": "a", "max_tokens": 200, "temperature": 0}
    with ThreadPoolExecutor(24) as clients:
        found = list(clients.map(lambda _: server.request("POST", "/v1/completions", body), range(24)))
    assert {status for status, _, _ in found} == {200, 429}
    assert sum(status == 200 for status, _, _ in found) >= 10  # four slots and six that wait
    for status, answer, headers in found:
        if status == 429:
            assert (answer["error"]["code"], headers["retry-after"]) == ("queue_full", "1")
    assert len({answer["choices"][0]["text"] for status, answer, _ in found if status == 200}) == 1


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_slot(server: Server, stream: bool, reads: bool) -> None:
    """Eight clients that ask for the longest text there is and hang up: the slots and the queue are free long before."""
    before = server.metric("megagpt_generated_tokens_total")
    body = json.dumps({"prompt": "a", "max_tokens": 250, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head.encode() + body)
            if stream and reads:
                client.recv(10)
    wait_for(lambda: server.metric("megagpt_running_requests") + server.metric("megagpt_waiting_requests") == 0)
    assert server.metric("megagpt_generated_tokens_total") - before < 8 * 250
    assert server.complete(prompt="a", max_tokens=1)["usage"]["completion_tokens"] == 1


def test_the_official_client(server: Server) -> None:
    from openai import BadRequestError, OpenAI

    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == ["tiny"]
        whole = client.completions.create(model="tiny", prompt="ab", max_tokens=20, temperature=0)
        options: Any = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(client.completions.create(model="tiny", prompt="ab", max_tokens=20, temperature=0, **options))
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
        assert chunks[-1].usage == whole.usage
        messages: Any = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_completion_tokens=9, logprobs=True
        )
        assert chat.usage is not None
        assert (chat.usage.completion_tokens, chat.choices[0].finish_reason) == (9, "length")
        deltas = client.chat.completions.create(
            model="tiny", messages=messages, temperature=0, max_completion_tokens=9, stream=True
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in deltas)
        assert text == chat.choices[0].message.content
        with pytest.raises(BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="ab", n=2)
        assert (caught.value.param, caught.value.code) == ("n", "unsupported_parameter")


def test_health_metrics_and_the_page(server: Server) -> None:
    assert [server.request("GET", path)[0] for path in ("/health", "/ready", "/v1/models/tiny")] == [200, 200, 200]
    status, page, headers = server.request("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.findall(r"https?://", page)
    _, metrics, headers = server.request("GET", "/metrics")
    assert headers["content-type"].startswith("text/plain")
    assert re.search(r'^megagpt_requests_total\{path="/health",status="200"\} [1-9]', metrics, re.MULTILINE)
    assert re.search(r"^megagpt_slots 4.0$", metrics, re.MULTILINE)
    _, schema, _ = server.request("GET", "/openapi.json")
    assert "messages" in json.dumps(schema["paths"]["/v1/chat/completions"]["post"]["requestBody"])


@pytest.mark.slow
def test_term_drains_and_ends_with_status_0(run_dir: Path, tmp_path: Path) -> None:
    """What runs is finished, what comes later gets 503; keys, the rate, and chats without a template on the same server."""
    copy = shutil.copytree(run_dir, tmp_path / "plain")
    (copy / "tokenizer" / "chat_template.jinja").unlink()
    key = {"Authorization": "Bearer 0123456789abcdef"}
    words = (f"run_dir={copy}", "num_slots=1", "max_requests_per_minute=5")
    with running_server(tmp_path / "server", *words, MEGAGPT_API_KEYS="0123456789abcdef") as server:
        assert server.request("GET", "/v1/models")[0] == 401
        assert [server.request("GET", path)[0] for path in ("/health", "/ready", "/", "/metrics")] == [200, 200, 200, 401]
        status, answer, _ = server.request(
            "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, key
        )
        assert (status, answer["error"]["code"]) == (400, "no_chat_template")
        body, found = {"prompt": "ab", "max_tokens": 240, "temperature": 0, "stream": True}, []
        threads = [
            threading.Thread(target=lambda: found.append(server.request("POST", "/v1/completions", body, key)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.request("GET", "/metrics", headers=key)[1].count("megagpt_waiting_requests 2.0"))
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.request("GET", "/ready")[0] == 503)
        status, answer, headers = server.request("POST", "/v1/completions", body, key)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (503, "shutting_down", "5")
        assert server.request("POST", "/v1/completions", body, key)[0] == 429
        for thread in threads:
            thread.join()
        assert server.process.wait(timeout=900) == 0
    assert [status for status, _, _ in found] == [200] * 3
    assert len({"".join(chunk["choices"][0]["text"] for chunk in events_of(text)[:-1]) for _, text, _ in found}) == 1
    assert all(text.endswith("data: [DONE]\n\n") for _, text, _ in found)
    assert "drained" in server.log.read_text()


@pytest.mark.slow
def test_requests_that_take_too_long_and_a_drain_that_does(run_dir: Path, tmp_path: Path) -> None:
    words = (f"run_dir={run_dir}", "num_slots=1", "max_request_seconds=0.01", "drain_seconds=0")
    with running_server(tmp_path, *words) as server:
        body = {"prompt": "a" * 100, "max_tokens": 150}
        status, answer, _ = server.request("POST", "/v1/completions", body)
        assert (status, answer["error"]["code"]) == (504, "timeout")
        _, text, _ = server.request("POST", "/v1/completions", {**body, "stream": True})
        assert events_of(text)[-1]["error"]["code"] == "timeout"
        assert server.stop(signal.SIGINT) == 0
