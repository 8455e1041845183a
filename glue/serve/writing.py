"""What completions and chats have in common: rows for the engine, whole answers and streams of pieces."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse

from glue.serve.engine import Job
from glue.serve.exchange import Exchange
from glue.serve.problems import Problem
from glue.serve.prompts import Prompt, Prompts
from glue.serve.rows import News, Row
from glue.serve.sampling import Sampling, generator
from glue.serve.schema import ROWS, Writing

Piece = Callable[[News], list[dict[str, Any]]]


def rows_of(body: Writing, read: Sequence[tuple[Prompts, Prompt, str | None]], most: Sequence[int], *,
            top: int | None, judged: bool = False) -> list[Row]:
    """The n rows of each prompt. Raises Problem 400 for too many."""
    n = body.n or 1
    if len(read) * n > ROWS:
        raise Problem(400, f"{len(read)} prompts and n {n} are {len(read) * n} texts; a request may ask for {ROWS}",
                      param="n")
    how = Sampling(1.0 if body.temperature is None else body.temperature, body.top_p or 1.0)
    return [Row(prompts.running, prompt.ids, room, how, generator(body.seed, copy), prompts.known, prompts.ends,
                body.stops, top, judged, route=expert)
            for (prompts, prompt, expert), room in zip(read, most, strict=True) for copy in range(n)]


async def written(exchange: Exchange, rows: Sequence[Row]) -> None:
    """Let rows be written to their ends."""
    job = exchange.put(exchange.served.engine.submit(Job(rows)))
    for _ in rows:
        await exchange.news(job)


async def streamed(exchange: Exchange, rows: Sequence[Row], piece: Piece, first: Sequence[dict[str, Any]],
                   last: Callable[[], Sequence[dict[str, Any]]]) -> Response:
    """An answer in pieces. Errors before the first token have their own status; later ones are a piece.

    first, last  pieces before and after those of the rows
    """
    job = exchange.put(exchange.served.engine.submit(Job(rows, streams=True)))
    event: News = await exchange.news(job)
    exchange.stop_watching()

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal event
        try:
            for each in first:
                yield _sent(each)
            open_rows = len(rows)
            while True:
                for each in piece(event):
                    yield _sent(each)
                open_rows -= bool(event.finish)
                if not open_rows:
                    break
                event = await exchange.news(job)
            for each in last():
                yield _sent(each)
        except Problem as problem:
            yield _sent(problem.body)
        finally:
            exchange.close()
        yield b"data: [DONE]\n\n"

    return StreamingResponse(pieces(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def answer(told: dict[str, Any]) -> Response:
    """A whole answer."""
    return JSONResponse(told)


def _sent(told: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(told, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"
