"""Cuts: the largest entries of tensors that are seen in pieces, against a stable sort of the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from glue.checkpoint import InMemory
from glue.merge import cut as cuts
from glue.merge import merging
from glue.merge.cut import among_largest, cut_at, ranked
from glue.merge.engine import prepared
from glue.merge.leaf import Leaf, Source
from glue.merge.target import Glimpse, Held, Model, Pieces


@pytest.fixture
def narrow(monkeypatch):
    """Room for few candidates and a small sample, so that small tensors take the ways of large ones."""
    for name, value in (("CAP", 32), ("SHARE", 4), ("RUN", (4, 16)), ("RUNS", 16)):
        monkeypatch.setattr(cuts, name, value)


class Counted:
    """Pieces that know how often one went through them."""

    def __init__(self, parts: Glimpse):
        self.parts, self.n, self.numel, self.passes = parts, parts.n, parts.numel, 0
        self.at = parts.at

    def __iter__(self):
        self.passes += 1
        return iter(self.parts)


def seen(rows: list[np.ndarray], dtype: torch.dtype, tensors: int = 1, piece: int = 50) -> Counted:
    """Rows as members, each cut into tensors of unlike length, and these into pieces."""
    members = [Source(f"m{k}", InMemory({f"t{j}": part for j, part in enumerate(
        torch.from_numpy(row).to(dtype).tensor_split([j * j * 100 for j in range(1, tensors)]))}))
        for k, row in enumerate(rows)]
    unsorted = replace(merging["linear"], traits={"space": "weight"})  # or members would change places
    offset, parts = 0, []
    for target in prepared(unsorted.bind(), members).targets.values():
        parts.append(Pieces(replace(target, offset=offset), 0, piece))
        offset += target.header.numel
    return Counted(Model(parts) if tensors > 1 else parts[0])


def chosen(row: np.ndarray, dtype: torch.dtype, count: int) -> np.ndarray:
    size = torch.from_numpy(row).to(dtype).abs().double().nan_to_num(torch.inf).numpy()
    found = np.zeros(len(row), bool)
    found[np.argsort(-size, kind="stable")[:count]] = True
    return found


def shapes_of_rows(size: int = 2000) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    noise = random.standard_normal(size)
    return {"smooth": noise, "many equal": (3 * noise).round(), "half zero": noise * (random.random(size) < 0.5),
            "growing": noise * np.linspace(0.001, 10, size), "one value": np.full(size, -2.5),
            "neighbours": np.where(noise > 0, 1, np.nextafter(np.float32(1), np.float32(2))),
            "far apart": np.where(noise > 0, noise * 1e-30, 1e20),
            "a patch": noise * (np.arange(size) // 40 == 30), "infinite": np.where(noise > 1, -np.inf, noise)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tensors", [1, 4])
def test_a_cut_leaves_what_a_stable_sort_would(narrow, dtype, tensors):
    rows = list(shapes_of_rows().values())
    for counts in ((0, 1, 999), (400, 2000, 1999), (1200, 17, 1500)):
        pieces = seen(rows, dtype, tensors)
        found = cut_at(pieces, *([count] * len(rows) for count in counts))
        for cut, count in zip(found, counts, strict=True):
            left = among_largest(torch.from_numpy(np.stack(rows)).to(dtype).double(), cut, 0).numpy()
            for row, ours in zip(rows, left, strict=True):
                assert np.array_equal(ours, chosen(row, dtype, count))
        assert pieces.passes <= 8


def test_a_piece_is_judged_by_where_it_stands(narrow):
    row = shapes_of_rows()["many equal"]
    cut, = cut_at(seen([row], torch.float32), [700])
    numbers = torch.from_numpy(row)[None]
    for start in (0, 1, 777, 1500):
        whole = chosen(row, torch.float32, 700)
        assert np.array_equal(among_largest(numbers[:, start:start + 400], cut, start)[0].numpy(),
                              whole[start:start + 400])


def test_a_sample_spares_passes():
    """Of 2 ** 19 numbers all of one kind, or of few kinds, one pass finds both of two ranks."""
    noise = np.random.default_rng(1).standard_normal(1 << 19)
    for row in (noise, (20 * noise).round()):
        pieces = seen([row], torch.float32, piece=1 << 17)
        below, above = cut_at(pieces, [300_000], [5000])
        assert pieces.passes == 1
        for cut, count in ((below, 300_000), (above, 5000)):
            left = among_largest(torch.from_numpy(row).float()[None], cut, 0)[0].numpy()
            assert np.array_equal(left, chosen(row, torch.float32, count))


def test_what_is_held_does_not_grow_with_the_tensor(monkeypatch):
    monkeypatch.setattr(cuts, "CAP", 1 << 10)
    most = 0
    look = cuts._Search.look

    def watched(self, keys: np.ndarray, start: int, top: int) -> None:
        nonlocal most
        look(self, keys, start, top)
        most = max(most, sum(len(some) for _, _, some, _ in self.inside))

    monkeypatch.setattr(cuts._Search, "look", watched)
    row = np.random.default_rng(2).standard_normal(200_000)
    cut, = cut_at(seen([row], torch.float64, piece=1000), [60_000])
    assert np.array_equal(among_largest(torch.from_numpy(row)[None], cut, 0)[0].numpy(),
                          chosen(row, torch.float64, 60_000))
    assert most <= 1 << 10


def test_numbers_that_are_not_finite_count_as_the_largest():
    row = torch.tensor([[1.0, torch.nan, -3.0, -torch.inf, 2.0]])
    cut, = cut_at(Held(Leaf("w", row)), [2])
    assert (cut.at.item(), cut.last.item()) == (torch.inf, 5)
    assert among_largest(row, cut, 0).tolist() == [[False, False, False, True, False]]  # a NaN compares with nothing


def test_ranks_are_of_what_is_asked_for(narrow):
    row = shapes_of_rows()["smooth"]

    def doubled(leaf: Leaf) -> Tensor:
        return 2 * leaf.tensors

    ranks = [1, 2000, 700]
    assert ranked(seen([row], torch.float64), ranks, doubled) == [2 * np.sort(np.abs(row))[-rank] for rank in ranks]
