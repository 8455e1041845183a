"""/v1/score: what is kept of a text gives the same answers as the whole text, and no more is kept than may be."""

from __future__ import annotations

import random

import pytest
import torch
from starlette.testclient import TestClient

from glue.kinds import Running, load, wire
from glue.kinds.local_source import Local
from glue.serve.app import application
from glue.serve.problems import Problem
from glue.serve.served import Limits, Served
from glue.serve.sessions import Sessions
from tests.serving import small_member


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Running:
    return load(small_member(tmp_path_factory.mktemp("members")))


@pytest.fixture
def client_of(running):
    opened = []

    def make(**limits):
        client = TestClient(application(Served(running, Limits(**limits))), raise_server_exceptions=False)
        opened.append(client.__enter__())
        return client

    yield make
    for client in opened:
        client.__exit__(None, None, None)


def score(client, *, status=200, **body):
    told = client.post("/v1/score", json={"from_pos": 1, **body})
    assert told.status_code == status, told.text
    return told.json()


def logs_of(running, ids):
    with torch.no_grad():
        return running.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_all_log_probabilities_are_those_of_the_model(running, client_of):
    ids = [1, 9, 8, 7, 6, 5]
    told = score(client_of(), ids=ids, from_pos=3)
    assert told["ids"] is None and told["tail_mass"] == [0] * 4 and told["held"] == 6
    assert torch.tensor(told["logprobs"]).double().sub(logs_of(running, ids)[2:]).abs().max() < 1e-4


def test_the_likeliest_come_with_what_was_asked_for_and_the_mass_of_the_rest(running, client_of):
    ids, logs = [1, 9, 8, 7], logs_of(running, [1, 9, 8, 7])
    told = score(client_of(), ids=ids, from_pos=3, top_k=4, extra_ids=[[300, 11], []])
    for place, log in enumerate(logs[2:]):
        best = log.topk(4)
        assert told["ids"][place][:4] == best.indices.tolist()
        wanted = {*best.indices.tolist(), *([300, 11] if place == 0 else [])}
        assert set(told["ids"][place]) == wanted
        assert told["tail_mass"][place] == pytest.approx(1 - sum(float(log[token].exp()) for token in wanted), abs=1e-5)
        assert told["floor"][place] == pytest.approx(float(best.values[-1].exp()), abs=1e-6)


def test_what_is_kept_and_cropped_gives_what_the_whole_text_gives(running, client_of):
    """Texts that grow, are cut back and go another way, in three sessions at once, against the model itself."""
    client, rng = client_of(), random.Random(0)
    held = {name: [1, *rng.choices(range(3, 300), k=5)] for name in ("a", "b", "c")}
    for name, ids in held.items():
        score(client, ids=ids, session=name)
    for _ in range(40):
        name = rng.choice("abc")
        keep = rng.randrange(1, len(held[name]) + 1)
        new = rng.choices(range(3, 300), k=rng.randrange(0, 9))
        whole = held[name][:keep] + new
        start = rng.randrange(1, len(whole) + 1)
        told = score(client, ids=new, session=name, keep=keep, from_pos=start)
        held[name] = whole[:100]
        assert told["session"] == name and told["held"] == len(whole)
        assert torch.tensor(told["logprobs"]).double().sub(logs_of(running, whole)[start - 1:]).abs().max() < 1e-4
        if len(whole) > 90:
            held[name] = whole[:1]
            score(client, ids=[], session=name, keep=1)


@pytest.mark.parametrize("bits, off", [(32, 1e-6), (16, 0.02), (8, 0.05)])
def test_bytes_tell_what_json_tells(running, client_of, bits, off):
    client, v = client_of(), len(running.tokenizer)
    body = {"ids": [1, 9, 8, 7], "from_pos": 2, "top_k": 6, "bits": bits}
    plain = wire.from_json(client.post("/v1/score", json=body).json(), places=3, v=v)
    told = client.post("/v1/score", json={**body, "session": "mine"}, headers={"Accept": wire.BINARY})
    assert told.headers["content-type"] == wire.BINARY and told.headers[wire.SESSION] == "mine"
    assert told.headers[wire.HELD] == "4" and len(told.content) == wire.size(3, 6, v, bits)
    packed = wire.decode(told.content, places=3, v=v)
    assert torch.equal(packed.tokens, plain.tokens)
    near = plain.logs > plain.logs.max(1, keepdim=True).values - wire.RANGE
    assert packed.logs.sub(plain.logs)[near].abs().max() < off


def test_a_session_that_is_not_held_is_told_so_and_begins_again(client_of):
    client = client_of()
    lost = score(client, ids=[5], keep=3, session="gone", from_pos=4, status=409)
    assert lost["error"]["type"] == "session_lost"
    assert score(client, ids=[1, 5, 6], session="gone")["held"] == 3
    assert score(client, ids=[7], keep=4, session="gone", from_pos=5, status=409)["error"]["type"] == "session_lost"
    assert score(client, ids=[7], keep=3, session="gone", from_pos=4)["held"] == 4
    assert client.delete("/v1/score/gone").json()["deleted"] is True
    assert client.delete("/v1/score/gone").status_code == 404
    score(client, ids=[7], keep=3, session="gone", from_pos=4, status=409)


def test_a_session_without_a_name_is_given_one_that_nobody_can_guess(client_of):
    client = client_of()
    names = {score(client, ids=[1, 5])["session"] for _ in range(5)}
    assert len(names) == 5 and all(len(name) >= 16 for name in names)
    assert score(client, ids=[6], keep=2, session=names.pop(), from_pos=3)["held"] == 3


def test_the_session_unused_for_longest_makes_room(client_of):
    client = client_of(sessions=2)
    for name in ("a", "b"):
        score(client, ids=[1, 5], session=name)
    score(client, ids=[], keep=2, session="a", from_pos=2)
    score(client, ids=[1, 5], session="c")
    score(client, ids=[], keep=2, session="b", from_pos=2, status=409)
    score(client, ids=[], keep=2, session="a", from_pos=2)
    assert "glue_sessions 2" in client.get("/metrics").text


class Counting:
    """A source that counts the texts that are open."""

    def __init__(self, running):
        self._local, self.opened = Local(running), 0
        self.vocabulary, self.tells = self._local.vocabulary, self._local.tells
        self.most, self.longest = self._local.most, self._local.longest

    def open(self):
        from contextlib import contextmanager

        @contextmanager
        def counted():
            self.opened += 1
            try:
                with self._local.open() as text:
                    yield text
            finally:
                self.opened -= 1
        return counted()


def test_tokens_and_time_are_limited_and_everything_is_given_back(running):
    source, now = Counting(running), 0.0
    sessions = Sessions(source, most=10, tokens=20, idle=60.0, clock=lambda: now)
    for k in range(6):
        now += 10
        sessions.score(f"s{k}", 0, [1] * 6, 1, 1, ())
    assert (sessions.count, sessions.held, source.opened) == (3, 18, 3)
    with pytest.raises(Problem) as caught:
        sessions.score("s5", 0, [1] * 21, 1, 1, ())
    assert caught.value.status == 400
    now += 45
    sessions.expire()
    assert sessions.count == 2, "the first of them was unused for 65 seconds"
    with pytest.raises(Exception, match="none of"):  # what fails is not held any more
        sessions.score("s5", 6, [10 ** 6], 1, 1, ())
    assert source.opened == 1
    sessions.close()
    assert (sessions.count, source.opened) == (0, 0)


BAD = [{"ids": [-1]}, {"ids": [320]}, {"ids": [10 ** 30]}, {"ids": "abc"}, {"ids": [[1]]}, {"ids": []},
       {"ids": [1] * 129}, {"from_pos": 0}, {"from_pos": 4}, {"from_pos": -1}, {"from_pos": 1.5}, {"top_k": -1},
       {"top_k": "5"}, {"top_k": 0}, {"extra_ids": [[1]]}, {"extra_ids": [[1], [320], []]}, {"extra_ids": [1, 2, 3]},
       {"extra_ids": {}}, {"session": ""}, {"session": "../x"}, {"session": "x" * 101}, {"session": 5}, {"keep": 2},
       {"keep": -1}, {"bits": 7}, {"bits": "8"}, {"more": 1}]


@pytest.mark.parametrize("wrong", BAD, ids=lambda wrong: str(wrong)[:40])
def test_what_cannot_be_told_is_refused(client_of, wrong):
    told = score(client_of(), **{"ids": [1, 5, 6], **wrong}, status=400)
    assert told["error"]["param"] in (next(iter(wrong)), "from_pos", "session"), told


def test_a_server_may_tell_less_than_it_knows(client_of):
    client = client_of(top_k=5)
    assert client.get("/v1/models").json()["data"][0]["glue"]["max_top_k"] == 5
    for more in ({}, {"top_k": 6}, {"top_k": 320}, {"top_k": 5, "extra_ids": [list(range(6))] * 3}):
        assert score(client, ids=[1, 5, 6], status=400, **more)["error"]["param"] in ("top_k", "extra_ids")
    assert len(score(client, ids=[1, 5, 6], top_k=5)["ids"][0]) == 5
