"""Black-box prompt tuning: CMA-ES as a value, points that travel and are checked, and a prompt that is a member."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cmaes import CMA

from glue.errors import GlueError, RecipeError, RunError
from glue.family import families
from glue.federate.bpt import (
    HEAD,
    Agreed,
    Tried,
    draws,
    heard_reply,
    heard_state,
    pooled,
    reply_bytes,
    run,
    searched,
    state_bytes,
    told_reply,
    told_state,
)
from glue.federate.evolution import Belief, Pace, powered, taught
from glue.federate.rounds import Terms
from glue.federate.spool import Spool
from glue.federate.subspace import subspace
from glue.federate.update import Refused
from glue.identity import identify
from glue.kinds import load
from glue.kinds.prompt import read_prompt, write_prompt
from glue.member import Member, Table
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.reproduce import reproduce
from glue.run import run as run_recipe
from glue.steps import Job
from glue.workers import Workers
from glue.zoo import Zoo
from tests.federations import breaking, cut_off

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 24}
SETTINGS = {"clients": 3, "rounds": 1, "popsize": 4, "dim": 6, "tokens": 3, "batch_size": 4}
Where = Callable[[np.ndarray], np.ndarray]  # points [k, d] -> losses [k]


def sphere(points: np.ndarray) -> np.ndarray:
    return (points**2).sum(1)


def bent(points: np.ndarray) -> np.ndarray:
    """A valley that is 100 times longer than wide, across the axes."""
    d = points.shape[1]
    turn = np.linalg.qr(np.random.default_rng(4).standard_normal((d, d))).Q
    return ((points @ turn)**2 * np.logspace(0, 4, d)).sum(1)


def asking(agreed: Agreed, where: dict[str, Where], asked: list[tuple[int, str]] | None = None, *,
           bad: tuple[tuple[int, str], ...] = (), backwards: bool = False) -> Any:
    """Clients that judge points each by a function of its own; `bad` ones fail."""
    def ask(round: int, messages: dict[str, bytes]) -> Iterator[tuple[str, bytes | str]]:
        for client, message in sorted(messages.items(), reverse=backwards):
            if asked is not None:
                asked.append((round, client))
            if (round, client) in bad:
                yield client, "out of memory"
                continue
            yield client, searched(message, agreed, client, lambda g, points, client=client: where[client](points))

    return ask


def found(agreed: Agreed, where: dict[str, Where], place: Path, rounds: int, **how: Any) -> Belief:
    return run(dict.fromkeys(where, 1), Terms(rounds), agreed, Spool(place), ask=asking(agreed, where, **how))


def played(agreed: Agreed, where: dict[str, Where], rounds: int) -> Iterator[Belief]:
    """The same, round after round, without a file."""
    belief = Belief.around(np.zeros(agreed.dim), agreed.sigma)
    for round in range(1, rounds + 1):
        message = told_state(agreed, belief, round)
        belief = pooled(belief, {client: heard_reply(searched(message, agreed, client, lambda g, x, f=f: f(x)), message,
                                                     agreed) for client, f in where.items()})
        yield belief


def same(one: Belief, other: Belief) -> bool:
    return all(np.array_equal(mine, theirs) for mine, theirs in zip(vars(one).values(), vars(other).values(),
                                                                    strict=True))


# CMA-ES

@pytest.mark.parametrize("d, k", [(20, 12), (64, 20), (5, 40), (3, 4), (3, 5)])
def test_a_belief_becomes_what_the_library_makes_of_the_same_points(d, k):
    belief, peer = Belief.around(np.ones(d), 0.7), CMA(np.ones(d), 0.7, population_size=k)
    rng = np.random.default_rng(0)
    for _ in range(60):
        points = belief.points(belief.steps(rng.standard_normal((k, d))))
        losses = bent(points)
        peer.tell(list(zip(points, losses.tolist(), strict=True)))
        belief = taught(belief, points, losses)
        assert np.allclose(belief.mean, peer.mean, rtol=1e-9, atol=1e-12)
        assert belief.sigma == pytest.approx(peer._sigma, rel=1e-9)
        assert np.allclose(belief.covariance, peer._C, rtol=1e-9, atol=1e-9)


def test_points_are_spread_as_the_belief_says():
    rng = np.random.default_rng(0)
    shape = rng.standard_normal((4, 4))
    belief = replace(Belief.around(np.arange(4.0), 0.5), covariance=shape @ shape.T)
    steps = belief.steps(rng.standard_normal((200_000, 4)))
    points = belief.points(steps)
    assert np.allclose(points.mean(0), np.arange(4.0), atol=0.02)
    assert np.allclose(np.cov(points.T), 0.25 * shape @ shape.T, atol=0.05)
    assert np.mean(belief.lengths(steps)**2) == pytest.approx(4, rel=0.01)
    assert np.allclose(powered(belief.covariance, 0.5) @ powered(belief.covariance, -0.5), np.eye(4), atol=1e-9)


def test_the_better_half_of_the_points_draws_the_mean_and_weights_are_those_of_a_mean():
    pace = Pace.of(20, 64)
    assert (pace.weights[:10] > 0).all() and (pace.weights[10:] < 0).all()
    assert pace.weights[:10].sum() == pytest.approx(1) and (np.diff(pace.weights) < 0).all()
    assert 1 < pace.chosen < 10 and 0 < pace.one + pace.many < 1


# the federation

@pytest.mark.parametrize("generations", [1, 3])
def test_one_client_is_plain_cma_es(tmp_path, generations):
    agreed = Agreed(5, 8, 10, generations)
    belief = found(agreed, {"c0": bent}, tmp_path, rounds=12)
    peer = CMA(np.zeros(8), 1.0, population_size=10)
    alone = Belief.around(np.zeros(8), 1.0)
    for round in range(1, 13):
        _, sent = heard_state(told_state(agreed, alone, round))
        for g in range(generations):
            steps = alone.steps(draws(agreed, round, "c0", g))
            points = sent.points(((alone.points(steps) - sent.mean) / sent.sigma).astype(np.float32))
            losses = bent(points).astype(np.float32)
            alone = taught(alone, points, losses)
            peer.tell(list(zip(points, losses.tolist(), strict=True)))
    assert np.allclose(belief.mean, peer.mean, rtol=1e-9)
    assert same(belief, alone) and belief.generation == 12 * generations


def test_in_what_order_clients_come_changes_no_bit(tmp_path):
    where: dict[str, Where] = {"a": sphere, "b": bent, "c": lambda x: sphere(x - 1)}
    agreed = Agreed(0, 6, 8, generations=2)
    one = found(agreed, where, tmp_path / "one", 5)
    assert same(one, list(played(agreed, where, 5))[-1])
    assert same(one, found(agreed, dict(reversed(where.items())), tmp_path / "two", 5, backwards=True))
    assert not same(one, found(replace(agreed, seed=1), where, tmp_path / "three", 5))


@pytest.mark.parametrize("clients, generations, rounds", [(1, 1, 190), (4, 1, 105), (4, 3, 45)])
def test_a_sphere_of_20_dimensions_is_found_to_a_millionth(clients, generations, rounds):
    agreed = Agreed(0, 20, 12, generations)
    *_, belief = played(agreed, {f"c{k}": lambda x: sphere(x - 1) for k in range(clients)}, rounds)
    assert sphere(belief.mean[None] - 1)[0] < 1e-6


def test_a_search_goes_on_where_single_precision_would_end():
    *_, belief = played(Agreed(0, 5, 12), {"c0": lambda x: sphere(x - 1)}, 160)
    assert sphere(belief.mean[None] - 1)[0] < 1e-15  # fp32 has steps of 1e-7 at 1, so that 1e-13 is left there


def test_clients_who_want_different_things_meet_in_the_middle_whoever_has_the_lower_losses():
    """Ranked as they are, the losses of the client whose data are easier would always come first."""
    where: dict[str, Where] = {"easy": lambda x: sphere(x - 1), "hard": lambda x: 1000 + sphere(x + 1)}
    means = [belief.mean for belief in played(Agreed(0, 6, 20), where, 60)]
    assert abs(np.mean(means[20:])) < 0.2  # each wants another end, so that the search goes on around the middle


def test_the_pool_of_later_generations_is_as_wide_as_its_clients_have_walked_apart():
    """Where nothing is better than anything else, means walk at random; the spread that is used is the one there is."""
    agreed, rng = Agreed(0, 12, 10, 4), np.random.default_rng(0)
    ratios = []
    for trial in range(30):
        belief = Belief.around(np.zeros(12), 1.0)
        message = told_state(agreed, belief, trial + 1)
        replies = {f"c{k}": heard_reply(searched(message, agreed, f"c{k}", lambda g, x: rng.random(len(x))),
                                        message, agreed) for k in range(5)}
        last = np.concatenate([tried.points[3] for tried in replies.values()])
        sigmas = np.stack([tried.sigmas for tried in replies.values()])
        apart = (1 - 1 / 5) / Pace.of(10, 12).chosen
        told = np.sqrt((sigmas[:, 3]**2 + apart * (sigmas[:, :3]**2).sum(1)).mean())
        ratios.append(last.std(0, ddof=1).mean() / told)
    assert np.mean(ratios) == pytest.approx(1, abs=0.12)
    expected = Belief.around(np.zeros(12), 1.0)
    for g in range(4):
        points = np.concatenate([tried.points[g] for tried in replies.values()])
        below = np.concatenate([tried.losses[g] - tried.losses[g].astype(float).mean() for tried in replies.values()])
        wide = np.sqrt((sigmas[:, g]**2 + apart * (sigmas[:, :g]**2).sum(1)).mean())
        expected = taught(expected, points, below, float(wide))
    assert same(pooled(belief, replies), expected)


def test_who_has_answered_is_not_asked_again_and_the_rest_is_as_if_nothing_had_happened(tmp_path):
    agreed, where = Agreed(0, 6, 8, 2), {"a": sphere, "b": sphere, "c": bent}
    clients = {"a": 1, "b": 1, "c": 1}
    whole = found(agreed, where, tmp_path / "whole", 3)
    with pytest.raises(RunError, match="round 2 has 2 usable replies of 3 and needs 3; c: out of memory"):
        found(agreed, where, tmp_path / "cut", 3, bad=((2, "c"),))
    calls: list[tuple[int, str]] = []
    again = run(clients, Terms(3), agreed, Spool(tmp_path / "cut"), ask=asking(agreed, where, calls))
    assert calls == [(2, "c"), (3, "a"), (3, "b"), (3, "c")] and same(whole, again)
    assert same(whole, run(clients, Terms(3), agreed, Spool(tmp_path / "cut"), ask=asking(agreed, {})))


def test_a_reply_that_was_kept_before_it_was_noted_is_counted_once(tmp_path):
    agreed, spool = Agreed(0, 6, 8), Spool(tmp_path)
    message = told_state(agreed, Belief.around(np.zeros(6), 1.0), 1)
    (tmp_path / "replies").mkdir()
    (tmp_path / "replies" / "1-a").write_bytes(searched(message, agreed, "a", lambda g, x: sphere(x)))
    calls: list[tuple[int, str]] = []
    run({"a": 1, "b": 1}, Terms(1), agreed, spool, ask=asking(agreed, {"b": sphere}, calls))
    assert calls == [(1, "b")]
    assert sorted(line["client"] for line in spool.events("update")) == ["a", "b"]


def test_a_round_goes_on_without_those_who_fail_where_the_quorum_holds_and_some_are_not_asked(tmp_path):
    agreed, where = Agreed(0, 6, 8), {"a": sphere, "b": sphere, "c": sphere}
    left = run(dict.fromkeys(where, 1), Terms(2, quorum=0.6), agreed, Spool(tmp_path / "s"),
               ask=asking(agreed, where, bad=((1, "c"), (2, "c"))))
    assert same(left, found(agreed, {"a": sphere, "b": sphere}, tmp_path / "t", 2))
    calls: list[tuple[int, str]] = []
    run(dict.fromkeys(where, 1), Terms(4, per_round=2), agreed, Spool(tmp_path / "u"),
        ask=asking(agreed, where, calls))
    assert len(calls) == 8 and len(set(calls)) == 8


# what travels

@pytest.mark.parametrize("d, k, g", [(64, 20, 1), (500, 20, 8), (3, 4, 2)])
def test_what_travels_is_as_long_as_the_formula_says_and_comes_back_to_the_bit(d, k, g):
    agreed, rng = Agreed(0, d, k, g), np.random.default_rng(0)
    shape = rng.standard_normal((d, d))
    belief = Belief(rng.standard_normal(d), 0.3, shape @ shape.T, rng.standard_normal(d), rng.standard_normal(d), 7)
    message = told_state(agreed, belief, 3)
    assert len(message) == state_bytes(d) == HEAD.size + 12 + 8 * (3 * d + d * (d + 1) // 2)
    round, again = heard_state(message)
    assert round == 3 and same(belief, again)
    tried = rng.standard_normal((g, k, d + 1)).astype(np.float32)
    reply = told_reply(message, tried, np.full(g, 0.3))
    assert len(reply) == reply_bytes(agreed) == HEAD.size + g * (8 + 4 * k * (d + 1))
    held = heard_reply(reply, message, replace(agreed, bound=1e9))
    assert np.array_equal(held.losses, tried[:, :, d]) and np.array_equal(held.points, belief.points(tried[:, :, :d]))


@pytest.fixture
def answered() -> tuple[Agreed, bytes, bytes]:
    """A message, and a good answer to it."""
    agreed = Agreed(0, 3, 4, 2)
    message = told_state(agreed, Belief.around(np.zeros(3), 1.0), 1)
    return agreed, message, searched(message, agreed, "a", lambda g, x: sphere(x))


def changed(reply: bytes, place: int, number: float, kind: str) -> bytes:
    told = bytearray(reply)
    told[place:place + np.dtype(kind).itemsize] = np.array(number, kind).tobytes()
    return bytes(told)


@pytest.mark.parametrize("place, number, kind, why", [
    (HEAD.size, np.nan, "<f8", "not finite"), (HEAD.size, -1.0, "<f8", "a sigma of -1"),
    (HEAD.size, 0.0, "<f8", "a sigma"), (HEAD.size + 8, 11.0, "<f8", "a sigma of 11; 1 was sent"),
    (HEAD.size + 16, np.inf, "<f4", "not finite"), (HEAD.size + 16, 1e4, "<f4", "times farther away than is usual"),
    (HEAD.size + 28, np.nan, "<f4", "not finite")])
def test_numbers_that_no_client_would_find_are_refused(answered, place, number, kind, why):
    agreed, message, reply = answered
    with pytest.raises(Refused, match=why):
        heard_reply(changed(reply, place, number, kind), message, agreed)


def test_replies_that_were_not_asked_for_are_refused(answered):
    agreed, message, reply = answered
    later = told_state(agreed, Belief.around(np.zeros(3), 1.0), 2)
    other = told_state(agreed, Belief.around(np.ones(3), 1.0), 1)
    for bad in (b"", b"x" * len(reply), message, b"\x80\x04K\x01.",
                *(searched(sent, agreed, "a", lambda g, x: sphere(x)) for sent in (later, other))):
        with pytest.raises(Refused, match="no answer to what was asked"):
            heard_reply(bad, message, agreed)
    for bad in (reply[:-1], reply + b"\0"):
        with pytest.raises(Refused, match=f"{len(bad)} bytes, and {len(reply)} were agreed on"):
            heard_reply(bad, message, agreed)
    assert isinstance(heard_reply(reply, message, agreed), Tried)


def test_a_client_refuses_what_was_damaged_on_its_way(answered):
    agreed, message, reply = answered
    for bad in (b"", reply, message[:-1], message + b"\0", b"x" * len(message)):
        with pytest.raises(Refused, match="no state of a search"):
            heard_state(bad)
    with pytest.raises(Refused, match="damaged on its way"):
        searched(changed(message, HEAD.size, 2.0, "<f8"), agreed, "a", lambda g, x: sphere(x))


def test_a_client_that_lies_about_its_losses_moves_the_mean_no_farther_than_its_points(tmp_path):
    agreed = Agreed(0, 6, 20)
    message = told_state(agreed, Belief.around(np.zeros(6), 1.0), 1)
    honest = {f"c{k}": heard_reply(searched(message, agreed, f"c{k}", lambda g, x: sphere(x)), message, agreed)
              for k in range(4)}
    liar = replace(honest["c0"], losses=np.linspace(-1e30, 1e30, 20, dtype=np.float32)[None])
    belief = pooled(Belief.around(np.zeros(6), 1.0), {**honest, "c0": liar})
    assert np.linalg.norm(belief.mean) < np.linalg.norm(liar.points, axis=-1).max()


# the space

def test_the_space_begins_at_vectors_of_tokens_and_is_as_wide_as_they_differ():
    table = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32) * 0.3
    space = subspace(table, 6, 40, 7, without=range(10))
    assert (space.tokens >= 10).all() and np.array_equal(space.prompt(np.zeros(40)), table[space.tokens])
    assert np.array_equal(space.ways, subspace(table, 6, 40, 7).ways)
    assert not np.array_equal(space.ways, subspace(table, 6, 40, 8).ways)
    moved = [space.prompt(np.random.default_rng(k).standard_normal(40)) - space.start for k in range(20)]
    assert np.std(moved) == pytest.approx(0.3, rel=0.05)
    x, y = np.eye(40)[3], np.eye(40)[5]
    assert np.allclose(space.prompt(2 * x - y) - space.start, 2 * space.ways[3] - space.ways[5], atol=1e-6)
    with pytest.raises(GlueError, match="no token is left"):
        subspace(table, 6, 40, 7, without=range(50))


# the step and its member

@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dataset of 40 items and a base that has seen a little of it."""
    from glue.tune.pretrain import pretrain

    folder = tmp_path_factory.mktemp("bpt")
    torch.set_num_threads(1)
    (folder / "ones").mkdir()
    for split, count in (("train", 40), ("dev", 12), ("test", 12)):
        (folder / "ones" / f"{split}.jsonl").write_text("".join(
            json.dumps({"question": f"a {k % 7} {k % 5} =", "answer": f"{k % 5} a", "gold": k % 2,
                        "choices": [f"{k % 5} a", f"{(k + 1) % 5} a"][::1 - 2 * (k % 2)]}) + "\n"
            for k in range(count)))
    pretrain(folder / "base", data=[(folder / "ones", 1.0)], vocabulary=[folder / "ones"], architecture=SHAPE, steps=60,
             batch_size=8, learning_rate=1e-2, seed=0, report=lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def base(place) -> Member:
    return Member("base", "model", str(place / "base"), digest=identify(place / "base")[1])


def made(place: Path, base: Member, out: Path, workers: Workers | None = None, **changed: Any) -> Member:
    """Run the step by itself; the member that its folder is."""
    out.mkdir(exist_ok=True)
    data = {Member("ones", "dataset", str(place / "ones"), digest=identify(place / "ones")[1]): 1.0}
    choice = families("steps")["bpt"].bind({"base": "base", "data": {"ones": 1}, **SETTINGS, **changed})
    choice.method.traits["words"](**choice.params)
    choice.method.traits["check"](**{**choice.params, "base": base, "data": data})
    left = choice(Job("t/prompt", out, 0, workers or Workers(0), place), base=base, data=data)
    return Member("t/prompt", left.kind, str(out), base=base, digest=identify(out)[1], note=left.note)


def test_a_prompt_is_a_member_with_a_ledger_of_what_was_sent_and_the_story_of_its_rounds(place, base, tmp_path):
    member = made(place, base, tmp_path / "p", rounds=2, generations=2)
    assert member.kind == "prompt" and sorted(file.name for file in member.folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "ledger.json", "rounds.json"]
    told = json.loads((member.folder / "ledger.json").read_text())
    agreed = Agreed(0, 6, 4, 2)
    assert told["up"] == 3 * 2 * reply_bytes(agreed) and told["down"] == 3 * 2 * state_bytes(6)
    assert {account["examples"] for account in told["clients"].values()} == {13, 14}
    rounds = json.loads((member.folder / "rounds.json").read_text())
    assert [one["round"] for one in rounds] == [1, 2] and rounds[0]["clients"] == ["c0", "c1", "c2"]
    assert rounds[0]["least"] < rounds[0]["loss"] and f"{rounds[1]['loss']:.3f}" in member.note
    assert load(member).model(torch.tensor([[3, 4]])).logits.shape[:2] == (1, 2)


@torch.no_grad()
def test_at_the_middle_of_the_space_the_model_reads_the_tokens_that_the_prompt_began_with(place, base, tmp_path):
    from glue.steps.bpt import space_of

    running = load(base)
    space = space_of(running, Agreed(0, 6, 4), 3)
    write_prompt(tmp_path, torch.from_numpy(space.prompt(np.zeros(6))))
    model = load(Member("p", "prompt", str(tmp_path), base=base)).model
    assert not set(space.tokens.tolist()) & set(running.tokenizer.all_special_ids)
    text = [3, 4, 5, 6]
    whole = running.model(torch.tensor([[*space.tokens.tolist(), *text]])).logits[:, 3:]
    assert torch.allclose(model(torch.tensor([text])).logits, whole, atol=1e-6)


def test_the_losses_of_points_are_those_of_the_model_behind_their_prompts(place, base):
    from glue.steps.bpt import space_of
    from glue.tune.items import read_items
    from glue.tune.soft import guesses

    running = load(base)
    space, x = space_of(running, Agreed(0, 6, 4), 3), np.linspace(-1, 1, 6)
    guess = next(guesses(running, 3, data=[(place / "ones", 1.0)], batch_size=40, prompt_weight=0.5, seed=0))
    prompt, total, weights = torch.from_numpy(space.prompt(x)), 0.0, 0.0
    with torch.no_grad():
        for item in read_items(place / "ones", running.tokenizer, 20):
            read = torch.cat([prompt, running.model.get_input_embeddings()(torch.tensor(item.tokens[:-1]))])
            logs = running.model(inputs_embeds=read[None]).logits[0, 3:].double().log_softmax(-1)
            for k, token in enumerate(item.tokens[1:]):
                weight = 0.5 if k + 1 < item.question else 1.0
                total, weights = total - weight * float(logs[k, token]), weights + weight
    assert guess(space.prompt(x)) == pytest.approx(total / weights, rel=1e-5)


def test_the_same_federation_leaves_the_same_prompt_with_any_number_of_workers(place, base, tmp_path):
    one = made(place, base, tmp_path / "one", rounds=2)
    with Workers(2) as workers:
        assert made(place, base, tmp_path / "two", workers, rounds=2).digest == one.digest
    assert made(place, base, tmp_path / "wide", rounds=2, sigma=2.0).digest != one.digest


def test_a_federation_that_was_cut_off_goes_on_and_leaves_the_same_prompt(place, base, tmp_path, monkeypatch):
    from glue.steps import bpt

    whole = made(place, base, tmp_path / "whole", rounds=2)
    asked = cut_off(monkeypatch, bpt, 5)
    with pytest.raises(KeyboardInterrupt):
        made(place, base, tmp_path / "cut", rounds=2)
    assert made(place, base, tmp_path / "cut", rounds=2).digest == whole.digest
    assert asked[:5] == ["c0", "c1", "c2", "c0", "c1"] and asked.count("c0") == 2  # whose reply was kept


def test_a_client_that_breaks_is_told_of_and_the_round_goes_on(place, base, tmp_path, monkeypatch):
    from glue.tune import soft

    breaking(monkeypatch, soft, "guesses", "c1")
    member = made(place, base, tmp_path / "p", quorum=0.5)
    told = json.loads((member.folder / "ledger.json").read_text())["clients"]
    assert told["c1"]["failed"] == {"1": "MemoryError: no room"} and told["c0"]["rounds"] == [1]


def test_a_search_leads_downhill(place, base, tmp_path):
    from glue.steps.bpt import space_of
    from glue.tune.soft import guesses

    member = made(place, base, tmp_path / "p", rounds=15, popsize=10, clients=2, batch_size=10)
    running = load(base)
    guess = next(guesses(running, 3, data=[(place / "ones", 1.0)], batch_size=40, prompt_weight=0.05, seed=0))
    begun = space_of(running, Agreed(0, 6, 10), 3).prompt(np.zeros(6))
    assert guess(read_prompt(member.folder).numpy()) < guess(begun) - 0.005


def test_words_that_cannot_work_are_refused_before_anything_runs(place, base, tmp_path):
    with pytest.raises(RecipeError, match="a prompt of 24 tokens leaves no room for a text in the 24"):
        made(place, base, tmp_path / "p", tokens=24)
    with pytest.raises(RecipeError, match="2 tokens of 'base' are 64 numbers, and dim is 65"):
        made(place, base, tmp_path / "p", tokens=2, dim=65)
    with pytest.raises(RecipeError, match="is no partition"):
        made(place, base, tmp_path / "p", partition={"by": 1})
    for bad in ({"popsize": 3}, {"tokens": 0}, {"dim": 0}, {"bound": 0.5}, {"sigma": 0}):
        with pytest.raises(GlueError, match=next(iter(bad))):
            made(place, base, tmp_path / "p", **bad)
    with pytest.raises(RunError, match=r"needs 3; c0: .*is \d+ tokens long with its end token; the model takes 1"):
        made(place, base, tmp_path / "p", tokens=23)


# in a zoo

RECIPE = """steps:
  - {as: prompt, step: bpt, base: base, data: {ones: 1}, clients: 2, rounds: 2, popsize: 4, dim: 6, tokens: 3}
  - {as: scored, step: evaluate, members: [base, prompt], suite: own:test, loss: true}
"""


@pytest.fixture(scope="module")
def zoo(place, tmp_path_factory) -> Zoo:
    """A prompt, and what it scores."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in ("base", "ones"):
        (folder / name).symlink_to(place / name)
    (folder / "benchmarks/suites").mkdir(parents=True)
    (folder / "benchmarks/suites/own.yaml").write_text(
        "tasks:\n  ones: {data: ones, output: choice, metric: acc, chance: 0.5}\n")
    (folder / "zoo.yaml").write_text("members:\n  base: {path: base}\n  ones: {path: ones, kind: dataset}\n"
                                     "include: zoo/members.yaml\n")
    (folder / "own.yaml").write_text(RECIPE)
    with Workers(0) as workers:
        run_recipe(read_recipe(folder / "own.yaml"), Zoo(folder / "zoo.yaml"), workers)
    return Zoo(folder / "zoo.yaml")


def test_a_prompt_is_listed_and_scored(zoo):
    assert {member.short: member.kind for member in zoo if member.origin} == {"prompt": "prompt", "scored": "table"}
    rows = Table.read(zoo["own/scored"]).rows
    assert {row.member.rpartition("/")[2] for row in rows} == {"base", "prompt"}
    assert all(len(row.results) == 12 for row in rows)


def test_a_second_run_does_nothing_and_a_reproduction_gives_the_same_prompt(zoo):
    plan = make_plan(read_recipe(zoo.file.parent / "own.yaml"), zoo)
    assert {task.state for task in plan} == {"done"}
    with Workers(0) as workers:
        found = reproduce("own/prompt", zoo, workers)
    assert found.again == found.now == found.digest and not found.differ
