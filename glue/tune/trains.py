"""Tensor-train adapters taught: a chain of small cores beside each layer, all of them, or one that is zero at first."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from random import Random
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from glue.errors import GlueError, did_you_mean
from glue.kinds import load
from glue.kinds.tt import SIDE, Train, sides, write_trains
from glue.member import Member
from glue.tune.items import draw_batches, read_items
from glue.tune.loop import Report, train

Cores = Literal["all", "one"]


class Changed(nn.Module):
    """A linear layer with the change of a train beside it; the layer itself is not trained."""

    def __init__(self, layer: nn.Linear, start: Train, cores: Cores):
        super().__init__()
        self.layer, self.rows = layer, start.rows
        most = zeroed(start)
        self.cores = nn.ParameterList(nn.Parameter(core.float(), requires_grad=cores == "all" or k == most)
                                      for k, core in enumerate(start.cores))

    def train_now(self) -> Train:
        """The cores as they are."""
        return Train(tuple(self.cores), self.rows)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., m]"""
        a, b = self.train_now().factors()
        return self.layer(x) + (x @ a.T) @ b.T


def taught_trains(out: Path, *, base: Member, data: Sequence[tuple[Path, float]], steps: int, learning_rate: float,
                  rank: int, targets: Sequence[str], report: Report, side: int = SIDE, cores: Cores = "all",
                  shared: int = 0, batch_size: int = 64, weight_decay: float = 0.0, prompt_weight: float = 0.05,
                  seed: int = 0, device: str = "cpu") -> None:
    """Teach a train of at most this rank for each named layer, and write them into `out`.

    cores   all; or one, the largest, while the others stay as `shared` draws them: means of such trains are exact
    shared  seed of the first cores, so that all who have it begin alike
    Raises GlueError for an unknown layer, an empty dataset, an item that is too long, a loss that is no number.
    """
    running = load(base, device=device)
    model = running.model.requires_grad_(False)
    found: dict[str, Changed] = {}
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    known = {name.rsplit(".", 1)[-1] for name in linear}
    for target in targets:
        if target not in known:
            raise GlueError(f"the base has no layer '{target}' to adapt{did_you_mean(target, known)}",
                            fix="name linear layers, such as q_proj and v_proj")
    for name, layer in linear.items():
        if name.rsplit(".", 1)[-1] in targets:
            begun = start(name, (layer.out_features, layer.in_features), rank, side, shared)
            found[name] = Changed(layer, begun, cores).to(device)
            model.set_submodule(name, found[name])
    items = [read_items(folder, running.tokenizer, model.config.max_position_embeddings) for folder, _ in data]
    batches = draw_batches(items, [share for _, share in data], batch_size, Random(seed))
    train(model, batches, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay,
          prompt_weight=prompt_weight, report=report)
    write_trains(out, {name: Train(tuple(core.detach().cpu() for core in changed.cores), changed.rows)
                       for name, changed in found.items()})


def start(name: str, shape: tuple[int, int], rank: int, side: int, seed: int) -> Train:
    """A train that changes nothing: its largest core is zero, and what stands on both sides of it keeps lengths.

    So the change is as long as that core. The others depend on seed, layer and place alone.
    """
    rows, columns = (sides(extent, side) for extent in shape)
    every = (*rows, *columns)
    ends = [1, *(min(rank, prod(every[:k]), prod(every[k:])) for k in range(1, len(every))), 1]
    empty = Train(tuple(torch.zeros(ends[k], each, ends[k + 1]) for k, each in enumerate(every)), len(rows))
    most, cores = zeroed(empty), list(empty.cores)
    for k, core in enumerate(cores):
        if k == most:
            continue
        drawn = torch.from_numpy(np.random.default_rng([seed, k, *name.encode()]).standard_normal(tuple(core.shape)))
        if k < most:  # columns of length one, orthogonal to each other
            cores[k] = torch.linalg.qr(drawn.reshape(-1, core.shape[2])).Q.reshape(core.shape)
        else:
            cores[k] = torch.linalg.qr(drawn.reshape(core.shape[0], -1).T).Q.T.reshape(core.shape)
    return Train(tuple(core.float() for core in cores), len(rows))


def zeroed(one: Train) -> int:
    """Which core is zero at first: the one with the most numbers."""
    return max(range(len(one.cores)), key=lambda k: one.cores[k].numel())
