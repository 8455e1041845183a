"""The server's answers: what completions and chats say, with which probabilities, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from glue.kinds import load
from glue.kinds.text import continued
from glue.serve.app import application
from glue.serve.guard import Guard
from glue.serve.metrics import Metrics
from glue.serve.served import Limits, Served
from tests.serving import TEXTS, small_member

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    return load(small_member(tmp_path_factory.mktemp("members"), template=TEMPLATE))


def client_of(running, *, template=None, key=None, **limits):
    return TestClient(application(Served(running, Limits(**limits), template), key), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(running):
    with client_of(running) as some:
        yield some


def complete(client, prompt, **more):
    told = client.post("/v1/completions", json={"model": "small", "prompt": prompt, "temperature": 0, **more})
    assert told.status_code == 200, told.text
    return told.json()


def pieces(told):
    """The chunks of a stream, which ends as it should."""
    assert told.status_code == 200 and told.headers["content-type"].startswith("text/event-stream"), told.text
    events = told.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    return [json.loads(event[6:]) for event in events[:-2]]


# what is written

def test_greedy_text_is_what_generate_writes(running, client):
    for text in TEXTS:
        prompt = running.tokenizer(text)["input_ids"]
        for given in (text, prompt):
            told = complete(client, given, max_tokens=24)
            assert told["choices"][0]["text"] == continued(running, text, 24)
            assert told["usage"]["prompt_tokens"] == len(prompt) and told["choices"][0]["finish_reason"] in (
                "stop", "length")
            assert told["usage"]["total_tokens"] == len(prompt) + told["usage"]["completion_tokens"]


def test_prompts_of_one_request_are_answered_in_their_order_n_times_each(running, client):
    told = complete(client, TEXTS, max_tokens=6, n=2)
    assert [choice["index"] for choice in told["choices"]] == list(range(10))
    for k, text in enumerate(TEXTS):
        assert {told["choices"][2 * k + copy]["text"] for copy in (0, 1)} == {continued(running, text, 6)}
    assert told["usage"]["prompt_tokens"] == sum(len(running.tokenizer(text)["input_ids"]) for text in TEXTS)


def test_a_seed_gives_the_same_text_in_any_company_and_copies_differ(client):
    def drawn(prompt, seed, **more):
        return [choice["text"] for choice in complete(client, prompt, seed=seed, temperature=1, max_tokens=12,
                                                      **more)["choices"]]

    alone = drawn(TEXTS[0], 5)
    assert drawn([TEXTS[0], *TEXTS], 5)[0] == alone[0] and drawn(TEXTS[0], 5, n=3)[0] == alone[0]
    assert drawn(TEXTS[0], 6) != alone and len(set(drawn(TEXTS[0], 5, n=3))) == 3
    assert drawn(TEXTS[0], 5, top_p=1e-9) == [complete(client, TEXTS[0], max_tokens=12)["choices"][0]["text"]]


def test_a_stop_ends_the_text_before_itself_and_takes_its_tokens_along(running, client):
    whole = complete(client, TEXTS[1], max_tokens=30, logprobs=0)["choices"][0]
    for start, end in ((3, 5), (0, 1), (7, 12), (len(whole["text"]) - 2, len(whole["text"]))):
        stop = whole["text"][start:end]
        told = complete(client, TEXTS[1], max_tokens=30, stop=[stop, "never said"], logprobs=0)["choices"][0]
        assert told["text"] == whole["text"][:whole["text"].index(stop)] and told["finish_reason"] == "stop"
        kept = len(told["logprobs"]["tokens"])
        assert told["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][:kept]
        assert all(offset < len(told["text"]) for offset in told["logprobs"]["text_offset"])
        streamed = pieces(client.post("/v1/completions", json={
            "model": "small", "prompt": TEXTS[1], "temperature": 0, "max_tokens": 30, "stop": stop, "stream": True}))
        assert "".join(piece["choices"][0]["text"] for piece in streamed) == told["text"]


@pytest.mark.parametrize("more", [{}, {"echo": True}, {"logprobs": 2}, {"logprobs": 1, "echo": True}, {"n": 3},
                                  {"temperature": 1.5, "seed": 1}])
def test_a_stream_says_what_the_whole_answer_says(client, more):
    body = {"model": "small", "prompt": TEXTS, "temperature": 0, "max_tokens": 20, **more}
    whole = client.post("/v1/completions", json=body).json()
    streamed = pieces(client.post("/v1/completions", json={**body, "stream": True,
                                                           "stream_options": {"include_usage": True}}))
    assert streamed[-1]["usage"] == whole["usage"] and streamed[-1]["choices"] == []
    for choice in whole["choices"]:
        some = [piece["choices"][0] for piece in streamed[:-1] if piece["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in some) == choice["text"]
        assert [piece["finish_reason"] for piece in some][-1] == choice["finish_reason"]
        assert not any(piece["finish_reason"] for piece in some[:-1])
        for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs") if "logprobs" in more else ():
            joined = [each for piece in some for each in piece["logprobs"][key]]
            assert joined == choice["logprobs"][key] or key.endswith("logprobs")
            assert len(joined) == len(choice["logprobs"][key])


# probabilities

def test_echoed_log_probabilities_are_those_of_the_model_in_every_place(running, client):
    for text in TEXTS:
        ids = running.tokenizer(text)["input_ids"]
        with torch.no_grad():
            logs = running.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for given in (text, ids):
            told = complete(client, given, max_tokens=0, echo=True, logprobs=3)["choices"][0]
            assert told["finish_reason"] == "length"
            assert told["text"] == text
            found = told["logprobs"]
            assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
            for k in range(1, len(ids)):
                assert found["token_logprobs"][k] == pytest.approx(float(logs[k - 1, ids[k]]), abs=1e-5)
                best = sorted(found["top_logprobs"][k].values(), reverse=True)
                assert best[:3] == pytest.approx(logs[k - 1].topk(3).values.tolist(), abs=1e-5)
                assert found["token_logprobs"][k] in best and len(best) <= 4


def test_offsets_say_where_each_token_stands_in_the_text(client):
    for text in TEXTS:
        for echo in (True, False):
            told = complete(client, text, max_tokens=20, echo=echo, logprobs=0)["choices"][0]
            found = told["logprobs"]
            assert told["text"].startswith(text) == echo
            shown = 0
            for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
                if re.fullmatch("<.*>", token) or "�" in token:
                    continue  # of no text, or of part of a character
                assert told["text"][offset:offset + len(token)] == token
                shown += 1
            assert shown >= 5


@torch.no_grad()
def test_written_log_probabilities_are_those_of_reading_the_same_text(running, client):
    told = complete(client, TEXTS[0], max_tokens=15, logprobs=1, echo=True)["choices"][0]["logprobs"]
    ids = running.tokenizer(TEXTS[0])["input_ids"]
    made = running.model.generate(torch.tensor([ids]), max_new_tokens=15, do_sample=False, pad_token_id=2)[0]
    logs = running.model(made[None]).logits[0].log_softmax(-1)
    judged = [float(logs[k - 1, made[k]]) for k in range(1, len(made)) if int(made[k]) != 2]
    assert told["token_logprobs"][1:] == pytest.approx(judged, abs=1e-4)
    assert all(max(top.values()) == log for top, log in zip(told["top_logprobs"][len(ids):],
                                                            told["token_logprobs"][len(ids):], strict=True))


def test_tokens_that_look_the_same_are_told_apart(running, client):
    """Half characters are all shown alike; none of them may hide another's probability."""
    told = complete(client, TEXTS[4], max_tokens=0, echo=True, logprobs=20)["choices"][0]["logprobs"]
    assert {len(top) for top in told["top_logprobs"][1:]} <= {20, 21}


# chats

def test_a_chat_goes_through_the_template_of_the_tokenizer(running, client):
    body = {"model": "small", "temperature": 0, "max_tokens": 10, "messages": [
        {"role": "system", "content": "the snake"}, {"role": "user", "content": [{"type": "text", "text": "a red"},
                                                                                  {"type": "text", "text": " fox"}]}]}
    told = client.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 2}).json()
    ids = running.tokenizer("[system] the snake [user] a red fox [assistant]", add_special_tokens=False)["input_ids"]
    same = complete(client, ids, max_tokens=10, logprobs=2)
    message = told["choices"][0]["message"]
    assert message["role"] == "assistant" and message["content"] == same["choices"][0]["text"]
    assert [place["logprob"] for place in told["choices"][0]["logprobs"]["content"]] == pytest.approx(
        same["choices"][0]["logprobs"]["token_logprobs"], abs=1e-6)
    assert told["usage"] == same["usage"] and told["object"] == "chat.completion"
    streamed = pieces(client.post("/v1/chat/completions", json={**body, "stream": True}))
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in streamed) == message["content"]
    assert streamed[-1]["choices"][0]["finish_reason"] == told["choices"][0]["finish_reason"]


def test_without_a_template_a_chat_is_refused_unless_one_is_given(tmp_path):
    bare, body = load(small_member(tmp_path)), {"model": "small", "messages": [{"role": "user", "content": "a red"}],
                                                "temperature": 0, "max_tokens": 4}
    with client_of(bare) as client:
        told = client.post("/v1/chat/completions", json=body)
        assert told.status_code == 400 and told.json()["error"]["code"] == "no_chat_template"
        assert "--chat-template" in told.json()["error"]["message"]
    for template, text in (("plain", "user: a red\nassistant:"), ("{{ messages[0]['content'] }}!", "a red!")):
        with client_of(bare, template=template) as client:
            ids = bare.tokenizer(text, add_special_tokens=False)["input_ids"]
            said = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            assert said == complete(client, ids, max_tokens=4)["choices"][0]["text"]
    with client_of(bare, template="{{ raise_exception('no system here') }}") as client:
        told = client.post("/v1/chat/completions", json=body)
        assert told.status_code == 400 and "no system here" in told.json()["error"]["message"]


# refusals

BIG = 10 ** 30
HOSTILE = [
    {"prompt": [-1]}, {"prompt": [BIG]}, {"prompt": [320]}, {"prompt": [1.5]}, {"prompt": [True]}, {"prompt": [[]]},
    {"prompt": []}, {"prompt": {"a": 1}}, {"prompt": None}, {"prompt": [["a"]]}, {"prompt": ["a", 1]}, {"prompt": 7},
    {"prompt": [[[1]]]}, {"prompt": "a " * 5000}, {"prompt": [5] * 129}, {"prompt": [[5]] * 600},
    {"max_tokens": -1}, {"max_tokens": BIG}, {"max_tokens": 10 ** 6}, {"max_tokens": "5"}, {"max_tokens": 1.5},
    {"temperature": -1}, {"temperature": "hot"}, {"temperature": 1e300}, {"temperature": True}, {"top_p": 0},
    {"top_p": 1.1}, {"n": 0}, {"n": 10 ** 9}, {"seed": BIG}, {"seed": 1.5}, {"logprobs": 21}, {"logprobs": -1},
    {"logprobs": True}, {"stop": ""}, {"stop": [1]}, {"stop": ["x"] * 99}, {"stop": {"a": 1}}, {"stream": "yes"},
    {"echo": 1}, {"suffix": "x"}, {"best_of": 4}, {"presence_penalty": 0.5}, {"logit_bias": {"5": 1}},
    {"unknown": 1}, {"model": 5}, {"stream_options": {"x": 1}}, {"user": "x" * 1000}]


@pytest.mark.parametrize("wrong", HOSTILE, ids=lambda wrong: str(wrong)[:40])
def test_what_cannot_be_done_is_refused_with_the_field_that_is_wrong(client, wrong):
    told = client.post("/v1/completions", json={"model": "small", "prompt": "a", **wrong})
    assert told.status_code == 400, told.text
    error = told.json()["error"]
    assert error["type"] == "invalid_request_error" and error["param"] in (next(iter(wrong)), "n")
    assert len(told.content) < 1000


RAW = {"NaN": b'{"model":"small","prompt":"a","temperature":NaN}',
       "infinity": b'{"model":"small","prompt":"a","top_p":Infinity}', "no JSON": b"{", "nothing": b"",
       "a list": b"[1]", "a number": b"5", "nested": b"[" * 100_000, "nested prompt":
       b'{"model":"small","prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "a long number":
       b'{"model":"small","prompt":"a","seed":' + b"9" * 6000 + b"}", "not UTF-8": b'{"model":"\xff"}',
       "half a character": b'{"model":"small","prompt":"\\ud800"}',
       "a half in a name": b'{"model":"\\ud800","prompt":"a"}',
       "a half in a stop": b'{"model":"small","prompt":"a","stop":"\\udc00"}'}


@pytest.mark.parametrize("name", RAW)
def test_a_body_that_is_no_request_is_refused(client, name):
    for address in ("/v1/completions", "/v1/chat/completions", "/v1/score"):
        told = client.post(address, content=RAW[name], headers={"Content-Type": "application/json"})
        assert 400 <= told.status_code < 500 and told.json()["error"]["message"], told.text


def test_bodies_beyond_the_limit_are_refused_before_they_are_read(running):
    with client_of(running, body=100_000) as client:
        told = client.post("/v1/completions", json={"model": "small", "prompt": "x" * 10_000_000})
        assert told.status_code == 413 and told.json()["error"]["code"] == "body_too_large"
        sent = 0

        def endless():
            nonlocal sent
            while sent < 50_000_000:
                sent += 10_000
                yield b" " * 10_000

        told = client.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
        assert told.status_code == 413


def test_when_too_many_wait_the_next_is_told_when_to_come_again(running):
    async def work():
        served, released = Served(running, Limits(batch=1, waiting=2)), threading.Event()
        served.start()
        try:
            transport = httpx.ASGITransport(application(served))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                blocked = served.engine.call(lambda: released.wait(20))
                while served.engine.waiting:  # until it is not waiting any more, but running
                    await asyncio.sleep(0.001)
                asking = [asyncio.create_task(client.post("/v1/completions", json={
                    "model": "small", "prompt": [5], "max_tokens": 2})) for _ in range(5)]
                while sum(task.done() for task in asking) < 3:
                    await asyncio.sleep(0.001)
                released.set()
                answers = await asyncio.gather(*asking)
                assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
                refused = next(answer for answer in answers if answer.status_code == 429)
                assert int(refused.headers["Retry-After"]) >= 1
                assert refused.json()["error"]["type"] == "overloaded_error" and not blocked.over
        finally:
            served.stop()

    asyncio.run(asyncio.wait_for(work(), 30))


def test_a_client_that_does_not_read_its_answer_is_given_up():
    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def work():
        metrics, sent = Metrics(), 0

        async def send(message):
            nonlocal sent
            sent += 1
            if sent == 5:
                await asyncio.sleep(60)

        guard = Guard(endless, Limits(seconds=0.05), metrics, None)
        scope = {"type": "http", "path": "/", "headers": []}
        await asyncio.wait_for(guard(scope, None, send), 5)
        assert sent == 5 and metrics.requests["other", 200] == 1

    asyncio.run(work())


def test_another_model_address_or_method_is_told_plainly(client):
    told = client.post("/v1/completions", json={"model": "smal", "prompt": "a"})
    assert told.status_code == 404 and "did you mean 'small'" in told.json()["error"]["message"]
    assert client.get("/v1/nothing").status_code == 404 and client.get("/v1/completions").status_code == 405
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"


def test_a_prompt_and_its_answer_fill_what_the_member_sees_and_no_more(client):
    prompt = [5] * 120
    assert complete(client, prompt, max_tokens=9)["usage"]["total_tokens"] <= 129
    told = client.post("/v1/completions", json={"model": "small", "prompt": prompt, "max_tokens": 10})
    assert told.status_code == 400 and told.json()["error"]["code"] == "context_length_exceeded"
    assert "9 at most" in told.json()["error"]["message"]


def test_a_key_is_asked_for_everywhere_but_at_health(running):
    with client_of(running, key="s3cret") as client:
        assert client.get("/health").json() == {"status": "ok", "model": "small"}
        for headers in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "s3cret"},
                        {"Authorization": "Basic s3cret"}, {"Authorization": b"Bearer \xff\xfe"}):
            for method, address in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/score"),
                                    ("GET", "/openapi.json"), ("POST", "/v1/completions")):
                told = client.request(method, address, headers=headers)
                assert told.status_code == 401 and told.json()["error"]["type"] == "authentication_error"
        assert client.get("/v1/models", headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_a_member_that_gives_no_numbers_fails_its_own_requests_only(tmp_path):
    broken = load(small_member(tmp_path))
    with torch.no_grad():
        broken.model.model.embed_tokens.weight[7] = math.nan
    with client_of(broken) as client:
        told = client.post("/v1/completions", json={"model": "small", "prompt": [5, 7], "max_tokens": 3})
        assert told.status_code == 500 and "nan" in told.json()["error"]["message"]
        assert complete(client, [5, 6], max_tokens=3)["usage"]["completion_tokens"] == 3


# what is told of the server

def test_models_says_what_sources_must_know(running, client):
    about, = client.get("/v1/models").json()["data"]
    assert about["id"] == "small" and about["owned_by"] == "glue" and about["glue"]["kind"] == "model"
    size = len(running.tokenizer)
    assert about["glue"]["vocab_size"] == size == about["glue"]["max_top_k"] and about["glue"]["longest"] == 128


def test_metrics_count_requests_and_tokens(running):
    with client_of(running) as client:
        complete(client, [5, 6, 7], max_tokens=4)
        client.post("/v1/completions", json={"model": "nobody", "prompt": "a"})
        client.get("/made/up")
        text = client.get("/metrics").text
    assert 'glue_requests_total{route="/v1/completions",status="200"} 1' in text
    assert 'glue_requests_total{route="/v1/completions",status="404"} 1' in text
    assert 'glue_requests_total{route="other",status="404"} 1' in text and "/made/up" not in text
    assert 'glue_tokens_total{kind="prompt"} 3' in text and 'glue_tokens_total{kind="completion"} 4' in text
    assert "glue_sessions 0" in text and "glue_waiting_requests 0" in text and "glue_running_rows 0" in text
    assert re.search(r'glue_request_seconds_count\{route="/v1/completions"\} 2', text)
