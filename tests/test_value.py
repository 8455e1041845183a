"""Values of clients and of members: the mean over all orders, with intervals, and whoever harms is below nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import permutations
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glue.board import plain
from glue.errors import GlueError
from glue.evaluate.suite import Suite, Task, parse
from glue.family import Choice, families
from glue.federate.rounds import State
from glue.identity import identify
from glue.kinds import load
from glue.member import Member, Table
from glue.merge.write import write
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.refine.shapley import shapley
from glue.refine.subsets import counts
from glue.report.values import read, table
from glue.run import run
from glue.steps import Job, Measured, _games
from glue.steps._games import Answers, Folded, Merged, Worth, game_of_members, game_of_updates, macro, worth
from glue.steps._server import Server
from glue.steps.value import JOURNAL, NOTE, updates_of
from glue.workers import Workers
from glue.zoo import Zoo

TASKS = (30, 50)  # items of the two tasks of the fake game


class FakeSuite:
    """As much of a suite as a game needs."""

    def items(self) -> dict[str, list[int]]:
        return {str(k): [0] * count for k, count in enumerate(TASKS)}


@dataclass
class Fake:
    """Players who know some of the items, or spoil some; an item is right if somebody knows it and nobody spoils it.

    played  the subsets that were asked, in order
    """

    knows: dict[str, set[int]]
    spoils: dict[str, set[int]]

    def __post_init__(self) -> None:
        self.players, self.suite, self.played = tuple(self.knows), FakeSuite(), []

    def results(self, subset: frozenset[int], by: str) -> np.ndarray:
        self.played.append(subset)
        some = [self.players[k] for k in subset]
        right = set().union(*(self.knows[name] for name in some)) - set().union(
            *(self.spoils.get(name, set()) for name in some))
        return np.isin(np.arange(sum(TASKS)), list(right)).astype(float)


def fake(n: int = 4) -> Fake:
    rng = random.Random(n)
    knows = {f"p{k}": set(rng.sample(range(80), 25)) for k in range(n)}
    return Fake({**knows, "null": set(), "noise": set(rng.sample(range(80), 5)), "twin": knows["p0"]},
                {"noise": set(range(0, 80, 3))})


def valued(game: Fake, file: Path, **how: Any) -> Worth:
    return worth(game, "score", Workers(0), Answers(file, game.players), **how)


def brute(game: Fake) -> np.ndarray:
    """The mean over all orders, one by one."""
    n = len(game.players)
    value = {subset: macro(game.results(subset, "score"), TASKS) for subset in
             {frozenset(order[:k]) for order in permutations(range(n)) for k in range(n + 1)}}
    total = np.zeros(n)
    for order in permutations(range(n)):
        for k, player in enumerate(order):
            total[player] += value[frozenset(order[:k + 1])] - value[frozenset(order[:k])]
    return total / factorial(n)


# -- numbers --

def test_values_are_the_mean_over_all_orders(tmp_path: Path):
    found = valued(fake(), tmp_path / "j")
    assert found.valued.exact and found.valued.fits == 2 ** 7
    assert found.valued.mean == pytest.approx(brute(fake()), abs=1e-12)
    assert found.valued.mean.sum() == pytest.approx(found.value(frozenset(range(7))) - found.value(frozenset()))
    by_name = dict(zip(found.players, found.valued.mean, strict=True))
    assert by_name["null"] == pytest.approx(0, abs=1e-15) and by_name["twin"] == pytest.approx(by_name["p0"], abs=1e-15)
    assert min(by_name, key=by_name.__getitem__) == "noise" and by_name["noise"] < 0
    rows = found.told()
    assert rows[-1]["player"] == "noise" and rows[-1]["high"] < 0
    assert {row["player"]: row["last"] for row in rows}["twin"] == 0  # beside its twin it adds nothing


def test_each_item_has_values_whose_mean_is_that_of_all(tmp_path: Path):
    for n, how in ((4, {}), (10, {"chains": 6}), (10, {"chains": 6, "most": 40})):
        found = valued(fake(n), tmp_path / f"{n}-{len(how)}", **how)
        assert found.valued.exact == (n == 4)
        assert [macro(row, TASKS) for row in found.items] == pytest.approx(found.valued.mean.tolist(), abs=1e-12)
    assert found.valued.fits <= 40
    subsets = list(found.valued.values)
    values = np.array([found.valued.values[subset] for subset in subsets])
    again = shapley(13, lambda some: [found.valued.values[one] for one in some], chains=6, most=40)
    assert counts(13, subsets, exact=False, chains=6, most=40) @ values == pytest.approx(again.mean, abs=1e-12)


def test_intervals_hold_what_other_items_would_say():
    """Two halves of a game are drawn alike: the value on one is off that on the other as the errors say."""
    rng = np.random.default_rng(0)
    away = []
    for _ in range(300):
        chances = rng.uniform(0.2, 0.8, 3)
        tables = {subset: (rng.random((2, 80)) < np.mean([chances[k] for k in subset] or [0.5])).astype(float)
                  for subset in (frozenset(k for k in range(3) if mask >> k & 1) for mask in range(8))}
        halves = [Worth(("a", "b", "c"), None, {}, counts(3, list(tables), exact=True) @ np.stack(
            [two[side] for two in tables.values()]), TASKS) for side in (0, 1)]
        gap = np.array([macro(row, TASKS) for row in halves[0].items]) - [macro(row, TASKS) for row in halves[1].items]
        away += (gap / np.hypot(halves[0].error, halves[1].error)).tolist()
    assert np.mean(np.abs(away) < 1.96) == pytest.approx(0.95, abs=0.025)


def test_what_was_played_is_not_played_again(tmp_path: Path):
    file, game = tmp_path / "j", fake()
    whole = valued(fake(), tmp_path / "other")

    class Struck(Exception):
        pass

    class Breaks(Workers):
        def map(self, target, calls, *, report=None, each=None):
            def told(k, result):
                each(k, result)
                if len(game.played) == 20:
                    raise Struck
            return super().map(target, calls, report=report, each=told)

    with pytest.raises(Struck):
        worth(game, "score", Breaks(0), Answers(file, game.players))
    with open(file, "a") as stream:
        stream.write('{"players": ["p0"], "resu')  # torn by the kill
    found = valued(game, file)
    assert len(game.played) == len(set(game.played)) == 2 ** 7
    assert found.told() == whole.told()


# -- members and clients --

WORDS = [f"w{k}" for k in range(12)]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 16}
NAMES = ("ones", "twos", "noise")


def lines(word: str, count: int, *, start: int = 0, shuffled: bool = False) -> str:
    """What follows a word is the next one, or with `shuffled` any."""
    rng = random.Random(f"{word}{start}")
    told = []
    for k in range(start, start + count):
        at = k % 12
        answer = WORDS[rng.randrange(12) if shuffled else (at + (1 if word == "a" else 5)) % 12]
        choices = rng.sample([one for one in WORDS if one != answer], 3) + [answer]
        told.append(json.dumps({"question": f"{word} {WORDS[at]} =", "choices": choices, "gold": 3,
                                "answer": answer}) + "\n")
    return "".join(told)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two datasets with a rule each, one without, and a base that has seen all of them."""
    from glue.tune.pretrain import pretrain

    folder = tmp_path_factory.mktemp("value")
    torch.set_num_threads(1)
    for name in NAMES:
        (folder / name).mkdir()
        for split in ("train", "dev"):
            (folder / name / f"{split}.jsonl").write_text(
                "".join(lines(word, 24, start=24 * (split == "dev"), shuffled=name == "noise")
                        for word in {"ones": "a", "twos": "b", "noise": "ab"}[name]))
    some = [(folder / name, share) for name, share in zip(NAMES, (1.0, 1.0, 2.0), strict=True)]
    pretrain(folder / "base", data=some, vocabulary=[path for path, _ in some], architecture=SHAPE, steps=300,
             batch_size=16, learning_rate=3e-3, seed=0, report=lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def base(place) -> Member:
    return Member("base", "model", str(place / "base"), digest=identify(place / "base")[1])


def datasets(place: Path) -> dict[Member, float]:
    return {Member(name, "dataset", str(place / name), digest=identify(place / name)[1]): 1.0 for name in NAMES}


@pytest.fixture(scope="module")
def suite(place) -> Measured:
    tasks = tuple(Task(name, name, "choice", "acc", 0.25) for name in ("ones", "twos"))
    return Measured(Suite("own", tasks), "dev", {member.name: member for member in datasets(place)})


def federated(place: Path, base: Member, suite: Measured | None, out: Path, *, workers: Workers | None = None,
              **changed: Any) -> Member:
    """Three clients, one of which has answers without a rule."""
    out.mkdir(parents=True, exist_ok=True)
    params = {"clients": 3, "partition": "by_dataset", "steps": 40, "batch_size": 16, "rank": 4,
              "learning_rate": 3e-3 if "kind" in changed else 1e-2, "register_clients": True,
              "targets": ["q_proj", "v_proj", "up_proj", "down_proj"], **changed}
    choice = families("steps")["federate"].bind({
        "base": "base", "data": dict.fromkeys(NAMES, 1), **params, **({"suite": "own:dev"} if suite else {})})
    choice.method.traits["words"](**choice.params)
    data = datasets(place)
    made = choice(Job("t/fed", out, 0, workers or Workers(0), place), base=base, data=data,
                  **({"suite": suite} if suite else {}))
    return Member("t/fed", made.kind, str(out), base=base, digest=identify(out)[1], note=made.note, seen=made.seen)


@pytest.fixture(scope="module")
def fed(place, base, tmp_path_factory) -> Member:
    return federated(place, base, None, tmp_path_factory.mktemp("fed") / "fed")


def of_clients(out: Path, fed: Member, suite: Measured, workers: Workers | None = None, **params: Any) -> Member:
    out.mkdir()
    choice = families("steps")["value"].bind({"of": "fed", "suite": "own:dev", **params})
    choice.method.traits["words"](**choice.params)
    choice.method.traits["check"](**{**choice.params, "of": fed})
    made = choice(Job("t/worth", out, 0, workers or Workers(0), out), of=fed, suite=suite)
    return Member("t/worth", made.kind, str(out), digest=identify(out)[1], note=made.note)


def test_a_client_whose_answers_have_no_rule_is_worth_least_and_less_than_nothing(fed, suite, tmp_path):
    for by in ("score", "loss"):
        found = read(of_clients(tmp_path / by, fed, suite, by=by))
        assert found.players[-1].player == "c2" and found.players[-1].value < 0 < found.players[0].value
        assert sum(one.value for one in found.players) == pytest.approx(found.everybody - found.nobody)
        assert found.exact and found.subsets == 8
    rows = Table.read(Member("", "table", str(tmp_path / "score"))).rows
    assert {row.member for row in rows} == {"c0", "c1", "c2"} and all(row.seen_by_search for row in rows)
    assert not (tmp_path / "score" / JOURNAL).exists()


def test_everybody_is_worth_what_the_federation_scores(fed, base, suite, place, tmp_path):
    found = read(of_clients(tmp_path / "v", fed, suite))
    answers = {member: np.concatenate(list(suite.ask(load(member)).values())) for member in (fed, base)}
    tasks = [len(some) for some in suite.items().values()]
    assert found.everybody == macro(answers[fed], tasks) and found.nobody == macro(answers[base], tasks)
    full = federated(place, base, None, tmp_path / "full", kind="full", combine="linear")
    whole = read(of_clients(tmp_path / "w", full, suite))
    assert whole.everybody == macro(np.concatenate(list(suite.ask(load(full)).values())), tasks)


def test_in_memory_and_in_a_folder_a_subset_comes_to_the_same(place, base, suite, tmp_path):
    full = federated(place, base, None, tmp_path / "full", kind="full", combine={"ties": {"density": 0.5}})
    said, = json.loads((full.folder / "rounds.json").read_text())
    server = Server(base, "full", {}, [], Choice.unspelled(said["combine"]), (1.0,), None, 2.0, tmp_path / "reports",
                    Workers(0), 0)
    updates = updates_of(full)
    held = game_of_updates(server, updates, State(), suite)
    folded = Folded(server, tuple(updates), State(), suite)
    assert isinstance(held, Merged)
    for some in ((), (0,), (2,), (0, 1), (0, 1, 2)):
        for by in ("score", "loss"):
            assert held.results(frozenset(some), by).tolist() == folded.results(frozenset(some), by).tolist()
    assert not list(tmp_path.glob(".fold-*"))
    (tmp_path / ".fold-lost").mkdir()  # by a worker that was killed while it asked
    worth(folded, "score", Workers(0), Answers(tmp_path / "j", folded.players))
    assert not list(tmp_path.glob(".fold-*"))


def test_the_number_of_workers_changes_no_bit(fed, suite, tmp_path):
    alone = of_clients(tmp_path / "0", fed, suite)
    with Workers(2) as workers:
        assert of_clients(tmp_path / "2", fed, suite, workers).digest == alone.digest


def test_members_are_worth_what_their_merges_score(place, base, fed, suite, tmp_path):
    members = [Member(name, "adapter", str(fed.folder / "clients" / name), base=base, digest=name)
               for name in ("c0", "c1", "c2")]
    merge = families("merging").choose({"task_arithmetic": {"weight": [0.5, 0.25, 0.25]}})
    game = game_of_members(members, base, merge, suite, 0)
    found = worth(game, "score", Workers(0), Answers(tmp_path / "j", game.players))
    some = game.candidate(frozenset({0, 2}))
    assert some.weights == {"c0": 0.5, "c2": 0.25}
    write(game.ground.variants().merge(game.ground.setting(some)), tmp_path / "merged")
    from glue.kinds.frame import copy_frame

    copy_frame(base, tmp_path / "merged")
    answers = suite.ask(load(Member("merged", "model", str(tmp_path / "merged"))))
    assert found.results[frozenset({0, 2})].tolist() == np.concatenate(list(answers.values())).tolist()


# -- weights in a federation --

@pytest.mark.parametrize("settings", [{}, {"combine": "linear", "kind": "full", "rounds": 2}], ids=["flora", "full"])
def test_clients_weigh_what_they_are_worth(place, base, suite, tmp_path, settings):
    settings = {"register_clients": False, **settings}
    plain_ = federated(place, base, suite, tmp_path / "plain", **settings)
    weighed = federated(place, base, suite, tmp_path / "weighed", weight="shapley", **settings)
    rounds = json.loads((weighed.folder / "rounds.json").read_text())
    assert [told["weight"]["by"] for told in rounds] == ["shapley"] * len(rounds)
    assert all(told["weight"]["shares"]["c2"] == 0 and sum(told["weight"]["shares"].values()) == pytest.approx(1)
               for told in rounds)
    assert [row["player"] for row in rounds[0]["weight"]["values"]][-1] == "c2"
    score = {member.path: np.mean([some.mean() for some in suite.ask(load(member)).values()])
             for member in (plain_, weighed)}
    assert score[weighed.path] > score[plain_.path]
    assert weighed.seen == set(suite.digests().values()) and "weighted by shapley" in weighed.note
    with Workers(2) as workers:
        again = federated(place, base, suite, tmp_path / "again", weight="shapley", workers=workers, **settings)
    assert again.digest == weighed.digest


def test_shares_are_values_above_nothing_and_weigh_as_they_say(place, base, suite, tmp_path):
    weighed = federated(place, base, suite, tmp_path / "w", weight="shapley")
    told, = json.loads((weighed.folder / "rounds.json").read_text())
    values = {row["player"]: row["value"] for row in told["weight"]["values"]}
    total = sum(max(0.0, value) for value in values.values())
    assert told["weight"]["shares"] == pytest.approx({name: max(0.0, value) / total for name, value in values.items()})
    from glue.kinds import weights

    below, found, place_ = weights(base), weights(weighed), weighed.folder / "clients"
    sent = {name: weights(Member(name, "adapter", str(place_ / name), base=base)) for name in values}
    for name in list(below.headers)[:6]:
        wanted = sum(share * (sent[client][name].double() - below[name].double())
                     for client, share in told["weight"]["shares"].items())
        assert torch.allclose(found[name].double() - below[name].double(), wanted, atol=1e-6)
    with pytest.raises(GlueError, match="weighted its clients by what they are worth"):
        families("steps")["refold"].traits["check"](of=weighed, without=["c2"], late=False)


def test_where_nobody_helps_examples_count(place, base, suite, tmp_path, monkeypatch):
    before = _games.Folded.results
    monkeypatch.setattr(_games.Folded, "results", lambda self, subset, by: before(self, subset, by) * (not subset))
    weighed = federated(place, base, suite, tmp_path / "w", weight="shapley")
    monkeypatch.undo()
    told, = json.loads((weighed.folder / "rounds.json").read_text())
    assert told["weight"]["by"] == "examples, since no update is worth anything" and "shares" not in told["weight"]
    assert federated(place, base, None, tmp_path / "p").digest == weighed.digest


def test_a_killed_round_plays_no_subset_again(place, base, suite, tmp_path, monkeypatch):
    asked: list[frozenset[int]] = []
    before = _games.Folded.results

    def breaks(self, subset, by):
        asked.append(subset)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return before(self, subset, by)

    whole = federated(place, base, suite, tmp_path / "whole", weight="shapley")
    monkeypatch.setattr(_games.Folded, "results", breaks)
    with pytest.raises(KeyboardInterrupt):
        federated(place, base, suite, tmp_path / "struck", weight="shapley")
    again = federated(place, base, suite, tmp_path / "struck", weight="shapley")
    assert again.digest == whole.digest and len(asked) == 8 + 1 and len(set(asked)) == 8


# -- words, recipes, reports --

@pytest.mark.parametrize(("changed", "said"), [
    ({}, "players are members, or the clients of one federation"),
    ({"of": "f", "members": ["a"]}, "players are members, or"),
    ({"of": "f", "merge": "linear"}, "leave base and merge out"),
    ({"members": ["a"], "merge": "linear"}, "add  base: root"),
    ({"members": ["a"], "base": "b", "merge": "slerp"}, "does not merge any number of models by weight"),
    ({"members": ["a"], "base": "b", "merge": "flora"}, "does not merge any number of models by weight"),
])
def test_words_of_a_value_that_do_not_go_together_are_told(changed, said):
    choice = families("steps")["value"].bind({"suite": "own:dev", **changed})
    with pytest.raises(GlueError) as problem:
        choice.method.traits["words"](**choice.params)
    assert said in str(problem.value)


@pytest.mark.parametrize(("changed", "said"), [
    ({}, "add  suite: NAME:dev"),
    ({"suite": "own:dev", "combine": "median", "kind": "full"}, "takes no weight for each member"),
])
def test_words_of_a_weight_that_do_not_go_together_are_told(changed, said):
    params = {"base": "b", "data": {"ones": 1}, "steps": 1, "learning_rate": 1e-3, "targets": ["q_proj"],
              "weight": "shapley", **changed}
    choice = families("steps")["federate"].bind(params)
    with pytest.raises(GlueError) as problem:
        choice.method.traits["words"](**choice.params)
    assert said in str(problem.value)


def test_fewer_subsets_than_one_order_takes_are_refused(fed, suite, tmp_path):
    with pytest.raises(GlueError, match="3 subsets do not make one order of 3 players, which takes 4"):
        of_clients(tmp_path / "v", fed, suite, most=3)
    found = read(of_clients(tmp_path / "w", fed, suite, most=4))
    assert found.subsets == 4 and not found.exact
    assert sum(one.value for one in found.players) == pytest.approx(found.everybody - found.nobody)
    assert all(one.low is None for one in found.players)  # of one order nothing says how others would be


def test_a_federation_of_several_rounds_is_not_valued_as_one(place, base, tmp_path):
    two = federated(place, base, None, tmp_path / "two", rounds=2)
    with pytest.raises(GlueError, match="took 2 rounds"):
        families("steps")["value"].traits["check"](of=two)


RECIPE = """
steps:
  - {as: worth, step: value, members: [below, m1, m2, m3], base: below, merge: {task_arithmetic: {weight: 0.4}},
     suite: s.yaml:dev}
  - {as: found, step: search, members: [m1, m2, m3], base: below, suite: s.yaml:dev,
     strategy: {greedy: {order: shapley}}, merge: task_arithmetic}
"""


def zoo_of(folder: Path, tiny: Any, models: Path) -> None:
    """A zoo of four models, which are made once, a dataset and a suite."""
    (folder / "asked.data").mkdir()
    rng = random.Random(1)
    items = [{"question": f"w{rng.randrange(3, 40)}", "choices": ["w3", "w4"], "gold": k % 2, "answer": f"w{3 + k % 2}"}
             for k in range(40)]
    (folder / "asked.data/dev.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    names = ("below", "m1", "m2", "m3")
    for k, name in enumerate(names):
        if not (models / name).exists():
            tiny(name, seed=k)
    entries = [f"  {name}: {{path: {models / name}}}\n" for name in names]
    (folder / "zoo.yaml").write_text(f"members:\n{''.join(entries)}  asked: {{path: asked.data, kind: dataset}}\n"
                                     "include: zoo/members.yaml\n")
    (folder / "s.yaml").write_text("tasks:\n  t: {data: asked, output: choice, metric: acc, chance: 0.5}\n")


def test_in_a_recipe_values_are_a_table_that_is_shown_and_not_made_twice(tiny, tmp_path, capsys):
    from glue.show.values import print_values

    zoo_of(tmp_path, tiny, tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    with Workers(0) as workers:
        plan = run(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml"), workers)
    member = plan["worth"]
    found = read(member)
    assert {one.player for one in found.players} == {"m1", "m2", "m3"} and found.subsets == 8
    headings, rows = table(found)
    assert headings[:2] == ["player", "value, points"] and len(rows) == 3
    print_values(found)
    assert "m1" in capsys.readouterr().out
    print_values(found, as_json=True)
    assert {one["player"] for one in json.loads(capsys.readouterr().out)["players"]} == {"m1", "m2", "m3"}
    assert {row.member for row in plain(plan, member).rows} == {"m1", "m2", "m3"}
    note = json.loads((plan["found"].folder / "search.json").read_text()) if plan["found"].base else None
    again = make_plan(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml"))
    assert again.done and (note is None or any("who is worth what" in row for row in map(str, note["log"])))
    assert parse(found.suite)[1] == "dev" and (member.folder / NOTE).is_file()
    with pytest.raises(GlueError, match="tells nothing of values"):
        read(Member("m1", "model", str(tmp_path / "m1")))


KILLED = """
import os, signal
from glue.cli import main
from glue.steps import _games

play, left = _games.play, int(os.environ["KILLED_AT"])

def counted(*asked):
    global left
    with open("asked", "a") as file:
        print(asked[1], file=file)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return play(*asked)

_games.play = counted
main()
"""


def test_a_run_that_is_killed_asks_only_what_is_lacking_and_finds_the_same(tiny, tmp_path):
    told = []
    for name, kills in (("calm", (0,)), ("struck", (4, 0))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "r.yaml").write_text("\n".join(RECIPE.splitlines()[:4]) + "\n")
        zoo_of(folder, tiny, tmp_path)
        for at in kills:
            done = subprocess.run([sys.executable, "-c", KILLED, "run", "r.yaml", "--workers", "0", "-q"], cwd=folder,
                                  env={**os.environ, "KILLED_AT": str(at)}, capture_output=True, text=True)
            assert done.returncode == (-signal.SIGKILL if at else 0), done.stderr
        asked = (folder / "asked").read_text().splitlines()
        assert len(asked) == 8 + (len(kills) > 1) and len(set(asked)) == 8
        told.append((folder / "zoo/r/worth" / NOTE).read_bytes())
    assert told[0] == told[1]
