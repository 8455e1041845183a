"""Votes: of the members' weighted differences, sum at each entry those whose sign won."""

from __future__ import annotations

import torch
from torch import Tensor

from glue.merge.leaf import summed

SIGN = {4: (torch.int32, -2**31), 8: (torch.int64, -2**63)}  # by bytes of a number: its bits, that of its sign


def won(votes: Tensor, factor: Tensor | None = None, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum the votes that have the sign of their total; a total of zero counts as plus, and zeros abstain.

    votes    [n, c]; they are used up
    factor   n numbers to multiply votes by, once the sign is elected; None for 1
    weight   n numbers; None where nothing is divided by them
    returns  the sum [c], and the sum of the weights of the votes that were counted [c], or nothing
    """
    bits, sign = SIGN[votes.dtype.itemsize]
    winner = summed(votes).view(bits).bitwise_and_(sign)
    total, mark = votes[0], torch.empty_like(votes[0])
    counted = torch.zeros_like(total if weight is not None else total[:0])
    for i, vote in enumerate(votes):
        vote.view(bits).bitwise_xor_(winner)
        vote.relu_()  # now the size of a vote for the winner, and zero for any other
        if weight is not None:
            counted.add_(torch.gt(vote, 0, out=mark), alpha=float(weight[i]))
        if factor is not None:
            vote *= float(factor[i])
        if i:
            total += vote
    total.view(bits).bitwise_xor_(winner)
    return total, counted


def agreed(votes: Tensor, weight: Tensor, normalize: bool) -> Tensor:
    """The sum of the weighted differences that have the sign of their total; see `won`.

    votes      [n, *shape], differences, already weighted; they are used up
    weight     [n, 1, ..., 1]
    normalize  divide by the sum of the weights that were counted, where that is not zero
    returns    [*shape]
    """
    total, counted = won(votes.reshape(len(votes), -1), weight=weight.flatten() if normalize else None)
    if normalize:
        total /= counted.add_(torch.eq(counted, 0, out=torch.empty_like(counted)))  # where nobody counts, by 1
    return total.reshape(votes.shape[1:])
