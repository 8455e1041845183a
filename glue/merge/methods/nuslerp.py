"""NuSLERP: the point between two models, or two differences to a base, by their weights and along an arc."""

from __future__ import annotations

import torch
from torch import Tensor

from glue.family import PerMember
from glue.merge import merging
from glue.merge.leaf import Leaf, gram
from glue.merge.parameters import whole

STRAIGHT = 1e-14  # squared sine of the angle up to which the arc is taken as straight


@merging.add("nuslerp", source="mergekit", space="delta", base="optional", whole=True, members=(2, 2), symmetric=True,
             idempotent={})
def nuslerp(leaf: Leaf, *, weight: PerMember[float] = 1.0, nuslerp_row_wise: bool = False,
            nuslerp_flatten: bool = True) -> Tensor:
    """Go the share t = w_2 / (w_1 + w_2) of the arc: (sin((1-t)a) x + sin(ta) y) / sin(a), a the angle of directions.

    Where x and y are parallel or opposite, (1-t) x + t y. Directions are those of the flattened tensors, or without
    nuslerp_flatten those along the last axis, or the first if nuslerp_row_wise.

    leaf.tensors  [2, *shape], differences to the base where there is one
    weight        [2, 1, ..., 1]
    """
    x, y = leaf.tensors
    t = (weight[1] / whole(weight)).double()
    product = gram(leaf.tensors, None if nuslerp_flatten or x.ndim == 0 else 0 if nuslerp_row_wise else -1)
    lengths = product[0, 0].sqrt() * product[1, 1].sqrt()
    cosine = (product[0, 1] / torch.where(lengths == 0, 1, lengths)).clamp(-1, 1)
    straight, angle = 1 - cosine.square() <= STRAIGHT, cosine.acos()
    one = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / angle.sin())
    other = torch.where(straight, t, (t * angle).sin() / angle.sin())
    return one.to(x.dtype) * x + other.to(x.dtype) * y
