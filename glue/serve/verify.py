"""POST /v1/verify: whether a member takes what a device has drafted; no log-probability is told.

What is in a proposal and in a verdict is not known here: whoever starts the server says how one is judged.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Path, Query, Request, Response

from glue.kinds.wire import BINARY, SESSION
from glue.serve.docs import BYTES, ERRORS
from glue.serve.exchange import Exchange
from glue.serve.problems import Problem
from glue.serve.served import Served
from glue.serve.sessions import NAME

BODY = {"requestBody": {"required": True, "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}}}}


def verdicts(served: Served) -> APIRouter:
    """The routes, where the server can judge."""
    router = APIRouter()
    sessions, judging = served.verifying, served.judging
    if sessions is None or judging is None:
        return router

    @router.post("/v1/verify", responses={**ERRORS, **BYTES}, response_class=Response, openapi_extra=BODY)
    async def verify(request: Request,
                     session: str | None = Query(None, min_length=1, max_length=100, pattern=NAME),
                     seed: int | None = Query(None, ge=0, lt=2 ** 64)) -> Response:
        """Judge a draft that goes on from the text of a session.

        session  without a name it is given one; seed is of the draws of a session that begins
        """
        if request.headers.get("content-type", "").partition(";")[0].strip() != BINARY:
            raise Problem(400, f"a proposal comes as {BINARY}", param="content-type")
        body = await request.body()
        async with Exchange(served, request) as exchange:
            name, told = await exchange.asked(lambda: sessions.judged(
                session, body, lambda held, size: judging(held, size, seed)))
        return Response(told, media_type=BINARY, headers={SESSION: name})

    @router.delete("/v1/verify/{session}", responses=ERRORS)
    async def give_back(request: Request, session: str = Path(max_length=100)) -> dict[str, Any]:
        """Let the server forget a text."""
        async with Exchange(served, request) as exchange:
            if not await exchange.asked(lambda: sessions.drop(session)):
                raise Problem(404, f"session '{session}' is not held", param="session")
        return {"session": session, "deleted": True}

    return router
