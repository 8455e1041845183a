"""Refining datasets: planted corruption is found, fits begin alike, and what the step leaves is a dataset like any."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from glue.errors import GlueError, MethodError
from glue.evaluate.suite import Suite, Task
from glue.identity import identify
from glue.kinds import load
from glue.member import Member
from glue.refine import embed
from glue.refine.clusters import clustered, representatives
from glue.refine.shapley import shapley
from glue.steps import Job, Measured, steps
from glue.steps._refine import Ground, Opened, lines_of, pooled, worth
from glue.steps.refine import JOURNAL
from glue.tune.items import Item, read_items
from glue.tune.refit import Start, batches
from glue.workers import Workers

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [f"w{k}" for k in range(3, 40)]


# S7: planted corruption

class Refitted:
    """Least squares on the examples of some clusters, solved in closed form; worth what it explains of dev items."""

    def __init__(self, seed: int, clusters: int = 30, wrong: int = 8, each: int = 12, width: int = 10):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=width)
        x = rng.normal(size=(clusters, each, width)) + rng.normal(size=(clusters, 1, width))
        y = np.sign(x @ truth)
        self.wrong = rng.permutation(clusters)[:wrong]
        y[self.wrong] *= -1
        self.x, self.y = x, y
        self.dev = rng.normal(size=(300, width))
        self.gold = np.sign(self.dev @ truth)

    def __call__(self, subsets: Sequence[frozenset[int]]) -> list[float]:
        return [self.worth(sorted(subset)) for subset in subsets]

    def worth(self, subset: list[int]) -> float:
        x, y = self.x[subset].reshape(-1, self.x.shape[2]), self.y[subset].reshape(-1)
        w = np.linalg.solve(x.T @ x + 20 * np.eye(x.shape[1]), x.T @ y)
        return 1 - float(np.mean((self.gold - self.dev @ w) ** 2))


@pytest.mark.parametrize("seed", range(4))
def test_clusters_with_wrong_labels_are_worth_less_than_nothing_and_are_found(seed):
    game = Refitted(seed)
    found = shapley(30, game, chains=20, tolerance=0.002, precision=0.2, seed=seed)
    wrong = np.isin(np.arange(30), game.wrong)
    auc = mannwhitneyu(found.mean[~wrong], found.mean[wrong]).statistic / wrong.sum() / (~wrong).sum()
    assert auc >= 0.9 and found.mean[wrong].mean() < 0 < found.mean[~wrong].mean() and found.fits < 2 + 20 * 29


# fits

@pytest.fixture
def running(tiny):
    return load(tiny("base"))


ITEMS = [Item([1, *np.random.default_rng(k).integers(3, 40, 5).tolist(), 2], 3) for k in range(12)]
FIT: dict[str, Any] = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 4, "prompt_weight": 0.1, "seed": 0}


@pytest.mark.parametrize("lora", [None, {"r": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}])
def test_every_fit_begins_at_the_base_whatever_was_fitted_before(running, tiny, lora):
    tokens = torch.tensor([ITEMS[0].tokens])
    plain = load(tiny("again")).model(tokens).logits
    start = Start(running, lora)
    first = start.taught(ITEMS, {0, 1, 2, 5}, **FIT).model(tokens).logits.detach().clone()
    assert torch.equal(start.taught(ITEMS, (), **FIT).model(tokens).logits, plain)
    start.taught(ITEMS, range(12), **FIT)
    assert torch.equal(start.taught(ITEMS, {0, 1, 2, 5}, **FIT).model(tokens).logits, first)
    assert not torch.equal(first, plain)


def test_those_who_take_part_keep_their_places_and_come_once_an_epoch():
    whole = [item for batch in batches(ITEMS, range(12), 3, 4, seed=1) for item in batch]
    part = [item for batch in batches(ITEMS, {1, 4, 7, 9, 10}, 3, 4, seed=1) for item in batch]
    present = [ITEMS[k] for k in (1, 4, 7, 9, 10)]
    assert part == [item for item in whole if item in present] and all(part.count(item) == 3 for item in present)
    assert [len(batch) for batch in batches(ITEMS, {1, 4, 7, 9, 10}, 3, 4, seed=1)] == [4, 4, 4, 3]
    assert list(batches(ITEMS, (), 3, 4, seed=1)) == []


# places and clusters

def test_a_pool_that_a_lost_worker_has_begun_is_written_by_the_next(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"question": "w3", "answer": "w4"}\n' * 3)
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "train.jsonl").write_text("half")
    (tmp_path / "pool" / "values.jsonl").write_text("of something else")
    for _ in range(2):
        pooled(tmp_path / "pool", tmp_path / "data", True, False)
        assert [file.name for file in (tmp_path / "pool").iterdir()] == ["train.jsonl"]
        assert len(lines_of(tmp_path / "pool" / "train.jsonl")) == 1


TEXTS = [f"{subject} {verb} twice {number}" for subject in ("dogs", "ships") for verb in ("swim", "sink")
         for number in range(10)]


def test_places_by_words_set_alike_texts_near_and_the_seed_decides():
    places = embed.by_words(TEXTS, seed=0, width=4)
    assert places.shape == (40, 4) and np.allclose(np.linalg.norm(places, axis=1), 1, atol=1e-6)
    label, distance = clustered(places, 4, seed=0)
    assert label.tolist() == np.repeat(range(4), 10).tolist() and (distance >= 0).all()  # in order of appearance
    assert np.array_equal(places, embed.by_words(TEXTS, seed=0, width=4))


def test_places_by_a_member_are_means_of_its_last_layer_whatever_the_batches(running):
    texts = [" ".join(WORDS[k:k + 2 + k % 5]) for k in range(20)]
    found = embed.by_member(running, texts, batch_size=3)
    means = []
    for text in texts:
        ids = torch.tensor([running.tokenizer(text)["input_ids"]])
        means.append(running.model(ids, output_hidden_states=True).hidden_states[-1][0].double().mean(0))
    expected = torch.stack(means) - torch.stack(means).mean(0)
    expected /= expected.norm(dim=1, keepdim=True)
    assert np.abs(found - expected.detach().numpy()).max() < 1e-5


def test_a_sentence_encoder_is_used_where_it_is_installed_and_named_where_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(GlueError, match="needs the package sentence-transformers"):
        embed.by_sentences(["a"])
    fake, asked = ModuleType("sentence_transformers"), []

    class SentenceTransformer:
        def __init__(self, name: str, **more: Any):
            asked.append((name, more))

        def encode(self, texts: list[str]) -> np.ndarray:
            return np.array([[3.0 * len(text), 4.0 * len(text)] for text in texts])

    fake.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", fake)
    assert np.allclose(embed.by_sentences(["a", "bb"]), [[0.6, 0.8]] * 2) and asked[0][1]["local_files_only"]


def test_copies_make_fewer_clusters_and_too_many_are_refused():
    places = np.repeat(np.eye(3), 5, axis=0)
    label, distance = clustered(places, 10, seed=0)
    assert label.tolist() == np.repeat(range(3), 5).tolist() and distance.max() < 1e-12
    with pytest.raises(MethodError, match="15 examples cannot be in 16 clusters"):
        clustered(places, 16, seed=0)


def test_those_nearest_to_the_middle_stand_for_a_cluster():
    found = representatives(np.array([0, 1, 0, 0, 1]), np.array([0.3, 0.0, 0.1, 0.1, 0.5]), 2)
    assert [some.tolist() for some in found] == [[2, 3], [1, 4]]


# the step

def line(question: str, answer: str) -> str:
    return json.dumps({"question": question, "choices": [answer, "w39"], "gold": 0, "answer": answer})


def pairs(count: int, *, wrong: bool = False, seed: int = 0) -> list[tuple[str, str]]:
    """The answer is the first word of the question; where wrong, always another one."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        some = rng.choice(12, 3, replace=False)
        words = [WORDS[k + (12 if wrong else 0)] for k in some]
        found.append((" ".join(words), words[0] if not wrong else "w38"))
    return found


def dataset(folder: Path, train: list[tuple[str, str]], dev: list[tuple[str, str]] = ()) -> Member:
    folder.mkdir()
    for name, some in (("train", train), ("dev", dev)):
        (folder / f"{name}.jsonl").write_text("".join(line(*pair) + "\n" for pair in some))
    return Member(folder.name, "dataset", str(folder), digest=identify(folder)[1])


@pytest.fixture
def place(tmp_path):
    """Forty right items, twenty wrong ones, ten copies; and dev items."""
    right, wrong = pairs(40), pairs(20, wrong=True)
    data = dataset(tmp_path / "dirty", right + wrong + right[:10], pairs(8, seed=9))
    (data.folder / "sources.json").write_text(json.dumps(["right"] * 40 + ["wrong"] * 20 + ["copy"] * 10))
    held = dataset(tmp_path / "held", pairs(4), pairs(24, seed=5))
    suite = Measured(Suite("s", (Task("first", "held", "choice", "acc", 0.5),)), "dev", {"held": held})
    return data, suite


def made(out: Path, workers: Workers | None = None, **given: Any) -> Member:
    out.mkdir(exist_ok=True)
    choice = steps["refine"].bind({"select": given.pop("select", "full"), "keep": given.pop("keep", 1.0),
                                   **{word: value for word, value in given.items()
                                      if word not in ("data", "base", "suite")}, "data": "x"})
    named = {"base": given.get("base"), "suite": given.get("suite"), "data": given["data"]}
    left = choice(Job(out.name, out, 0, workers or Workers(0), out.parent), **named)
    return Member(out.name, left.kind, str(out), digest=identify(out)[1], seen=left.seen, note=left.note)


VALUED = {"clusters": 4, "epochs": 3, "batch_size": 4, "learning_rate": 1e-2, "representatives": 4}  # 16 fits


def rows(member: Member, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(member.folder / name)]


def test_a_dataset_is_valued_once_and_what_is_chosen_of_it_is_a_dataset_like_any(place, tiny, tmp_path):
    data, suite = place
    base = tiny("base")
    valued = made(tmp_path / "valued", data=data, base=base, suite=suite, **VALUED)
    table = rows(valued, "values.jsonl")
    report = json.loads((valued.folder / "refine.json").read_text())
    assert sum(row["value"] for row in table) == pytest.approx(report["all"] - report["nobody"], abs=1e-9)
    assert all(row["low"] <= row["value"] <= row["high"] for row in table) and sum(row["size"] for row in table) == 70
    assert lines_of(valued.folder / "train.jsonl") == lines_of(data.folder / "train.jsonl")
    assert report["fits"] == len(lines_of(valued.folder / JOURNAL)) and report["trained"] > report["fits"] * 4
    assert valued.seen == frozenset(suite.digests().values()) and f"{report['trained']:,} trained" in valued.note
    assert (valued.folder / "dev.jsonl").read_bytes() == (data.folder / "dev.jsonl").read_bytes()

    wrong = [k for k, row in enumerate(table) if int(row["example"].split()[0][1:]) >= 15]
    others = [row["value"] for k, row in enumerate(table) if k not in wrong]
    assert wrong and max(table[k]["value"] for k in wrong) < np.mean(others)

    best = made(tmp_path / "best", data=valued, select="qocs", keep=20)
    chosen, at = lines_of(best.folder / "train.jsonl"), iter(lines_of(data.folder / "train.jsonl"))
    assert len(chosen) == 20 and all(any(one == other for other in at) for one in chosen)  # in the dataset's order
    assert json.loads((best.folder / "refine.json").read_text())["sources"]["wrong"] == [0, 20]
    assert sum(row["chosen"] for row in rows(best, "values.jsonl")) == 20
    assert sorted(file.name for file in best.folder.iterdir()) == [
        "dev.jsonl", "examples.jsonl", "places.npy", "refine.json", "sources.json", "train.jsonl", "values.jsonl"]
    again = made(tmp_path / "again", data=best, select={"loss": {"keep": "low"}}, keep=0.25)
    assert len(rows(again, "examples.jsonl")) == 5 == len(np.load(again.folder / "places.npy"))
    tokenizer = load(base).tokenizer
    assert len(read_items(again.folder, tokenizer, 64)) == 5


def test_a_conversation_is_valued_by_its_last_answer_and_chosen_with_its_turns(place, tiny, tmp_path):
    data, suite = place
    file = data.folder / "train.jsonl"
    before = lines_of(file)
    turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"},
             {"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    talks = [json.dumps({**json.loads(line), "messages": turns}) for line in before]
    plain = made(tmp_path / "plain", data=data, base=tiny("base"), suite=suite, **VALUED)
    file.write_text("".join(f"{line}\n" for line in talks))
    valued = made(tmp_path / "valued", data=data, base=tiny("base"), suite=suite, **VALUED)
    assert lines_of(valued.folder / "values.jsonl") == lines_of(plain.folder / "values.jsonl")
    assert lines_of(valued.folder / "train.jsonl") == talks


def test_values_are_part_of_what_a_dataset_is(place, tiny, tmp_path):
    """Else a line that chooses by them would be taken for done after they have changed."""
    data, suite = place
    one = made(tmp_path / "one", data=data, base=tiny("base"), suite=suite, **VALUED)
    other = made(tmp_path / "other", data=data, base=tiny("base"), suite=suite, **{**VALUED, "epochs": 1})
    assert len({data.digest, one.digest, other.digest}) == 3


def test_each_example_stays_once_where_copies_are_not_wanted(place, tmp_path):
    found = made(tmp_path / "once", data=place[0], select="random", keep=1.0, dedup=True, clusters=5)
    lines = lines_of(place[0].folder / "train.jsonl")
    assert lines_of(found.folder / "train.jsonl") == list(dict.fromkeys(lines))
    assert json.loads((found.folder / "refine.json").read_text())["sources"].get("copy", [0])[0] == 0


def test_losses_set_a_wrong_answer_apart_from_the_right_one(place, tiny, tmp_path):
    data = dataset(tmp_path / "alike", [("w3 w4", "w5")] * 10 + [("w3 w4", "w6")] * 10)
    found = made(tmp_path / "apart", data=data, base=tiny("base"), clusters=2, surprise=5.0)
    told = rows(found, "examples.jsonl")
    assert [row["cluster"] for row in told] == [0] * 10 + [1] * 10 and "loss" in told[0]


def test_a_valuation_that_was_killed_goes_on_with_what_was_valued(place, tiny, tmp_path, monkeypatch):
    from glue.steps import _refine

    data, suite = place
    given = {"data": data, "base": tiny("base"), "suite": suite, **VALUED}
    whole = made(tmp_path / "whole", **given)
    asked: list[frozenset[int]] = []

    def cut(ground: Ground, subset: frozenset[int]) -> float:
        asked.append(subset)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return worth(ground, subset)

    monkeypatch.setattr(_refine, "worth", cut)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", **given)
    again = made(tmp_path / "cut", **given)
    assert again.digest == whole.digest and asked.count(asked[6]) == 2 and len(asked) == len(set(asked)) + 1


def test_two_workers_leave_what_one_leaves(place, tiny, tmp_path):
    data, suite = place
    given = {"data": data, "base": tiny("base"), "suite": suite, **VALUED, "rank": 2, "targets": ["q_proj", "v_proj"]}
    one = made(tmp_path / "one", **given)
    with Workers(2) as workers:
        assert made(tmp_path / "two", workers, **given).digest == one.digest


def test_a_score_may_be_the_value_too(place, tiny, tmp_path):
    data, suite = place
    found = made(tmp_path / "v", data=data, base=tiny("base"), suite=suite, **VALUED, by="score")
    report = json.loads((found.folder / "refine.json").read_text())
    assert report["nobody"] * 24 == pytest.approx(round(report["nobody"] * 24)) and 0 <= report["all"] <= 1


def test_a_base_is_worth_what_the_scorer_says_it_is(place, tiny, tmp_path):
    from glue.evaluate.fast import losses

    data, suite = place
    base = tiny("base")
    fit = {"epochs": 1, "learning_rate": 1e-3, "batch_size": 4, "prompt_weight": 0.05, "lora": None}
    opened = Opened(Ground("k", base, data.folder, tuple(range(70)), fit, suite, "loss", 0))
    told = losses(load(base), suite.suite.tasks, suite.items())["first"]
    assert opened.worth(frozenset()) == pytest.approx(-told.mean(), abs=1e-12)
    assert opened.worth(frozenset({1, 2})) != opened.worth(frozenset())


# what is refused before anything runs

@pytest.mark.parametrize("given, why", [
    ({"select": {"full": {}}, "keep": 0.5}, "'full' keeps everything, and keep is 0.5"),
    ({"suite": "s:dev"}, "no base is named"), ({"embed": "hidden"}, "no base is named"),
    ({"surprise": 1.0}, "no base is named"), ({"rank": 4}, "a rank and targets")])
def test_words_that_do_not_go_together_are_refused(given, why):
    choice = steps["refine"].bind({"data": "d", "select": "random", **given})
    with pytest.raises(MethodError, match=why):
        steps["refine"].traits["words"](**choice.params)


@pytest.mark.parametrize("selector, lacking", [("qocs", "values of clusters"), ("loss", "losses of a base")])
def test_a_selector_asks_for_what_it_goes_by(place, selector, lacking):
    choice = steps["refine"].bind({"data": "d", "select": selector})
    with pytest.raises(MethodError, match=f"goes by {lacking}, which 'dirty' does not bring"):
        steps["refine"].traits["check"](**{**choice.params, "data": place[0]})


@pytest.mark.parametrize("keep", [0, 0.0, -1, 1.5])
def test_keep_is_a_share_or_a_number(keep):
    with pytest.raises(MethodError, match="'keep' cannot be"):
        steps["refine"].bind({"data": "d", "select": "random", "keep": keep})


def test_an_empty_dataset_is_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(GlueError, match="holds no items to choose from"):
        made(tmp_path / "out", data=Member("empty", "dataset", str(tmp_path / "empty")), select="random")


# joining

def test_datasets_are_joined_with_copies_and_each_line_knows_where_it_is_from(tmp_path):
    parts = [dataset(tmp_path / "a", pairs(30), pairs(3, seed=1)), dataset(tmp_path / "b", pairs(10, seed=2))]
    out = tmp_path / "joined"
    out.mkdir()
    choice = steps["join"].bind({"data": ["a", "b"], "duplicates": 0.2})
    left = choice(Job("j", out, 0, Workers(0), tmp_path), data=parts)
    lines, sources = lines_of(out / "train.jsonl"), json.loads((out / "sources.json").read_text())
    assert len(lines) == len(sources) == 50 and left.kind == "dataset" and len(lines_of(out / "dev.jsonl")) == 3
    assert sum(source.startswith("copy of") for source in sources) == 10 and sources.count("a") == 30
    for part in parts:
        mine = set(lines_of(part.folder / "train.jsonl"))
        assert all(line in mine for line, source in zip(lines, sources, strict=True)
                   if source.removeprefix("copy of ") == part.name)
    assert not (out / "test.jsonl").exists()
