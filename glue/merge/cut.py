"""Cuts: where the largest magnitudes of a tensor begin, found exactly though it is only ever seen in pieces.

A sample says about where. A pass then counts what lies above that bracket and collects the few entries inside; where
it missed, or where more lie inside than may be held, another pass looks in another or a narrower bracket. Magnitudes
are compared as the whole numbers that their bits spell, whose order is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from glue.merge.leaf import Leaf
from glue.merge.target import Glimpse, Pieces

CAP = 1 << 18         # entries inside a bracket that are held, at most
SHARE = 64            # one entry in so many is sampled, at most
RUNS = 256            # of neighbours, that a sample is made of, at most
RUN = 1 << 7, 1 << 12  # entries of a run, at least and at most
SURE = 4              # standard errors from the middle of a bracket to its ends
GOLDEN = 0.618033988749895
Of = Callable[[Leaf], Tensor]


@dataclass(frozen=True)
class Cut:
    """Which entries of a tensor are its largest, so that a piece of it can be judged alone.

    at    [m], fp64, magnitudes; what is larger is kept
    last  [m], the flat index up to which what is just as large is kept too
    """

    at: Tensor
    last: Tensor


def cut_at(pieces: Glimpse, *counts: Sequence[int], of: Of = lambda leaf: leaf.tensors) -> list[Cut]:
    """Where to cut so that the counts[i] entries of largest magnitude in row i remain; one Cut for each `counts`.

    counts  m whole numbers, of 0 to numel
    of      what is cut: a leaf to numbers [m, *shape]; its tensors, unless said otherwise. NaN counts as infinite

    Of entries with equal magnitude at the cut, those with the lower flat index stay.
    """
    cuts = [Cut(torch.full((len(row),), torch.inf, dtype=torch.float64), torch.full((len(row),), -1)) for row in counts]
    searches = {}
    for cut, row in zip(cuts, counts, strict=True):
        for i, count in enumerate(row):
            if count >= pieces.numel:
                cut.at[i], cut.last[i] = 0.0, pieces.numel  # all of them, whatever they are
            elif count:
                searches[id(cut), i] = _Search(i, count)
    _settle(pieces, list(searches.values()), of)
    for cut in cuts:
        for i in range(len(cut.at)):
            if found := searches.get((id(cut), i)):
                cut.at[i], cut.last[i] = found.magnitude, found.last
    return cuts


def ranked(pieces: Glimpse, ranks: Sequence[int], of: Of) -> list[float]:
    """The magnitudes of these ranks in the one row that `of` makes of a leaf; the largest has rank 1."""
    searches = [_Search(0, rank) for rank in ranks]
    _settle(pieces, searches, of)
    return [search.magnitude for search in searches]


def among_largest(numbers: Tensor, cut: Cut, start: int) -> Tensor:
    """Which entries of a piece are among the largest of their tensor.

    numbers  [m, *shape]
    start    flat index, in what was cut, of the first entry of the piece
    returns  [m, *shape], bool
    """
    size = numbers.abs().reshape(len(numbers), -1)
    found = torch.empty(size.shape, dtype=torch.bool, device=size.device)
    for row, out, at, last in zip(size, found, cut.at.tolist(), cut.last.tolist(), strict=True):
        end = within(last, start, len(row))
        torch.ge(row[:end], at, out=out[:end])
        torch.gt(row[end:], at, out=out[end:])
    return found.reshape(numbers.shape)


def within(last: int, start: int, count: int) -> int:
    """How many entries of a piece stand at or before the flat index `last`."""
    return min(max(last + 1 - start, 0), count)


class _Search:
    """A search for the key of one rank in one row, in a bracket from `low` to `high`."""

    def __init__(self, row: int, rank: int):
        self.row, self.rank = row, rank
        self.floor = self.ceiling = 0     # the key is none outside these
        self.times = 1                    # wider than the bracket need be
        self.magnitude, self.last = 0.0, -1

    def aim(self, sample: _Sample | None, numel: int) -> None:
        """Set a bracket by the sample, inside what is known already."""
        aimed = sample.bracket(self.row, self.rank / numel, self.times) if sample else (self.floor, self.ceiling)
        low, high = max(aimed[0], self.floor), min(aimed[1], self.ceiling)
        self.begin(*(low, high) if low <= high else (self.floor, self.ceiling))
        self.times *= 8

    def begin(self, low: int, high: int) -> None:
        """Forget the last pass, and look in another bracket."""
        self.low, self.high = low, high
        self.above = self.held = self.dropped = 0  # entries above the bracket; keys held; bits dropped from each key
        # Where a piece starts and how long it is, its keys inside the bracket, and how often each occurs.
        self.inside: list[tuple[int, int, np.ndarray, np.ndarray | None]] = []

    def look(self, keys: np.ndarray, start: int, most: int) -> None:
        """Count and collect in one piece. No key is larger than `most`."""
        if self.high < most:
            self.above += int(np.count_nonzero(keys > self.high))
        if self.low == self.high:
            count = np.count_nonzero(keys == self.low)
            self.inside.append((start, len(keys), np.array([self.low], keys.dtype), np.array([count])))
            return
        if (self.low, self.high) == (0, most):
            some = keys.copy()
        else:
            # What is below `low` wraps around to large numbers: one comparison does for two.
            unsigned = np.dtype(f"u{keys.itemsize}").type
            width, past_low = unsigned(self.high - self.low), np.subtract(keys, keys.dtype.type(self.low))
            some = keys[np.flatnonzero(past_low.view(unsigned) <= width)]
        self.inside.append((start, len(keys), some >> self.dropped, None))
        self.held += len(some)
        if self.held > CAP:
            self._compress()

    def _compress(self) -> None:
        """Count equal keys together: piece by piece, or of all pieces, or even with fewer bits of each."""
        self.inside = [(start, length, *_counted(some, often)) for start, length, some, often in self.inside]
        if sum(len(some) for _, _, some, _ in self.inside) > CAP // 2:
            keys, often = _counted(*self._all())
            while len(keys) > CAP // 2:
                self.dropped += 1
                keys, often = _counted(keys >> 1, often)
            self.inside = [(0, 0, keys, often)]
        self.held = sum(len(some) for _, _, some, _ in self.inside)

    def _all(self) -> tuple[np.ndarray, np.ndarray | None]:
        keys = np.concatenate([some for _, _, some, _ in self.inside])
        if all(often is None for *_, often in self.inside):
            return keys, None
        return keys, np.concatenate([np.ones(len(some), np.int64) if often is None else often
                                     for _, _, some, often in self.inside])

    def found(self) -> tuple[int, int, int] | Literal["higher", "lower"]:
        """The key of the rank, how many entries of just that key it takes, and how many there are; or where to look."""
        keys, often = self._all()
        wanted, there = self.rank - self.above, len(keys) if often is None else int(often.sum())
        if not 0 < wanted <= there:
            return "higher" if wanted <= 0 else "lower"
        if often is None:
            key = int(np.partition(keys, there - wanted)[there - wanted])
            return key, wanted - int(np.count_nonzero(keys > key)), int(np.count_nonzero(keys == key))
        keys, often = _counted(keys, often)
        reached = often[::-1].cumsum()
        k = int(np.searchsorted(reached, wanted))
        count = int(often[::-1][k])
        return int(keys[::-1][k]), wanted - int(reached[k]) + count, count

    def settled(self, pieces: Glimpse, sample: _Sample | None, of: Of) -> bool:
        """Whether the pass has told magnitude and index; if not, the next bracket is set."""
        found = self.found()
        if isinstance(found, str):
            higher = found == "higher"
            self.floor, self.ceiling = (self.high + 1, self.ceiling) if higher else (self.floor, self.low - 1)
            self.aim(sample, pieces.numel)
            return False
        key, wanted, there = found
        if self.dropped:
            self.begin(max(self.low, key << self.dropped), min(self.high, (key + 1 << self.dropped) - 1))
            return False
        signed = self.inside[0][2].dtype
        self.magnitude, self.last = float(np.array(key, signed).view(f"f{signed.itemsize}")), pieces.numel
        if wanted == there:
            return True  # all that are just as large
        if not self.inside[0][1]:
            self.begin(key, key)  # pieces were counted together, and it is one of them that is asked for
            return False
        for start, length, some, often in self.inside:
            here = int(np.count_nonzero(some == key) if often is None else often[some == key].sum())
            if wanted <= here:
                again = _keys(of(pieces.at(start, length))[self.row])
                self.last = start + int(np.flatnonzero(again == key)[wanted - 1])
                break
            wanted -= here
        return True


class _Sample:
    """Keys of some rows, from runs of neighbours that are spread over a tensor."""

    def __init__(self, pieces: Glimpse, rows: Sequence[int], of: Of):
        most, unit = pieces.numel // SHARE, _unit(pieces)
        runs = max(8, min(RUNS, most // max(unit, RUN[0])))
        count = max(unit, min(RUN[1], most // runs) // unit * unit)
        self.runs: dict[int, list[np.ndarray]] = {row: [] for row in rows}
        room = pieces.numel / runs
        for k in range(runs):
            # At unlike places of their parts, so that no pattern of the tensor repeats in step with the runs.
            start = int(room * k + max(0.0, room - count) * (k * GOLDEN % 1)) // unit * unit
            numbers = of(pieces.at(start, count))
            for row, found in self.runs.items():
                found.append(_keys(numbers[row]))
        self.all = {row: np.sort(np.concatenate(found)) for row, found in self.runs.items()}

    def bracket(self, row: int, share: float, times: int) -> tuple[int, int]:
        """Two keys that the key at this share from the top lies between, so many times wider than it need be."""
        keys = self.all[row]
        middle = min(int(len(keys) * (1 - share)), len(keys) - 1)
        # Runs are more alike inside than a sample of single entries would be, so they tell its error.
        beyond = [np.count_nonzero(run > keys[middle]) / len(run) for run in self.runs[row]]
        reach = int(len(keys) * SURE * times * (np.std(beyond) / len(beyond) ** 0.5 + 1 / len(keys)))
        low, high = middle - reach, middle + reach
        return (int(keys[low]) if low >= 0 else 0,
                int(keys[high]) if high < len(keys) else int(_most(keys.dtype)))


def _settle(pieces: Glimpse, searches: Sequence[_Search], of: Of) -> None:
    """Find the magnitude and the last index of each search."""
    if not searches:
        return
    most = int(_most(_keys(of(pieces.at(0, _unit(pieces)))).dtype))
    sample = _Sample(pieces, sorted({search.row for search in searches}), of) if pieces.numel > CAP else None
    for search in searches:
        search.floor, search.ceiling = 0, most
        search.aim(sample, pieces.numel)
    while searches:
        rows = sorted({search.row for search in searches})
        for leaf in pieces:
            numbers = of(leaf)
            for row in rows:
                keys = _keys(numbers[row])
                for search in searches:
                    if search.row == row:
                        search.look(keys, leaf.offset + leaf.start, most)
        searches = [search for search in searches if not search.settled(pieces, sample, of)]


def _unit(pieces: Glimpse) -> int:
    """Entries that cannot be told apart: those of a row where whole rows are seen."""
    if not isinstance(pieces, Pieces) or pieces.sees == "pieces":
        return 1
    return max(1, pieces.target.header.shape[-1]) if pieces.target.header.shape else 1


def _keys(numbers: Tensor) -> np.ndarray:
    """The bits of magnitudes as whole numbers; of a NaN, those of infinity."""
    row = numbers.reshape(-1).cpu().numpy()
    signed = np.dtype(f"i{row.itemsize}")
    keys, most = np.bitwise_and(row.view(signed), np.iinfo(signed).max), _most(signed)
    return np.minimum(keys, most, out=keys) if keys.max(initial=0) > most else keys


def _most(signed: np.dtype) -> Any:
    """The key of infinity."""
    return np.array(np.inf, f"f{signed.itemsize}").view(signed)[()]


def _counted(keys: np.ndarray, often: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, ascending, and how often it occurs."""
    if often is None:
        return np.unique(keys, return_counts=True)
    found, place = np.unique(keys, return_inverse=True)
    return found, np.bincount(place, often, len(found)).astype(np.int64)
