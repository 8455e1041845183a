"""The law of kinds: what a member says of a text is the sum over its tokens of what its parts say of each."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glue.family import families
from glue.identity import identify
from glue.kinds import kinds, load, weights
from glue.kinds.endpoint import connect
from glue.kinds.local_source import Local
from glue.kinds.prompt import write_prompt
from glue.kinds.seed_history import History
from glue.kinds.tt import sides as sides_of_train
from glue.kinds.tt import write_trains
from glue.member import Member
from glue.merge.tensor_train import decomposed
from glue.mix.levels.model import sites, write
from glue.mix.parts import Dev, Parts
from glue.proxy.pair import write as write_pair
from tests.fake_server import FakeServer, listening

TEXTS = [[1, 5, 9, 7, 3, 8], [1, 30, 21], [1, 17, 4, 4, 25, 6, 11, 12]]


def a_model(tiny, tmp_path) -> tuple[Member, list[Member]]:
    member = tiny("model", seed=3)
    return member, [member] * 3


def an_adapter(tiny, tmp_path) -> tuple[Member, list[Member]]:
    from peft import LoraConfig, get_peft_model

    base = tiny("base", seed=4)
    adapted = get_peft_model(load(base).model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = tmp_path / "merged"
    adapted.merge_and_unload().save_pretrained(merged)
    load(base).tokenizer.save_pretrained(merged)
    return Member("adapter", "adapter", str(tmp_path / "adapter"), base=base), [Member("m", "model", str(merged))] * 3


def a_mixture(tiny, tmp_path) -> tuple[Member, list[Member]]:
    experts = [tiny("one", seed=5), tiny("two", seed=6, hidden_size=24)]
    parts, dev = Parts(tuple(experts), None, experts[0]), Dev(["w5", "w30", "w17"], torch.eye(2)[[0, 1, 0]],
                                                              torch.tensor([0, 1, 0]))
    write(tmp_path / "mixture", parts, [families("routing").choose("linear")(site) for site in sites(parts, dev)])
    member = Member("mixture", "mixture", str(tmp_path / "mixture"))
    return member, [experts[route] for route in load(member).route(TEXTS)]


def a_seed_history(tiny, tmp_path) -> tuple[Member, list[Member]]:
    base = tiny("base", seed=7)
    fingerprint, digest = identify(base.folder)
    base = replace(base, digest=digest, fingerprint=fingerprint)
    (tmp_path / "history").mkdir()
    History(digest, 3, 1e-2, np.linspace(-1, 1, 8, dtype=np.float32)).write(tmp_path / "history")
    member = Member("history", "seed_history", str(tmp_path / "history"), base=base)
    return member, [as_model(member, base, tmp_path / "replayed")] * 3


def a_tensor_train(tiny, tmp_path) -> tuple[Member, list[Member]]:
    base, generator = tiny("base", seed=8), torch.Generator().manual_seed(0)
    rows, columns = weights(base).headers["model.layers.0.self_attn.v_proj.weight"].shape
    change = 0.1 * torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    (tmp_path / "train").mkdir()
    train = decomposed(change, sides_of_train(rows), sides_of_train(columns)).train
    write_trains(tmp_path / "train", {"model.layers.0.self_attn.v_proj": train})
    member = Member("train", "tensor_train", str(tmp_path / "train"), base=base)
    return member, [as_model(member, base, tmp_path / "trained")] * 3


def as_model(member: Member, base: Member, folder: Path) -> Member:
    """The tensors of a member as an ordinary model folder."""
    below, held = load(base), weights(member)
    below.model.load_state_dict(dict(held.items()), strict=False)
    below.model.save_pretrained(folder)
    below.tokenizer.save_pretrained(folder)
    return Member("m", "model", str(folder))


def a_prompt(tiny, tmp_path) -> tuple[Member, list[Member]]:
    """No plain model is what a prompt makes of its base, so here it stands for itself; see tests/test_prompt.py."""
    (tmp_path / "prompt").mkdir()
    write_prompt(tmp_path / "prompt", torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    member = Member("prompt", "prompt", str(tmp_path / "prompt"), base=tiny("base", seed=9))
    return member, [member] * 3


def a_proxy(tiny, tmp_path) -> tuple[Member, list[Member]]:
    """Where the large member is the untuned small one, a proxy is the tuned one."""
    from peft import LoraConfig, get_peft_model

    small = tiny("small", seed=9)
    adapted = get_peft_model(load(small).model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "tuned")
    tuned = Member("tuned", "adapter", str(tmp_path / "tuned"), base=small)
    write_pair(tmp_path / "proxy", large=small, tuned=tuned, small=small, alpha=1.0)
    return Member("proxy", "proxy", str(tmp_path / "proxy"), base=small), [tuned] * 3


SERVERS = ExitStack()  # they answer as long as there are tests


def an_endpoint(tiny, tmp_path) -> tuple[Member, list[Member]]:
    served = tiny("served", seed=10)
    url = SERVERS.enter_context(listening(FakeServer(Local(load(served)))))
    connect(tmp_path / "endpoint", url, tokenizer=served)
    return Member("endpoint", "endpoint", str(tmp_path / "endpoint")), [served] * 3


MADE = {"model": a_model, "adapter": an_adapter, "mixture": a_mixture, "seed_history": a_seed_history,
        "tensor_train": a_tensor_train, "prompt": a_prompt,
        "endpoint": an_endpoint, "proxy": a_proxy}


@torch.no_grad()
@pytest.mark.parametrize("kind", [method.name for method in kinds])
def test_log_likelihoods_sum_to_the_logits_of_the_parts(kind, tiny, tmp_path):
    member, parts = MADE[kind](tiny, tmp_path)
    running = load(member)
    loss = torch.nn.functional.cross_entropy
    for text, part in zip(TEXTS, parts, strict=True):
        ids = torch.tensor([text])
        whole = -float(loss(running.model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
        logits = load(part).model(ids).logits.double()[0]
        steps = [float(logits[k, token] - logits[k].logsumexp(0)) for k, token in enumerate(text[1:])]
        assert abs(whole - sum(steps)) <= 1e-4
        by_hand = torch.cat([running.model(ids[:, :k + 1], **_route(running, text)).logits[0, -1:]
                             for k in range(len(text) - 1)]).log_softmax(-1)
        assert abs(float(by_hand.gather(1, ids[0, 1:, None]).sum()) - whole) <= 1e-4


def _route(running, text: list[int]) -> dict:
    return {"routes": torch.tensor(running.route([text]))} if running.route else {}
