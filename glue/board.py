"""Boards: tables of scores as a leaderboard with intervals, in a terminal or as Markdown. Reads, never runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from glue.errors import GlueError, RecipeError
from glue.evaluate.statistics import Interval, average, difference
from glue.kinds.size import Size, size
from glue.member import Member, Score, Table
from glue.plan import Plan
from glue.steps.evaluate import SPEED_NOTE
from glue.steps.search import SEARCH_NOTE


@dataclass(frozen=True)
class Row:
    """One member on a board.

    tasks   shares of 1 by task          mean  their unweighted mean with its interval
    others  further names of the same member: what a search found may be a member as it is
    size    its parameters, and pace, tokens a second, where the table was made with  speed: true
    """

    member: str
    others: tuple[str, ...]
    kind: str
    mean: Interval
    tasks: dict[str, float]
    seen: bool
    results: dict[str, np.ndarray]
    size: Size | None = None
    pace: float | None = None


@dataclass(frozen=True)
class Claim:
    """A sentence about two members, and whether it holds: the 95 % interval of the difference lies above 0."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Searched:
    """What a search came to for what it cost.

    items  how many answers it asked for, over all of its candidates
    found  what its result scored where it searched; `mean` is what that scores on the board
    """

    name: str
    items: int
    candidates: int
    found: float
    mean: Interval


@dataclass(frozen=True)
class Leaderboard:
    """Rows from best to worst, the claims of the recipe, one closing line, and its searches, the cheapest first."""

    title: str
    items: int
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    headline: str
    searches: tuple[Searched, ...] = ()

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)


def leaderboard(plan: Plan) -> Leaderboard:
    """The board that a recipe asks for, from the table it has made. Raises RecipeError where it asks for none."""
    asked = plan.recipe.board
    if asked is None:
        raise RecipeError(f"{plan.recipe.file} shows no board", fix="add  board: {table: NAME of an evaluate line}")
    table = plan[asked.table]
    rows = rows_of(table, plan)
    by_name = {name: row for row in rows for name in (row.member, *row.others)}
    claims = tuple(_claim(plan, claim, by_name) for claim in asked.claims)
    first = next((claim for claim in asked.claims if claim.get("better") == asked.headline), None)
    headline = ""
    if first is not None:
        better, than = _row(plan, first["better"], by_name), _row(plan, first["than"], by_name)
        gap = difference(better.results, than.results)
        of = f" ({than.member})" if first["than"] != than.member else ""
        verb, by = ("beats", " by") if gap.low > 0 else ("does not clearly beat", ":")
        headline = (f"{first['better']} {verb} {first['than']}{of}{by} {_points(gap)} points: "
                    f"{better.mean.value:.1%} against {than.mean.value:.1%} on {_items(better)} items")
    title = f"{plan.recipe.name}: {table.note}"
    return Leaderboard(title, _items(rows[0]), rows, claims, headline, _searches(plan, by_name))


def plain(plan: Plan, table: Member) -> Leaderboard:
    """The rows of a table that no recipe says anything about."""
    rows = rows_of(table, plan)
    return Leaderboard(table.note, _items(rows[0]), rows, (), "")


def rows_of(table: Member, plan: Plan) -> tuple[Row, ...]:
    """Scores as rows, best first; the same member under several names is one row."""
    by_digest: dict[str, dict[str, list[Score]]] = {}
    paces = json.loads(note.read_text()) if (note := table.folder / SPEED_NOTE).exists() else {}
    for score in Table.read(table).rows:
        by_digest.setdefault(score.digest, {}).setdefault(score.member, []).append(score)
    known = {member.name: member for member in plan.zoo}
    rows = []
    for digest, by_name in by_digest.items():
        # its own name is the one from outside this recipe, where it has one
        names = sorted(by_name, key=lambda name: name.startswith(f"{plan.recipe.name}/"))
        scores = by_name[names[0]]
        results = {score.task: np.asarray(score.results) for score in scores}
        seen = any(score.seen_by_search for some in by_name.values() for score in some)
        shown = [_shown(name, plan) for name in names]
        member = known.get(names[0])
        rows.append(Row(shown[0], tuple(shown[1:]), member.kind if member else "", average(results),
                        {score.task: score.value for score in scores}, seen, results,
                        _size(member) if paces and member else None, paces.get(digest)))
    return tuple(sorted(rows, key=lambda row: (-row.mean.value, row.member)))


def _size(member: Member) -> Size | None:
    """How large a member is; None where its files are gone."""
    with suppress(GlueError):
        return size(member)
    return None


def _searches(plan: Plan, rows: dict[str, Row]) -> tuple[Searched, ...]:
    """The searches of a plan whose results are on its board."""
    found = []
    for task in plan:
        name = _shown(task.name, plan)
        note = task.folder(plan.zoo) / SEARCH_NOTE if task.step == "search" and task.origin else None
        if note is not None and name in rows and note.exists():  # a family of one was not searched
            told = json.loads(note.read_text())
            if "items" in told:  # else it was made before they were counted
                found.append(Searched(name, told["items"], told["evaluated"], told["value"], rows[name].mean))
    return tuple(sorted(found, key=lambda search: (search.items, -search.mean.value)))


def _claim(plan: Plan, claim: dict[str, str], rows: dict[str, Row]) -> Claim:
    if "refused" in claim:
        refused, by = plan[claim["refused"]], plan[claim["by"]]
        log = by.folder / SEARCH_NOTE
        taken = refused.name in json.loads(log.read_text())["weights"] if log.exists() else refused.digest == by.digest
        verb = "took in" if taken else "refused"
        return Claim(f"{_shown(by.name, plan)} {verb} {_shown(refused.name, plan)}", not taken)
    better, than = _row(plan, claim["better"], rows), _row(plan, claim["than"], rows)
    gap = difference(better.results, than.results)
    return Claim(f"{claim['better']} - {claim['than']}: {_points(gap)}", gap.low > 0)


def _row(plan: Plan, word: str, rows: dict[str, Row]) -> Row:
    member: Member = plan[word]
    shown = _shown(member.name, plan)
    if shown not in rows:
        asked = plan.recipe.board
        assert asked is not None
        raise RecipeError(f"the board has no row '{shown}'", place=asked.place,
                          fix=f"add {word} to the members of the line '{asked.table}'")
    return rows[shown]


def _shown(name: str, plan: Plan) -> str:
    """A name without the recipe it comes from, as the lines of this recipe write it."""
    recipe, _, short = name.partition("/")
    recipes = {line.recipe for line in plan.recipe.lines}
    taken = [line for line in plan.recipe.lines if line.name == short and line.recipe != recipe]
    return short if recipe in recipes and not taken else name


def _points(gap: Interval) -> str:
    return f"{gap.value * 100:+.1f} [{gap.low * 100:+.1f}, {gap.high * 100:+.1f}]"


def _items(row: Row) -> int:
    return sum(len(results) for results in row.results.values())


def costs(board: Leaderboard) -> dict[str, Callable[[Row], str]]:
    """Columns about what members cost, where that was measured: heading -> what a row says."""
    found: dict[str, Callable[[Row], str]] = {}
    if any(row.size for row in board.rows):
        found["parameters"] = lambda row: f"{row.size.whole / 1e6:,.1f}M" if row.size else ""
        found["active"] = lambda row: f"{row.size.active / 1e6:,.1f}M" if row.size else ""
    if any(row.pace for row in board.rows):
        found["tokens/s"] = lambda row: f"{row.pace:,.0f}" if row.pace else ""
    return found


def markdown(board: Leaderboard) -> Iterator[str]:
    """The board as lines of Markdown."""
    tasks = list(board.rows[0].tasks)
    yield f"### {board.title}"
    yield ""
    more = costs(board)
    yield f"| member | type | mean of tasks, 95 % interval | {' | '.join([*tasks, *more])} |"
    yield f"|---|---|---|{'---|' * (len(tasks) + len(more))}"
    for row in board.rows:
        seen = " (searched on these items)" if row.seen else ""
        mean = f"**{row.mean.value * 100:.1f}** [{row.mean.low * 100:.1f}, {row.mean.high * 100:.1f}]"
        others = f" = {' = '.join(row.others)}" if row.others else ""
        yield f"| {row.member}{others}{seen} | {row.kind} | {mean} | " + \
            " | ".join([*(f"{row.tasks[task] * 100:.0f}" for task in tasks),
                        *(tell(row) for tell in more.values())]) + " |"
    if board.searches:
        yield ""
        yield "| search | answers asked for | candidates | where it searched | here |"
        yield "|---|---|---|---|---|"
    for search in board.searches:
        mean = f"**{search.mean.value * 100:.1f}** [{search.mean.low * 100:.1f}, {search.mean.high * 100:.1f}]"
        yield f"| {search.name} | {search.items} | {search.candidates} | {search.found * 100:.1f} | {mean} |"
    if board.claims:
        yield ""
        yield "Differences on the same items, in points, with paired 95 % intervals:"
        yield ""
    for claim in board.claims:
        yield f"- {'holds' if claim.holds else 'DOES NOT HOLD'}: {claim.text}"
    if board.headline:
        yield ""
        yield board.headline
