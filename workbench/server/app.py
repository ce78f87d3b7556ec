"""The routes: models, completions, chat, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from emoe_core.serving_records import Answer
from emoe_core.text_stream import TextStream
from workbench.server.backend import Backend, Exchange
from workbench.server.limits import ApiError, ServerLimits
from workbench.server.protocol import Wanted, understand
from workbench.server.served_model import ServedModel
from workbench.server.stop_strings import StopStrings

# Without a key. Load generators and proxies made for vLLM look for /health.
OPEN_PATHS = ("/healthz", "/health", "/readyz")


class ClientGoneError(Exception):
    """The client closed its connection before the answer was there."""


def make_app(backend: Backend, limits: ServerLimits, api_key: str | None) -> FastAPI:
    """Return the application."""
    served = backend.served

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
    @app.get("/health")
    async def health() -> Response:
        state = await backend.alive()
        return JSONResponse(state, 200 if state["alive"] else 503)

    @app.get("/readyz")
    async def ready() -> Response:
        state = await backend.ready()
        return JSONResponse(state, 200 if state["ready"] else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(await backend.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": served.name, "object": "model", "created": 0, "owned_by": "emoe"}]}

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, chat=False)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, chat=True)

    async def answer(request: Request, chat: bool) -> Response:
        try:
            body = await _body(request, limits)
        except ClientGoneError:
            return Response(status_code=499)
        wanted = understand(body, chat, served, limits)
        exchange = backend.begin(wanted)
        streams = False
        try:
            # The first token decides the status, also of a stream.
            first = await _unless_gone(request, exchange.next())
            if wanted.stream:
                streams = True
                return _Stream(served, wanted, exchange, first)
            return JSONResponse(await _unless_gone(request, _whole(served, wanted, exchange, first)))
        except (ClientGoneError, asyncio.CancelledError):
            # Nobody reads this.
            return Response(status_code=499)
        finally:
            if not streams:
                exchange.close()

    return app


async def _whole(served: ServedModel, wanted: Wanted, exchange: Exchange, event: int | Answer) -> dict[str, Any]:
    *pieces, answer = [part async for part in _parts(served, wanted, exchange, event)]
    assert isinstance(answer, Answer)
    return wanted.whole("".join(str(piece) for piece in pieces), _reason(answer), len(answer.token_ids))


async def _chunks(served: ServedModel, wanted: Wanted, exchange: Exchange, event: int | Answer) -> AsyncIterator[str]:
    try:
        async for part in _parts(served, wanted, exchange, event):
            if isinstance(part, str):
                yield _sse(wanted.piece(part))
                continue
            yield _sse(wanted.piece("", _reason(part)))
            if wanted.include_usage:
                yield _sse(wanted.last(len(part.token_ids)))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        # The status is sent already: the error comes as an event, as OpenAI's clients expect.
        yield _sse(error.body())


async def _parts(
    served: ServedModel, wanted: Wanted, exchange: Exchange, event: int | Answer
) -> AsyncIterator[str | Answer]:
    """Yield the text of an answer as it comes, up to a stop string; at last the answer."""
    stream = TextStream(served.tokenizer, () if wanted.to_limit else served.ends)
    stops = StopStrings(wanted.stop)
    while not isinstance(event, Answer):
        if text := stops.push(stream.push(event)):
            yield text
        event = await exchange.next()
    if text := stops.push(stream.finish()) + stops.finish():
        yield text
    yield event


class _Stream(StreamingResponse):
    """A streamed answer that gives its place back when the client goes, even before the first chunk was asked for."""

    def __init__(self, served: ServedModel, wanted: Wanted, exchange: Exchange, first: int | Answer) -> None:
        super().__init__(_chunks(served, wanted, exchange, first), media_type="text/event-stream")
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.close()


def _reason(answer: Answer) -> str:
    return "stop" if answer.stopped else "length"


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


async def _body(request: Request, limits: ServerLimits) -> bytes:
    limit_bytes, patience_s = limits.max_body_bytes, limits.body_timeout_s
    refusal = ApiError(413, f"the body is larger than {limit_bytes:,} bytes", code="request_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise refusal
    body, parts = bytearray(), aiter(request.stream())
    while len(body) <= limit_bytes:
        try:
            async with asyncio.timeout(patience_s):
                part = await anext(parts, None)
        except TimeoutError:
            raise ApiError(408, f"nothing came for {patience_s:g} seconds: the body is incomplete") from None
        except ClientDisconnect:
            raise ClientGoneError from None
        if part is None:
            return bytes(body)
        body += part
    raise refusal


def _refusal(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    if error.status == 408:
        # The rest of the body may still come, and would be taken for the next request.
        headers = {"connection": "close"}
    return JSONResponse(error.body(), error.status, headers)
