"""What a training reads: datasets in tokens, the batches in their order, and how many of them there are."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glue.tune.items import Item, Items, Template, TooLong, by_length, draw_batches, read_items
from glue.tune.kept import Kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOGETHER = 32  # batches that share their items by length
LONG = 5.0  # seconds that making tokens may take before they are worth keeping
NOTE = "read.json"
Steps = int | Mapping[str, float]  # how many, or {"epochs": n}


@dataclass(frozen=True)
class Reading:
    """How datasets become batches.

    max_length       the most tokens of an item, below what the model takes; 0: as many as it takes
    too_long         what is done with longer ones; see `read_items`
    template         what is done with conversations; see `read_items`
    group_by_length  whether batches have items of like lengths
    """

    max_length: int = 0
    too_long: TooLong = "refuse"
    template: Template = "plain"
    group_by_length: bool = False


@dataclass(frozen=True)
class Read:
    """Batches, how many of them are meant, and how many items were left out or cut."""

    batches: Iterator[list[Item]]
    steps: int
    left_out: int
    cut: int


def read(data: Sequence[tuple[Path, float]], tokenizer: PreTrainedTokenizerBase, limit: int, *, steps: Steps,
         batch_size: int, seed: int, reading: Reading, kept: Kept | None = None) -> Read:
    """Read dataset folders, and draw from them by weight.

    limit  the most tokens that the model takes
    steps  {"epochs": n}: so many that n times as many items are drawn as there are
    kept   where tokens are kept that took long to make, for a training that is gone on with
    Raises what `read_items` raises.
    """
    most = min(limit, reading.max_length) if reading.max_length else limit
    datasets = _kept(kept, len(data)) if kept else []
    began = time.monotonic()
    for folder, _ in data[len(datasets):]:
        datasets.append(read_items(folder, tokenizer, most, template=reading.template, too_long=reading.too_long))
    if kept and time.monotonic() - began > LONG:
        kept.put(NOTE, "read", {f"{k}/{name}": tensor for k, items in enumerate(datasets)
                                for name, tensor in items.tensors().items()}, {})
    items = sum(map(len, datasets))
    count = steps if isinstance(steps, int) else math.ceil(steps["epochs"] * items / batch_size)
    batches = draw_batches(datasets, [weight for _, weight in data], batch_size, random.Random(seed))
    if reading.group_by_length:
        together = min(TOGETHER, max(1, items // batch_size))  # more would put the same items into a batch twice
        batches = by_length(batches, count, together, random.Random(f"{seed} by length"))
    return Read(batches, count, sum(items.left_out for items in datasets), sum(items.shortened for items in datasets))


def _kept(kept: Kept, count: int) -> list[Items]:
    """The datasets in tokens, as an earlier run has left them; none where it has not, or they cannot be used."""
    _, tensors, _ = kept.got(NOTE) or ("", {}, {})
    kept.unused = ""  # these are only made again
    if not tensors:
        return []
    return [Items.of({name: tensors[f"{k}/{name}"] for name in ("tokens", "ends", "questions", "answers", "apart")})
            for k in range(count)]
