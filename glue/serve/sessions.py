"""Texts that are asked about again and again: what was read of each stays read, until there are too many."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

from glue.kinds.source import Scored, Session, Source
from glue.serve.problems import Problem

T = TypeVar("T")

NAME = r"^[A-Za-z0-9_-]+$"  # what a session may be called
Judge = Callable[[bytes, int], bytes]  # a proposal, and how many tokens are held -> a verdict
Judging = Callable[[Session, Source, int | None], Judge]  # a session, its source and a seed -> who judges there


@dataclass
class _Held:
    """A session: its text, and what the source keeps for it."""

    session: Session
    close: Callable[[], None]
    ids: list[int] = field(default_factory=list)
    used: float = 0.0
    judge: Judge | None = None

    def score(self, ids: Sequence[int], start: int, *, top_k: int | None = None,
              extra: Sequence[Sequence[int]] = ()) -> Scored:
        """What follows; the text is now this one."""
        scored = self.session.score(ids, start, top_k=top_k, extra=extra)
        self.ids = list(ids)
        return scored


@dataclass
class Sessions:
    """The sessions of one source, the one that was used longest ago first. For the engine's thread, but for `count`.

    most    sessions that are held; the one used longest ago makes room
    tokens  that they may hold together
    idle    seconds after which one that is not used goes
    """

    source: Source
    most: int
    tokens: int
    idle: float
    clock: Callable[[], float] = time.monotonic
    _held: OrderedDict[str, _Held] = field(default_factory=OrderedDict)

    @property
    def count(self) -> int:
        """Sessions that are held."""
        return len(self._held)

    @property
    def held(self) -> int:
        """Tokens of all sessions."""
        return sum(len(held.ids) for held in self._held.values())

    def score(self, name: str | None, keep: int, ids: Sequence[int], start: int, top_k: int | None,
              extra: Sequence[Sequence[int]]) -> tuple[str, int, Scored]:
        """-> (name of the session, tokens that it holds now, what follows at each place).

        name  of a session that is held, or of one to begin when keep is 0; None: one with a new name
        Raises Problem 409 where nothing, or less than `keep`, is held under that name.
        """
        held = self._held.get(name) if name else None
        if keep and (held is None or len(held.ids) < keep):
            raise Problem(409, f"session '{name}' is not held, or not as far as {keep} tokens; send the whole text "
                               "with keep 0", param="session", code="session_lost")
        whole = [*(held.ids[:keep] if held else ()), *ids]
        if not start <= len(whole):
            raise Problem(400, f"from_pos is {start}, and the text has {len(whole)} tokens", param="from_pos")
        if len(whole) > self.tokens:
            raise Problem(400, f"the text has {len(whole)} tokens; sessions may hold {self.tokens}", param="ids")
        name = name or secrets.token_hex(12)
        scored = self._used(name, lambda held: held.score(whole, start, top_k=top_k, extra=extra))
        return name, len(whole), scored

    def judged(self, name: str | None, proposal: bytes, begin: Callable[[Session, Source], Judge]) -> tuple[str, bytes]:
        """-> (name of the session, the verdict on a proposal). begin: makes the judge of a session that begins"""
        name = name or secrets.token_hex(12)

        def judge(held: _Held) -> bytes:
            held.judge = held.judge or begin(held, self.source)
            return held.judge(proposal, len(held.ids))

        return name, self._used(name, judge)

    def _used(self, name: str, work: Callable[[_Held], T]) -> T:
        """Let a session, or a new one, do something; one that fails is not held any more."""
        held = self._held.get(name) or self._opened(name)
        try:
            done = work(held)
        except BaseException:
            self.drop(name)
            raise
        held.used = self.clock()
        self._held.move_to_end(name)
        self._make_room(0)
        return done

    def drop(self, name: str) -> bool:
        """Give a session back; False where there is none."""
        held = self._held.pop(name, None)
        if held is not None:
            held.close()
        return held is not None

    def expire(self) -> None:
        """Give back what was not used for too long."""
        while self._held and next(iter(self._held.values())).used < self.clock() - self.idle:
            self.drop(next(iter(self._held)))

    def close(self) -> None:
        """Give everything back."""
        for name in list(self._held):
            self.drop(name)

    def _opened(self, name: str) -> _Held:
        self._make_room(1)
        stack = ExitStack()
        held = self._held[name] = _Held(stack.enter_context(self.source.open()), stack.close, used=self.clock())
        return held

    def _make_room(self, more: int) -> None:
        while len(self._held) + more > self.most or (len(self._held) > 1 and self.held > self.tokens):
            self.drop(next(iter(self._held)))
