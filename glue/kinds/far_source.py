"""Sources that are asked over HTTP: glue's own /v1/score, and what other servers tell of a prompt's tokens.

Only numbers of tokens, and how much to tell of them, are ever sent. Bytes go through a link, which counts them.

Letters: p places, k tokens told of a place, v vocabulary.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from glue.errors import GlueError, RunError, one_line
from glue.kinds import wire
from glue.kinds.local_source import check, common
from glue.kinds.source import Scored, Session, Tells, Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = 1 << 16   # bytes of an answer that tells of no tokens
A_TOKEN = 200     # bytes of JSON in which a server may tell of one token
NUMBERS = 1 << 22  # log-probabilities that are asked for at once; of a long text more are asked for in several calls
SUMMED = 2.0 ** -20  # what rounding may have added to told probabilities: the rest must not seem less than it is
Words = Literal["prompt_logprobs", "echo"]  # how a server is asked for the log-probabilities of a prompt's tokens
T = TypeVar("T")


class SessionLost(RunError):
    """The server no longer holds what was read of a text."""


class Answer(NamedTuple):
    """What came back. `binary` where it is no JSON."""

    body: bytes
    binary: bool

    @property
    def json(self) -> dict[str, Any]:
        """The body as a mapping. Raises RunError for anything else."""
        try:
            told = json.loads(self.body)
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise RunError(f"the server answered no JSON mapping: {one_line(self.body[:80].decode(errors='replace'))}",
                           fix="see that the URL is that of the API, without a path below /v1")
        return told


class Link(Protocol):
    """What carries requests to one server and brings back its answers."""

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, accept: str = "application/json",
            limit: int = PLAIN) -> Answer:
        """Raises RunError for whatever is no answer, or one of more than `limit` bytes; SessionLost for a 409."""
        ...


@dataclass(eq=False)
class ScoreHTTP:
    """A member that glue serves somewhere.

    most  tokens that it tells of a place, where it does not tell all
    bits  of each log-probability on its way; 16 and 8 round, see glue/kinds/wire.py
    """

    link: Link
    vocabulary: Vocabulary
    longest: int
    tells: Tells = "full"
    most: int = 0
    bits: wire.Bits = 32

    def open(self) -> AbstractContextManager[Session]:
        """A text to ask about. When it is left, the server is told to forget it; else it forgets by itself in time."""
        return _Scored(self)


class _Scored:
    """One text at a glue server: what the server has read is not sent again."""

    def __init__(self, source: ScoreHTTP):
        self._source = source
        self.name, self.begun = secrets.token_urlsafe(9), False
        self._held: list[int] = []

    def __enter__(self) -> _Scored:
        return self

    def __exit__(self, *_: object) -> None:
        if self.begun:
            with suppress(GlueError):
                self._source.link.ask("DELETE", f"/v1/score/{self.name}")

    def score(self, ids: Sequence[int], start: int, *, top_k: int | None = None,
              extra: Sequence[Sequence[int]] = ()) -> Scored:
        """What follows after ids[:start], ..., ids; see Session. Raises RunError."""
        ids, source = list(ids), self._source
        v, all_of_them = source.vocabulary.size, source.tells == "full"
        check(ids, start, v, source.longest, top_k, extra)
        if not all_of_them:
            top_k = source.most if top_k is None else min(top_k, source.most)
        elif top_k is not None and top_k >= v:
            top_k = None
        told, n = [], max(1, NUMBERS // (v if top_k is None else top_k + 1))
        for first in range(start, len(ids) + 1, n):
            last = min(first + n - 1, len(ids))
            asked = ids[:last], first, top_k, extra[first - start:last - start + 1]
            try:
                told.append(self._asked(common(self._held, ids[:last]), *asked))
            except SessionLost:
                told.append(self._asked(0, *asked))
        return told[0] if len(told) == 1 else joined(told)

    def _asked(self, known: int, ids: list[int], start: int, top_k: int | None,
               extra: Sequence[Sequence[int]]) -> Scored:
        source, p, v = self._source, len(ids) - start + 1, self._source.vocabulary.size
        body: dict[str, Any] = {"ids": ids[known:], "from_pos": start, "session": self.name}
        said: dict[str, tuple[Any, Any]] = {  # what the server takes for granted is not said
            "top_k": (top_k, None), "extra_ids": ([list(some) for some in extra if any(extra)], []), "keep": (known, 0),
            "bits": (source.bits, 32)}
        body |= {key: value for key, (value, granted) in said.items() if value != granted}
        k = 0 if top_k is None else min(v, top_k + max((len(some) for some in extra), default=0))
        self._held, self.begun = [], True  # unless an answer says otherwise
        answer = source.link.ask("POST", "/v1/score", body, accept=wire.BINARY,
                                 limit=PLAIN + 8 * wire.size(p, k, v, 32))
        scored = wire.decode(answer.body, places=p, v=v) if answer.binary else \
            wire.from_json(answer.json, places=p, v=v)
        self._held = ids
        return scored


def joined(several: Sequence[Scored]) -> Scored:
    """What was told of some places and then of some more, as one."""
    width = max(scored.logs.shape[1] for scored in several)

    def wide(rows: torch.Tensor, nothing: float) -> torch.Tensor:
        return torch.nn.functional.pad(rows, (0, width - rows.shape[1]), value=nothing)

    logs = torch.cat([wide(scored.logs, -torch.inf) for scored in several])
    tokens = [wide(scored.tokens, -1) for scored in several if scored.tokens is not None]
    return Scored(logs, torch.cat(tokens) if tokens else None, torch.cat([scored.tail for scored in several]),
                  torch.cat([scored.floor for scored in several]))


@dataclass(eq=False)
class Completions:
    """A model behind /v1/completions that tells log-probabilities of a prompt's tokens: the likeliest, and its own.

    model  as the server calls it
    words  prompt_logprobs: vLLM's way, in numbers of tokens. echo: OpenAI's, in texts of tokens. Of texts that several
           tokens have it cannot be told which is meant; they count as not told, and the floor as they would have raised
    most   tokens that it tells of a place
    The server reads the whole text each time, and whether it keeps any of it is its own affair.
    """

    link: Link
    model: str
    vocabulary: Vocabulary
    longest: int
    most: int
    words: Words
    tokenizer: PreTrainedTokenizerBase
    tells: Tells = "given"

    def open(self) -> AbstractContextManager[Session]:
        """A text to ask about."""
        return nullcontext(self)

    def score(self, ids: Sequence[int], start: int, *, top_k: int | None = None,
              extra: Sequence[Sequence[int]] = ()) -> Scored:
        """What follows after ids[:start], ..., ids; see Session. Raises RunError."""
        ids, v = list(ids), self.vocabulary.size
        check(ids, start, v, self.longest, top_k, extra)
        if any(extra):
            raise RunError("this server tells no probabilities of tokens that are asked for",
                           fix="ask a server that has glue's /v1/score")
        n = self.most if top_k is None else min(top_k, self.most)
        places = self.told(ids, n)[start - 1:]
        rows = [self._row(told, n) for told in places]
        width = max(len(row) for row, _ in rows)
        logs, tokens = np.full((len(rows), width), -np.inf), np.full((len(rows), width), -1, dtype=np.int64)
        for k, (row, _) in enumerate(rows):
            tokens[k, :len(row)], logs[k, :len(row)] = list(row), list(row.values())
        tail = np.clip(1 - np.exp(logs).sum(1) + SUMMED, 0, 1)
        floor = np.array([least for _, least in rows])
        return Scored(*(torch.from_numpy(each) for each in (logs, tokens, tail, floor)))

    def told(self, ids: Sequence[int], n: int) -> list[dict[int | str, float]]:
        """What the server tells after ids[:1], ids[:2], ..., ids: token, or its text -> log-probability."""
        places = self._read(ids, n, _echoed if self.words == "echo" else _numbered)
        for place in places:
            if not all(-np.inf <= log <= wire.SLACK for log in place.values()):  # which a NaN is not either
                raise RunError("the server tells log-probabilities above 0", fix="see what answers at its URL")
        return places

    def texts(self, ids: Sequence[int]) -> list[str]:
        """How the server writes each token but the first."""
        def written(choice: Any, ids: Sequence[int]) -> list[str]:
            if self.words == "echo":
                texts = choice["logprobs"]["tokens"][1:len(ids)]
            else:
                told = zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
                texts = [some[str(token)]["decoded_token"] for some, token in told]
            if len(texts) != len(ids) - 1 or not all(isinstance(text, str) for text in texts):
                raise ValueError("no texts of tokens")
            return texts

        self.told(ids, self.most)
        return self._read(ids, self.most, written)

    def _read(self, ids: Sequence[int], n: int, read: Callable[[Any, Sequence[int]], list[T]]) -> list[T]:
        """What `read` finds in the one choice of the answer."""
        body = {"model": self.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "logprobs": n}
        if self.words == "echo":
            body |= {"echo": True}
        else:
            body |= {"prompt_logprobs": n, "return_tokens_as_token_ids": True}
        answer = self.link.ask("POST", "/v1/completions", body, limit=PLAIN + A_TOKEN * (len(ids) + 1) * (n + 3))
        try:
            return read(answer.json["choices"][0], ids)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as problem:
            raise RunError(f"the server does not tell the log-probabilities of a prompt "
                           f"({type(problem).__name__}: {one_line(str(problem), 80)})",
                           fix="connect to it again, or ask a server that has glue's /v1/score") from None

    def _row(self, told: dict[int | str, float], n: int) -> tuple[dict[int, float], float]:
        """Token -> log-probability, and what no other token can exceed."""
        ordered = sorted(told.values(), reverse=True)
        least = ordered[n - 1] if n and len(ordered) >= n else 0.0
        row: dict[int, float] = {}
        for token, log in told.items():
            number = self._numbers.get(token) if isinstance(token, str) else token
            if number is None:
                least = max(least, log)
            elif not 0 <= number < self.vocabulary.size:
                raise RunError(f"the server tells of a token that is none of {self.vocabulary.size}",
                               fix="connect to it again, with the tokenizer that it has")
            else:
                row[number] = log
        return row or {0: -np.inf}, float(np.exp(least))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The text of each token that no other has -> its number."""
        texts = [self._text(token) for token in range(self.vocabulary.size)]
        seen: dict[str, int] = {}
        twice = {text for k, text in enumerate(texts) if seen.setdefault(text, k) != k}
        return {text: k for text, k in seen.items() if text not in twice}

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token]))


def _numbered(choice: Any, ids: Sequence[int]) -> list[dict[int | str, float]]:
    """vLLM: of the prompt a mapping for each token but the first; of what it wrote, texts that hold numbers."""
    prompt = choice["prompt_logprobs"][1:]
    places: list[dict[int | str, float]] = [{int(token): float(one["logprob"]) for token, one in some.items()}
                                            for some in prompt]
    for some, token in zip(places, ids[1:], strict=True):
        if token not in some:
            raise ValueError(f"nothing of token {token}, which is the prompt's")
    if len(places) != len(ids) - 1:
        raise ValueError(f"{len(places)} places for {len(ids)} tokens")
    last = choice["logprobs"]["top_logprobs"][0]
    return [*places, {int(word.removeprefix("token_id:")): float(log) for word, log in last.items()}]


def _echoed(choice: Any, ids: Sequence[int]) -> list[dict[int | str, float]]:
    """OpenAI: texts of tokens, of the prompt and of what was written after it."""
    told = choice["logprobs"]
    likely = told["top_logprobs"] or [None] * (len(ids) + 1)
    places: list[dict[int | str, float]] = []
    for k in range(1, len(ids) + 1):
        place: dict[int | str, float] = {str(text): float(log) for text, log in (likely[k] or {}).items()}
        if k < len(ids):  # its own token is told by its place, whatever its text
            own, log = told["tokens"][k], float(told["token_logprobs"][k])
            if abs(place.get(own, log) - log) < 1e-6:
                place.pop(own, None)
            place[ids[k]] = log
        places.append(place)
    return places
