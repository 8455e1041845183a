"""Our server under other people's clients: OpenAI's, lm-eval's, and one that tries whatever the schema allows."""

from __future__ import annotations

import json
import random
from collections import Counter
from contextlib import suppress
from itertools import product

import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as run
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from glue.evaluate.lm_eval import as_lm, evaluate
from glue.evaluate.suite import Suite, Task, write_tasks
from glue.kinds import load
from glue.kinds.text import continued
from tests.serving import TEXTS, server, small_member

KEY = "k3y-of-tests"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}[assistant]"
SUITE = Suite("small", (Task("kind", "kind", "choice", "acc", 0.25), Task("norm", "kind", "choice", "acc_norm", 0.25),
                        Task("pets", "pets", "generate", "exact_match", 0.0, max_tokens=6)))


@pytest.fixture(scope="module")
def member(tmp_path_factory):
    return small_member(tmp_path_factory.mktemp("zoo"), template=TEMPLATE)


@pytest.fixture(scope="module")
def running(member):
    return load(member)


@pytest.fixture(scope="module")
def url(member, tmp_path_factory):
    file = tmp_path_factory.mktemp("served") / "zoo.yaml"
    file.write_text(f"members:\n  small: {{path: {member.path}}}\n")
    with server(file, "small", key=KEY) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as some:
        yield some


# OpenAI's client

def test_openai_completes_and_streams(running, client):
    whole = client.completions.create(model="small", prompt=TEXTS, max_tokens=12, temperature=0, logprobs=2, seed=1)
    assert [choice.text for choice in whole.choices] == [continued(running, text, 12) for text in TEXTS]
    assert whole.usage.completion_tokens <= 12 * len(TEXTS) and whole.object == "text_completion"
    assert all(len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) for choice in whole.choices)
    stream = client.completions.create(model="small", prompt=TEXTS[0], max_tokens=12, temperature=0, stream=True,
                                       stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens <= 12 and len(chunks) > 3


def test_openai_chats_and_streams_chats(running, client):
    messages = [{"role": "system", "content": "the snake"}, {"role": "user", "content": "a red fox"}]
    told = client.chat.completions.create(model="small", messages=messages, max_completion_tokens=10, temperature=0,
                                          logprobs=True, top_logprobs=3)
    text = told.choices[0].message.content
    assert text == client.completions.create(
        model="small", max_tokens=10, temperature=0, prompt=running.tokenizer(
            "[system] the snake [user] a red fox [assistant]", add_special_tokens=False)["input_ids"]).choices[0].text
    assert all(len(place.top_logprobs) == 3 for place in told.choices[0].logprobs.content)
    stream = client.chat.completions.create(model="small", messages=messages, max_tokens=10, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_openai_finds_the_model_and_understands_errors(url, client):
    assert [model.id for model in client.models.list()] == ["small"]
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="small", prompt="a", max_tokens=10 ** 6)
    assert wrong.value.param == "max_tokens" and wrong.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt-4", prompt="a")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger, \
            pytest.raises(openai.AuthenticationError):
        stranger.models.list()


# lm-eval's client

def tasks(folder) -> list[str]:
    """Task files of made-up questions, in a folder. -> their names"""
    rng, words = random.Random(0), ["snake", "owl", "fox", "Zoë", "green"]
    for name in ("kind", "pets"):
        lines = []
        for k in range(16):
            choices = rng.sample(words, 4)
            lines.append({"question": f"{rng.choice(TEXTS)} {k} :", "choices": choices, "gold": k % 4,
                          "answer": choices[k % 4]})
        (folder / name).mkdir()
        (folder / name / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_tasks(SUITE, "test", {name: folder / name for name in ("kind", "pets")}, folder / "tasks")


@pytest.fixture
def far(url, member, monkeypatch):
    """lm-eval's own model of a server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return LocalCompletionsAPI(base_url=f"{url}/v1/completions", model="small", tokenizer=member.path,
                               tokenizer_backend="huggingface", tokenized_requests=True, batch_size=4,
                               num_concurrent=2, max_retries=1, add_bos_token=True, max_length=128)


def test_lm_eval_measures_through_the_server_what_it_measures_here(running, far, tmp_path):
    names = tasks(tmp_path)
    here = evaluate(running, tmp_path / "tasks", names)
    known = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = run(far, known.load(names), bootstrap_iters=0, log_samples=True)
    for name, task in zip(names, SUITE.tasks, strict=True):
        rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
        assert [row[task.metric] for row in rows] == here[name] and len(rows) == 16
    assert 0 < sum(here[names[0]]) < 16, "where all or none is right nothing is shown"


def test_lm_eval_hears_the_same_likelihoods_and_texts_as_here(running, far):
    asked = [Instance("loglikelihood", {}, (text, ending), k, metadata=("t", k, 1))
             for k, (text, ending) in enumerate(product(TEXTS, (" snake", " a red", "🙂")))]
    near = as_lm(running).loglikelihood(asked, disable_tqdm=True)
    told = far.loglikelihood(asked, disable_tqdm=True)
    assert [log for log, _ in told] == pytest.approx([log for log, _ in near], abs=1e-4)
    assert [greedy for _, greedy in told] == [greedy for _, greedy in near]
    written = [Instance("generate_until", {}, (text, {"until": ["e"], "max_gen_toks": 10, "do_sample": False}), k,
                        metadata=("t", k, 1)) for k, text in enumerate(TEXTS)]
    texts = as_lm(running).generate_until(written, disable_tqdm=True)
    assert far.generate_until(written, disable_tqdm=True) == texts and any(texts)


# whatever the schema allows

def test_nothing_that_the_schema_knows_of_is_a_server_error(url):
    """Requests as the schema allows them and as it does not, of every kind; what comes back is as the schema says."""
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=headers)
    seen: Counter[str] = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
            @settings(max_examples=25, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
                      suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def hold(case):
                told = case.call(headers=headers)
                case.validate_response(told, checks=[not_a_server_error, status_code_conformance,
                                                     content_type_conformance, response_schema_conformance])
                seen[f"{case.method} {case.path} {told.status_code // 100}"] += 1

            with suppress(Unsatisfiable):  # a request without anything in it cannot be wrong
                hold()
    assert seen["POST /v1/completions 2"] > 3 and seen["POST /v1/chat/completions 2"] > 3, seen
    assert seen["POST /v1/completions 4"] > 20 and seen["POST /v1/score 4"] > 20 and seen["GET /v1/models 2"] > 0
