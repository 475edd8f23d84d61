"""The serve_model tool: it serves a model with uvicorn until SIGTERM or SIGINT, and then drains."""

import asyncio
import contextlib
import logging
import signal
import socket
import time
from typing import Any

from megagpt.config import Failure, UserError
from megagpt.serve.api import Api
from megagpt.serve.app import make_app, running
from megagpt.serve.config import ServeConfig, read_api_keys
from megagpt.serve.load import load_served

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 5
"""How long uvicorn waits, after draining, for answers that are still being sent."""


def serve(config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT; returns when all requests are answered, or after drain_seconds.

    Raises UserError naming the setting that is wrong, Failure if generation fails.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"serving needs the extra serve ({error.name} is missing): pip install -c constraints.txt '.[serve]'"
        ) from None
    keys = read_api_keys(config)
    listener = listen(config.host, config.port)
    try:
        api = Api(load_served(config), config, keys)
        asyncio.run(_serve(api, listener))
    finally:
        listener.close()
    if api.worker.failure is not None:
        raise Failure(f"generation failed: {api.worker.failure}")


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises UserError if it cannot be bound."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"host={host}: {error.strerror or error}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(f"host={host} port={port}: {error.strerror or error}") from None
    return listener


async def _serve(api: Api, listener: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(
        make_app(api),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=LAST_WORDS_SECONDS,
        server_header=False,
        backlog=2048,
    )
    server = uvicorn.Server(config)
    # uvicorn's own handlers raise the signal again (exit status 143) and close the socket before the last answer.
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    async with running(api, ending.set):
        task = asyncio.create_task(server.serve([listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.02)
        host, port = listener.getsockname()[:2]
        log.info("serving %s on http://%s:%d", api.served.name, f"[{host}]" if ":" in host else host, port)
        waiting = asyncio.create_task(ending.wait())
        await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
        await _drain(api)
        # Remaining jobs get their error before the connections close.
        await asyncio.to_thread(api.worker.end)
        server.should_exit = True
        await task
        waiting.cancel()


async def _drain(api: Api) -> None:
    """Wait until no request is left, for at most drain_seconds; new requests get status 503 meanwhile."""
    api.draining = True
    worker: Any = api.worker
    log.info("draining: %d running, %d waiting", worker.num_running, worker.num_waiting)
    end = time.monotonic() + api.config.drain_seconds
    while worker.failure is None and (worker.num_running or worker.num_waiting) and time.monotonic() < end:
        await asyncio.sleep(0.05)
    left = worker.num_running + worker.num_waiting
    log.info("drained" if not left else f"drain_seconds={api.config.drain_seconds:g} have passed: {left} requests end early")
