"""POST /v1/score: the probabilities of next tokens at given places of a text, for whoever mixes them with others."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse

from glue.kinds.wire import BINARY, HELD, SESSION, as_json, encode
from glue.serve.docs import BYTES, ERRORS
from glue.serve.exchange import Exchange
from glue.serve.problems import Problem
from glue.serve.schema import ScoreRequest
from glue.serve.served import Served
from glue.serve.sessions import Sessions

ROWS = 4096  # places that one request may ask about: each may tell a whole vocabulary
NUMBERS = 2 ** 26  # log-probabilities in one answer


def scores(served: Served) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.post("/v1/score", responses={**ERRORS, **BYTES}, response_class=Response)
    async def score(body: ScoreRequest, request: Request) -> Response:
        """What follows at each place of a text, from `from_pos` on; as bytes when the client accepts them."""
        sessions = _sessions(served)
        places = body.keep + len(body.ids) - body.from_pos + 1
        top_k = _checked(served, body, places)
        size = sessions.source.vocabulary.size
        binary = BINARY in request.headers.get("accept", "")

        def told() -> tuple[Any, str, int]:
            name, held, scored = sessions.score(body.session, body.keep, body.ids, body.from_pos, top_k,
                                                body.extra_ids)
            return encode(scored, size, body.bits) if binary else as_json(scored, body.from_pos), name, held

        async with Exchange(served, request) as exchange:
            content, name, held = await exchange.asked(told)
        served.metrics.tokens(len(body.ids), 0)
        if binary:
            return Response(content, media_type=BINARY, headers={SESSION: name, HELD: str(held)})
        return JSONResponse({**content, "session": name, "held": held})

    @router.delete("/v1/score/{session}", responses=ERRORS)
    async def give_back(request: Request, session: str = Path(max_length=100)) -> dict[str, Any]:
        """Let the server forget a text."""
        sessions = _sessions(served)
        async with Exchange(served, request) as exchange:
            if not await exchange.asked(lambda: sessions.drop(session)):
                raise Problem(404, f"session '{session}' is not held", param="session")
        return {"session": session, "deleted": True}

    return router


def _sessions(served: Served) -> Sessions:
    if served.sessions is None:
        raise Problem(400, f"the experts of '{served.name}' have tokenizers of their own, so that there is no one "
                           "vocabulary to tell probabilities of; serve one of its experts")
    return served.sessions


def _checked(served: Served, body: ScoreRequest, places: int) -> int | None:
    """What is told of each place: None for all. Raises Problem 400 for what cannot be asked."""
    assert served.sessions is not None
    source = served.sessions.source
    size, known = source.vocabulary.size, served.prompts(served.running).known
    if known < size:
        raise Problem(400, f"'{served.name}' has logits for {known} tokens, and its tokenizer knows {size}; resize its "
                           "head to its tokenizer first")
    if places < 1:
        raise Problem(400, f"from_pos is {body.from_pos}, and the text has {body.keep + len(body.ids)} tokens",
                      param="from_pos")
    if body.keep + len(body.ids) > source.longest:
        raise Problem(400, f"'{served.name}' sees {source.longest} tokens; {body.keep + len(body.ids)} are given",
                      param="ids", code="context_length_exceeded")
    if body.keep and body.session is None:
        raise Problem(400, "keep is of a session; name it, or send the whole text with keep 0", param="session")
    for name, tokens in (("ids", body.ids), *(("extra_ids", some) for some in body.extra_ids)):
        if tokens and max(tokens) >= size:
            raise Problem(400, f"token {max(tokens)} is none: '{served.name}' knows those from 0 to {size - 1}",
                          param=name)
    if body.extra_ids and len(body.extra_ids) != places:
        raise Problem(400, f"extra_ids has {len(body.extra_ids)} lists, and {places} places are asked for; give one "
                           "for each, or none", param="extra_ids")
    if body.top_k == 0 and not any(body.extra_ids):
        raise Problem(400, "with top_k 0 and no extra_ids nothing is asked for", param="top_k")
    most = served.most_told
    if most < size and (body.top_k is None or body.top_k > most):
        raise Problem(400, f"'{served.name}' tells the {most} likeliest tokens of a place at most", param="top_k")
    if max(map(len, body.extra_ids), default=0) > max(most, 1):
        raise Problem(400, f"extra_ids asks for more than {most} tokens of a place", param="extra_ids")
    top_k = None if body.top_k is None or body.top_k >= size else body.top_k
    width = size if top_k is None else top_k + max(map(len, body.extra_ids), default=0)
    if places > ROWS or places * width > NUMBERS:
        raise Problem(400, f"{places} places of {width} tokens are too much for one answer; ask in pieces, or "
                           "for a smaller top_k", param="from_pos")
    return top_k
