"""NearSwap: the first model, with every weight moved towards the second by at most t.

mergekit divides by differences of no less than 1e-6, so that for t < 1e-6 it goes only part of the way where the two
are that close; here such entries are the second model's, as all others that are closer than t.
"""

from __future__ import annotations

from torch import Tensor

from glue.family import NonNegative
from glue.merge import merging
from glue.merge.leaf import Leaf


@merging.add("nearswap", source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", space="weight",
             members=(2, 2), idempotent={})
def nearswap(leaf: Leaf, *, t: NonNegative = 0.0001) -> Tensor:
    """Take the second model where it is within t of the first, elsewhere the first, moved by t: clip(y, x-t, x+t).

    leaf.tensors  [2, c]
    """
    x, y = leaf.tensors
    return y.clamp(x - t, x + t) + 0 * y  # an infinite y would be clipped, and not be seen and refused
