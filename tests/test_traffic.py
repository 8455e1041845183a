"""Step traffic and `glue generate --draft`: one text whatever way it is asked for, and what each way costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glue.cli import app
from glue.errors import MethodError, Mistakes, RunError, ZooError
from glue.family import families
from glue.identity import identify
from glue.kinds import Place, load
from glue.kinds.endpoint import connect
from glue.kinds.link import Sent, Traffic
from glue.kinds.text import continued
from glue.member import Member, Table
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.report.traffic import markdown, read
from glue.run import run
from glue.show.boards import write_boards
from glue.steps import Job
from glue.steps._device import Device, Way, drafting, served
from glue.workers import Workers
from glue.zoo import Zoo
from tests.words import word_zoo

SHAPE = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48}"
RECIPE = f"""\
seed: 0
steps:
  - {{as: small, step: pretrain, steps: 60, learning_rate: 1e-2, batch_size: 8, vocabulary: [ones, twos],
     data: {{ones: 1}}, architecture: {SHAPE}}}
  - {{as: large, step: pretrain, steps: 60, learning_rate: 1e-2, batch_size: 8, vocabulary: [ones, twos],
     data: {{ones: 1}}, architecture: {SHAPE.replace("32", "48")}}}
  - {{as: device, step: lora, base: small, data: {{twos: 1}}, steps: 100, learning_rate: 1e-2, rank: 8, batch_size: 8,
     targets: [q_proj, v_proj, up_proj, down_proj]}}
  - {{as: adapted, step: proxy, large: large, tuned: device}}
"""
ASKED = """\
  - {as: asked, step: traffic, member: adapted, suite: words:test, round_trips: [5], timed: 1,
     ways: [{draft: 0, bits: 32}, {draft: 3, bits: 32}, {draft: auto, bits: 32, top_k: 12, extra: 4}]}
  - {as: scored, step: evaluate, members: [large, adapted], suite: words:test}
board: {table: scored}
full: {seeds: [0]}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    def answers(k: int, word: str) -> tuple[str, str]:
        return f"{word} 1 {word} 2", f"{k % 5} {word}"

    suite = ("tasks:\n  twos: {data: twos, output: generate, metric: exact_match, chance: 0, max_tokens: 6}\n"
             "  ones: {data: ones, output: choice, metric: acc, chance: 0.5}\n")
    return word_zoo(tmp_path_factory.mktemp("far"), answers, suite, RECIPE + ASKED)


@pytest.fixture(scope="module")
def plan(place) -> Iterator[Plan]:
    with Workers(0) as workers:
        yield run(read_recipe(place / "t.yaml"), Zoo(place / "zoo.yaml"), workers)


def test_every_way_scores_the_same_and_the_first_is_what_the_evaluation_says(plan):
    rows = Table.read(plan["asked"]).rows
    assert len(rows) == 3 and len({row.digest for row in rows}) == 3
    scored, = (row for row in Table.read(plan["scored"]).rows
               if row.task == "twos" and row.digest == plan["adapted"].digest)
    assert sum(scored.results) > 0 and all(row.results == scored.results and row.split == scored.split for row in rows)


def test_without_drafts_every_token_is_a_call_and_drafts_and_truncation_save_what_is_told(plan):
    report = read(plan["asked"])
    plain, drafts, less = report.asked
    prompts = 8 + 1  # sessions given back, and who the server is: asked once a piece, before anything is counted
    assert plain.calls <= plain.written + prompts and plain.written == drafts.written == less.written
    assert drafts.calls < plain.calls and drafts.saves(plain)[0] > 0.1
    assert less.down < 0.5 * plain.down and less.saves(plain)[1] > 0.2
    assert plain.sure == drafts.sure == 1.0 and less.sure > 0.9
    assert list(plain.paces) == ["5"] and all(one.paces["5"] > 0 for one in report.asked)
    told, *_ = json.loads((plan["asked"].folder / "traffic.json").read_text())["ways"]
    assert told["formula"]["down"] < told["down"] < told["formula"]["down"] + 100 * told["items"], \
        "what the ledger says, and a few bytes for each session that is given back"


def test_only_numbers_of_tokens_leave_the_device(plan, tmp_path):
    """What goes over the network while a text is written, all of it: no text, no logits, nothing of the pair."""
    with served(plan["large"], Place()) as url:
        connect(tmp_path / "far", url, tokenizer=plan["large"])
        sent: list[Sent] = []
        device = Device(plan["adapted"], Member("far", "endpoint", str(tmp_path / "far")), Way(4, 16, 12, 4),
                        traffic=Traffic(record=sent.append))
        text, done = device.write("b 3 2 =", 6, ("\n",))
    assert done.tokens and text
    bodies = [json.loads(each.body) for each in sent if each.body]
    assert bodies and {key for body in bodies for key in body} <= \
        {"ids", "from_pos", "session", "keep", "top_k", "extra_ids", "bits"}
    numbers = [body["ids"] + [token for some in body.get("extra_ids", []) for token in some] for body in bodies]
    assert all(type(token) is int and 0 <= token < device.large.vocabulary.size for some in numbers for token in some)
    assert not any("b 3 2" in str(each) for each in sent)


def test_drafting_with_everything_here_writes_what_the_member_writes(plan, place):
    plain = continued(load(plan["adapted"]), "b 3 2 =", 6)
    for draft in ("0", "2", "auto"):
        done = CliRunner().invoke(app, ["generate", "t/adapted", "--prompt", "b 3 2 =", "--tokens", "6", "--draft",
                                        draft, "--zoo", str(place / "zoo.yaml")])
        assert done.exit_code == 0, done.output
        assert done.stdout.split("\n")[0].strip() == plain.split("\n")[0].strip()
        assert "whoever runs it could read: the prompt, every drafted token" in done.stderr


def test_a_member_that_runs_elsewhere_is_connected_to_and_scores_what_it_scores_here(plan, place):
    with served(plan["large"], Place()) as url:
        options = ["--zoo", str(place / "zoo.yaml")]
        done = CliRunner().invoke(app, ["zoo", "connect", url, "--name", "far", "--tokenizer", "t/large", *options])
        assert done.exit_code == 0 and "tells full of" in done.output, done.output
        zoo = Zoo(place / "zoo.yaml")
        assert zoo["far"].kind == "endpoint" and zoo["far"].digest == identify(zoo["far"].folder)[1]
        here, there = (continued(load(member), "a 3 2 =", 5) for member in (plan["large"], zoo["far"]))
        assert here == there
    wrong = CliRunner().invoke(app, ["zoo", "connect", url, "--name", "gone", "--tokenizer", "t/large", *options])
    assert wrong.exit_code and not (place / "zoo/endpoints/gone").exists()


def test_a_second_run_asks_nothing_again(plan, place):
    with Workers(0) as workers:
        again = run(read_recipe(place / "t.yaml"), Zoo(place / "zoo.yaml"), workers)
    assert again["asked"].digest == plan["asked"].digest and again["asked"].path == plan["asked"].path


def test_boards_of_a_full_run_hold_the_traffic_too(plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = write_boards([plan]).read_text()
    assert "calls/token" in text and "draft auto, top 12 + 4, 32 bits" in text
    assert text.count("| draft ") == 3 == sum(line.startswith("| draft ") for line in markdown(read(plan["asked"])))


@pytest.mark.parametrize(("line", "message"), [
    ("ways: [{draft: 4, bytes: 3}]", "a way of asking has no 'bytes'"),
    ("ways: [{draft: -1}]", "a way of asking has  draft: -1"),
    ("ways: [{bits: 12}]", "bits: 12"),
    ("ways: [{extra: 5}]", "names tokens beside the likeliest, and all are told anyway"),
    ("ways: []", "no way of asking is named"),
    ("ways: [{draft: 4}, {draft: 4, bits: 16}]", "named twice"),
])
def test_ways_that_make_no_sense_are_refused_while_planning(place, tmp_path, line, message):
    recipe = tmp_path / "t.yaml"
    recipe.write_text(f"{RECIPE}  - {{as: bad, step: traffic, member: adapted, suite: words:test, {line}}}\n")
    with pytest.raises(Mistakes, match="(?s)" + message.replace("[", r"\[")):
        make_plan(read_recipe(recipe), Zoo(place / "zoo.yaml"))


def test_workers_on_other_machines_cannot_ask_what_this_one_serves_for_itself(tmp_path):
    class Elsewhere(Workers):
        apart = True

    proxy = Member("p", "proxy", str(tmp_path), base=Member("large", "model", str(tmp_path)))
    with pytest.raises(RunError, match="the large member of 'p' is served by this machine for itself alone") as caught:
        families("steps")["traffic"].call(Job("t", tmp_path, 0, Elsewhere(1), tmp_path), member=proxy, suite=None,
                                          ways=[{"draft": 0}])
    assert "--on here" in caught.value.fix


def test_only_a_proxy_has_a_small_model_that_drafts_and_only_traffic_has_a_report(plan):
    with pytest.raises(MethodError, match="'t/large' is a model: it has no small model that could draft"):
        drafting(plan["large"], Way(), Place())
    with pytest.raises(ZooError, match="is not what a traffic step has left"):
        read(plan["scored"])
