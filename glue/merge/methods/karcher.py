"""Karcher mean: the direction whose angles to those of all members have the least sum of squares.

Every step of the search is a combination of the members, so it runs on their inner products alone. Unlike mergekit,
tensors shorter than tol are not taken for zero, and a direction opposite to the current mean, towards which there is
no one way, is passed over whatever rounding makes of it.
"""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from glue.family import Natural, Positive
from glue.merge import merging
from glue.merge.combine import combined
from glue.merge.gram import gram
from glue.merge.leaf import Leaf
from glue.merge.target import Glimpse


def shares(pieces: Glimpse, *, max_iter: int, tol: float) -> Tensor:
    """What each member is multiplied by: [n], fp64."""
    product = gram(pieces)
    length = product.diagonal().sqrt()
    there = (length != 0).double()  # a tensor of zeros has no direction
    unit = there / torch.where(length == 0, 1, length)
    cosine = unit * product * unit[:, None]

    def size(mix: Tensor) -> Tensor:
        return (mix[:, None] * cosine * mix).sum().clamp(min=0).sqrt()

    mean = there / there.sum().clamp(min=1)
    weight = mean
    if size(mean) < tol and there.any():
        mean = torch.zeros_like(mean).index_fill_(0, there.argmax(), 1.0)  # all cancels out: start from the first
    mean = mean / (size(mean) or 1.0)
    for _ in range(max_iter):
        dots = (cosine * mean).sum(1).clamp(-1, 1)
        angle = dots.acos()
        pull = torch.where((angle < tol) | (angle > pi - tol), 0, weight * angle / angle.sin())
        step = pull - (pull * dots).sum() * mean
        far = size(step)
        if far < tol:
            break
        mean = far.cos() * mean + far.sin() / far * step
        mean = mean / size(mean)
    return length.mean() * mean * unit


@merging.add("karcher", version=2, source="arXiv:2603.04972", space="weight", glance=shares, symmetric=True,
             idempotent={})
def karcher(leaf: Leaf, *, max_iter: Natural = 10, tol: Positive = 1e-5) -> Tensor:
    """Scale the Karcher mean of the members' directions, each of the flattened tensor, to their mean length.

    max_iter      steps of the search, at most
    tol           length of a step, in radians, below which the search ends
    leaf.tensors  [n, c]
    """
    return combined(leaf.seen, leaf.tensors)
