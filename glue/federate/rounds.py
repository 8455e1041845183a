"""Rounds: ask clients, collect what they send until enough have, combine it, send the result, and again.

    COLLECT    replies are checked and spooled as they arrive, until all are in, or the deadline has passed and a
               quorum is; who came is written down
    FINALISE   the updates of those who came are combined, in the order of their names
    BROADCAST  what came out is the parent of the next round

Every arrow is a line in the spool's journal, so a loop that was killed goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from glue.errors import RunError
from glue.federate.spool import Spool
from glue.federate.update import Refused, Update, read_update, size_of


class Reply(NamedTuple):
    """A client has answered: its update lies in the spool's `incoming`, or it tells its error."""

    client: str
    round: int
    error: str = ""


class State(NamedTuple):
    """What a round has come to: a folder, and its digest. In the beginning neither."""

    folder: Path | None = None
    digest: str = ""


class Ask(Protocol):
    """Send the state to clients, and give their replies as they arrive; None where there is none for a moment.

    Replies of an earlier round may come too; they are kept as late.
    """

    def __call__(self, round: int, clients: Sequence[str], parent: State, /) -> Iterator[Reply | None]: ...


Combine = Callable[[int, Sequence[Update], State, Path], str]  # round, who came, parent, empty folder -> digest
Check = Callable[[Update, str, int, State], None]  # update, client, round, parent; raises Refused
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Terms:
    """How a federation goes.

    quorum     share of the asked clients whose updates a round needs
    deadline   seconds after which a round goes on without those who are missing; None waits for all
    per_round  how many clients are asked in a round, drawn by the seed; None for all
    patience   seconds after the end in which late replies are still kept, for a later version
    """

    rounds: int = 1
    quorum: float = 1.0
    deadline: float | None = None
    per_round: int | None = None
    patience: float = 0.0
    seed: int = 0

    def asked(self, round: int, clients: Sequence[str]) -> list[str]:
        """The clients of a round, in the order of their names; a round's draw depends on no other."""
        names = sorted(clients)
        if self.per_round is None or self.per_round >= len(names):
            return names
        drawn = np.random.default_rng([self.seed, round]).permutation(len(names))[:self.per_round]
        return [names[k] for k in sorted(drawn)]

    def needed(self, asked: int) -> int:
        """How many updates make a quorum; one at least."""
        return max(1, ceil(self.quorum * asked - 1e-9))


class Loop:
    """A federation under way. `run` gives its last state."""

    def __init__(self, clients: Sequence[str], terms: Terms, spool: Spool, *, ask: Ask, combine: Combine, check: Check,
                 clock: Callable[[], float], report: Report = lambda done, total, note: None):
        assert clients and len(set(clients)) == len(clients), "a federation has at least one client, and each once"
        self.clients, self.terms, self.spool = list(clients), terms, spool
        self.ask, self.combine, self.check, self.clock, self.report = ask, combine, check, clock, report

    def run(self) -> State:
        """All rounds that are not done. Raises RunError where a round stays without its quorum."""
        for round in range(1, self.terms.rounds + 1):
            if round not in self.spool.closed():
                self._round(round, self._state(round - 1))
        return self._state(self.terms.rounds)

    def _round(self, round: int, parent: State) -> None:
        asked = self.terms.asked(round, self.clients)
        decided = next((line["clients"] for line in self.spool.events("collected") if line["round"] == round), None)
        if decided is None:
            self._ask(round, asked, parent)
        else:  # killed while it was combining
            self._finalise(round, decided, parent)

    # COLLECT

    def _ask(self, round: int, asked: list[str], parent: State) -> None:
        for client in self.spool.arrived(round, asked):
            self._take(round, client)
        came = {update.client for update in self.spool.taken(round)}
        self._tell(round, asked, came)
        missing = [client for client in asked if client not in came]
        if not missing:
            self._finalise(round, sorted(came), parent)
            return
        for client in missing:
            self.spool.note("sent", round=round, client=client, bytes=size_of(parent.folder) if parent.folder else 0)
        self._collect(round, asked, came, parent)

    def _collect(self, round: int, asked: list[str], came: set[str], parent: State) -> None:
        """Take replies until the round is decided, and finalise it; after the last one, keep what comes late."""
        answered, began = set(came), self.clock()
        until: float | None = None  # set when the round is closed
        missing = [client for client in asked if client not in came]
        with closing(self.ask(round, missing, parent)) as replies:  # type: ignore[type-var]
            for reply in replies:
                now = self.clock()
                if reply is not None:
                    current = reply.round == round and reply.client in asked
                    answered |= {reply.client} if current else set()
                    if self._received(reply, late=until is not None or not current):
                        came.add(reply.client)
                        self._tell(round, asked, came)
                if until is None and self._enough(round, asked, came, answered, now - began):
                    self._finalise(round, sorted(came), parent)
                    until = now + (self.terms.patience if round == self.terms.rounds else 0.0)
                if until is not None and (len(answered) == len(asked) or now >= until):
                    return
        if until is None:
            self._short(round, asked, came, f"{len(answered)} of {len(asked)} clients answered")
            self._finalise(round, sorted(came), parent)

    def _enough(self, round: int, asked: list[str], came: set[str], answered: set[str], elapsed: float) -> bool:
        if len(answered) == len(asked):
            self._short(round, asked, came, "all clients have answered")
            return True
        if self.terms.deadline is None or elapsed < self.terms.deadline:
            return False
        self._short(round, asked, came, f"the deadline of {self.terms.deadline:g} s has passed")
        return True

    def _short(self, round: int, asked: list[str], came: set[str], why: str) -> None:
        """Raise where too few came."""
        needed = self.terms.needed(len(asked))
        if len(came) >= needed:
            return
        reasons = {line["client"]: line["reason"] for line in self.spool.events("refused", "failed")
                   if line["round"] == round and line["client"] not in came}
        told = "".join(f"; {client}: {reason}" for client, reason in sorted(reasons.items()))
        raise RunError(f"round {round} has {len(came)} usable updates of {len(asked)} and needs {needed}: {why}{told}",
                       fix="run again, which asks only those who are missing; or lower quorum, or raise deadline")

    def _received(self, reply: Reply, *, late: bool) -> bool:
        """Whether a reply counts in its round: a good one that is not late."""
        if reply.error:
            self.spool.note("failed", round=reply.round, client=reply.client, reason=reply.error)
            return False
        return self._take(reply.round, reply.client, late=late) and not late

    def _take(self, round: int, client: str, *, late: bool = False) -> bool:
        """Whether the reply that came in was good; a bad one is dropped, and its reason noted."""
        folder = self.spool.incoming(round, client)
        if self.spool.has(round, client):  # a node that was asked twice
            self.spool.drop(round, client)
            return False
        try:
            self.check(read_update(folder), client, round, self._state(round - 1))
        except Refused as reason:
            self.spool.note("refused", round=round, client=client, bytes=size_of(folder), reason=reason.what)
            self.spool.drop(round, client)
            return False
        self.spool.take(round, client, late=late)
        return True

    def _state(self, round: int) -> State:
        """What a round that is closed has come to."""
        return State(self.spool.state(round), self.spool.closed()[round]["digest"]) if round else State()

    # FINALISE

    def _finalise(self, round: int, came: Sequence[str], parent: State) -> None:
        if not any(line["round"] == round for line in self.spool.events("collected")):
            self.spool.note("collected", round=round, clients=list(came))
        updates = [update for update in self.spool.taken(round) if update.client in came]
        assert [update.client for update in updates] == list(came), "who was counted is in the spool"
        digest = self.combine(round, updates, parent, self.spool.draft(round))
        self.spool.close(round, came, digest)

    def _tell(self, round: int, asked: list[str], came: set[str]) -> None:
        each = len(asked)
        self.report((round - 1) * each + len(came), self.terms.rounds * each,
                    f"round {round}: {len(came)} of {each} clients")
