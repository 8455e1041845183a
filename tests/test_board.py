"""Boards: rows, intervals, claims and the closing line, from scores that are written down beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glue.board import leaderboard, of_suite
from glue.errors import GlueError
from glue.member import Member, Origin, Score, Table, canonical
from glue.plan import Plan, Task
from glue.recipe import read_recipe
from glue.report.markdown import markdown
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
        table.mkdir(exist_ok=True)
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


def test_ranks_and_leaders_are_those_of_the_statistics_and_least_is_told(plan):
    board = leaderboard(plan(shares(0.8, 0.5)))
    assert [row.rank[:] for row in board.rows] == [(1, 1, 1), (2, 2, 2)]
    assert board.sure.leaders == ("good",) and 0.05 < board.sure.least < 0.15
    close = leaderboard(plan(shares(0.51, 0.50)))
    assert [row.rank[:] for row in close.rows] == [(1, 1, 2), (2, 1, 2)]
    assert "better than good, fair;" in str(close.sure)


def test_members_with_other_items_have_no_ranks(plan):
    results = shares(0.8, 0.5)
    results["fair"] = results["same"] = {"a": results["fair"]["a"][:150], "b": results["fair"]["b"]}
    with pytest.raises(GlueError, match="200 and on 150 items"):
        leaderboard(plan(results))  # its claims compare them
    board = leaderboard(plan(results, RECIPE.split("  claims")[0].replace("  headline: good\n", "")))
    assert board.sure is None and all(row.rank is None for row in board.rows)
    assert "| 1 | good |" in "\n".join(markdown(board))


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., Zoo]:
    """A zoo in whose store lie these scores: (member, digest, task, results, split, how)."""
    def make(*told: tuple[str, str, str, list[float], str, str], members: str = "{}") -> Zoo:
        (tmp_path / "zoo").mkdir()
        (tmp_path / "zoo.yaml").write_text(f"members: {members}\n")
        lines = [Score(name, digest, "s:test", task, "acc", tuple(results), split, how).as_dict()
                 for name, digest, task, results, split, how in told]
        (tmp_path / "zoo/scores.jsonl").write_text("".join(canonical(line) + "\n" for line in lines))
        return Zoo(tmp_path / "zoo.yaml")
    return make


def test_a_suites_board_compares_only_like_with_like_and_tells_who_is_left_out(scored):
    good, bad = [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]
    board = of_suite(scored(("a", "1", "t", good, "x", "h"), ("b", "2", "t", bad, "x", "h"),
                            ("c", "3", "t", good, "other items", "h"), ("b", "2", "t", good, "x", "other shots"),
                            ("a", "1", "u", good, "x", "h"), ("b", "2", "u", good, "x", "h"),
                            ("a", "1", "only a", good, "x", "h")), "s:test")
    assert [(row.member, row.tasks) for row in board.rows] == [("a@1", {"t": 0.75, "u": 0.75}),
                                                               ("b@2", {"t": 0.25, "u": 0.75})]
    assert board.notes == ("t: c left out, measured on other items or in another way",
                           "tasks left out, which fewer members have: only a", "c left out, not measured on all tasks")
    assert [row.rank.value for row in board.rows] == [1, 2]


def test_a_suite_in_points_above_chance_is_counted_as_its_file_says(scored, tmp_path):
    file = tmp_path / "benchmarks/suites/s.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("""normalised: true
tasks:
  x1: {task: one, metric: acc, chance: 0.5, num_fewshot: 0, under: x}
  x2: {task: two, metric: acc, chance: 0.25, num_fewshot: 0, under: x}
  y:  {task: three, metric: acc, chance: 0.0, num_fewshot: 0}
""")
    right = {"x1": [1.0] * 90 + [0.0] * 10, "x2": [1.0] * 40 + [0.0] * 60, "y": [1.0] * 30 + [0.0] * 70}
    wrong = {"x1": [1.0] * 40 + [0.0] * 60, "x2": [1.0] * 25 + [0.0] * 75, "y": [0.0] * 100}
    board = of_suite(scored(*((name, name, task, results, "i", "h") for name, some in (("a", right), ("b", wrong))
                              for task, results in some.items())), "s:test")
    first, last = board.rows
    assert first.mean.value == pytest.approx(((0.4 / 0.5 + 0.15 / 0.75) / 2 + 0.3) / 2)
    assert last.mean[:2] == (0.0, 0.0) and 0 < last.mean.high < 0.1  # below chance counts as chance
    assert first.rank[:] == (1, 1, 1) and "points above chance" in "\n".join(markdown(board))


def test_a_suite_nobody_was_measured_on_is_told_with_the_nearest(scored):
    with pytest.raises(GlueError, match="nobody was measured on 's:tset'.*s:test"):
        of_suite(scored(("a", "1", "t", [1.0, 0.0], "x", "h")), "s:tset")


def test_names_of_others_end_no_cell_of_markdown(plan):
    results = shares(0.8, 0.5)
    text = RECIPE.split("board:")[0] + "board: {table: scored}\n"
    board = leaderboard(plan({name: {"a|b": row["a"], "c": row["b"]} for name, row in results.items()}, text))
    assert len({line.replace("\\|", "").count("|") for line in markdown(board) if line.startswith("|")}) == 1


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
