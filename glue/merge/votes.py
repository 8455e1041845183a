"""Votes: of the members' weighted differences, sum at each entry those whose sign won."""

from __future__ import annotations

import torch
from torch import Tensor

from glue.merge.leaf import summed


def with_winner(votes: Tensor) -> Tensor:
    """Which votes have the sign of their total over the members: [n, *shape] -> the same, bool. Zeros abstain."""
    return votes.sign() == torch.where(summed(votes) >= 0, 1.0, -1.0)


def agreed(deltas: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    """The sum of the weighted differences that have the sign of their total; a total of zero counts as plus.

    deltas     [n, *shape], zeros abstain
    weight     [n, 1, ..., 1]
    normalize  divide by the sum of the weights that were counted, where that is not zero
    returns    [*shape]
    """
    votes = weight * deltas
    agrees = with_winner(votes)
    total = summed(votes * agrees)
    if not normalize:
        return total
    counted = summed(weight * agrees)
    return total / torch.where(counted == 0, 1.0, counted)
