"""Breadcrumbs, DELLA, SCE and RAM against mergekit's, against fp64 oracles, and on arrays small enough to read.

Members change about half of the entries of their base, so that some entries are changed by one member alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from glue.checkpoint import InMemory
from glue.errors import CheckpointError, MethodError
from glue.merge import merging
from glue.merge.cut import among_largest, cut_at
from glue.merge.engine import check, merged
from glue.merge.leaf import Leaf, Source, random_key
from glue.merge.target import Held

WEIGHTS = {"m0": 0.1, "m1": 0.2, "m2": 0.3, "m3": 0.4}
DENSITY = {"m0": 0.2, "m1": 0.3, "m2": 0.4, "m3": 0.5}
SHAPES = {"a.weight": (160, 256), "b.weight": (256, 96), "c.norm": (256,)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def mergekit():
    """mergekit's merge of state dicts, all in fp32."""
    from mergekit.merge_methods.api import merge_state_dicts

    def merge(method: str, members: list[Source], base: Source, **parameters: object) -> dict[str, Tensor]:
        torch.manual_seed(0)
        models = {source.name: dict(source.weights) for source in [base, *members]}
        return merge_state_dicts(models, method, parameters=parameters, base=base.name, dtype=FP32, out_dtype=FP32)
    return merge


def zoo(dtype: torch.dtype = BF16, size: float = 0.004) -> tuple[list[Source], Source]:
    """Four children that each changed half of the entries of one base, by `size`, and that base."""
    random = torch.Generator().manual_seed(0)
    below = {name: 0.03 * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    children = [{name: tensor + size * torch.randn(tensor.shape, generator=random)
                 * (torch.rand(tensor.shape, generator=random) < 0.5) for name, tensor in below.items()}
                for _ in WEIGHTS]
    sources = [Source(name, InMemory({word: tensor.to(dtype) for word, tensor in tensors.items()}))
               for name, tensors in zip([*WEIGHTS, "base"], [*children, below], strict=True)]
    return sources[:-1], sources[-1]


def wide(source: Source, name: str) -> np.ndarray:
    return source.weights[name].double().numpy()


def differences(members: list[Source], base: Source, name: str) -> np.ndarray:
    """fp64, [n, *shape]"""
    return np.stack([wide(source, name) - wide(base, name) for source in members])


def draws(members: list[Source], name: str, seed: int = 0) -> Iterator[Tensor]:
    """The draws of each member for one tensor."""
    for source in members:
        key = random_key(seed, source.weights.fingerprint, name)
        yield Leaf(name, torch.empty(1, *SHAPES[name]), keys=(key,)).uniform(0)


def stays(members: list[Source], name: str) -> Iterator[Tensor]:
    """Which entries of one tensor of each member stay, where all have the same chance."""
    for source in members:
        key = random_key(0, source.weights.fingerprint, name)
        yield Leaf(name, torch.empty(1, *SHAPES[name]), keys=(key,)).stays(0, DENSITY[source.name])


def at_the_cuts(deltas: np.ndarray, counts: list[list[int]]) -> np.ndarray:
    """Entries whose magnitude, in any member, is that of the smallest of its counts[i][...] largest: bool [*shape]."""
    size = np.abs(deltas).reshape(len(deltas), -1)
    return np.any([np.isclose(row, np.sort(row)[-count], rtol=1e-6, atol=0)
                   for row, both in zip(size, counts, strict=True) for count in both if count],
                  axis=0).reshape(deltas.shape[1:])


def undecided(votes: np.ndarray) -> np.ndarray:
    """Entries whose votes cancel out, so that rounding elects their sign: bool [*shape]. Votes of zero elect nobody."""
    return (np.abs(votes.sum(0)) <= 1e-6 * np.abs(votes).sum(0)) & (votes != 0).any(0)


def breadcrumb_counts(size: int, density: list[float], gamma: float) -> list[list[int]]:
    dropped = [min(int(gamma * size), size - int(share * size)) for share in density]
    return [[int(share * size) + top, top] for share, top in zip(density, dropped, strict=True)]


def crumbs(deltas: np.ndarray, density: list[float], gamma: float) -> np.ndarray:
    """What breadcrumbs leaves: fp64, [n, *shape]"""
    left = np.zeros_like(deltas)
    for delta, out, (end, start) in zip(deltas, left, breadcrumb_counts(deltas[0].size, density, gamma), strict=True):
        stays = np.argsort(-np.abs(delta), axis=None, kind="stable")[start:end]
        out.flat[stays] = delta.flat[stays]
    return left


# --- mergekit ---------------------------------------------------------------------------------------------------------

def far(ours: Tensor, theirs: Tensor, limit: float = 6e-8) -> np.ndarray:
    """Where two results differ by more than a few fp32 roundings of numbers of their size, which is 0.25 at most."""
    return ((ours.double() - theirs.double()).abs() > limit).numpy()


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("normalize", [True, False])
def test_breadcrumbs_are_mergekits_but_for_entries_at_the_cuts(mergekit, method, normalize):
    members, base = zoo()
    given = {"weight": WEIGHTS, "density": DENSITY, "gamma": 0.02, "normalize": normalize, "lambda": 0.9}
    ours = dict(merged(merging[method].bind(given), members, base, out_dtype="float32"))
    theirs = mergekit(method, members, base, **given)
    apart = 0
    for name in SHAPES:
        deltas = differences(members, base, name)
        tied = at_the_cuts(deltas, breadcrumb_counts(deltas[0].size, list(DENSITY.values()), 0.02))
        if method == "breadcrumbs_ties":
            weight = np.array(list(WEIGHTS.values())).reshape(-1, *[1] * (deltas.ndim - 1))
            tied |= undecided(weight * crumbs(deltas, list(DENSITY.values()), 0.02))
        differs = far(ours[name], theirs[name])
        assert not (differs & ~tied).any()
        apart += int(differs.sum())
    assert 0 < apart < 0.02 * SIZE  # bf16 has many equal magnitudes, of which mergekit keeps others


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_breadcrumbs_that_restore_norms_are_mergekits(mergekit, method, rescale):
    members, base = zoo(FP32)
    given = {"weight": WEIGHTS, "density": 0.2, "gamma": 0.05}
    ours = dict(merged(merging[method].bind({**given, "rescale": rescale}), members, base))
    theirs = mergekit(method, members, base, **given, rescale=rescale == "l1")
    plain = mergekit(method, members, base, **given)
    assert not any(far(ours[name], theirs[name]).any() for name in SHAPES)
    assert any(far(theirs[name], plain[name], 1e-3).any() for name in SHAPES) == (rescale == "l1")


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties", "della", "della_linear"])
def test_a_density_of_one_drops_nothing_in_mergekit_either(mergekit, method):
    members, base = zoo()
    ours = dict(merged(merging[method].bind({"weight": WEIGHTS}), members, base, out_dtype="float32"))
    theirs = mergekit(method, members, base, weight=WEIGHTS)
    apart = 0
    for name, shape in SHAPES.items():
        weight, differs = np.array(list(WEIGHTS.values())).reshape(-1, *[1] * len(shape)), far(ours[name], theirs[name])
        assert not (differs & ~undecided(weight * differences(members, base, name))).any()
        apart += int(differs.sum())
    assert 0 < apart < 0.001 * SIZE if method in ("breadcrumbs_ties", "della") else apart == 0  # others do not vote


@pytest.mark.parametrize("select_topk", [0.3, 1.0])
@pytest.mark.parametrize(("dtype", "size", "limit"), [
    (FP32, 0.004, 6e-8), (FP32, 0.0002, 6e-8),  # with the smaller, mergekit gives all members one weight
    (BF16, 0.004, 1e-6)])                       # of equals at the cut mergekit takes others, which moves the weights
def test_sce_is_mergekits_but_for_entries_at_the_cut(mergekit, select_topk, dtype, size, limit):
    members, base = zoo(dtype, size)
    ours = dict(merged(merging["sce"].bind({"select_topk": select_topk}), members, base, out_dtype="float32"))
    theirs = mergekit("sce", members, base, select_topk=select_topk)
    apart = at_cut = 0
    for name in SHAPES:
        deltas = differences(members, base, name)
        assert (np.square(deltas).mean(tuple(range(1, deltas.ndim))).sum() < 1e-6) == (size < 0.001)
        spread = deltas.var(0)
        tied = undecided(deltas)
        if select_topk < 1:
            edge = -np.sort(-spread, axis=None)[int(np.count_nonzero(spread) * select_topk) - 1]
            tied |= np.isclose(spread, edge, rtol=1e-5, atol=0)
        differs = far(ours[name], theirs[name], limit)
        assert not (differs & ~tied).any()
        apart, at_cut = apart + int(differs.sum()), at_cut + int(tied.sum())
    assert apart <= at_cut < (0.0001 if dtype == FP32 else 0.01) * SIZE


@pytest.mark.parametrize(("method", "given"), [
    ("ram", {}), ("ram", {"epsilon": 0.003}), ("ramplus_tl", {}), ("ramplus_tl", {"epsilon": 0.003}),
    ("ramplus_tl", {"epsilon": 0.006, "r": 0.5, "alpha": 100.0})])
def test_ram_is_mergekits(mergekit, method, given):
    members, base = zoo()
    ours = dict(merged(merging[method].bind(given), members, base, out_dtype="float32"))
    theirs = mergekit(method, members, base, **given)
    for name in SHAPES:
        at_threshold = np.isclose(np.abs(differences(members, base, name)), given.get("epsilon", 1e-5), rtol=1e-6)
        assert not at_threshold.any() and not far(ours[name], theirs[name]).any()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_what_is_drawn_is_rescaled_as_in_mergekit(mergekit, monkeypatch, method, rescale):
    members, base = zoo(FP32)
    given = {"weight": WEIGHTS, "density": DENSITY}
    ours = dict(merged(merging[method].bind({**given, "rescale": rescale}), members, base))
    if "della" in method:
        drawn = iter([draw for name in SHAPES for draw in draws(members, name)])
        monkeypatch.setattr(torch, "bernoulli", lambda chance: (next(drawn).reshape(chance.shape) < chance).float())
    else:
        drawn = iter([draw for name in SHAPES for draw in stays(members, name)])
        monkeypatch.setattr(torch, "bernoulli", lambda chance: next(drawn).reshape(chance.shape).float())
    theirs = mergekit(method, members, base, **given, rescale=rescale == "l1")
    assert next(drawn, None) is None and not any(far(ours[name], theirs[name], 1.2e-7).any() for name in SHAPES)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize("normalize", [True, False])
def test_della_is_mergekits_if_mergekit_is_given_our_draws(mergekit, monkeypatch, method, normalize):
    members, base = zoo(FP32)
    given = {"weight": WEIGHTS, "density": DENSITY, "epsilon": 0.19, "normalize": normalize, "lambda": 1.1}
    ours = dict(merged(merging[method].bind({**given, "rescale": "l1"}), members, base, out_dtype="float32"))
    drawn = iter([draw for name in SHAPES for draw in draws(members, name)])
    monkeypatch.setattr(torch, "bernoulli", lambda chance: (next(drawn).reshape(chance.shape) < chance).float())
    theirs = mergekit(method, members, base, **given)
    assert next(drawn, None) is None and sum(int(far(ours[name], theirs[name]).sum()) for name in SHAPES) == 0


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_has_the_statistics_of_mergekits(mergekit, method):
    members, base = zoo(FP32)
    given = {"weight": WEIGHTS, "density": 0.3, "epsilon": 0.2}
    ours = dict(merged(merging[method].bind({**given, "rescale": "l1"}), members, base, seed=1))
    theirs = mergekit(method, members, base, **given)
    for name in ("a.weight", "b.weight"):
        one, other = ours[name] - base.weights[name], theirs[name] - base.weights[name]
        assert float(one.square().mean().sqrt() / other.square().mean().sqrt()) == pytest.approx(1, abs=0.02)
        assert float((one == 0).float().mean()) == pytest.approx(float((other == 0).float().mean()), abs=0.01)


# --- oracles ----------------------------------------------------------------------------------------------------------

def breadcrumbs(deltas: np.ndarray, weight: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return 0.7 * (weight * crumbs(deltas, [0.3] * 4, 0.05)).sum(0)


def breadcrumbs_ties(deltas: np.ndarray, weight: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return elected(crumbs(deltas, [0.3] * 4, 0.05), weight, normalize=True)


def elected(deltas: np.ndarray, weight: np.ndarray, normalize: bool) -> np.ndarray:
    votes = weight * deltas
    agrees = np.sign(votes) == np.where(votes.sum(0) >= 0, 1, -1)
    counted = (weight * agrees).sum(0) if normalize else np.ones(votes.shape[1:])
    return np.where(undecided(votes), np.nan, (votes * agrees).sum(0) / np.where(counted == 0, 1, counted))


def thinned(deltas: np.ndarray, drawn: np.ndarray, rescale: str) -> np.ndarray:
    """What DELLA keeps, with a density of 0.4 and an epsilon of 0.3; NaN where a draw is as good as its chance."""
    rank = np.argsort(np.argsort(np.abs(deltas), axis=-1, kind="stable"), axis=-1)
    chance = 0.1 + 0.6 * rank / (deltas.shape[-1] - 1)
    stays = np.where(drawn < chance, deltas, 0)
    if rescale == "share":
        stays = stays / chance
    else:
        axes = tuple(range(1, deltas.ndim))
        stays = stays * np.abs(deltas).sum(axes, keepdims=True) / np.abs(stays).sum(axes, keepdims=True)
    return np.where(np.abs(drawn - chance) < 1e-6, np.nan, stays)


def della(deltas: np.ndarray, weight: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return elected(thinned(deltas, drawn, "l1"), weight, normalize=True)


def della_linear(deltas: np.ndarray, weight: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    return 0.7 * (weight * thinned(deltas, drawn, "share")).sum(0)


def sce(deltas: np.ndarray, weight: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    spread = deltas.var(0)
    order = np.argsort(-spread, axis=None, kind="stable")[:int(np.count_nonzero(spread) * 0.3)]
    at_cut = np.isclose(spread, spread.flat[order[-1]], rtol=1e-5, atol=0)
    chosen = np.zeros(spread.shape)
    chosen.flat[order] = 1
    deltas = deltas * chosen
    squares = np.square(deltas).sum(tuple(range(1, deltas.ndim)), keepdims=True)
    agrees = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
    counted = squares / squares.sum() * agrees
    total = (counted * deltas).sum(0) / np.maximum(counted.sum(0), 1e-6)
    return np.where(at_cut | undecided(deltas), np.nan, total)


def ram(deltas: np.ndarray, weight: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    touched = np.abs(deltas) > 0.003
    return (deltas * touched).sum(0) / np.maximum(touched.sum(0), 1)


def ramplus_tl(deltas: np.ndarray, weight: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    touched = np.abs(deltas) > 0.003
    count, axes = touched.sum(0), tuple(range(1, deltas.ndim))
    ratio = (touched & (count > 1)).sum(axes, keepdims=True) / (touched & (count == 1)).sum(axes, keepdims=True)
    assert ratio.min() < 1.15 < ratio.max()  # so that some are clipped
    alone = (deltas * touched * (1 + 0.5 * np.minimum(ratio, 1.15))).sum(0)
    return np.where(count == 1, alone, ram(deltas, weight, drawn))


SHARED = {"weight": WEIGHTS, "density": 0.3, "gamma": 0.05}
DELLA = {"weight": WEIGHTS, "density": 0.4, "epsilon": 0.3}
ORACLES = [("breadcrumbs", breadcrumbs, {**SHARED, "lambda": 0.7}),
           ("breadcrumbs_ties", breadcrumbs_ties, {**SHARED, "normalize": True}),
           ("della", della, {**DELLA, "rescale": "l1"}),
           ("della_linear", della_linear, {**DELLA, "rescale": "share", "lambda": 0.7}),
           ("sce", sce, {"select_topk": 0.3}), ("ram", ram, {"epsilon": 0.003}),
           ("ramplus_tl", ramplus_tl, {"epsilon": 0.003, "r": 0.5, "alpha": 1.15})]


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("method", "oracle", "given"), ORACLES, ids=[row[0] for row in ORACLES])
def test_the_only_error_is_the_one_rounding_at_the_end(method, oracle, given, dtype):
    members, base = zoo(dtype)
    ours = dict(merged(merging[method].bind(given), members, base, seed=2))
    for name, shape in SHAPES.items():
        weight = np.array(list(WEIGHTS.values())).reshape(-1, *[1] * len(shape))
        drawn = np.stack([draw.double().numpy() for draw in draws(members, name, seed=2)])
        moved = oracle(differences(members, base, name), weight, drawn)
        decided = np.isfinite(moved)
        assert np.mean(~decided) <= (0.01 if dtype == BF16 else 0.005)
        found, exact = ours[name].double().numpy()[decided], (wide(base, name) + moved)[decided]
        # Factors of up to 10 enlarge the error of a term before terms cancel.
        slack = 32 * 2.0 ** (-24 if dtype == BF16 else -52) * np.abs(wide(base, name)).max()
        unit = np.ldexp(torch.finfo(dtype).eps, np.frexp(np.abs(exact))[1] - 1)
        assert ours[name].dtype == dtype
        assert np.all(np.abs(found - exact) <= 0.5 * unit + slack)
        assert np.quantile(np.abs(found - exact) / unit, 0.99) <= 0.501


@pytest.mark.parametrize("rescale", ["share", "l1"])
def test_della_keeps_large_entries_of_a_row_more_often(rescale):
    _, base = zoo(FP32)
    random, given = torch.Generator().manual_seed(1), {"density": 0.4, "epsilon": 0.3, "rescale": rescale}
    dense = Source("m", InMemory({name: base.weights[name] + 0.004 * torch.randn(shape, generator=random)
                                  for name, shape in SHAPES.items()}))
    ours = dict(merged(merging["della_linear"].bind(given), [dense], base, seed=1))
    for name in ("a.weight", "b.weight"):
        delta, moved = wide(dense, name) - wide(base, name), ours[name].double().numpy() - wide(base, name)
        rank = np.abs(delta).argsort(-1).argsort(-1) / (delta.shape[-1] - 1)
        for low, high in ((0, 0.25), (0.375, 0.625), (0.75, 1)):
            there = (rank >= low) & (rank <= high)
            chance = 0.1 + 0.6 * rank[there].mean()
            assert abs((moved[there] != 0).mean() - chance) <= 4 * np.sqrt(chance * (1 - chance) / there.sum())
        if rescale == "l1":
            assert np.abs(moved).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-5)
        else:
            kept = moved != 0
            assert np.allclose(moved[kept], (delta / (0.1 + 0.6 * rank))[kept], rtol=0, atol=2e-8)


# --- what the laws, which take defaults, do not reach -----------------------------------------------------------------

@pytest.mark.parametrize(("method", "given"), [
    ("sce", {"select_topk": 0.3}), ("ram", {"epsilon": 0.003}), ("ramplus_tl", {"epsilon": 0.003}),
    ("breadcrumbs_ties", {"density": 0.5, "gamma": 0.1}), ("della", {"density": 0.4, "epsilon": 0.3})])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_neither_pieces_nor_order_change_a_bit(method, given, dtype):
    members, base = zoo(dtype)
    choice = merging[method].bind(given)
    whole = dict(merged(choice, members, base, seed=3))
    for piece in (255, 4096):
        found = dict(merged(choice, members, base, seed=3, piece=piece))
        assert all(torch.equal(found[name], whole[name]) for name in SHAPES)
    for order in list(permutations(members))[5::6]:
        found = dict(merged(choice, order, base, seed=3))
        assert all(torch.equal(found[name], whole[name]) for name in SHAPES)


def few(method: str, *rows: list[float], **given: object) -> list[float]:
    """The merge of rows over a base of zeros, in fp64."""
    members = [Source(f"m{k}", InMemory({"w": torch.tensor(row, dtype=torch.float64)})) for k, row in enumerate(rows)]
    base = Source("base", InMemory({"w": torch.zeros(len(rows[0])).double()}))
    return dict(merged(merging[method].bind(given), members, base))["w"].tolist()


@pytest.mark.parametrize(("density", "gamma", "left"), [
    (0.4, 0.2, [0, -4, 3, 0, 0]), (0.4, 0.0, [0, -4, 0, 0, 5]), (0.9, 0.4, [1, -4, 3, 2, 0]),
    (1.0, 0.4, [1, -4, 3, 2, 5]), (0.1, 0.2, [0, 0, 0, 0, 0])])
def test_breadcrumbs_keep_the_share_below_the_outliers(density, gamma, left):
    assert few("breadcrumbs", [1.0, -4.0, 3.0, 2.0, 5.0], density=density, gamma=gamma) == left


def test_of_equals_at_the_upper_cut_the_first_is_the_outlier():
    assert few("breadcrumbs", [3.0, -3.0, 3.0, 3.0, 3.0], density=0.4, gamma=0.2) == [0, -3, 3, 0, 0]


def test_no_entry_is_among_the_largest_none():
    numbers = torch.tensor([[1.0, torch.inf, 0.0]])
    none, every = cut_at(Held(Leaf("w", numbers)), [0], [3])
    assert among_largest(numbers, none, 0).tolist() == [[False, False, False]]
    assert among_largest(numbers, every, 0).tolist() == [[True, True, True]]


def test_sce_selects_where_members_differ_and_weighs_by_squares():
    # Variances 1, 0, 16, 4: of the three that are not zero, two. Squares 90 and 2 of 92.
    found = few("sce", [2.0, 5.0, 9.0, 3.0], [0.0, 5.0, 1.0, -1.0], select_topk=0.7)
    assert found == pytest.approx([0, 0, (90 * 9 + 2 * 1) / 92, 3])
    assert few("sce", [1e3, 0.0], [0.0, 0.01]) == pytest.approx([1e3, 1e-6])  # a weight of 1e-10 counts as one of 1e-6


def test_entries_that_are_alike_in_all_members_do_not_vary():
    # (0.1 + 0.1 + 0.1) / 3 is not 0.1. One entry varies, and half of it is none.
    assert few("sce", [0.1, 1.0], [0.1, 2.0], [0.1, 3.0], select_topk=0.5) == [0, 0]


def test_ram_averages_over_those_who_changed_an_entry():
    one, other = [4.0, 2.0, 0.0, 1e-6], [0.0, 4.0, 0.0, 0.0]
    assert few("ram", one, other) == [4, 3, 0, 0]
    # Each has one shared entry; the first has one alone (ratio 1), the second none, and no entry to enlarge.
    assert few("ramplus_tl", one, other, r=0.5, alpha=10.0) == [6, 3, 0, 0]
    assert few("ramplus_tl", one, other, r=0.5, alpha=0.2) == pytest.approx([4.4, 3, 0, 0])
    assert few("ramplus_tl", one, [0.0] * 4) == [4, 2, 0, 0]  # nothing is shared, so nothing is enlarged


def test_chances_that_are_none_are_refused_before_any_work():
    members, base = zoo()
    with pytest.raises(MethodError, match="density 0.1 and epsilon 0.15 make chances to stay of -0.05 to 0.25; a "
                                          "chance lies between 0 and 1\n  give a smaller epsilon"):
        check(merging["della"].bind({"density": 0.1}), members, base)
    for density in (0.15, 0.85, 1.0):
        check(merging["della_linear"].bind({"density": density}), members, base)


def test_an_entry_alone_in_its_row_stays_with_the_mean_chance():
    base = Source("base", InMemory({"w": torch.zeros(20_000, 1), "one": torch.zeros(())}))
    member = Source("m", InMemory({"w": torch.ones(20_000, 1), "one": torch.tensor(1.0)}))
    found = dict(merged(merging["della_linear"].bind({"density": 0.4, "epsilon": 0.3}), [member], base))
    assert set(found["w"].flatten().tolist()) == {0.0, 2.5} and found["one"].item() in (0.0, 2.5)
    assert abs(float((found["w"] > 0).float().mean()) - 0.4) <= 4 * (0.24 / 20_000) ** 0.5


@pytest.mark.parametrize("method", [row[0] for row in ORACLES])
def test_nothing_hides_a_number_that_is_not_finite(method):
    members, base = zoo()
    bad = Source("bad", InMemory({**dict(members[0].weights), "c.norm": torch.full((256,), torch.nan).to(BF16)}))
    bad.weights["c.norm"][1:] = members[0].weights["c.norm"][1:]
    word = {"density", "select_topk"} & set(merging[method].parameters)
    with pytest.raises(CheckpointError, match="'c.norm' of 'bad' holds numbers that are not finite"):
        dict(merged(merging[method].bind(dict.fromkeys(word, 0.3)), [bad, *members[1:]], base))
