"""Paths through a mixture of layers: which expert of each layer answers which rows, and the cache that keeps to it.

Letters as in block_mixture.py. This file needs torch and transformers and nothing else, and is copied beside weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache


class Plan:
    """Which expert of one layer answers which rows, worked out once from weights [b, e] for all tokens to come.

    rows    expert -> its rows, for experts that have any
    alone   the expert that answers every row with all the weight, or None
    order   [n] row of each answer, those of one expert together; None where each expert here answers all rows
    back    [b, k] where in that order the answers of a row are
    shares  [b, k, 1, 1] how much each counts, fp32; None where there is one a row
    """

    def __init__(self, weights: Tensor):
        told = weights.tolist()
        takers = [[expert for expert, share in enumerate(shares) if share > 0] for shares in told]
        found = {expert: [row for row, some in enumerate(takers) if expert in some] for expert in range(len(told[0]))}
        self.rows = {expert: rows for expert, rows in found.items() if rows}
        single = all(len(some) == 1 for some in takers)
        self.alone = next(iter(self.rows)) if single and len(self.rows) == 1 else None
        self.order: Tensor | None = None
        self.shares: Tensor | None = None
        if self.alone is not None:
            return
        answers = [(row, expert) for expert, rows in self.rows.items() for row in rows]
        if len(answers) < len(self.rows) * len(told):
            self.order = torch.tensor([row for row, _ in answers], device=weights.device)
        place, most = {answer: k for k, answer in enumerate(answers)}, max(map(len, takers))
        even = [some + some[:1] * (most - len(some)) for some in takers]  # the first counts again, for nothing
        self.back = torch.tensor([[place[row, i] for i in some] for row, some in enumerate(even)],
                                 device=weights.device)
        if not single:
            self.shares = torch.tensor([[shares[i] if j < len(some) else 0.0 for j, i in enumerate(full)]
                                        for shares, some, full in zip(told, takers, even, strict=True)],
                                       device=weights.device)[:, :, None, None]

    def gathered(self, value: Tensor | None, rows: int) -> list:
        """What each expert is given of something that may have a row for each row of the batch."""
        if self.order is None or not isinstance(value, Tensor) or value.shape[0] != rows or rows == 1:
            return [value] * len(self.rows)
        sizes = [len(found) for found in self.rows.values()]
        return list(value.index_select(0, self.order.to(value.device)).split(sizes))

    def joined(self, answers: Sequence[Tensor]) -> Tensor:
        """The answers of the experts, each [n, s, h], as one of each row. [b, s, h]"""
        every = torch.cat(list(answers))
        back = self.back.to(every.device)  # a route that was given is on the device of the prompt
        if self.shares is None:
            return every.index_select(0, back[:, 0])
        shares = self.shares.to(every.device)
        total = every.index_select(0, back[:, 0]).float() * shares[:, 0]
        for k in range(1, back.shape[1]):
            total += every.index_select(0, back[:, k]).float() * shares[:, k]
        return total.to(every.dtype)


class Routes:
    """What is decided so far: weights [b, e] and the plan of each layer that has experts, in their order."""

    def __init__(self, weights: Sequence[Tensor] = ()):
        self.weights, self.plans = list(weights), [Plan(each) for each in weights]
        self._stacked: Tensor | None = None

    def decide(self, weights: Tensor) -> None:
        """What the next layer has decided."""
        self.weights.append(weights)
        self.plans.append(Plan(weights))
        self._stacked = None

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        for i, weights in enumerate(self.weights):
            kept = weights[rows.to(weights.device)]
            if not torch.equal(kept, weights):  # the beams of one prompt have one route, so this is rare
                self.weights[i], self.plans[i], self._stacked = kept, Plan(kept), None

    def stacked(self, like: Tensor) -> Tensor:
        """All weights, on the device of `like`. [b, l, e]"""
        if self._stacked is None or self._stacked.device != like.device:
            self._stacked = torch.stack([each.to(like.device) for each in self.weights], dim=1)
        return self._stacked


def slot(layer: int, expert: int, dense: int, experts: int) -> int:
    """Where a cache has the keys and values of one expert of a layer; layers of the trunk have one place each."""
    return layer if layer < dense else dense + (layer - dense) * experts + expert


class PathCache(Cache):
    """Keys and values of each layer and expert, holding the rows that this expert answers, with the routes decided.

    routes  nothing until a prompt is read; then they stay, whatever is read or forgotten
    """

    layers: list[Any]

    def __init__(self, config: PretrainedConfig, dense: int, experts: int):
        copies = [DynamicCache(config=config).layers for _ in range(experts)]
        depth = len(copies[0])
        super().__init__(layers=[copies[0][i] for i in range(dense)]
                         + [copy[i] for i in range(dense, depth) for copy in copies])
        self.dense, self.experts, self.routes = dense, experts, Routes()
        self._sliding = [layer.is_sliding for layer in self.layers]

    def _live(self, place: int) -> int:
        """A slot of the same layer that has rows; all of them have read as much."""
        number = (place - self.dense) // self.experts
        if place < self.dense or number >= len(self.routes.plans):
            return place
        return slot(self.dense + number, next(iter(self.routes.plans[number].rows)), self.dense, self.experts)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far; the same for every slot that has rows."""
        return self.layers[self._live(layer_idx)].get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that this many new tokens will see."""
        return self.layers[self._live(layer_idx)].get_mask_sizes(query_length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        rows = indices.tolist()
        for layer in self.layers[:self.dense]:
            layer.batch_select_indices(indices.cpu())  # layers may lie on several devices
        for number, plan in enumerate(self.routes.plans):
            for expert, held in plan.rows.items():
                place = {row: k for k, row in enumerate(held)}
                kept = [place[row] for row in rows if row in place]
                layer = self.layers[slot(self.dense + number, expert, self.dense, self.experts)]
                if kept != list(range(len(held))) and layer.is_initialized:
                    layer.batch_select_indices(torch.tensor(kept, dtype=torch.long, device=layer.keys.device))
        self.routes.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; beam search asks for this."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times, one after the other."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given negative, as transformers does."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.crop(tokens_to_remove)

    @property
    def batch_size(self) -> int:
        """Rows; -1 as long as nothing was read."""
        held = self.routes.weights or [layer.keys for layer in self.layers if layer.is_initialized]
        return len(held[0]) if held else -1

    @property
    def is_sliding(self) -> list[bool]:
        """Whether each slot forgets what lies before a window."""
        return self._sliding
