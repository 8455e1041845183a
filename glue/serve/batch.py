"""Rows that are read and written together, one token each at a time, with one cache between them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from glue.kinds.batches import emptied
from glue.serve.problems import Problem
from glue.serve.rows import Row


class Batch:
    """Rows of one running member, padded on the left. Who is done leaves; nobody joins.

    A member that makes no cache, or one that rows cannot be taken out of, reads everything again for each token.

    left  rows whose prompts there was no room for; another batch has to take them
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows, self.left = list(rows), list[Row]()
        self._model: Any = rows[0].running.model
        self._takes = set(inspect.signature(self._model.forward).parameters)
        self._cache: Any = None
        self._mask: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every row; the first time the prompts are read."""
        logits = self._fitting() if self._cache is None else self._next()
        values, tokens = logits[:, :self.rows[0].known].max(-1)
        for line, row, *likeliest in zip(logits, self.rows, values.tolist(), tokens.tolist(), strict=True):
            try:
                if not row.finish:
                    row.take(line, (likeliest[0], likeliest[1]))
            except Problem as problem:  # of this row alone
                row.finish = "failed"
                row.job.fail(problem)
        self.keep([k for k, row in enumerate(self.rows) if not row.finish])

    def keep(self, places: list[int]) -> None:
        """Let all other rows go."""
        if len(places) == len(self.rows):
            return
        self.rows = [self.rows[k] for k in places]
        if self._cache is not None and places:
            chosen = torch.tensor(places, device=self._model.device)
            self._cache.batch_select_indices(chosen.cpu())  # layers may lie on several devices
            assert self._mask is not None
            self._mask = self._mask[chosen]

    def _fitting(self) -> Tensor:
        """`_whole`, of half the rows where the prompts of all are too much for the memory, and again."""
        while True:
            fresh = len(self.rows) > 1 and not any(row.tokens for row in self.rows)
            with suppress(torch.OutOfMemoryError) if fresh else nullcontext():
                return self._whole()
            emptied()
            self.rows[0].running.room.halve()
            middle = (len(self.rows) + 1) // 2
            self.rows, self.left = self.rows[:middle], [*self.rows[middle:], *self.left]

    def _whole(self) -> Tensor:
        """Read all that the rows have, and judge the prompts that are to be judged. -> logits [b, v] of the last"""
        texts = [row.ids + row.tokens for row in self.rows]
        s = max(map(len, texts))
        ids, mask = torch.zeros(2, len(texts), s, dtype=torch.long)
        for k, text in enumerate(texts):
            ids[k, s - len(text):] = torch.tensor(text)
            mask[k, s - len(text):] = 1
        first = not any(row.tokens for row in self.rows)
        judged = first and any(row.judged for row in self.rows)
        more: dict[str, Any] = {"logits_to_keep": 0 if judged else 1} if "logits_to_keep" in self._takes else {}
        device = self._model.device
        self._mask = mask.to(device)
        caches = "past_key_values" in self._takes and any(row.most > 1 for row in self.rows)
        if "use_cache" in self._takes:
            more["use_cache"] = caches
        told = self._ask(ids.to(device), **more)
        cache = told.get("past_key_values") if caches else None
        self._cache = cache if hasattr(cache, "batch_select_indices") else None
        if first:
            for row, route in zip(self.rows, _routes(told.get("routes")) or [None] * len(texts), strict=True):
                row.route = route if row.route is None else row.route
            if judged:
                for line, row in zip(told["logits"], self.rows, strict=True):
                    row.read(line[s - len(row.ids):])
        return told["logits"][:, -1]

    def _next(self) -> Tensor:
        """Read the token that each row wrote last. -> logits [b, v]"""
        assert self._mask is not None
        ids = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self._mask.device)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        told = self._ask(ids, use_cache=True, past_key_values=self._cache)
        self._cache = told["past_key_values"]
        return told["logits"][:, -1]

    def _ask(self, ids: Tensor, **more: Any) -> Any:
        assert self._mask is not None
        if "position_ids" in self._takes:
            more["position_ids"] = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        return self._model(input_ids=ids, attention_mask=self._mask, **more)


def _routes(weights: Tensor | None) -> list[Any] | None:
    """Weights [b, e] or [b, l, e] of a mixture -> for each row who answers it: the expert, one a layer where each
    layer has its own; or, where several answer together, the weight of each."""
    return None if weights is None else [_route(row) for row in weights.cpu()]


def _route(weights: Tensor) -> Any:
    if bool(((weights > 0).sum(-1) == 1).all()):
        return weights.argmax(-1).tolist()
    return weights.double().round(decimals=6).tolist()
