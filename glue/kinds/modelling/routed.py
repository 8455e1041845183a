"""What mixtures that decide prompt by prompt have in common: a router, weights, and a cache of each expert's rows.

Letters as in model_mixture.py. This file needs torch and transformers and nothing else, and is copied beside weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache


class Router(nn.Module):
    """Pooled states [b, h] -> logits [b, e]: standardise, one hidden layer if it has a width, one linear map."""

    mean: Tensor
    scale: Tensor

    def __init__(self, hidden: int, experts: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("scale", torch.ones(hidden))
        self.inner = nn.Linear(hidden, width) if width else None
        self.outer = nn.Linear(width or hidden, experts)

    def forward(self, pooled: Tensor) -> Tensor:
        """[b, h] -> [b, e]"""
        state = (pooled.to(self.mean) - self.mean) / self.scale
        if self.inner is not None:
            state = self.inner(state).relu()
        return self.outer(state)


def positions(attention_mask: Tensor, length: int) -> Tensor:
    """Position of each of the last `length` tokens, padding not counted. [b, s] -> [b, length]"""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def averaged(state: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean over the tokens that are not padding, whatever stands there, in fp32. [b, s, h] -> [b, h]"""
    if attention_mask is None:
        return state.float().sum(1) / max(state.shape[1], 1)
    real = attention_mask.to(state.device).bool().unsqueeze(-1)
    return state.float().masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)


def chosen(logits: Tensor, k: int) -> Tensor:
    """Router logits to weights: softmax, the k largest (the first among equals), renormalised. [b, e] -> [b, e]"""
    weights = logits.float().softmax(-1)
    order = weights.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(weights).scatter(1, order, weights.gather(1, order))
    return kept / kept.sum(-1, keepdim=True)


def answering(weights: Tensor) -> list[tuple[int, Tensor]]:
    """The experts that answer, each with the rows [n] that it answers, in their order. weights [b, e]"""
    asked = (weights > 0).cpu()  # one wait for the device, not one for each expert
    return [(i, rows.nonzero()[:, 0].to(weights.device)) for i, rows in enumerate(asked.unbind(1)) if bool(rows.any())]


def only(rows: Tensor, tensor: Tensor | None) -> Tensor | None:
    """These rows of a tensor that may not be there."""
    return tensor if tensor is None or len(rows) == len(tensor) else tensor[rows.to(tensor.device)]


class RoutedCache(Cache):
    """One cache per expert, holding the rows that this expert answers, with the weights decided for every row.

    weights  [b, e]; never change once a prompt was read
    trunk    of all rows, where there is a trunk
    """

    def __init__(self, weights: Tensor, experts: Sequence[PreTrainedModel], trunk: Cache | None = None):
        super().__init__(layers=[])
        self.slots: list[Cache] = [DynamicCache(config=expert.config) for expert in experts]
        self.trunk = trunk
        self.weights, self.rows = weights, answering(weights)

    def _all(self) -> list[Cache]:
        return self.slots if self.trunk is None else [*self.slots, self.trunk]

    def adopt(self, i: int, slot: Cache) -> None:
        """Take over what expert i has read of all rows, for the rows that it answers."""
        for j, rows in self.rows:
            if j == i:
                if len(rows) < len(self.weights):
                    slot.batch_select_indices(rows.cpu())
                self.slots[i] = slot

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far; the same for every expert that has rows."""
        return max(slot.get_seq_length() for slot in self.slots)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, which is no limit."""
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        indices = indices.to(self.weights.device)
        for weight, slot in zip(self.weights.unbind(1), self.slots, strict=True):
            place = torch.where(weight > 0, (weight > 0).cumsum(0) - 1, -1)[indices]
            slot.batch_select_indices(place[place >= 0].cpu())  # layers may lie on several devices
        if self.trunk is not None:
            self.trunk.batch_select_indices(indices.cpu())
        self.weights = self.weights[indices]
        self.rows = answering(self.weights)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; beam search asks for this."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times, one after the other."""
        rows = torch.arange(len(self.weights), device=self.weights.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given negative, as transformers does."""
        for slot in self._all():
            slot.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens; routes stay."""
        for slot in self._all():
            slot.reset()

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.weights)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace."""
        return all(slot.is_croppable for slot in self._all())
