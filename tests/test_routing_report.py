"""The routing report: numbers of choices against other people's code, the step on tiny mixtures, and the picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import log2
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glue.errors import MethodError, ZooError
from glue.evaluate.suite import Suite, Task
from glue.family import families
from glue.kinds import Place, Running, load
from glue.member import Member, Origin, Score, Table, canonical
from glue.mix.regret import (
    adjusted_information,
    best_by_task,
    choices,
    entropy,
    hindsight,
    promised,
    shares_of,
)
from glue.report.drawing import Words, svg
from glue.report.routing import markdown, picture, read, shares, summary
from glue.show.routes import print_routes
from glue.steps import Job, Measured
from glue.steps import evaluate as evaluating
from glue.steps.routing import NOTE, of_these, routing, token_shares, told, work
from glue.workers import Workers

TASKS = np.repeat([0, 1, 2], [40, 40, 40])
WINS = (np.random.default_rng(5).random((120, 3)) < np.where(np.eye(3)[TASKS], 0.9, 0.4)).astype(float)


def dealt(routes, e: int = 3) -> np.ndarray:
    """Routes [m] as shares [m, 1, e]."""
    return np.stack([shares_of(int(route), e) for route in routes])


# --- numbers ----------------------------------------------------------------------------------------------------------

@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=2, max_size=60))
def test_adjusted_information_is_that_of_scikit_learn(pairs):
    from sklearn.metrics import adjusted_mutual_info_score

    one, other = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(set(pairs)) < len(pairs):  # labels that all stand once make it 0 / 0
        assert adjusted_information(one, other) == pytest.approx(adjusted_mutual_info_score(one, other), abs=1e-9)


def test_adjusted_information_knows_no_names_and_is_about_zero_by_chance():
    random = np.random.default_rng(1)
    routes = random.integers(0, 3, 3000)
    assert adjusted_information(routes.tolist(), [f"e{2 - route}" for route in routes]) == pytest.approx(1, abs=1e-9)
    assert abs(adjusted_information(routes.tolist(), random.permutation(routes).tolist())) < 0.005


def test_entropy_is_that_of_scipy_in_bits():
    random = np.random.default_rng(2)
    from scipy.stats import entropy as theirs

    weights = random.dirichlet(np.ones(5), 7)
    assert entropy(weights) == pytest.approx(theirs(weights, axis=1, base=2), abs=1e-12)
    assert entropy(np.array([1.0, 0.0])) == 0 and entropy(np.full(8, 1 / 8)) == 3


def test_choices_of_a_router_that_knows_the_task():
    found = choices(dealt(TASKS), WINS, TASKS)
    assert np.array_equal(found.by_task, np.eye(3)) and found.load == pytest.approx([1 / 3] * 3)
    assert found.entropy == pytest.approx(log2(3)) and np.array_equal(found.within, [0, 0, 0]) and found.doubt == 0
    assert found.variation == pytest.approx(0, abs=1e-12) and found.follows == pytest.approx(1) and found.agrees == 1
    differ = WINS.max(1) > WINS.min(1)
    assert found.hits == pytest.approx(WINS[np.arange(120), TASKS][differ].mean())
    assert found.luck == pytest.approx(WINS[differ].mean()) and found.hits > found.luck + 0.2


def test_choices_of_a_router_that_always_asks_one_expert():
    found = choices(dealt([2] * 120), WINS, TASKS)
    assert np.array_equal(found.load, [0, 0, 1]) and found.entropy == 0
    assert found.variation == pytest.approx(2 ** 0.5) and found.follows == 0 and found.hits == pytest.approx(found.luck)


def test_more_tasks_than_experts_can_be_followed_as_well():
    random = np.random.default_rng(3)
    tasks = np.repeat(np.arange(6), 20)
    wins = (random.random((120, 2)) < np.where(np.eye(2)[tasks % 2], 0.9, 0.3)).astype(float)
    routes = np.where(random.random(120) < 0.8, tasks % 2, 1 - tasks % 2)
    perfect, good = (choices(dealt(some, 2), wins, tasks) for some in (tasks % 2, routes))
    assert (perfect.agrees, perfect.follows) == (1, pytest.approx(1))
    assert good.agrees == (routes == tasks % 2).mean() and 0.1 < good.follows < 0.6


def test_load_variation_is_that_of_scipy():
    random = np.random.default_rng(4)
    from scipy.stats import variation

    routes = random.choice(3, 120, p=[0.7, 0.2, 0.1])
    assert choices(dealt(routes), WINS, TASKS).variation == pytest.approx(variation(np.bincount(routes)))


def test_experts_that_never_differ_tell_nothing_of_hits():
    found = choices(dealt(TASKS), np.ones((120, 3)), TASKS)
    assert np.isnan(found.hits) and np.isnan(found.luck)


def test_places_that_decide_for_themselves_are_averaged():
    both = np.concatenate([dealt(TASKS), dealt([0] * 120)], axis=1)
    found = choices(both, WINS, TASKS)
    assert found.load == pytest.approx([2 / 3, 1 / 6, 1 / 6]) and found.entropy == pytest.approx(log2(3) / 2)
    assert found.variation == pytest.approx(2 ** 0.5 / 2) and found.by_task[1] == pytest.approx([0.5, 0.5, 0])


def test_weights_of_several_experts_are_shares_with_doubt():
    half = np.stack([shares_of((0.5, 0.5, 0.0), 3)] * 120)
    found = choices(half, WINS, TASKS)
    assert found.doubt == found.entropy == 1 and found.load == pytest.approx([0.5, 0.5, 0])
    assert promised(half, WINS) == pytest.approx(WINS[:, :2].mean(1))


@pytest.mark.parametrize(("route", "expected"), [
    (1, [[0, 1, 0]]), ((0.25, 0.75, 0.0), [[0.25, 0.75, 0]]), ((1.0, 1.0, 2.0), [[0.25, 0.25, 0.5]]),
    ((0.5, 0.5, 0.0, 0.0, 0.0, 1.0), [[0.5, 0.5, 0], [0, 0, 1]])])
def test_a_route_is_an_expert_or_weights_place_after_place(route, expected):
    assert np.array_equal(shares_of(route, 3), expected)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 3, st.integers(0, 2), st.integers(0, 1)), min_size=4,
                max_size=30))
def test_no_choice_scores_more_than_the_oracle_and_no_fixed_one_more_than_the_best_for_each_task(rows):
    wins, routes = np.array([row[:3] for row in rows]), np.array([row[3] for row in rows])
    tasks = np.array([0, 1, *(row[4] for row in rows[2:])])
    there = hindsight(wins, tasks)
    oracle, by_task, single = there.values()
    own = promised(dealt(routes), wins)
    assert np.array_equal(own, wins[np.arange(len(wins)), routes])
    assert (oracle >= own).all() and (oracle >= by_task).all()
    for task in (0, 1):
        here = tasks == task
        assert by_task[here].mean() >= wins[here].mean(0).max() - 1e-12
        assert by_task[here].mean() == pytest.approx(wins[here, best_by_task(wins, tasks)[task]].mean())
    assert sum(single[tasks == t].mean() for t in (0, 1)) <= sum(by_task[tasks == t].mean() for t in (0, 1)) + 1e-12


# --- the note and the report ------------------------------------------------------------------------------------------

SUITE, NAMES = "s:test", ("facts", "kind", "trans")
EXPERTS = [Member(f"r/merged/{name}", "model", f"nowhere/{name}", digest=name * 3) for name in ("one", "two", "three")]
MIXTURE = Member("r/glued", "mixture", "nowhere", digest="glued",
                 origin=Origin("mix/1", {"members": tuple(expert.digest for expert in EXPERTS)}, {}, 0,
                               {"members": tuple(expert.name for expert in EXPERTS)}))


def scores(own: np.ndarray) -> Table:
    columns = {"glued": own} | {expert.digest: WINS[:, k] for k, expert in enumerate(EXPERTS)}
    return Table(tuple(Score(digest, digest, SUITE, name, "acc", tuple(values[t == TASKS]), "d", "h")
                       for digest, values in columns.items() for t, name in enumerate(NAMES)))


@pytest.fixture
def noted(tmp_path) -> Callable[..., Member]:
    """A table whose note tells of mixtures with these routes."""
    def make(*routers: np.ndarray) -> Member:
        lines = []
        for k, routes in enumerate(routers):
            every = dealt(routes)
            parts = {name: every[t == TASKS] for t, name in enumerate(NAMES)}
            line = told(replace(MIXTURE, name=f"r/glued-{k}"), EXPERTS, parts, scores(promised(every, WINS)[:]))
            lines.append(json.dumps(line, allow_nan=False) + "\n")
        (tmp_path / NOTE).write_text("".join(lines))
        return Member("r/routes", "table", str(tmp_path))
    return make


def test_a_router_by_task_regrets_nothing_to_the_best_for_each_task(noted):
    report, = read(noted(best_by_task(WINS, TASKS)[TASKS]))
    score, regret = report.hindsight["best for each task"]
    assert regret.value == 0 and score == report.score and report.promised == pytest.approx(report.score.value)
    oracle, regret = report.hindsight["best for each item"]
    assert regret.value == pytest.approx(oracle.value - report.score.value) and regret.low > 0


def test_regret_is_paired_and_macro_averaged_over_tasks(noted):
    random = np.random.default_rng(5)
    routes = random.integers(0, 3, 120)
    report, = read(noted(routes))
    own = WINS[np.arange(120), routes]
    gaps = [(WINS.max(1) - own)[t == TASKS].mean() for t in range(3)]
    _, regret = report.hindsight["best for each item"]
    assert regret.value == pytest.approx(np.mean(gaps)) and regret.low < np.mean(gaps) < regret.high
    spread = np.sqrt(sum((WINS.max(1) - own)[t == TASKS].var() / 40 for t in range(3))) / 3
    assert (regret.high - regret.low) / (2 * 1.96) == pytest.approx(spread, rel=0.1)


def test_rows_tell_shares_by_task_and_mark_the_best_expert(noted):
    headings, rows = shares(read(noted(TASKS))[0])
    assert headings == ["task", "items", "one", "two", "three", "entropy, bits"]
    assert rows[1] == ["kind", "40", "0 %", "100 %*", "0 %", "0.00"]
    assert rows[-1] == ["all", "120", "33 %", "33 %", "33 %", "1.58"]


def test_the_summary_has_one_row_for_each_mixture_and_markdown_is_whole(noted):
    reports = read(noted(TASKS, np.zeros(120, dtype=int)))
    headings, rows = summary(reports)
    assert [row[0] for row in rows] == ["glued-0", "glued-1"] and {len(row) for row in rows} == {len(headings)}
    assert rows[0][headings.index("asks the task's best (adjusted)")] == "100 % (1.00)"
    assert rows[1][headings.index("load variation")] == "1.41"
    lines = list(markdown(reports))
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == 2 + 2 + 2 * (2 + 4) and "hindsight" in lines[-1]


def test_the_picture_is_well_formed_and_nothing_stands_outside_its_page(noted):
    drawing = picture(read(noted(TASKS, np.zeros(120, dtype=int))))
    root = ElementTree.fromstring(svg(drawing))
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert texts.count("this mixture") == 2 and "glued-1" in texts and texts.count("100") >= 6
    for shape in drawing.shapes:
        if isinstance(shape, Words):
            assert 0 <= shape.x <= drawing.width and 0 <= shape.y <= drawing.height, shape
    assert svg(drawing) == svg(picture(read(noted(TASKS, np.zeros(120, dtype=int)))))


def test_a_terminal_and_a_machine_are_told_the_same(noted, capsys):
    reports = read(noted(TASKS))
    print_routes(reports)
    shown = capsys.readouterr().out
    assert "routes on s:test" in shown and "r/glued-0" in shown and "100 %*" in shown
    print_routes(reports, as_json=True)
    found, = json.loads(capsys.readouterr().out)
    assert found["load"] == list(reports[0].load) and found["hindsight"]["best for each task"][1][0] == 0


def test_a_table_without_a_note_has_no_report(tmp_path):
    with pytest.raises(ZooError, match="tells nothing of routes"):
        read(Member("scored", "table", str(tmp_path)))


# --- the step ---------------------------------------------------------------------------------------------------------

def test_experts_may_be_named_in_any_order_but_must_be_those_of_the_mixture():
    of_these([MIXTURE], EXPERTS[::-1])
    with pytest.raises(MethodError, match="'r/glued' is a mixture of r/merged/one, r/merged/two, r/merged/three"):
        of_these([MIXTURE], EXPERTS[:2])
    with pytest.raises(MethodError, match="nothing says what 'r/glued' is made of"):
        of_these([replace(MIXTURE, origin=None)], EXPERTS)


@pytest.fixture
def measured(tmp_path):
    """A suite of one task with six questions, as steps are given it."""
    folder = tmp_path / "data"
    folder.mkdir()
    questions = ["w3 w4 w5", "w30 w31", "w9", "w38 w2 w20 w11", "w7 w7", "w25"]
    (folder / "test.jsonl").write_text("".join(json.dumps(
        {"question": text, "choices": ["w6", "w8"], "gold": 0, "answer": "w6"}) + "\n" for text in questions))
    suite = Suite("words", (Task("words", "words", "choice", "acc", 0.5),))
    return Measured(suite, "test", {"words": Member("words", "dataset", str(folder), digest="words")})


@pytest.fixture
def glued(tiny, tmp_path, measured) -> tuple[Member, list[Member], np.ndarray]:
    """A mixture of two experts whose router was taught that they take turns; its experts; what they score [m, e]."""
    from glue.mix.levels.model import sites, write
    from glue.mix.parts import Dev, Parts

    experts = [replace(tiny(name, seed=seed), digest=name) for name, seed in (("one", 1), ("two", 2))]
    texts, wins = [item.question for item in measured.items()["words"]], np.array([[1.0, 0.0], [0.0, 1.0]] * 3)
    parts, dev = Parts(tuple(experts), None, experts[0]), Dev(texts, torch.tensor(wins), torch.zeros(6))
    write(tmp_path / "glued", parts, [families("routing").choose("linear")(site) for site in sites(parts, dev)])
    origin = Origin("mix/1", {"members": ("one", "two")}, {}, 0, {"members": ("one", "two")})
    return Member("glued", "mixture", str(tmp_path / "glued"), origin=origin, digest="glued"), experts, wins


def test_a_worker_tells_the_route_that_a_mixture_takes_for_each_item(glued, measured):
    mixture, _, wins = glued
    assert np.array_equal(work(mixture, 2, measured, Place())["words"][:, 0], wins)


def test_a_mixture_by_text_is_asked_for_texts_and_not_for_tokens(monkeypatch, measured):
    asked: list[str] = []

    def choose(texts):
        asked.extend(texts)
        return [len(text.split()) % 2 for text in texts]

    monkeypatch.setattr("glue.kinds.load", lambda member, **how: Running(member, None, None, choose=choose))
    found = work(Member("m", "mixture", "nowhere"), 2, measured, Place())["words"]
    assert asked == [item.question for item in measured.items()["words"]]
    assert np.array_equal(found[:, 0].argmax(1), [1, 0, 1, 0, 0, 1]) and found.shape == (6, 1, 2)


def test_the_step_leaves_a_table_of_all_of_them_and_a_note_that_is_reported(glued, measured, tmp_path):
    mixture, experts, wins = glued
    table, job = tmp_path / "draft", tmp_path / "zoo"
    table.mkdir(), job.mkdir()
    columns = {"glued": wins.max(1), "one": wins[:, 0], "two": wins[:, 1]}  # known, so that nothing is evaluated
    (job / "scores.jsonl").write_text("".join(canonical(Score(
        name, name, "words:test", "words", "acc", tuple(values), measured.digests()["words"],
        evaluating._how(measured.suite.tasks[0], "float32")).as_dict()) + "\n" for name, values in columns.items()))
    with Workers(0) as workers:
        made = routing(Job("r/routes", table, 0, workers, job), members=[mixture], experts=experts[::-1],
                       suite=measured)
    member = Member("r/routes", made.kind, str(table), note=made.note)
    assert {row.member: row.value for row in Table.read(member).rows} == {"glued": 1.0, "one": 0.5, "two": 0.5}
    report, = read(member)
    assert report.experts == ("one", "two") and report.load == (0.5, 0.5) and report.hits == 1 and report.luck == 0.5
    assert report.score.value == report.promised == 1 and report.entropy == 1 and report.items == (6,)
    assert {word: regret.value for word, (_, regret) in report.hindsight.items()} == \
        {"best for each item": 0, "best for each task": -0.5, "best single expert": -0.5}


def read_by_routers(model, gates: list[torch.nn.Module], context: list[int]) -> list[torch.Tensor]:
    """What each router is given for one text."""
    seen: list[torch.Tensor] = []
    hooks = [gate.register_forward_hook(lambda module, given, out: seen.append(given[0].detach())) for gate in gates]
    with torch.no_grad():
        model(torch.tensor([context]))
    for hook in hooks:
        hook.remove()
    return seen


STOCK = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_experts_per_tok": 2, "initializer_range": 0.5}


@pytest.mark.parametrize(("kind", "more", "mixed"), [
    ("mixtral", {"num_local_experts": 3}, (0, 1)),
    ("qwen2_moe", {"num_experts": 3, "mlp_only_layers": [0], "decoder_sparse_step": 1, "norm_topk_prob": True,
                   "moe_intermediate_size": 24, "shared_expert_intermediate_size": 1}, (1,))])
def test_the_shares_of_a_mixture_that_decides_token_by_token_are_those_of_its_routers(tiny, kind, more, mixed):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **STOCK, **more)).eval()
        for i in mixed:
            torch.nn.init.normal_(model.model.layers[i].mlp.gate.weight)
    member = tiny("words")
    contexts = [[1, 5, 9, 30], [1, 4], [1, 7, 7, 8, 22, 39]]
    found = token_shares(Running(member, model, load(member).tokenizer), contexts, 3)
    assert found.shape == (3, len(mixed), 3) and found.sum(-1) == pytest.approx(np.ones((3, len(mixed))), abs=1e-6)
    for context, row in zip(contexts, found, strict=True):
        gates = [model.model.layers[i].mlp.gate for i in mixed]
        for k, (gate, states) in enumerate(zip(gates, read_by_routers(model, gates, context), strict=True)):
            weights = (states.reshape(len(context), -1) @ gate.weight.T).softmax(-1)
            weights[weights < weights.topk(2).values[:, 1:]] = 0
            expected = (weights / weights.sum(-1, keepdim=True)).mean(0)
            assert row[k] == pytest.approx(expected.detach().numpy(), abs=1e-6)


def test_a_model_that_decides_nothing_has_no_routes(tiny):
    with pytest.raises(MethodError, match="'plain' has no router"):
        token_shares(load(tiny("plain")), [[1, 2]], 2)


def test_a_page_of_the_report_needs_no_more_than_its_folder(noted, tmp_path):
    table = noted(TASKS)
    lines = list(markdown(read(table)))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / NOTE).write_text(Path(table.path, NOTE).read_text())
    assert list(markdown(read(replace(table, path=str(moved))))) == lines
