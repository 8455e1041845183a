"""Boards: rows, intervals, claims and the closing line, from scores that are written down beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glue.board import leaderboard, markdown
from glue.errors import GlueError
from glue.member import Member, Origin, Score, Table
from glue.plan import Plan, Task
from glue.recipe import read_recipe
from glue.show.boards import board_data
from glue.zoo import Zoo

RECIPE = """
steps:
  - {as: good, step: data, skill: kind, train: 1}
  - {as: fair, step: data, skill: kind, train: 2}
  - {as: same, step: data, skill: kind, train: 3}
  - {as: scored, step: data, skill: kind, train: 4}
board:
  table: scored
  headline: good
  claims: [{better: good, than: fair}, {better: fair, than: same}, {refused: fair, by: good}]
"""


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    """A finished plan whose table holds the given results, member -> task -> items."""
    def make(results: dict[str, dict[str, list[float]]], text: str = RECIPE, seen: bool = False) -> Plan:
        (tmp_path / "zoo.yaml").write_text("members: {}\n")
        (tmp_path / "r.yaml").write_text(text)
        rows = [Score(f"r/{name}", {"same": "fair"}.get(name, name) * 8, "s:test", task, "acc", tuple(items), "d", "h",
                      seen_by_search=seen) for name, tasks in results.items() for task, items in tasks.items()]
        table = tmp_path / "table"
        table.mkdir()
        Table(tuple(rows)).write(table)
        recipe, tasks = read_recipe(tmp_path / "r.yaml"), []
        for line in recipe.lines:
            path = table if line.name == "scored" else tmp_path
            member = Member(line.product, "table" if line.name == "scored" else "model", str(path),
                            origin=Origin("x/1", {}, {}, 0), digest={"same": "fair"}.get(line.name, line.name) * 8)
            tasks.append(Task(line.product, line, line.step, member.kind, "done", member=member))
        return Plan(recipe, Zoo(tmp_path / "zoo.yaml"), tuple(tasks))
    return make


def shares(good: float, fair: float, items: int = 200) -> dict[str, dict[str, list[float]]]:
    def row(share: float, shift: int) -> list[float]:
        return list(np.random.default_rng(shift).permutation(np.arange(items) < share * items).astype(float))
    one = {"good": {"a": row(good, 3), "b": row(good, 9)}, "fair": {"a": row(fair, 5), "b": row(fair, 7)}}
    return {**one, "same": one["fair"]}


def test_rows_stand_from_best_to_worst_and_one_member_is_one_row(plan):
    board = leaderboard(plan(shares(0.8, 0.5)))
    assert [(row.member, row.others) for row in board.rows] == [("good", ()), ("fair", ("same",))]
    assert [round(row.mean.value, 3) for row in board.rows] == [0.8, 0.5]
    assert all(row.mean.low < row.mean.value < row.mean.high for row in board.rows)


def test_a_claim_holds_only_with_its_whole_interval_above_zero(plan):
    board = leaderboard(plan(shares(0.8, 0.5)))
    assert [claim.holds for claim in board.claims] == [True, False, True]
    assert board.headline.startswith("good beats fair by +30.0 [+2")
    assert "80.0% against 50.0% on 400 items" in board.headline
    assert not board.holds


def test_a_difference_within_noise_is_told_as_such(plan):
    board = leaderboard(plan(shares(0.52, 0.50)))
    assert not board.claims[0].holds and "does not clearly beat" in board.headline


def test_items_that_a_search_has_seen_are_marked(plan):
    board = leaderboard(plan(shares(0.8, 0.5), seen=True))
    assert all(row.seen for row in board.rows)
    assert "searched on these items" in "\n".join(markdown(board))


def test_markdown_has_a_row_for_each_member_and_a_line_for_each_claim(plan):
    lines = list(markdown(leaderboard(plan(shares(0.8, 0.5)))))
    assert sum(line.startswith("| ") for line in lines) == 3
    assert sum(line.startswith(("- holds", "- DOES NOT HOLD")) for line in lines) == 3
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1


def test_a_claim_about_a_member_that_was_not_measured_says_so(plan):
    results = {name: row for name, row in shares(0.8, 0.5).items() if name == "good"}
    with pytest.raises(GlueError, match="the board has no row 'fair'"):
        leaderboard(plan(results))


def test_a_recipe_without_a_board_says_how_to_get_one(plan):
    with pytest.raises(GlueError, match="shows no board"):
        leaderboard(plan(shares(0.8, 0.5), RECIPE.split("board:")[0]))


def test_a_board_for_machines_has_every_number(plan):
    data = board_data(leaderboard(plan(shares(0.8, 0.5))))
    assert data["rows"][0]["member"] == "good" and data["rows"][0]["tasks"] == {"a": 0.8, "b": 0.8}
    assert [claim["holds"] for claim in data["claims"]] == [True, False, True]
