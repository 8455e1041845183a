"""One plain training loop: AdamW, warm-up and cosine, clipping, and a lighter loss on questions than on answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glue.errors import GlueError
from glue.tune.items import Item

Report = Callable[[int, int, float], None]  # step, of how many, loss
Loss = Callable[[list[Item], Tensor, Tensor], Tensor]  # see `surprise`
WARM_UP, FLOOR = 0.05, 0.05  # share of the steps; share of the learning rate at the end
BETAS, CLIP = (0.9, 0.98), 1.0
PIECES = 2  # a batch is sorted by length and cut, so that short items are not padded to the longest


def surprise(items: list[Item], tokens: Tensor, logits: Tensor) -> Tensor:
    """The loss of each next token: how unlikely it was. tokens [b, s + 1], logits [b, s, v] -> [b, s]"""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(tokens[:, 1:].shape)


def train(model: nn.Module, batches: Iterator[list[Item]], *, steps: int, learning_rate: float,
          weight_decay: float, prompt_weight: float, report: Report, loss: Loss = surprise) -> None:
    """Train the parameters of `model` that require a gradient, in place.

    weight_decay   on matrices only
    prompt_weight  loss of a question's token, where one of an answer counts 1
    loss           what is made small, place by place

    The same bits for the same batches where torch runs on one thread. Raises GlueError where the loss, or its
    gradient, is no number.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in learned if parameter.ndim > 1]
    vectors = [parameter for parameter in learned if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=learning_rate, betas=BETAS, fused=True)
    model.train()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share_of_rate(step, steps)
        lost = _backward(model, next(batches), prompt_weight, loss)
        norm = float(nn.utils.clip_grad_norm_(learned, CLIP))
        if not math.isfinite(lost + norm):
            raise GlueError(f"the training diverged at step {step} of {steps}: loss {lost:.4g}, "
                            f"gradient norm {norm:.4g}", fix=f"lower learning_rate ({learning_rate})")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(step, steps, lost)
    model.eval()


def share_of_rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step (from 1): linear over the first 5%, then a cosine down to 5%."""
    warm = max(1, round(WARM_UP * steps))
    if step <= warm:
        return step / warm
    done = (step - warm) / max(1, steps - warm)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2


def _backward(model: nn.Module, batch: list[Item], prompt_weight: float, loss: Loss) -> float:
    """Add the gradient of the batch's mean loss, and return that loss."""
    ordered = sorted(batch, key=lambda item: len(item.tokens))
    size = math.ceil(len(ordered) / PIECES)
    pieces = [(some, *pad(some, prompt_weight)) for some in (ordered[k:k + size] for k in range(0, len(ordered), size))]
    whole = sum(float(weights.sum()) for _, _, weights in pieces)
    device = next(model.parameters()).device
    lost = 0.0
    for some, tokens, weights in pieces:
        tokens, weights = tokens.to(device), weights.to(device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        piece = (loss(some, tokens, logits).flatten() * weights.flatten()).sum() / whole
        piece.backward()
        lost += piece.item()
    return lost


def pad(items: list[Item], prompt_weight: float) -> tuple[Tensor, Tensor]:
    """Items as tokens [b, s], filled up on the right with the last token, and weights [b, s - 1] of the next tokens.

    A filled place has weight 0; no mask is needed, since no earlier token sees it.
    """
    longest = max(len(item.tokens) for item in items)
    tokens = torch.tensor([item.tokens + item.tokens[-1:] * (longest - len(item.tokens)) for item in items])
    weights = torch.tensor([[prompt_weight] * (item.question - 1) + [1.0] * (len(item.tokens) - item.question)
                            + [0.0] * (longest - len(item.tokens)) for item in items])
    return tokens, weights
