"""How much a merge holds in memory, counted in live tensors and arrays: a few pieces, however large the model is."""

from __future__ import annotations

import tracemalloc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glue.checkpoint import InMemory
from glue.family import Method
from glue.merge import merging
from glue.merge.engine import prepared
from glue.merge.extract import change, held
from glue.merge.factors import Keep
from glue.merge.leaf import Source

PIECE, ROW = 1 << 17, 1 << 10
SMALL, LARGE = 8 * PIECE, 32 * PIECE
FOUND = 3 << 20  # bytes that a glance may hold for each member, or each of three quantiles: a sample and candidates
STREAMED = [method for method in merging if method.traits.get("sees", "pieces") in ("pieces", "rows")
            and method.traits["space"] != "factors"]


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that torch operations made and that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, tuple[int, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
                 if isinstance(tensor, torch.Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor, given)
        return out

    def count(self, tensor: torch.Tensor, given: set[int]) -> None:
        place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if place not in self.sizes and place in given:
            return  # a view of what was there before: the weights themselves
        held, _ = self.sizes.get(place, (0, size))
        if not held:
            self.now += size
            self.peak = max(self.peak, self.now)
        self.sizes[place] = held + 1, size
        weakref.finalize(tensor, self.gone, place)

    def gone(self, place: int) -> None:
        held, size = self.sizes.pop(place)
        if held > 1:
            self.sizes[place] = held - 1, size
        else:
            self.now -= size


def peak(method: Method, numel: int) -> int:
    """Bytes that tensors and arrays of one merge take at most; the weights themselves are there before it begins."""
    random = torch.Generator().manual_seed(0)
    fewest, most = method.traits.get("members", (3, None))
    n = most or max(3, fewest)
    base, *members = (Source(f"m{k}", InMemory({"w": torch.randn(numel // ROW, ROW, generator=random).bfloat16()}))
                      for k in range(n + 1))
    given = {"density": 0.3} if "density" in method.parameters else {}
    below = base if method.traits["space"] == "delta" else None
    merge = prepared(method.bind(given), members, below, piece=PIECE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("glue.merge.engine.PIECE", PIECE)
        tracemalloc.start()
        try:
            with Live() as live:
                for _ in merge.stream("w"):
                    pass
            return live.peak + tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("method", STREAMED, ids=lambda method: method.name)
def test_memory_is_a_few_pieces_and_does_not_grow_with_the_model(method: Method):
    n = method.traits.get("members", (3, None))[1] or 3
    pieces = (2 * n + 4) * PIECE * 8  # what is made of a piece on the way may be fp64
    glance = max(n, 3) * FOUND if "glance" in method.traits else 0
    peak(method, SMALL)  # what is imported on the way is no part of it
    small, large = peak(method, SMALL), peak(method, LARGE)
    assert large <= pieces + glance, f"{(large - glance) / PIECE / 4:.1f} pieces"
    assert large <= 1.02 * small + glance / 2 + 1e5, (small, large)  # Python's own caches come and go


def test_a_layer_is_cut_in_no_more_memory_than_is_told():
    one, other = (torch.randn(700, 300, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    model, base = InMemory({"w.weight": one}), InMemory({"w.weight": other})
    with Live() as live:
        found = change(model, base, "w", Keep(4))
    assert found.rank == 4 and live.peak <= held((700, 300)) + 8 * 5 * (700 + 300)
