"""Drafts: what the tuned small model would write, token by token, on the device."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glue.errors import GlueError
from glue.kinds.source import Scored, Session
from glue.proxy.mixing import Sampling, drawn, offsets


@dataclass(frozen=True)
class Draft:
    """What the device has before anybody judges.

    ids    the drafted tokens, g
    q      [p, v]: what each was drawn from, and after them what the next would be
    log_w  [p, v] fp64: how much tuning raised each token, alpha times
    """

    ids: list[int]
    q: Tensor
    log_w: Tensor


def drafted(text: list[int], length: int, tuned: Session, small: Session, alpha: float, sampling: Sampling,
            rng: np.random.Generator, ends: Collection[int] = (),
            told: Callable[[Tensor], Tensor] = lambda probabilities: probabilities) -> Draft:
    """Draw a draft from the tuned model, and ask the untuned one about the same places. It ends where a text would.

    told  makes of probabilities what others will be told of them, and what is therefore drawn from
    """
    ids: list[int] = []
    logs, rows = [], []
    while True:
        logs.append(_all(tuned.score([*text, *ids], len(text) + len(ids))))
        rows.append(told(sampling(logs[-1])))
        if len(ids) == length or (ids and ids[-1] in ends):
            break
        ids.append(drawn(rows[-1][0].double(), rng.random()))
    was = _all(small.score([*text, *ids], len(text)))
    return Draft(ids, torch.cat(rows), offsets(torch.cat(logs), was, alpha))


def _all(scored: Scored) -> Tensor:
    """Log-probabilities [p, v] of a source that tells them all."""
    if scored.tokens is not None:
        raise GlueError("a small model of the pair told only some of its probabilities",
                        fix="run both on the device; only the large one may be far away")
    return scored.logs.cpu().double()
