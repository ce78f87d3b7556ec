"""The routes: models, completions, chat, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from emoe_core.engine import Engine
from emoe_core.serving_loop import Answer
from emoe_core.text_stream import TextStream
from workbench.server.limits import ApiError, ServerLimits
from workbench.server.metrics import ServerMetrics
from workbench.server.protocol import Wanted, understand
from workbench.server.worker import Event, Job, Worker

OPEN_PATHS = ("/healthz", "/readyz")


class ClientGoneError(Exception):
    """The client closed its connection before the answer was there."""


def make_app(
    engine: Engine, worker: Worker, metrics: ServerMetrics, limits: ServerLimits, model: str, api_key: str | None
) -> FastAPI:
    """Return the application; ``model`` is the name that clients ask for."""

    async def check_key(request: Request) -> None:
        if api_key is not None and request.url.path not in OPEN_PATHS:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    app = FastAPI(title="eMoE", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(check_key)])

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> Response:
        return _refusal(error)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        return _refusal(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.get("/healthz")
    async def health() -> Response:
        return JSONResponse({"alive": worker.alive}, 200 if worker.alive else 503)

    @app.get("/readyz")
    async def ready() -> Response:
        return JSONResponse({"ready": worker.ready}, 200 if worker.ready else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "emoe"}]}

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, chat=True)

    async def answer(request: Request, chat: bool) -> Response:
        wanted = understand(await _body(request, limits.max_body_bytes), chat, engine, model, limits)
        exchange = Exchange(worker, wanted)
        try:
            # The first token decides the status, also of a stream.
            first = await _unless_gone(request, exchange.next())
            if wanted.stream:
                return _Stream(engine, exchange, first)
            return JSONResponse(await _unless_gone(request, _whole(engine, exchange, first)))
        except (ClientGoneError, asyncio.CancelledError):
            exchange.close()
            # Nobody reads this.
            return Response(status_code=499)

    return app


class Exchange:
    """One request between the event loop and the worker's thread; made on the event loop."""

    def __init__(self, worker: Worker, wanted: Wanted) -> None:
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def deliver(event: Event) -> None:
            # After the event loop nobody is there to hear it.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.wanted = wanted
        self.ends = worker.ends
        self._worker = worker
        self._job = Job(
            wanted.prompt_ids, wanted.task, wanted.max_new_tokens, wanted.objective, wanted.tolerance, deliver
        )
        worker.submit(self._job)

    async def next(self) -> int | Answer:
        """Return the next token, at last the answer; raises what the request failed of."""
        event = await self._events.get()
        if isinstance(event, ApiError):
            raise event
        return event

    def close(self) -> None:
        """Give the place back."""
        self._worker.cancel(self._job)


async def _whole(engine: Engine, exchange: Exchange, event: int | Answer) -> dict[str, Any]:
    assert engine.tokenizer is not None
    stream, text = TextStream(engine.tokenizer, exchange.ends), ""
    while not isinstance(event, Answer):
        text += stream.push(event)
        event = await exchange.next()
    return exchange.wanted.whole(text + stream.finish(), _reason(event, exchange), len(event.token_ids))


async def _chunks(engine: Engine, exchange: Exchange, event: int | Answer) -> AsyncIterator[str]:
    assert engine.tokenizer is not None
    stream, wanted = TextStream(engine.tokenizer, exchange.ends), exchange.wanted
    try:
        while not isinstance(event, Answer):
            if text := stream.push(event):
                yield _sse(wanted.piece(text))
            event = await exchange.next()
        if text := stream.finish():
            yield _sse(wanted.piece(text))
        yield _sse(wanted.piece("", _reason(event, exchange)))
        if wanted.include_usage:
            yield _sse(wanted.last(len(event.token_ids)))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        # The status is sent already: the error comes as an event, as OpenAI's clients expect.
        yield _sse(error.body())


class _Stream(StreamingResponse):
    """A streamed answer that gives its place back when the client goes, even before the first chunk was asked for."""

    def __init__(self, engine: Engine, exchange: Exchange, first: int | Answer) -> None:
        super().__init__(_chunks(engine, exchange, first), media_type="text/event-stream")
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


def _reason(answer: Answer, exchange: Exchange) -> str:
    return "stop" if answer.token_ids[-1] in exchange.ends else "length"


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _unless_gone(request: Request, work: Any) -> Any:
    """Await something, or raise `ClientGoneError` as soon as the client closes its connection."""
    task = asyncio.ensure_future(work)
    # The body was read: what comes next is the end of the connection.
    gone = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _body(request: Request, limit_bytes: int) -> bytes:
    refusal = ApiError(413, f"the body is larger than {limit_bytes:,} bytes", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise refusal
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit_bytes:
            raise refusal
    return bytes(body)


def _refusal(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse(error.body(), error.status, headers)
