"""Protocol B: the server judges. For those that will not tell log-probabilities; the default is the device's judging.

The device sends its draft, by how much tuning raised each token at each place and, where tokens are drawn, the whole
distribution that each was drawn from, since nobody knows beforehand which one a rejection needs. What it sends is
rounded before anything is drawn from it, so that a rounded q costs acceptance and no exactness; a rounded log w moves
the mixture, and the server says by how much at most.

It is heavy on the way up, (2 g + 1) v numbers against the (g + 1) v that protocol A takes down, and it tells the server
what the device learnt: log w at each place is the very thing that its private data changed.

Letters: g drafted tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import numpy as np
import torch

from glue.errors import RunError
from glue.kinds.source import Session
from glue.proxy.draft import Draft, drafted
from glue.proxy.ledger import CHANGES, Ledger
from glue.proxy.lengths import Costs, Gamma
from glue.proxy.mixing import GREEDY, Sampling
from glue.proxy.packed import Proposal, proposal_size, verdict_size
from glue.proxy.quantised import between
from glue.proxy.speculative import judge, streams
from glue.proxy.truncation import certify
from glue.proxy.writing import Verdict, Written, write

Width = Literal[64, 32, 16]  # bits of the numbers that go up

TYPES: dict[Width, torch.dtype] = {64: torch.float64, 32: torch.float32, 16: torch.float16}
WIDTHS = {kind: bits for bits, kind in TYPES.items()}


class Verifier:
    """A server's side of one text: it asks the large model, and judges with a stream of its own."""

    def __init__(self, large: Session, rng: np.random.Generator):
        self._large, self._rng = large, rng
        self._text: list[int] = []

    def verify(self, proposal: Proposal) -> Verdict:
        """Judge a draft. Raises RunError for one that does not fit this text or the large model's vocabulary."""
        if proposal.keep > len(self._text) or proposal.keep + len(proposal.new) < 1:
            raise RunError(f"a proposal builds on {proposal.keep} tokens, and {len(self._text)} were read",
                           fix="send the whole text with keep 0")
        text = [*self._text[:proposal.keep], *proposal.new]
        scored = self._large.score([*text, *proposal.ids], len(text))
        self._text = [*text, *proposal.ids]
        if scored.tokens is not None or scored.logs.shape != proposal.log_w.shape:
            raise RunError(f"a proposal is about {tuple(proposal.log_w.shape)} places and tokens, and the large model "
                           f"tells {tuple(scored.logs.shape)}",
                           fix="use one vocabulary, and a model that tells everything")
        log_w = proposal.log_w.double()
        most = between(log_w, WIDTHS[proposal.log_w.dtype])[1]
        known = certify(scored, log_w, proposal.sampling, off=torch.where(log_w.isfinite(), most - log_w, 0.0))
        if proposal.q is None:  # nothing was drawn: each had all the weight
            q = torch.nn.functional.one_hot(torch.tensor(proposal.ids, dtype=torch.long), log_w.shape[-1]).double()
        else:
            q = proposal.q.double() / proposal.q.double().sum(-1, keepdim=True)
        accepted, token = judge(proposal.ids, q, lambda place: known.probabilities[place], self._rng)
        return Verdict(accepted, token, known.bound[:accepted + 1].tolist(), known.lacking[:accepted + 1].tolist())


def generate(prompt: Sequence[int], *, verify: Callable[[Proposal], Verdict], tuned: Session, small: Session,
             alpha: float = 1.0, sampling: Sampling = GREEDY, gamma: Gamma = 4, new: int = 64, longest: int = 2**31,
             ends: Collection[int] = (), stop: Callable[[list[int]], bool] = lambda written: False, bits: Width = 16,
             costs: Costs = Costs(), rng: np.random.Generator | None = None) -> Written:  # noqa: B008 (frozen)
    """Write up to `new` tokens after a prompt, judged by whoever `verify` asks; the words are those of protocol A.

    bits  of each number of log w and of q on its way up
    rng   of this request: the first of its two `streams` is used here. With a Verifier that has the second, the text
          is what protocol A writes from the same generator
    """
    drafting, _ = streams(rng, sampling)
    ledger = Ledger(CHANGES)
    read: list[int] = []

    def draft(text: list[int], length: int) -> Draft:
        return drafted(text, length, tuned, small, alpha, sampling, drafting, ends,
                       told=lambda q: q.to(TYPES[bits]))

    def verdict(text: list[int], found: Draft) -> Verdict:
        g, v = len(found.ids), found.log_w.shape[-1]
        keep = next((k for k, pair in enumerate(zip(read, text, strict=False)) if pair[0] != pair[1]),
                    min(len(read), len(text)))
        proposal = Proposal(keep, text[keep:], found.ids, found.log_w.to(TYPES[bits]),
                            None if sampling.greedy else found.q[:g], sampling)
        read[:] = [*text, *found.ids]
        told = verify(proposal)
        ledger.calls += 1
        ledger.places += g + 1
        ledger.up += proposal_size(len(proposal.new), g, v, bits, greedy=sampling.greedy)
        ledger.down += verdict_size(told.accepted)
        return told

    return write(prompt, draft, verdict, ledger, gamma=gamma, new=new, longest=longest, ends=ends, stop=stop,
                 costs=costs)
