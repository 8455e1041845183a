"""Boards: tables of scores as a leaderboard with intervals, in a terminal or as Markdown. Reads, never runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from glue.errors import RecipeError
from glue.evaluate.statistics import Interval, average, difference
from glue.member import Member, Score, Table
from glue.plan import Plan

SEARCH_NOTE = "search.json"


@dataclass(frozen=True)
class Row:
    """One member on a board. `tasks` are shares of 1 by task, `mean` their unweighted mean with its interval."""

    member: str
    kind: str
    mean: Interval
    tasks: dict[str, float]
    seen: bool
    results: dict[str, np.ndarray]


@dataclass(frozen=True)
class Claim:
    """A sentence about two members, and whether it holds: the 95 % interval of the difference lies above 0."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Leaderboard:
    """Rows from best to worst, the claims of the recipe, and one closing line."""

    title: str
    items: int
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    headline: str

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)


def leaderboard(plan: Plan) -> Leaderboard:
    """The board that a recipe asks for, from the table it has made. Raises RecipeError where it asks for none."""
    asked = plan.recipe.board
    if asked is None:
        raise RecipeError(f"{plan.recipe.file} shows no board", fix="add  board: {table: NAME of an evaluate line}")
    table = plan[asked.table]
    rows = rows_of(Table.read(table), plan.recipe.name, {member.name: member.kind for member in plan.zoo})
    by_name = {row.member: row for row in rows}
    claims = tuple(_claim(plan, claim, by_name) for claim in asked.claims)
    first = next((claim for claim in asked.claims if claim.get("better") == asked.headline), None)
    headline = ""
    if first is not None:
        better, than = _row(plan, first["better"], by_name), _row(plan, first["than"], by_name)
        gap = difference(better.results, than.results)
        headline = (f"{better.member} beats {than.member} by {_points(gap)} points "
                    f"({better.mean.value:.1%} against {than.mean.value:.1%}, {_items(better)} test items)")
        if gap.low <= 0:
            headline = f"{better.member} does not clearly beat {than.member}: {_points(gap)} points"
    title = f"{plan.recipe.name}: {table.note}"
    return Leaderboard(title, _items(rows[0]), rows, claims, headline)


def rows_of(table: Table, recipe: str, kinds: dict[str, str]) -> tuple[Row, ...]:
    """Scores as rows, best first; names lose the recipe they come from."""
    by_member: dict[str, list[Score]] = {}
    for score in table.rows:
        by_member.setdefault(score.member, []).append(score)
    rows = []
    for name, scores in by_member.items():
        results = {score.task: np.asarray(score.results) for score in scores}
        rows.append(Row(_shown(name, recipe), kinds.get(name, ""), average(results),
                        {score.task: score.value for score in scores}, any(s.seen_by_search for s in scores), results))
    return tuple(sorted(rows, key=lambda row: (-row.mean.value, row.member)))


def _claim(plan: Plan, claim: dict[str, str], rows: dict[str, Row]) -> Claim:
    if "refused" in claim:
        refused, by = plan[claim["refused"]], plan[claim["by"]]
        weights = json.loads((by.folder / SEARCH_NOTE).read_text())
        taken = refused.name in weights["weights"]
        verb = "took in" if taken else "refused"
        return Claim(f"{_shown(by.name, plan.recipe.name)} {verb} {refused.short}", not taken)
    better, than = _row(plan, claim["better"], rows), _row(plan, claim["than"], rows)
    gap = difference(better.results, than.results)
    return Claim(f"{better.member} - {than.member}: {_points(gap)}", gap.low > 0)


def _row(plan: Plan, word: str, rows: dict[str, Row]) -> Row:
    member: Member = plan[word]
    shown = _shown(member.name, plan.recipe.name)
    if shown not in rows:
        raise RecipeError(f"the board has no row '{shown}'", place=plan.recipe.board and plan.recipe.board.place,
                          fix=f"add {word} to the members of the line '{plan.recipe.board and plan.recipe.board.table}'")
    return rows[shown]


def _shown(name: str, recipe: str) -> str:
    return name.removeprefix(f"{recipe}/")


def _points(gap: Interval) -> str:
    return f"{gap.value * 100:+.1f} [{gap.low * 100:+.1f}, {gap.high * 100:+.1f}]"


def _items(row: Row) -> int:
    return sum(len(results) for results in row.results.values())


def markdown(board: Leaderboard) -> Iterator[str]:
    """The board as lines of Markdown."""
    tasks = list(board.rows[0].tasks)
    yield f"### {board.title}"
    yield ""
    yield f"| member | kind | mean of tasks, 95 % interval | {' | '.join(tasks)} |"
    yield f"|---|---|---|{'---|' * len(tasks)}"
    for row in board.rows:
        seen = " (searched on these items)" if row.seen else ""
        mean = f"**{row.mean.value * 100:.1f}** [{row.mean.low * 100:.1f}, {row.mean.high * 100:.1f}]"
        yield f"| {row.member}{seen} | {row.kind} | {mean} | " + \
            " | ".join(f"{row.tasks[task] * 100:.0f}" for task in tasks) + " |"
    if board.claims:
        yield ""
        yield "Differences on the same items, in points, with paired 95 % intervals:"
        yield ""
    for claim in board.claims:
        yield f"- {'holds' if claim.holds else 'DOES NOT HOLD'}: {claim.text}"
    if board.headline:
        yield ""
        yield board.headline
