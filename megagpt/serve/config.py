"""Settings of the server, its API keys, and the address it may listen on."""

import ipaddress
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megagpt.config import Config, UserError

API_KEYS = "MEGAGPT_API_KEYS"
"""The environment variable with API keys, separated by commas."""
SHORTEST_KEY = 16


class ServeConfig(Config):
    """Serve a model over HTTP with OpenAI's interface."""

    run_dir: Path | None = None
    """The run whose checkpoint is served. Give run_dir or export."""
    export: Path | None = None
    """A folder that tools/export_model.py wrote."""
    step: int | Literal["last", "best"] = "last"
    """Which checkpoint of run_dir to serve: last, best (lowest validation loss), or a step."""
    model_name: str | None = Field(default=None, min_length=1)
    """The model's name in requests; null = the name of the folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = the GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Data type of weights and activations. Only fp32 guarantees the same greedy text as generate_text."""
    host: str = "127.0.0.1"
    """The address to listen on. Any address but loopback needs API keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port to listen on; 0 = any free port, which is logged."""
    api_keys_file: Path | None = None
    """A file with an API key per line (at least 16 characters each); the environment variable MEGAGPT_API_KEYS holds more,
    separated by commas."""
    num_slots: int = Field(default=16, gt=0, le=4096)
    """Texts generated at the same time. Each takes 2 x layers x kv_heads x head_size x max_context numbers of cache."""
    max_context: int | None = Field(default=None, gt=1)
    """Most tokens of a request, prompt and generated text together; null = the model's seq_len."""
    max_prompt_tokens_per_step: int = Field(default=512, gt=0)
    """Most prompt tokens computed between two tokens of the other texts; a longer prompt takes several steps."""
    max_waiting: int = Field(default=256, ge=0)
    """Most requests that wait for a slot; further ones get status 429."""
    max_request_seconds: float = Field(default=600.0, gt=0)
    """Time limit of a request, waiting included; a longer one ends with status 504, or an error in its stream."""
    max_body_bytes: int = Field(default=1 << 20, gt=0)
    """Largest body of a request; larger ones get status 413."""
    max_requests_per_minute: float | None = Field(default=None, gt=0)
    """Most requests per minute of a client (an API key, or an address); further ones get status 429. null = no limit."""
    drain_seconds: float = Field(default=60.0, ge=0)
    """How long running requests may take after SIGTERM. Longer ones end with an error; the exit status is 0."""

    @model_validator(mode="after")
    def _check(self) -> "ServeConfig":
        if (self.run_dir is None) == (self.export is None):
            raise ValueError("name the model: give run_dir=RUN or export=FOLDER, one of them")
        if self.export is not None and self.step != "last":
            raise ValueError(f"step={self.step} needs run_dir: an export has only one model")
        return self


def read_api_keys(config: ServeConfig) -> tuple[str, ...]:
    """The keys of the environment and the file. Raises UserError for an invalid key, or for no key if host needs one."""
    keys = [(API_KEYS, key.strip()) for key in os.environ.get(API_KEYS, "").split(",") if key.strip()]
    if config.api_keys_file is not None:
        try:
            lines = config.api_keys_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"api_keys_file={config.api_keys_file}: cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UserError(f"api_keys_file={config.api_keys_file}: holds no key")
        keys += [(str(config.api_keys_file), key) for key in found]
    for number, (source, key) in enumerate(keys, 1):
        if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"{source}: key {number}: at least {SHORTEST_KEY} printable ASCII characters are expected")
    if not keys and not is_loopback(config.host):
        raise UserError(
            f"host={config.host} admits other machines: set API keys in {API_KEYS} or api_keys_file, or keep host=127.0.0.1"
        )
    return tuple(key for _, key in keys)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
