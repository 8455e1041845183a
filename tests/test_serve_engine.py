"""The engine: rows of one batch do not change each other, nobody waits for another's end, whoever leaves is let go."""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glue.kinds import Running, load
from glue.serve.batch import Batch
from glue.serve.engine import Engine, Job
from glue.serve.metrics import Metrics
from glue.serve.problems import Problem
from glue.serve.rows import Row
from glue.serve.sampling import Sampling, drawn, generator
from glue.serve.written import Written, cut, safe, shown
from tests.serving import byte_pairs, small_member


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Running:
    """In fp64, where no two tokens are so near that a batch could change their order."""
    single = load(small_member(tmp_path_factory.mktemp("members"), positions=4096))
    return Running(single.member, single.model.double(), single.tokenizer)


def row(running: Running, ids: Sequence[int], most: int = 12, *, temperature: float = 0.0, seed: int = 0,
        **more) -> Row:
    return Row(running, list(ids), most, Sampling(temperature, more.pop("top_p", 1.0)), generator(seed, 0),
               len(running.tokenizer), **more)


def finished(rows: list[Row]) -> list[Row]:
    """All of them in one batch to their ends."""
    batch = Batch(rows)
    while batch.rows:
        batch.step()
    return rows


PROMPTS = st.lists(st.lists(st.integers(3, 300), min_size=1, max_size=30), min_size=1, max_size=6)


@settings(max_examples=25)
@given(prompts=PROMPTS, seed=st.integers(0, 99))
def test_a_row_writes_alone_what_it_writes_in_a_batch(running, prompts, seed):
    rng = random.Random(seed)
    how = [{"temperature": rng.choice([0, 0, 0.7, 2.0]), "seed": k, "most": rng.randrange(1, 16), "top": 2,
            "judged": True, "top_p": rng.choice([0.5, 1.0])} for k in range(len(prompts))]
    together = finished([row(running, ids, **more) for ids, more in zip(prompts, how, strict=True)])
    for one, ids, more in zip(together, prompts, how, strict=True):
        alone, = finished([row(running, ids, **more)])
        assert (one.tokens, one.text, one.finish) == (alone.tokens, alone.text, alone.finish)
        assert [told.log for told in one.told] == pytest.approx([told.log for told in alone.told], abs=1e-9)
        assert [told.log for told in one.prompt_told[1:]] == pytest.approx(
            [told.log for told in alone.prompt_told[1:]], abs=1e-9)


def test_a_member_without_a_cache_reads_again_and_writes_the_same(running):
    class Bare(torch.nn.Module):
        """Logits and nothing else."""

        device, config, generation_config = torch.device("cpu"), running.model.config, running.model.generation_config

        def forward(self, input_ids, attention_mask):
            places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            return {"logits": running.model(input_ids, attention_mask=attention_mask, position_ids=places).logits}

    bare = Running(running.member, Bare(), running.tokenizer)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    theirs = finished([row(bare, ids, 3 * k + 2) for k, ids in enumerate(prompts)])
    assert [one.tokens for one in theirs] == [one.tokens for one in finished(
        [row(running, ids, 3 * k + 2) for k, ids in enumerate(prompts)])]


def test_tokens_are_drawn_in_proportion_to_their_probabilities():
    logits, rng, n = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf]), generator(3, 0), 20_000
    for temperature, top_p, allowed in ((1.0, 1.0, 4), (0.5, 1.0, 4), (1.0, 0.8, 2)):
        odds = (logits.double() / temperature).softmax(0)
        odds = torch.where(torch.isin(torch.arange(5), odds.topk(allowed).indices), odds, 0.0)
        odds /= odds.sum()
        counts = torch.zeros(5, dtype=torch.float64)
        for _ in range(n):
            counts[drawn(logits, Sampling(temperature, top_p), rng)] += 1
        kept = odds > 0
        assert not counts[~kept].any()
        assert float(((counts - n * odds)[kept] ** 2 / (n * odds[kept])).sum()) < 16.3, "chi-square, p = 0.001 at df 3"


def test_extreme_temperatures_draw_the_likeliest_or_all_alike():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert {drawn(logits, Sampling(5e-324), generator(k, 0)) for k in range(20)} == {1}
    assert {drawn(logits, Sampling(100.0), generator(k, 0)) for k in range(60)} == {0, 1, 2}
    with pytest.raises(Problem):
        drawn(torch.tensor([1.0, torch.nan]), Sampling(0.0), generator(0, 0))


# text

@given(st.text(max_size=30), st.integers(0, 5))
@settings(max_examples=60)
def test_text_grows_to_what_decoding_all_at_once_gives(text, before):
    tokenizer = byte_pairs(start=False)
    ids = tokenizer(text)["input_ids"]
    written = Written(tokenizer, ids[:before])
    grown = "".join(written.add(token) for token in ids[before:])
    assert grown + written.finish() == written.text == "".join(written.pieces)
    if before == 0:
        assert written.text == shown(tokenizer, ids)
    assert "�" not in grown or "�" in text


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(0, 29))
def test_a_stop_is_found_however_the_text_came(text, stops, at):
    first = min((text.find(stop) for stop in stops if stop in text), default=None)
    found = cut(text[:at], stops, 0)
    assert (found if found is not None else cut(text, stops, len(text[:at]))) == first
    told = safe(text, stops)
    if first is None:  # what is told may not turn out to belong to a stop
        assert all(cut(text + more, stops, 0) is None or cut(text + more, stops, 0) >= told
                   for more in ("a", "b", "ab", "ba", "aab", "bba"))


# turns

def engine_run(engine: Engine, work):
    async def run():
        engine.start()
        try:
            return await asyncio.wait_for(work(), 30)
        finally:
            engine.stop(10)
    return asyncio.run(run())


def test_a_short_request_does_not_wait_for_the_end_of_a_long_one(running):
    engine = Engine(8, 8, Metrics())

    async def work():
        long, = rows = [row(running, [5, 6], 3000)]
        job = engine.submit(Job(rows))
        while not long.tokens:
            await asyncio.sleep(0.001)
        short = engine.submit(Job([row(running, [7], 3)]))
        await short.events.get()
        assert len(long.tokens) < 1000 and job.events.empty()
        job.cancel()
        before = len(long.tokens)
        while engine.rows:
            await asyncio.sleep(0.001)
        assert len(long.tokens) <= before + 2

    engine_run(engine, work)


def test_rows_beyond_the_places_wait_and_all_are_answered(running):
    engine, most = Engine(3, 100, Metrics()), 0

    async def work():
        nonlocal most
        jobs = [engine.submit(Job([row(running, [5 + k, 6], 1 + k % 7), row(running, [9, k + 3], 4)]))
                for k in range(40)]
        for job in jobs:
            for _ in job.rows:
                most = max(most, engine.rows)
                await job.events.get()
        for k, job in enumerate(jobs):
            assert job.rows[0].tokens == finished([row(running, [5 + k, 6], 1 + k % 7)])[0].tokens

    engine_run(engine, work)
    assert 1 <= most <= 3 and engine.waiting == 0
    assert engine.metrics.completion_tokens == sum(5 + k % 7 for k in range(40))


def test_more_than_may_wait_are_refused_and_cancelled_ones_do_not_count(running):
    engine = Engine(1, 2, Metrics())

    async def work():
        first = engine.submit(Job([row(running, [5], 3000)]))
        while not engine.rows:
            await asyncio.sleep(0.001)
        waiting = [engine.submit(Job([row(running, [6], 2)])) for _ in range(2)]
        with pytest.raises(Problem) as caught:
            engine.submit(Job([row(running, [7], 2)]))
        assert caught.value.status == 429
        waiting[0].cancel()
        last = engine.submit(Job([row(running, [7], 2)]))
        first.cancel()
        assert (await waiting[1].events.get()).finish and (await last.events.get()).finish
        assert waiting[0].rows[0].tokens == []

    engine_run(engine, work)


def test_functions_run_between_tokens_and_their_errors_are_their_own(running):
    engine = Engine(2, 8, Metrics())

    async def work():
        long = engine.submit(Job([row(running, [5], 3000)]))
        while not engine.rows:
            await asyncio.sleep(0.001)
        began = time.monotonic()
        assert await engine.call(lambda: 7).events.get() == 7
        wrong = await engine.call(lambda: 1 / 0).events.get()
        assert isinstance(wrong, Problem) and wrong.status == 500 and "ZeroDivisionError" in str(wrong)
        assert time.monotonic() - began < 2 and not long.over and long.events.empty()
        long.cancel()

    engine_run(engine, work)


def test_a_batch_that_fails_fails_its_requests_and_the_next_is_answered(running):
    engine = Engine(4, 8, Metrics())

    async def work():
        wrong = await engine.submit(Job([row(running, [10 ** 6], 3)])).events.get()  # no such row of the embedding
        assert isinstance(wrong, Problem) and wrong.status == 500
        assert (await engine.submit(Job([row(running, [5], 3)])).events.get()).finish == "length"

    engine_run(engine, work)


def test_prompts_that_are_too_many_for_the_memory_are_read_by_halves_and_fewer_from_then_on(running, monkeypatch):
    engine, small, plain, read = Engine(8, 8, Metrics()), replace(running), running.model.forward, []

    def forward(input_ids=None, **asked):
        if input_ids.shape[1] > 1:
            if len(input_ids) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory (as told)")
            read.append(len(input_ids))
        return plain(input_ids=input_ids, **asked)

    forward.__signature__ = inspect.signature(plain)
    monkeypatch.setattr(running.model, "forward", forward)

    async def work():
        job = engine.submit(Job([row(small, [5 + k, 6], 4) for k in range(7)]))
        for _ in job.rows:
            assert (await job.events.get()).finish == "length"
        return [each.tokens for each in job.rows]

    told = engine_run(engine, work)
    assert small.room.halved == 2 and max(read) <= 2 and sum(read) == 7
    monkeypatch.undo()
    assert told == [finished([row(running, [5 + k, 6], 4)])[0].tokens for k in range(7)]


def test_an_engine_that_stops_finishes_what_is_there_and_takes_nothing_more(running):
    engine = Engine(1, 8, Metrics())

    async def run():
        engine.start()
        jobs = [engine.submit(Job([row(running, [5 + k], 200)])) for k in range(3)]
        stopped = await asyncio.get_running_loop().run_in_executor(None, engine.stop, 20.0)
        assert stopped and all([len((await job.events.get()).row.tokens) == 200 for job in jobs])
        with pytest.raises(Problem) as caught:
            engine.submit(Job([row(running, [5], 1)]))
        assert caught.value.status == 503

    asyncio.run(run())


def test_what_takes_too_long_at_the_end_is_told_so(running):
    engine = Engine(1, 8, Metrics())

    async def run():
        engine.start()
        job = engine.submit(Job([row(running, [5], 4000)]))
        assert not await asyncio.get_running_loop().run_in_executor(None, engine.stop, 0.05)
        told = await job.events.get()
        assert isinstance(told, Problem) and told.status == 503
        assert engine._thread is not None
        engine._thread.join(10)
        assert not engine._thread.is_alive() and len(job.rows[0].tokens) < 4000

    asyncio.run(run())
