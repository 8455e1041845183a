"""Protocol B, in which the server judges, writes what protocol A writes, and tells the server more."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from glue.errors import RunError
from glue.proxy import speculative
from glue.proxy.ledger import CHANGES
from glue.proxy.mixing import GREEDY, Sampling
from glue.proxy.packed import Proposal, pack, pack_verdict, proposal_size, unpack, unpack_verdict, verdict_size
from glue.proxy.protocol import Verifier, generate
from glue.proxy.speculative import streams
from glue.proxy.writing import Verdict
from tests.tables import Table, sequences, trio

V = 30
WAYS = [GREEDY, Sampling(1.0), Sampling(0.7, top_p=0.9), Sampling(1.4, top_k=5)]


class Recorded:
    """A server behind bytes: what goes up and down is packed, kept and unpacked again."""

    def __init__(self, large: Table, rng: np.random.Generator):
        self.verifier = Verifier(large, rng)
        self.up: list[bytes] = []
        self.down: list[bytes] = []

    def __call__(self, proposal: Proposal) -> Verdict:
        self.up.append(pack(proposal))
        self.down.append(pack_verdict(self.verifier.verify(unpack(self.up[-1], proposal.log_w.shape[-1]))))
        return unpack_verdict(self.down[-1], len(proposal.ids), proposal.log_w.shape[-1])


def by_server(sources: dict[str, Table], seed: int, sampling: Sampling, **words):
    """What protocol B writes, with the server's stream that belongs to this seed, and the server."""
    server = Recorded(sources["large"], streams(np.random.default_rng(seed), sampling)[1])
    pair = {name: sources[name] for name in ("tuned", "small")}
    return generate([4, 0], verify=server, **pair, sampling=sampling, rng=np.random.default_rng(seed), **words), server


@pytest.mark.parametrize("sampling", WAYS, ids=str)
@pytest.mark.parametrize("gamma", [0, 3, "auto"])
def test_both_protocols_write_the_same_from_the_same_seed(sampling, gamma):
    for seed in range(12):
        sources = trio(v=V, seed=seed, alike=0.6)
        words = {"alpha": 0.8, "gamma": gamma, "new": 25, "ends": [7]}
        at_home = speculative.generate([4, 0], **sources, sampling=sampling, rng=np.random.default_rng(seed), **words)
        for bits in (64, 32):
            away, _ = by_server(sources, seed, sampling, bits=bits, **words)
            assert (away.tokens, away.why) == (at_home.tokens, at_home.why)
            for name in ("calls", "places", "drafted", "judged", "accepted", "written", "lengths"):
                assert getattr(away.ledger, name) == getattr(at_home.ledger, name), name


def test_what_is_drawn_from_rounded_drafts_has_the_mixtures_distribution_within_its_bound():
    """fp16 for all that goes up: chi-square sees no difference, since q is rounded before anything is drawn from it."""
    from tests.tables import mixture
    from tests.test_speculative import far_off

    sources, sampling = trio(v=5, seed=4), Sampling(1.0)
    rng, judging = np.random.default_rng(0), np.random.default_rng(1)
    counts, bounds = Counter(), []
    for _ in range(2500):
        found = generate([0], verify=Verifier(sources["large"], judging).verify, tuned=sources["tuned"],
                         small=sources["small"], alpha=0.7, gamma=2, new=2, sampling=sampling, rng=rng, bits=16)
        counts[tuple(found.tokens)] += 1
        bounds.append(found.ledger.bound)
    assert far_off(counts, sequences(sampling(mixture(sources, 0.7)), 0, 2), 2500) > 0.01
    assert 0 < max(bounds) < 4e-3


@pytest.mark.parametrize("sampling", WAYS, ids=str)
@pytest.mark.parametrize("bits", [32, 16])
def test_the_ledger_counts_the_bytes_of_both_ways(sampling, bits):
    found, server = by_server(trio(v=V, seed=2, alike=0.6), 5, sampling, bits=bits, gamma=3, new=20)
    ledger = found.ledger
    assert ledger.up == sum(map(len, server.up)) and ledger.down == sum(map(len, server.down))
    assert ledger.calls == len(server.up) and ledger.revealed == CHANGES
    assert len(server.up[0]) == proposal_size(2, 3, V, bits, greedy=sampling.greedy)
    assert ledger.up > 10 * ledger.down  # what A takes down, and more, goes up


def test_a_rounded_change_is_certified_by_the_server():
    """A likeliest token that fp16 could have turned is not called certain."""
    large = Table(torch.zeros(2, 2))
    near = torch.tensor([[2.0, 2.0 + 2**-12]] * 2, dtype=torch.float64)
    for change, certain in ((near, False), (near + torch.tensor([0.0, 0.1]), True)):
        proposal = Proposal(0, [0], [], change[:1].half(), None, GREEDY)
        verdict = Verifier(large, np.random.default_rng(0)).verify(proposal)
        assert (verdict.bound == [0.0]) == certain and verdict.lacking == [0.0]


def test_a_server_reads_a_text_once_and_says_when_it_has_lost_it():
    sources = trio(v=V, seed=2, alike=0.6)
    found, server = by_server(sources, 5, GREEDY, gamma=3, new=20)
    assert sum(unpack(data, V).keep > 0 for data in server.up) == len(server.up) - 1
    assert sum(len(unpack(data, V).new) for data in server.up) <= 2 + found.ledger.calls  # the prompt, and corrections
    with pytest.raises(RunError, match="builds on 9 tokens, and 0 were read"):
        Verifier(sources["large"], np.random.default_rng(0)).verify(
            Proposal(9, [1], [], torch.zeros(1, V), None, GREEDY))
    with pytest.raises(RunError, match="use one vocabulary"):
        Verifier(sources["large"], np.random.default_rng(0)).verify(
            Proposal(0, [1], [], torch.zeros(1, V + 1), None, GREEDY))


@pytest.mark.parametrize("sampling", WAYS, ids=str)
@pytest.mark.parametrize("bits", [64, 32, 16])
def test_a_proposal_comes_back_from_its_bytes(sampling, bits):
    kind = {64: torch.float64, 32: torch.float32, 16: torch.float16}[bits]
    log_w = torch.randn(3, V).to(kind)
    log_w[0, 3] = -torch.inf
    q = None if sampling.greedy else torch.softmax(torch.randn(2, V), -1).to(kind)
    sent = Proposal(5, [1, 2, 3], [4, 29], log_w, q, sampling)
    back = unpack(pack(sent), V)
    assert (back.keep, back.new, back.ids, back.sampling) == (5, [1, 2, 3], [4, 29], sampling)
    assert back.log_w.dtype == kind and torch.equal(back.log_w, log_w)
    assert q is None or (back.q is not None and torch.equal(back.q, q))


def test_bytes_that_are_no_proposal_are_refused():
    whole = Proposal(0, [1], [2], torch.zeros(2, V), torch.full((1, V), 1 / V), Sampling(1.0))
    good = pack(whole)
    assert unpack(good, V).ids == [2]
    wrong = [good[:10], b"XXXX" + good[4:], good[:-1], good + b"0",
             pack(replace(whole, ids=[V])), pack(replace(whole, log_w=torch.full((2, V), torch.nan))),
             pack(replace(whole, log_w=torch.full((2, V), -torch.inf))), pack(replace(whole, q=torch.zeros(1, V))),
             pack(replace(whole, q=torch.full((1, V), -1.0)))]
    for data in wrong:
        with pytest.raises(RunError, match="cannot be read"):
            unpack(data, V)
    with pytest.raises(RunError, match="cannot be read"):
        unpack(good, V + 1)
    verdict = Verdict(1, 3, [0.0, 0.5], [0.0, 0.25])
    back = unpack_verdict(pack_verdict(verdict), 2, V)
    assert back == verdict and len(pack_verdict(verdict)) == verdict_size(1)
    for g, v in ((0, V), (2, 3)):
        with pytest.raises(RunError, match="tokens stay"):
            unpack_verdict(pack_verdict(verdict), g, v)
