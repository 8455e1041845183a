"""How well a model guesses batches of items behind one soft prompt or another: forward passes only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from glue.errors import GlueError
from glue.kinds import Running
from glue.kinds.text import longest
from glue.tune.items import Item, draw_batches, read_items
from glue.tune.loop import pad

Guess = Callable[[np.ndarray], float]  # a prompt [t, h] -> the loss of a batch behind it


def guesses(running: Running, tokens: int, *, data: Sequence[tuple[Path, float]], batch_size: int,
            prompt_weight: float, seed: int) -> Iterator[Guess]:
    """One batch after the other, each as the function that judges prompts of so many tokens by it.

    data           dataset folders, and how much of the batches is theirs
    prompt_weight  loss of a question's token, where one of an answer counts 1
    Raises GlueError for an empty dataset, and for an item that is too long beside the prompt.
    """
    from glue.kinds.modelling.prompted import PromptedForCausalLM

    table: Any = running.model.get_input_embeddings().weight
    model = PromptedForCausalLM(running.model, torch.zeros(tokens, table.shape[1])).eval()
    limit = longest(model, running.tokenizer)
    items = [read_items(folder, running.tokenizer, limit) for folder, _ in data]
    for batch in draw_batches(items, [share for _, share in data], batch_size, random.Random(seed)):
        yield _guess(model, batch, prompt_weight)


def _guess(model: Any, batch: list[Item], prompt_weight: float) -> Guess:
    tokens, weight = (part.to(model.device) for part in pad(batch, prompt_weight))

    @torch.inference_mode()
    def guess(prompt: np.ndarray) -> float:
        model.prompt.copy_(torch.from_numpy(prompt))
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = float((each.double() * weight.flatten()).sum() / weight.sum())
        if not np.isfinite(loss):
            raise GlueError("a prompt leads to a loss that is no number", fix="lower sigma")
        return loss

    return guess
