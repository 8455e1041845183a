"""NuSLERP: the point between two models, or two differences to a base, by their weights and along an arc."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glue.family import PerMember
from glue.merge import merging
from glue.merge.combine import combined
from glue.merge.gram import gram, gram_along
from glue.merge.leaf import Leaf
from glue.merge.parameters import whole
from glue.merge.target import Glimpse, Sees

STRAIGHT = 1e-14  # squared sine of the angle up to which the arc is taken as straight


def shares(product: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """What each of two is multiplied by, of their inner products: [2, 2, *shape] -> two of [*shape]."""
    lengths = product[0, 0].sqrt() * product[1, 1].sqrt()
    cosine = (product[0, 1] / torch.where(lengths == 0, 1, lengths)).clamp(-1, 1)
    straight, angle = 1 - cosine.square() <= STRAIGHT, cosine.acos()
    return (torch.where(straight, 1 - t, ((1 - t) * angle).sin() / angle.sin()),
            torch.where(straight, t, (t * angle).sin() / angle.sin()))


def flattened(pieces: Glimpse, *, weight: Tensor, nuslerp_flatten: bool) -> tuple[Tensor, Tensor] | None:
    """The shares of both members where directions are those of the flattened tensors."""
    return shares(gram(pieces), float(weight[1] / whole(weight))) if nuslerp_flatten else None


def sees(name: str, shape: tuple[int, ...], params: Mapping[str, Any]) -> Sees:
    """Vectors along the first axis are told apart in a whole tensor alone."""
    return "pieces" if params["nuslerp_flatten"] else "whole" if params["nuslerp_row_wise"] and shape else "rows"


@merging.add("nuslerp", version=2, source="mergekit", space="delta", base="optional", glance=flattened, sees=sees,
             members=(2, 2), symmetric=True, idempotent={})
def nuslerp(leaf: Leaf, *, weight: PerMember[float] = 1.0, nuslerp_row_wise: bool = False,
            nuslerp_flatten: bool = True) -> Tensor:
    """Go the share t = w_2 / (w_1 + w_2) of the arc: (sin((1-t)a) x + sin(ta) y) / sin(a), a the angle of directions.

    Where x and y are parallel or opposite, (1-t) x + t y. Directions are those of the flattened tensors, or without
    nuslerp_flatten those along the last axis, or the first if nuslerp_row_wise.

    leaf.tensors  [2, c], or without nuslerp_flatten [2, r, c] or [2, *shape]; differences to the base if there is one
    weight        [2, 1, ..., 1]
    """
    if leaf.seen is not None:
        return combined(leaf.seen, leaf.tensors)
    x, y = leaf.tensors
    along_first = nuslerp_row_wise and leaf.shape != ()
    one, other = shares(gram_along(leaf.tensors, 0 if along_first else -1), float(weight[1] / whole(weight)))
    return x.mul_(one.to(x.dtype)).addcmul_(other.to(x.dtype), y)
