"""Every kind of member that runs is served as it answers here, and mixtures tell who answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from glue.checkpoint import InMemory
from glue.kinds import Running, load, weights
from glue.kinds.endpoint import connect
from glue.kinds.features import DEFINITION
from glue.kinds.text import continued
from glue.member import Member
from glue.mix.levels import block, ffn, model, text
from glue.mix.parts import Parts
from glue.mix.site import Gate
from glue.proxy.pair import write as write_pair
from glue.serve.app import application
from glue.serve.served import Limits, Served
from tests.serving import server_here

PROMPTS = ["w5 w6 w7", "w30", "w17 w4", "w9 w9 w9 w9", "w21 w3 w38", "w12 w11", "w33 w8 w20", "w26 w26"]


def client_of(running: Running) -> TestClient:
    return TestClient(application(Served(running, Limits(), "plain")), raise_server_exceptions=False)


def complete(client: TestClient, prompt: Any, tokens: int = 8, **more) -> dict:
    name = client.get("/v1/models").json()["data"][0]["id"]
    told = client.post("/v1/completions", json={"model": name, "prompt": prompt, "temperature": 0,
                                                "max_tokens": tokens, **more})
    assert told.status_code == 200, told.text
    return told.json()


def judges(e: int, h: int, k: int = 1, seed: int = 0) -> Gate:
    """A gate whose choices differ between prompts."""
    random = torch.Generator().manual_seed(seed)
    weight = (3 if k == 1 else 0.3) * torch.randn(e, h, generator=random)
    return Gate(weight, torch.zeros(e), torch.zeros(h), torch.ones(h), top_k=k)


def an_adapter(tiny, folder: Path) -> Member:
    from peft import LoraConfig, get_peft_model

    base = tiny("base", seed=4)
    get_peft_model(load(base).model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
                   ).save_pretrained(folder / "adapter")
    return Member("adapter", "adapter", str(folder / "adapter"), base=base)


def a_mixture(tiny, folder: Path, level: str, k: int = 1) -> Member:
    experts = tuple(tiny(name, seed=seed) for seed, name in enumerate(("one", "two", "three")))
    trunk = InMemory(dict(weights(experts[0]).items()))
    gate = judges(3, 32, k)
    if level == "model":
        model.write(folder / level, Parts(experts, None, experts[0]), [gate])
    elif level == "block":
        block.write(folder / level, Parts(experts, trunk, experts[0]), [gate] * 2)
    else:
        ffn.write(folder / level, Parts(experts, trunk, experts[0]), [gate] * 2, routing=level)
    return Member(level, "mixture", str(folder / level))


def test_an_adapter_is_served_on_its_base(tiny, tmp_path):
    running = load(an_adapter(tiny, tmp_path))
    with client_of(running) as client:
        told = complete(client, PROMPTS)
        assert [choice["text"].strip() for choice in told["choices"]] == [continued(running, prompt, 8)
                                                                          for prompt in PROMPTS]
        assert "glue" not in told
        assert client.get("/v1/models").json()["data"][0]["glue"]["kind"] == "adapter"


@pytest.mark.parametrize("level, k", [("model", 1), ("model", 2), ("block", 1), ("sentence", 1)])
def test_a_mixture_by_prompt_tells_who_answered(tiny, tmp_path, level, k):
    running = load(a_mixture(tiny, tmp_path, level, k))
    with client_of(running) as client, torch.no_grad():
        told = complete(client, PROMPTS, n=2)
        assert [choice["text"].strip() for choice in told["choices"][::2]] == [continued(running, prompt, 8)
                                                                               for prompt in PROMPTS]
        routes = told["glue"]["route"]
        assert len(routes) == len(PROMPTS) and len({str(route) for route in routes}) > 1
        for prompt, route in zip(PROMPTS, routes, strict=True):
            ids = running.tokenizer(prompt, return_tensors="pt")["input_ids"]
            gate = running.model.gate(ids)[0]
            if k == 1:
                assert route == gate.argmax(-1).tolist()
            else:
                assert route == pytest.approx(gate.tolist(), abs=1e-5) and sum(w > 0 for w in route) == 2
            alone = complete(client, prompt)
            assert alone["glue"]["route"] == pytest.approx(route, abs=1e-5)
        ids = running.tokenizer(PROMPTS[0])["input_ids"]
        scored = client.post("/v1/score", json={"ids": ids, "from_pos": len(ids), "top_k": 1}).json()
        assert scored["ids"][0][0] == running.tokenizer.convert_tokens_to_ids(
            complete(client, PROMPTS[0], 1)["choices"][0]["text"].strip())


def test_a_mixture_that_chooses_for_each_token_is_a_model_like_any_other(tiny, tmp_path):
    running = load(a_mixture(tiny, tmp_path, "token"))
    with client_of(running) as client:
        told = complete(client, PROMPTS)
        assert [choice["text"].strip() for choice in told["choices"]] == [continued(running, prompt, 8)
                                                                          for prompt in PROMPTS]


def test_a_mixture_by_text_lets_the_expert_of_each_prompt_answer(tiny, tmp_path):
    more = {f"v{k}": 40 + k for k in range(10)}
    from tests.conftest import WORDS

    experts = (tiny("one", seed=1), tiny("two", seed=2, words={**WORDS, **more}), tiny("three", seed=3, hidden_size=24))
    text.write(tmp_path / "mixed", Parts(experts, None, experts[0]), [judges(3, DEFINITION["width"], seed=5)])
    running = load(Member("mixed", "mixture", str(tmp_path / "mixed")))
    chosen = running.choose(PROMPTS)
    assert len(set(chosen)) > 1
    with client_of(running) as client:
        told = complete(client, PROMPTS)
        assert told["glue"]["route"] == [running.experts[k].member.name for k in chosen]
        assert [choice["text"].strip() for choice in told["choices"]] == [continued(running, prompt, 8)
                                                                          for prompt in PROMPTS]
        chat = client.post("/v1/chat/completions", json={
            "model": "mixed", "messages": [{"role": "user", "content": PROMPTS[0]}], "max_tokens": 3}).json()
        assert chat["glue"]["route"] == running.experts[chosen[0]].member.name
        for address, body in (("/v1/completions", {"model": "mixed", "prompt": [5, 6]}),
                              ("/v1/score", {"ids": [5], "from_pos": 1})):
            refused = client.post(address, json=body)
            assert refused.status_code == 400 and "own" in refused.json()["error"]["message"]
        assert client.get("/v1/models").json()["data"][0]["glue"]["vocabulary"] is None


def test_a_proxy_is_served_as_it_answers_here(tiny, tmp_path):
    large, small, tuned = tiny("large", seed=1, hidden_size=48), tiny("small", seed=2), tiny("tuned", seed=3)
    write_pair(tmp_path / "proxy", large=large, tuned=tuned, small=small, alpha=0.7)
    running = load(Member("proxy", "proxy", str(tmp_path / "proxy"), base=large))
    with client_of(running) as client:
        told = complete(client, PROMPTS)
        for prompt, choice in zip(PROMPTS, told["choices"], strict=True):
            assert choice["text"].strip() == continued(running, prompt, 8)
    alone = load(large)
    assert any(choice["text"].strip() != continued(alone, prompt, 8)
               for prompt, choice in zip(PROMPTS, told["choices"], strict=True)), "the pair changes something"


def test_a_member_elsewhere_is_served_on(tiny, tmp_path):
    """A model behind a server, as an endpoint of this zoo, behind a server: three times the same text."""
    member = tiny("far", seed=6)
    running = load(member)
    with server_here(application(Served(running, Limits()))) as url:
        connect(tmp_path / "endpoint", url, tokenizer=member)
        near = load(Member("near", "endpoint", str(tmp_path / "endpoint")))
        with client_of(near) as client:
            told = complete(client, PROMPTS, 5)
            assert [choice["text"].strip() for choice in told["choices"]] == [continued(running, prompt, 5)
                                                                              for prompt in PROMPTS]
