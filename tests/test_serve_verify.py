"""/v1/verify: a device that only proposes writes what it writes when it judges by itself, and is told nothing more."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from glue.cli_serve import judging
from glue.kinds import Running, load, wire
from glue.kinds.local_source import Local
from glue.proxy import protocol, speculative
from glue.proxy.mixing import Sampling
from glue.proxy.packed import Proposal, pack, unpack_verdict
from glue.serve.app import application
from glue.serve.served import Limits, Served
from tests.serving import small_member

V = 316


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Running]:
    """Large, tuned and small, in fp64: what is judged must not hang on rounding."""
    loaded = {}
    for seed, name in enumerate(("large", "tuned", "small")):
        single = load(small_member(tmp_path_factory.mktemp(name), seed=seed, name=name))
        loaded[name] = Running(single.member, single.model.double(), single.tokenizer)
    assert len(loaded["large"].tokenizer) == V
    return loaded


@contextmanager
def client_of(running, **limits):
    app = application(Served(running, Limits(**limits), judging=judging))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def asks(client, session, seed):
    """The device's way to the server."""
    def verify(proposal):
        told = client.post("/v1/verify", params={"session": session, "seed": seed}, content=pack(proposal),
                           headers={"Content-Type": wire.BINARY})
        assert told.status_code == 200, told.text
        assert told.headers[wire.SESSION] == session and told.headers["content-type"] == wire.BINARY
        return unpack_verdict(told.content, len(proposal.ids), V)
    return verify


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_a_server_judges_is_what_the_device_would_have_judged(parts, temperature):
    how = {"alpha": 0.5, "sampling": Sampling(temperature), "gamma": 3, "new": 24, "longest": 128}
    with client_of(parts["large"]) as client, ExitStack() as stack:
        opened = {name: [stack.enter_context(Local(part).open()) for _ in range(2)] for name, part in parts.items()}
        for seed in range(4):
            prompt = [1, 5 + seed, 9]
            far = protocol.generate(prompt, verify=asks(client, f"s{seed}", seed), tuned=opened["tuned"][0],
                                    small=opened["small"][0], bits=64, rng=np.random.default_rng(seed), **how)
            near = speculative.generate(prompt, large=opened["large"][1], tuned=opened["tuned"][1],
                                        small=opened["small"][1], rng=np.random.default_rng(seed), **how)
            assert far.tokens == near.tokens and len(far.tokens) >= 8
        assert "glue_sessions 4" in client.get("/metrics").text
        assert client.delete("/v1/verify/s0").json()["deleted"] and client.delete("/v1/verify/s0").status_code == 404


def proposal(keep=0, new=(1, 5), ids=(7,), v=V) -> bytes:
    return pack(Proposal(keep, list(new), list(ids), torch.zeros(len(ids) + 1, v), None, Sampling(0.0)))


def test_what_is_no_proposal_is_refused_and_a_lost_text_is_told(parts):
    with client_of(parts["large"]) as client:
        def told(body, **more):
            return client.post("/v1/verify", content=body, headers={"Content-Type": wire.BINARY}, **more)

        good = proposal()
        for wrong in (b"", b"GLPV", good[:-1], good + b"x", b"X" + good[1:], proposal(v=V - 1), proposal(new=()),
                      proposal(new=[5] * 128), proposal(ids=[V + 3])):
            assert told(wrong).status_code == 400, wrong[:40]
        assert told(proposal(keep=2), params={"session": "a"}).json()["error"]["type"] == "session_lost"
        assert told(good, params={"session": "a"}).status_code == 200
        assert told(proposal(keep=3, new=()), params={"session": "a"}).status_code == 200
        assert told(good, params={"session": "../a"}).status_code == 400
        assert told(good, params={"seed": -1}).status_code == 400
        assert client.post("/v1/verify", json={"ids": [1]}).status_code == 400


def test_without_a_judge_there_is_no_such_address(parts):
    with TestClient(application(Served(parts["small"], Limits()))) as client:
        assert client.post("/v1/verify", content=b"").status_code == 404
        assert "/v1/verify" not in client.get("/openapi.json").json()["paths"]
