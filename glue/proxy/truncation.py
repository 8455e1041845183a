"""Truncation: the mixture of which only some tokens are told, and a bound on how far it is from the whole one.

Of the large model's p a set S is told, the mass `tail` of all others, and the most `floor` that one of them may have.
The device knows w for all. With a = 1 / temperature and f = (p w)^a, the mixture on S alone differs from the whole one
by f(tail) / (f(S) + f(tail)) in total variation. The most that f(tail) can be is a knapsack, and is solved exactly: for
a >= 1 f is convex in p, and mass is best put on the largest w, `floor` on each; for a < 1 it is concave, and mass is
best spread as w^(a / (1 - a)), up to `floor` on each. What rounding adds is in `glue.proxy.quantised`.

Where nothing is drawn the bound is 0 or 1, as it is certain or not that the likeliest told token is the likeliest of
all. Where top_p or top_k cut the mixture it is 1 unless it is certain that the tail changes nothing of which tokens are
kept, and then what rounding alone can do to these.

Letters: p places, v vocabulary, k tokens told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glue.kinds.source import Scored
from glue.proxy.mixing import Sampling, everything
from glue.proxy.quantised import Bits, between, drift

UP = 1 + 2**-16  # masses may have been summed in fp32, and bounds on them must stay bounds


@dataclass(frozen=True)
class Certified:
    """The mixture as far as it is known.

    probabilities  [p, v] what to draw from
    bound          [p] at most so far from the whole, unrounded mixture, in total variation
    lacking        [p] what of that is due to tokens that were not told; asking for more can only lower this
    """

    probabilities: Tensor
    bound: Tensor
    lacking: Tensor


def certify(scored: Scored, log_w: Tensor, sampling: Sampling, bits: Bits = 64, *,
            off: Tensor | None = None) -> Certified:
    """The mixture that can be computed from what was told, and its distance from the one that cannot.

    log_w  [p, v] fp64, see `glue.proxy.mixing.offsets`
    bits   of the log-probabilities as they were told
    off    how far log_w itself may be off [p, v], where it was told too
    """
    dense = everything(scored, log_w.shape[-1]) + log_w
    probabilities = sampling(dense)
    rounded = bits != 64 or off is not None
    if scored.tokens is None and not rounded:
        return Certified(probabilities, torch.zeros(len(dense)), torch.zeros(len(dense)))
    a = 1.0 if sampling.greedy else 1 / sampling.temperature
    low, high = (log_w, log_w) if off is None else (log_w - off, log_w + off)
    least, most = between(scored.logs, bits)
    told, least, most = (a * _told(scored, logs, w) for logs, w in
                         ((scored.logs.double(), log_w), (least, low), (most, high)))
    if sampling.greedy:
        largest = _largest(scored, high)
        lacking, loose = (_another(told, logs, high, told.argmax(-1, keepdim=True), largest)
                          for logs, high in ((told, told), (least, most)))
        return Certified(probabilities, loose.double(), lacking.double())
    tail = _whole(scored, high, a)
    if not sampling.cuts:
        missing = torch.sigmoid(tail - least.logsumexp(-1)).nan_to_num(nan=1.0)
        moved = drift(told, least, most) if rounded else 0.0
        return Certified(probabilities, (missing + moved).clamp(max=1.0), missing)
    largest = a * _largest(scored, high)
    pool, kept = (_told(scored, found > 0, None) for found in (replace(sampling, top_p=1.0)(dense), probabilities))
    lacking, loose = (_other_kept(logs, high, pool, kept, largest, tail, sampling)
                      for logs, high in ((told, told), (least, most)))
    moved = drift(*(logs.masked_fill(~kept, -math.inf) for logs in (told, least, most)))
    return Certified(probabilities, torch.where(loose, 1.0, moved), lacking.double())


def knapsack(log_w: Tensor, mass: Tensor, cap: Tensor, a: float) -> Tensor:
    """Log of the most that the sum of (p w)^a over a row can be, where p sums to `mass` and none is above `cap`.

    log_w      [p, n], largest first; for a >= 1 the first mass / cap of them and one more are enough
    mass, cap  [p, 1]; a row of mass 0 gives -inf
    """
    before = cap * torch.arange(log_w.shape[-1])
    if a >= 1:
        part = (mass - before).clamp(min=0).minimum(cap)
        return torch.logsumexp(a * (log_w + part.log()), -1)
    # p = min(cap, c w^(a / (1 - a))): the first j tokens have the cap, and c shares out what they leave. By Lagrange's
    # bound every c > 0 gives at least the maximum, so rounding in the choice of j does no harm
    top = log_w[:, :1]
    share = a / (1 - a) * (log_w - top)
    rest = share.flip(-1).logcumsumexp(-1).flip(-1)  # of tokens j, j + 1, ...
    levels = (mass - before).clamp(min=1e-12 * mass).log() - rest
    j = (levels + share <= cap.log() + 1e-9).int().argmax(-1, keepdim=True)
    level = levels.gather(-1, j)
    p = torch.minimum(level + share, cap.log())
    slope = a * torch.exp((a - 1) * level)
    found = torch.exp(a * (p + log_w - top)).sum(-1, keepdim=True) + slope * (mass - p.exp().sum(-1, keepdim=True))
    return torch.where((mass > 0) & (top > -math.inf), found.log() + a * top, -math.inf)[:, 0]


def _told(scored: Scored, what: Tensor, added: Tensor | None) -> Tensor:
    """`what` [p, k] of each told token, plus `added` [p, v] at it, -inf for padding; a mask [p, v] is only narrowed."""
    if scored.tokens is None:
        return what if added is None else what + added
    at, real = scored.tokens.long().clamp(min=0), scored.tokens >= 0
    if added is None:
        return what.gather(-1, at) & real
    return (what + added.gather(-1, at)).masked_fill(~real, -math.inf)


def hidden(scored: Scored, log_w: Tensor) -> Tensor:
    """log w [p, v] of what was not told, and -inf for what was."""
    assert scored.tokens is not None
    v = log_w.shape[-1]
    wide = torch.nn.functional.pad(log_w, (0, 1))
    return wide.scatter(-1, torch.where(scored.tokens < 0, v, scored.tokens.long()), -math.inf)[:, :v]


def _mass(scored: Scored, v: int) -> tuple[Tensor, Tensor]:
    """Mass of the tail, and the most that one token in it has, [p, 1] in fp64, both never too small."""
    mass, cap = (value.double()[:, None] * UP for value in (scored.tail, scored.floor))
    if scored.tokens is None:
        return torch.zeros_like(mass), torch.zeros_like(cap)
    left = v - (scored.tokens >= 0).sum(-1, keepdim=True)
    return torch.where(left > 0, mass, 0.0), torch.maximum(cap, mass / left.clamp(min=1)).minimum(mass)


def _largest(scored: Scored, log_w: Tensor) -> Tensor:
    """Log of the most that p w of one token that was not told can be [p]; -inf where all were."""
    mass, cap = _mass(scored, log_w.shape[-1])
    if not bool((mass > 0).any()):
        return torch.full((len(mass),), -math.inf, dtype=torch.float64)
    return torch.where(mass > 0, hidden(scored, log_w).amax(-1, keepdim=True) + cap.log(), -math.inf)[:, 0]


def _whole(scored: Scored, log_w: Tensor, a: float) -> Tensor:
    """Log of the most that the sum of (p w)^a over all that was not told can be [p]; -inf where all were."""
    v = log_w.shape[-1]
    mass, cap = _mass(scored, v)
    if not bool((mass > 0).any()):
        return torch.full((len(mass),), -math.inf, dtype=torch.float64)
    full = int(torch.where(mass > 0, mass / cap, 0.0).max().ceil()) + 1 if a >= 1 else v
    return knapsack(hidden(scored, log_w).topk(min(full, v)).values, mass, cap, a)


def _another(told: Tensor, least: Tensor, most: Tensor, best: Tensor, largest: Tensor) -> Tensor:
    """Whether a token other than `best` [p, 1] may be the likeliest [p]."""
    low = least.gather(-1, best)[:, 0]
    others = most.scatter(-1, best, -math.inf).amax(-1)
    return (others > low) | (largest >= low)


def _other_kept(least: Tensor, most: Tensor, pool: Tensor, kept: Tensor, largest: Tensor, tail: Tensor,
                sampling: Sampling) -> Tensor:
    """Whether top_k may leave other tokens than `pool` [p, k], or top_p others than `kept` [p, k] of these [p]."""
    def above(inside: Tensor, outside: Tensor, hidden: Tensor) -> Tensor:
        low = least.masked_fill(~inside, math.inf).amin(-1)
        return (low >= most.masked_fill(~outside, -math.inf).amax(-1)) & (low > hidden)

    def total(logs: Tensor, mask: Tensor) -> Tensor:
        return (logs - top).exp().masked_fill(~mask, 0.0).sum(-1)

    top = most.amax(-1, keepdim=True)
    same = torch.ones_like(largest, dtype=torch.bool)
    if sampling.top_k:
        full = (pool.sum(-1) >= sampling.top_k) | (tail == -math.inf)
        same = full & above(pool, ~pool, largest)
        largest = tail = torch.full_like(tail, -math.inf)  # what is outside the pool is out of the game
    if sampling.top_p < 1:
        others = pool & ~kept
        inside, hidden = total(least, kept), (tail - top[:, 0]).exp()
        enough = inside >= sampling.top_p * (inside + total(most, others) + hidden)
        smallest = (least - top).masked_fill(~kept, math.inf).amin(-1).exp()
        most_kept = total(most, kept)
        needed = most_kept - smallest < sampling.top_p * (most_kept + total(least, others))
        same &= above(kept, others, largest) & enough & needed
    return ~same
