"""One token drawn from logits, by the settings and the numbers of one request alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glue.serve.problems import Problem


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature  0: the likeliest, the first of equals
    top_p        only of the fewest tokens that have this share together
    """

    temperature: float = 1.0
    top_p: float = 1.0


def generator(seed: int | None, copy: int) -> np.random.Generator:
    """The random numbers of one answer; without a seed others each time. copy: which of n answers to one prompt."""
    return np.random.default_rng(None if seed is None else [seed % 2 ** 64, copy])


def drawn(logits: Tensor, how: Sampling, random: np.random.Generator,
          likeliest: tuple[float, int] | None = None) -> int:
    """A token by its logits [v]. Takes one random number, none at temperature 0.

    likeliest  the largest of them and its token, where they are known already
    """
    top, place = likeliest or (float(logits.max()), int(logits.argmax()))
    if not math.isfinite(top):  # the largest of numbers of which one is NaN is NaN
        raise Problem(500, f"the member gives {top} where a number should be; its weights may be damaged")
    if how.temperature == 0:
        return place
    odds = ((logits.double() - top) / how.temperature).exp()
    tokens = None
    if how.top_p < 1:
        odds, tokens = odds.sort(descending=True, stable=True)
        sums = odds.cumsum(0)
        # up to the token with which the share is reached, so never none
        odds = odds[:int(torch.searchsorted(sums, how.top_p * sums[-1])) + 1]
    sums = odds.cumsum(0)
    place = min(int(torch.searchsorted(sums, random.random() * sums[-1], right=True)), len(odds) - 1)
    return int(tokens[place]) if tokens is not None else place
