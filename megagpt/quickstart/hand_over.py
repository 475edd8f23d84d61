"""The last part of the quickstart: the model is exported, opened by transformers and served; all continue one text alike."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

from megagpt.command import EXIT_DONE
from megagpt.distributed.ports import free_port
from megagpt.shipped import tool_file

PROMPT, NUM_TOKENS = "The function returns", 24
START_SECONDS = 120.0

_WITH_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, num_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
ids = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=num_tokens)
sys.stdout.write(tokenizer.decode(ids[0], skip_special_tokens=True))
"""


class HandOverError(Exception):
    """A step ended otherwise than it should."""


def missing_packages() -> list[str]:
    """The packages of megagpt[convert,serve] that this environment lacks."""
    return [name for name in ("transformers", "fastapi", "uvicorn") if find_spec(name) is None]


def text_of_generate(run_dir: Path) -> str:
    """The likeliest continuation of PROMPT, prompt included, by tools/generate_text.py."""
    words = [f"run_dir={run_dir}", f"prompt={PROMPT}", f"max_tokens={NUM_TOKENS}", "temperature=0"]
    return _output([sys.executable, str(tool_file("generate_text")), *words]).removesuffix("\n")


def text_of_transformers(export: Path) -> str:
    """The same by Hugging Face's transformers, from the exported folder alone."""
    return _output([sys.executable, "-c", _WITH_TRANSFORMERS, str(export), PROMPT, str(NUM_TOKENS)])


def text_of_server(run_dir: Path) -> str:
    """The same by a request to tools/serve_model.py on this machine, which is ended by SIGTERM. Raises HandOverError if the
    server does not start, answer, or end with status 0."""
    port = free_port()
    command = [sys.executable, str(tool_file("serve_model")), f"run_dir={run_dir}", f"port={port}"]
    with (run_dir / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until_ready(server, port, run_dir / "serve.log")
        body = {"model": run_dir.name, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
        answer = json.loads(_request(port, "/v1/completions", body))
        server.terminate()
        status = server.wait(60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HandOverError(f"serve_model: {error} (see {run_dir / 'serve.log'})") from None
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    if status != EXIT_DONE:
        raise HandOverError(f"serve_model ended with status {status} after SIGTERM (see {run_dir / 'serve.log'})")
    return PROMPT + answer["choices"][0]["text"]


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != EXIT_DONE:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise HandOverError(f"{Path(command[1]).name}: status {done.returncode}: {lines[-1]}")
    return done.stdout


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            _request(port, "/ready", None)
            return
        except (urllib.error.URLError, ConnectionError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise HandOverError(f"serve_model did not start within {START_SECONDS:.0f} s (see {log})") from None
            time.sleep(0.2)


def _request(port: int, path: str, body: dict[str, object] | None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()
