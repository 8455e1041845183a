"""Members that run somewhere else: how they are connected, asked, and what is said when they cannot be."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from torch.testing import assert_close

from glue.errors import RunError, ZooError
from glue.evaluate.fast import ask
from glue.evaluate.fast import losses as bits
from glue.evaluate.lm_eval import evaluate
from glue.evaluate.suite import Item, Suite, Task, write_tasks
from glue.identity import identify
from glue.kinds import Running, load, wire
from glue.kinds.endpoint import Told, asked, connect
from glue.kinds.far_source import Completions, ScoreHTTP
from glue.kinds.link import WAITS, HttpLink, Traffic
from glue.kinds.local_source import Local
from glue.kinds.modelling.asked import GlueAskedConfig, GlueAskedForCausalLM, spread
from glue.kinds.text import continued, losses
from glue.member import Member
from tests.conftest import WORDS
from tests.fake_server import FakeServer, error, listening

TEXT = [1, 5, 9, 7, 3, 8, 30, 21, 17, 4]
URL = "http://far.example:8000"


@pytest.fixture
def here(tiny) -> Running:
    running = load(tiny("here", seed=3))
    running.model.generation_config.eos_token_id = 2
    return running


@pytest.fixture
def fake(here) -> FakeServer:
    return FakeServer(Local(here))


def link(fake, **more) -> HttpLink:
    return HttpLink(URL, transport=fake, sleep=lambda seconds: None, **more)


def scored_by(fake: FakeServer, **more) -> ScoreHTTP:
    return ScoreHTTP(link(fake), fake.source.vocabulary, fake.source.longest, **more)


def bodies(fake: FakeServer) -> list[dict]:
    return [json.loads(body) for method, path, _, body in fake.seen if method == "POST"]


def as_model(source) -> Running:
    """What is asked, as a running member, without a folder."""
    shape = {"vocab_size": source.vocabulary.size, "max_position_embeddings": source.longest}
    return GlueAskedForCausalLM(GlueAskedConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=2), source).eval()


# glue's own server

@pytest.mark.parametrize("plain", [False, True])
def test_what_is_told_over_http_is_what_is_told_here(fake, plain):
    fake.plain = plain
    with scored_by(fake).open() as far, fake.source.open() as near:
        for ids, start, more in ((TEXT, 3, {}), (TEXT, 9, {"top_k": 3}), ([*TEXT, 4], 11, {"top_k": 2, "extra": [[7]]}),
                                 (TEXT, 10, {"top_k": 40})):
            told, wanted = far.score(ids, start, **more), near.score(ids, start, **more)
            assert_close(told.logs, wanted.logs, rtol=0, atol=1e-5)
            assert (told.tokens is None) == (wanted.tokens is None)
            assert told.tokens is None or torch.equal(told.tokens, wanted.tokens)
            assert_close(told.tail, wanted.tail, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits, error_of", [(32, 1e-6), (16, 0.008), (8, wire.STEP / 2 + 1e-5)])
def test_fewer_bits_are_fewer_bytes_and_cost_what_the_codec_says(fake, bits, error_of):
    source = scored_by(fake, bits=bits)
    with source.open() as text:
        told = text.score(TEXT, 2).logs
    with fake.source.open() as text:
        wanted = text.score(TEXT, 2).logs
    assert float((told - wanted).abs().max()) <= error_of
    assert source.link.traffic.down == wire.size(9, 0, 40, bits)


def test_what_the_server_has_read_is_not_sent_again(fake):
    with scored_by(fake).open() as text:
        text.score(TEXT[:6], 6)
        text.score(TEXT[:6] + [11, 12], 6)
        text.score(TEXT[:6] + [11, 13], 8)
        text.score(TEXT[:6] + [11, 13], 8, top_k=2, extra=[[]])
    assert [(body["ids"], body.get("keep", 0)) for body in bodies(fake)] == [
        (TEXT[:6], 0), ([11, 12], 6), ([13], 7), ([], 8)]
    assert set(bodies(fake)[-1]) == {"ids", "from_pos", "session", "keep", "top_k"}  # not what is meant anyway
    assert fake.seen[-1][:2] == ("DELETE", f"/v1/score/{bodies(fake)[0]['session']}") and not fake.sessions


def test_a_session_that_the_server_has_lost_is_sent_again_whole_and_once(fake):
    with scored_by(fake).open() as text, fake.source.open() as near:
        text.score(TEXT[:6], 6)
        fake.sessions.clear()
        assert_close(text.score(TEXT, 7).logs, near.score(TEXT, 7).logs, rtol=0, atol=1e-5)
        assert [(len(body["ids"]), body.get("keep", 0)) for body in bodies(fake)] == [(6, 0), (4, 6), (10, 0)]
        fake.failing = [error(409, "gone", "session_lost") for _ in range(2)]
        with pytest.raises(RunError, match="has lost the session: gone"):
            text.score([*TEXT, 5], 11)


def test_after_a_failed_call_the_whole_text_is_sent(fake):
    with scored_by(fake).open() as text:
        text.score(TEXT[:6], 6)
        fake.failing = [httpx.Response(200, content=b"nonsense", headers={"content-type": wire.BINARY})]
        with pytest.raises(RunError, match="cannot be read"):
            text.score(TEXT, 7)
        text.score(TEXT, 7)
    assert "keep" not in bodies(fake)[-1] and bodies(fake)[-1]["ids"] == TEXT


def test_a_server_that_tells_only_the_likeliest_is_asked_for_no_more(fake):
    with scored_by(fake, tells="top_k", most=6).open() as text:
        assert text.score(TEXT, 10).tokens.shape == (1, 6)
        assert text.score(TEXT, 10, top_k=30, extra=[[1, 2, 3]]).tokens.shape[1] <= 9
    assert [body["top_k"] for body in bodies(fake)] == [6, 6]


@pytest.mark.parametrize("more", [
    {}, {"top_k": 3}, {"top_k": 3, "extra": [[k, k + 1] if k % 3 else [] for k in range(9)]}])
def test_of_a_long_text_places_are_asked_for_in_several_calls(fake, monkeypatch, more):
    monkeypatch.setattr("glue.kinds.far_source.NUMBERS", 80 if not more else 8)
    with scored_by(fake).open() as text, fake.source.open() as near:
        told, wanted = text.score(TEXT, 2, **more), near.score(TEXT, 2, **more)
    assert len(bodies(fake)) == 5 and [token for body in bodies(fake) for token in body["ids"]] == TEXT
    assert_close(told.logs, wanted.logs, rtol=0, atol=1e-5)
    assert_close(told.tail, wanted.tail, rtol=0, atol=1e-6)
    assert (told.tokens is None) == (wanted.tokens is None)
    assert told.tokens is None or torch.equal(told.tokens, wanted.tokens)


def test_only_numbers_of_tokens_leave_this_machine(fake):
    sent = []
    source = scored_by(fake)
    source.link.traffic.record = sent.append
    with source.open() as text:
        text.score(TEXT[:6], 6)
        text.score(TEXT[:8], 7, top_k=5, extra=[[1, 2], [30]])
    told = [json.loads(one.body) for one in sent if one.body]
    assert len(sent) == 3 and all(set(one.headers) <= {
        "accept", "accept-encoding", "user-agent", "content-type", "content-length", "host"} for one in sent)
    allowed = {"ids", "from_pos", "session", "keep", "top_k", "extra_ids"}
    for body in told:
        assert set(body) <= allowed
        numbers = json.dumps({name: value for name, value in body.items() if name != "session"})
        assert not set(numbers) - set('0123456789[]{}:," ' + "".join(allowed))
        assert "." not in numbers  # no probability, no logit


def test_bytes_are_those_of_the_bodies_and_headers_that_went(fake):
    source = scored_by(fake)
    with source.open() as text:
        text.score(TEXT, 10)
        text.score(TEXT, 10, top_k=3)
        traffic = source.link.traffic
        assert traffic.calls == 2 == len(fake.seen)
        assert traffic.up == sum(len(body) for _, _, _, body in fake.seen)
        assert traffic.down == wire.size(1, 0, 40, 32) + wire.size(1, 3, 40, 32)
        lines = sum(len(f"{method} {path} HTTP/1.1\r\n\r\n") + sum(len(f"{name}: {value}\r\n")
                                                                  for name, value in headers.items())
                    for method, path, headers, _ in fake.seen)
        assert traffic.head_up == lines and traffic.head_down > 2 * len("HTTP/1.1 200 OK\r\n\r\n")
        assert traffic.seconds > 0


def test_a_distance_is_waited_for_at_every_call(fake):
    waited = []
    source = replace(scored_by(fake), link=HttpLink(URL, transport=fake, distance=0.1, sleep=waited.append))
    with source.open() as text:
        text.score(TEXT, 10)
    assert waited == [0.1, 0.1]


# what can go wrong

@pytest.mark.parametrize("failure", [httpx.ConnectError("refused"), httpx.ReadError("reset"), error(429, "slow down"),
                                     error(503, "starting")])
def test_what_passes_by_itself_is_tried_again(fake, failure):
    waited = []
    source = replace(scored_by(fake), link=HttpLink(URL, transport=fake, sleep=waited.append))
    fake.failing = [failure, failure]
    with source.open() as text:
        assert text.score(TEXT, 10).logs.shape == (1, 40)
    assert waited == list(WAITS[:2]) and source.link.traffic.calls == 4


def test_a_server_that_is_gone_when_a_text_is_left_is_not_waited_for(fake):
    with scored_by(fake).open() as text:
        text.score(TEXT, 10)
        fake.failing = [httpx.ConnectError("gone")] * 9
    assert [method for method, *_ in fake.seen] == ["POST", "DELETE"]


def test_a_server_says_how_long_to_wait_but_not_for_ever(fake):
    waited = []
    source = replace(scored_by(fake), link=HttpLink(URL, transport=fake, sleep=waited.append))
    fake.failing = [httpx.Response(429, headers={"retry-after": "3"}),
                    httpx.Response(503, headers={"retry-after": "1e9"})]
    with source.open() as text:
        text.score(TEXT, 10)
    assert waited == [3, 20]


@pytest.mark.parametrize("failure, told", [
    (httpx.ConnectError("refused"), r"cannot be reached \(refused\)"),
    (error(503, "starting"), "too busy .HTTP 503: starting")])
def test_what_does_not_pass_is_an_error_in_the_end(fake, failure, told):
    fake.failing = [failure] * 50
    with pytest.raises(RunError, match=told):
        link(fake).ask("GET", "/v1/models")
    assert len(fake.seen) == 1 + len(WAITS)


@pytest.mark.parametrize("failure, told", [
    (httpx.ReadTimeout("slow"), "has not answered within 120 s"),
    (error(400, "no\x1b[31m such"), r"HTTP 400: no\\x1b\[31m such"),
    (httpx.Response(302, headers={"location": "http://elsewhere"}), "HTTP 302"),
    (httpx.Response(500, content=b"<html>" + b"x" * 5000), "HTTP 500: <html>x+"),
    (httpx.Response(404, json=[1]), "HTTP 404"), (httpx.Response(404, json={"error": 5}), "HTTP 404: 5")])
def test_what_will_not_pass_is_an_error_at_once(fake, failure, told):
    fake.failing = [failure]
    with pytest.raises(RunError, match=told) as caught:
        link(fake).ask("GET", "/v1/models")
    assert len(fake.seen) == 1 and len(str(caught.value)) < 500


def test_an_answer_without_end_is_cut_off(fake):
    def endless():
        while True:
            yield b"x" * 65536

    fake.failing = [httpx.Response(200, content=endless())]
    connection = link(fake)
    with pytest.raises(RunError, match="more than 65,536 bytes"):
        connection.ask("GET", "/v1/models")
    assert connection.traffic.down <= 3 * 65536


def test_an_answer_that_drips_is_not_waited_for(fake, monkeypatch):
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr("glue.kinds.link.time.perf_counter", lambda: float(next(clock)))
    fake.failing = [httpx.Response(200, content=(b"x" for _ in range(1000)))]
    with pytest.raises(RunError, match="has not answered within 120 s"):
        link(fake).ask("GET", "/v1/models")


def test_an_answer_that_would_grow_when_unpacked_is_cut_off(fake):
    import gzip

    packed = gzip.compress(b"\0" * 10_000_000)
    fake.failing = [httpx.Response(200, content=packed, headers={"content-encoding": "gzip"})]
    with pytest.raises(RunError, match="more than 65,536 bytes"):
        link(fake).ask("GET", "/v1/models")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 5000])
def test_what_is_no_json_is_one_clear_error(fake, content):
    fake.failing = [httpx.Response(200, content=content)]
    with pytest.raises(RunError, match="no JSON mapping"):
        link(fake).ask("GET", "/v1/models").json  # noqa: B018


@pytest.mark.parametrize("url", ["", "far.example", "ftp://far.example", "file:///etc/passwd", "http://", "http://a b",
                                 "http://me:secret@far.example", "http://far.example?key=secret", "http://far\n.example"])
def test_only_urls_of_servers_are_asked(url):
    with pytest.raises(ZooError) as caught:
        HttpLink(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", [URL, f"{URL}/", f"{URL}/v1", f"{URL}/v1/"])
def test_a_url_may_end_where_openai_ends_it(fake, url):
    HttpLink(url, transport=fake).ask("GET", "/v1/models")
    assert fake.seen[0][1] == "/v1/models"


# keys

def test_a_key_is_sent_and_is_in_no_file_no_error_and_no_record(fake, here, tmp_path, monkeypatch):
    fake.key = "sk-very-secret"
    sent = []
    monkeypatch.setenv("FAR_KEY", "sk-very-secret")
    connect(tmp_path / "far", URL, tokenizer=here.member, key="FAR_KEY", transport=fake)
    member = Member("far", "endpoint", str(tmp_path / "far"))
    source = asked(member, transport=fake, traffic=Traffic(record=sent.append))
    with source.open() as text:
        text.score(TEXT, 10)
    assert fake.seen[0][2]["authorization"] == "Bearer sk-very-secret"
    assert all("secret" not in file.read_text() for file in (tmp_path / "far").iterdir())
    assert "secret" not in repr(sent) and "secret" not in repr(source.link)
    fake.key, fake.failing = "another", []
    with pytest.raises(RunError, match=r"HTTP 401: Incorrect API key provided: Bearer \*\*\*") as caught:
        source.link.ask("GET", "/v1/models")
    assert "secret" not in str(caught.value) and "FAR_KEY" in caught.value.fix


@pytest.mark.parametrize("key, told", [(None, "which is not set"), ("sk-é-secret", "which holds no key"),
                                       ("sk\nsecret", "which holds no key")])
def test_a_key_that_is_not_there_or_none_is_told_without_it(fake, monkeypatch, key, told):
    monkeypatch.delenv("FAR_KEY", raising=False)
    if key:
        monkeypatch.setenv("FAR_KEY", key)
    with pytest.raises(ZooError, match=f"FAR_KEY, {told}") as caught:
        link(fake, key="FAR_KEY").ask("GET", "/v1/models")
    assert "secret" not in str(caught.value) and not fake.seen


# other servers

@pytest.mark.parametrize("vllm", [True, False])
def test_other_servers_tell_the_likeliest_and_the_texts_own_tokens(fake, here, vllm):
    fake.vllm = vllm
    source = Completions(link(fake), "m", fake.source.vocabulary, 63, 5, "prompt_logprobs" if vllm else "echo",
                         here.tokenizer)
    with source.open() as text, fake.source.open() as near:
        scored, logs = text.score(TEXT, 4), near.score(TEXT, 4).logs
    for k, (row, some) in enumerate(zip(scored.tokens.tolist(), logs, strict=True)):
        told = [token for token in row if token >= 0]
        own = {TEXT[4 + k]} if 4 + k < len(TEXT) else set()
        assert set(told) == set(some.topk(5).indices.tolist()) | own
        assert_close(scored.logs[k, :len(told)], some[told].double(), rtol=0, atol=1e-6)
        assert_close(scored.tail[k], 1 - some[told].double().exp().sum(), rtol=0, atol=1e-6)
        assert_close(scored.floor[k], some.double().sort().values[-5].exp(), rtol=0, atol=1e-6)
    with pytest.raises(RunError, match="no probabilities of tokens that are asked for"):
        source.score(TEXT, 10, extra=[[3]])


def test_tokens_with_one_text_are_not_told_and_the_floor_says_so(fake, here):
    texts = {**{token: f"w{token}" for token in range(40)}, 30: "same", 12: "same"}

    class Twins:
        def decode(self, ids):
            return texts[ids[0]]

    fake.tokenizer = Twins()
    source = Completions(link(fake), "m", fake.source.vocabulary, 63, 5, "echo", Twins())
    with fake.source.open() as near:
        logs = near.score(TEXT, 6).logs
    scored = source.score(TEXT, 6)
    unclear = 0
    for k, row in enumerate(scored.tokens.tolist()):
        rest = [token for token in range(40) if token not in row]
        assert float(logs[k, rest].exp().max()) <= float(scored.floor[k]) + 1e-6
        own = TEXT[6 + k] if 6 + k < len(TEXT) else None
        top = set(logs[k].topk(5).indices.tolist())
        unclear += bool(top & {30, 12})
        assert top - {30, 12} <= set(row) and {30, 12} & set(row) <= {own}
        if own is not None:
            assert_close(scored.logs[k, row.index(own)], logs[k, own].double(), rtol=0, atol=1e-6)
    assert unclear


@pytest.mark.parametrize("changed", [
    {"choices": []}, {"choices": [{}]}, {"choices": [{"logprobs": None}]}, {"choices": 5},
    {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [None]}}]},
    *({"choices": [{"logprobs": {"tokens": ["a"] * 11, "token_logprobs": [log] * 11,
                                 "top_logprobs": [{"a": log}] * 11}}]} for log in (2.0, "x"))])
def test_answers_of_other_servers_that_tell_nothing_are_one_clear_error(fake, here, changed):
    source = Completions(link(fake), "m", fake.source.vocabulary, 63, 5, "echo", here.tokenizer)
    fake.failing = [httpx.Response(200, json=changed)]
    with pytest.raises(RunError, match="log-probabilities"):
        source.score(TEXT, 4)


# connecting

def connected(fake, here, folder: Path, **more) -> Member:
    connect(folder, URL, tokenizer=here.member, transport=fake, **more)
    return Member(folder.name, "endpoint", str(folder))


def test_a_connected_server_is_written_down_as_it_was_found(fake, here, tmp_path):
    member = connected(fake, here, tmp_path / "far")
    told = Told.read(member)
    assert (told.url, told.model, told.protocol, told.key) == (URL, "m", "glue", "")
    assert (told.vocabulary, told.vocab_size, told.max_position_embeddings) == (fake.source.vocabulary.digest, 40, 64)
    assert (told.tells, told.most, told.serves) == ("full", 40, "d" * 32)
    assert json.loads((tmp_path / "far/config.json").read_text())["model_type"] == "glue_endpoint"
    assert identify(tmp_path / "far") == identify(tmp_path / "far")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_endpoints_of_other_servers_are_other_members(fake, here, tmp_path):
    one, two = connected(fake, here, tmp_path / "one"), tmp_path / "two"
    connect(two, "http://other.example", tokenizer=here.member, transport=fake)
    assert identify(one.folder)[1] != identify(two)[1]


@pytest.mark.parametrize("vllm, likeliest, glue, words, longest", [
    (True, 20, False, "prompt_logprobs", 63), (True, 5, False, "prompt_logprobs", 63), (False, 20, False, "echo", 2048),
    (False, 5, True, "echo", 63)])
def test_another_server_is_tried_until_it_tells(fake, here, tmp_path, vllm, likeliest, glue, words, longest):
    fake.vllm, fake.likeliest, fake.glue = vllm, likeliest, glue
    told = Told.read(connected(fake, here, tmp_path / "far", protocol="openai"))
    assert (told.tells, told.most, told.words, told.protocol) == ("given", likeliest, words, "openai")
    assert told.max_position_embeddings == longest  # one less than it sees, since it always writes one


def test_of_another_server_that_sees_little_tokens_are_checked_piece_by_piece(fake, here, tmp_path, monkeypatch):
    monkeypatch.setattr("glue.kinds.endpoint.AT_ONCE", 8)
    fake.source.longest = 8
    connected(fake, here, tmp_path / "far", protocol="openai")
    told = {token for body in bodies(fake) if "echo" in body for token in body["prompt"][1:]}
    assert told == set(range(4, 40))  # all but the first, and the three that are no text


def test_another_vocabulary_is_refused(fake, here, tiny, tmp_path):
    other = tiny("other", words={**WORDS, "w39": 38, "w38": 39})
    for protocol, told in (("glue", "this tokenizer has 40 and"), ("openai", "a token as 'w38' that this tokenizer")):
        with pytest.raises(ZooError, match=told):
            connect(tmp_path / "far", URL, tokenizer=other, protocol=protocol, transport=fake)
    assert not (tmp_path / "far").exists()


def test_a_server_that_tells_nothing_of_prompts_is_refused(fake, here, tmp_path):
    fake.likeliest = 0
    with pytest.raises(ZooError, match="does not tell the log-probabilities of a prompt's tokens: .*no more than 0"):
        connected(fake, here, tmp_path / "far", protocol="openai")


def test_names_that_are_not_served_are_told_apart(fake, here, tmp_path):
    with pytest.raises(ZooError, match="serves no 'mm'; did you mean 'm'?"):
        connected(fake, here, tmp_path / "far", model="mm")
    entries = [{"id": f"m{k}"} for k in range(3)]
    fake.failing = [httpx.Response(200, json={"data": entries})]
    with pytest.raises(ZooError, match="serves 3 models: m0, m1, m2"):
        connected(fake, here, tmp_path / "far")
    for nothing in ([], None, 5, [5], [{"id": 5}]):
        fake.failing = [httpx.Response(200, json={"data": nothing})]
        with pytest.raises(ZooError, match="does not say what it serves"):
            connected(fake, here, tmp_path / "far")
    fake.failing = [httpx.Response(200, json={"data": entries[:1]})]
    with pytest.raises(ZooError, match="not served by glue"):
        connected(fake, here, tmp_path / "far")


def test_a_protocol_that_is_none_is_refused_before_anybody_is_asked(fake, here, tmp_path):
    with pytest.raises(ZooError, match="no protocol 'opanai'; did you mean 'openai'"):
        connected(fake, here, tmp_path / "far", protocol="opanai")
    assert not fake.seen


def test_a_folder_that_is_there_already_is_not_touched(fake, here, tmp_path):
    (tmp_path / "far").mkdir()
    with pytest.raises(ZooError, match="is there already"):
        connected(fake, here, tmp_path / "far")
    assert not fake.seen and not list((tmp_path / "far").iterdir())


def test_a_server_that_serves_another_member_now_is_refused(fake, here, tmp_path):
    member = connected(fake, here, tmp_path / "far")
    asked(member, transport=fake)
    fake.digest = "e" * 32
    with pytest.raises(ZooError, match="serves another member as 'm' than when 'far' was connected"):
        asked(member, transport=fake)


@pytest.mark.parametrize("changed", [
    {"model_type": "llama"}, {"url": 5}, {"most": -1}, {"most": True}, {"tells": "all"}, {"protocol": "x"},
    {"vocab_size": "40"}, {"key": None}, {"words": "shout"}])
def test_a_folder_that_is_no_endpoint_is_told(fake, here, tmp_path, changed):
    member = connected(fake, here, tmp_path / "far")
    file = tmp_path / "far/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(ZooError, match="no endpoint" if "model_type" in changed else next(iter(changed))):
        asked(member, transport=fake)


def test_a_tokenizer_that_was_exchanged_is_refused(fake, here, tiny, tmp_path):
    member = connected(fake, here, tmp_path / "far")
    load(tiny("other", words={**WORDS, "w39": 38, "w38": 39})).tokenizer.save_pretrained(tmp_path / "far")
    with pytest.raises(ZooError, match="not the one it was connected with"):
        asked(member, transport=fake)


# as a running member

ITEMS = {"choose": [Item("w5 w9", ("w30", "w7 w8", "w3"), 1, "w7 w8"),
                    Item("w17 w3", ("w4", "w21", "w5 w6"), 0, "w4")],
         "write": [Item(f"w{k} w9", ("w30",), 0, "w30") for k in range(5, 11)]}
TASKS = (Task("choose", "choose", "choice", "acc", 0.3),
         Task("write", "write", "generate", "exact_match", 0.0, max_tokens=4))


@pytest.fixture
def far(here, tmp_path) -> Iterator[Running]:
    """What is served, through a socket."""
    with listening(FakeServer(Local(here))) as url:
        connect(tmp_path / "far", url, tokenizer=here.member)
        yield load(Member("far", "endpoint", str(tmp_path / "far")))


def test_an_endpoint_runs_like_the_member_that_is_served(far, here):
    assert far.route is None and far.model.device.type == "cpu" and not far.model.training
    ids = torch.tensor([TEXT, TEXT[::-1]])
    assert_close(far.model(ids).logits, here.model(ids).logits.log_softmax(-1), rtol=0, atol=1e-5)
    for text in ("w5 w9 w7", "w30 w21"):
        assert continued(far, text, 6) == continued(here, text, 6)
    assert_close(losses(far, ["w5 w9 w7", "w3"]), losses(here, ["w5 w9 w7", "w3"]), rtol=0, atol=1e-5)


def test_an_endpoint_is_judged_like_the_member_that_is_served(far, here, tmp_path):
    answers = continued(here, "w5 w9", 4)
    items = {**ITEMS, "write": [ITEMS["write"][0]._replace(answer=answers, choices=(answers,)), *ITEMS["write"][1:]]}
    quick = [{name: values.tolist() for name, values in ask(one, TASKS, items).items()} for one in (far, here)]
    assert quick[0] == quick[1] and sum(quick[0]["write"]) >= 1
    assert_close(*(torch.tensor(bits(one, TASKS, items)["choose"]) for one in (far, here)), rtol=0, atol=1e-5)
    folders = {}
    for name, some in items.items():
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "test.jsonl").write_text("".join(json.dumps(item._asdict()) + "\n" for item in some))
    names = write_tasks(Suite("small", TASKS), "test", folders, tmp_path / "tasks")
    told = [list(evaluate(one, tmp_path / "tasks", names).values()) for one in (far, here)]
    assert told[0] == told[1] == list(quick[0].values())


def test_an_endpoint_of_glues_own_server_is_the_member_that_is_served(here, tmp_path):
    from starlette.testclient import TestClient

    from glue.serve.app import application
    from glue.serve.served import Limits, Served

    with TestClient(application(Served(here, Limits(sessions=1)))) as client:
        def far(request: httpx.Request) -> httpx.Response:  # the client of starlette need not be made of httpx
            told = client.request(request.method, request.url.path, headers=dict(request.headers),
                                  content=request.read())
            return httpx.Response(told.status_code, headers={"content-type": told.headers["content-type"]},
                                  content=told.content)

        for protocol in ("glue", "openai"):
            connect(tmp_path / protocol, URL, tokenizer=here.member, protocol=protocol, transport=far)
        member = Member("glue", "endpoint", str(tmp_path / "glue"))
        near, traffic = Local(here), Traffic()
        source = asked(member, bits=32, transport=far, traffic=traffic)
        before = traffic.calls
        with source.open() as one, source.open() as two, near.open() as local:
            for ids, start, more in ((TEXT[:6], 6, {}), (TEXT, 7, {"top_k": 4, "extra": [[3], [], [5, 6], []]}),
                                     (TEXT[:8], 8, {"top_k": 4}), (TEXT, 1, {})):
                wanted = local.score(ids, start, **more)
                for text in (one, two):  # each makes the server forget the other
                    told = text.score(ids, start, **more)
                    assert_close(told.logs, wanted.logs, rtol=0, atol=1e-5)
                    assert_close(told.tail, wanted.tail, rtol=0, atol=1e-6)
        assert traffic.calls - before == 8 + 6 + 2  # asked, asked again after a 409, given back
        other = asked(Member("openai", "endpoint", str(tmp_path / "openai")), transport=far)
        with near.open() as local:
            logs, scored = local.score(TEXT, 5).logs.double(), other.score(TEXT, 5)
        assert other.most == 20 and scored.tokens.shape[1] >= 20
        told = scored.tokens >= 0
        assert_close(scored.logs[told], logs.gather(1, scored.tokens.clamp(min=0))[told], rtol=0, atol=1e-5)


def test_a_batch_padded_on_the_left_is_what_each_text_is_alone(fake):
    model = as_model(fake.source)
    ids = torch.tensor([TEXT[:6], [2, 2, 2, 1, 30, 21]])
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
    both = model(ids, attention_mask=mask).logits
    assert_close(both[0], model(ids[:1]).logits[0], rtol=0, atol=1e-6)
    assert_close(both[1, 3:], model(ids[1:, 3:]).logits[0], rtol=0, atol=1e-6)
    assert not both[1, :3].any()
    for keep, wanted in ((2, both[:, -2:]), (torch.tensor([1, 4]), both[:, [1, 4]])):
        assert_close(model(ids, attention_mask=mask, logits_to_keep=keep).logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", [
    {}, {"use_cache": False}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation_is_that_of_the_model_itself(fake, here, how):
    model = as_model(fake.source)
    ids = torch.tensor([TEXT[:6], [2, 2, 2, 1, 30, 21]])
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1]])
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2,
             "eos_token_id": 2, **how}
    assert torch.equal(model.generate(**given), here.model.generate(**given))


def test_generation_sends_each_token_once(fake):
    model = as_model(scored_by(fake))
    model.generate(input_ids=torch.tensor([TEXT]), max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=2)
    assert [len(body["ids"]) for body in bodies(fake)] == [10, 1, 1, 1, 1, 1]


def test_rows_of_a_batch_are_asked_at_the_same_time(fake, here):
    together = threading.Barrier(4, timeout=20)

    def far(request: httpx.Request) -> httpx.Response:
        together.wait()  # for ever, if one row waited for the answer to another
        return fake(request)

    model = as_model(ScoreHTTP(HttpLink(URL, transport=far), fake.source.vocabulary, 64))
    ids = torch.tensor([[1, 3 + k, 9] for k in range(4)])
    assert_close(model(ids).logits, here.model(ids).logits.log_softmax(-1), rtol=0, atol=1e-5)


def test_texts_that_are_not_used_any_more_are_given_back(fake, monkeypatch):
    monkeypatch.setattr("glue.kinds.modelling.asked.OPEN", 2)
    model = as_model(scored_by(fake))
    for k in range(5):
        model(torch.tensor([[3 + k, 9]]), logits_to_keep=1)
    assert len(fake.sessions) == 2
    model.opened.close()
    assert not fake.sessions


def test_a_source_that_tells_the_likeliest_is_exact_for_these_and_for_the_text(fake):
    source = scored_by(fake, tells="top_k", most=6)
    logits = as_model(source)(torch.tensor([TEXT])).logits[0]
    with fake.source.open() as text:
        logs = text.score(TEXT, 1).logs
    assert_close(logits.exp().sum(1), torch.ones(len(TEXT)), rtol=0, atol=1e-5)
    for k, row in enumerate(logs):
        exact = [*row.topk(6).indices.tolist(), *TEXT[k + 1:k + 2]]
        assert_close(logits[k, exact], row[exact], rtol=0, atol=1e-5)
        rest = [token for token in range(40) if token not in exact]
        assert logits[k, rest].unique().numel() == 1
        assert float(logits[k, rest[0]]) <= float(row.topk(6).values[-1]) + 1e-5


def test_unknown_tokens_are_never_likelier_than_the_least_of_the_likeliest():
    from glue.kinds.source import Scored

    scored = Scored(torch.tensor([[0.5, 0.1]]).log(), torch.tensor([[3, 1]]), torch.tensor([0.4]), torch.tensor([0.1]))
    assert_close(spread(scored, 4), torch.tensor([[0.1, 0.1, 0.1, 0.5]]).log())
    everything = replace(scored, tokens=torch.tensor([[1, 0]]), tail=torch.tensor([0.0]))
    assert_close(spread(everything, 3), torch.tensor([[0.1, 0.5, 0.0]]).log())


def test_a_server_that_tells_only_a_texts_own_tokens_writes_and_does_not_judge(fake, here):
    source = Completions(link(fake), "m", fake.source.vocabulary, 63, 5, "echo", here.tokenizer)
    model = as_model(source)
    given = {"input_ids": torch.tensor([TEXT]), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 2,
             "eos_token_id": 2}
    assert torch.equal(model.generate(**given), here.model.generate(**given))
    with pytest.raises(ZooError, match="no probabilities of tokens that are asked for"):
        model(torch.tensor([TEXT]))


def test_a_server_that_writes_the_likeliest_token_like_another_one_is_not_taken_at_its_word(fake, here):
    best = int(here.model(torch.tensor([TEXT])).logits[0, -1].argmax())
    texts = {token: f"w{token}" for token in range(40)}

    class Words:
        def decode(self, ids):
            return texts[ids[0]]

    fake.tokenizer = Words()

    def likeliest() -> int:
        model = as_model(Completions(link(fake), "m", fake.source.vocabulary, 63, 5, "echo", Words()))
        return int(model(torch.tensor([TEXT]), logits_to_keep=1).logits.argmax())

    assert likeliest() == best
    texts[12] = texts[best]
    with pytest.raises(RunError, match="what most likely comes next has a text that several tokens have"):
        likeliest()


def test_a_foreign_cache_is_refused(fake):
    from transformers import DynamicCache

    with pytest.raises(ValueError, match="an endpoint keeps an AskedCache, this is a DynamicCache"):
        as_model(fake.source)(torch.tensor([TEXT]), past_key_values=DynamicCache())


def test_a_cropped_cache_goes_on_from_what_is_left(fake, here):
    model = as_model(fake.source)
    cache = model(torch.tensor([TEXT]), use_cache=True).past_key_values
    cache.crop(-4)
    assert cache.get_seq_length() == 6
    after = model(torch.tensor([[11, 12]]), past_key_values=cache, use_cache=True).logits[0]
    assert_close(after, model(torch.tensor([TEXT[:6] + [11, 12]])).logits[0, -2:], rtol=0, atol=1e-5)
