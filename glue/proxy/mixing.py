"""Logit arithmetic: the large model's distribution, moved by what tuning did to the small one.

    pi(v) ~ (p_large(v) w(v)) ^ (1 / temperature),   w = (p_tuned / p_small) ^ alpha        (arXiv:2401.08565)

Log-probabilities serve as well as logits: a constant added to a row changes nothing. Only the mixture is cut by top_p
and top_k, never one of its parts.

Letters: p places, v vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glue.errors import GlueError
from glue.kinds.source import Scored


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from a row of logits.

    temperature  0: the likeliest, and of equals the one with the smallest number
    top_p        keep the likeliest tokens that together have at least this probability
    top_k        keep this many of the likeliest; 0: all
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature) and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise GlueError(f"nothing can be drawn at temperature {self.temperature:g}, top_p {self.top_p:g}, "
                            f"top_k {self.top_k}",
                            fix="temperature is 0 or more, top_p above 0 and at most 1, top_k 0 (all) or more")

    @property
    def greedy(self) -> bool:
        """Whether there is nothing to draw."""
        return self.temperature == 0

    @property
    def cuts(self) -> bool:
        """Whether unlikely tokens are left out."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0)

    def __call__(self, logs: Tensor) -> Tensor:
        """The probabilities [p, v], fp64, that tokens are drawn with; `logs` [p, v] need not be normalised."""
        logs = logs.double()
        if self.greedy:
            return torch.nn.functional.one_hot(logs.argmax(-1), logs.shape[-1]).double()
        found = torch.softmax(logs / self.temperature, -1)
        if not self.cuts:
            return found
        found = torch.where(self.kept(found), found, 0.0)
        return found / found.sum(-1, keepdim=True)

    def kept(self, probabilities: Tensor) -> Tensor:
        """[p, v] bool: the tokens that top_k, and then top_p among those, leave; of equals, the smaller number."""
        ordered, order = probabilities.sort(stable=True, dim=-1, descending=True)
        if 0 < self.top_k < ordered.shape[-1]:
            ordered[:, self.top_k:] = 0
        before = ordered.cumsum(-1) - ordered
        keep = (before < self.top_p * ordered.sum(-1, keepdim=True)) & (ordered > 0)
        return torch.zeros_like(keep).scatter(-1, order, keep)


GREEDY = Sampling(temperature=0.0)


def offsets(tuned: Tensor, small: Tensor, alpha: float) -> Tensor:
    """log w [p, v] in fp64: how much tuning raised each token, alpha times. What both rule out stays as it was.

    tuned, small  [p, v] log-probabilities
    Raises GlueError for a token that only the untuned one rules out: nothing finite could say how much it was raised.
    """
    if alpha == 0:
        return torch.zeros_like(tuned, dtype=torch.float64)
    tuned, small = tuned.double(), small.double()
    moved = torch.where(tuned == small, 0.0, tuned - small)
    if bool(moved.isnan().any()) or (alpha > 0 and bool((moved == math.inf).any())) \
            or (alpha < 0 and bool((moved == -math.inf).any())):
        raise GlueError("the untuned small model gives probability 0, or none at all, to a token that the tuned one "
                        "allows", fix="use two models of one vocabulary, and log-probabilities in fp32 or fp64")
    return alpha * moved


def everything(scored: Scored, vocabulary: int = 0) -> Tensor:
    """Log-probabilities [p, v] in fp64, -inf for tokens of which nothing is told; `vocabulary` is then v."""
    if scored.tokens is None:
        return scored.logs.double()
    rows = torch.full((len(scored.tokens), vocabulary + 1), -math.inf, dtype=torch.float64)
    where = torch.where(scored.tokens < 0, vocabulary, scored.tokens.long())  # padding goes to a column of its own
    return rows.scatter(1, where, scored.logs.double())[:, :vocabulary]


def drawn(weights: Tensor, uniform: float) -> int:
    """The token where the running sum of weights [v] passes `uniform` (0 <= uniform < 1) of their whole."""
    sums = np.cumsum(weights.numpy())
    at = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    return min(at, int(np.searchsorted(sums, sums[-1])))  # rounding must not lead beyond the last that has any weight
