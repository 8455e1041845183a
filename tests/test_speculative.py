"""Speculative proxy-tuning writes what proxy-tuning without drafts writes, in fewer calls."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from glue.errors import GlueError
from glue.kinds import load
from glue.kinds.local_source import Local
from glue.proxy import speculative
from glue.proxy.asking import Truncation, wanted
from glue.proxy.ledger import ID, TOKENS, TOKENS_AND_ASKED, Ledger, plain_bytes
from glue.proxy.lengths import Costs, Lengths, expected
from glue.proxy.mixing import GREEDY, Sampling, drawn, offsets
from glue.proxy.speculative import generate, judge, opened
from tests.tables import Table, mixture, sequences, table, trio

PLAIN = Sampling(1.0)


def likeliest(sources: dict[str, Table], alpha: float, first: int, new: int) -> list[int]:
    """Greedy proxy-tuning, token by token, from the tables themselves."""
    following, text = mixture(sources, alpha).argmax(-1).tolist(), [first]
    while len(text) <= new:
        text.append(following[text[-1]])
    return text[1:]


@pytest.mark.parametrize("gamma", [0, 1, 2, 3, 4, 5, 6, 7, 8, "auto"])
def test_greedy_text_is_that_of_plain_proxy_tuning_for_every_length_of_draft(gamma):
    for seed in range(6):
        sources = trio(v=40, seed=seed, alike=0.5)
        for first in range(5):
            found = generate([3, first], **sources, alpha=0.7, gamma=gamma, new=30)
            assert found.tokens == likeliest(sources, 0.7, first, 30), (seed, first)
            assert found.why == "length" and found.ledger.written == 30


@pytest.fixture
def llamas(tiny) -> dict[str, Local]:
    """Three tiny models in fp64 with caches, two of them near the third, so that some drafts stay and some do not."""
    running = [load(tiny(f"model{seed}", seed=seed, spread=0.35)) for seed in range(3)]
    for one in running:
        one.model.double()
    with torch.no_grad():
        for near in running[1:]:
            for mine, theirs in zip(near.model.parameters(), running[0].model.parameters(), strict=True):
                mine.mul_(0.1).add_(theirs, alpha=0.9)
    return dict(zip(("small", "tuned", "large"), map(Local, running), strict=True))


def test_greedy_text_of_models_is_the_same_for_every_length_of_draft(llamas):
    """Against logits of a forward for each token; caches are cropped at each rejection."""
    stayed = Counter()
    for prompt in ([1, 5, 9], [30, 2], [7]):
        ids = list(prompt)
        while len(ids) < len(prompt) + 16:
            with torch.inference_mode():
                large, tuned, small = (llamas[name].running.model(torch.tensor([ids])).logits[0, -1]
                                       for name in ("large", "tuned", "small"))
            ids.append(int((large + 0.8 * (tuned - small)).argmax()))
        for gamma in range(1, 9):
            with opened(**llamas) as sessions:
                found = generate(prompt, **sessions, alpha=0.8, gamma=gamma, new=16)
            assert found.tokens == ids[len(prompt):], (prompt, gamma)
            stayed.update(judged=found.ledger.judged, accepted=found.ledger.accepted)
    assert stayed["judged"] / 3 < stayed["accepted"] < stayed["judged"], "drafts of both fates are to be seen"


def far_off(counts: Counter, chances: dict[tuple[int, ...], float], drawn: int) -> float:
    """The p value of Pearson's test; what is expected less than five times is counted together."""
    rare = [text for text, chance in chances.items() if chance * drawn < 5]
    common = [text for text in chances if text not in set(rare)]
    pairs = [(counts[text], chances[text] * drawn) for text in common]
    pairs.append((sum(counts[text] for text in rare), sum(chances[text] for text in rare) * drawn))
    pairs = [(seen, wanted) for seen, wanted in pairs if wanted > 1e-9]
    assert sum(seen for seen, _ in pairs) == drawn
    return float(chi2.sf(sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs), len(pairs) - 1))


def p_value(sources: dict[str, Table], sampling: Sampling, *, n: int, seed: int = 0, **words) -> float:
    rng = np.random.default_rng(seed)
    counts = Counter(tuple(generate([0], **sources, alpha=0.7, gamma=3, new=3, sampling=sampling, rng=rng,
                                    **words).tokens) for _ in range(n))
    return far_off(counts, sequences(sampling(mixture(sources, 0.7)), 0, 3), n)


def test_drawn_texts_have_the_mixtures_distribution():
    assert p_value(trio(v=5, seed=4), PLAIN, n=12_000) > 0.01


def test_a_wrong_residual_fails_the_same_test(monkeypatch):
    def wrong(ids, q, target, rng):
        for place, token in enumerate(ids):
            pi = target(place)
            if rng.random() * float(q[place][token]) >= float(pi[token]):
                return place, drawn(pi, rng.random())  # of pi itself, in place of (pi - q)+
        return len(ids), drawn(target(len(ids)), rng.random())

    monkeypatch.setattr(speculative, "judge", wrong)
    assert p_value(trio(v=5, seed=4), PLAIN, n=6_000) < 1e-6


@pytest.mark.parametrize("sampling", [Sampling(0.6), Sampling(1.4, top_p=0.8), Sampling(0.9, top_k=3),
                                      Sampling(1.2, top_p=0.9, top_k=4)], ids=str)
def test_drawn_texts_have_the_mixtures_distribution_at_other_temperatures_and_cut(sampling):
    assert p_value(trio(v=5, seed=5), sampling, n=2_000, seed=1) > 0.01


class Gossip(Table):
    """Tells, as some servers do, also the token that follows each place."""

    def score(self, ids, start, *, top_k=None, extra=()):
        following = [*ids[start:], None]
        more = [[*some, *([] if token is None else [token])] for some, token in
                zip(extra or [[]] * len(following), following, strict=True)]
        return super().score(ids, start, top_k=top_k, extra=more)


@pytest.mark.parametrize("extra", [0, 2])
def test_what_is_told_only_since_it_was_drafted_does_not_shape_the_mixture(extra):
    """Texts have the distribution of the mixture of top tokens and those asked for, whatever was drafted."""
    sources = trio(v=6, seed=6)
    sources["large"] = Gossip(sources["large"].logs)
    log_w = sources["tuned"].logs - sources["small"].logs
    told = sources["large"].logs.exp().topk(2).indices
    kept = torch.zeros(6, 6, dtype=torch.bool).scatter(-1, told, True)
    for row, some in enumerate(wanted(0.7 * log_w, extra)):
        kept[row, some] = True
    assert float((~kept).sum() / kept.numel()) > 0.1
    rows = torch.softmax(mixture(sources, 0.7).masked_fill(~kept, -torch.inf), -1)
    rng = np.random.default_rng(3)
    counts = Counter(tuple(generate([0], **sources, alpha=0.7, gamma=2, new=2, sampling=PLAIN, rng=rng,
                                    truncation=Truncation(2, extra, budget=1.0)).tokens) for _ in range(1200))
    assert far_off(counts, sequences(rows, 0, 2), 1200) > 0.01


def test_with_no_budget_everything_is_asked_for_and_the_distribution_is_the_whole_mixtures():
    assert p_value(trio(v=5, seed=6), PLAIN, n=300, truncation=Truncation(2, 1, budget=0.0, most=3)) > 0.01


def test_acceptance_is_one_minus_the_distance_of_draft_and_mixture():
    rng = np.random.default_rng(0)
    for seed in range(5):
        q, pi = (PLAIN(table(30, 2 * seed + k).logs[:1])[0] for k in range(2))
        stays = [judge([drawn(q, rng.random())], q[None], lambda place, pi=pi: pi, rng)[0] for _ in range(4000)]
        chance = 1 - float((q - pi).abs().sum()) / 2
        assert abs(np.mean(stays) - chance) < 3 * (chance * (1 - chance) / 4000) ** 0.5


def test_a_draft_by_the_large_model_itself_always_stays():
    sources = trio(v=20) | {"tuned": trio(v=20)["large"]}
    for sampling in (GREEDY, PLAIN):
        found = generate([0], **sources, alpha=0.0, gamma=4, new=25, sampling=sampling, rng=np.random.default_rng(1))
        assert found.ledger.acceptance == 1 and found.ledger.calls == 5 and found.ledger.tokens_per_call == 5


def test_a_pair_that_learnt_nothing_leaves_the_large_models_distribution():
    sources = trio(v=5, seed=8)
    sources["tuned"] = Table(sources["small"].logs)
    rng = np.random.default_rng(2)
    counts = Counter(tuple(generate([0], **sources, gamma=3, new=2, sampling=PLAIN, rng=rng).tokens)
                     for _ in range(3000))
    assert far_off(counts, sequences(sources["large"].logs.exp(), 0, 2), 3000) > 0.01


def test_equal_distributions_leave_nothing_to_draw_from_and_are_always_accepted():
    same = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    rng = np.random.default_rng(0)
    assert {judge([1], same[None], lambda place: same, rng)[0] for _ in range(100)} == {1}

    class Unlucky:  # rounding may reject where nothing is left of pi - q
        def random(self):
            return 1 - 2**-53

    nearly = same * (1 - 2**-50)
    assert judge([1], same[None], lambda place: nearly, Unlucky()) == (0, 1)


def test_an_ending_token_in_a_draft_ends_the_text_where_plain_decoding_ends_it():
    sources = trio(v=12, seed=3, alike=0.9)
    whole = likeliest(sources, 0.5, 0, 40)
    for end in set(whole):
        for gamma in range(9):
            found = generate([0], **sources, alpha=0.5, gamma=gamma, new=40, ends=[end])
            assert found.tokens == whole[:whole.index(end) + 1] and found.why == "end"


def test_nothing_is_drafted_after_an_ending_token():
    sources = trio(v=6) | {"tuned": Table(10 * torch.eye(6).roll(1, 1))}  # 0 1 2 3 4 5
    generate([0], **sources, gamma=8, new=20, ends=[3])
    assert max(max(len(ids) for ids, *_ in source.calls) for source in sources.values()) <= 20
    assert sources["large"].calls[0][0] == [0, 1, 2, 3]


def test_a_text_stops_where_the_caller_says_so():
    sources = trio(v=12, seed=3, alike=0.9)
    whole = likeliest(sources, 0.5, 0, 40)
    found = generate([0], **sources, alpha=0.5, gamma=5, new=40, stop=lambda written: written[-2:] == whole[6:8])
    first = next(k for k in range(40) if whole[k:k + 2] == whole[6:8])
    assert found.tokens == whole[:first + 2] and found.why == "stop" and found.ledger.written == first + 2


@pytest.mark.parametrize("gamma", [0, 3, 8, "auto"])
def test_drafts_never_lead_beyond_what_may_be_written_or_seen(gamma):
    sources = trio(v=12, seed=3, alike=0.9)
    whole = likeliest(sources, 0.5, 0, 40)
    for new in (1, 2, 5):
        assert generate([0], **sources, alpha=0.5, gamma=gamma, new=new).tokens == whole[:new]
    found = generate([0], **sources, alpha=0.5, gamma=gamma, new=40, longest=6)
    assert found.tokens == whole[:6] and found.why == "length"  # the last of them is never read
    assert max(len(ids) for source in sources.values() for ids, *_ in source.calls) <= 6


def test_two_adapters_over_one_small_source_do_not_disturb_each_other():
    """One session of the large and of the small model, two tuned ones, token by token in turn."""
    shared, other = trio(v=30, seed=2, alike=0.6), table(30, 77)
    pairs = [shared, shared | {"tuned": Table(0.5 * other.logs + 0.5 * shared["large"].logs)}]
    texts = [[2], [2]]
    for turn in range(24):
        pair, text = pairs[turn % 2], texts[turn % 2]
        text += generate(text, **pair, alpha=0.6, gamma=3, new=2).tokens
    assert texts[0] != texts[1]
    for pair, text in zip(pairs, texts, strict=True):
        assert text[1:] == likeliest(pair, 0.6, 2, 24)


def test_lengths_follow_acceptance_and_what_things_cost():
    def length(accepted: int, costs: Costs) -> int:
        lengths = Lengths("auto", costs)
        for _ in range(40):
            lengths.saw(8, accepted)
        assert lengths._accepted / lengths._judged == pytest.approx(accepted / min(accepted + 1, 8), abs=0.02)
        return lengths.next()

    near, far = Costs(draft=4, place=0.5, call=4, trip=0), Costs(draft=1, place=0.5, call=4, trip=10)
    assert [length(accepted, near) for accepted in (0, 2, 8)] == [1, 1, 8]
    assert [length(accepted, far) for accepted in (0, 2, 8)] == [1, 4, 8]
    for chance in (0.2, 0.7):  # what it chooses is the best of all
        lengths = Lengths("auto", far)
        lengths._accepted, lengths._judged = 100 * chance, 100.0
        best = max(range(1, 9), key=lambda gamma: expected(chance, gamma) / far.of(gamma))
        assert lengths.next() == best


def test_automatic_lengths_are_the_same_for_the_same_history():
    sources = trio(v=40, seed=2, alike=0.5)
    runs = [generate([0], **sources, gamma="auto", new=60, sampling=PLAIN, rng=np.random.default_rng(9))
            for _ in range(2)]
    assert runs[0].tokens == runs[1].tokens and runs[0].ledger == runs[1].ledger
    assert len(runs[0].ledger.lengths) > 1


def test_tokens_per_call_are_what_the_formula_expects():
    """Where acceptance is the same at every place: tables whose rows are permutations of one row."""
    row, other = torch.randn(2, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    turned = [torch.stack([logits.roll(k) for k in range(8)]) for logits in (row, row + 0.7 * other, row + 0.2 * other)]
    sources = dict(zip(("large", "tuned", "small"), map(Table, turned), strict=True))
    for gamma in (1, 4):
        whole = sum((generate([0], **sources, alpha=0.4, gamma=gamma, new=50 * (gamma + 1), sampling=PLAIN,
                              rng=np.random.default_rng(seed)).ledger for seed in range(20)), Ledger())
        q, pi = sources["tuned"].logs[0].exp(), PLAIN(mixture(sources, 0.4))[0]
        chance = 1 - float((q - pi).abs().sum()) / 2
        assert whole.acceptance == pytest.approx(chance, abs=0.03)
        assert whole.tokens_per_call == pytest.approx(expected(chance, gamma), rel=0.05)
        assert whole.expected_per_call == pytest.approx(expected(chance, gamma), rel=0.07)


def test_expected_tokens_are_the_sum_of_the_chances_that_drafts_come_so_far():
    assert expected(0.0, 4) == 1 and expected(1.0, 4) == 5
    assert expected(0.6, 4) == pytest.approx(sum(0.6**k for k in range(5)))


def test_only_numbers_of_tokens_leave_the_device():
    """A transport that records: whatever is asked of the large model is lists of small integers."""
    for truncation, revealed in ((None, TOKENS), (Truncation(3, 0, most=12), TOKENS),
                                 (Truncation(3, 4, budget=1e-4), TOKENS_AND_ASKED)):
        sources = trio(v=12, seed=3, alike=0.9)
        found = generate([5, 0], **sources, alpha=0.5, gamma=3, new=20, truncation=truncation, sampling=PLAIN,
                         rng=np.random.default_rng(0))
        asked = 0
        for ids, start, top_k, extra in sources["large"].calls:
            assert {type(token) for some in (ids, *extra) for token in some} == {int}
            assert all(0 <= token < 12 for some in (ids, *extra) for token in some)
            assert type(start) is int and (top_k is None or type(top_k) is int)
            asked += sum(len(some) for some in extra)
            written = [5, 0, *found.tokens][:start]
            assert ids[:start] == written, "what is asked about goes on from the text, draft by draft"
        assert found.ledger.revealed == revealed and found.ledger.asked_for == asked
        assert len(sources["large"].calls) == found.ledger.calls


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("truncation", [None, Truncation(5, 4), Truncation(2, 2, budget=1e-6)], ids=str)
def test_the_ledger_counts_the_bytes_of_the_codec(bits, truncation):
    from glue.kinds.wire import decode, encode

    sources = trio(v=40, seed=1, alike=0.7)
    large, sent = sources["large"], []

    class Wired:
        def score(self, ids, start, *, top_k=None, extra=()):
            data = encode(large.score(ids, start, top_k=top_k, extra=extra), 40, bits)
            sent.append(data)
            return decode(data, places=len(ids) - start + 1, v=40)

    ledger = generate([1, 0], **sources | {"large": Wired()}, gamma=3, new=30, truncation=truncation, bits=bits,
                      sampling=PLAIN, rng=np.random.default_rng(0)).ledger
    assert ledger.down == sum(map(len, sent)) and ledger.calls == len(sent)
    read, up = [], 0
    for ids, _, _, extra in large.calls:
        new = next((len(ids) - k for k, pair in enumerate(zip(read, ids, strict=False)) if pair[0] != pair[1]),
                   len(ids) - min(len(ids), len(read)))
        up += ID * (new + 3 + sum(1 + len(some) for some in extra))
        read = ids
    assert ledger.up == up


def test_plain_proxy_tuning_takes_one_call_and_all_log_probabilities_for_each_token():
    sources = trio(v=40)
    ledger = generate([0], **sources, gamma=0, new=12, bits=16).ledger
    assert (ledger.calls, ledger.places, ledger.drafted, ledger.tokens_per_call) == (12, 12, 0, 1)
    assert ledger.down == plain_bytes(12, 40) == 12 * (20 + 2 * 40)
    assert ledger.up == ID * (12 + 3 * 12)


def test_the_ledger_of_two_texts_is_their_sum():
    sources = trio(v=40, seed=1, alike=0.7)
    one, two = (generate([first], **sources, gamma=3, new=10, truncation=Truncation(3, 4, budget=1e-3)).ledger
                for first in (0, 7))
    both = (one + two).as_dict()
    for name in ("calls", "places", "drafted", "judged", "accepted", "written", "up", "down", "asked_for", "widened"):
        assert both[name] == one.as_dict()[name] + two.as_dict()[name]
    assert both["revealed"] == TOKENS_AND_ASKED and both["written"] == 20
    assert sum(both["lengths"].values()) + both["widened"] == both["calls"]


def test_sources_of_different_vocabularies_are_refused():
    with pytest.raises(GlueError, match="another vocabulary than the large one: 8 and 7 tokens"), \
            opened(table(7, 0), table(8, 1), table(7, 2)):
        pass
    some = table(7, 1)
    some.tells = "top_k"
    with pytest.raises(GlueError, match="tells only some"), opened(table(7, 0), some, table(7, 2)):
        pass
    with opened(**trio()) as sessions:
        assert generate([0], **sessions, new=3).tokens == likeliest(trio(), 1.0, 0, 3)


def test_what_cannot_be_written_is_refused():
    with pytest.raises(GlueError, match="no generator was given"):
        generate([0], **trio(), sampling=PLAIN)
    for words in ({"prompt": []}, {"prompt": [1, 2, 3], "longest": 2}, {"prompt": [0], "new": 0}):
        with pytest.raises(GlueError, match="cannot be written"):
            generate(**words, **trio())
    with pytest.raises(GlueError, match="drafts of 99 tokens"):
        generate([0], **trio(), gamma=99)


def test_offsets_leave_alone_what_both_rule_out_and_refuse_what_only_the_untuned_one_does():
    nothing = -torch.inf
    tuned, small = torch.tensor([[0.0, nothing, nothing]]), torch.tensor([[-1.0, nothing, -2.0]])
    assert offsets(tuned, small, 0.5).tolist() == [[0.5, 0.0, nothing]]
    with pytest.raises(GlueError, match="gives probability 0"):
        offsets(small, tuned, 0.5)
    assert offsets(small, tuned, 0.0).tolist() == [[0.0, 0.0, 0.0]]
