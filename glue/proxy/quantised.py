"""Rounded log-probabilities: between which bounds the true ones lie, and how far rounding can move a mixture.

Two mixtures f and g over the same tokens whose logarithms differ by at most d turn the odds of every event by at most
exp(2 d), so that their total variation is at most tanh(d / 2), which two even tokens reach. Where few tokens are known
much worse than the others (fp16 is as coarse as a log-probability is low, int8 ends 20 nats below the top), these are
charged by their weight instead: replacing f by g on a set C moves the distribution by at most sum over C of |f - g|,
over either one's sum. Both hold together by the triangle inequality, for any C; the best is taken.

Letters: p places, k tokens of which something is told.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from glue.kinds.wire import RANGE, STEP

Bits = Literal[64, 32, 16, 8]


def between(logs: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    """Least and most [p, k], fp64, that log-probabilities can have been before `glue.kinds.wire` told them.

    64  not rounded at all          32, 16  rounded to the nearest float
    8   rounded to the nearest of 256 codes over 20 nats below the largest of a row; of what has the last code it is
        only known that it is no likelier
    """
    logs = logs.double()
    if bits == 64:
        return logs, logs
    if bits == 8:
        last = logs.amax(-1, keepdim=True) - RANGE
        error = STEP / 2 + logs.abs() * 2**-21  # the top of the row and the codes are put together in fp32
        return torch.where(logs < last + STEP / 2, -math.inf, logs - error), logs + error
    # half a unit in the last place, or half the least number there is; -inf is what was too low for the type
    error = logs.abs() * 2**-11 + 2**-25 if bits == 16 else logs.abs() * 2**-24 + 2**-149
    lost = logs == -math.inf
    return torch.where(lost, -math.inf, logs - error), torch.where(lost, -65504.0, logs + error)


def drift(told: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Bound [p] on the total variation between softmax(told) and softmax of anything between least and most.

    told, least, most  [p, k] log-weights in fp64; -inf for what has none
    """
    top = told.amax(-1, keepdim=True)
    told, least, most = told - top, least - top, most - top
    up = torch.where(most == told, 0.0, most - told)
    apart, order = torch.where(least == told, 0.0, told - least).maximum(up).sort(-1, descending=True)
    told, least, most = (logs.gather(-1, order).exp() for logs in (told, least, most))
    # C is the first j of them, for every j: it is charged by weight, all others by the distance of the next
    none = torch.zeros_like(apart[:, :1])
    charged = torch.cat([none, (most - told).maximum(told - least).cumsum(-1)], -1)
    whole = torch.cat([none, (told - least).cumsum(-1)], -1) + least.sum(-1, keepdim=True)
    found = charged / whole + torch.tanh(torch.cat([apart, none], -1) / 2)
    return found.amin(-1).clamp(max=1.0)
