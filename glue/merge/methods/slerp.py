"""Slerp: the point at share t of the arc between two models."""

from __future__ import annotations

from math import acos, sin, sqrt

from torch import Tensor

from glue.family import Probability
from glue.merge import merging
from glue.merge.combine import combined
from glue.merge.gram import gram
from glue.merge.leaf import Leaf
from glue.merge.target import Glimpse

COLINEAR = 0.9995  # |cosine| above which the arc is taken as straight


def angle(pieces: Glimpse) -> float:
    """The angle between the two flattened tensors, in radians; 0 where they are as good as parallel, or opposite."""
    (xx, xy), (_, yy) = gram(pieces).tolist()
    cosine = xy / ((sqrt(xx) or 1.0) * (sqrt(yy) or 1.0))
    return 0.0 if abs(cosine) > COLINEAR else acos(cosine)


@merging.add("slerp", version=2, source="doi:10.1145/325334.325242", space="weight", glance=angle, members=(2, 2),
             idempotent={})
def slerp(leaf: Leaf, *, t: Probability = 0.5) -> Tensor:
    """Go from the first model (t = 0) to the second (t = 1) along an arc: (sin((1-t)a) x + sin(ta) y) / sin(a).

    The angle a is that of directions, while x and y keep their lengths; where a is near 0 or pi, (1-t) x + t y.

    leaf.tensors  [2, c]
    """
    a = leaf.seen
    return combined([sin((1 - t) * a) / sin(a), sin(t * a) / sin(a)] if a else [1 - t, t], leaf.tensors)
