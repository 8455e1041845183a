"""The table of claims: it is what claims and results give, verdicts follow one rule, and claims name what exists."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.reproduction import __main__ as command
from benchmarks.reproduction.claims import Claim, Paper, Show
from benchmarks.reproduction.exists import missing, recipe_file
from benchmarks.reproduction.measure import Measured, measure
from benchmarks.reproduction.page import markdown, verdict_of
from benchmarks.reproduction.reading import read_claims
from benchmarks.reproduction.results import noted, read_results, write_results
from benchmarks.reproduction.verdict import opposed, verdict
from glue.errors import GlueError, Place
from glue.evaluate.statistics import Interval, difference
from glue.member import Element, Member, Origin, Score, Table
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.steps.search import SEARCH_NOTE
from glue.zoo import Zoo

PAPERS = read_claims(command.CLAIMS)
CLAIMS = [claim for paper in PAPERS for claim in paper.claims]
ABOVE, REACHES, BELOW, CLEARLY_BELOW = (Interval(*ends) for ends in (
    (0.02, 0.01, 0.03), (0.02, -0.01, 0.05), (-0.01, -0.03, 0.01), (-0.05, -0.07, -0.03)))
HERE = Place("claims.yaml", 7, 13)
BETTER = Show("quickstart", "scores", (("glued",), ("best-single",)), HERE)


def claim(*shows: Show, **more: str) -> Claim:
    return Claim("paper/key", "One does better.", "read", shows, **{"why_not": "", "waits_for": "", "note": "", **more})


def page(one: Claim, results=None) -> str:
    return markdown([Paper("paper", "A paper", "arXiv:1", "", "", (one,))], results or {})


# -- the page, and what claims name --

def test_the_page_is_what_claims_and_results_give():
    text = command.PAGE.read_text(encoding="utf-8")
    assert text == markdown(PAPERS, read_results(command.RESULTS)), "run  python -m benchmarks.reproduction table"


def test_every_claim_has_one_row_and_every_verdict_is_one_of_four():
    rows = [line for line in command.PAGE.read_text(encoding="utf-8").splitlines() if line.endswith("|")]
    for one in CLAIMS:
        row, = (line for line in rows if line.startswith(f"| {one.says} *{one.known}* |"))
        assert f"**{verdict_of(one, read_results(command.RESULTS))}**" in row.rsplit(" | ", 1)[1]


def test_every_claim_that_names_a_recipe_names_members_which_its_plan_has(tmp_path):
    assert missing(PAPERS, command.ROOT) == []
    (tmp_path / "zoo.yaml").write_text("members: {}\ninclude: zoo/members.yaml\n")
    (tmp_path / "benchmarks").symlink_to(command.ROOT / "benchmarks")
    shows = [show for one in CLAIMS for show in one.shows]
    for name in {show.recipe for show in shows}:
        plan = make_plan(read_recipe(recipe_file(command.ROOT, name)), Zoo(tmp_path / "zoo.yaml"))
        made = {task.line.name for task in plan}
        named = {word for show in shows if show.recipe == name for words in show.words for word in words}
        assert {part for word in named for part in word.split("/")} <= made


def test_every_claim_was_measured_at_three_seeds_and_by_the_same_members_where_it_names_the_same():
    results = read_results(command.RESULTS)
    assert set(results) == {one.key for one in CLAIMS if one.shows}
    assert {tuple(found) for found in results.values()} == {("0", "7", "14")}
    digests: dict = {}
    for found in results.values():
        for seed, entry in found.items():
            for part in entry["parts"]:
                for word, digest in part["digests"].items():
                    recipe = json.loads(part["asked"])[0]
                    assert digests.setdefault((recipe, seed, word), digest) == digest


def test_what_is_only_recalled_names_no_number_of_the_paper():
    assert [one.key for one in CLAIMS if one.known == "recalled" and re.search(r"\d", one.says)] == []


@pytest.mark.parametrize(("show", "told"), [
    (Show("quickstar", "scores", (("glued",), ("best-single",)), HERE), "there is no recipe 'quickstar'"),
    (Show("quickstart", "scores", (("gleud",), ("best-single",)), HERE), "quickstart has no line 'gleud'; did you"),
    (Show("quickstart", "scores", (("merged",), ("glued",)), HERE), "'merged' is one for each family: say which"),
    (Show("quickstart", "scores", (("merged/A-bose",), ("glued",)), HERE), "quickstart has no member 'A-bose'"),
    (Show("quickstart", "scores", (("glued/A-base",), ("glued",)), HERE), "'glued' is one member, without elements"),
    (Show("selective", "scores", (("greedy",), ("A-chat",)), HERE), "the board of selective has no row 'A-chat'"),
    (Show("quickstart", "answers", (("best-single",), ("average",)), HERE), "made by step merge, and a step search"),
    (Show("quickstart", "families", (("glued",),), HERE), "made by step mix, and a step cluster"),
])
def test_a_claim_about_what_is_not_there_is_told_with_its_line(show, told):
    error, = missing([Paper("paper", "A paper", "arXiv:1", "", "", (claim(show),))], command.ROOT)
    assert told in str(error) and str(error).startswith("claims.yaml:7:13: ")


# -- the rule --

@pytest.mark.parametrize(("found", "said"), [
    ({0: [ABOVE], 7: [ABOVE]}, "holds"),
    ({0: [ABOVE], 7: [REACHES]}, "holds in direction"),
    ({0: [ABOVE, REACHES]}, "holds in direction"),
    ({0: [ABOVE], 7: [BELOW]}, "not shown"),
    ({0: [ABOVE, BELOW], 7: [ABOVE, ABOVE]}, "not shown"),
    ({0: [Interval(0.0, 0.0, 0.0)]}, "not shown"),
    ({0: [Interval(0.0, -0.1, 0.1)]}, "not shown"),
    ({}, "not shown")])
def test_the_verdict_follows_from_the_intervals_of_all_seeds(found, said):
    assert verdict(found) == said


def test_only_an_interval_below_zero_is_clearly_the_other_way():
    assert opposed({0: [BELOW], 7: [ABOVE, CLEARLY_BELOW], 14: [CLEARLY_BELOW]}) == 2


def test_a_claim_without_a_recipe_is_not_shown_and_one_with_a_reason_cannot_be():
    assert "| no recipe yet, for want of proxy tuning | **not shown** |" in page(claim(waits_for="proxy tuning"))
    assert "| It needs a bus. | **cannot be shown here** |" in page(claim(why_not="It needs a bus."))


# -- results --

def results_of(*parts: Interval, show: Show = BETTER) -> dict:
    results: dict = {}
    for seed, part in enumerate(parts):
        measured = Measured(show.asked, part, 1200, {"glued": "d"}, {"torch": "2"})
        noted(results, "paper/key", seed, [measured], "2026-01-01")
    return results


def test_a_row_has_the_interval_of_every_seed_in_points():
    text = page(claim(BETTER), results_of(ABOVE, CLEARLY_BELOW))
    assert ("| [quickstart](../recipes/quickstart.yaml): `glued` - `best-single` | +2.0 [+1.0, +3.0] | "
            "-5.0 [-7.0, -3.0] | **not shown**; clearly the other way at 1 of 2 seeds |") in text
    assert "Last measured 2026-01-01, with torch 2." in text


def test_a_difference_of_a_member_to_itself_is_called_so_and_shows_nothing():
    results: dict = {}
    itself = Measured(BETTER.asked, Interval(0.0, -0.003, 0.003), 1200, {"glued": "d", "best-single": "d"}, {})
    noted(results, "paper/key", 0, [itself], "2026-01-01")
    assert "| 0: the same member | **not shown** |" in page(claim(BETTER), results)


def test_answers_to_another_question_than_the_claim_asks_do_not_count():
    other = Show("quickstart", "scores", (("glued",), ("average",)), HERE)
    assert verdict_of(claim(BETTER), results_of(ABOVE)) == "holds"
    assert verdict_of(claim(other), results_of(ABOVE)) == "not shown"
    assert "**not shown**; not measured yet |" in page(claim(other), results_of(ABOVE))


def test_results_that_are_the_same_again_keep_their_date_and_claims_that_are_gone_are_dropped(tmp_path):
    results = {**results_of(ABOVE), "gone": {}}
    same, new = (Measured(BETTER.asked, part, 1200, {"glued": "d"}, {"torch": "2"}) for part in (ABOVE, REACHES))
    noted(results, "paper/key", 0, [same], "2026-02-02")
    noted(results, "paper/key", 7, [new], "2026-02-02")
    write_results(tmp_path / "results.json", results, ["paper/key"])
    again = read_results(tmp_path / "results.json")
    assert {seed: entry["date"] for seed, entry in again.pop("paper/key").items()} == {"0": "2026-01-01",
                                                                                      "7": "2026-02-02"}
    assert again == {} and read_results(tmp_path / "none.json") == {}


# -- measuring, on made-up products --

@dataclass
class Products:
    """As much of a finished plan as measuring asks for."""

    folder: Path
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def recipe(self):
        return SimpleNamespace(name="made", file="made.yaml", board=SimpleNamespace(table="scored"))

    zoo = None

    def __getitem__(self, word: str) -> Member:
        return self.members[word]

    def __iter__(self):
        return (SimpleNamespace(name=member.name, folder=lambda _, of=member: of.folder)
                for member in self.members.values())

    def add(self, name: str, **more) -> Path:
        folder = self.folder / name
        folder.mkdir()
        self.members[name] = Member(f"made/{name}", "model", str(folder), digest=f"digest of {name}",
                                    origin=Origin("made/1", {}, {}, 0, {}, {"torch": "2"}), **more)
        return folder


@pytest.fixture
def plan(tmp_path) -> Products:
    """Members a, b and c with scores on two tasks, two searches, and a group of two families."""
    found, rng = Products(tmp_path), np.random.default_rng(0)
    scores = []
    for name, right in (("a", 0.9), ("b", 0.5), ("c", 0.4)):
        found.add(name)
        for task, n in (("one", 80), ("two", 40)):
            results = tuple((rng.random(n) < right).astype(float).tolist())
            scores.append(Score(f"made/{name}", f"digest of {name}", "s", task, "acc", results, "split", "how"))
    Table(tuple(scores)).write(found.add("scored"))
    found.add("unscored")
    for name, items in (("quick", 30), ("slow", 120)):
        (found.add(name) / SEARCH_NOTE).write_text(json.dumps({"items": items, "weights": {"made/a": 0.5}}))
    base, stranger = Member("made/base", "model", "x"), Member("made/stranger", "model", "y")
    child, other = Member("made/child", "model", "z", base=base), Member("made/other", "model", "w")
    families = (("base", (base, child)), ("stranger", (stranger,)), ("other", (other,)))
    folder = found.add("families", elements=tuple(Element(name, None, members) for name, members in families))
    alike = [[1, 0.8, 0.1, None], [0.8, 1, 0.3, None], [0.1, 0.3, 1, None], [None, None, None, 1]]
    names = ["made/base", "made/child", "made/stranger", "made/other"]
    (folder / "similarity.json").write_text(json.dumps({"names": names, "similarity": alike}))
    return found


def results(plan: Products, name: str) -> dict[str, np.ndarray]:
    rows = Table.read(plan["scored"]).rows
    return {row.task: np.asarray(row.results) for row in rows if row.member == f"made/{name}"}


def ask(plan: Products, kind: str, *words) -> Measured:
    return measure(Show("made", kind, words, HERE), plan)


def test_scores_are_compared_item_by_item_and_several_on_the_right_are_averaged(plan):
    found = ask(plan, "scores", ("a",), ("b",))
    assert found.found == difference(results(plan, "a"), results(plan, "b")) and found.items == 120
    assert found.digests == {"a": "digest of a", "b": "digest of b"} and found.made == {"torch": "2"}
    two = ask(plan, "scores", ("a",), ("b", "c")).found
    assert two.value == pytest.approx((found.found.value + ask(plan, "scores", ("a",), ("c",)).found.value) / 2)
    assert two.low < two.value < two.high


def test_a_member_that_was_not_scored_is_told_with_the_line_of_the_claim(plan):
    with pytest.raises(GlueError, match=r"claims.yaml:7:13: 'made/unscored' is not on the board of made"):
        ask(plan, "scores", ("a",), ("unscored",))


def test_answers_saved_are_a_share_of_those_of_the_other_search(plan):
    assert ask(plan, "answers", ("quick",), ("slow",)).found == Interval(0.75, 0.75, 0.75)
    assert ask(plan, "answers", ("slow",), ("quick",)).found.value == -3
    with pytest.raises(GlueError, match="'made/a' tells of no search"):
        ask(plan, "answers", ("a",), ("slow",))


def test_what_has_a_weight_in_the_result_was_not_left_out(plan):
    assert ask(plan, "choice", ("b",), ("quick",)).found.value == 1
    assert verdict({0: [ask(plan, "choice", ("a",), ("quick",)).found]}) == "not shown"


def test_the_gap_between_lineages_is_from_the_least_alike_relatives_to_the_most_alike_strangers(plan):
    found = ask(plan, "families", ("families",))
    assert found.found.value == pytest.approx(0.8 - 0.3) and found.items == 3


# -- claims.yaml is read strictly --

GOOD = "p:\n  title: T\n  source: arXiv:1\n  claims:\n    c:\n      says: S.\n      known: read\n"
SHOW = "      show: {recipe: quickstart, better: glued, than: average}\n"


def mistakes(folder: Path, text: str) -> str:
    (folder / "claims.yaml").write_text(text)
    with pytest.raises(GlueError) as wrong:
        read_claims(folder / "claims.yaml")
    return str(wrong.value)


@pytest.mark.parametrize(("text", "told"), [
    (GOOD + SHOW.replace("better", "beter"), "claims.yaml:8:34: what is shown has no key 'beter'; did you mean"),
    (GOOD + SHOW.replace(", than: average", ""), "claims.yaml:8:7: it is not said what is measured"),
    (GOOD + SHOW + "      why_not: X.\n", "claims.yaml:5:5: a claim has one of show, why_not, waits_for; this one has"),
    (GOOD, "claims.yaml:5:5: a claim has one of show, why_not, waits_for; this one has none"),
    (GOOD.replace("read", "reed") + SHOW, "claims.yaml:7:7: 'reed' is no way to know a claim; did you mean 'read'?"),
    (GOOD.replace("      says: S.\n", "") + SHOW, "claims.yaml:5:5: 'says' is missing"),
    (GOOD.replace("title: T", "titel: T") + SHOW, "claims.yaml:2:3: a paper has no key 'titel'; did you mean 'title'?"),
    (GOOD + "      show: []\n", "claims.yaml:8:7: 'show' says nothing"),
    (GOOD + SHOW.replace("average", "7"), "claims.yaml:8:49: 'than' is the name of a member, not 7"),
    (GOOD + SHOW + "  none: X.\n", "claims.yaml:1:1: a paper has either 'claims' or 'none'"),
    ("p: 3\n", "claims.yaml:1:1: a paper is a mapping"),
])
def test_a_wrong_word_is_refused_with_its_line_and_column(tmp_path, text, told):
    assert told in mistakes(tmp_path, text)


def test_all_mistakes_are_told_at_once(tmp_path):
    told = mistakes(tmp_path, GOOD.replace("read", "reed").replace("title", "titel") + SHOW.replace("better", "beter"))
    assert [line.split(":")[1] for line in told.splitlines() if line.startswith("claims.yaml")] == ["2", "1", "7", "8"]


def test_several_things_can_be_shown_and_several_averaged(tmp_path):
    (tmp_path / "claims.yaml").write_text(GOOD + "      show:\n        - {recipe: r, better: a, than: [b, c]}\n"
                                          "        - {recipe: r, families: d}\n")
    paper, = read_claims(tmp_path / "claims.yaml")
    assert [(show.measure, show.words) for show in paper.claims[0].shows] == [
        ("scores", (("a",), ("b", "c"))), ("families", (("d",),))]
    assert paper.claims[0].key == "p/c" and paper.claims[0].shows[1].place.line == 10


# -- the command --

def test_a_page_that_is_out_of_date_is_told_and_then_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "missing", lambda papers, root: [])
    (tmp_path / "page.md").write_text("old")
    assert command.main(["table", "--check"]) == 1 and (tmp_path / "page.md").read_text() == "old"
    assert command.main(["table"]) == 0 and command.main(["table", "--check"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "page.md is out of date; run  python -m benchmarks.reproduction table", "page.md written"]


def test_a_check_fails_where_a_recipe_of_a_claim_is_gone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert command.main(["table", "--check"]) == 2
    assert "there is no recipe 'quickstart'" in capsys.readouterr().err
