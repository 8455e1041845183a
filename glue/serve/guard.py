"""What stands before every request: who may ask, how much may be sent, how far away the server seems, the counting."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from glue.serve.metrics import Metrics
from glue.serve.problems import Problem
from glue.serve.served import Limits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
FREE = frozenset({"/health"})


class Guard:
    """Lets through to an ASGI application what may pass.

    key  that requests must show as a bearer token; None: everyone may ask
    """

    def __init__(self, app: Any, limits: Limits, metrics: Metrics, key: str | None):
        self._app, self._limits, self._metrics = app, limits, metrics
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, stalled = time.monotonic(), 499, False

        async def counted(message: Message) -> None:
            nonlocal status, stalled
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                async with asyncio.timeout(self._limits.seconds):
                    await send(message)
            except TimeoutError:  # a client that is there and does not read; what it asked for ends here
                stalled = True
                raise

        try:
            self._check(scope)
            if self._limits.delay and scope["path"] not in FREE:
                await asyncio.sleep(self._limits.delay)
            await self._app(scope, self._limited(receive), counted)
        except Problem as problem:
            await error(problem)(scope, receive, counted)
        except Exception:
            if not stalled:
                status = 500
                raise
        finally:
            route = getattr(scope.get("route"), "path", "other")  # not the path: anyone could make up a million
            self._metrics.request(route, status, time.monotonic() - began)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        headers = dict(scope["headers"])
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        if self._key is not None and scope["path"] not in FREE and not (
                hmac.compare_digest(shown.strip(), self._key) and scheme.lower() == b"bearer"):
            raise Problem(401, "this server wants its API key as a bearer token", code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._limits.body:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        """The body as it comes, but no more than may come, and not forever."""
        got, end = 0, False
        until = time.monotonic() + self._limits.seconds

        async def limited() -> Message:
            nonlocal got, end
            if end:
                return await receive()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise refused(Problem(408, "the body did not come in time")) from None
            got += len(message.get("body", b""))
            if got > self._limits.body:
                raise refused(self._too_large())
            end = not message.get("more_body", False)
            return message

        return limited

    def _too_large(self) -> Problem:
        return Problem(413, f"the body is larger than {self._limits.body} bytes; ask for less at once, or let the "
                            "server take more with --max-body", code="body_too_large")


def refused(problem: Problem) -> HTTPException:
    """A problem for where a body is read: of all exceptions FastAPI lets only its own through from there."""
    wrong = HTTPException(problem.status, str(problem))
    wrong.problem = problem  # type: ignore[attr-defined]
    return wrong


def error(problem: Problem) -> JSONResponse:
    """The answer to a request that something is wrong with."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 413: {"Connection": "close"}}
    return JSONResponse(problem.body, problem.status, headers.get(problem.status))
