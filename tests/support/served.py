"""A small random model to serve, and tools/serve_model.py as a process."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'developer' %}{{ raise_exception('no developers') }}{% endif %}
{{- '[' + message.role + ']' + message.content + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""


def write_run(run_dir: Path, *, template: str | None = None, seq_len: int = 64, **sizes: Any) -> Path:
    """A run directory with a random model over bytes."""
    import torch

    from megagpt.convert.import_hf import write_import
    from megagpt.model.gpt import GPT, ModelConfig, initialise
    from megagpt.tokenizer.open_tokenizer import open_tokenizer

    values = {"vocab_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 32, "init_std": 0.3}
    config = ModelConfig.model_validate({**values, "seq_len": seq_len, **sizes})
    model, tokenizer = GPT(config), open_tokenizer("bytes")
    initialise(model, seed=3)
    parameters = dict(model.named_parameters())
    run_dir.mkdir(parents=True)
    with torch.no_grad():
        write_import(run_dir, config, tokenizer, iter(parameters.items()), [(name,) for name in parameters], {})
    (run_dir / "tokenizer").mkdir()
    tokenizer.save(run_dir / "tokenizer")
    if template is not None:
        (run_dir / "tokenizer" / "chat_template.jinja").write_text(template)
    return run_dir


class Server:
    """A running tools/serve_model.py."""

    def __init__(self, words: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(PROJECT / "tools" / "serve_model.py"), "port=0", "device=cpu", *words],
                stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        self.port = self._wait_for_port()

    def _wait_for_port(self) -> int:
        for _ in range(2400):
            found = re.search(r"serving .* on http://\S+:(\d+)", self.log.read_text())
            if found:
                return int(found[1])
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the server did not start:\n{self.log.read_text()}")

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=900)

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON or text, and headers of an answer; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(text) if "json" in found.get("content-type", "") else text, found

    def complete(self, **values: Any) -> dict[str, Any]:
        status, answer, _ = self.request("POST", "/v1/completions", values)
        assert status == 200, answer
        return answer

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.request("GET", "/metrics")[1], re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=900)


@contextlib.contextmanager
def running_server(folder: Path, *words: str, **environment: str) -> Iterator[Server]:
    """A server until the end of the block, where it is ended if it still runs."""
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(list(words), folder / "server.log", environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def events_of(body: str) -> list[Any]:
    """The JSON values of a stream of server-sent events; its end stays as text."""
    lines = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]
