"""What a finished plan shows of a claim: a number that is above 0 where the claim is right, with its interval.

    scores    how much better one member is than another on the items of the board, in shares of 1
    answers   which share of the answers of another search a search does without
    families  by how much the least alike two of one lineage are more alike than the most alike two of different ones
    choice    1 where a search left a member out, 0 where it took it in
    errors    how much nearer one federation came to the exact mean of what its clients sent than another, in units of
              the norm of that mean, in the worst round of each
    traffic   which share of the bytes of another federation a federation does without, up and down

The first has a paired 95 % interval over questions. The others are counts and cosines of what was made: they are what
they are, and their interval is the number itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.reproduction.claims import Show
from glue.errors import RecipeError
from glue.evaluate.statistics import Interval, difference
from glue.member import Member, Table
from glue.plan import Plan
from glue.steps.search import SEARCH_NOTE


@dataclass(frozen=True)
class Measured:
    """An answer to one `Show` at one seed.

    items    how many questions, answers or pairs of members it is about
    digests  of the members that are compared, by the name that the claim has for them
    made     versions of what computed it
    """

    asked: str
    found: Interval
    items: int
    digests: Mapping[str, str]
    made: Mapping[str, str]


def measure(show: Show, plan: Plan) -> Measured:
    """Answer from the products of a plan that is done. Raises RecipeError with the claim's line."""
    try:
        members = [[plan[word] for word in words] for words in show.words]
        found, items, made = _MEASURES[show.measure](members, plan)
    except RecipeError as error:
        raise RecipeError(error.what, fix=error.fix, place=show.place) from None
    named = {word: member.digest for words, some in zip(show.words, members, strict=True)
             for word, member in zip(words, some, strict=True)}
    return Measured(show.asked, found, items, named, dict(made.origin.made_with) if made.origin else {})


_Found = tuple[Interval, int, Member]  # ..., and what was read


def _scores(members: list[list[Member]], plan: Plan) -> _Found:
    """How much better the first is, on the items of the table that the recipe shows."""
    if plan.recipe.board is None:
        raise RecipeError(f"{plan.recipe.file} shows no board")
    table = plan[plan.recipe.board.table]
    by_digest: dict[str, dict[str, np.ndarray]] = {}
    for score in Table.read(table).rows:
        by_digest.setdefault(score.digest, {})[score.task] = np.asarray(score.results)
    missing = [member.name for some in members for member in some if member.digest not in by_digest]
    if missing:
        raise RecipeError(f"'{missing[0]}' is not on the board of {plan.recipe.name}",
                          fix=f"add it to the members of the line '{plan.recipe.board.table}'")
    (better,), others = ([by_digest[member.digest] for member in some] for some in members)
    than = {task: np.mean([other[task] for other in others], axis=0) for task in better}
    return difference(better, than), sum(map(len, better.values())), table


def _answers(members: list[list[Member]], plan: Plan) -> _Found:
    """The share of answers that the first search does without, beside all on the right together."""
    first, others = ([_note(member, plan)["items"] for member in some] for some in members)
    return _exact(1 - sum(first) / sum(others)), sum(first) + sum(others), members[0][0]


def _choice(members: list[list[Member]], plan: Plan) -> _Found:
    """Whether the first has no weight in what the second search found."""
    (refused,), (by,) = members
    return _exact(float(refused.name not in _note(by, plan)["weights"])), 1, by


def _families(members: list[list[Member]], plan: Plan) -> _Found:
    """The gap between pairs of one lineage and pairs of two, where their weights can be compared at all."""
    (group,), = members
    told = json.loads((group.folder / "similarity.json").read_text())
    roots = {member.name: [member, *member.lineage()][-1].name
             for element in group.elements for member in element.members}
    alike: dict[bool, list[float]] = {True: [], False: []}
    for i, one in enumerate(told["names"]):
        for j, other in enumerate(told["names"][:i]):
            if told["similarity"][i][j] is not None:
                alike[roots[one] == roots[other]].append(told["similarity"][i][j])
    return _exact(min(alike[True]) - max(alike[False])), len(alike[True]) + len(alike[False]), group


def _errors(members: list[list[Member]], plan: Plan) -> _Found:
    """How much farther from the exact mean the second federation was."""
    found = [[one["aggregation_error"] for one in _told(member, "rounds.json")] for (member,) in members]
    return _exact(max(found[1]) - max(found[0])), len(found[0]), members[0][0]


def _traffic(members: list[list[Member]], plan: Plan) -> _Found:
    """The share of bytes that the first federation does without, beside the second."""
    sent = [sum(client["up"] + client["down"] for client in _told(member, "ledger.json")["clients"].values())
            for (member,) in members]
    return _exact(1 - sent[0] / sent[1]), sum(sent), members[0][0]


def _told(member: Member, file: str) -> Any:
    return json.loads((member.folder / file).read_text())


_MEASURES = {"scores": _scores, "answers": _answers, "choice": _choice, "families": _families, "errors": _errors,
             "traffic": _traffic}


def _exact(value: float) -> Interval:
    return Interval(value, value, value)


def _note(member: Member, plan: Plan) -> Any:
    """What a search said of itself. Where it found a member as it is, that lies elsewhere than the member."""
    file = next(task.folder(plan.zoo) / SEARCH_NOTE for task in plan if task.name == member.name)
    if not file.exists():
        raise RecipeError(f"'{member.name}' tells of no search", fix="name what a step  search  has looked for")
    return json.loads(file.read_text())
