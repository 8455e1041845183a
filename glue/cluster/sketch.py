"""Sketches: a few megabytes of a model, kept beside it, from which its likeness to hundreds of others is estimated.

A sketch holds some whole columns of every matrix that similarity looks at, in the type of the model. Which columns
depends on the names and shapes of the matrices alone, so that between two models of one build the cosines of these
columns are exact, also of what they differ from a base that has a sketch. Their mean estimates the mean over all
columns. With k of c columns of each of T matrices, whose cosines have variance s^2, its standard error is
sqrt(sum of s^2 / k * (1 - k / c)) / T, itself estimated from the sampled columns; 0 where all columns are there.
What it cannot see are weights that are not numbers in columns that are not sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glue.checkpoint import Weights, read_header
from glue.cluster.similarity import PARTS, Part, Progress, matrices, similarity
from glue.errors import CheckpointError
from glue.files import write_aside

VERSION = 1
ENTRIES = 1 << 21  # of a sketch: 4 MB of bf16
LEAST = 4          # columns of a matrix, however large it is: fewer say too little of their spread
SURE = 5.0         # standard errors on either side of an estimate, within which the exact cosine is taken to be
ROUNDED = 1e-5     # by how much rounding may move a cosine
BLOCK = 1 << 22    # entries that are compared at a time


@dataclass(frozen=True)
class Sketch:
    """Sampled columns of a model.

    columns      length -> [m, length], all columns that are so long: by matrix in the order of names, then by index
    matrices     name and shape of what was sampled, by name
    entries      about how many entries it was to have
    fingerprint  of the weights
    """

    columns: Mapping[int, Tensor]
    matrices: tuple[tuple[str, tuple[int, ...]], ...]
    entries: int
    fingerprint: str

    @property
    def build(self) -> tuple:
        """Two sketches with equal builds hold the same columns."""
        return self.matrices, self.entries

    def save(self, file: Path) -> None:
        """Write one safetensors file, so that a reader never sees a part of it."""
        from safetensors.torch import save

        # in one value, since the library writes several in an order of its own: equal sketches are equal files
        told = {"sketch": json.dumps({"version": VERSION, "fingerprint": self.fingerprint, "entries": self.entries,
                                      "matrices": self.matrices})}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, save({str(length): found.contiguous() for length, found in self.columns.items()}, told))

    @staticmethod
    def load(file: Path) -> Sketch:
        """Map a file that `save` wrote; nothing is read before it is used, and no file stays open.

        Raises CheckpointError where it is damaged, or of another version.
        """
        headers, told = read_header(file), _metadata(file)
        if told.get("version") != VERSION:
            raise CheckpointError(f"{file} is no sketch of version {VERSION}", fix="remove it; it is made again")
        storage: Any = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
        mapped = torch.empty(0, dtype=torch.uint8).set_(storage)
        columns = {int(name): mapped[header.start:header.start + header.nbytes].view(header.dtype).view(header.shape)
                   for name, header in headers.items()}
        named = tuple((name, tuple(shape)) for name, shape in told["matrices"])
        return Sketch(columns, named, told["entries"], told["fingerprint"])


def sketch(weights: Weights, *, entries: int = ENTRIES) -> Sketch:
    """The sketch of a model, from one read of its matrices. Raises CheckpointError where it has nothing to compare."""
    named = matrices(weights, "all", "it")
    found: dict[int, list[Tensor]] = {}
    for name, columns in _chosen(named, entries).items():
        # a copy of a checkpoint maps its files anew, so that the pages go with the tensor
        tensor = copy(weights)[name].flatten(0, -2)
        found.setdefault(tensor.shape[0], []).append(tensor[:, torch.from_numpy(columns)].T)
    wide: torch.dtype | None = None
    for taken in (one for several in found.values() for one in several):
        wide = taken.dtype if wide is None else torch.promote_types(wide, taken.dtype)
    return Sketch({length: torch.cat([one.to(wide) for one in several]) for length, several in found.items()},
                  named, entries, weights.fingerprint)


def compare(sketches: Sequence[Sketch], *, part: Part = "all",
            base: Sketch | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, its standard error) of all pairs, each [n, n] float64; NaN between members of other build.

    base  compare what was changed from this
    """
    n = len(sketches)
    cosine, error = np.full((n, n), np.nan), np.full((n, n), np.nan)
    np.fill_diagonal(cosine, 1.0)
    np.fill_diagonal(error, 0.0)
    groups: dict[tuple, list[int]] = {}
    for k, one in enumerate(sketches):
        if base is None or one.build == base.build:
            groups.setdefault(one.build, []).append(k)
    for members in groups.values():
        if len(members) > 1:
            found = _all_pairs([sketches[k] for k in members], part, base)
            for result, values in zip((cosine, error), found, strict=True):
                result[np.ix_(members, members)] = np.triu(values, 1) + np.triu(values, 1).T + np.diag(
                    result[members, members])
    return cosine, error


def compare_one(new: Sketch, many: Sequence[Sketch], *, part: Part = "all",
                base: Sketch | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, its standard error) of one member and each of many, each [n] float64; NaN where the build differs."""
    cosine, error = np.full(len(many), np.nan), np.full(len(many), np.nan)
    if base is not None and base.build != new.build:
        return cosine, error
    spans = _spans(new)
    ours = {length: _less(new, length, base) for length in new.columns}
    squares = {length: found.square().sum(1) for length, found in ours.items()}
    for k, other in enumerate(many):
        if other.build != new.build:
            continue
        cosines = {}
        for length, one in ours.items():
            theirs = _less(other, length, base)
            product = (one * theirs).sum(1)
            cosines[length] = _divided(product, squares[length], theirs.square_().sum(1)).numpy()
        mean = _Estimate(1)
        for name, length, start, count, of in spans:
            if any(word in name for word in PARTS[part]):
                some = cosines[length][start:start + count, None]
                mean.add(some.sum(0), (some * some).sum(0), count, of)
        (cosine[k],), (error[k],) = mean.value()
    return cosine, error


def similar(sources: Sequence[Weights], threshold: float, sketches: Sequence[Sketch] | None = None, *,
            part: Part = "all", base: Weights | None = None, base_sketch: Sketch | None = None, threads: int = 0,
            progress: Progress = iter) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, its standard error) of all pairs: exact, with error 0, where a sketch cannot tell the side of threshold.

    sketches  of the sources, and base_sketch of the base; what is not given is made
    The rest are estimates from sketches whose interval of SURE standard errors lies on one side of the threshold. So
    single and leader linkage find the families of exact cosines; average and complete linkage also weigh the estimates.
    """
    sketches = [sketch(source) for source in sources] if sketches is None else sketches
    if base is not None and base_sketch is None:
        base_sketch = sketch(base)
    cosine, error = compare(sketches, part=part, base=base_sketch)
    open_ = np.abs(cosine - threshold) <= SURE * error + ROUNDED
    np.fill_diagonal(open_, False)
    members = np.flatnonzero(open_.any(1)).tolist()
    if members:
        exact = np.full_like(cosine, np.nan)
        exact[np.ix_(members, members)] = similarity([sources[k] for k in members], part=part, base=base,
                                                     threads=threads, progress=progress)
        cosine[open_], error[open_] = exact[open_], 0.0
    return cosine, error


def _chosen(named: Sequence[tuple[str, tuple[int, ...]]], entries: int) -> dict[str, np.ndarray]:
    """Matrix -> the columns to take, ascending, in the order of names.

    More of short columns than of long ones, by the root of their length: their cosines spread more and cost less.
    """
    share = entries / sum(sqrt(rows) for _, (rows, _) in named)
    found = {}
    for name, (rows, columns) in named:
        count = min(columns, max(LEAST, int(share / sqrt(rows))))
        key = hashlib.sha256(f"{name}|{rows}|{columns}".encode()).digest()[:16]
        draws = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(columns)
        found[name] = np.sort(np.argsort(draws, kind="stable")[:count])
    return found


def _spans(one: Sketch) -> list[tuple[str, int, int, int, int]]:
    """Of each matrix: name, length of its columns, index of the first among all so long, how many, of how many."""
    spans, taken = [], dict.fromkeys(one.columns, 0)
    for (name, columns), (_, shape) in zip(_chosen(one.matrices, one.entries).items(), one.matrices, strict=True):
        spans.append((name, shape[0], taken[shape[0]], len(columns), shape[1]))
        taken[shape[0]] += len(columns)
    return spans


class _Estimate:
    """The mean over matrices of the mean over their columns, with the variance of it, for some pairs at once."""

    def __init__(self, *shape: int):
        self._total, self._variance, self._count = np.zeros(shape), np.zeros(shape), 0

    def add(self, sums: np.ndarray, squares: np.ndarray, k: int, c: int) -> None:
        """One matrix: sums of cosines and of their squares over k of its c columns."""
        self._total += sums / k
        self._count += 1
        if k < c:
            spread = np.maximum(squares - sums * sums / k, 0) / (k - 1)
            self._variance += spread / k * (1 - k / c)

    def value(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, standard error); NaN where there is no matrix."""
        if not self._count:
            return np.full_like(self._total, np.nan), np.full_like(self._total, np.nan)
        return (self._total / self._count).clip(-1, 1), np.sqrt(self._variance) / self._count


def _all_pairs(sketches: Sequence[Sketch], part: Part, base: Sketch | None) -> tuple[np.ndarray, np.ndarray]:
    n, mean = len(sketches), _Estimate(len(sketches), len(sketches))
    for name, length, start, count, of in _spans(sketches[0]):
        if not any(word in name for word in PARTS[part]):
            continue
        sums, squares = np.zeros((n, n)), np.zeros((n, n))
        step = max(1, BLOCK // (n * max(n, length)))
        for first in range(start, start + count, step):
            cut = slice(first, min(first + step, start + count))
            found = torch.stack(_widened([one.columns[length][cut] for one in sketches]), 1)
            if base is not None:
                found -= base.columns[length][cut, None].to(found.dtype)
            product = torch.bmm(found, found.mT)
            own = product.diagonal(dim1=1, dim2=2)
            cosines = _divided(product, own[:, :, None], own[:, None]).numpy()
            sums += cosines.sum(0)
            squares += (cosines * cosines).sum(0)
        mean.add(sums, squares, count, of)
    return mean.value()


def _divided(product: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Cosines in fp64 from products and squared lengths; 1 where both are zero, 0 where one is, as in similarity."""
    one, other = one.double(), other.double()
    both, either = (one == 0) & (other == 0), (one == 0) | (other == 0)
    return torch.where(either, both.double(), product.double() / (one * other).sqrt())


def _less(one: Sketch, length: int, base: Sketch | None) -> Tensor:
    """Columns of one length in fp32 or wider, less those of the base: [m, length]."""
    found = one.columns[length]
    found = found.to(torch.promote_types(found.dtype, torch.float32), copy=True)
    return found if base is None else found - base.columns[length].to(found.dtype)


def _widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(wide) for tensor in tensors]


def _metadata(file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        return json.loads((opened.metadata() or {}).get("sketch", "{}"))
