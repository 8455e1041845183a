"""`step: value`: what each client of a federation, or each of several members, is worth to what is made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Annotated, Any

from glue.errors import MethodError, RecipeError, ZooError
from glue.family import Choice, Count, Of
from glue.identity import identify
from glue.kinds import Place
from glue.member import Member, Score, Table, canonical
from glue.steps import AtOnce, Device, Job, Made, Many, Measured, OnDev, One, RunsInFloats, ran, steps
from glue.steps._games import Answers, By, Worth, game_of_members, game_of_updates, takes_weights, worth
from glue.steps.clients import kept
from glue.steps.federate import CLIENTS, ROUNDS
from glue.steps.merge import compatible

if TYPE_CHECKING:
    from glue.federate.update import Update
    from glue.steps._games import Game

NOTE = "values.jsonl"  # beside the table: what was done in one line, then a player a line
JOURNAL = "values.journal"
LIKELY = "likelihood"  # of a byte of the right answer, where players are valued by losses


def clear(members: list[Any] | None, of: str | None, base: str | None, merge: Choice | None, **_: Any) -> None:
    """Members that are merged over a base, or clients of a federation, which says by itself how they are combined."""
    if (members is None) == (of is None):
        raise RecipeError("players are members, or the clients of one federation",
                          fix="say  members:, base:  and  merge:,  or  of: the federation")
    if of is not None and (base is not None or merge is not None):
        raise RecipeError("clients are combined as their federation combines them", fix="leave base and merge out")
    if members is not None and (base is None or merge is None):
        raise RecipeError("members are valued in a merge over a base, whose score is that of nobody",
                          fix="add  base: root  and  merge: {task_arithmetic: {weight: 0.3}}")
    if merge is not None and (merge.method.traits["space"] == "factors" or not takes_weights(merge)
                              or merge.method.traits.get("members", (1, None)) != (1, None)):
        raise MethodError(f"merge method '{merge.method.name}' does not merge any number of models by weight, so a "
                          f"subset has no merge", fix="value by linear, task_arithmetic, ties or dare_ties")


def playable(members: list[Member] | None = None, of: Member | None = None, base: Member | None = None,
             merge: Choice | None = None, most: int | None = None, **_: Any) -> None:
    """Shapes and weights of members; a federation of one round that has kept what clients sent; one order at least."""
    if of is not None:
        kept(of)
        rounds = json.loads((of.folder / ROUNDS).read_text())
        if len(rounds) > 1:
            raise ZooError(f"'{of.name}' took {len(rounds)} rounds, and what clients sent in the last one stands on "
                           f"what all of them sent before",
                           fix="value one round, or federate with  weight: shapley, which values every round")
        n = len(list((of.folder / CLIENTS).iterdir()))
    else:
        assert members is not None and base is not None and merge is not None
        players = players_of(members, base)
        compatible(players, merge, base)
        n = len(players)
    if most is not None and most < n + 1:
        raise MethodError(f"{most} subsets do not make one order of {n} players, which takes {n + 1}",
                          fix=f"allow {n + 1} or more, or leave most out")


def players_of(members: Sequence[Member], base: Member) -> list[Member]:
    """Members but for the base itself, which adds nothing. Raises MethodError where nobody is left."""
    found = [member for member in members if member.digest != base.digest]
    if not found:
        raise MethodError(f"there is nobody but the base '{base.name}'", fix="name members that were made from it")
    return found


@steps.add("value", makes="table", named=True, holds="runs", resumes=True, words=clear, check=playable,
           unkeyed=("device", "batch_size"), later=("dtype",), source="arXiv:2405.00705")
def value(job: Job, *, members: Many | None = None, of: One | None = None, base: One | None = None,
          merge: Annotated[Any, Of("merging")] | None = None, suite: OnDev, by: By = "score", chains: Count = 10,
          most: Count | None = None, device: Device = "cpu", dtype: RunsInFloats = "float32",
          batch_size: AtOnce = "auto") -> Made:
    """The Shapley value of each member in a merge, or of each client of a federation: what it adds to the merge of some
    of the others, in the mean over all orders in which they may come. Leaves a table of what each scores alone, and the
    values beside it.

    members, base, merge  players, what nobody is, and how some of them are merged; weights are those of the merge
            method, whoever takes part. The base itself is no player
    of      a federation of one round that has kept what its clients sent; they are combined as it does that, weighted
            by their examples, and all of the result is added
    by      score: the mean over tasks; loss: how little right answers surprise, in bits a byte, which tells players
            apart that answer alike
    chains  how many orders are walked where there are more than 12 players
    most    how many subsets may be merged and asked; all are where there is room for them
    device, dtype, batch_size  where merges are asked, what they calculate in, and how many questions they read at once

    Intervals are over other items, and over other orders where not all subsets were asked.
    """
    updates = updates_of(of) if of is not None else []
    place = job.place(device, dtype, batch_size)
    game = _game(job, members, base, merge, of, updates, suite, place)
    found = worth(game, by, job.workers, Answers(job.folder / JOURNAL, game.players), chains=chains, most=most,
                  seed=job.seed, report=job.report)
    digests = {update.client: identify(update.folder)[1] for update in updates}
    digests |= {member.name: member.digest for member in members or ()}
    rows = found.told()
    every = frozenset(range(len(game.players)))
    combined = merge.spelled() if merge else json.loads((of.folder / ROUNDS).read_text())[0]["combine"]  # type: ignore[union-attr]
    about = {"suite": f"{suite.suite.name}:{suite.split}", "by": by, "merge": combined, "exact": found.valued.exact,
             "subsets": found.valued.fits, "items": list(found.tasks), "nobody": found.value(frozenset()),
             "everybody": found.value(every)}
    lines = [about, *({**row, "digest": digests[row["player"]]} for row in rows)]
    (job.folder / NOTE).write_text("".join(canonical(line) + "\n" for line in lines), encoding="utf-8")
    Table(tuple(_alone(found, digests, suite, by, combined, dtype))).write(job.folder)
    (job.folder / JOURNAL).unlink(missing_ok=True)
    best, worst = rows[0], rows[-1]
    return Made("table", seen=frozenset(suite.digests().values()),
                note=f"what {len(rows)} {'clients' if of else 'members'} are worth on {about['suite']}: most "
                     f"{_short(best, by)}, least {_short(worst, by)}")


def _game(job: Job, members: list[Member] | None, base: Member | None, merge: Choice | None, of: Member | None,
          updates: list[Update], suite: Measured, place: Place) -> Game:
    if of is None:
        assert members is not None and base is not None and merge is not None
        return game_of_members(players_of(members, base), base, merge, suite, job.seed, place)
    from glue.federate.rounds import State
    from glue.steps._server import Server

    assert of.base is not None
    said, = json.loads((of.folder / ROUNDS).read_text())
    server = Server(of.base, updates[0].kind, {}, said["targets"], Choice.unspelled(said["combine"]), (1.0,), None, inf,
                    job.folder / ".reports", job.workers, job.seed)
    return game_of_updates(server, updates, State(), suite, place)


def updates_of(of: Member) -> list[Update]:
    """What the clients of a federation sent, by name."""
    from glue.federate.update import read_update

    return sorted((read_update(folder) for folder in (of.folder / CLIENTS).iterdir()),
                  key=lambda update: update.client)


def _alone(found: Worth, digests: dict[str, str], suite: Measured, by: By, combined: Any,
           dtype: str) -> list[Score]:
    """What everybody's own merge came to, where that was asked, as rows of a table."""
    import numpy as np

    rows, splits = [], suite.digests()
    how = canonical({"harness": "glue", "merge": combined, "by": by, **ran(dtype)})
    for k, player in enumerate(found.players):
        results = found.results.get(frozenset({k}))
        if results is None:
            continue
        for task, some in zip(suite.suite.tasks, np.split(results, np.cumsum(found.tasks)[:-1]), strict=True):
            told, metric = (some, task.metric) if by == "score" else (np.exp2(some), LIKELY)
            rows.append(Score(player, digests[player], f"{suite.suite.name}:{suite.split}", task.name, metric,
                              tuple(told.tolist()), splits[task.name], how,
                              task.chance if by == "score" else 0.0, seen_by_search=True))
    return rows


def _short(row: dict[str, Any], by: By) -> str:
    told = f"{100 * row['value']:+.1f} points" if by == "score" else f"{row['value']:+.3f} bits a byte"
    return f"{row['player'].rpartition('/')[2]} ({told})"
