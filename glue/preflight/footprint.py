"""Footprints: what the processes of one task hold in memory at most, from headers and the words of its line alone.

What grows with the models is told by each step's own module, where one streams, or follows from how many numbers are
run or trained. What processes take before that is the same for all, and was measured: see docs/size.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from glue.checkpoint import Header, Weights
from glue.merge.matrices import layer_matrix
from glue.preflight.headers import Recorded

MAIN = 175_000_000    # bytes of the process that plans and waits: python, torch, what a run imports
POOL = 295_000_000    # of the process from which workers are forked, transformers included, and of its watchdog
WORKER = 25_000_000   # of each worker beside what it shares with that
IDLE = 12_000_000     # of one that has nothing to do: another than those that have is always there
MANY = 1 << 30        # calls: as many as there are workers
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "nf4": 0.5}  # bytes of a number that runs


@dataclass(frozen=True)
class Footprint:
    """What a task holds beside what processes take anyway, in bytes.

    call    one call in a worker, the largest
    calls   how many of these there are at once, at most
    sizes   of all calls, where they are not alike
    beside  the process that waits for them
    exact   whether nothing that may matter is left out
    """

    call: int
    calls: int = 1
    beside: int = 0
    exact: bool = True
    sizes: tuple[int, ...] = ()

    def largest(self, workers: int) -> list[int]:
        """What so many workers hold at most, each its own call."""
        return sorted(self.sizes or [self.call] * min(workers, self.calls), reverse=True)[:workers]

    def times(self, factor: float) -> Footprint:
        """With calls that hold so many times as much."""
        return replace(self, call=int(self.call * factor), sizes=tuple(int(size * factor) for size in self.sizes))

    def peak(self, workers: int) -> int:
        """Private bytes of all processes together; 0 workers are the process that waits."""
        return together([self], workers)


def together(holds: Sequence[Footprint], workers: int) -> int:
    """Private bytes of all processes where these tasks run beside each other; see Footprint.peak."""
    if not workers:  # one after the other
        return MAIN + max((hold.call + hold.beside for hold in holds), default=0)
    calls = sorted((size for hold in holds for size in hold.largest(workers)), reverse=True)[:workers]
    idle = IDLE if len(calls) < workers else 0
    return MAIN + POOL + len(calls) * WORKER + idle + sum(calls) + sum(hold.beside for hold in holds)


def compared(sources: Sequence[Weights], threads: int, *, delta: bool) -> Footprint:
    """All pairs of members, by so many threads that take a matrix each."""
    from glue.cluster.similarity import BLOCK, HELD, LEAST, OPEN

    n = len(sources)
    shapes = [header.shape for header in sources[0].headers.values() if len(header.shape) > 1]
    columns = max((shape[-1] for shape in shapes), default=1)
    entries = n * max(columns, max(BLOCK // n, LEAST))
    largest = max((prod(shape) for shape in shapes), default=0)
    wide = max((header.dtype.itemsize for header in sources[0].headers.values()), default=4)
    work = 8 if wide > 4 else 4
    made = _made(sources)
    number = max(1, min(threads, HELD // max(1, made), OPEN // n))
    blocks = 3 + 2 * delta  # the block, what is cast or multiplied of it, and the sums; with signs these too
    return Footprint(number * (blocks * work * min(entries, n * largest) + 16 * n * columns + made))


def sketched(sources: Sequence[Weights], number: int) -> Footprint:
    """Columns of each member, a member a worker, and all of them beside each other."""
    from glue.cluster.sketch import BLOCK, ENTRIES

    there = min(ENTRIES, max(sum(header.numel for header in source.headers.values()) for source in sources))
    return Footprint(max(8 * there + _made(sources), 8 * min(BLOCK, len(sources) * there)), number)


def extracted(layers: Mapping[str, Header], rank: int | None, nbytes: int, workers: int) -> Footprint:
    """Layers that are cut, as many at once as have room, and their factors, which wait for the last.

    nbytes  of one number of a factor
    """
    from glue.merge.extract import HELD, held

    shapes: list[tuple[int, int]] = [header.shape for header in layers.values()]  # type: ignore[misc]
    largest = max(map(held, shapes))
    number = max(1, min(max(1, workers), len(shapes), HELD // largest))
    kept = sum(min(rank or min(shape), *shape) * sum(shape) for shape in shapes)
    # each worker has its own until all are through, then they lie together
    return Footprint(largest + kept * nbytes // number, number, kept * nbytes, exact=rank is not None)


@dataclass(frozen=True)
class Build:
    """Of a transformer, as its headers tell: layers, width of these and of their MLPs, words of its head."""

    layers: int
    hidden: int
    inner: int
    words: int

    @staticmethod
    def of(headers: Mapping[str, Header]) -> Build | None:
        """None where the names do not tell."""
        table = next((header.shape for name, header in headers.items() if name.endswith(
            ("embed_tokens.weight", "wte.weight", "embed_in.weight", "lm_head.weight"))), ())
        layers = {found[1] for name in headers if (found := re.search(r"\.(\d+)\.", name))}
        widths = [max(header.shape) for name, header in headers.items() if ".mlp." in name and len(header.shape) == 2]
        return Build(len(layers), table[1], max(widths), table[0]) if len(table) == 2 and layers and widths else None

    def trains(self, rows: int, length: int, wide: float = 4, *, again: bool = False) -> int:
        """Bytes of what a pass forward leaves for the way back, of so many texts of so many tokens.

        wide   bytes of the numbers that layers calculate in
        again  layers are gone through a second time on the way back, and leave what goes into them alone

        What a layer takes was measured, with what the C library does not give back: see docs/size.md. At the head the
        logits stand four times in fp32: as they are, as logarithms, and as the gradients of both.
        """
        layer = 16 * self.hidden + 8 * self.inner
        kept = layer + self.layers * self.hidden if again else self.layers * layer
        return int(rows * length * (wide * kept + 4 * 4 * self.words))

    def asks(self, rows: int, length: int) -> int:
        """Bytes of a pass forward alone, in fp32: one layer, and the logits with their logarithms."""
        return 4 * rows * length * (2 * self.hidden + 5 * self.inner + 2 * self.words)


def of_layer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer but for the head, as far as names tell."""
    return name.endswith(".weight") and layer_matrix(name, shape, {}) == "whole"


def _made(sources: Sequence[Weights]) -> int:
    """Bytes of the largest tensor of all members that are in no file, but made when they are asked for."""
    made = [source.headers for source in sources if not isinstance(source, Recorded)]
    return max((sum(headers[name].nbytes for headers in made if name in headers and headers[name].file is None)
                for name in sources[0].headers), default=0)
