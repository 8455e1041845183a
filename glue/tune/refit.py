"""One model taught again and again from where it stands, on parts of the same items.

What differs between two fits is who takes part and nothing else: each epoch goes through the items in an order of its
own, in which those who take part keep their places, and the start is put back to the bit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from glue.kinds import Running
from glue.tune.finetune import with_adapter
from glue.tune.items import Item
from glue.tune.loop import train


class Start:
    """A loaded base, and copies of what a fit changes of it.

    lora  None trains every weight; {"r", "alpha", "targets"} trains an adapter that first changes nothing
    """

    def __init__(self, base: Running, lora: Mapping[str, Any] | None = None, seed: int = 0):
        self.base = base
        self.model: Any = base.model if lora is None else with_adapter(base.model, lora, seed)
        self._held = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()
                      if parameter.requires_grad}

    def taught(self, items: Sequence[Item], part: Collection[int], *, epochs: int, learning_rate: float,
               batch_size: int, prompt_weight: float, seed: int, weight_decay: float = 0.0) -> Running:
        """The base after some epochs on a part of the items, good until the next fit; on none it is as it was."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self._held:
                    parameter.copy_(self._held[name])
        steps = math.ceil(epochs * len(part) / batch_size)
        train(self.model, batches(items, part, epochs, batch_size, seed), steps=steps, learning_rate=learning_rate,
              weight_decay=weight_decay, prompt_weight=prompt_weight, report=lambda step, steps, loss: None)
        return self.base


def batches(items: Sequence[Item], part: Collection[int], epochs: int, batch_size: int,
            seed: int) -> Iterator[list[Item]]:
    """Each epoch in an order of all items, which those that take part keep; the last batch may be smaller."""
    rng, present, batch = random.Random(seed), set(part), list[Item]()
    for _ in range(epochs):
        for k in rng.sample(range(len(items)), len(items)):
            if k in present:
                batch.append(items[k])
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch
