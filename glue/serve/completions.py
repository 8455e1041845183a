"""POST /v1/completions: texts that go on from prompts, or what the member thinks of the prompts themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from glue.serve.answers import Logs, head, route, usage
from glue.serve.docs import ERRORS, STREAM
from glue.serve.exchange import Exchange, kept
from glue.serve.problems import Problem
from glue.serve.prompts import Prompt, Prompts
from glue.serve.rows import News
from glue.serve.schema import Completion
from glue.serve.served import Served
from glue.serve.writing import answer, rows_of, streamed, written


def completions(served: Served) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions", responses={**ERRORS, **STREAM}, response_class=Response)
    async def complete(body: Completion, request: Request) -> Response:
        """Go on from one prompt or several, given as text or as tokens."""
        served.check_name(body.model)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise Problem(400, "best_of other than n is not built", param="best_of")
        async with kept(served, request) as exchange:
            return await _answered(exchange, body)

    return router


async def _answered(exchange: Exchange, body: Completion) -> Response:
    given = body.prompt
    several = isinstance(given, list) and not isinstance(given[0], int)
    texts: Sequence[Any] = given if several else [given]
    read = [await _read(exchange, text) for text in texts]
    most = [prompts.room(prompt, 16 if body.max_tokens is None else body.max_tokens) for prompts, prompt, _ in read]
    echo, n = bool(body.echo), body.n or 1
    rows = rows_of(body, read, most, top=body.logprobs, judged=echo and body.logprobs is not None)
    asked = {id(row): k for k, row in enumerate(rows)}
    logs = [Logs(row, read[k // n][1], echo) for k, row in enumerate(rows)]
    common = head("text_completion", "cmpl", exchange.served.name)

    begun: set[int] = set()

    def choice(news: News) -> dict[str, Any]:
        index = asked[id(news.row)]
        echoed = "" if index in begun else logs[index].begin()
        begun.add(index)
        return {"index": index, "text": echoed + news.text, "logprobs": logs[index].told(news),
                "finish_reason": news.finish or None}

    if not body.stream:
        await written(exchange, rows)
        exchange.close()
        return answer({**common, "choices": [choice(row.whole) for row in rows], "usage": usage(rows, n),
                       **route(rows, n, several)})

    def piece(news: News) -> list[dict[str, Any]]:
        if not (news.text or news.pieces or news.finish) and asked[id(news.row)] in begun:
            return []
        return [{**common, "choices": [choice(news)], **route([news.row], 1, False)}]

    def counted() -> list[dict[str, Any]]:
        return [{**common, "choices": [], "usage": usage(rows, n)}] if body.usage_at_end else []

    return await streamed(exchange, rows, piece, [], counted)


async def _read(exchange: Exchange, text: str | list[int]) -> tuple[Prompts, Prompt, str | None]:
    running, expert = await exchange.reader(text if isinstance(text, str) else None)
    prompts = exchange.served.prompts(running)
    return prompts, await exchange.served.reading(lambda: prompts.read(text)), expert
