"""Zeroth-order tuning: the slope of the loss along a seeded direction, from two losses, and a step along it.

No gradient is computed, so there is no backward pass and no optimizer; beside the weights there are a copy of them and
one direction. What a step has learnt is one number, and what it changed follows from that and the direction's seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glue.errors import GlueError
from glue.kinds import load, weights
from glue.kinds.draws import drawn
from glue.kinds.seed_history import History
from glue.member import Member
from glue.tune.items import Item, draw_batches, read_items
from glue.tune.loop import Report, pad

Loss = Callable[[], float]


def taught(base: Member, history: History, *, data: Sequence[tuple[Path, float]], places: np.ndarray, epsilon: float,
           batch_size: int, prompt_weight: float, seed: int, report: Report,
           tempered: Callable[[float], float] = float, device: str = "cpu") -> np.ndarray:
    """Walk on from where a history of the base has come to; returns the slope of each step, [t] in fp32.

    places    [t], which of the history's directions each step takes
    tempered  what is done to a slope before anything depends on it: clipped, noised
    Raises GlueError for an empty dataset, an item that is too long, a slope that is no number, and for a base whose
    files call tensors otherwise than its architecture does.
    """
    running = load(base, device=device)
    moving = moved(running.model, base, history)
    with torch.no_grad():
        for name, parameter in moving.items():
            parameter.copy_(history.replayed(name, parameter))
    items = [read_items(folder, running.tokenizer, running.model.config.max_position_embeddings) for folder, _ in data]
    batches = draw_batches(items, [share for _, share in data], batch_size, random.Random(seed))
    losses = (_asked(running.model, batch, prompt_weight) for batch in batches)
    return walk(moving, losses, places, seed=history.seed, learning_rate=history.learning_rate, epsilon=epsilon,
                tempered=tempered, report=report)


def moved(model: nn.Module, base: Member, history: History) -> dict[str, nn.Parameter]:
    """The parameters that a history moves, by the names that they have in the files of the base."""
    named = dict(model.named_parameters())
    names = [name for name, header in weights(base).headers.items() if history.moves(name, header)]
    if lost := sorted(set(names) - set(named)):
        raise GlueError(f"'{base.name}' has a tensor '{lost[0]}' in its files, and its architecture has none so called",
                        fix="name the layers to move (targets), or write the base again with transformers")
    if not names:
        raise GlueError(f"no tensor of '{base.name}' belongs to {', '.join(history.targets)}",
                        fix="targets are words in the names of tensors, such as q_proj")
    return {name: named[name] for name in names}


def walk(weights: Mapping[str, Tensor], losses: Iterator[Loss], places: np.ndarray, *, seed: int, learning_rate: float,
         epsilon: float, tempered: Callable[[float], float] = float,
         report: Report = lambda step, steps, loss: None) -> np.ndarray:
    """Change weights in place, one step a direction; returns the slope that each step went down by, [t] in fp32.

    losses  for each step the loss of its batch, at whatever the weights are when it is called
    places  [t]
    """
    slopes = np.empty(len(places), dtype=np.float32)
    for step, (place, loss) in enumerate(zip(places, losses, strict=False)):
        z = direction(weights, seed, int(place))
        found, mean = slope(weights, z, loss, epsilon)
        slopes[step] = tempered(found)
        if not math.isfinite(slopes[step]):
            raise GlueError(f"the training diverged at step {step + 1} of {len(places)}: slope {found:.4g}",
                            fix=f"lower learning_rate ({learning_rate}) or epsilon ({epsilon})")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.sub_(z[name], alpha=learning_rate * float(slopes[step]))
        report(step + 1, len(places), mean)
    return slopes


def direction(weights: Mapping[str, Tensor], seed: int, place: int) -> dict[str, Tensor]:
    """The direction that a seed stands for, tensor by tensor; drawn on the CPU, whatever the weights are on."""
    return {name: torch.from_numpy(drawn(seed, place, name, 0, np.empty(weight.numel(), dtype=np.float32)))
            .view(weight.shape).to(weight.device) for name, weight in weights.items()}


@torch.no_grad()
def slope(weights: Mapping[str, Tensor], z: Mapping[str, Tensor], loss: Loss, epsilon: float) -> tuple[float, float]:
    """[L(w + epsilon z) - L(w - epsilon z)] / (2 epsilon), and the mean of the two losses.

    Both points are made from a copy of the weights, which is put back: adding and taking away again would leave what
    rounding leaves.
    """
    held = {name: weight.clone() for name, weight in weights.items()}
    found = []
    try:
        for way in (epsilon, -epsilon):
            for name, weight in weights.items():
                torch.add(held[name], z[name], alpha=way, out=weight)
            found.append(loss())
    finally:
        for name, weight in weights.items():
            weight.copy_(held[name])
    return (found[0] - found[1]) / (2 * epsilon), sum(found) / 2


def _asked(model: nn.Module, batch: list[Item], prompt_weight: float) -> Loss:
    """The mean loss over the tokens of a batch, summed in fp64, since two of them are subtracted."""
    tokens, weight = pad(batch, prompt_weight)
    device = next(model.parameters()).device
    tokens, weight = tokens.to(device), weight.to(device)

    def loss() -> float:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return float((each.double() * weight.flatten()).sum() / weight.sum())

    return loss
