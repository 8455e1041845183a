"""Sources of this process, and the bytes in which their answers travel."""

from __future__ import annotations

import json
import math
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from glue.errors import GlueError, RunError, ZooError
from glue.family import families
from glue.kinds import Running, load, wire
from glue.kinds.local_source import KEPT, Local, narrowed
from glue.kinds.source import Scored, vocabulary
from glue.member import Member
from tests.laws.test_kinds import MADE

TEXT = [1, 5, 9, 7, 3, 8, 30, 21, 17, 4]


def wide(member: Member) -> Running:
    running = load(member)
    running.model.double()
    return running


def fresh(running: Running, ids: list[int], v: int = 40) -> torch.Tensor:
    """Log-probabilities after ids[:1], ..., ids by one forward without a cache. [s, v]"""
    with torch.no_grad():
        return running.model(torch.tensor([ids]), use_cache=False).logits[0, :, :v].log_softmax(-1)


class Counted:
    """A running member whose model counts the tokens that it reads."""

    def __init__(self, running: Running):
        self.tokens = 0
        running.model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        self.tokens += (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]

    def since(self) -> int:
        count, self.tokens = self.tokens, 0
        return count


@pytest.fixture
def running(tiny) -> Running:
    return wide(tiny("model", seed=3))


# what a member says of a text

def test_every_place_is_what_one_forward_says_of_it(running):
    with Local(running).open() as text:
        scored = text.score(TEXT, 1)
    assert scored.logs.dtype == torch.float64 and scored.tokens is None
    assert_close(scored.logs, fresh(running, TEXT), rtol=0, atol=1e-12)
    assert_close(scored.logs.exp().sum(1), torch.ones(len(TEXT), dtype=torch.float64), rtol=0, atol=1e-12)


def test_after_rejected_drafts_a_cropped_cache_says_what_a_fresh_forward_says(running):
    rng = torch.Generator().manual_seed(0)
    written = [1, 5, 9]
    with Local(running).open() as text:
        text.score(written, len(written))
        for round_ in range(12):
            draft = torch.randint(3, 40, (4,), generator=rng).tolist()
            scored = text.score(written + draft, len(written))
            assert_close(scored.logs, fresh(running, written + draft)[len(written) - 1:], rtol=0, atol=1e-10)
            accepted = round_ % 5  # from none to all of them, and then another token
            written = [*written, *draft[:accepted], int(scored.logs[accepted].argmax())]


def test_a_text_that_goes_on_or_loses_a_draft_costs_its_new_tokens_only(running):
    counted = Counted(running)
    with Local(running).open() as text:
        text.score(TEXT[:6], 6)
        assert counted.since() == 6
        text.score(TEXT[:6] + [11, 12, 13], 6)
        assert counted.since() == 3  # the place before the draft is known already
        text.score(TEXT[:6] + [11, 14], 8)
        assert counted.since() == 1  # two are cropped, one is new
        text.score(TEXT[:6] + [11, 14], 7, top_k=2, extra=[[3], [4]])
        assert counted.since() == 2  # no more than the places that the last call did not tell
        text.score(TEXT[:6] + [11, 14], 8, top_k=5)
        assert counted.since() == 0  # asked again, for more of a place


def test_a_text_keeps_the_places_of_a_draft_and_no_more(running):
    with Local(running).open() as text:
        text.score(TEXT + TEXT[1:], 1)
        assert text._told.shape == (KEPT, 40)
        again = text.score(TEXT + TEXT[1:], len(TEXT) * 2 - 3)
        assert_close(again.logs, fresh(running, TEXT + TEXT[1:])[-3:], rtol=0, atol=1e-12)


def test_what_is_told_belongs_to_who_asked(running):
    with Local(running).open() as text:
        text.score(TEXT, 5).logs.zero_()
        assert_close(text.score(TEXT, 5).logs, fresh(running, TEXT)[4:], rtol=0, atol=1e-12)


def test_a_shorter_text_and_then_its_old_end_are_told_as_at_first(running):
    with Local(running).open() as text:
        for ids, start in ((TEXT, 8), (TEXT[:9], 9), (TEXT, 9), (TEXT[:2] + [3], 2), (TEXT, 2), (TEXT, 10)):
            assert_close(text.score(ids, start).logs, fresh(running, ids)[start - 1:], rtol=0, atol=1e-10)


def test_texts_that_are_open_at_once_do_not_mix(running):
    source = Local(running)
    with source.open() as one, source.open() as two:
        one.score(TEXT[:5], 5)
        two.score([1, 30, 30], 3)
        assert_close(one.score(TEXT, 6).logs, fresh(running, TEXT)[5:], rtol=0, atol=1e-10)
        assert_close(two.score([1, 30, 30, 4], 4).logs, fresh(running, [1, 30, 30, 4])[3:], rtol=0, atol=1e-10)


def test_threads_may_ask_one_source_at_once(running):
    source, found = Local(running), dict[int, torch.Tensor]()

    def ask(k: int) -> None:
        with source.open() as text:
            for end in range(2, len(TEXT) + 1):
                told = text.score([1, 3 + k, *TEXT[2:end]], 2).logs
            found[k] = told

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, told in found.items():
        assert_close(told, fresh(running, [1, 3 + k, *TEXT[2:]])[1:], rtol=0, atol=1e-10)
    assert len(found) == 6


def test_adding_a_constant_to_logits_changes_nothing(running):
    with Local(running).open() as text:
        before = text.score(TEXT, 1).logs
    running.model.lm_head.register_forward_hook(lambda module, args, out: out + 5.0)
    with Local(running).open() as text:
        assert_close(text.score(TEXT, 1).logs, before, rtol=0, atol=1e-12)


def test_rows_of_a_head_beyond_the_vocabulary_are_no_tokens(tiny):
    running = wide(tiny("padded", seed=3, vocab_size=48))
    with Local(running).open() as text:
        scored = text.score(TEXT, 1)
    assert scored.logs.shape == (len(TEXT), 40)
    assert_close(scored.logs.exp().sum(1), torch.ones(len(TEXT), dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(scored.logs, fresh(running, TEXT), rtol=0, atol=1e-12)


def test_a_head_that_lacks_tokens_is_refused(tiny):
    running = load(tiny("short", seed=3))
    running.tokenizer.add_tokens(["w40", "w41"])
    with Local(running).open() as text, pytest.raises(ZooError, match="for 40 tokens, and its tokenizer knows 42"):
        text.score(TEXT, 1)


def test_half_precision_is_told_in_fp32(tiny):
    running = load(tiny("half", seed=3), dtype="bfloat16")
    with Local(running).open() as text:
        logs = text.score(TEXT, 1).logs
    assert logs.dtype == torch.float32
    assert_close(logs.double().exp().sum(1), torch.ones(len(TEXT), dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ids, start, more, wrong", [
    (TEXT, 0, {}, "what follows after 0 of 10 tokens"), (TEXT, 11, {}, "what follows after 11 of 10 tokens"),
    ([1, 40], 1, {}, "a token that is none of 40"), ([1, -1], 1, {}, "a token that is none of 40"),
    (TEXT * 7, 1, {}, "the text has 70 tokens, and the member sees 64"),
    (TEXT, 9, {"top_k": 2, "extra": [[1]]}, "1 lists of tokens for 2 places"),
    (TEXT, 10, {"top_k": 2, "extra": [[99]]}, "a token that is none of 40"),
    (TEXT, 10, {"top_k": -1}, "the likeliest -1 tokens")])
def test_what_cannot_be_asked_is_refused(running, ids, start, more, wrong):
    with Local(running).open() as text, pytest.raises(RunError, match=wrong):
        text.score(ids, start, **more)


def test_numbers_that_are_none_are_an_error_and_not_an_answer(running):
    source = Local(running)
    with source.open() as text:
        text.score(TEXT, 10)
        hook = running.model.lm_head.register_forward_hook(lambda module, args, out: out * math.nan)
        with pytest.raises(RunError, match="no numbers"):
            text.score([*TEXT, 5], 10)
        hook.remove()
        again = text.score([*TEXT, 5], 11).logs  # nothing of the failed call is left
        assert_close(again, fresh(running, [*TEXT, 5])[10:], rtol=0, atol=1e-12)


def sliding(tiny, **shape) -> Running:
    from transformers import MistralConfig, MistralForCausalLM

    member = tiny("llama")
    torch.manual_seed(2)
    config = MistralConfig(**{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                              "sliding_window": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
                              "max_position_embeddings": 64, "initializer_range": 0.3, **shape})
    return Running(member, MistralForCausalLM(config).double().eval(), load(member).tokenizer)


def test_a_window_that_slides_loses_a_draft_and_is_read_again_where_it_would_lose_more(tiny):
    running = sliding(tiny)
    counted = Counted(running)
    asked = ((TEXT[:8], 7, 8), (TEXT[:7] + [11], 7, 8),  # of the first call nothing that slid out was kept
             (TEXT[:7] + [11, 12, 13, 14, 15, 16], 8, 5), (TEXT[:7] + [11, 12, 3], 9, 1),
             ([*TEXT[:7], 11, 12, 3, 4], 11, 1),
             ([*TEXT[:7], 11, 9, 9], 8, 10), ([1, 5, 4], 2, 3), ([1, 5, 4, 5], 4, 1))
    with Local(running).open() as text:
        for ids, start, read in asked:
            told = text.score(ids, start).logs
            assert counted.since() == read
            assert_close(told, fresh(running, ids)[start - 1:], rtol=0, atol=1e-10)
            counted.since()


def test_a_window_that_is_not_full_yet_is_cropped_like_any_other(tiny):
    running = sliding(tiny, sliding_window=32)
    counted = Counted(running)
    with Local(running).open() as text:
        for ids, start, read in ((TEXT, 9, 10), (TEXT[:4] + [11], 5, 1), (TEXT[:2] + [11, 30], 2, 3)):
            told = text.score(ids, start).logs
            assert counted.since() == read
            assert_close(told, fresh(running, ids)[start - 1:], rtol=0, atol=1e-10)
            counted.since()


def test_a_model_that_keeps_nothing_is_read_again_each_time(running):
    forward = running.model.forward
    running.model.forward = lambda input_ids, use_cache=None: forward(input_ids=input_ids, use_cache=False)
    with Local(running).open() as text:
        for ids, start in ((TEXT[:4], 4), (TEXT, 5), (TEXT[:4] + [9], 5)):
            assert_close(text.score(ids, start).logs, fresh(running, ids)[start - 1:], rtol=0, atol=1e-12)


@pytest.fixture
def mixture(tiny, tmp_path) -> Running:
    from glue.mix.levels.model import sites, write
    from glue.mix.parts import Dev, Parts

    experts = [tiny("one", seed=5), tiny("two", seed=6, hidden_size=24)]
    dev = Dev(["w5", "w30", "w17"], torch.eye(2)[[0, 1, 0]], torch.tensor([0, 1, 0]))
    parts = Parts(tuple(experts), None, experts[0])
    write(tmp_path / "mixture", parts, [families("routing").choose("linear")(site) for site in sites(parts, dev)])
    return wide(Member("mixture", "mixture", str(tmp_path / "mixture")))


def test_a_mixture_answers_by_the_expert_of_the_prompt_whatever_is_drafted(mixture):
    prompts = [[1, 5], [1, 30]]
    routes = mixture.route(prompts)
    assert len(set(routes)) == 2
    with Local(mixture).open() as text:
        for prompt, route in zip(prompts, routes, strict=True):
            for draft, start in (([30, 30, 5], 2), ([30, 7], 4), ([5, 5, 5, 5], 3)):
                with mixture.pinned(route):
                    wanted = fresh(mixture, prompt + draft)[start - 1:]
                assert_close(text.score(prompt + draft, start).logs, wanted, rtol=0, atol=1e-10)


def test_a_mixture_by_text_has_no_one_vocabulary(running):
    with pytest.raises(ZooError, match="tokenizers of their own"):
        Local(replace(running, choose=lambda texts: [0]))


# less than everything

def test_the_likeliest_and_what_is_asked_for_are_told_once_each_with_what_is_left(running):
    logs = fresh(running, TEXT)[-3:]
    order = logs.argsort(1, descending=True)
    extra = [[int(order[0, 0]), int(order[0, 9]), int(order[0, 9])], [], [int(order[2, 20]), int(order[2, 30])]]
    with Local(running).open() as text:
        scored = text.score(TEXT, len(TEXT) - 2, top_k=4, extra=extra)
    assert scored.tokens.shape == scored.logs.shape == (3, 6)
    wanted = [set(order[0, :4].tolist()) | {int(order[0, 9])}, set(order[1, :4].tolist()),
              set(order[2, :4].tolist()) | set(extra[2])]
    for k, row in enumerate(scored.tokens.tolist()):
        told = [token for token in row if token >= 0]
        assert set(told) == wanted[k] and len(told) == len(wanted[k])
        assert_close(scored.logs[k, :len(told)], logs[k, told])
        assert bool((scored.logs[k, len(told):] == -math.inf).all())
        rest = sorted(set(range(40)) - set(told))
        assert_close(scored.tail[k], logs[k, rest].exp().sum(), rtol=1e-9, atol=0)
        assert float(logs[k, rest].exp().max()) <= float(scored.floor[k])
        assert_close(scored.floor[k], logs[k, order[k, 3]].exp(), rtol=1e-9, atol=0)


def test_as_many_as_there_are_is_everything_and_none_is_only_what_was_asked_for(running):
    logs = fresh(running, TEXT)[-2:]
    assert narrowed(logs, 40).tokens is None and narrowed(logs, None, [[1], [2]]).tokens is None
    asked = narrowed(logs, 0, [[7], [8, 9]])
    assert asked.tokens.tolist() == [[7, -1], [8, 9]] and asked.floor.tolist() == [1, 1]
    assert_close(asked.tail, 1 - asked.logs.exp().sum(1), rtol=0, atol=1e-12)


# the wire

def scores(v: int, k: int, p: int, seed: int, spread: float = 3.0) -> Scored:
    logs = (torch.randn(p, v, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread)
    return narrowed(logs.log_softmax(-1), k or None, [[t % v for t in range(n * n)] for n in range(p)] if k else ())


@given(v=st.sampled_from([2, 9, 300, 70_000]), k=st.integers(0, 12), p=st.integers(1, 4),
       bits=st.sampled_from([32, 16, 8]), seed=st.integers(0, 99))
def test_what_was_told_comes_back_within_what_its_bits_cost(v, k, p, bits, seed):
    scored = scores(v, k, p, seed)
    data = wire.encode(scored, v, bits)
    k = 0 if scored.tokens is None else scored.logs.shape[1]
    assert len(data) == wire.size(p, k, v, bits)
    back = wire.decode(data, places=p, v=v)
    near = scored.logs.isfinite() & (scored.logs >= scored.logs.amax(1, keepdim=True) - wire.RANGE)
    error = {32: 2e-6, 16: 0.008, 8: wire.STEP / 2 + 1e-5}[bits]
    assert float((back.logs.double() - scored.logs)[near].abs().max()) <= error
    if scored.tokens is None:
        assert back.tokens is None and back.tail.tolist() == back.floor.tolist() == [0.0] * p
    else:
        assert torch.equal(back.tokens, scored.tokens)
        assert torch.equal(back.logs == -math.inf, scored.tokens < 0)
        for told, wanted in ((back.tail, scored.tail), (back.floor, scored.floor)):
            assert bool((told.double() >= wanted).all()) and float((told.double() - wanted).max()) < 1e-7


@given(v=st.sampled_from([2, 9, 300]), k=st.integers(0, 12), p=st.integers(1, 4), seed=st.integers(0, 99))
def test_json_tells_the_same(v, k, p, seed):
    scored = scores(v, k, p, seed)
    told = json.loads(json.dumps(wire.as_json(scored, 3), allow_nan=False))
    assert told["from_pos"] == 3
    back = wire.from_json(told, places=p, v=v)
    assert (back.tokens is None) == (scored.tokens is None)
    if scored.tokens is not None:
        width = back.tokens.shape[1]
        assert torch.equal(back.tokens, scored.tokens[:, :width]) and bool((scored.tokens[:, width:] < 0).all())
    assert_close(back.logs.double(), scored.logs[:, :back.logs.shape[1]], rtol=0, atol=2e-6)
    assert_close(back.tail.double(), scored.tail, rtol=0, atol=1e-7)


def test_a_probability_of_0_survives_in_16_and_32_bits_and_lies_lowest_in_8():
    logs = torch.tensor([[0.5, 0.5, 0.0, 1e-12]]).double().log()
    scored = Scored(logs, None, torch.zeros(1), torch.zeros(1))
    for bits in (32, 16):
        assert wire.decode(wire.encode(scored, 4, bits), places=1, v=4).logs[0, 2] == -math.inf
    lowest = wire.decode(wire.encode(scored, 4, 8), places=1, v=4).logs[0, 2:]
    assert lowest.tolist() == pytest.approx([math.log(0.5) - 20] * 2, abs=1e-4)
    assert wire.from_json(json.loads(json.dumps(wire.as_json(scored, 1), allow_nan=False)), places=1,
                          v=4).logs[0, 2] == -math.inf


@pytest.mark.parametrize("v, width", [(0xFFFF, 2), (0x10000, 4)])
def test_the_last_token_of_a_vocabulary_is_not_taken_for_a_place_without_one(v, width):
    scored = Scored(torch.tensor([[-1.0, -2.0], [-1.0, -math.inf]]), torch.tensor([[v - 1, 0], [v - 2, -1]]),
                    torch.zeros(2), torch.zeros(2))
    data = wire.encode(scored, v)
    assert len(data) == wire.HEADER.size + 2 * (2 * width + 2 * 4 + 8)
    assert wire.decode(data, places=2, v=v).tokens.tolist() == [[v - 1, 0], [v - 2, -1]]


@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_answer_are_one_clear_error(data):
    with pytest.raises(RunError, match="cannot be read"):
        wire.decode(data, places=3, v=40)


@given(seed=st.integers(0, 20), bits=st.sampled_from([32, 16, 8]), k=st.sampled_from([0, 3]),
       flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4),
       cut=st.integers(0, 30))
def test_damaged_answers_are_an_error_or_still_probabilities(seed, bits, k, flips, cut):
    data = bytearray(wire.encode(scores(40, k, 3, seed), 40, bits))
    for where, what in flips:
        data[int(where * len(data))] ^= what
    try:
        back = wire.decode(bytes(data[:len(data) - cut]), places=3, v=40)
    except GlueError:
        return
    assert not cut and back.logs.shape[0] == 3 and float(back.logs.max()) <= wire.SLACK
    assert not back.logs.isnan().any() and float(back.tail.min()) >= 0 and float(back.floor.max()) <= 1 + wire.SLACK
    if back.tokens is not None:
        assert int(back.tokens.min()) >= -1 and int(back.tokens.max()) < 40


@pytest.mark.parametrize("p, k, v", [(2 ** 32 - 1, 0, 40), (3, 2 ** 32 - 1, 40), (3, 0, 2 ** 32 - 1), (0, 0, 40)])
def test_sizes_that_were_not_asked_for_take_no_memory(p, k, v):
    with pytest.raises(RunError, match="asked were 3 places of 40 tokens"):
        wire.decode(wire.HEADER.pack(wire.MARK, wire.VERSION, 32, 0, p, k, v), places=3, v=40)


@pytest.mark.parametrize("changed", [
    {"logprobs": [[0.5, -1.0]]}, {"logprobs": [["x", -1.0]]}, {"logprobs": []}, {"logprobs": None}, {"ids": [[1]]},
    {"ids": [[1, 1]]}, {"ids": [[1, 40]]}, {"ids": [[1, 2.0]]}, {"ids": [[1, True]]}, {"ids": None},
    {"tail_mass": [2.0]},
    {"tail_mass": [[0.1]]}, {"tail_mass": []}, {"floor": ["0.1"]}, {"floor": [-0.1]}, {"floor": [math.nan]},
    {"logprobs": [[-1.0, -2.0, -3.0]]}, {"logprobs": [{"a": 1}]}])
def test_json_that_is_no_answer_is_one_clear_error(changed):
    right = {"from_pos": 1, "ids": [[1, 2]], "logprobs": [[-1.0, -2.0]], "tail_mass": [0.1], "floor": [0.1]}
    wire.from_json(right, places=1, v=40)
    with pytest.raises(RunError, match="cannot be read"):
        wire.from_json({**right, **changed}, places=1, v=40)


def test_vocabularies_that_differ_in_one_token_differ(tiny):
    one, two = load(tiny("one")).tokenizer, load(tiny("two", words={**{f"w{k}": k for k in range(3, 39)}, "<unk>": 0,
                                                                     "<s>": 1, "</s>": 2, "other": 39})).tokenizer
    assert vocabulary(one).size == vocabulary(two).size == 40
    assert vocabulary(one).digest != vocabulary(two).digest


@pytest.mark.parametrize("kind", MADE)
def test_every_kind_that_runs_loses_a_draft_without_a_trace(kind, tiny, tmp_path):
    member, _ = MADE[kind](tiny, tmp_path)
    running = load(member)
    prompt = [1, 5, 9]
    route = running.route([prompt])[0] if running.route else None
    with Local(running).open() as text:
        for ids, start in ((prompt, 3), (prompt + [7, 3, 8, 30], 3), (prompt + [7, 4], 5), (prompt + [7, 4, 9, 9], 5)):
            told = text.score(ids, start).logs
            with nullcontext() if route is None else running.pinned(route), torch.no_grad():
                wanted = running.model(torch.tensor([ids])).logits[0, start - 1:, :40].log_softmax(-1)
            assert_close(told, wanted, rtol=0, atol=2e-5)
