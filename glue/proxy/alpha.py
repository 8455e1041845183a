"""How much of what tuning has changed is to be added: every alpha judged on right answers, in one pass of the parts.

Nothing is written, so nothing is generated. The parts do not depend on alpha, so each reads every answer once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glue.kinds.batches import Room

BATCH_TOKENS = 4096  # padded tokens that are read at once

Row = tuple[Sequence[int], int]  # tokens of a question and its right answer; how many of them are the answer


@dataclass(frozen=True)
class Judged:
    """What each alpha makes of each answer.

    losses  [a, n] in nats of the whole answer
    moved   [a, n] KL(p || p_large) in nats, the mean over the answer's tokens
    """

    losses: Tensor
    moved: Tensor


@torch.inference_mode()
def judged(parts: Callable[[Tensor], tuple[Tensor, Tensor]], rows: Sequence[Row], alphas: Sequence[float],
           room: Room | None = None) -> Judged:
    """Judge alphas on right answers, in fp64.

    parts  token ids [b, s] -> logits of the large member, and what tuning has changed in the small one's: [b, s, v]
    room   how much they read at once
    """
    found, room = torch.zeros(2, len(alphas), len(rows), dtype=torch.float64), room or Room()
    order = sorted(range(len(rows)), key=lambda k: -len(rows[k][0]))
    while order:
        width = len(rows[order[0]][0])
        most = room.of(BATCH_TOKENS // width)
        some, order = order[:most], order[most:]
        ids = torch.zeros(len(some), width, dtype=torch.long)
        for line, k in enumerate(some):  # padded on the right, where no token that counts can see it
            ids[line, :len(rows[k][0])] = torch.tensor(list(rows[k][0]))

        def of(part: Sequence[int], some: Sequence[int] = some, ids: Tensor = ids) -> list[Tensor]:
            large, change = parts(ids[list(part)])
            return [_judged(large[j], change[j], ids[line], rows[some[line]], alphas) for j, line in enumerate(part)]

        found[:, :, some] = torch.stack(room.read(range(len(some)), of), dim=-1)
    return Judged(found[0], found[1])


def _judged(large: Tensor, change: Tensor, ids: Tensor, row: Row, alphas: Sequence[float]) -> Tensor:
    """One answer: its loss, and how far it moved, with each alpha. [2, a]"""
    (tokens, count), found = row, torch.zeros(2, len(alphas), dtype=torch.float64)
    places = slice(len(tokens) - 1 - count, len(tokens) - 1)
    below, steer = large[places].double().cpu(), change[places].double().cpu()
    before, right = below.log_softmax(-1), ids[places.start + 1:places.stop + 1, None]
    for a, alpha in enumerate(alphas):
        logs = (below + alpha * steer if alpha else below).log_softmax(-1)
        found[0, a] = -logs.gather(1, right).sum()
        found[1, a] = (logs.exp() * (logs - before)).nan_to_num(0.0).sum(1).mean()
    return found

