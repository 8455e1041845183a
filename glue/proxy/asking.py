"""Asking: how much the large model is to tell of each place, and more where that was not enough.

What is told of a place must not depend on the draft beyond it. A token that is told only because it was drafted does
not count, or the mixture would be another one for each draft and acceptance would no longer be exact: see `without`.

Letters: p places, v vocabulary, k tokens told, m tokens asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glue.errors import GlueError
from glue.kinds.source import Scored, Session, Source
from glue.proxy.draft import Draft
from glue.proxy.ledger import Ledger
from glue.proxy.mixing import Sampling
from glue.proxy.quantised import Bits, between
from glue.proxy.truncation import UP, certify, hidden

NUMBERED = 3  # a log-probability with its token's number takes so many times the bytes of one without


@dataclass(frozen=True)
class Truncation:
    """How much the large model is asked to tell.

    top_k   the likeliest tokens
    extra   tokens asked for at each place in the same call: those that tuning raised most, which are what a bound
            suffers from. 0: never ask, and so reveal nothing by asking
    budget  total variation that leaving tokens out may cost at a place; more of them are asked for where it is
            exceeded. What rounding costs comes on top: only more bits would help
    most    the largest top_k that the source answers; 0: it can tell everything
    """

    top_k: int = 64
    extra: int = 32
    budget: float = 1e-3
    most: int = 0

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.extra < 0 or not 0 <= self.budget <= 1 or self.most < 0:
            raise GlueError(f"top_k {self.top_k}, extra {self.extra}, budget {self.budget:g}, most {self.most} are no "
                            "truncation", fix="top_k is at least 1, extra and most at least 0, budget between 0 and 1")

    def wider(self, vocabulary: int) -> Truncation | None:
        """What to ask for next: four times as much. None: everything, where that is hardly more bytes."""
        k, extra = 4 * self.top_k, min(4 * self.extra, vocabulary)
        if not self.most:
            return None if NUMBERED * (k + extra) >= vocabulary else replace(self, top_k=k, extra=extra)
        return replace(self, top_k=min(k, self.most, vocabulary), extra=extra)

    def within(self, source: Source) -> Truncation:
        """The same, as far as a source understands it."""
        if source.tells == "full":
            return self
        return replace(self, top_k=min(self.top_k, source.most), most=source.most,
                       extra=0 if source.tells == "given" else self.extra)


class Told:
    """What the large model told of the places of one draft, and asks for more where that is not enough.

    bound, lacking  a number for each place, see `Certified`
    """

    def __init__(self, large: Session, text: list[int], draft: Draft, sampling: Sampling,
                 truncation: Truncation | None, bits: Bits, ledger: Ledger):
        self._large, self._text, self._draft, self._sampling = large, text, draft, sampling
        self._asking, self._bits, self._ledger = truncation, bits, ledger
        extra = wanted(draft.log_w, truncation.extra) if truncation and truncation.extra else []
        told = self._ask(0, len(draft.ids), truncation.top_k if truncation else None, extra)
        self._told = [row(told, place) for place in range(len(draft.log_w))]
        known = certify(told, draft.log_w, sampling, bits)
        self._mixed = list(known.probabilities)
        self.bound, self.lacking = known.bound.tolist(), known.lacking.tolist()

    def target(self, place: int) -> Tensor:
        """The mixture [v] at a place, from as much as the budget needs."""
        while self._asking and self.lacking[place] > self._asking.budget and self._more(place, self._asking):
            pass
        return self._mixed[place]

    def _more(self, place: int, asked: Truncation) -> bool:
        """Ask for more at this place and at all later ones that need it; whether there was more to ask for.

        Drafts before this place have stayed. Later places may not be needed, but another call costs more than they do.
        """
        draft = self._draft
        wider = asked.wider(draft.log_w.shape[-1])
        if wider == asked:
            return False
        places = [k for k in range(place, len(self._told)) if self.lacking[k] > asked.budget]
        span = range(place, places[-1] + 1)
        extra = [untold(self._told[k], draft.log_w[k:k + 1], wider.extra)[0] if k in places else [] for k in span] \
            if wider and wider.extra else []
        told = self._ask(place, places[-1], wider.top_k if wider else None, extra)
        self._ledger.widened += 1
        for k in places:
            self._told[k] = together(self._told[k], row(told, k - place), self._bits)
            known = certify(self._told[k], draft.log_w[k:k + 1], self._sampling, self._bits)
            self._mixed[k] = known.probabilities[0]
            self.bound[k], self.lacking[k] = known.bound.item(), known.lacking.item()
        self._asking = wider or asked
        return True

    def _ask(self, first: int, last: int, top_k: int | None, extra: list[list[int]]) -> Scored:
        """Places first to last of the draft; what is told of a token only since it was drafted is left out."""
        ids, start = [*self._text, *self._draft.ids[:last]], len(self._text) + first
        self._ledger.asked(ids, start, extra)
        told = self._large.score(ids, start, top_k=top_k, extra=extra)
        self._ledger.told(told, self._draft.log_w.shape[-1], self._bits)
        tokens = None if told.tokens is None else told.tokens.cpu()
        told = Scored(told.logs.cpu(), tokens, told.tail.cpu(), told.floor.cpu())
        return told if top_k is None else without(told, self._draft.ids[first:last], extra, top_k)


def without(scored: Scored, drafted: Sequence[int], asked: Sequence[Sequence[int]], top_k: int) -> Scored:
    """The same, with drafted tokens moved to the tail where they are neither asked for nor among the top k.

    drafted  the token that follows each place, as far as there is one: sources that tell `given` tell it too
    """
    if scored.tokens is None:
        return scored
    tokens, logs, tail = scored.tokens.clone(), scored.logs.clone(), scored.tail.clone()
    for place, token in enumerate(drafted):
        at = (tokens[place] == token).nonzero()
        k = int(at) if len(at) else -1
        if k >= 0 and (not asked or token not in asked[place]) and int((logs[place] > logs[place, k]).sum()) >= top_k:
            tail[place] += logs[place, k].exp()
            tokens[place, k], logs[place, k] = -1, -math.inf
    return Scored(logs, tokens, tail, scored.floor)


def together(old: Scored, new: Scored, bits: Bits) -> Scored:
    """What two answers about the same places tell together, where the second asked for more."""
    if old.tokens is None or new.tokens is None:
        return old if old.tokens is None else new
    again = (old.tokens[:, :, None] == new.tokens[:, None, :]).any(-1) | (old.tokens < 0)
    tokens, logs = old.tokens.masked_fill(again, -1), old.logs.masked_fill(again, -math.inf)
    # of the new tail goes what these have at least, so that it is never too small
    tail = new.tail.double() * UP - between(old.logs, bits)[0].masked_fill(again, -math.inf).exp().sum(-1)
    return Scored(torch.cat([new.logs, logs], -1), torch.cat([new.tokens, tokens], -1), tail.clamp(min=0), new.floor)


def wanted(log_w: Tensor, m: int) -> list[list[int]]:
    """The m tokens of largest w at each place. log_w [p, v]

    The draft's likeliest need not be named: where they matter they are among these, or among the large model's own.
    """
    found: list[list[int]] = log_w.topk(min(m, log_w.shape[-1])).indices.tolist()
    return found


def untold(scored: Scored, log_w: Tensor, m: int) -> list[list[int]]:
    """The m tokens of largest w at each place of which nothing is told yet: where the bound suffers most."""
    if scored.tokens is None:
        return [[] for _ in log_w]
    left = hidden(scored, log_w)
    found = left.topk(min(m, left.shape[-1]))
    return [[token for token, value in zip(*row, strict=True) if value > -math.inf]
            for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def row(scored: Scored, place: int) -> Scored:
    """One place."""
    some = slice(place, place + 1)
    return Scored(scored.logs[some], None if scored.tokens is None else scored.tokens[some], scored.tail[some],
                  scored.floor[some])
