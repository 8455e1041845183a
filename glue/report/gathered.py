"""What a report tells beside the board, gathered from a finished plan: clusters, searches, curves, routes, lineage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from math import isnan, nan
from pathlib import Path

import numpy as np

from glue.atlas import Atlas, Family, Pair
from glue.board import Leaderboard
from glue.cluster.verdict import OPPOSED, Facts, Verdict, verdict
from glue.errors import GlueError
from glue.member import Member
from glue.plan import Plan, Task
from glue.report import routing
from glue.steps.routing import NOTE
from glue.steps.search import SEARCH_NOTE
from glue.tune.curve import NOTE as TRAINING
from glue.tune.curve import Curve, read_curve

CLUSTER_NOTE = "similarity.json"


@dataclass(frozen=True)
class Try:
    """One measurement of a search: a candidate, its score, why it was tried, and the answers asked for until then.

    whole  whether the candidate has by now answered all that any candidate has
    """

    candidate: str
    value: float
    purpose: str
    asked: int
    whole: bool


@dataclass(frozen=True)
class Walk:
    """A search with every step on its way, and what it found."""

    name: str
    found: str
    value: float
    candidates: int
    tries: tuple[Try, ...]


@dataclass(frozen=True)
class Node:
    """A member in the lineage of a board.

    names   what it is called, the best known first
    above   (role, name, place of its node or None): what it was made from, as its origin tells
    rank    its place on the board; None for an ancestor
    """

    names: tuple[str, ...]
    member: Member
    above: tuple[tuple[str, str, int | None], ...]
    rank: int | None = None

    @property
    def parents(self) -> tuple[int, ...]:
        """Places of the nodes that it was made from, each once."""
        return tuple(dict.fromkeys(place for _, _, place in self.above if place is not None))


def folder(plan: Plan, task: Task, note: str) -> Path | None:
    """The folder of a finished task that holds a note of this name; None where there is none."""
    found = [Path(task.member.path)] if task.member else []
    if task.member and task.origin:
        found.append(task.folder(plan.zoo))
    return next((each for each in found if (each / note).is_file()), None)


def atlases(plan: Plan) -> list[tuple[str, Atlas]]:
    """What each cluster step saw and came to."""
    found = []
    for task in plan:
        where = folder(plan, task, CLUSTER_NOTE) if task.step == "cluster" else None
        if where is not None and task.member is not None:
            found.append((task.name, _atlas(task.member, where / CLUSTER_NOTE)))
    return [(name, atlas) for name, atlas in found if len(atlas.names) > 1]


def _atlas(group: Member, note: Path) -> Atlas:
    told = json.loads(note.read_text(encoding="utf-8"))
    names: list[str] = told["names"]
    alike = np.array([[nan if value is None else value for value in row] for row in told["similarity"]], dtype=float)
    apart: dict[tuple[str, str], list[str]] = {}
    for one, other, line in told.get("differences", ()):
        apart.setdefault((one, other), []).append(line)
    members = {member.name: member for element in group.elements for member in element.members}
    families = []
    for element in group.elements:
        root = element.root or element.members[0]
        below = [member for member in element.members if root.name in {above.name for above in member.lineage()}]
        families.append(Family(root.name, "", tuple(member.name for member in element.members), bool(below)))
    pairs = []
    for i, j in combinations(range(len(names)), 2):
        differs = apart.get((names[i], names[j]), apart.get((names[j], names[i]), []))
        pairs.append(_pair(names[i], names[j], float(alike[i, j]), differs, told, members))
    return Atlas(tuple(names), tuple(members[name].kind if name in members else "" for name in names), alike, alike,
                 {}, tuple(families), tuple(pairs), told["part"], told["linkage"], told["threshold"])


def _pair(one: str, other: str, cosine: float, differs: Sequence[str], told: dict, members: dict[str, Member]) -> Pair:
    threshold = told["threshold"]
    if told["mode"] == "delta" and not isnan(cosine):  # the cosine is one of changes, and no verdict on weights
        reason = f"their changes from {told['base']} have cosine {cosine:.3f}"
        found = (Verdict("merge", reason, "near") if cosine > threshold else
                 Verdict("do not merge", reason, "opposed") if cosine < OPPOSED else
                 Verdict("merge with care", reason, "far"))
        return Pair(one, other, Facts(cosine, base=told["base"], change=cosine), found)
    above = {each.name for name in (one, other) if name in members for each in members[name].lineage()}
    is_base = next((name for name in (one, other) if name in above), "")
    facts = (Facts(apart="; ".join(differs) or "of different build") if isnan(cosine) else
             Facts(cosine, differs=tuple(differs), is_base=is_base))
    return Pair(one, other, facts, verdict(facts, threshold=threshold))


def walks(plan: Plan) -> list[Walk]:
    """The searches of a plan, the same product once, the longest first."""
    found: dict[Path, Walk] = {}
    shown = short_names(plan)
    for task in plan:
        where = folder(plan, task, SEARCH_NOTE) if task.step == "search" else None
        if where is None:  # a family of one is not searched
            continue
        told = json.loads((where / SEARCH_NOTE).read_text(encoding="utf-8"))
        if "items" in told:  # else it was made before answers were counted
            tries = tuple(replace(each, candidate=_plainly(each.candidate, shown)) for each in _tries(told["log"]))
            best = next((each.candidate for each in tries if each.whole and each.value == told["value"]), "")
            name = shown.get(task.name, task.name)
            found.setdefault(where, Walk(name, best, told["value"], told["evaluated"], tries))
    return sorted(found.values(), key=lambda walk: -len(walk.tries))


def _tries(log: Sequence[tuple[str, float, str, int]]) -> Iterator[Try]:
    answered: dict[str, int] = {}
    for candidate, _, _, items in log:
        answered[candidate] = answered.get(candidate, 0) + items
    most, asked = max(answered.values(), default=0), 0
    answered.clear()
    for candidate, value, purpose, items in log:
        asked += items
        answered[candidate] = answered.get(candidate, 0) + items
        yield Try(candidate, value, purpose, asked, answered[candidate] >= most)


def routes(plan: Plan) -> list[tuple[str, list[routing.Report]]]:
    """What each routing step left."""
    return [(task.name, routing.read(task.member)) for task in plan
            if task.step == "routing" and task.member is not None and folder(plan, task, NOTE) is not None]


def trainings(plan: Plan) -> list[tuple[str, Curve]]:
    """The curve that each training of a plan has left, the same product once."""
    found: dict[Path, tuple[str, Curve]] = {}
    shown = short_names(plan)
    for task in plan:
        where = folder(plan, task, TRAINING)
        curve = read_curve(where) if where is not None else None
        if where is not None and curve is not None and curve.loss:
            found.setdefault(where, (shown.get(task.name, task.name), curve))
    return list(found.values())


def lineage(plan: Plan, board: Leaderboard) -> list[Node]:
    """The members of a board and all that they were made from, ancestors first; data is named, but is no node."""
    known: dict[str, Member] = {}
    names: dict[str, list[str]] = {}
    every = [task.member for task in plan if task.member]
    for member in [*every, *(one for name in plan.zoo for one in plan.zoo.versions(name.name))]:
        if member.digest and member.kind not in ("dataset", "table", "group"):
            known.setdefault(member.digest, member)
    for member in every:
        names.setdefault(member.digest, []).append(member.name)
    places: dict[str, int] = {}
    nodes: list[Node] = []
    ranks: dict[str, tuple[int, tuple[str, ...]]] = {}

    def visit(member: Member, open_: frozenset[str]) -> int | None:
        if member.digest in open_:  # its own ancestor only by name: the same bytes came out again
            return None
        if member.digest not in places:
            above = []
            for role, name, digest in _inputs(member):
                up = known.get(digest)
                place = visit(up, open_ | {member.digest}) if up is not None else None
                above.append((role, shown.get(name, name), place))
            rank, called = ranks.get(member.digest, (None, tuple(dict.fromkeys(names.get(member.digest, ())))))
            called = called or (member.name,)
            nodes.append(Node(tuple(shown.get(name, name) for name in called), member, tuple(above), rank))
            places[member.digest] = len(nodes) - 1
        return places[member.digest]

    starts = []
    shown = short_names(plan)
    for rank, row in enumerate(board.rows, start=1):
        with suppress(GlueError):  # what was measured may be gone from the zoo
            member = plan[row.member]
            ranks[member.digest] = rank, (row.member, *row.others)
            starts.append(known.get(member.digest, member))
    for member in starts:
        visit(member, frozenset())
    return nodes


def short_names(plan: Plan) -> dict[str, str]:
    """Names in a plan without the recipe they come from, where that leaves no doubt."""
    names = [task.name for task in plan]
    cut = [name.partition("/")[2] or name for name in names]
    return {name: short for name, short in zip(names, cut, strict=True) if cut.count(short) == 1}


def _plainly(candidate: str, shown: dict[str, str]) -> str:
    """A candidate in words, with the short names of its members."""
    return " ".join(shown.get(word, word) for word in candidate.split(" "))


def _inputs(member: Member) -> Iterator[tuple[str, str, str]]:
    """(role, name, digest) of everything that went into a member."""
    if member.origin is None:
        if member.base is not None:
            yield "base", member.base.name, member.base.digest
        return
    for role, digests in member.origin.inputs.items():
        told = member.origin.names.get(role, ())
        for k, digest in enumerate(digests):
            yield role, told[k] if k < len(told) else digest[:8], digest
