"""Sparsify: keep some entries of each member's difference to the base and zero the rest, in place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from glue.errors import MethodError
from glue.merge.cut import Cut, cut_at, within
from glue.merge.leaf import CHANCES, Leaf, steps
from glue.merge.target import Glimpse

NO_NORM = 1e-7   # L1 norms below this are not restored
ROUNDING = 1e-6  # 0.85 + 0.15 is more than 1 in fp32


def cut(pieces: Glimpse, density: Tensor) -> Cut:
    """Where to cut so that exactly max(1, int(density[i] * numel)) entries of member i remain; see `cut_at`.

    density  [n, 1], in (0, 1], fp64: int() of an fp32 product can be off by one
    """
    return cut_at(pieces, [max(1, int(share * pieces.numel)) for share in density.flatten().tolist()])[0]


def keep_largest(leaf: Leaf, cut: Cut) -> Tensor:
    """The entries of leaf.tensors that are among the largest of their tensor, the rest zero: [n, *shape]."""
    for row, end, at, below in _at_the_cut(leaf, cut):
        if at == torch.inf:
            row.mul_(0)  # none; but what is not finite must show
            continue
        if at > 0:
            _shrink(row[:end], below, row[:end])
        _shrink(row[end:], at, row[end:])
    return leaf.tensors


def drop_largest(leaf: Leaf, cut: Cut) -> Tensor:
    """The entries of leaf.tensors that are not among the largest of their tensor, the rest zero: [n, *shape]."""
    large = torch.empty_like(leaf.tensors[0]).reshape(-1)
    for row, end, at, below in _at_the_cut(leaf, cut):
        if at == 0:
            row[:end].mul_(0)
        elif at < torch.inf:
            _shrink(row[:end], below, large[:end])
            _shrink(row[end:], at, large[end:])
            row -= large
    return leaf.tensors


def _at_the_cut(leaf: Leaf, cut: Cut):
    """For each member: its entries [c], how many of them are cut at >=, where that is, and the number below."""
    for row, at, last in zip(leaf.tensors.reshape(leaf.n, -1), cut.at.to(leaf.tensors.dtype), cut.last, strict=True):
        below = torch.nextafter(at, torch.zeros_like(at))
        yield row, within(int(last), leaf.offset + leaf.start, len(row)), float(at), float(below)


def _shrink(numbers: Tensor, to: float, out: Tensor) -> None:
    """Zero what is no larger than `to`. Faster than any mask, and NaN stays NaN."""
    torch.hardshrink(numbers, to, out=out)


def keep_random(leaf: Leaf, density: Tensor) -> Tensor:
    """Each entry of leaf.tensors[i] with probability density[i], the rest zero: [n, *shape].

    density  [n, 1, ..., 1], in steps of 1 / 65536
    """
    stays = torch.empty_like(leaf.tensors[0])
    for i, chance in enumerate(density.flatten().tolist()):
        if steps(chance) < CHANCES:
            leaf.tensors[i].mul_(stays.copy_(leaf.stays(i, chance)))  # numbers, since torch is slow with masks
    return leaf.tensors


def chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """The chance of each entry to stay, from density - epsilon for the smallest of its row to density + epsilon.

    delta    [r, c]; of equal magnitudes in a row, the one with the lower index ranks lower
    density  where it is 1, all entries stay. Raises MethodError where chances would leave [0, 1]
    """
    if density == 1:
        return torch.ones_like(delta)
    if density - epsilon < -ROUNDING or density + epsilon > 1 + ROUNDING:
        raise MethodError(f"density {density:.6g} and epsilon {epsilon:.6g} make chances to stay of "
                          f"{density - epsilon:.6g} to {density + epsilon:.6g}; a chance lies between 0 and 1",
                          fix="give a smaller epsilon")
    columns = delta.shape[1]
    if columns == 1:
        return torch.full_like(delta, density)
    place = 2 * torch.arange(columns, dtype=delta.dtype, device=delta.device) / (columns - 1) - 1
    of_rank = (density + epsilon * place).clamp(0, 1)
    return torch.empty_like(delta).scatter_(1, _ascending(delta), of_rank.expand_as(delta))


def _ascending(delta: Tensor) -> Tensor:
    """The indices of each row in the order of magnitude, and where these are equal, in their own."""
    if delta.dtype != torch.float32 or not delta.is_cpu:
        return delta.abs().argsort(dim=1, stable=True)
    # A magnitude's bits, as a whole number, before its index: a plain sort, which is twenty times as fast.
    keys = np.bitwise_and(delta.numpy().view(np.uint32), 0x7FFFFFFF).astype(np.uint64)
    keys <<= 32
    keys |= np.arange(delta.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(keys.view(np.int64))


def rescaling(pieces: Glimpse, rescale: str, keep: Callable[[Leaf], Tensor]) -> Tensor:
    """What to multiply the entries by that `keep` leaves of each member: [n, 1], fp64.

    rescale  l1: so that each member has the L1 norm that it had; else 1
    keep     zeroes the other entries of leaf.tensors in place
    """
    if rescale != "l1":
        return torch.ones(pieces.n, 1, dtype=torch.float64)
    before, after = np.zeros(pieces.n), np.zeros(pieces.n)
    for leaf in pieces:
        before += _l1(leaf.tensors)
        after += _l1(keep(leaf))
    factors = [one / other if min(one, other) >= NO_NORM else 1.0 for one, other in zip(before, after, strict=True)]
    return torch.tensor(factors, dtype=torch.float64)[:, None]


def _l1(tensors: Tensor) -> np.ndarray:
    size = np.empty(tensors[0].numel(), tensors.cpu().numpy().dtype)
    return np.array([np.abs(row.reshape(-1).cpu().numpy(), out=size).sum(dtype=np.float64) for row in tensors])
