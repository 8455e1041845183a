"""Games: players whose subsets are merged and asked dev items, and what each of them is worth by that.

A subset is merged in memory where a search could do so, by the same code; methods that work on the factors of adapters,
or take no weight by member, leave a folder for as long as it is asked.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from glue.family import Choice, is_per_member
from glue.files import append_line, whole_lines
from glue.kinds import Place, Running
from glue.member import Member, canonical
from glue.steps import Measured
from glue.steps._candidates import Ground, opened
from glue.workers import Workers

if TYPE_CHECKING:
    from glue.federate.rounds import State
    from glue.federate.update import Update
    from glue.refine.shapley import Report, Valued
    from glue.search.candidate import Candidate
    from glue.steps._server import Server

By = Literal["score", "loss"]
Subset = frozenset[int]
FOLD = ".fold-"  # before the name of a folder that is there while a subset is asked
SUBSETS = 128  # of clients that are combined and asked in a round: all of up to 7 clients, of more as orders go


class Game(Protocol):
    """Players by name, and what a subset of them comes to; made in one process and played in others."""

    @property
    def players(self) -> tuple[str, ...]: ...
    @property
    def suite(self) -> Measured: ...
    def results(self, subset: Subset, by: By) -> np.ndarray:
        """In a worker: what the merge of a subset comes to on each item, the more the better. [items]"""
        ...


@dataclass(frozen=True)
class Merged:
    """Members that are merged over a base in memory; nobody is the base.

    weights   of the merge method, by player
    examples  of clients, of which a weight is multiplied by its share in all that take part; None of other members
    """

    ground: Ground
    weights: tuple[float, ...]
    examples: tuple[int, ...] | None = None

    @property
    def players(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(member.name for member in self.ground.members)

    @property
    def suite(self) -> Measured:
        """What they are asked."""
        return self.ground.suite

    def candidate(self, subset: Subset) -> Candidate | None:
        """The merge of a subset; None where nobody in it has a weight."""
        from glue.search.candidate import Candidate

        shares = dict.fromkeys(subset, 1.0)
        if self.examples:
            total = sum(self.examples[k] for k in subset)
            shares = {k: self.examples[k] / total for k in subset}
        table = {self.players[k]: self.weights[k] * shares[k] for k in sorted(subset)}
        return Candidate.merge(table) if any(table.values()) else None

    def results(self, subset: Subset, by: By) -> np.ndarray:
        """See Game."""
        candidate, held = self.candidate(subset), opened(self.ground)
        assert self.ground.base is not None
        running = held.assembled(candidate) if candidate else self.ground.place.load(self.ground.base)
        if by == "loss":
            return _asked(running, self.suite, by)
        from glue.evaluate.fast import score

        return np.concatenate(list(score(running, held.prepared(running, None)).values()))


@dataclass(frozen=True)
class Folded:
    """Clients whose updates a server combines; nobody is the state that they began with. They are asked at `place`."""

    server: Server
    updates: tuple[Update, ...]
    parent: State
    suite: Measured
    place: Place = Place()

    @property
    def players(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(update.client for update in self.updates)

    def results(self, subset: Subset, by: By) -> np.ndarray:
        """See Game."""
        if not subset:
            return _asked(self.place.load(self.server.member(self.parent)), self.suite, by)
        with TemporaryDirectory(dir=self.server.reports.parent, prefix=FOLD) as place:
            some = [self.updates[k] for k in sorted(subset)]
            return _asked(self.place.load(self.server.fold(some, self.parent, Path(place))), self.suite, by)

    def sweep(self) -> None:
        """Remove what workers have left that were lost while they asked."""
        for place in self.server.reports.parent.glob(f"{FOLD}*"):
            shutil.rmtree(place, ignore_errors=True)


def _asked(running: Running, suite: Measured, by: By) -> np.ndarray:
    from glue.evaluate.fast import losses

    if by == "score":
        return np.concatenate(list(suite.ask(running).values()))
    return -np.concatenate(list(losses(running, suite.suite.tasks, suite.items()).values()))


def game_of_members(members: Sequence[Member], base: Member, merge: Choice, suite: Measured, seed: int,
                    place: Place = Place()) -> Merged:  # noqa: B008 - a value
    """Members that are merged over a base with the weights that the merge method is given."""
    from glue.merge.parameters import by_member

    row = by_member(merge, [member.name for member in members])["weight"]
    return Merged(Ground.of(list(members), base, merge, None, suite, seed, place), tuple(row))


def game_of_updates(server: Server, updates: Sequence[Update], parent: State, suite: Measured,
                    place: Place = Place()) -> Game:  # noqa: B008 - a value
    """Clients whose updates are combined as their federation does it, weighted by their examples."""
    from glue.merge.parameters import by_member

    if server.factors or not takes_weights(server.choice):
        return Folded(server, tuple(updates), parent, suite, place)
    below = server.member(parent)
    members = [Member(update.client, server.sent, str(update.folder), base=below, digest=str(update.folder))
               for update in updates]
    row = by_member(server.choice, [member.name for member in members])["weight"]
    return Merged(Ground.of(members, below, server.choice, None, suite, server.seed, place), tuple(row),
                  tuple(update.examples for update in updates))


def takes_weights(choice: Choice) -> bool:
    """Whether a merge method takes a weight for each member."""
    info = choice.method.parameters.get("weight")
    return info is not None and is_per_member(info.annotation, info.metadata)


def play(game: Game, subset: tuple[int, ...], by: By) -> np.ndarray:
    """In a worker: what a subset comes to, [items]."""
    return game.results(frozenset(subset), by)


class Answers:
    """What subsets came to, in a file that is only appended to, so that a killed game is gone on with."""

    def __init__(self, file: Path, players: Sequence[str]):
        self.file, self.players = file, list(players)

    def known(self) -> dict[Subset, np.ndarray]:
        """Everything that was written down."""
        return {frozenset(map(self.players.index, line["players"])): np.array(line["results"], dtype=np.float64)
                for line in map(json.loads, whole_lines(self.file))}

    def add(self, subset: Subset, results: np.ndarray) -> None:
        """Write down what one came to."""
        told = {"players": [self.players[k] for k in sorted(subset)], "results": results.tolist()}
        append_line(self.file, canonical(told))


@dataclass(frozen=True)
class Worth:
    """What players are worth.

    valued   over subsets; its intervals are those of random orders
    results  subset -> what it came to on each item [items]
    items    [n, items], what players are worth to each item
    tasks    how many items each task has, one after the other
    """

    players: tuple[str, ...]
    valued: Valued
    results: Mapping[Subset, np.ndarray]
    items: np.ndarray
    tasks: tuple[int, ...]

    def value(self, subset: Subset) -> float | None:
        """The mean over tasks of the mean over items, where a subset was asked."""
        return macro(self.results[subset], self.tasks) if subset in self.results else None

    @cached_property
    def error(self) -> np.ndarray:
        """Standard errors of the values as means over items. [n]; a task of one item shows none."""
        parts = [some.var(1, ddof=1) / some.shape[1] if some.shape[1] > 1 else np.zeros(len(some))
                 for some in np.split(self.items, np.cumsum(self.tasks)[:-1], axis=1)]
        return np.sqrt(np.sum(parts, axis=0)) / len(parts)

    @cached_property
    def half(self) -> np.ndarray:
        """Half of the 95 % intervals, over other items and other orders. [n]"""
        from glue.evaluate.statistics import quantile

        return np.hypot(quantile(0.975) * self.error, self.valued.high - self.valued.mean)

    def told(self) -> list[dict[str, Any]]:
        """One row a player, the most worthy first.

        orders  the standard error for which random orders account
        alone   what the player makes of nobody; last: what it adds to all the others, where that was asked
        """
        every = frozenset(range(len(self.players)))
        rows = [{"player": name, "value": mean, "low": mean - half, "high": mean + half, "items": error,
                 "orders": order, "alone": self._gain(frozenset({k}), frozenset()),
                 "last": self._gain(every, every - {k})}
                for k, (name, mean, half, error, order) in enumerate(zip(
                    self.players, self.valued.mean.tolist(), self.half.tolist(), self.error.tolist(),
                    self.valued.error.tolist(), strict=True))]
        known = [{key: None if isinstance(value, float) and not isfinite(value) else value
                  for key, value in row.items()} for row in rows]
        return sorted(known, key=lambda row: (-row["value"], row["player"]))

    def _gain(self, more: Subset, less: Subset) -> float | None:
        ends = self.value(more), self.value(less)
        return None if ends[0] is None or ends[1] is None else ends[0] - ends[1]


def macro(results: np.ndarray, tasks: Sequence[int]) -> float:
    """The mean over tasks of the mean over items."""
    return float(np.mean([some.mean() for some in np.split(results, np.cumsum(tasks)[:-1])]))


def worth(game: Game, by: By, workers: Workers, answers: Answers, *, chains: int = 10, most: int | None = None,
          seed: int = 0, report: Report = lambda done, total, note: None) -> Worth:
    """What each player of a game is worth, by subsets that workers play; nothing that is written down is played again.

    chains, most  as of `shapley`: all subsets of up to 12 players are played where `most` allows it
    """
    from glue.refine.shapley import shapley
    from glue.refine.subsets import counts

    tasks = tuple(len(some) for some in game.suite.items().values())
    known = answers.known()

    def value(subsets: Sequence[Subset]) -> list[float]:
        missing = [subset for subset in subsets if subset not in known]

        def each(k: int, results: np.ndarray) -> None:
            known[missing[k]] = results
            answers.add(missing[k], results)
            report(len(known), max(len(known), expected), "subsets")

        workers.map("glue.steps._games:play", [(game, tuple(sorted(subset)), by) for subset in missing], each=each)
        return [macro(known[subset], tasks) for subset in subsets]

    n, how = len(game.players), {"chains": chains, "most": most, "seed": seed}
    expected = min(2 ** n, most or 2 ** n, 2 ** n if n <= 12 else 2 + chains * (n - 1))
    valued = shapley(n, value, **how)  # type: ignore[arg-type]
    if isinstance(game, Folded):
        game.sweep()
    subsets = list(valued.values)
    table = counts(n, subsets, exact=valued.exact, **how)
    results = {subset: known[subset] for subset in subsets}
    return Worth(game.players, valued, results, table @ np.stack(list(results.values())), tasks)


def shares_by_worth(server: Server, round: int, updates: Sequence[Update], parent: State,
                    ) -> tuple[dict[str, float], dict[str, Any]]:
    """Client -> what its update counts for in a round, in proportion to what it is worth, and what is told of that.

    An update that is worth nothing, or less, is left out; where all are, they count by their examples.
    """
    assert server.suite is not None
    game = game_of_updates(server, updates, parent, server.suite, server.place)
    answers = Answers(server.reports.parent / f"worth-{round}.journal", game.players)
    found = worth(game, "score", server.workers, answers, most=SUBSETS, seed=server.seed)
    shares = {client: max(0.0, value) for client, value in zip(found.players, found.valued.mean.tolist(), strict=True)}
    total = sum(shares.values())
    told = {"values": found.told(), "subsets": found.valued.fits, "exact": found.valued.exact}
    if not total:
        return {update.client: float(update.examples) for update in updates}, {
            **told, "by": "examples, since no update is worth anything"}
    return shares, {**told, "by": "shapley", "shares": {client: share / total for client, share in shares.items()}}
