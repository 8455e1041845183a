"""Building mixtures: experts stream into one folder, and a router learns from dev items who answers what."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from glue.checkpoint import Checkpoint, weights_digest
from glue.errors import CheckpointError, MethodError
from glue.family import families
from glue.kinds import load, weights
from glue.kinds.mixture import left_padded
from glue.kinds.modelling.model_mixture import chosen, pooled
from glue.member import Member
from glue.mix.build import build, check
from glue.mix.fit import fitted
from glue.mix.site import Site, pooled_states, survey


def some_prompts(b: int = 9, s: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 40, (b, s), generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def two_experts(tiny) -> list[Member]:
    return [tiny("one", seed=1), tiny("two", seed=2, hidden_size=24, tie_word_embeddings=True)]


TEXTS = ["w3 w4 w5", "w30 w31", "w9", "w38 w2 w20 w11", "w7 w7", "w25"]
WINS = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 3)
ROUTERS = families("routing")


def built(tmp_path, experts: list[Member], router="linear", **more) -> Member:
    site = survey(experts, TEXTS, WINS, torch.arange(6) % 2)
    build(tmp_path / "mixture", experts, ROUTERS.choose(router), site, **more)
    return Member("mixture", "mixture", str(tmp_path / "mixture"))


def test_a_built_mixture_routes_as_its_gate_was_taught(tiny, tmp_path):
    running = load(built(tmp_path, two_experts(tiny)))
    contexts = [running.tokenizer(text)["input_ids"] for text in TEXTS]
    assert running.route(contexts) == [0, 1] * 3
    assert running.route([contexts[3], contexts[0]]) == [1, 0]


@pytest.mark.parametrize("router", [{"linear": {"top_k": 2}}, {"mlp": {"width": 5, "top_k": 2}},
                                    {"prompt": {"temperature": 3.0, "top_k": 2}}, "random", "uniform"])
def test_a_written_router_weighs_as_the_gate_it_was_made_from(tiny, tmp_path, router):
    experts = two_experts(tiny)
    site = survey(experts, TEXTS, WINS, torch.arange(6) % 2)
    gate = ROUTERS.choose(router)(site)
    build(tmp_path / "mixture", experts, ROUTERS.choose(router), site)
    running = load(Member("mixture", "mixture", str(tmp_path / "mixture")))
    served = torch.cat([running.model.gate(torch.tensor([running.tokenizer(text)["input_ids"]])) for text in TEXTS])
    assert difference(served, chosen(gate.logits(site.hidden), gate.top_k)) <= 1e-5


def test_a_pinned_route_of_a_built_mixture_is_the_expert_it_was_built_from(tiny, tmp_path):
    experts, ids = two_experts(tiny), some_prompts()
    running = load(built(tmp_path, experts))
    for i, expert in enumerate(experts):
        with running.pinned(i):
            assert torch.equal(running.model(ids).logits, load(expert).model(ids).logits)


def test_several_experts_a_prompt_are_pinned_by_their_weights(tiny, tmp_path):
    running = load(built(tmp_path, two_experts(tiny), {"linear": {"top_k": 2}}))
    ids = torch.tensor([[1, 9, 4, 30]])
    route, = running.route(ids.tolist())
    assert len(route) == 2 and abs(sum(route) - 1) <= 1e-6
    with running.pinned(route):
        pinned = running.model(ids).logits
    assert difference(pinned, running.model(ids).logits) <= 1e-6


def test_an_empty_context_has_a_route(tiny, tmp_path):
    running = load(built(tmp_path, two_experts(tiny)))
    assert running.route([[]]) == running.route([[1]])


def test_the_reader_may_be_any_expert(tiny, tmp_path):
    experts = two_experts(tiny)
    site = survey(experts, TEXTS, WINS, torch.arange(6) % 2, reader=1, layer=2)
    build(tmp_path / "mixture", experts, ROUTERS.choose("linear"), site)
    running = load(Member("mixture", "mixture", str(tmp_path / "mixture")))
    assert running.model.config.hidden_size == 24 and len(running.model.router.mean) == 24
    assert running.route([running.tokenizer(text)["input_ids"] for text in TEXTS]) == [0, 1] * 3


def test_states_for_the_router_are_those_it_sees_when_it_serves(tiny):
    running = load(tiny("one", seed=1))
    states = pooled_states(running, TEXTS)
    for text, state in zip(TEXTS, states, strict=True):
        ids = torch.tensor([running.tokenizer(text)["input_ids"]])
        assert difference(pooled(running.model, ids, None, -1)[0], state) <= 1e-6
        plain = running.model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)
        assert difference(plain, state) <= 1e-6


def test_the_digest_is_that_of_the_weights_whatever_the_shards(tiny, tmp_path):
    experts = two_experts(tiny)
    site = survey(experts, TEXTS, WINS, torch.arange(6) % 2)
    digests = [build(tmp_path / name, experts, ROUTERS.choose("linear"), site, shard_size=size)
               for name, size in (("whole", 10**9), ("parts", 20_000))]
    assert digests[0] == digests[1] == weights_digest(Checkpoint(tmp_path / "parts"))
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    logits = [load(Member("m", "mixture", str(tmp_path / name))).model(some_prompts()).logits
              for name in ("whole", "parts")]
    assert torch.equal(*logits)


def test_an_adapter_can_be_an_expert(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny("base", seed=3)
    get_peft_model(load(base).model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
                   ).save_pretrained(tmp_path / "lora")
    experts = [base, Member("lora", "adapter", str(tmp_path / "lora"), base=base)]
    running, ids = load(built(tmp_path, experts)), some_prompts()
    with running.pinned(1):
        assert difference(running.model(ids).logits, load(experts[1]).model(ids).logits) <= 1e-5


def test_a_mixture_runs_in_plain_transformers_for_who_trusts_its_code(tiny, tmp_path):
    member, ids = built(tmp_path, two_experts(tiny)), some_prompts(3)
    torch.save({"ids": ids, "logits": load(member).model(ids).logits}, tmp_path / "expected.pt")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
told = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({member.path!r}, trust_remote_code=True)
difference = (model(told["ids"]).logits - told["logits"]).abs().max()
assert difference <= 1e-6 * told["logits"].abs().max(), difference
assert AutoTokenizer.from_pretrained({member.path!r})("w3")["input_ids"] == [1, 3]
assert not [name for name in sys.modules if name == "glue" or name.startswith("glue.")]
print("the same")
"""
    home = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | home)
    assert done.stdout.strip().endswith("the same"), done.stderr


def test_experts_of_different_vocabularies_are_refused_with_the_odd_token(tiny):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"v{k}": k for k in range(3, 40)}}
    with pytest.raises(MethodError, match=r"different vocabularies \(40 and 40 rows, e.g. 'v3' is token 3"):
        check([tiny("one"), tiny("two", words=words)])
    with pytest.raises(MethodError, match=r"\(40 and 48 rows\)"):
        check([tiny("one"), tiny("long", vocab_size=48)])


def test_more_experts_a_prompt_than_there_are_is_refused(tiny, tmp_path):
    with pytest.raises(MethodError, match="would choose 3 of 2 experts"):
        built(tmp_path, two_experts(tiny), {"random": {"top_k": 3}})


def test_an_expert_that_does_not_fit_its_configuration_is_refused_before_anything_is_written(tiny, tmp_path):
    experts = two_experts(tiny)
    config = LlamaConfig.from_pretrained(experts[1].path)
    config.intermediate_size = 50
    config.save_pretrained(experts[1].path)
    site = survey(experts, TEXTS, WINS, torch.arange(6) % 2)
    with pytest.raises(CheckpointError, match=r"'two': its weights have 'model.layers.0.mlp.down_proj.weight' as "
                                              r"\(24, 48\), its configuration asks for \(24, 50\)"):
        build(tmp_path / "mixture", experts, ROUTERS.choose("linear"), site)
    assert not (tmp_path / "mixture").exists()


def test_rotary_frequencies_in_old_files_are_left_out(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    experts = two_experts(tiny)
    file = experts[0].folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file,
              metadata={"format": "pt"})
    assert len(weights(experts[0])) == 22
    assert not [name for name in Checkpoint(built(tmp_path, experts).folder) if "inv_freq" in name]


def test_batches_are_of_like_length_and_hold_every_row_once():
    rows = [[5] * n for n in (3, 9000, 1, 8000, 3, 2)]
    batches = list(left_padded(rows))
    assert sorted(place for places, _, _ in batches for place in places) == list(range(6))
    assert [ids.shape for _, ids, _ in batches] == [(1, 9000), (2, 8000), (3, 3)]
    places, ids, mask = batches[2]
    assert [int(mask[places.index(k)].sum()) for k in (4, 5, 2)] == [3, 2, 1] and torch.equal(ids, mask * 5)


# routers

def a_line(wins: torch.Tensor, hidden: torch.Tensor, tasks=None) -> Site:
    """Prompts that differ in few features."""
    m, e = wins.shape
    return Site(tuple("abcd"[:e]), hidden, wins, torch.zeros(m, dtype=torch.long) if tasks is None else tasks,
                [f"p{j}" for j in range(m)], lambda texts: torch.tensor([[float(text), 0.0] for text in texts]))


def test_a_hidden_layer_learns_what_no_plane_separates():
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]).repeat(10, 1)
    right = (corners[:, 0] != corners[:, 1]).long()
    site = a_line(torch.nn.functional.one_hot(right, 2).float(), corners)
    found = {name: (ROUTERS.choose(name)(site).logits(corners).argmax(1) == right).float().mean()
             for name in ("linear", "mlp")}
    assert found["mlp"] == 1.0 and found["linear"] <= 0.75


def test_items_on_which_experts_agree_teach_nothing():
    hidden = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    wins = torch.nn.functional.one_hot((hidden[:, 0] > 0).long(), 2).float()
    wins[20:] = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).repeat(10, 1)
    site = a_line(wins, hidden)
    scrambled = replace(site, wins=torch.cat([wins[:20], 1 - wins[20:]]))
    one, other = (fitted(each, width=0, steps=20, lr=0.1, weight_decay=0.0, top_k=1) for each in (site, scrambled))
    assert torch.equal(one.weight, other.weight) and float(one.weight.abs().max()) > 0.1


def test_a_share_won_counts_for_what_it_is_worth_against_the_best():
    hidden = torch.ones(10, 2)
    site = a_line(torch.tensor([[0.2, 0.6, 0.4]]).repeat(10, 1), hidden)
    assert int(ROUTERS.choose("linear")(site).logits(hidden)[0].argmax()) == 1


def test_the_linear_router_is_logistic_regression(tmp_path):
    """Without decay and with two experts that are never right together, scikit-learn finds the same boundary."""
    from sklearn.linear_model import LogisticRegression

    rng = torch.Generator().manual_seed(5)
    hidden = torch.randn(200, 3, generator=rng) * torch.tensor([1.0, 5.0, 0.1]) + 2
    label = (hidden[:, 0] + hidden[:, 1] / 5 + torch.randn(200, generator=rng) > 2.4).long()
    site = a_line(torch.nn.functional.one_hot(label, 2).float(), hidden)
    gate = fitted(site, width=0, steps=3000, lr=0.02, weight_decay=0.0, top_k=1)
    ours = gate.logits(hidden).softmax(1)[:, 1]
    standard = ((hidden - hidden.mean(0)) / hidden.std(0, correction=0)).numpy()
    theirs = LogisticRegression(C=1e6, tol=1e-8).fit(standard, label.numpy()).predict_proba(standard)[:, 1]
    assert difference(ours.double(), torch.from_numpy(theirs)) <= 1e-3


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_experts_that_differ_nowhere_cannot_teach_a_router(name):
    with pytest.raises(MethodError, match="the same on each of the 4 dev items"):
        ROUTERS.choose(name)(a_line(torch.ones(4, 2), torch.randn(4, 2)))


def test_a_feature_that_never_changes_does_not_blow_up():
    hidden = torch.tensor([[1.0, 7.0], [2.0, 7.0], [3.0, 7.0], [4.0, 7.0]])
    gate = ROUTERS.choose("linear")(a_line(torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), hidden))
    assert float(gate.scale[1]) == 1.0 and gate.logits(hidden).argmax(1).tolist() == [0, 0, 1, 1]


def test_prompts_given_by_name_make_the_gate():
    site = a_line(torch.eye(2), torch.zeros(2, 2))
    gate = ROUTERS.choose({"prompt": {"prompts": {"b": ["4", "6"], "a": ["-1", "1"]}}})(site)
    assert torch.allclose(gate.weight, torch.tensor([[-1.0, 0.0], [1.0, 0.0]])) and float(gate.mean[0]) == 2.5
    assert gate.logits(torch.tensor([[2.4, 9.0], [2.6, -9.0]])).argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("prompts, said", [({"a": ["1"], "bb": ["2"]}, "'bb', which is no expert"),
                                           ({"a": ["1"]}, "no prompts for the expert 'b'")])
def test_prompts_for_the_wrong_names_are_refused(prompts, said):
    with pytest.raises(MethodError, match=said):
        ROUTERS.choose({"prompt": {"prompts": prompts}})(a_line(torch.eye(2), torch.zeros(2, 2)))


def test_an_expert_that_is_best_on_no_task_is_never_chosen_by_the_prompt_router():
    hidden = torch.tensor([[0.0, 0.0], [0.0, 1.0], [5.0, 0.0], [5.0, 1.0]])
    wins = torch.tensor([[1.0, 0, 0.5]] * 2 + [[0, 1.0, 0.5]] * 2)
    gate = ROUTERS.choose({"prompt": {"top_k": 3}})(a_line(wins, hidden, torch.tensor([0, 0, 1, 1])))
    shares = chosen(gate.logits(hidden), 3)
    assert shares.argmax(1).tolist() == [0, 0, 1, 1] and shares[:, 2].tolist() == [0.0] * 4
