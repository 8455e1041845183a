"""The algebra of low-rank changes: sums, cuts, lengths and angles, against dense matrices in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor

from glue.errors import MethodError
from glue.merge import merging
from glue.merge.factors import (
    Factors,
    Keep,
    cosine,
    distance,
    factored,
    first,
    gram,
    inner,
    norm,
    recompressed,
    stacked,
    weighted,
)
from glue.merge.leaf import Leaf
from glue.merge.parameters import settled

SHARES = (0.2, 0.5, 0.3)


def change(rank: int, m: int = 48, n: int = 40, *, scale: float = 2.0, seed: int = 0,
           dtype: torch.dtype = torch.float64) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, n, generator=rng, dtype=dtype), torch.randn(m, rank, generator=rng, dtype=dtype),
                   scale)


def clients(ranks: tuple[int, ...] = (8, 4, 2), m: int = 48, n: int = 40,
            dtype: torch.dtype = torch.float64) -> list[Factors]:
    """Changes of one layer whose ranks and scales differ."""
    return [change(rank, m, n, scale=0.5 + k, seed=k, dtype=dtype) for k, rank in enumerate(ranks)]


def exact(parts: list[Factors], shares=SHARES) -> Tensor:
    """The weighted sum of the dense changes, as the definition has it."""
    return sum(share * part.scale * (part.b.double() @ part.a.double())
               for part, share in zip(parts, shares, strict=True))


def made(method: str, parts: list[Factors], **params) -> Factors:
    """What a registered method makes of them."""
    choice = merging[method].bind({"weight": list(SHARES[:len(parts)]), **params})
    leaf = Leaf("layer", torch.empty(len(parts), 0), shape=parts[0].shape, factors=tuple(parts))
    found = choice(leaf, **settled(choice, [f"c{k}" for k in range(len(parts))], 0, torch.float64))
    return found if isinstance(found, Factors) else stacked(found)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# sums

@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-14), (torch.bfloat16, 1e-14)])
def test_a_stack_is_the_weighted_sum_of_changes_of_any_rank_and_scale(dtype, bound):
    parts = clients(dtype=dtype)
    found = made("flora", parts)
    assert found.rank == 8 + 4 + 2 and found.scale == 1 and found.a.dtype == torch.float64
    assert off(found.dense(), exact(parts)) <= bound
    rounded = replace(found, a=found.a.float(), b=found.b.float())
    assert off(rounded.dense(), exact(parts)) <= 1e-7


@pytest.mark.parametrize("ranks", [(48, 4, 2), (4, 40, 2), (40, 48, 40)])
def test_a_rank_that_is_also_a_side_of_the_layer_is_no_exception(ranks):
    parts = clients(ranks)
    assert off(made("flora", parts).dense(), exact(parts)) <= 1e-14
    square = clients((48, 48, 48), 48, 48)
    assert off(made("flora", square).dense(), exact(square)) <= 1e-14
    assert off(made("flexlora", square).dense(), exact(square)) <= 1e-13


@pytest.mark.parametrize("method", ["fedit", "zero_pad"])
def test_averaging_factors_apart_is_far_from_the_mean_of_changes(method):
    parts = clients((4, 4, 4))
    assert 0.3 < off(made(method, parts).dense(), exact(parts)) < 2
    same_a = [replace(part, a=parts[0].a) for part in parts]
    assert off(made(method, same_a).dense(), exact(same_a)) <= 1e-14
    same_b = [replace(part, b=parts[0].b, scale=1.0) for part in parts]
    assert off(made(method, same_b).dense(), exact(same_b)) <= 1e-14


def test_averaged_factors_are_the_means_of_all_factors():
    parts = [replace(part, scale=2.0) for part in clients((3, 3, 3))]
    found = made("fedit", parts)
    assert found.scale == 2.0 and found.rank == 3
    assert torch.allclose(found.a, sum(s * part.a for s, part in zip(SHARES, parts, strict=True)), rtol=1e-14)
    assert torch.allclose(found.b, sum(s * part.b for s, part in zip(SHARES, parts, strict=True)), rtol=1e-14)


def test_zero_padding_is_averaging_of_what_is_padded():
    parts = clients((5, 3, 1))
    padded = [replace(part, a=torch.cat([part.a, torch.zeros(5 - part.rank, 40).double()]),
                      b=torch.cat([part.b, torch.zeros(48, 5 - part.rank).double()], dim=1)) for part in parts]
    assert torch.equal(padded[2].dense(), parts[2].dense())
    assert torch.equal(made("zero_pad", parts).dense(), made("fedit", padded).dense())


def test_fedit_refuses_unlike_ranks_and_ffa_unlike_a():
    with pytest.raises(MethodError, match=r"'layer' have ranks 2, 4, 8\n  use flora"):
        made("fedit", clients())
    with pytest.raises(MethodError, match="one frozen A, and those of 'layer' differ"):
        made("ffa", clients((4, 4, 4)))


def test_ffa_is_exact_and_keeps_the_a_that_all_share():
    parts = [replace(part, a=clients((4, 4, 4))[0].a) for part in clients((4, 4, 4))]
    found = made("ffa", parts)
    assert found.rank == 4 and torch.equal(found.a, parts[0].a)
    assert off(found.dense(), exact(parts)) <= 1e-15


def test_one_client_is_that_client():
    part, = clients((6,))
    for method in ("flora", "fedit", "zero_pad", "ffa"):
        choice = merging[method].bind()
        leaf = Leaf("layer", torch.empty(1, 0), shape=part.shape, factors=(part,))
        found = choice(leaf, **settled(choice, ["c"], 0, torch.float64))
        one = found if isinstance(found, Factors) else found[0]
        assert torch.equal(one.a, part.a) and torch.equal(one.b, part.b) and one.scale == part.scale


def test_a_client_that_is_there_twice_with_half_the_weight_is_that_client_once():
    one, other, _ = clients()
    twice = stacked(weighted([one, one, other], torch.tensor([0.25, 0.25, 0.5])))
    assert off(twice.dense(), exact([one, other], (0.5, 0.5))) <= 1e-15


def test_of_clients_of_which_some_came_the_weights_are_those_of_them():
    parts = clients()[:2]
    assert off(made("flora", parts).dense(), exact(parts, (2 / 7, 5 / 7))) <= 1e-15
    assert off(made("flora", parts, normalize=False).dense(), exact(parts, SHARES[:2])) <= 1e-15
    assert made("flora", parts).rank == 12


def test_two_rounds_after_each_other_are_one_change_of_the_sum_of_their_ranks():
    rounds = [made("flora", clients()), made("flora", clients((3, 1, 5)))]
    both = stacked(rounds)
    assert both.rank == 14 + 9
    assert off(both.dense(), rounds[0].dense() + rounds[1].dense()) <= 1e-15


def test_a_layer_that_a_client_leaves_alone_is_no_change():
    parts = [*clients((4, 2)), Factors(torch.zeros(0, 40), torch.zeros(48, 0))]
    assert off(made("flora", parts).dense(), exact(parts)) <= 1e-14
    assert off(made("flexlora", parts).dense(), made("flora", parts, rank=4).dense()) <= 1e-14


# cuts

@pytest.mark.parametrize("m, n", [(48, 40), (20, 60), (10, 12)])  # in the last, ranks sum to more than the sides
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_recompression_is_the_truncated_decomposition_of_the_dense_change(m, n, rank):
    parts = clients(m=m, n=n)
    found = made("flora", parts, rank=rank)
    u, values, v = torch.linalg.svd(exact(parts))
    best = (u[:, :rank] * values[:rank]) @ v[:rank]
    assert found.rank == rank and off(found.dense(), best) <= 1e-12
    tail = float(values[rank:].square().sum().sqrt())
    assert found.error == pytest.approx(tail, rel=1e-12, abs=1e-12)
    assert float((found.dense() - exact(parts)).norm()) == pytest.approx(tail, rel=1e-12, abs=1e-12)
    assert torch.allclose(found.a.norm(dim=1), found.b.norm(dim=0))  # the root of each singular value in both


def test_recompression_to_the_rank_of_the_change_or_more_loses_nothing():
    parts = clients()
    for rank in (14, 30):
        found = made("flora", parts, rank=rank)
        assert off(found.dense(), exact(parts)) <= 1e-14 and found.error <= 1e-13 and found.rank == 14


@given(values=some.lists(some.floats(1e-3, 1e3), min_size=1, max_size=12), energy=some.floats(0.01, 1),
       error=some.floats(0, 0.99), rank=some.integers(1, 14))
def test_what_is_kept_is_the_least_that_will_do_up_to_a_rank(values, energy, error, rank):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    squares = values.square()

    def enough(k: int, *, energy: float = 0.0, error: float = math.inf) -> bool:
        kept, left = float(squares[:k].sum()), float(squares[k:].sum())
        return kept >= energy * (kept + left) * (1 - 1e-12) and left <= error**2 * (kept + left) * (1 + 1e-12)

    for asked in ({"energy": energy}, {"error": error}, {"energy": energy, "error": error}):
        k = Keep(**asked).count(values)
        assert enough(k, **asked) and (k == 1 or not enough(k - 1, **{w: v + (1e-9 if w == "energy" else -1e-9)
                                                                      for w, v in asked.items()}))
        assert Keep(rank, **asked).count(values) == min(k, rank)
    assert Keep(rank).count(values) == min(rank, len(values)) and Keep(error=0.0).count(values) == len(values)


def test_a_recompressed_change_can_be_cut_again_for_nothing():
    full = made("flora", clients(), rank=14)
    for rank in (1, 4, 8):
        assert off(first(full, rank).dense(), made("flora", clients(), rank=rank).dense()) <= 1e-13


def test_flexlora_keeps_as_many_directions_as_the_largest_rank():
    parts = clients()
    found = made("flexlora", parts)
    assert found.rank == 8 and off(found.dense(), made("flora", parts, rank=8).dense()) <= 1e-14
    assert made("flexlora", parts, rank=3).rank == 3


def test_a_change_of_nothing_is_cut_to_rank_one_of_nothing():
    zero = replace(change(4), b=torch.zeros(48, 4, dtype=torch.float64))
    for keep in (Keep(3), Keep(energy=0.99), Keep(error=0.1)):
        found = recompressed(zero, keep)
        assert not found.dense().any() and found.error == 0 and found.rank <= 3
    assert not factored(torch.zeros(5, 7), Keep(2)).dense().any()


@pytest.mark.parametrize("m, n", [(48, 40), (30, 64)])
def test_factors_of_a_dense_change_are_its_truncated_decomposition(m, n):
    delta = exact(clients(m=m, n=n)) + 0.1 * torch.randn(m, n, generator=torch.Generator().manual_seed(9)).double()
    u, values, v = torch.linalg.svd(delta)
    for keep in (Keep(6), Keep(energy=0.95), Keep(error=0.2)):
        found = factored(delta, keep)
        k = keep.count(values)
        assert found.rank == k and off(found.dense(), (u[:, :k] * values[:k]) @ v[:k]) <= 1e-7
        assert found.error == pytest.approx(float(values[k:].norm()), rel=1e-7)
    low = exact(clients(m=m, n=n))
    assert factored(low, Keep(30)).rank == 14 and off(factored(low, Keep(30)).dense(), low) <= 1e-8


# lengths and angles

def test_lengths_and_angles_are_those_of_the_dense_changes():
    one, other = clients()[:2]
    dense = [part.dense() for part in (one, other)]
    assert norm(one) == pytest.approx(float(dense[0].norm()), rel=1e-13)
    assert inner(one, other) == pytest.approx(float((dense[0] * dense[1]).sum()), rel=1e-11)
    assert cosine(one, other) == pytest.approx(
        float(torch.cosine_similarity(dense[0].flatten(), dense[1].flatten(), dim=0)), rel=1e-11)
    assert torch.allclose(gram([one, other]), torch.tensor([[inner(x, y) for y in (one, other)] for x in (one, other)],
                                                           dtype=torch.float64), rtol=1e-11)
    assert norm(one.times(-3)) == pytest.approx(3 * norm(one)) and cosine(one, one.times(-3)) == pytest.approx(-1)
    assert cosine(one, other.times(0)) == 0


def test_the_distance_of_changes_that_are_nearly_one_is_told_exactly():
    one = change(4)
    other = replace(one, a=one.a + 1e-12 * change(4, seed=5).a)
    assert distance(one, other) == pytest.approx(2e-12 * float((one.b @ change(4, seed=5).a).norm()), rel=1e-2)
    assert distance(one, one) <= 1e-14 * norm(one)


def test_no_dense_matrix_is_made():
    """A layer of 400 000 x 300 000 would take 960 GB."""
    rng = torch.Generator().manual_seed(0)
    parts = [Factors(torch.randn(2, 300_000, generator=rng), torch.randn(400_000, 2, generator=rng)) for _ in range(3)]
    cut, whole = made("flora", parts, rank=3), made("flora", parts)
    assert cut.shape == (400_000, 300_000)
    assert norm(cut)**2 + cut.error**2 == pytest.approx(norm(whole)**2, rel=1e-12)
    assert distance(cut, whole) == pytest.approx(cut.error, rel=1e-9)


def test_where_nothing_is_asked_nothing_is_cut():
    full = change(6)
    kept = recompressed(full, Keep())
    assert kept.rank == min(full.rank, *full.shape) and torch.allclose(kept.dense(), full.dense(), atol=1e-12)
