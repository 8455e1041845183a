"""Steps federate, clients and refold on a model of one layer: what comes out, bit by bit, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from glue.checkpoint import Checkpoint
from glue.errors import GlueError, RunError
from glue.family import families
from glue.federate.ledger import KEPT, SLOTS, SUMS, lora_bytes
from glue.identity import identify
from glue.kinds import weights
from glue.member import Member
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.steps import Job
from glue.workers import Workers
from glue.zoo import Zoo

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 16}
LAYERS = [(32, 32), (32, 32)]  # of q_proj and v_proj
SETTINGS = {"clients": 4, "steps": 3, "learning_rate": 1e-2, "batch_size": 4, "rank": 2,
            "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two datasets of 40 items and a base that has seen a little of both."""
    from glue.tune.pretrain import pretrain

    folder = tmp_path_factory.mktemp("federate")
    torch.set_num_threads(1)
    for name, word in (("ones", "a"), ("twos", "b")):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(
            json.dumps({"question": f"{word} {k % 7} {k % 5} =", "answer": f"{k % 5} {word}"}) + "\n"
            for k in range(40)))
    pretrain(folder / "base", data=[(folder / "ones", 1.0), (folder / "twos", 1.0)],
             vocabulary=[folder / "ones", folder / "twos"], architecture=SHAPE, steps=5, batch_size=8,
             learning_rate=1e-2, seed=0, report=lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def base(place) -> Member:
    return Member("base", "model", str(place / "base"), digest=identify(place / "base")[1])


def data_of(place: Path) -> dict[Member, float]:
    return {Member(name, "dataset", str(place / name), digest=identify(place / name)[1]): 1.0
            for name in ("ones", "twos")}


def federated(place: Path, base: Member, out: Path, *, seed: int = 0, workers: Workers | None = None,
              **changed: Any) -> Member:
    """Run the step by itself; the member that its folder is."""
    out.mkdir(exist_ok=True)
    choice = families("steps")["federate"].bind({"base": "base", "data": {"ones": 1, "twos": 1}, **SETTINGS, **changed})
    choice.method.traits["words"](**choice.params)
    data = data_of(place)
    choice.method.traits["check"](**{**choice.params, "base": base, "data": data})
    made = choice(Job("t/fed", out, seed, workers or Workers(0), place), base=base, data=data,
                  **({"suite": changed["suite"]} if "suite" in changed else {}))
    return Member("t/fed", made.kind, str(out), base=base, digest=identify(out)[1], note=made.note)


def told(member: Member, name: str = "rounds.json") -> Any:
    return json.loads((member.folder / name).read_text())


def dense(member: Member) -> dict[str, torch.Tensor]:
    """What a member differs from its base in, fp64."""
    own, below = weights(member), weights(member.base)
    return {name: own[name].double() - below[name].double() for name in below.headers}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """|one - other| / |other|."""
    size = sum(float(tensor.square().sum()) for tensor in other.values()) ** 0.5
    return sum(float((one[name] - other[name]).square().sum()) for name in other) ** 0.5 / size


def mean_of(member: Member) -> dict[str, torch.Tensor]:
    """The mean of what its clients sent, weighted by their examples, in fp64."""
    report, = told(member)
    total: dict[str, torch.Tensor] = {}
    for client, count in zip(report["clients"], report["examples"], strict=True):
        sent = member.folder / "clients" / client
        one = dense(Member(client, "adapter" if (sent / "adapter_config.json").exists() else "model", str(sent),
                           base=member.base))
        for name, tensor in one.items():
            total[name] = total.get(name, 0.0) + tensor * count / sum(report["examples"])
    return total


def test_flora_is_the_weighted_mean_of_what_clients_sent_at_any_ranks(place, base, tmp_path):
    ranks = {"c0": 4, "c1": 1, "c2": 2, "c3": 3}
    member = federated(place, base, tmp_path / "f", rank=ranks, partition={"dirichlet": 0.5}, register_clients=True)
    assert apart(dense(member), mean_of(member)) < 1e-6 and told(member)[0]["aggregation_error"] < 1e-6
    assert Checkpoint(member.folder).headers[
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (10, 32)


def test_averages_of_factors_are_far_from_the_mean_where_clients_begin_apart_and_near_where_they_share(
        place, base, tmp_path):
    off = {start: told(federated(place, base, tmp_path / start, combine="fedit", start=start))[0]["aggregation_error"]
           for start in ("own", "shared", "frozen")}
    assert off["own"] > 0.1 > off["shared"] > 1e-6 > off["frozen"]
    ranks = {"c0": 4, "c1": 1, "c2": 2, "c3": 3}
    assert told(federated(place, base, tmp_path / "z", combine="zero_pad", rank=ranks))[0]["aggregation_error"] > 0.1


def test_ffa_is_exact_and_stays_at_the_rank_of_its_clients(place, base, tmp_path):
    member = federated(place, base, tmp_path / "f", combine="ffa", start="frozen", register_clients=True)
    assert apart(dense(member), mean_of(member)) < 1e-6
    assert told(member, "adapter_config.json")["r"] == 2
    twice = federated(place, base, tmp_path / "2", combine="ffa", start="frozen", rounds=2)
    assert told(twice, "adapter_config.json")["r"] == 2  # since A is the same in all rounds
    assert apart(dense(twice), dense(federated(place, base, tmp_path / "s", start="frozen", rounds=2))) < 1e-4


def test_one_client_is_a_local_run_to_the_bit(place, base, tmp_path):
    member = federated(place, base, tmp_path / "f", clients=1, register_clients=True)
    alone, sent = Checkpoint(member.folder), Checkpoint(member.folder / "clients/c0")
    assert set(alone) == set(sent) and all(torch.equal(alone[name], sent[name]) for name in alone)
    assert told(member, "adapter_config.json")["lora_alpha"] == 4
    full = federated(place, base, tmp_path / "g", clients=1, kind="full", combine="linear", register_clients=True)
    whole, own = Checkpoint(full.folder), Checkpoint(full.folder / "clients/c0")
    assert all(torch.equal(whole[name], own[name]) for name in whole)


def test_all_weights_are_averaged_by_examples(place, base, tmp_path):
    member = federated(place, base, tmp_path / "f", kind="full", combine="linear", register_clients=True,
                       partition={"dirichlet": 0.5})
    assert member.kind == "model" and apart(dense(member), mean_of(member)) < 1e-6
    assert (member.folder / "tokenizer.json").is_file() and told(member)[0]["heterogeneity"]["tau"]


def test_nothing_added_is_the_base_itself(place, base, tmp_path):
    for name, more in {"lora": {}, "full": {"kind": "full", "combine": "linear"}, "two": {"rounds": 2}}.items():
        member = federated(place, base, tmp_path / name, server_scale=0, **more)
        assert all(not delta.any() for delta in dense(member).values())


def test_the_server_scale_is_a_factor(place, base, tmp_path):
    once, twice = (dense(federated(place, base, tmp_path / str(scale), server_scale=scale)) for scale in (1, 2))
    assert apart(twice, {name: 2 * delta for name, delta in once.items()}) < 1e-6


def test_two_rounds_are_one_adapter_that_holds_both(place, base, tmp_path):
    ranks = {"c0": 4, "c1": 1, "c2": 2, "c3": 3}
    one = federated(place, base, tmp_path / "1", rank=ranks)
    two = federated(place, base, tmp_path / "2", rank=ranks, rounds=2, register_clients=True)
    assert [report["clients"] for report in told(two)] == [["c0", "c1", "c2", "c3"]] * 2
    headers = Checkpoint(two.folder).headers
    assert {header.shape for name, header in headers.items() if "lora_A" in name} == {(20, 32)}
    first, both = Checkpoint(one.folder), Checkpoint(two.folder)
    for name in first:  # what the first round came to is its first half, in other scales
        half = both[name][:10] if "lora_A" in name else both[name][:, :10]
        assert torch.linalg.matrix_rank(torch.cat([half.flatten()[None], first[name].flatten()[None]]).double()) == 1
    sent = two.folder / "clients/c0"  # on top of the first round
    assert Checkpoint(sent).headers["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (14, 32)


def test_the_number_of_workers_changes_no_bit(place, base, tmp_path):
    here = federated(place, base, tmp_path / "0", rounds=2)
    with Workers(3) as workers:
        assert federated(place, base, tmp_path / "3", rounds=2, workers=workers).digest == here.digest


def test_methods_on_whole_models_take_client_adapters_too(place, base, tmp_path):
    member = federated(place, base, tmp_path / "f", rounds=2, combine={"ties": {"density": 0.5}})
    assert member.kind == "model"
    exact = federated(place, base, tmp_path / "g", combine="linear")
    stacked = federated(place, base, tmp_path / "h", combine="flora")
    assert apart(dense(exact), dense(stacked)) < 1e-5


def test_the_ledger_says_what_everyone_sent_got_and_sees(place, base, tmp_path):
    member = federated(place, base, tmp_path / "f", rounds=2, rank=256, clients=2)
    ledger = told(member, "ledger.json")
    own, stack = lora_bytes(LAYERS, 256), lora_bytes(LAYERS, 512)
    for account in ledger["clients"].values():
        assert account["up"] == pytest.approx(2 * own, rel=0.05) and account["up"] > 2 * own  # headers and notes
        assert account["down"] == pytest.approx(stack, rel=0.05) and account["down"] > stack
        assert account["rounds"] == [1, 2] and account["asked"] == 2
    assert ledger["privacy"]["revealed"] == SLOTS
    for name, combine in {"cut": {"flora": {"rank": 2}}, "mean": "flexlora"}.items():
        other = federated(place, base, tmp_path / name, combine=combine)
        assert told(other, "ledger.json")["privacy"]["revealed"] == SUMS
    kept = federated(place, base, tmp_path / "kept", combine="flexlora", register_clients=True)
    assert told(kept, "ledger.json")["privacy"]["revealed"] == KEPT


def test_an_update_that_is_too_large_is_refused_and_told(place, base, tmp_path):
    with pytest.raises(RunError, match=r"round 1 has 0 usable updates of 4 and needs 4.*c0: it changes the base by"):
        federated(place, base, tmp_path / "f", norm_bound=1e-9)


def test_a_client_that_fails_does_not_stop_a_round_that_has_its_quorum(place, base, tmp_path, monkeypatch):
    from glue.tune import finetune as module

    before = module.finetune

    def breaks(out: Path, **options: Any) -> None:
        if out.name.endswith("c2"):
            raise MemoryError("no room")
        before(out, **options)

    monkeypatch.setattr(module, "finetune", breaks)
    member = federated(place, base, tmp_path / "f", quorum=0.75, register_clients=True)
    assert told(member)[0]["clients"] == ["c0", "c1", "c3"] and apart(dense(member), mean_of(member)) < 1e-6
    assert told(member, "ledger.json")["clients"]["c2"]["failed"] == {"1": "MemoryError: no room"}
    monkeypatch.undo()
    whole = federated(place, base, tmp_path / "g", register_clients=True)
    without = refolded(whole, tmp_path / "h", without=["c2"])
    assert without.digest == member.digest  # a client that is taken out was never there


def refolded(of: Member, out: Path, **params: Any) -> Member:
    out.mkdir()
    choice = families("steps")["refold"].bind({"of": "of", **params})
    choice.method.traits["check"](**{**choice.params, "of": of})
    made = choice(Job("t/again", out, 0, Workers(0), out), of=of)
    return Member("t/again", made.kind, str(out), base=of.base, digest=identify(out)[1], note=made.note)


@pytest.mark.parametrize("settings", [{}, {"kind": "full", "combine": "linear"}], ids=["lora", "full"])
def test_who_comes_late_is_put_in_later_and_who_leaves_is_gone_to_the_bit(place, base, tmp_path, monkeypatch, settings):
    whole = federated(place, base, tmp_path / "whole", register_clients=True, **settings)
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr("glue.steps._server.time", SimpleNamespace(monotonic=lambda: next(clock)))  # not of training
    early = federated(place, base, tmp_path / "early", register_clients=True, quorum=0.5, deadline=15, patience=1000,
                      **settings)
    assert told(early)[0]["clients"] == ["c0", "c1"] and sorted(p.name for p in (early.folder / "late").iterdir()) == [
        "c2", "c3"]
    assert refolded(early, tmp_path / "later", late=True).digest == whole.digest != early.digest
    less = refolded(whole, tmp_path / "less", without=["c2", "c3"])
    assert less.digest == early.digest and told(less, "ledger.json")["clients"]["c2"]["rounds"] == []
    assert refolded(less, tmp_path / "least", without=["c1"]).digest == refolded(
        whole, tmp_path / "once", without=["c3", "c2", "c1"]).digest
    with pytest.raises(GlueError, match="nothing of a client 'c9'"):
        refolded(whole, tmp_path / "x", without=["c9"])


@pytest.mark.parametrize("start", ["own", "frozen"])
def test_privacy_clips_what_leaves_a_client_noises_it_and_tells_what_that_is_worth(place, base, tmp_path, start):
    plain = federated(place, base, tmp_path / "plain", start=start)
    norm = Checkpoint(base.folder)
    size = sum(float(norm[name].double().square().sum()) for name in norm) ** 0.5
    clipped = federated(place, base, tmp_path / "clip", start=start, privacy={"clip": 0.01})
    assert min(told(plain)[0]["heterogeneity"]["tau"]) * size > 0.02
    assert [tau * size for tau in told(clipped)[0]["heterogeneity"]["tau"]] == pytest.approx([0.01] * 4, rel=1e-4)
    noised = federated(place, base, tmp_path / "noise", start=start, privacy={"clip": 0.01, "noise": 2.0}, rounds=2,
                       norm_bound=100)
    assert min(told(noised)[0]["heterogeneity"]["tau"]) * size > 0.02
    ledger = told(noised, "ledger.json")["privacy"]["noise"]
    assert ledger["answers"] == dict.fromkeys(["c0", "c1", "c2", "c3"], 2) and 1 < ledger["epsilon"]["c0"] < 10
    assert told(clipped, "ledger.json")["privacy"]["noise"]["epsilon"]["c0"] == "none"


@pytest.mark.parametrize(("changed", "said"), [
    ({"privacy": {"noise": 1.0}}, "write  privacy: {clip: 1"),
    ({"privacy": {"clip": 1.0}, "kind": "full", "combine": "linear"}, "privacy is for adapters"),
    ({"targets": []}, "need layers to sit on"),
    ({"kind": "full"}, "'flora' combines adapters"),
    ({"combine": "ffa"}, "add  start: frozen"),
    ({"combine": "fedit", "rank": {"c0": 1, "c1": 2, "c2": 2, "c3": 2}}, "clients have several"),
    ({"server_scale": [1.0, 2.0]}, "compared on dev items"),
    ({"clients": ["a", "a"]}, "two clients have one name"),
    ({"clients": ["a", "../b"]}, "cannot be the name of a client"),
    ({"partition": {"dirichlet": 0}}, "is no partition"),
    ({"partition": {"given": {"a": {"oness": 1}}}}, "did you mean 'ones'"),
    ({"rank": {"c0": 1}}, "client 'c1' has no rank"),
    ({"combine": "linear", "rounds": 2, "register_clients": True}, "sits on a model that is not kept"),
    ({"clients": 3, "partition": "by_dataset"}, "client 2 of 3 would have 0 items"),
])
def test_words_that_do_not_go_together_are_told(place, base, tmp_path, changed, said):
    with pytest.raises(GlueError) as problem:
        federated(place, base, tmp_path / "f", **changed)
    assert said in str(problem.value)


RECIPE = """
steps:
  - {as: kind, step: data, skill: {kind: {things: 45}}, train: 200, dev: 30, test: 30}
  - {as: trans, step: data, skill: trans, train: 200, dev: 30, test: 30}
  - {as: base, step: pretrain, steps: 5, learning_rate: 6e-3, batch_size: 8, vocabulary: [kind, trans],
     architecture: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48},
     data: {kind: 1, trans: 1}}
  - {as: fed, step: federate, base: base, data: {kind: 1, trans: 1}, clients: 2, partition: by_dataset, steps: 2,
     learning_rate: 5e-3, batch_size: 4, targets: [q_proj], server_scale: [0.5, 1], suite: s:dev,
     register_clients: true}
  - {as: parts, step: clients, of: fed}
  - {as: mixed, step: merge, members: [parts], base: base, method: {ties: {density: 0.5}}}
  - {as: best, step: search, each: parts, base: root, suite: s:dev, strategy: best}
  - {as: less, step: refold, of: fed, without: [c1]}
"""


def test_in_a_recipe_a_federation_its_clients_and_its_versions_are_members_like_others(tmp_path):
    (tmp_path / "benchmarks/suites").mkdir(parents=True)
    (tmp_path / "benchmarks/suites/s.yaml").write_text(
        "tasks:\n  kind: {data: r/kind, output: choice, metric: acc, chance: 0.25}\n")
    (tmp_path / "zoo.yaml").write_text("members: {}\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    first = make_plan(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml"))
    assert {task.name: task.makes for task in first}["r/fed"] == "adapter"
    with Workers(0) as workers:
        plan = run(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml"), workers)
    zoo = Zoo(tmp_path / "zoo.yaml")
    assert [zoo[f"r/parts/c{k}"].kind for k in range(2)] == ["adapter", "adapter"]
    assert plan["fed"].seen and plan["less"].origin.inputs["of"] == (plan["fed"].digest,)
    assert set(told(plan["fed"])[0]["server_scale"]["tried"]) == {"0.5", "1"}
    assert {one.name for one in plan["parts"].elements[0].members} == {"r/parts/c0", "r/parts/c1"}
    assert not (plan["fed"].folder / "federation").exists()
    before = (tmp_path / "zoo/members.yaml").read_bytes()
    with Workers(0) as workers:
        assert run(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml"), workers).done
    assert (tmp_path / "zoo/members.yaml").read_bytes() == before
