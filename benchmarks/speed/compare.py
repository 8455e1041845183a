"""How far two merged checkpoints are apart, entry by entry."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from glue.checkpoint import Checkpoint
from glue.errors import CheckpointError

ENTRIES = 1 << 20  # compared at once
MANTISSA = 7  # bits of bf16
SMALLEST = -126 - MANTISSA  # exponent of the smallest step of bf16


def compare(ours: Path, theirs: Path, base: Path | None = None) -> dict[str, float]:
    """What differs between two checkpoints of bf16. Raises CheckpointError where they hold different tensors.

    differ   share of entries that are not equal
    beyond   share of entries that are more than one ulp apart; an ulp is that of the larger of the two
    ulps     the most that two entries are apart
    apart    the same, absolute
    rms      with a base: root mean square of what was added to it, ours and theirs (`rms_peer`)
    """
    a, b = Checkpoint(ours), Checkpoint(theirs)
    if set(a) != set(b):
        raise CheckpointError(f"{ours} and {theirs} do not hold the same tensors, e.g. {sorted(set(a) ^ set(b))[0]}")
    below = Checkpoint(base) if base else None
    count = differ = beyond = 0
    ulps = apart = added = added_peer = 0.0
    for name in a:
        old = below[name].reshape(-1).split(ENTRIES) if below else ()
        for k, (x, y) in enumerate(zip(a[name].reshape(-1).split(ENTRIES), b[name].reshape(-1).split(ENTRIES),
                                       strict=True)):
            x, y = x.float(), y.float()
            count += x.numel()
            if below:
                added += float((x - old[k].float()).double().square().sum())
                added_peer += float((y - old[k].float()).double().square().sum())
            where = (x != y).nonzero().squeeze(1)
            if not len(where):
                continue
            x, y = x[where], y[where]
            gap = (x - y).abs()
            steps = gap / _ulp(torch.maximum(x.abs(), y.abs()))
            differ += len(where)
            beyond += int((steps > 1).sum())
            ulps, apart = max(ulps, float(steps.max())), max(apart, float(gap.max()))
    found = {"differ": differ / count, "beyond": beyond / count, "ulps": ulps, "apart": apart}
    return found | ({"rms": (added / count) ** 0.5, "rms_peer": (added_peer / count) ** 0.5} if below else {})


def _ulp(size: Tensor) -> Tensor:
    """The step of bf16 at numbers of this size, in fp32."""
    exponent = torch.frexp(size).exponent - 1 - MANTISSA
    return torch.ldexp(torch.ones_like(size), exponent.clamp(min=SMALLEST))
