"""The routes: models, completions, chat, health, readiness, metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from emoe_core.serving.records import Answer
from emoe_core.serving.text_stream import TextStream
from workbench.serving.server.backend import Backend, Exchange
from workbench.serving.server.fields import UNUSED_HEADER
from workbench.serving.server.limits import ApiError, ServerLimits
from workbench.serving.server.protocol import Wanted, understand
from workbench.serving.server.replies import Choice, Reply
from workbench.serving.server.served_model import ServedModel
from workbench.serving.server.stop_strings import StopStrings

# Without a key. Load generators and proxies made for vLLM look for /health.
OPEN_PATHS = ("/healthz", "/health", "/readyz")

# The text of one answer as it comes, and at last the answer.
Parts = AsyncIterator[str | Answer]


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
        asked = understand(body, chat, served, limits)
        headers = {UNUSED_HEADER: ", ".join(asked.unused)} if asked.unused else None
        exchanges: list[Exchange] = []
        streams = False
        try:
            for wanted in asked.wanted:
                exchanges.append(backend.begin(wanted))
            # The first token decides the status, also of a stream.
            first = await _unless_gone(request, exchanges[0].next())
            answers = [
                _parts(served, wanted, exchange, None if place else first)
                for place, (wanted, exchange) in enumerate(zip(asked.wanted, exchanges, strict=True))
            ]
            if asked.stream:
                streams = True
                return _Stream(_chunks(asked.reply, answers), exchanges, headers)
            choices = await _unless_gone(request, _choices(answers))
            return JSONResponse(asked.reply.whole(choices), headers=headers)
        except (ClientGoneError, asyncio.CancelledError):
            # Nobody reads this.
            return Response(status_code=499)
        finally:
            if not streams:
                for exchange in exchanges:
                    exchange.close()

    return app


async def _choices(answers: Sequence[Parts]) -> list[Choice]:
    """Await all, or end with the first that fails, leaving none behind."""
    tasks = [asyncio.ensure_future(_choice(parts)) for parts in answers]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _choice(parts: Parts) -> Choice:
    *pieces, answer = [part async for part in parts]
    assert isinstance(answer, Answer)
    return Choice("".join(str(piece) for piece in pieces), _reason(answer), len(answer.token_ids))


async def _chunks(reply: Reply, answers: Sequence[Parts]) -> AsyncIterator[str]:
    output_tokens = 0
    try:
        if reply.chat:
            yield _sse(reply.first())
        async for index, part in _interleaved(answers):
            if isinstance(part, str):
                yield _sse(reply.piece(index, part))
                continue
            output_tokens += len(part.token_ids)
            yield _sse(reply.end(index, _reason(part)))
        if reply.include_usage:
            yield _sse(reply.usage(output_tokens))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        # The status is sent already: the error comes as an event, as OpenAI's clients expect.
        yield _sse(error.body())


async def _parts(served: ServedModel, wanted: Wanted, exchange: Exchange, event: int | Answer | None) -> Parts:
    """Yield the text of an answer as it comes, up to a stop string; at last the answer. ``event`` came already."""
    stream = TextStream(served.tokenizer, () if wanted.to_limit else served.ends, wanted.skip_special_tokens)
    stops = StopStrings(wanted.stop)
    event = await exchange.next() if event is None else event
    while not isinstance(event, Answer):
        if text := stops.push(stream.push(event)):
            yield text
        event = await exchange.next()
    if text := stops.push(stream.finish()) + stops.finish():
        yield text
    yield event


async def _interleaved(answers: Sequence[Parts]) -> AsyncIterator[tuple[int, str | Answer]]:
    """Yield (index, part) of several answers, each part as it comes."""
    waiting = {asyncio.ensure_future(anext(parts, None)): index for index, parts in enumerate(answers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, part = waiting.pop(task), task.result()
                if part is not None:
                    waiting[asyncio.ensure_future(anext(answers[index], None))] = index
                    yield index, part
    finally:
        for task in waiting:
            task.cancel()


class _Stream(StreamingResponse):
    """A streamed answer that gives its places back when the client goes, even before the first chunk was asked for."""

    def __init__(
        self, chunks: AsyncIterator[str], exchanges: Sequence[Exchange], headers: Mapping[str, str] | None
    ) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._exchanges = exchanges

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for exchange in self._exchanges:
                exchange.close()


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
