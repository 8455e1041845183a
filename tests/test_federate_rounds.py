"""The loop of a federation, with clients of three lines: who counts, who is asked again, what a restart finds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from glue.errors import RunError
from glue.federate.ledger import SUMS, ledger
from glue.federate.rounds import Loop, Reply, State, Terms
from glue.federate.spool import Spool
from glue.federate.update import Refused, Update, check, read_update
from glue.files import publish

CLIENTS = ["c0", "c1", "c2", "c3"]


class Killed(BaseException):
    """What kill -9 is to a test in one process."""


def written(spool: Spool, client: str, round: int, value: float, before: State, **other) -> None:
    """What a client leaves: one number in a file, and its note."""
    draft = spool.folder / f".{client}"
    draft.mkdir(exist_ok=True)
    (draft / "value").write_text(str(value))
    told = {"base": "base", "parent": before.digest, "kind": "lora", "rank": 1, "steps": 1, "seed": 0,
            "examples": 1 + CLIENTS.index(client), **other}
    Update(client, round, **told).write(draft)
    publish(draft, spool.incoming(round, client))


class World:
    """Clients that answer in a given order, at given times, and a combine that writes a weighted mean."""

    def __init__(self, folder: Path, order=CLIENTS, *, silent=(), failing=(), kill_after=None, delay=0.0, **other):
        self.spool, self.order, self.silent, self.failing = Spool(folder), order, set(silent), set(failing)
        self.kill_after, self.delay, self.other, self.now = kill_after, delay, other, 0.0
        self.trained: list[tuple[int, str]] = []
        self.combined: list[list[str]] = []

    def ask(self, round: int, clients, parent: State) -> Iterator[Reply | None]:
        for client in (client for client in self.order if client in clients and client not in self.silent):
            if len(self.trained) == self.kill_after:
                raise Killed
            self.now += self.delay
            if client in self.failing:
                yield Reply(client, round, "out of memory")
                continue
            before = float((parent.folder / "value").read_text()) if parent.folder else 0.0
            written(self.spool, client, round, before + 10 * CLIENTS.index(client), parent,
                    **self.other.get(client, {}))
            self.trained.append((round, client))
            yield Reply(client, round)
        while set(clients) & self.silent and self.now < 1000:
            self.now += 1.0
            yield None

    def combine(self, round: int, updates, parent: State, out: Path) -> str:
        self.combined.append([update.client for update in updates])
        total = sum(update.examples for update in updates)
        value = sum(update.examples / total * float((update.folder / "value").read_text()) for update in updates)
        (out / "value").write_text(repr(value))
        return f"digest of {value!r}"

    def check(self, update: Update, client: str, round: int, parent: State) -> None:
        value = float((update.folder / "value").read_text())
        check(update, client=client, round=round, base="base", parent=parent.digest, kind="lora",
              size=lambda _: value, bound=100.0)

    def run(self, clients=CLIENTS, report=lambda *_: None, **terms) -> State:
        return Loop(clients, Terms(**terms), self.spool, ask=self.ask, combine=self.combine, check=self.check,
                    clock=lambda: self.now, report=report).run()


def value(state: State) -> float:
    return float((state.folder / "value").read_text())


def test_all_that_came_is_combined_by_weight_and_the_next_round_starts_there(tmp_path):
    world = World(tmp_path)
    assert value(world.run(rounds=2)) == 2 * (0 * 1 + 10 * 2 + 20 * 3 + 30 * 4) / 10
    assert world.trained == [(1, name) for name in CLIENTS] + [(2, name) for name in CLIENTS]


def test_any_order_of_arrival_gives_the_same_digest(tmp_path):
    found = {World(tmp_path / "".join(order), order).run(rounds=2) .digest for order in permutations(CLIENTS)}
    assert len(found) == 1


@pytest.mark.parametrize("after", range(8))
def test_a_loop_that_was_killed_asks_only_for_what_is_missing(tmp_path, after):
    calm = World(tmp_path / "calm").run(rounds=2)
    struck = World(tmp_path / "struck", kill_after=after)
    with pytest.raises(Killed):
        struck.run(rounds=2)
    again = World(tmp_path / "struck")
    assert again.run(rounds=2) .digest == calm.digest
    assert sorted(struck.trained + again.trained) == sorted((round, name) for round in (1, 2) for name in CLIENTS)


def test_a_reply_that_nobody_had_looked_at_when_the_loop_was_killed_is_found(tmp_path):
    world = World(tmp_path)
    written(world.spool, "c2", 1, 20.0, State())
    world.run()
    assert (1, "c2") not in world.trained and world.combined == [CLIENTS]


def test_a_kill_while_combining_does_not_ask_anybody_again(tmp_path):
    world = World(tmp_path, silent=["c3"])

    def dies(*_):
        raise Killed

    world.combine = dies
    with pytest.raises(Killed):
        world.run(quorum=0.5, deadline=5)
    again = World(tmp_path)
    assert value(again.run(quorum=0.5, deadline=5)) == pytest.approx((0 + 20 + 60) / 6)
    assert again.trained == [] and again.combined == [CLIENTS[:3]]


def test_a_client_that_fails_is_missing_and_told_of_where_the_quorum_holds(tmp_path):
    world = World(tmp_path, failing=["c1"])
    assert value(world.run(quorum=0.75)) == pytest.approx((0 + 60 + 120) / 8)
    told = ledger(CLIENTS, world.spool.events(), revealed=SUMS)
    assert told["clients"]["c1"]["failed"] == {1: "out of memory"} and told["clients"]["c1"]["rounds"] == []
    assert told["clients"]["c0"]["rounds"] == [1]


def test_too_few_updates_stop_the_round_with_every_reason_and_a_second_run_goes_on(tmp_path):
    world = World(tmp_path, failing=["c1"])
    with pytest.raises(RunError, match="3 usable updates of 4 and needs 4: all clients have answered; c1: out of mem"):
        world.run()
    again = World(tmp_path)
    again.run()
    assert again.trained == [(1, "c1")]


def test_the_deadline_closes_a_round_and_what_comes_then_is_kept_as_late(tmp_path):
    world = World(tmp_path, delay=2.0)
    assert value(world.run(quorum=0.5, deadline=4.0, patience=100.0)) == pytest.approx((0 + 20) / 3)
    assert [update.client for update in world.spool.taken(1)] == ["c0", "c1"]
    assert [update.client for update in world.spool.taken(1, late=True)] == CLIENTS
    assert ledger(CLIENTS, world.spool.events(), revealed=SUMS)["clients"]["c3"]["late"] == [1]


def test_before_the_deadline_a_quorum_alone_does_not_close_a_round(tmp_path):
    world = World(tmp_path, delay=2.0)
    world.run(quorum=0.5, deadline=100.0)
    assert world.combined == [CLIENTS]


def test_a_deadline_without_a_quorum_says_so(tmp_path):
    with pytest.raises(RunError, match=r"1 usable updates of 4 and needs 2: the deadline of 3 s has passed"):
        World(tmp_path, silent=["c1", "c2", "c3"]).run(quorum=0.5, deadline=3.0)


@pytest.mark.parametrize(("wrong", "reason"), [
    ({"base": "another"}, "it is for base 'another', and 'base' was asked for"),
    ({"parent": "older"}, "it is for parent 'older'"),
    ({"kind": "full"}, "it is for kind 'full'"),
    ({"examples": 0}, "trained on 0 examples"),
    ({"examples": 1.5}, "its note says examples: 1.5"),
])
def test_a_wrong_update_is_refused_with_its_reason_and_the_round_goes_on(tmp_path, wrong, reason):
    world = World(tmp_path, **{"c2": wrong})
    assert value(world.run(quorum=0.5)) == pytest.approx((0 + 20 + 120) / 7)
    told = ledger(CLIENTS, world.spool.events(), revealed=SUMS)["clients"]["c2"]
    assert reason in told["refused"][1] and told["rounds"] == [] and told["up"] > 0


@pytest.mark.parametrize(("number", "reason"), [(float("nan"), "not finite"), (101.0, "by 101 of its norm; at most")])
def test_numbers_that_are_none_and_changes_that_are_huge_are_refused(number, reason):
    update = Update("c0", 1, "base", "", "lora", 1, 1, 1, 0)
    with pytest.raises(Refused, match=reason):
        check(update, client="c0", round=1, base="base", parent="", kind="lora", size=lambda _: number, bound=100.0)


def test_a_reply_in_another_clients_name_is_refused(tmp_path):
    spool = Spool(tmp_path)
    written(spool, "c1", 1, 1.0, State())
    (spool.folder / "incoming/1-c1").rename(spool.folder / "incoming/1-c0")
    with pytest.raises(Refused, match="for client 'c1', and 'c0' was asked for"):
        check(read_update(spool.incoming(1, "c0")), client="c0", round=1, base="base", parent="", kind="lora",
              size=lambda _: 0.0, bound=1.0)


def test_a_client_that_answers_twice_counts_once(tmp_path):
    world = World(tmp_path, delay=1.0)
    single = world.ask

    def twice(round, clients, parent):
        for reply in single(round, clients, parent):
            yield reply
            written(world.spool, reply.client, round, 99.0, parent)
            yield reply

    world.ask = twice
    terms = {"rounds": 2, "quorum": 0.5, "deadline": 2.5, "patience": 10.0}
    assert world.run(**terms).digest == World(tmp_path / "once", delay=1.0).run(**terms).digest
    assert [update.client for update in world.spool.taken(2)] == ["c0", "c1", "c2"]


def test_a_note_that_is_damaged_is_a_refusal_and_no_crash(tmp_path):
    for text in ("", "[]", "{}", json.dumps({"client": "c0", "rank": "8"}), "[" * 9000):
        (tmp_path / "update.json").write_text(text)
        with pytest.raises(Refused):
            read_update(tmp_path)


def test_a_round_of_some_asks_as_many_and_every_round_others(tmp_path):
    terms = Terms(per_round=2, seed=5)
    drawn = [tuple(terms.asked(round, CLIENTS)) for round in range(1, 30)]
    assert all(len(set(some)) == 2 for some in drawn) and len(set(drawn)) == 6
    assert drawn == [tuple(Terms(per_round=2, seed=5).asked(round, CLIENTS[::-1])) for round in range(1, 30)]
    world = World(tmp_path)
    world.run(rounds=3, per_round=2, seed=5)
    assert [tuple(some) for some in world.combined] == drawn[:3]


def test_one_round_of_many_is_the_loop_of_one_round(tmp_path):
    one, many = World(tmp_path / "one"), World(tmp_path / "many")
    first = one.run(rounds=1)
    many.run(rounds=3)
    assert first.digest == many.spool.closed()[1]["digest"]


def test_progress_counts_updates_over_all_rounds(tmp_path):
    told = []
    World(tmp_path).run(rounds=2, report=lambda done, total, note: told.append((done, total)))
    assert told == [(k, 8) for k in range(5)] + [(k, 8) for k in range(4, 9)]


def test_a_client_pays_for_what_it_sends_and_is_sent(tmp_path):
    world = World(tmp_path)
    world.run(rounds=2)
    told = ledger(CLIENTS, world.spool.events(), revealed=SUMS)
    sent = sum((tmp_path / "updates" / f"{round}-c1" / name).stat().st_size for round in (1, 2)
               for name in ("value", "update.json"))
    state = (tmp_path / "states/1/value").stat().st_size
    assert (told["clients"]["c1"]["up"], told["clients"]["c1"]["down"]) == (sent, state)
    assert told["privacy"] == {"noise": "none", "revealed": SUMS}


def drifted(folder: Path, hessians: list[np.ndarray], rounds: int, steps: int) -> np.ndarray:
    """Where quadratics with these curvatures, and minima of their own, lead to by plain gradient steps at clients."""
    random = np.random.default_rng(7)
    minima = random.standard_normal((len(CLIENTS), 5))
    weights = np.array([1.0, 2.0, 3.0, 4.0]) / 10

    def ask(round: int, clients, parent: State) -> Iterator[Reply]:
        for client in clients:
            k = CLIENTS.index(client)
            x = np.load(parent.folder / "x.npy") if parent.folder else np.zeros(5)
            for _ in range(steps):
                x = x - 0.05 * hessians[k] @ (x - minima[k])
            draft = folder / f".{client}"
            draft.mkdir()
            np.save(draft / "x.npy", x)
            Update(client, round, "base", parent.digest, "full", 0, k + 1, steps, 0).write(draft)
            publish(draft, spool.incoming(round, client))
            yield Reply(client, round)

    def combine(round: int, updates, parent: State, out: Path) -> str:
        x = sum(weights[CLIENTS.index(update.client)] * np.load(update.folder / "x.npy") for update in updates)
        np.save(out / "x.npy", x)
        return str(round)

    spool = Spool(folder)
    loop = Loop(CLIENTS, Terms(rounds), spool, ask=ask, combine=combine, check=lambda *_: None, clock=lambda: 0.0)
    return np.load(loop.run().folder / "x.npy")


def test_with_one_curvature_one_round_is_exactly_as_good_as_three_and_with_several_it_is_not(tmp_path):
    random = np.random.default_rng(3)
    factors = random.standard_normal((4, 5, 5))
    several = [factor @ factor.T for factor in factors]
    once, thrice = (drifted(tmp_path / f"same{rounds}", several[:1] * 4, rounds, 30 // rounds) for rounds in (1, 3))
    assert np.abs(once - thrice).max() < 1e-13 * np.abs(once).max()
    once, thrice = (drifted(tmp_path / f"unlike{rounds}", several, rounds, 30 // rounds) for rounds in (1, 3))
    assert np.linalg.norm(once - thrice) > 0.05 * np.linalg.norm(once)
