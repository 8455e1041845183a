"""The HTTP application: routes, and every error in OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from glue.errors import did_you_mean
from glue.serve.chat import chats
from glue.serve.completions import completions
from glue.serve.docs import ERRORS
from glue.serve.guard import Guard, error
from glue.serve.problems import Problem
from glue.serve.schema import Chat, Completion, ScoreRequest
from glue.serve.score import scores
from glue.serve.served import Served
from glue.serve.verify import verdicts

FIELDS = {*Completion.model_fields, *Chat.model_fields, *ScoreRequest.model_fields}


def application(served: Served, key: str | None = None) -> FastAPI:
    """What answers for a member. It runs from the application's start to its end.

    key  that requests must show; None: everyone may ask
    """
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.start()
        try:
            yield
        finally:
            served.stop()

    app = FastAPI(title="glue serve", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    for router in (completions(served), chats(served), scores(served), verdicts(served), _plain(served)):
        app.include_router(router)
    app.add_middleware(Guard, limits=served.limits, metrics=served.metrics, key=key)
    made = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI's, without the 422 that it would answer: here that is a 400. It says who can be asked, too."""
        told = made()
        for body in (Completion, Chat):
            told["components"]["schemas"][body.__name__]["properties"]["model"]["enum"] = [served.name]
        for methods in told["paths"].values():
            for method in methods.values():
                method["responses"].pop("422", None)
        return told

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _plain(served: Served) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        """Who is served, and what it can tell."""
        return {"object": "list", "data": [served.about()]}

    @router.get("/health", responses={503: ERRORS[503]})
    async def health() -> Response:
        """Whether requests are answered."""
        if not served.engine.alive:
            raise Problem(503, "the server stops")
        return JSONResponse({"status": "ok", "model": served.name})

    @router.get("/metrics", response_class=PlainTextResponse, responses={401: ERRORS[401]})
    async def metrics() -> Response:
        """What was counted, for Prometheus."""
        return PlainTextResponse(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _problem(_: Request, problem: Any) -> Response:
    return error(problem)


async def _invalid(_: Request, wrong: Any) -> Response:
    """What is wrong with a body, told by its field; never the value, which may be anything."""
    wrongs = [each for each in wrong.errors() if each["loc"][:2] == wrong.errors()[0]["loc"][:2]]
    # of the branches of a union that was meant of which the type is right, or as far down as possible
    first = max(wrongs, key=lambda each: (not each["type"].endswith("_type"), len(each["loc"])))
    if first["type"] == "json_invalid":
        return error(Problem(400, f"the body is not JSON: {first.get('ctx', {}).get('error', '')}", code="not_json"))
    field = next((str(part) for part in first["loc"] if part != "body"), None)
    fix = did_you_mean(field, FIELDS) if first["type"] == "extra_forbidden" else ""
    return error(Problem(400, f"{field or 'the body'}: {first['msg']}{fix}", param=field))


async def _http(_: Request, wrong: Any) -> Response:
    told = {400: "the body is not JSON", 404: "there is nothing at this address",
            405: "this address takes another method"}.get(wrong.status_code, str(wrong.detail))
    return error(getattr(wrong, "problem", None) or Problem(wrong.status_code, told))


async def _unexpected(_: Request, wrong: Any) -> Response:
    return error(Problem(500, f"{type(wrong).__name__}: {wrong}"))
