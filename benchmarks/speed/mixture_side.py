"""One mixture, built in a process of its own; prints the seconds and the bytes as a line of JSON.

    python -m benchmarks.speed.mixture_side nothing|random|taught LEVEL LENGTH OUT BASE EXPERT ...

nothing  imports what building needs, and builds nothing
random   with gates that were drawn: writing alone
taught   with gates for which the prompts of the benchmark, of this LENGTH, are dealt out to the experts in turn
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.mixtures import BATCHES, level_of, prompts
from benchmarks.speed.shapes import SHAPES
from glue.checkpoint import Checkpoint
from glue.family import families
from glue.kinds.frame import config_of
from glue.member import Member
from glue.mix.parts import Dev, Parts
from glue.mix.site import Gate, plain


def drawn(row: str, parts: Parts) -> list[Gate]:
    """Random gates, as many as the level has places."""
    config = config_of(parts.frame)
    random = torch.Generator().manual_seed(0)
    places = 1 if row == "model" else config.num_hidden_layers
    return [plain(torch.randn(len(parts.experts), config.hidden_size, generator=random) / config.hidden_size ** 0.5)
            for _ in range(places)]


def taught(row: str, parts: Parts, length: int) -> list[Any]:
    """Gates that send the first prompt to the first expert, the second to the second, and so on."""
    from glue.mix.site import gates

    level, more = level_of(row)
    words, e = config_of(parts.frame).vocab_size, len(parts.experts)
    shape = next(shape for shape in SHAPES.values() if shape.words == words)
    rows = prompts(shape, max(BATCHES), length)
    numbers = torch.arange(len(rows)) % e
    dev = Dev([" ".join(f"w{token}" for token in one) for one in rows.tolist()],
              torch.nn.functional.one_hot(numbers, e).float(), numbers)
    return gates(families("routing").choose("prompt"), level.sites(parts, dev, **more))


def main(what: str, row: str, length: str, out: str, base: str, *experts: str) -> None:
    """Build, or only get ready to."""
    from glue.kinds.mixture import register

    register()
    level, more = level_of(row)
    members = tuple(Member(Path(folder).name, "model", folder) for folder in experts)
    parts = Parts(members, None if row == "model" else Checkpoint(base), members[0])
    seconds = 0.0
    if what == "nothing":
        level.refuse(members, 0, **more)
    else:
        made = drawn(row, parts) if what == "random" else taught(row, parts, int(length))
        began = time.perf_counter()
        level.write(Path(out), parts, made, **more)
        seconds = time.perf_counter() - began
    written = sum(file.stat().st_size for file in Path(out).glob("*.safetensors")) if what != "nothing" else 0
    print(json.dumps({"seconds": seconds, "bytes": written}))


if __name__ == "__main__":
    main(*sys.argv[1:])
