"""The HTTP interface: /v1/completions, /v1/chat/completions, /v1/models, health, metrics, and a page to try the model."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from megagpt.serve.answers import DONE, Shape, event, new_id, usage_of
from megagpt.serve.api import Api
from megagpt.serve.protocol import ApiError, ChatRequest, CompletionRequest, GenerationRequest, parse_request
from megagpt.serve.worker import Job, Piece

DISCONNECT_CHECK_SECONDS = 0.2
MAX_BODY_SECONDS = 30.0


def make_app(api: Api) -> Any:
    """The FastAPI application. Start the worker (`running`) before the first request."""
    from fastapi import FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException

    # FastAPI's own documentation pages load scripts from another host.
    app = FastAPI(title="MegaGPT", docs_url=None, redoc_url=None)
    page = (files("megagpt.serve") / "page.html").read_text(encoding="utf-8")

    def answer_error(error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return answer_error(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        return answer_error(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> Response:  # its traceback is logged
        return answer_error(ApiError(500, "the server failed; its log says why", code="internal_error"))

    app.add_middleware(Admission, api=api)

    async def generate(request: Request, kind: type[CompletionRequest] | type[ChatRequest]) -> Response:
        if api.draining:
            raise ApiError(503, "the server is ending", code="shutting_down", headers={"Retry-After": "5"})
        parsed = parse_request(kind, await read_body(request, api.config.max_body_bytes))
        api.check_model(parsed)
        # In a thread: other streams should not wait while a long prompt is tokenized.
        ids = await asyncio.to_thread(api.ids_of, parsed)
        job = api.new_job(parsed, ids)
        request.scope[JOBS].append(job)
        api.worker.submit(job)
        chat = isinstance(parsed, ChatRequest)
        shape = Shape(chat, api.served.name, api.pieces, job.num_logprobs is not None, new_id(chat=chat))
        if not parsed.stream:
            pieces = await collect(request, job)
            return JSONResponse(shape.whole(pieces, usage_of(len(ids), job.num_generated)))
        usage = parsed.stream_options is not None and parsed.stream_options.include_usage
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        stream = stream_events(job, shape, with_usage=usage)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @app.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await generate(request, CompletionRequest)

    @app.post("/v1/chat/completions", openapi_extra=body_schema(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await generate(request, ChatRequest)

    def model() -> dict[str, Any]:
        return {
            "id": api.served.name,
            "object": "model",
            "created": api.served.created,
            "owned_by": "megagpt",
            "max_model_len": api.served.max_context,
        }

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != api.served.name:
            raise ApiError(404, f"there is no model {name[:200]!r} here", param="model", code="model_not_found")
        return JSONResponse(model())

    @app.get("/health")
    async def health() -> Response:
        failed = api.worker.failure is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/ready")
    async def ready() -> Response:
        busy = api.draining or api.worker.failure is not None
        return JSONResponse({"status": "draining" if busy else "ready"}, 503 if busy else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        body, content_type = api.metrics.text()
        return Response(body, headers={"Content-Type": content_type})

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"})

    return app


class Admission:
    """Admits requests by key and rate, counts answers, and cancels the jobs of an answer that has ended, complete or not.

    It is plain ASGI: streams pass through unchanged, and every answer ends here, however it ends.
    """

    def __init__(self, app: Any, api: Api) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI interface."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, path = time.monotonic(), scope["path"]

        async def counted_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                known = path if path in PATHS else "other"
                self._api.metrics.count(known, message["status"], time.monotonic() - began)
            await send(message)

        try:
            if path not in OPEN_PATHS:
                headers = dict(scope["headers"])
                key = headers.get(b"authorization", b"").decode("latin-1")
                client = scope["client"][0] if scope.get("client") else ""
                self._api.clients.admit(key, client, counted=scope["method"] == "POST")
        except ApiError as error:
            from fastapi.responses import JSONResponse

            await JSONResponse(error.body(), error.status, headers=error.headers)(scope, receive, counted_send)
            return
        jobs: list[Job] = []
        scope[JOBS] = jobs
        try:
            await self._app(scope, receive, counted_send)
        finally:
            for job in jobs:
                self._api.worker.cancel(job)


JOBS = "megagpt.jobs"
"""Key of a request's jobs in its ASGI scope."""
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics", "/")
OPEN_PATHS = ("/health", "/ready", "/")
"""Paths without an API key: those that a load balancer checks, and the page, which holds no secrets."""
PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


def body_schema(kind: type[GenerationRequest]) -> dict[str, Any]:
    """The schema of a request's body for /openapi.json. The routes parse bodies themselves, for errors in OpenAI's format."""
    schema = {"application/json": {"schema": inlined(kind.model_json_schema())}}
    return {"requestBody": {"required": True, "content": schema}}


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema with its references resolved: OpenAPI would look for them in another place."""
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rpartition("/")[2]])
            return {key: resolve(item) for key, item in value.items()}
        return [resolve(item) for item in value] if isinstance(value, list) else value

    return resolve(schema)


async def read_body(request: Any, max_bytes: int) -> bytes:
    """The body of a request. Raises ApiError if it is not JSON (415), too large (413) or too slow (408)."""
    # A web page can send other content types to this machine's address without the browser asking first; not JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Content-Type: application/json is expected", code="invalid_content_type")
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {MAX_BODY_SECONDS:.0f} s", code="timeout") from None
    return bytes(body)


async def collect(request: Any, job: Job) -> list[Piece]:
    """All pieces of a job. Raises ApiError if the job fails or the client has disconnected."""
    pieces: list[Piece] = []
    while not pieces or pieces[-1].finish_reason is None:
        try:
            piece = await asyncio.wait_for(job.events.get(), DISCONNECT_CHECK_SECONDS)
        except TimeoutError:
            if await request.is_disconnected():
                raise ApiError(499, "the client has disconnected") from None
            continue
        if isinstance(piece, ApiError):
            raise piece
        pieces.append(piece)
    return pieces


async def stream_events(job: Job, shape: Shape, *, with_usage: bool) -> AsyncIterator[bytes]:
    """A job as server-sent events; Starlette stops the iteration when the client disconnects."""
    first = shape.first_chunk()
    if first is not None:
        yield event(first)
    reason = None
    while reason is None:
        piece = await job.events.get()
        if isinstance(piece, ApiError):
            yield event(piece.body())
            return
        reason = piece.finish_reason
        yield event(shape.chunk(piece))
    if with_usage:
        yield event(shape.usage_chunk(usage_of(len(job.ids), job.num_generated)))
    yield DONE


@contextlib.asynccontextmanager
async def running(api: Api, on_failure: Any) -> AsyncIterator[None]:
    """Run the worker inside the `async with`; `on_failure` is called if generation fails."""
    api.worker.start(on_failure)
    try:
        yield
    finally:
        await asyncio.to_thread(api.worker.end)
