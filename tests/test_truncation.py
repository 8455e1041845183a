"""A mixture of which only some tokens are told, or told roundly, is never further from the whole one than certified."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from glue.errors import GlueError
from glue.kinds.local_source import narrowed
from glue.kinds.source import Scored
from glue.kinds.wire import decode, encode
from glue.proxy.asking import Truncation, row, together, untold, wanted, without
from glue.proxy.mixing import GREEDY, Sampling
from glue.proxy.quantised import between, drift
from glue.proxy.speculative import generate
from glue.proxy.truncation import certify, knapsack
from tests.tables import Table, mixture, table, trio

V = 60
CASES = [(temperature, alpha, k, bits) for temperature in (0.5, 1.0, 1.5) for alpha in (0.3, 1.0, 2.0)
         for k in (5, 10, 20) for bits in (64, 32, 16, 8)]  # 108, of 96 rows each: 10 368


def rows(seed: int, count: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of a large model [count, V], peaked ones and flat ones, and what tuning changed."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.3, 5, count, dtype=torch.float64)[:, None]
    large = torch.log_softmax(spread * torch.randn(count, V, generator=random, dtype=torch.float64), -1)
    return large, 1.5 * torch.randn(count, V, generator=random, dtype=torch.float64)


def tell(large: torch.Tensor, k: int | None, extra: list[list[int]], bits: int) -> Scored:
    """What a server tells of it: by the codec, where it rounds."""
    scored = narrowed(large, k, extra)
    return scored if bits == 64 else decode(encode(scored, V, bits), places=len(large), v=V)


def apart(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).abs().sum(-1) / 2


def test_the_bound_is_never_below_the_distance():
    slack, cases = [], 0
    for case, (temperature, alpha, k, bits) in enumerate(CASES):
        large, change = rows(case)
        log_w, sampling = alpha * change, Sampling(temperature)
        told = tell(large, k, wanted(log_w, 5), bits)
        known = certify(told, log_w, sampling, bits)
        distance = apart(known.probabilities, sampling(large + log_w))
        assert (distance <= known.bound + 1e-12).all(), CASES[case]
        assert (known.lacking <= known.bound + 1e-12).all()
        slack.append((known.bound - distance)[known.bound < 1])
        cases += len(large)
    assert cases >= 10_000
    assert torch.cat(slack).median() < 0.08  # a bound that says 1 is never wrong either


def test_a_certified_likeliest_token_is_the_likeliest():
    issued = 0
    for case, (_, alpha, k, bits) in enumerate(CASES):
        large, change = rows(case)
        log_w = alpha * change
        known = certify(tell(large, k, wanted(log_w, 5), bits), log_w, GREEDY, bits)
        sure = known.bound == 0
        assert (known.probabilities.argmax(-1) == (large + log_w).argmax(-1))[sure].all(), CASES[case]
        assert ((known.bound == 0) | (known.bound == 1)).all() and (known.lacking <= known.bound).all()
        issued += int(sure.sum())
    assert issued > 6_000


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_p=0.8), Sampling(1.5, top_p=0.6), Sampling(0.7, top_k=4),
                                      Sampling(1.0, top_p=0.9, top_k=6)], ids=str)
def test_a_certified_cut_keeps_the_very_tokens_that_the_whole_mixtures_cut_keeps(sampling):
    certified = 0
    for case, (_, alpha, k, bits) in enumerate(CASES):
        large, change = rows(case, 24)
        log_w = alpha * change
        known = certify(tell(large, k, wanted(log_w, 5), bits), log_w, sampling, bits)
        sure, whole = known.bound < 1, sampling(large + log_w)
        assert ((known.probabilities > 0) == (whole > 0))[sure].all(), CASES[case]
        assert (apart(known.probabilities, whole) <= known.bound + 1e-12).all()
        if bits == 64:
            assert (known.bound[sure] == 0).all()
        certified += int(sure.sum())
    assert certified > 500


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(0.5), Sampling(1.5, top_p=0.9)], ids=str)
def test_nothing_is_uncertain_where_everything_is_told(sampling):
    large, log_w = rows(3)
    listed = Scored(large.flip(-1), torch.arange(V - 1, -1, -1).expand(len(large), V), torch.zeros(96), large.amin(-1))
    for told in (narrowed(large, None), narrowed(large, V), listed):
        known = certify(told, log_w, sampling)
        assert (known.lacking == 0).all() and (known.bound <= 1e-12).all()
        assert torch.allclose(known.probabilities, sampling(large + log_w), atol=1e-15)


def test_where_everything_is_told_roundly_only_rounding_is_certified():
    large, log_w = rows(4)
    widest = {}
    for bits in (32, 16, 8):
        known = certify(tell(large, None, [], bits), log_w, Sampling(1.0), bits)
        distance = apart(known.probabilities, Sampling(1.0)(large + log_w))
        assert (distance <= known.bound).all() and (known.lacking == 0).all()
        widest[bits] = float(known.bound.max())
    assert widest[32] < 1e-6 and widest[16] < 4e-3 and widest[8] < 0.03


def test_bounds_of_rounding_hold_for_the_codec_and_are_not_much_too_wide():
    large, _ = rows(7)
    large = torch.log_softmax(large.float(), -1).double()  # what a source has before the codec rounds it
    for bits, wide in ((32, 4e-6), (16, 3e-2), (8, 0.08)):
        told = tell(large.float(), None, [], bits).logs
        least, most = between(told, bits)
        assert ((least <= large) & (large <= most)).all(), bits
        assert (most - least)[least > -torch.inf].max() < wide
        assert bool((least == -torch.inf).any()) == (bits == 8)  # rows that span more than 20 nats


def test_two_tokens_reach_the_bound_of_rounding():
    for error in (0.01, 0.5, 2.0):
        told = torch.tensor([[error / 2, -error / 2]], dtype=torch.float64)
        distance = apart(torch.softmax(told, -1), torch.softmax(told + torch.tensor([-error, error]), -1)).item()
        assert drift(told, told - error, told + error).item() == pytest.approx(distance, rel=1e-6)
        assert distance == pytest.approx(np.tanh(error / 2), rel=1e-6)


def test_rounding_never_moves_a_mixture_further_than_its_bound():
    """Against every corner of the box of what the weights can have been, of which one is the worst."""
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(300):
        told = torch.from_numpy(random.normal(0, 2, (1, 6)))
        below, above = (torch.from_numpy(random.exponential(random.choice([0.01, 0.3]), (1, 6))) for _ in range(2))
        below[random.random((1, 6)) < 0.1] = np.inf  # only known to be no likelier
        least, most = told - below, told + above
        corners = torch.tensor(list(product((False, True), repeat=6)))
        worst = apart(torch.softmax(torch.where(corners, most, least), -1), torch.softmax(told, -1))
        worst = float(worst[~worst.isnan()].max())
        bound = drift(told, least, most).item()
        assert worst <= bound + 1e-12
        ratios.append(bound / worst)
    assert np.median(ratios) < 2.2


@pytest.mark.parametrize("a", [0.4, 2 / 3, 0.95, 1.0, 1.3, 2.0])
def test_the_knapsack_is_the_maximum(a):
    """Against every vertex of what is allowed where f is convex, and a general optimiser where it is concave."""
    random = np.random.default_rng(1)
    for _ in range(25):
        n, cap = 5, random.uniform(0.02, 0.2)
        mass = random.uniform(0.05, 1) * n * cap
        log_w = np.sort(random.normal(0, 1.5, n))[::-1].copy()
        found = knapsack(torch.from_numpy(log_w)[None], torch.tensor([[mass]], dtype=torch.float64),
                         torch.tensor([[cap]], dtype=torch.float64), a).exp().item()

        def value(p, log_w=log_w):
            return float((np.exp(a * log_w) * np.maximum(p, 0) ** a).sum())

        if a >= 1:  # some tokens have the cap, one has what is left
            best = max(value(np.clip(mass - cap * np.array(order), 0, cap)) for order in permutations(range(n)))
        else:
            done = minimize(lambda p: -value(p), np.full(n, mass / n), bounds=[(1e-12, cap)] * n, method="SLSQP",
                            constraints={"type": "eq", "fun": lambda p, mass=mass: p.sum() - mass},
                            options={"ftol": 1e-14, "maxiter": 1000})
            assert abs(done.x.sum() - mass) < 1e-9
            best = value(np.clip(done.x, 0, cap))
        assert found == pytest.approx(best, rel=1e-5), (a, mass, cap)


def test_the_knapsack_of_many_tokens_and_odd_rows():
    log_w = torch.tensor([[3.0, 1.0, -torch.inf], [0.0, 0.0, 0.0], [-torch.inf] * 3], dtype=torch.float64)
    mass, cap = (torch.tensor(value, dtype=torch.float64)[:, None] for value in ([0.2, 0.3, 0.1], [0.1, 0.1, 0.1]))
    assert knapsack(log_w, mass, cap, 1.0).exp().tolist() == pytest.approx(
        [0.1 * np.exp(3) + 0.1 * np.exp(1), 0.3, 0.0])
    assert knapsack(log_w, mass, cap, 0.5).exp().tolist() == pytest.approx(
        [0.1**0.5 * (np.exp(1.5) + np.exp(0.5)), 3 * 0.1**0.5, 0.0], rel=1e-5)
    assert knapsack(log_w, 0 * mass, cap, 0.5).tolist() == [-np.inf] * 3
    large = torch.linspace(900, -900, 4000, dtype=torch.float64)[None]  # nothing overflows
    for a in (0.3, 0.99, 3.0):
        assert knapsack(large, mass[:1], mass[:1] / 100, a).isfinite().all()


def test_the_bound_is_reached_by_the_worst_large_model_that_tells_the_same():
    """The certificate is not merely sound: a tail that lies as badly as it may is as far away as it says."""
    told = Scored(torch.tensor([[0.5, 0.2]]).log().double(), torch.tensor([[0, 1]]), torch.tensor([0.3]).double(),
                  torch.tensor([0.2]).double())
    log_w = torch.tensor([[0.0, 0.0, -1.0, 2.0, 0.5]], dtype=torch.float64)
    worst = torch.tensor([[0.5, 0.2, 0.0, 0.2, 0.1]], dtype=torch.float64).log()
    for temperature in (0.5, 1.0):
        sampling = Sampling(temperature)
        known = certify(told, log_w, sampling)
        assert known.bound.item() == pytest.approx(apart(known.probabilities, sampling(worst + log_w)).item(), rel=1e-4)


def test_asking_for_more_only_adds_what_was_told():
    large, log_w = rows(5)
    for bits in (64, 32, 16, 8):
        first = tell(large, 5, wanted(log_w, 6), bits)
        more = untold(first, log_w, 7)
        second = together(first, tell(large, 8, more, bits), bits)
        for place in range(0, 96, 7):
            seen = [token for token in second.tokens[place].tolist() if token >= 0]
            assert len(seen) == len(set(seen))
            assert set(seen) == set(first.tokens[place].tolist()) - {-1} | set(more[place]) \
                | set(large[place].topk(8).indices.tolist())
            hidden = 1 - large[place, seen].exp().sum()
            assert hidden - 1e-12 <= second.tail[place] <= hidden + (1e-3 if bits > 8 else 0.06)
        known = certify(second, log_w, Sampling(1.0), bits)
        assert (apart(known.probabilities, Sampling(1.0)(large + log_w)) <= known.bound + 1e-12).all()
        assert (known.lacking <= certify(first, log_w, Sampling(1.0), bits).lacking + 2e-2).all()
    assert together(first, narrowed(large, None), 64).tokens is None


def test_drafted_tokens_count_only_where_they_are_asked_for_or_among_the_likeliest():
    large = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]] * 3, dtype=torch.float64).log()
    told = narrowed(large, 2, [[3], [3], [3]])
    left = without(told, [3, 3, 1], [[], [3], []], 2)
    assert left.tokens.tolist() == [[0, 1, -1], [0, 1, 3], [0, 1, 3]]
    assert left.tail.tolist() == pytest.approx([0.3, 0.24, 0.24])
    assert without(row(told, 0), [3], [], 3).tokens.tolist() == [[0, 1, 3]]  # among the likeliest three, of those told


def test_what_is_asked_for_is_what_tuning_raised_most_and_then_of_what_is_not_told():
    log_w = torch.tensor([[1.0, 5, 3, 4, 2]])
    assert wanted(log_w, 2) == [[1, 3]] and wanted(log_w, 0) == [[]] and sorted(wanted(log_w, 99)[0]) == [0, 1, 2, 3, 4]
    told = narrowed(torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]]).log(), 1, [[3]])
    assert untold(told, log_w, 2) == [[1, 4]] and untold(told, log_w, 9) == [[1, 4, 0]]


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("bits", [64, 16])
def test_greedy_text_of_told_tokens_is_that_of_all_tokens(gamma, bits):
    widened = 0
    for seed in range(8):
        sources = trio(v=V, seed=seed, alike=0.6)
        following, text = mixture(sources, 1.0).argmax(-1).tolist(), [0]
        while len(text) <= 25:
            text.append(following[text[-1]])
        large = sources["large"]

        class Wired:
            def score(self, ids, start, *, top_k=None, extra=(), large=large):
                told = large.score(ids, start, top_k=top_k, extra=extra)
                return told if bits == 64 else decode(encode(told, V, bits), places=len(ids) - start + 1, v=V)

        found = generate([0], **sources | {"large": Wired()}, gamma=gamma, new=25, bits=bits,
                         truncation=Truncation(4, 4))
        assert found.tokens == text[1:] and found.ledger.uncertain == 0 and found.ledger.bound == 0
        widened += found.ledger.widened
    assert widened  # some certificates failed at first


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_more_is_asked_for_until_the_budget_holds(temperature):
    sources = trio(v=500, seed=1, alike=0.95, spread=4)
    found = {}
    for budget in (0.2, 1e-2, 0.0):
        ledger = generate([0], **sources, alpha=0.5, gamma=3, new=60, sampling=Sampling(temperature),
                          truncation=Truncation(4, 8, budget), rng=np.random.default_rng(0)).ledger
        assert ledger.uncertain == 0 and ledger.bound <= 60 * budget + 1e-9 and ledger.truncated <= ledger.bound
        found[budget] = ledger
    assert found[0.2].widened > 0
    if temperature <= 1:  # above, so many tokens of the tail may share that nearly always everything is asked for
        assert found[0.2].down < found[1e-2].down < found[0.0].down


def test_a_source_that_tells_no_more_than_so_many_is_not_asked_without_end():
    sources = trio(v=V, seed=1)
    truncation = Truncation(4, 0, budget=1e-9).within(Some(sources["large"], "given", 10))
    assert (truncation.top_k, truncation.most, truncation.extra) == (4, 10, 0)
    ledger = generate([0], **sources, gamma=2, new=12, truncation=truncation, sampling=Sampling(1.0),
                      rng=np.random.default_rng(0)).ledger
    assert max(top_k for _, _, top_k, _ in sources["large"].calls) == 10
    assert ledger.uncertain == 12 and ledger.asked_for == 0 and 0 < ledger.bound <= 12
    sources = trio(v=V, seed=1)
    generous = Truncation(4, 2, budget=1e-9).within(Some(sources["large"], "top_k", 10))
    ledger = generate([0], **sources, gamma=2, new=12, truncation=generous, sampling=Sampling(1.0),
                      rng=np.random.default_rng(0)).ledger
    assert ledger.uncertain == 0 and ledger.bound < 1e-7  # by number, it tells them all
    assert Truncation().within(sources["large"]) == Truncation()


class Some:
    """What a source says of itself."""

    def __init__(self, inner: Table, tells: str, most: int):
        self.vocabulary, self.longest, self.tells, self.most = inner.vocabulary, inner.longest, tells, most


def test_places_that_a_rejection_makes_needless_are_not_asked_about_again():
    """The first draft never stays, so that only the first place is ever needed."""
    large, small = table(V, 0, 0.2), table(V, 1, 0.2)
    never = Table(torch.full((V, V), -30.0).index_fill_(1, torch.tensor([7]), 30.0))
    large = Table(large.logs.index_fill(1, torch.tensor([7]), -60.0))
    pair = {"tuned": never, "small": Table(never.logs + 0.1 * small.logs)}
    generate([0], large=large, **pair, gamma=3, new=6, sampling=Sampling(1.0), truncation=Truncation(4, 4, 0.05),
             rng=np.random.default_rng(0))
    firsts = {start for _, start, _, _ in large.calls}
    assert firsts == {1, 2, 3, 4, 5, 6}


def test_words_of_a_truncation_that_make_none_are_refused():
    for words in ({"top_k": 0}, {"extra": -1}, {"budget": 2.0}, {"most": -1}):
        with pytest.raises(GlueError, match="are no truncation"):
            Truncation(**words)
    with pytest.raises(GlueError, match="nothing can be drawn"):
        Sampling(top_p=0.0)
