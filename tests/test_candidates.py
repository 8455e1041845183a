"""Candidates of a search: they have the bits of what would be written, are measured once, and anywhere alike."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glue.board import leaderboard
from glue.checkpoint import Checkpoint
from glue.errors import MethodError
from glue.evaluate.fast import score
from glue.evaluate.suite import Suite, Task
from glue.kinds import load
from glue.kinds.frame import copy_frame
from glue.kinds.model import Skeleton, assembled
from glue.member import FOLDER_NOTE, Member, Table, canonical
from glue.merge import merging
from glue.merge.variants import Variants, marks
from glue.merge.write import write
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.report.markdown import markdown
from glue.run import run
from glue.search.candidate import Candidate
from glue.steps import Measured
from glue.steps._candidates import Ground, Opened, layer_of, measure
from glue.steps.merge import source_of, sources_of
from glue.steps.search import JOURNAL, SEARCH_NOTE, Journal
from glue.workers import Workers
from glue.zoo import Zoo

ITEMS = 40
METHODS = {"linear": "linear", "task_arithmetic": "task_arithmetic",
           "ties": {"ties": {"density": 0.5}}, "dare_ties": {"dare_ties": {"density": 0.5}}}


def questions(folder: Path) -> Member:
    """A dataset of two splits, of questions that a model of 37 words can be asked."""
    folder.mkdir()
    rng = random.Random(7)
    for split in ("dev", "test"):
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(ITEMS):
                words = [f"w{rng.randrange(3, 40)}" for _ in range(4)]
                choices = rng.sample([f"w{k}" for k in range(3, 40)], 2)
                gold = rng.randrange(2)
                file.write(json.dumps({"question": " ".join(words), "choices": choices, "gold": gold,
                                       "answer": choices[gold]}) + "\n")
    return Member("asked", "dataset", str(folder), digest="asked")


TASK = Task("things", "asked", "choice", "acc", 0.5)


@pytest.fixture
def ground(tiny, tmp_path):
    """ground("ties", base=True) for three members of two layers."""
    data = questions(tmp_path / "asked")

    def make(merge="task_arithmetic", *, base=True, dtype=torch.float32, **shape) -> Ground:
        below, *members = (tiny(f"m{k}", seed=k, dtype=dtype, **shape) for k in range(4))
        measured = Measured(Suite("own", (TASK,)), "dev", {"asked": data})
        return Ground.of(members, below if base else None, merging.choose(merge), None, measured, 3)

    return make


def weights_of(running) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in running.model.state_dict().items()}


def written(ground: Ground, candidate: Candidate, folder: Path) -> Member:
    """The merge as the search step would write it."""
    write(ground.variants().merge(ground.setting(candidate)), folder)
    copy_frame(ground.frame, folder)
    return Member(folder.name, "model", str(folder))


GROUPED = Candidate.merge([{"m1": 0.5, "m2": 0.25}, {"m2": 1.5}, {"m1": 0.3, "m3": 0.7}])
PLAIN = Candidate.merge({"m1": 0.5, "m2": 0.25, "m3": 0.1})


# -- bits --

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_a_candidate_has_the_bits_of_the_merge_that_is_written_and_its_score(name, dtype, ground, tmp_path):
    found = ground(METHODS[name], base=name != "linear", dtype=dtype)
    opened = Opened(found)
    for k, candidate in enumerate((PLAIN, GROUPED, PLAIN)):  # the last one over what the second left
        loaded = load(written(found, candidate, tmp_path / f"{name}-{k}"))
        kept, wanted = weights_of(opened.assembled(candidate)), weights_of(loaded)
        assert set(kept) == set(wanted)
        assert all(kept[tensor].equal(wanted[tensor]) for tensor in wanted)
        assert opened.assembled(candidate).model.generation_config.to_dict() == loaded.model.generation_config.to_dict()
        alone = score(loaded, opened.prepared(loaded, None))["things"]
        assert measure(found, candidate).tolist() == alone.tolist()


def test_a_tied_head_follows_its_embedding(ground, tmp_path):
    found = ground("linear", base=False, tie_word_embeddings=True)
    opened = Opened(found)
    opened.assembled(GROUPED)
    model = opened.assembled(PLAIN).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = Checkpoint(written(found, PLAIN, tmp_path / "out").path)["model.embed_tokens.weight"]
    assert model.lm_head.weight.equal(stored)


def test_where_no_member_has_a_weight_the_base_is_left_as_it_is(ground):
    found = ground()
    model = Opened(found).assembled(Candidate.merge([{"m1": 1.0}, {}, {}])).model
    base = Checkpoint(found.base.path)
    assert model.model.layers[1].mlp.up_proj.weight.equal(base["model.layers.1.mlp.up_proj.weight"])
    assert model.model.norm.weight.equal(base["model.norm.weight"])
    assert not model.model.layers[0].mlp.up_proj.weight.equal(base["model.layers.0.mlp.up_proj.weight"])


def test_without_a_base_something_must_have_a_weight(ground):
    found = ground("linear", base=False)
    with pytest.raises(MethodError, match="no member has a weight"):
        found.variants().merge(found.setting(Candidate.merge([{"m1": 1.0}, {}, {}])))


def test_a_member_without_weight_is_as_if_it_were_not_there(ground):
    found = ground(METHODS["ties"])
    few = Variants(found.merge, sources_of(list(found.members[:2])), source_of(found.base), seed=3)
    by_two = few.merge(lambda _: {"weight": {"m1": 0.5, "m2": 0.25}})
    by_three = found.variants().merge(found.setting(Candidate.merge({"m1": 0.5, "m2": 0.25, "m3": 0.0})))
    assert all(by_two.tensor(name).equal(by_three.tensor(name)) for name in by_two.targets)


def test_a_member_may_be_the_base_itself(ground):
    found = ground("linear")
    found = replace(found, members=(found.base, *found.members))
    one = found.variants().merge(found.setting(Candidate.merge({found.base.name: 1.0})))
    both = found.variants().merge(found.setting(Candidate.merge({found.base.name: 0.5, "m1": 0.5})))
    base, other = Checkpoint(found.base.path), Checkpoint(found.member("m1").path)
    for name in base:
        assert one.tensor(name).equal(base[name])
        torch.testing.assert_close(both.tensor(name), (base[name] + other[name]) / 2)


def test_parameters_by_member_of_the_recipe_stay_with_their_members(ground):
    found = ground({"ties": {"density": [0.2, 0.5, 0.9]}})
    merge = found.variants().merge(found.setting(Candidate.merge({"m3": 1.0, "m1": 2.0})))
    for target in merge.targets.values():
        row = dict(zip(target.names, zip(target.choice.params["weight"], target.choice.params["density"], strict=True),
                       strict=True))
        assert row == {"m1": (2.0, 0.2), "m3": (1.0, 0.9)}


def test_a_candidate_may_set_other_parameters_than_weights(ground):
    found = ground("ties")
    candidate = Candidate.merge({"m1": 1.0, "m2": 1.0}, {"density": {"m1": 0.25, "m2": 0.5}, "lambda": 0.5})
    target = found.variants().merge(found.setting(candidate)).targets["model.norm.weight"]
    assert sorted(target.choice.params["density"]) == [0.25, 0.5] and target.choice.params["lambda"] == 0.5


def test_weights_that_cancel_out_are_refused_before_anything_is_read(ground):
    with pytest.raises(MethodError, match="sum to 0"):
        ground("linear", base=False).variants().merge(lambda _: {"weight": {"m1": 1.0, "m2": -1.0}})


def test_a_layer_is_the_first_number_of_a_name():
    assert [layer_of(name) for name in ("model.layers.11.mlp.experts.3.w1.weight", "transformer.h.2.attn.bias",
                                        "model.embed_tokens.weight", "lm_head.weight")] == [11, 2, None, None]


# -- one skeleton --

class Counted:
    """A merge that tells which tensors were asked for."""

    def __init__(self, merge):
        self.merge, self.headers, self.asked = merge, merge.headers, []

    def tensor(self, name):
        return self.merge.tensor(name)

    def stream(self, name):
        self.asked.append(name)
        return self.merge.stream(name)


def test_only_what_differs_from_the_candidate_before_is_made_again(ground):
    found, skeleton = ground(), Skeleton()
    variants = found.variants()

    def fill(candidate) -> list[str]:
        merge = Counted(variants.merge(found.setting(candidate)))
        first = skeleton.filled(found.frame, merge, marks(merge.merge))
        assert skeleton.filled(found.frame, merge, marks(merge.merge)).model is first.model
        return merge.asked

    assert fill(Candidate.merge([{"m1": 0.5}, {"m1": 0.2}, {"m1": 0.1}])) == []  # the first is built as a whole
    again = fill(Candidate.merge([{"m1": 0.5}, {"m1": 0.3}, {"m1": 0.1}]))
    assert again and all(".layers.1." in name for name in again) and len(again) == 9
    assert len(fill(PLAIN)) == len(variants.whole.targets)


def test_a_tensor_that_could_not_be_finished_is_not_taken_for_done(ground):
    found, skeleton = ground(), Skeleton()
    variants = found.variants()
    merge = variants.merge(found.setting(PLAIN))
    skeleton.filled(found.frame, merge, marks(merge))
    other = variants.merge(found.setting(GROUPED))

    class Torn(Counted):
        def stream(self, name):
            yield self.merge.tensor(name).reshape(-1)[:1]
            raise OSError("the disk is gone")

    with pytest.raises(OSError):
        skeleton.filled(found.frame, Torn(other), marks(other))
    for one in (merge, other):
        running = skeleton.filled(found.frame, one, marks(one))
        wanted = weights_of(assembled(found.frame, {name: one.tensor(name) for name in one.targets}))
        assert all(tensor.equal(wanted[name]) for name, tensor in weights_of(running).items())


# -- items --

def test_some_items_are_answered_as_all_of_them_are(ground):
    found = ground()
    whole = measure(found, PLAIN)
    some = np.array([0, 3, 17, ITEMS - 1])
    assert set(whole) == {0.0, 1.0}
    assert measure(found, PLAIN, some).tolist() == whole[some].tolist()
    assert measure(found, Candidate.single("m2"), some).tolist() == \
        measure(found, Candidate.single("m2"))[some].tolist()


def test_a_journal_tells_what_it_was_told_and_leaves_out_a_torn_line(tmp_path):
    journal = Journal(tmp_path / JOURNAL)
    journal.add(PLAIN, None, np.array([0.0, 1.0, 0.25]))
    journal.add(GROUPED, np.array([2]), np.array([1.0]))
    journal.add(GROUPED, np.array([0]), np.array([0.0]))
    with open(journal.file, "a") as file:
        file.write('{"candidate": {"groups"')
    known = journal.known(3)
    assert known[PLAIN].tolist() == [0.0, 1.0, 0.25]
    assert known[GROUPED][[0, 2]].tolist() == [0.0, 1.0] and np.isnan(known[GROUPED][1])


# -- whole searches --

RECIPE = """steps:
  - {as: found, step: search, members: [m0, m1, m2, m3], suite: own.yaml:dev, budget: 60, merge: linear,
     strategy: paper}
  - {as: scored, step: evaluate, members: [found, m1], suite: own.yaml:dev}
  - {as: unseen, step: evaluate, members: [found, m1], suite: own.yaml:test}
board: {table: scored}
"""
SEARCHES = """steps:
  - {as: found, step: search, members: [m0, m1, m2, m3], suite: own.yaml:dev, budget: 60, merge: linear,
     strategy: paper}
  - {as: raced, step: search, members: [m0, m1, m2, m3], base: m0, suite: own.yaml:dev, budget: 60,
     strategy: {racing: {min_gain: 0.1}}}
  - {as: evolved, step: search, members: [m0, m1, m2, m3], base: m0, suite: own.yaml:dev, budget: 40, merge: ties,
     strategy: {evolve: {prove: false, groups: 2}}}
"""
SUITE = "tasks:\n  things: {data: asked, output: choice, metric: acc, chance: 0.5}\n"
Answers = dict[tuple[str, int], float]  # (candidate, item) -> result


@pytest.fixture
def place(tiny, tmp_path):
    """place("here") is a folder with a zoo of four models, a suite, and a recipe; m3 is made from m2."""
    members = [tiny(f"m{k}", seed=k) for k in range(4)]
    data = questions(tmp_path / "asked")

    def make(name: str, steps: str = RECIPE) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = [f"  {member.name}: {{path: {member.path}{', base: m2' if member.name == 'm3' else ''}}}\n"
                 for member in members]
        (folder / "zoo.yaml").write_text(f"members:\n{''.join(lines)}  asked: {{path: {data.path}, kind: dataset}}\n"
                                         "include: zoo/members.yaml\n")
        (folder / "own.yaml").write_text(SUITE)
        (folder / "r.yaml").write_text(steps)
        return folder

    return make


def searched(folder: Path, workers: Workers) -> Plan:
    with workers:
        return run(read_recipe(folder / "r.yaml"), Zoo(folder / "zoo.yaml"), workers)


def told(plan: Plan) -> dict[str, tuple[str, Answers]]:
    """Search -> digest of what it found, and everything that it measured."""
    return {task.name: (task.member.digest, measured(task.folder(plan.zoo))) for task in plan}


def measured(folder: Path) -> Answers:
    """What a journal says, in no order. Fails where an answer was asked for twice."""
    found: Answers = {}
    for line in map(json.loads, (folder / JOURNAL).read_text().splitlines()):
        items = range(ITEMS) if line["items"] == "all" else line["items"]
        for item, result in zip(items, line["results"], strict=True):
            assert (canonical(line["candidate"]), item) not in found
            found[canonical(line["candidate"]), item] = result
    return found


def test_any_number_of_workers_finds_the_same(place):
    alone = told(searched(place("alone", SEARCHES), Workers(0)))
    assert all(len({candidate for candidate, _ in answers}) > 20 for _, answers in alone.values())
    assert len(alone["r/raced"][1]) < ITEMS * len({candidate for candidate, _ in alone["r/raced"][1]})
    for number in (1, 2, 4):
        assert told(searched(place(f"by-{number}", SEARCHES), Workers(number))) == alone


def test_a_search_that_was_killed_before_it_could_be_registered_is_not_made_again(place, monkeypatch):
    from glue import run as running

    folder = place("own", """steps:
  - {as: one, step: search, members: [m0, m1], suite: own.yaml:dev, budget: 2, merge: linear, strategy: greedy}
  - {as: found, step: search, members: [m0, m1], suite: own.yaml:dev, budget: 60, merge: linear, strategy: paper}
""")
    before = [task.member for task in searched(folder, Workers(0))]
    assert before[0].path in [member.path for member in Zoo(folder / "zoo.yaml") if not member.origin]  # as it is
    for name in ("r/one", "r/found"):
        Zoo(folder / "zoo.yaml").remove(name)
    monkeypatch.setattr(running._Run, "_made", None)
    assert [task.member for task in searched(folder, Workers(0))] == before


COUNTED = """
import os
import signal

from glue.cli import main
from glue.steps import _candidates

measure, left = _candidates.measure, int(os.environ.get("KILLED_AT", 0))

def counted(*asked):
    global left
    with open("asked", "a") as file:
        print("once", file=file)
    results = measure(*asked)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)  # the answers are there, and not written down yet
    return results

_candidates.measure = counted
main()
"""


def test_a_search_that_is_killed_asks_again_for_nothing_that_is_written_down_and_finds_the_same(place):
    """Killed at a random candidate; gone on with by two workers, and killed again; gone on with by none."""
    calm, struck = searched(place("calm", SEARCHES), Workers(0)), place("struck", SEARCHES)
    total = lines_of(struck.parent / "calm")
    first = random.randrange(2, total // 2)
    process = start(struck, "0", KILLED_AT=str(first))
    assert process.wait(120) == -signal.SIGKILL and lines_of(struck) == first - 1
    process = start(struck, "2")
    wait_for(struck, random.randrange(first, total * 4 // 5))
    process.kill()
    process.wait(10)
    second = lines_of(struck)
    assert first <= second < total
    process = start(struck, "0")
    assert process.wait(120) == 0, process.stderr.read()
    plan = make_plan(read_recipe(struck / "r.yaml"), Zoo(struck / "zoo.yaml"))
    assert told(plan) == told(calm), f"killed after {first} and {second} measurements"
    assert len((struck / "asked").read_text().splitlines()) == first + total - second
    for task in plan:
        note, answers = json.loads((task.folder(plan.zoo) / SEARCH_NOTE).read_text()), told(plan)[task.name][1]
        assert (note["evaluated"], note["items"]) == (len({candidate for candidate, _ in answers}), len(answers))


def start(folder: Path, workers: str, **more: str) -> subprocess.Popen:
    """A run of the recipe in a process of its own; where it measures by itself, it counts what it is asked."""
    return subprocess.Popen([sys.executable, "-c", COUNTED, "run", "r.yaml", "--workers", workers, "-q"], cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **more})


def lines_of(folder: Path) -> int:
    """How many measurements are written down in a place, in searches that go on and in those that are done."""
    while True:
        files = {file.resolve() for inside in ("zoo/.drafts", "zoo/r") for file in folder.glob(f"{inside}/*/{JOURNAL}")}
        with suppress(FileNotFoundError):  # a search was done just then, and its folder renamed
            return sum(len(file.read_text().splitlines()) for file in files)


def wait_for(folder: Path, lines: int) -> None:
    """Until so many measurements are written down."""
    until = time.monotonic() + 60
    while lines_of(folder) < lines:
        assert time.monotonic() < until, "nothing was measured in a minute"
        time.sleep(0.002)


def test_a_member_that_is_found_as_it_is_keeps_its_own_base(place):
    """Not that of the search, nor the first of its members, which may be of other families."""
    folder = place("here", """steps:
  - {as: made-from-m2, step: search, members: [m3], base: m0, suite: own.yaml:dev, budget: 9, strategy: best}
  - {as: from-nothing, step: search, members: [m1], base: m0, suite: own.yaml:dev, budget: 9, strategy: best}
""")
    plan, zoo = searched(folder, Workers(0)), Zoo(folder / "zoo.yaml")
    assert zoo["r/made-from-m2"].base == zoo["m2"] and zoo["r/made-from-m2"].digest == zoo.identified(zoo["m3"]).digest
    assert zoo["r/from-nothing"].base is None
    note = json.loads((next(iter(plan)).folder(zoo) / FOLDER_NOTE).read_text())
    assert note["base"].startswith("m2@") and note["note"].startswith("m3 of 1 candidates")


def test_items_that_a_search_has_seen_are_marked_wherever_they_are_reported(place):
    folder = place("here")
    plan = searched(folder, Workers(0))
    answers = measured(Path(plan["found"].path))
    rows = {row.member: row.seen_by_search for row in Table.read(plan["scored"]).rows}
    assert rows == {"r/found": True, "m1": False}
    assert not any(row.seen_by_search for row in Table.read(plan["unseen"]).rows)
    text = "\n".join(markdown(leaderboard(plan)))
    assert "| found (searched on these items) |" in text and "| m1 |" in text
    assert f"| found | {len(answers)} | {len(answers) // ITEMS} |" in text  # what it cost stands beside what it scored
    note = json.loads((Path(plan["found"].path) / FOLDER_NOTE).read_text())
    assert note["seen"] == sorted(plan["found"].seen) and len(note["seen"]) == 1
