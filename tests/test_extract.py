"""Extraction: what a model changes of a layer, cut without ever holding more than it has said."""

from __future__ import annotations

import pytest
import torch

from glue.checkpoint import InMemory
from glue.merge.extract import change
from glue.merge.factors import Keep, factored


@pytest.mark.parametrize("m, n", [(40, 90), (90, 40), (64, 64), (600, 70)])
def test_a_change_that_is_made_piece_by_piece_has_the_factors_of_the_whole(m, n):
    one, other = (torch.randn(m, n, generator=torch.Generator().manual_seed(k)).to(torch.bfloat16) for k in (1, 2))
    for keep in (Keep(5), Keep(energy=0.7)):
        whole = factored(one.double() - other.double(), keep)
        found = change(InMemory({"w.weight": one}), InMemory({"w.weight": other}), "w", keep)
        assert torch.equal(found.a, whole.a) and torch.equal(found.b, whole.b)
        assert torch.equal(found.spectrum, whole.spectrum)
    assert change(InMemory({"w.weight": one}), InMemory({"w.weight": one}), "w", Keep(5)) is None
