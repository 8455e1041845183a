"""Tuning by seeds: replayed histories are bits, slopes are slopes, few bytes travel, and a history is a member."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from glue.care import added as added_by_hand
from glue.checkpoint import Checkpoint, InMemory
from glue.errors import CheckpointError, GlueError, RecipeError, RunError, ZooError
from glue.family import families
from glue.federate.kseed import (
    HEAD,
    Agreed,
    Gone,
    combined,
    heard_reply,
    heard_state,
    places,
    probabilities,
    run,
    told_reply,
    told_state,
)
from glue.federate.rounds import Terms
from glue.federate.spool import Spool
from glue.federate.update import Refused
from glue.identity import identify
from glue.kinds import load, weights
from glue.kinds.draws import drawn, table
from glue.kinds.seed_history import PIECE, History, Replayed, read_history
from glue.kinds.size import size
from glue.member import Member, Table
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.reproduce import reproduce
from glue.run import run as run_recipe
from glue.steps import Job
from glue.tune.zeroth import direction, slope, walk
from glue.workers import Workers
from glue.zoo import Zoo
from tests.federations import breaking, cut_off

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 16}
SETTINGS = {"clients": 3, "steps": 4, "learning_rate": 1e-3, "seeds": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dataset of 40 items and a base that has seen a little of it."""
    from glue.tune.pretrain import pretrain

    folder = tmp_path_factory.mktemp("kseed")
    torch.set_num_threads(1)
    (folder / "ones").mkdir()
    (folder / "ones" / "train.jsonl").write_text("".join(
        json.dumps({"question": f"a {k % 7} {k % 5} =", "answer": f"{k % 5} a"}) + "\n" for k in range(40)))
    pretrain(folder / "base", data=[(folder / "ones", 1.0)], vocabulary=[folder / "ones"], architecture=SHAPE, steps=5,
             batch_size=8, learning_rate=1e-2, seed=0, report=lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def base(place) -> Member:
    return Member("base", "model", str(place / "base"), digest=identify(place / "base")[1])


def made(place: Path, base: Member, out: Path, workers: Workers | None = None, **changed: Any) -> Member:
    """Run the step by itself; the member that its folder is."""
    out.mkdir(exist_ok=True)
    data = {Member("ones", "dataset", str(place / "ones"), digest=identify(place / "ones")[1]): 1.0}
    choice = families("steps")["kseed"].bind({"base": "base", "data": {"ones": 1}, **SETTINGS, **changed})
    choice.method.traits["words"](**choice.params)
    choice.method.traits["check"](**{**choice.params, "base": base, "data": data})
    left = choice(Job("t/history", out, 0, workers or Workers(0), place), base=base, data=data)
    return Member("t/history", left.kind, str(out), base=base, digest=identify(out)[1], note=left.note)


def history(count: int = 8, *, base: str = "", seed: int = 3, rate: float = 1e-2, **more: Any) -> History:
    return History(base, seed, rate, np.random.default_rng(seed).standard_normal(count).astype(np.float32), **more)


# draws

def test_draws_are_normal_independent_and_the_same_in_pieces():
    z = drawn(1, 2, "w", 0, np.empty(200_003, np.float32))
    assert stats.kstest(z, "norm").pvalue > 0.01 and abs(stats.kurtosis(z)) < 0.05
    assert abs(float(table().astype(float) @ table()) / len(table()) - 1) < 1e-6 and table().sum() == 0
    assert np.array_equal(drawn(1, 2, "w", 4096, np.empty(1000, np.float32)), z[4096:5096])
    for other in (drawn(1, 3, "w", 0, np.empty_like(z)), drawn(1, 2, "v", 0, np.empty_like(z)),
                  drawn(2, 2, "w", 0, np.empty_like(z)), np.roll(z, 1)):
        assert abs(float(z @ other)) / len(z) < 0.01


def test_draws_are_those_that_every_history_was_made_with():
    z = drawn(0, 0, "model.norm.weight", 0, np.empty(5, np.float32))
    assert [float(value).hex() for value in z[:2]] == ["0x1.5f23800000000p+0", "0x1.1efe560000000p-1"]


# replay

def test_a_history_replays_to_the_same_bits_and_another_order_does_not():
    weight = torch.randn(PIECE + 100, generator=torch.Generator().manual_seed(0))
    one = history()
    assert torch.equal(one.replayed("w", weight), one.replayed("w", weight))
    summed = np.zeros(weight.numel(), np.float32)
    for j in reversed(range(8)):
        summed += drawn(one.seed, j, "w", 0, np.empty(weight.numel(), np.float32)) * one.accumulators[j]
    other = weight - torch.from_numpy(summed * np.float32(one.learning_rate))
    assert not torch.equal(one.replayed("w", weight), other)
    assert float((one.replayed("w", weight) - other).abs().max()) < 1e-6


REPLAY = """import hashlib, numpy, torch
from glue.kinds.seed_history import History
numbers = (numpy.arange(32) % 7 - 3).astype(numpy.float32) * numpy.float32(0.37)
weight = torch.arange(70001) / 65536 - 0.5  # exact, so that only the replay can differ
print(hashlib.sha256(History("", 11, 3e-3, numbers).replayed("w", weight).numpy().tobytes()).hexdigest())"""


def test_a_replay_gives_the_same_bits_without_the_wide_instructions_of_a_processor():
    plain = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL", "ATEN_CPU_CAPABILITY": "default"}
    found = {subprocess.run([sys.executable, "-W", "ignore", "-c", REPLAY], capture_output=True, text=True, check=True,
                            env={**os.environ, **more}).stdout.strip() for more in ({}, plain)}
    assert found == {"987695b71d058ae7ef7541f1b7c09679aeb6f505e3545673c2613519a919ee26"}


def test_a_replay_is_the_sum_in_fp64_to_rounding():
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    one = history(200)
    exact = weight.double()
    for j, a in enumerate(one.accumulators):
        exact -= one.learning_rate * float(a) * torch.from_numpy(drawn(3, j, "w", 0, np.empty(1000, np.float32)))
    assert float((one.replayed("w", weight) - exact).norm() / (exact - weight).norm()) < 2e-6


def test_a_base_of_16_bits_is_rounded_once_and_one_of_64_is_not_narrowed():
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = Replayed(InMemory({"w": weight, "count": torch.tensor([3])}), history())
    assert torch.equal(found["w"], history().replayed("w", weight.float()).bfloat16())
    assert torch.equal(found["count"], torch.tensor([3]))
    assert history().replayed("w", weight.double()).dtype == torch.float64


def test_only_named_tensors_move():
    found = Replayed(InMemory({"a.q_proj.weight": torch.zeros(4), "a.k_proj.weight": torch.zeros(4)}),
                     history(targets=("q_proj",)))
    assert found["a.q_proj.weight"].all() and not found["a.k_proj.weight"].any()


# slopes

def quadratic(d: int) -> tuple[dict[str, torch.Tensor], Any]:
    """Weights and a loss in fp64 with a known gradient."""
    rng = torch.Generator().manual_seed(1)
    w = torch.randn(d, generator=rng, dtype=torch.float64)
    h = torch.rand(d, generator=rng, dtype=torch.float64)
    return {"w": w}, lambda: float((h * w.square()).sum() / 2 + w.cos().sum())


def test_a_slope_is_the_derivative_along_its_direction_and_leaves_nothing_behind():
    at, loss = quadratic(50)
    before = at["w"].clone()
    z = {"w": direction({"w": at["w"]}, 0, 1)["w"].double()}
    w = before.clone().requires_grad_()
    h = torch.rand(50, generator=_skipped(50), dtype=torch.float64)
    ((h * w.square()).sum() / 2 + w.cos().sum()).backward()
    assert w.grad is not None
    assert slope(at, z, loss, 1e-4)[0] == pytest.approx(float(w.grad @ z["w"]), rel=1e-6)
    assert torch.equal(at["w"], before)


def _skipped(d: int) -> torch.Generator:
    rng = torch.Generator().manual_seed(1)
    torch.randn(d, generator=rng, dtype=torch.float64)
    return rng


def test_a_slope_of_a_language_model_is_its_derivative_and_its_weights_are_put_back(base):
    model = load(base).model.double()
    tokens = torch.tensor([[3, 4, 5, 6, 7]])
    moving = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in moving.items()}
    z = direction(moving, 0, 0)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    exact = sum(float((weight.grad * z[name]).sum()) for name, weight in moving.items() if weight.grad is not None)
    with torch.no_grad():
        found, mean = slope(moving, z, lambda: float(model(input_ids=tokens, labels=tokens).loss), 1e-4)
    assert found == pytest.approx(exact, rel=1e-3) and mean == pytest.approx(loss.item(), abs=1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in moving.items())


def test_what_a_loss_raises_leaves_the_weights_as_they_were():
    at, _ = quadratic(10)
    before = at["w"].clone()

    def fails() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slope(at, {"w": torch.ones(10, dtype=torch.float64)}, fails, 0.1)
    assert torch.equal(at["w"], before)


def test_over_many_directions_slopes_make_the_gradient():
    d = 50
    at, loss = quadratic(d)
    h = torch.rand(d, generator=_skipped(d), dtype=torch.float64)
    gradient = h * at["w"] - at["w"].sin()
    total = torch.zeros(d, dtype=torch.float64)
    for j in range(40 * d):
        z = direction({"w": at["w"]}, 0, j)["w"].double()
        total += slope(at, {"w": z}, loss, 1e-4)[0] * z
    assert float(torch.nn.functional.cosine_similarity(total, gradient, dim=0)) > 0.95
    assert float(total.norm() / (40 * d) / gradient.norm()) == pytest.approx(1, abs=0.1)


def test_one_client_walks_as_mezo_does():
    """The same seeds through a plain loop of perturbing, perturbing back and stepping."""
    at, loss = quadratic(30)
    mine = {"w": at["w"].float()}
    h = torch.rand(30, generator=_skipped(30), dtype=torch.float64)

    def of(w: torch.Tensor) -> float:
        return float((h * w.double().square()).sum() / 2 + w.double().cos().sum())

    taken = places(np.full(8, 1 / 8), 40, 5, 1, "c0")
    slopes = walk(mine, iter(lambda: (lambda: of(mine["w"])), None), taken, seed=5, learning_rate=0.01, epsilon=1e-3)
    w = at["w"].clone()
    for j in taken:
        z = torch.from_numpy(drawn(5, int(j), "w", 0, np.empty(30, np.float32))).double()
        w += 1e-3 * z
        up = of(w)
        w -= 2e-3 * z
        down = of(w)
        w += 1e-3 * z
        w -= 0.01 * (up - down) / 2e-3 * z
    assert float((mine["w"] - w).norm() / (w - at["w"]).norm()) < 1e-3
    sums = np.bincount(taken, slopes.astype(float), 8).astype(np.float32)
    again = History("", 5, 0.01, sums).replayed("w", at["w"].float())
    assert float((again - mine["w"]).abs().max()) < 1e-5


# what travels

@pytest.mark.parametrize("seeds, steps", [(4096, 200), (64, 200), (16, 3)])
def test_what_travels_is_four_bytes_a_direction_and_a_head(seeds, steps):
    agreed = Agreed(0, seeds, steps)
    message = told_state(agreed, Gone.nowhere(seeds), 1, "c0")
    round, accumulators, taken = heard_state(message, agreed, "c0")
    reply = told_reply(message, np.ones(steps, np.float32), taken)
    assert len(message) <= 4 * seeds + 64 and len(reply) <= 4 * min(seeds, steps) + 64
    assert round == 1 and not accumulators.any() and len(taken) == steps
    sums, _ = heard_reply(reply, message, agreed, "c0")
    assert np.array_equal(sums, np.bincount(taken, minlength=seeds))


def test_clients_that_draw_by_steepness_are_told_their_directions():
    agreed = Agreed(0, 8, 5, pro=True)
    gone = Gone(np.zeros(8, np.float32), np.array([9.0, *[1.0] * 7]), np.ones(8, np.int64))
    message = told_state(agreed, gone, 2, "c0")
    assert len(message) == HEAD.size + 8 * 4 + 5 * 2
    _, _, taken = heard_state(message, agreed, "c0")
    assert np.array_equal(taken, places(probabilities(gone), 5, 0, 2, "c0"))


def test_steeper_directions_are_likelier_and_at_first_all_are_alike():
    assert np.allclose(probabilities(Gone.nowhere(4)), 0.25)
    found = probabilities(Gone(np.zeros(4, np.float32), np.array([4.0, 2.0, 0.0, 3.0]), np.array([2, 1, 0, 3])))
    assert found.sum() == pytest.approx(1) and np.argmin(found) == 3 and found[0] == found[1]
    assert found[2] == pytest.approx(math.exp((1.5 - 1) / 1) / sum(map(math.exp, [1, 1, 0.5, 0])))
    assert max(found) / min(found) == pytest.approx(math.e)
    counts = np.bincount(places(found, 20_000, 0, 1, "c0"), minlength=4)
    assert stats.chisquare(counts, found * 20_000).pvalue > 0.01


def test_replies_that_were_not_asked_for_are_refused():
    agreed = Agreed(0, 8, 5, bound=100)
    message = told_state(agreed, Gone.nowhere(8), 1, "c0")
    taken = heard_state(message, agreed, "c0")[2]
    for slopes, why in ((np.full(5, np.nan), "not finite"), (np.full(5, 101), "slope of 101"), (np.ones(4), "bytes")):
        with pytest.raises(Refused, match=why):
            heard_reply(told_reply(message, slopes.astype(np.float32), taken), message, agreed, "c0")
    later = told_state(agreed, Gone.nowhere(8), 2, "c0")
    for reply in (b"", b"x" * 99, told_reply(later, np.ones(5, np.float32), taken)):
        with pytest.raises(Refused, match="no answer"):
            heard_reply(reply, message, agreed, "c0")


def test_replies_are_summed_by_examples_in_any_order():
    replies = {name: (np.array([k + 0.1, 1.0]), Gone.nowhere(2)) for k, name in enumerate(("a", "b", "c"))}
    examples = {"a": 1, "b": 2, "c": 1}
    found = combined(Gone.nowhere(2), replies, examples)
    turned = combined(Gone.nowhere(2), dict(reversed(replies.items())), examples)
    assert np.array_equal(found.accumulators, turned.accumulators)
    assert np.allclose(found.accumulators, [1.1, 1.0])


def answering(calls: list[tuple[int, str]], bad: tuple[tuple[int, str], ...] = ()) -> Any:
    """Clients whose slopes are their directions' numbers; `bad` ones fail."""
    def ask(round: int, messages: dict[str, bytes]) -> Iterator[tuple[str, bytes | str]]:
        for client, message in messages.items():
            calls.append((round, client))
            if (round, client) in bad:
                yield client, "out of memory"
                continue
            taken = heard_state(message, AGREED, client)[2]
            yield client, told_reply(message, taken.astype(np.float32), taken)

    return ask


AGREED = Agreed(0, 8, 5)
CLIENTS = {"a": 10, "b": 20, "c": 30}


def test_who_has_answered_is_not_asked_again_and_the_rest_is_as_if_nothing_had_happened(tmp_path):
    whole = run(CLIENTS, Terms(rounds=2), AGREED, Spool(tmp_path / "whole"), ask=answering([]))
    with pytest.raises(RunError, match="round 2 has 2 usable replies of 3 and needs 3; c: out of memory"):
        run(CLIENTS, Terms(rounds=2), AGREED, Spool(tmp_path / "cut"), ask=answering([], ((2, "c"),)))
    calls: list[tuple[int, str]] = []
    again = run(CLIENTS, Terms(rounds=2), AGREED, Spool(tmp_path / "cut"), ask=answering(calls))
    assert calls == [(2, "c")] and np.array_equal(whole.accumulators, again.accumulators)


def test_a_round_goes_on_without_those_who_fail_where_the_quorum_holds(tmp_path):
    found = run(CLIENTS, Terms(quorum=0.6), AGREED, Spool(tmp_path / "s"), ask=answering([], ((1, "c"),)))
    assert np.array_equal(found.accumulators, run({"a": 10, "b": 20}, Terms(), AGREED, Spool(tmp_path / "t"),
                                                  ask=answering([])).accumulators)


# the step and its member

def test_a_history_is_a_member_that_runs_like_the_model_that_its_clients_walked(place, base, tmp_path):
    member = made(place, base, tmp_path / "h")
    assert member.kind == "seed_history" and sorted(file.name for file in member.folder.iterdir()) == [
        "ledger.json", "seed_history.json", "seed_history.safetensors"]
    own, below = weights(member), weights(base)
    model = load(member).model
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, own[name]) and not torch.equal(own[name], below[name])
    assert own.fingerprint != below.fingerprint and set(own.headers) == set(below.headers)
    told = json.loads((member.folder / "ledger.json").read_text())
    assert told["up"] == 3 * (HEAD.size + 4 * 4) and told["down"] == 3 * (HEAD.size + 4 * 16)
    assert told["privacy"]["noise"] == "none"


def test_the_same_federation_leaves_the_same_history_with_any_number_of_workers(place, base, tmp_path):
    one = made(place, base, tmp_path / "one", rounds=2)
    with Workers(2) as workers:
        assert made(place, base, tmp_path / "two", workers, rounds=2).digest == one.digest
    assert made(place, base, tmp_path / "pro", rounds=2, pro=True).digest != one.digest


def test_a_federation_that_was_cut_off_goes_on_and_leaves_the_same_history(place, base, tmp_path, monkeypatch):
    from glue.steps import kseed

    whole = made(place, base, tmp_path / "whole", rounds=2)
    asked = cut_off(monkeypatch, kseed, 5)
    with pytest.raises(KeyboardInterrupt):
        made(place, base, tmp_path / "cut", rounds=2)
    assert made(place, base, tmp_path / "cut", rounds=2).digest == whole.digest
    assert asked[:5] == ["c0", "c1", "c2", "c0", "c1"] and asked.count("c0") == 2  # whose reply was kept


def test_a_client_that_breaks_is_told_of_and_the_round_goes_on(place, base, tmp_path, monkeypatch):
    from glue.tune import zeroth

    breaking(monkeypatch, zeroth, "taught", "c1")
    member = made(place, base, tmp_path / "h", quorum=0.5)
    told = json.loads((member.folder / "ledger.json").read_text())["clients"]
    assert told["c1"]["failed"] == {"1": "MemoryError: no room"} and told["c0"]["rounds"] == [1]


def test_slopes_lead_downhill(place, base, tmp_path):
    from glue.tune.items import read_items
    from glue.tune.zeroth import _asked

    member = made(place, base, tmp_path / "h", rounds=4, steps=60, seeds=256, learning_rate=3e-3, batch_size=16)
    found = []
    for one in (base, member):
        running = load(one)
        items = read_items(place / "ones", running.tokenizer, 16)
        with torch.no_grad():
            found.append(_asked(running.model, items, 1.0)())
    assert found[1] < found[0] - 0.2


def test_a_history_of_4096_directions_is_less_than_20_kb(tmp_path):
    history(4096, base="0" * 32, told={"step": "kseed", "rounds": 40}).write(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 20_000
    again = read_history(tmp_path)
    assert again.fingerprint == history(4096, base="0" * 32).fingerprint
    assert np.array_equal(again.accumulators, history(4096).accumulators)


def test_a_history_on_another_base_or_a_damaged_one_is_refused(place, base, tmp_path):
    history(base="f" * 32).write(tmp_path)
    with pytest.raises(ZooError, match="digest ffffffff"):
        weights(Member("h", "seed_history", str(tmp_path), base=base))
    with pytest.raises(ZooError, match="a seed_history, and nothing says what it sits on"):
        weights(Member("h", "seed_history", str(tmp_path)))
    note = tmp_path / "seed_history.json"
    note.write_text(note.read_text().replace('"format":1', '"format":2'))
    with pytest.raises(CheckpointError, match="format 2, known is 1"):
        read_history(tmp_path)


def test_a_history_merges_as_the_model_that_it_stands_for(place, base, tmp_path):
    member = made(place, base, tmp_path / "h")
    choice = families("steps")["merge"].bind({"members": ["h", "base"], "method": "linear"})
    (tmp_path / "m").mkdir()
    choice(Job("t/m", tmp_path / "m", 0, Workers(0), place), members=[member, base])
    merged, own, below = Checkpoint(tmp_path / "m"), weights(member), weights(base)
    for name in below:
        assert torch.allclose(merged[name].double(), (own[name].double() + below[name].double()) / 2, atol=1e-7)


def test_slopes_that_are_clipped_and_noised_are_told_with_their_epsilon(place, base, tmp_path):
    member = made(place, base, tmp_path / "h", rounds=2, privacy={"clip": 0.5, "noise": 4.0})
    told = json.loads((member.folder / "ledger.json").read_text())["privacy"]["noise"]
    assert told["answers"] == {"c0": 8, "c1": 8, "c2": 8} and 3 < told["epsilon"]["c0"] < 4
    with pytest.raises(RecipeError, match="privacy is"):
        made(place, base, tmp_path / "g", privacy={"noise": 1.0})


def test_a_step_that_diverges_says_so(place, base):
    at = {"w": torch.ones(4)}
    with pytest.raises(GlueError, match="diverged at step 1 of 2: slope nan"):
        walk(at, iter(lambda: (lambda: math.nan), None), np.zeros(2, int), seed=0, learning_rate=0.1, epsilon=0.1)
    with pytest.raises(GlueError, match="no tensor of 'base' belongs to nothing"):
        from glue.tune.zeroth import moved

        moved(load(base).model, base, replace(history(), targets=("nothing",)))


# in a zoo

RECIPE = """steps:
  - {as: history, step: kseed, base: base, data: {ones: 1}, clients: 2, steps: 3, learning_rate: 1e-3, seeds: 8}
  - {as: adapter, step: lora, base: base, data: {ones: 1}, steps: 2, learning_rate: 1e-2, rank: 2, targets: [q_proj]}
  - {as: train, step: tensor_train, members: [adapter]}
  - {as: merged, step: merge, members: [history, train], base: base, method: {ties: {density: 0.5}}}
  - {as: mixed, step: mix, members: [history, train], suite: own:dev, router: linear}
  - {as: scored, step: evaluate, members: [history, train, merged, mixed], suite: own:test}
"""


@pytest.fixture(scope="module")
def zoo(place, tmp_path_factory) -> Zoo:
    """Everything that takes members, over a history and a train."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in ("base", "ones"):
        (folder / name).symlink_to(place / name)
    for split in ("dev", "test"):
        (place / "ones" / f"{split}.jsonl").write_text("".join(
            json.dumps({"question": f"a {k % 7} {k % 5} =", "answer": f"{k % 5} a", "gold": k % 2,
                        "choices": [f"{k % 5} a", f"{(k + 1) % 5} a"][::1 - 2 * (k % 2)]}) + "\n" for k in range(12)))
    (folder / "benchmarks/suites").mkdir(parents=True)
    (folder / "benchmarks/suites/own.yaml").write_text(
        "tasks:\n  ones: {data: ones, output: choice, metric: acc, chance: 0.5}\n")
    (folder / "zoo.yaml").write_text("members:\n  base: {path: base}\n  ones: {path: ones, kind: dataset}\n"
                                     "include: zoo/members.yaml\n")
    (folder / "own.yaml").write_text(RECIPE)
    with Workers(0) as workers:
        run_recipe(read_recipe(folder / "own.yaml"), Zoo(folder / "zoo.yaml"), workers)
    return Zoo(folder / "zoo.yaml")


def test_a_history_and_a_train_are_listed_scored_merged_and_mixed(zoo):
    assert {member.short: member.kind for member in zoo if member.origin} == {
        "history": "seed_history", "adapter": "adapter", "train": "tensor_train", "merged": "model",
        "mixed": "mixture", "scored": "table"}
    rows = Table.read(zoo["own/scored"]).rows
    assert [(row.member.rpartition("/")[2], len(row.results)) for row in rows] == [
        ("history", 12), ("train", 12), ("merged", 12), ("mixed", 12)]
    assert size(zoo["own/history"]) == size(zoo["base"]) == size(zoo["own/train"])
    card = (zoo["own/history"].folder / "README.md").read_text()
    assert "library_name: glue" in card and "base_model_relation: finetune" in card


def test_a_second_run_does_nothing_and_a_reproduction_gives_the_same_history(zoo):
    plan = make_plan(read_recipe(zoo.file.parent / "own.yaml"), zoo)
    assert {task.state for task in plan} == {"done"}
    with Workers(0) as workers:
        for name in ("own/history", "own/train"):
            found = reproduce(name, zoo, workers)
            assert found.again == found.now == found.digest and not found.differ


def test_a_history_is_added_by_hand_with_its_base_and_not_without(zoo, tmp_path):
    shutil.copytree(zoo["own/history"].folder, tmp_path / "mine")
    with pytest.raises(ZooError, match="a seed_history needs its base"):
        added_by_hand(zoo, str(tmp_path / "mine"), None, "seed_history", None, set(), "")
    member = added_by_hand(zoo, str(tmp_path / "mine"), None, "seed_history", "base", set(), "")
    assert member.digest == zoo["own/history"].digest
    assert weights(member).fingerprint == weights(zoo["own/history"]).fingerprint


def test_a_history_whose_base_was_changed_is_made_again(zoo, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(zoo.file.parent, copy, symlinks=False)
    weights_file = copy / "base" / "model.safetensors"
    tensors = load_file(weights_file)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] + 1}, weights_file, {"format": "pt"})
    plan = make_plan(read_recipe(copy / "own.yaml"), Zoo(copy / "zoo.yaml"))
    assert next(task.state for task in plan if task.name == "own/history") == "ready"
