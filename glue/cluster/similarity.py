"""How alike the weights of models are: the mean column cosine of Model-GLUE and its kin, all pairs in one pass.

For members a and b, S(a, b) is the mean over tensors of the mean over input columns of cos(W_a[:, j], W_b[:, j]).
The tensors are the matrices [out, in] whose name says that they are of attention or an MLP, whatever the architecture
calls these; each counts once, however large it is. Experts in one tensor [experts, out, in] are one matrix, and what
stands [in, out], as in GPT-2, is compared by output.
Departures from the published code: a column that is zero in both members counts 1 and one that is zero in a single
member counts 0 (there: 0 and 0), so that copies are always exactly alike, and so are the columns that neither of two
fine-tunes has moved; members of other shapes give NaN where the published code fails.

A matrix is gone through in blocks of rows that fit the cache, twice for columns, whose norms must be known first. The
second time its pages have just been read, so that every byte comes from the disk once, however many members there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from glue.checkpoint import Weights
from glue.errors import CheckpointError

Part = Literal["all", "attention", "mlp"]
Per = Literal["column", "tensor"]
Progress = Callable[[list[str]], Iterable[str]]
ATTENTION = ("attn", "attention")  # self_attn of Llama, attn of GPT-2, attention of GPT-NeoX
MLP = ("mlp", "block_sparse_moe")  # the latter of Mixtral
PARTS: dict[Part, tuple[str, ...]] = {"all": (*ATTENTION, *MLP), "attention": ATTENTION, "mlp": MLP}
BLOCK = 1 << 20  # entries of all members that are compared at a time: they stay in the cache
LEAST = 1 << 14  # entries of one member, however many members there are: what is shorter takes longer to call
SUMMED = 1 << 9  # entries whose products are summed in the type of a block: squares of bf16 lose digits one way only
OPEN = 512       # files at once, one for each member and thread
MAPPED = 1 << 29 # bytes that are read before the pages read so far are let go
HELD = 1 << 30   # bytes of tensors held at once that are in no file but made when they are asked for


@dataclass(frozen=True)
class Similarities:
    """How alike n members are. All are [n, n] float64, exactly symmetric, NaN between members of different shape.

    cosine     part -> the mean cosine; NaN too where the members have no such part
    ratio      the length of the shorter over the longer, of all compared entries as one vector; 1 if both are 0
    agreement  with a base: of the entries that both have moved, the share that they moved the same way; a half is
               chance, NaN where there is no such entry
    overlap    with a base: the share of entries that both have moved
    """

    cosine: Mapping[Part, np.ndarray]
    ratio: np.ndarray
    agreement: np.ndarray | None = None
    overlap: np.ndarray | None = None


@dataclass(frozen=True)
class Sums:
    """What one matrix tells of n members: the cosine [n, n], squared lengths [n], numel, and with signs how many
    entries both have moved [n, n], and the same way [n, n]."""

    cosine: np.ndarray
    squares: np.ndarray
    numel: int
    both: np.ndarray
    same: np.ndarray


def similarities(sources: Sequence[Weights], *, base: Weights | None = None, per: Per = "column", threads: int = 0,
                 progress: Progress = iter) -> Similarities:
    """All scores of every pair of sources, from one pass.

    base      compare W - W_base instead of W; a source that does not have the shapes of the base is NaN to all others
    per       the cosine of each column, averaged over columns, or one cosine of the flattened matrix
    threads   that take a tensor each, and change no bit; 0: as many as torch would use
    progress  wraps the list of tensor names that one pass goes through, such as rich's `track`

    Sums are taken in fp32 within a block, or fp64 where a source is fp64, and in fp64 across blocks. Every tensor is
    read once; memory is a block or two of all members a thread, besides what a source makes up when asked.
    Raises CheckpointError where a source has no such matrix, or packs it into integers.
    """
    n = len(sources)
    cosine, ratio, agreement, overlap = {part: _unknown(n) for part in PARTS}, *(_unknown(n) for _ in range(3))
    for members, names in _same_shape(sources, "all", base):
        squares, numel = np.zeros(len(members)), 0
        totals = {part: _Mean(len(members)) for part in PARTS}
        both, same = (np.zeros((len(members), len(members))) for _ in range(2))
        chosen = [sources[k] for k in members]
        for name, sums in _each(chosen, names, base, per, base is not None, threads, progress):
            for part, words in PARTS.items():
                if any(word in name for word in words):
                    totals[part].add(sums.cosine)
            squares, numel = squares + sums.squares, numel + sums.numel
            both, same = both + sums.both, same + sums.same
        for part, total in totals.items():
            _put(cosine[part], members, total.value())
        lengths = np.sqrt(squares)
        shorter, longer = np.minimum.outer(lengths, lengths), np.maximum.outer(lengths, lengths)
        with np.errstate(invalid="ignore"):
            _put(ratio, members, np.where(longer == 0, 1.0, shorter / longer))
            _put(agreement, members, same / both)
        _put(overlap, members, both / numel)
    return Similarities(cosine, ratio) if base is None else Similarities(cosine, ratio, agreement, overlap)


def similarity(sources: Sequence[Weights], *, part: Part = "all", base: Weights | None = None, per: Per = "column",
               threads: int = 0, progress: Progress = iter) -> np.ndarray:
    """The cosine of one part alone, [n, n]: as `similarities`, from less work where nothing else is wanted.

    Sources need to have the matrices of this part in common, and no others.
    """
    result = _unknown(len(sources))
    for members, names in _same_shape(sources, part, base):
        total = _Mean(len(members))
        for _, sums in _each([sources[k] for k in members], names, base, per, False, threads, progress):
            total.add(sums.cosine)
        _put(result, members, total.value())
    return result


def compatible(a: Weights, b: Weights) -> str:
    """Why a and b cannot be merged tensor by tensor: the first difference in names or shapes; "" if there is none."""
    for name in sorted(set(a.headers) | set(b.headers)):
        if name not in a.headers or name not in b.headers:
            return f"'{name}' is only in the {'first' if name in a.headers else 'second'}"
        one, other = a.headers[name].shape, b.headers[name].shape
        if one != other:
            return f"'{name}' is {list(one)} in the first and {list(other)} in the second"
    return ""


def matrices(source: Weights, part: Part, who: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of what is compared, by name. Raises CheckpointError where there is nothing, or it is packed."""
    found = {name: header for name, header in source.headers.items()
             if len(header.shape) in (2, 3) and header.numel and any(word in name for word in PARTS[part])}
    if not found:
        raise CheckpointError(f"{who} has no matrix whose name says {' or '.join(PARTS[part])}: nothing to compare",
                              fix="leave it out; models can be compared whose parts are named in a usual way")
    packed = [name for name, header in found.items() if not header.dtype.is_floating_point]
    if packed:
        raise CheckpointError(f"{who} stores '{packed[0]}' as {found[packed[0]].dtype}: packed weights have no cosine",
                              fix="write it in a floating type first, or leave it out")
    return tuple(sorted((name, (header.numel // header.shape[-1], header.shape[-1])) for name, header in found.items()))


def _same_shape(sources: Sequence[Weights], part: Part, base: Weights | None) -> list[tuple[list[int], list[str]]]:
    """The sources in groups that have the same matrices, each with the names of these; groups of one left out."""
    groups: dict[tuple, list[int]] = {}
    for k, source in enumerate(sources):
        groups.setdefault(matrices(source, part, f"source {k}"), []).append(k)
    if base is not None:
        shapes = matrices(base, part, "the base")
        groups = {key: members for key, members in groups.items() if key == shapes}
    return [(members, [name for name, _ in key]) for key, members in groups.items() if len(members) > 1]


class _Mean:
    """The mean of matrices [n, n]; NaN of none."""

    def __init__(self, n: int):
        self.total, self.count = np.zeros((n, n)), 0

    def add(self, found: np.ndarray) -> None:
        self.total += found
        self.count += 1

    def value(self) -> np.ndarray:
        return (self.total / self.count).clip(-1, 1) if self.count else np.full_like(self.total, np.nan)


def _unknown(n: int) -> np.ndarray:
    """Each like itself, and nothing known of pairs."""
    result = np.full((n, n), np.nan)
    np.fill_diagonal(result, 1.0)
    return result


def _put(result: np.ndarray, members: list[int], found: np.ndarray) -> None:
    """Write what was found for some members where it belongs; what is above the diagonal counts."""
    above = np.triu(found, 1)
    result[np.ix_(members, members)] = above + above.T
    result[members, members] = 1.0


def _each(sources: Sequence[Weights], names: list[str], base: Weights | None, per: Per, signs: bool, threads: int,
          progress: Progress) -> Iterator[tuple[str, Sums]]:
    """The sums of each tensor, in the order of the names; a thread takes a tensor, with no further threads inside."""
    def work(name: str) -> Sums:
        opened = runs.pop(name)
        tensors = [source[name].flatten(0, -2) for source in opened[:len(sources)]]
        return _sums(tensors, None if base is None else opened[-1][name].flatten(0, -2), per, signs)

    runs = _opened([*sources, *([] if base is None else [base])], names)
    made = max(sum(source.headers[name].nbytes for source in sources if source.headers[name].file is None)
               for name in names)
    before = torch.get_num_threads()
    number = max(1, min(threads or before, HELD // max(1, made), OPEN // len(sources)))
    pool = ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from zip(progress(names), pool.map(work, names))  # noqa: B905 - the bar may end before its names do
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _opened(sources: Sequence[Weights], names: list[str]) -> dict[str, list[Weights]]:
    """For each tensor the sources to read it from: copies, which map their files anew, so that the pages of a run of
    tensors go with its last one. To let go after each tensor would hold up the other threads too often."""
    found: dict[str, list[Weights]] = {}
    held = MAPPED
    for name in names:
        if held >= MAPPED:
            opened, held = [copy(source) for source in sources], 0
        found[name] = opened
        held += sum(source.headers[name].nbytes for source in sources)
    return found


def _sums(tensors: list[Tensor], base: Tensor | None, per: Per, signs: bool) -> Sums:
    """What one matrix tells: n of [out, in]. Of the [n, n] only what is above the diagonal is meant to be used."""
    n, (rows, columns) = len(tensors), tensors[0].shape
    work = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    step = max(1, min(rows, max(BLOCK // n, LEAST) // columns))
    block = torch.empty(n, step, columns, dtype=work)
    pieces = list(zip(*(tensor.split(step) for tensor in tensors), strict=True))
    below = [None] * len(pieces) if base is None else base.split(step)

    def blocks() -> Iterator[Tensor]:
        for rows_of, less in zip(pieces, below, strict=True):
            # one call for all members, since threads take turns between calls; it knows no types of 8 bits
            known = [row if row.dtype.itemsize > 1 else row.to(work) for row in rows_of]
            piece = torch.stack(known, out=block[:, :len(known[0])])
            yield piece if less is None else piece.sub_(less.to(work))

    total, both, net = (torch.zeros(n, n, dtype=torch.float64) for _ in range(3))
    squares = torch.zeros(n, columns, dtype=torch.float64)
    if per == "column":
        for piece in blocks():  # numpy needs no room for the products
            squares += torch.from_numpy(np.einsum("nrc,nrc->nc", piece.numpy(), piece.numpy()))
    zero = squares == 0
    scale = torch.where(zero, 0.0, squares.rsqrt()).to(work)[:, None]
    for piece in blocks():
        if signs:
            way = torch.sign(piece)
            net += _gram(way)
            both += _gram(way.abs_())
        total += _gram(piece.mul_(scale) if per == "column" else piece)
    diagonal = total.diagonal()
    if per == "tensor":
        squares, zero, columns = diagonal[:, None], diagonal[:, None] == 0, 1
    # by its own rounded length, so that a copy is exactly alike
    own = torch.where(diagonal == 0, 1.0, (columns - zero.sum(1)) / diagonal).sqrt()
    cosine = (total * own * own[:, None] + zero.double() @ zero.double().T) / columns
    return Sums(cosine.numpy(), squares.sum(1).numpy(), tensors[0].numel(), both.numpy(), ((both + net) / 2).numpy())


def _gram(block: Tensor) -> Tensor:
    """Products of all pairs, [n, r, c] -> [n, n]: over SUMMED entries in the type of the block, beyond in fp64."""
    flat = block.view(len(block), -1)
    whole = flat.shape[1] // SUMMED * SUMMED
    runs = flat[:, :whole].unflatten(1, (-1, SUMMED)).transpose(0, 1)
    return torch.bmm(runs, runs.mT).sum(0, dtype=torch.float64) + flat[:, whole:] @ flat[:, whole:].T
