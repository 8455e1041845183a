"""POST /v1/chat/completions: the next turn of a chat."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from glue.serve.answers import chat_logs, head, route, usage
from glue.serve.docs import ERRORS, STREAM
from glue.serve.exchange import Exchange, kept
from glue.serve.problems import Problem
from glue.serve.rows import News
from glue.serve.schema import Chat
from glue.serve.served import Served
from glue.serve.writing import answer, rows_of, streamed, written


def chats(served: Served) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions", responses={**ERRORS, **STREAM}, response_class=Response)
    async def chat(body: Chat, request: Request) -> Response:
        """Say what comes next in a chat."""
        served.check_name(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise Problem(400, "top_logprobs needs logprobs true", param="top_logprobs")
        async with kept(served, request) as exchange:
            return await _answered(exchange, body)

    return router


async def _answered(exchange: Exchange, body: Chat) -> Response:
    # of a mixture by text all that is said chooses, since templates are the experts' own
    running, expert = await exchange.reader("\n".join(message.text for message in body.messages))
    prompts = exchange.served.prompts(running)
    prompt = await exchange.served.reading(lambda: prompts.chat(body.messages))
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    top, n = body.top_logprobs or 0, body.n or 1
    rows = rows_of(body, [(prompts, prompt, expert)], [prompts.room(prompt, wanted)],
                   top=top if body.logprobs else None)
    asked = {id(row): k for k, row in enumerate(rows)}

    if not body.stream:
        await written(exchange, rows)
        exchange.close()
        choices = [{"index": k, "message": {"role": "assistant", "content": row.text, "refusal": None},
                    "logprobs": chat_logs(row.whole, top), "finish_reason": row.finish}
                   for k, row in enumerate(rows)]
        return answer({**head("chat.completion", "chatcmpl", exchange.served.name), "choices": choices,
                       "usage": usage(rows, n), **route(rows, n, False)})

    common = head("chat.completion.chunk", "chatcmpl", exchange.served.name)

    def piece(news: News) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        if news.text or news.pieces:
            told.append({"delta": {"content": news.text}, "logprobs": chat_logs(news, top), "finish_reason": None})
        if news.finish:
            told.append({"delta": {}, "logprobs": None, "finish_reason": news.finish})
        return [{**common, "choices": [{"index": asked[id(news.row)], **one}], **route([news.row], 1, False)}
                for one in told]

    first = [{**common, "choices": [{"index": k, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                                     "finish_reason": None}]} for k in range(n)]

    def counted() -> list[dict[str, Any]]:
        return [{**common, "choices": [], "usage": usage(rows, n)}] if body.usage_at_end else []

    return await streamed(exchange, rows, piece, first, counted)
