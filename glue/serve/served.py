"""A member with all that answers for it: who reads prompts, who writes, and which sessions are held."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from glue.errors import did_you_mean
from glue.kinds import Running
from glue.kinds.local_source import Local
from glue.serve.engine import Engine
from glue.serve.metrics import Metrics
from glue.serve.problems import Problem
from glue.serve.prompts import PLAIN, Prompts
from glue.serve.sessions import Judging, Sessions

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What requests may ask of a server.

    batch           texts that are written at once
    waiting         requests that may wait for their turn
    body            bytes of a request
    seconds         from a request to the end of its answer
    sessions        that are held for /v1/score
    session_tokens  that they may hold together
    session_idle    seconds after which one that nobody uses goes
    top_k           the most tokens that /v1/score tells of a place; 0: all
    delay           seconds before each answer, as if the server were far away
    grace           seconds that running requests have when the server stops
    """

    batch: int = 32
    waiting: int = 256
    body: int = 4 * 2 ** 20
    seconds: float = 300.0
    sessions: int = 64
    session_tokens: int = 262_144
    session_idle: float = 600.0
    top_k: int = 0
    delay: float = 0.0
    grace: float = 20.0


class Served:
    """A running member that requests can be put to. Everything here is the event loop's, but for what the engine runs.

    template  a chat template instead of the tokenizer's; "plain" is one that every member can read
    judging   how proposals to /v1/verify are judged; None: not at all
    """

    def __init__(self, running: Running, limits: Limits, template: str | None = None, judging: Judging | None = None):
        self.running, self.limits, self.name = running, limits, running.member.name
        self.metrics = Metrics()
        self._template = PLAIN if template == "plain" else template
        self._prompts: dict[int, Prompts] = {}
        self.judging = judging
        self.sessions: Sessions | None = None
        self.verifying: Sessions | None = None  # apart: what is told of a text must not depend on who else asks of it
        if running.choose is None:
            self.sessions, self.verifying = (Sessions(Local(running), limits.sessions, limits.session_tokens,
                                                      limits.session_idle) for _ in range(2))
        self.engine = Engine(limits.batch, limits.waiting, self.metrics, self._expire)
        # one thread reads prompts, so that a long one keeps nobody waiting but other prompts
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self.metrics.now = {
            "waiting_requests": ("Requests that wait for their turn.", lambda: self.engine.waiting),
            "running_rows": ("Texts that are being written.", lambda: self.engine.rows),
            "sessions": ("Sessions that are held.", lambda: sum(each.count for each in self._all()))}

    def start(self) -> None:
        """Begin to answer."""
        self.engine.start()

    def stop(self) -> None:
        """Finish what runs, and give everything back."""
        if self.engine.stop(self.limits.grace):
            for each in self._all():
                each.close()
        self._reader.shutdown(cancel_futures=True)

    def _all(self) -> list[Sessions]:
        return [each for each in (self.sessions, self.verifying) if each is not None]

    def _expire(self) -> None:
        for each in self._all():
            each.expire()

    def check_name(self, model: str) -> None:
        """Raises Problem 404 for another model than the one that is served."""
        if model != self.name:
            raise Problem(404, f"there is no model '{model}' here{did_you_mean(model, [self.name])}", param="model",
                          code="model_not_found")

    async def reading(self, work: Callable[[], T]) -> T:
        """Let a prompt be read, on the thread that does."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def prompts(self, running: Running) -> Prompts:
        """Who reads prompts for the member, or for one of its experts."""
        if id(running) not in self._prompts:
            self._prompts[id(running)] = Prompts(running, self._template)
        return self._prompts[id(running)]

    def about(self) -> dict[str, Any]:
        """The member as /v1/models tells of it; a mixture by text has no one vocabulary."""
        member = self.running.member
        told: dict[str, Any] = {"kind": member.kind, "digest": member.digest, "vocabulary": None, "vocab_size": None,
                                "longest": None, "max_top_k": None}
        if self.sessions is not None:
            source = self.sessions.source
            told |= {"vocabulary": source.vocabulary.digest, "vocab_size": source.vocabulary.size,
                     "longest": source.longest, "max_top_k": self.most_told}
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "glue", "glue": told}

    @property
    def most_told(self) -> int:
        """Tokens that /v1/score tells of a place at most."""
        assert self.sessions is not None
        size = self.sessions.source.vocabulary.size
        return min(self.limits.top_k or size, size)
