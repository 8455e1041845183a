"""Merges by directions, of one model or of two, against mergekit's and against fp64 oracles written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from glue.checkpoint import InMemory
from glue.errors import CheckpointError, MethodError
from glue.merge import merging
from glue.merge.engine import check, merged
from glue.merge.gram import gram, gram_along
from glue.merge.leaf import Leaf, Source
from glue.merge.target import Held

FP32, FP64 = torch.float32, torch.float64
SHAPES = {"a.weight": (96, 160), "b.weight": (3, 40, 24), "c.norm": (160,)}
WEIGHTS = {"m0": 0.5, "m1": 0.2, "m2": 0.3}
PAIR = {"m0": 0.7, "m1": 0.2}
# Method, members, whether there is a base, parameters.
CASES = [
    ("nuslerp", 2, False, {"weight": PAIR}),
    ("nuslerp", 2, True, {"weight": PAIR}),
    ("nuslerp", 2, True, {"weight": PAIR, "nuslerp_flatten": False}),
    ("nuslerp", 2, False, {"weight": PAIR, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("nuslerp", 2, True, {"weight": PAIR, "nuslerp_flatten": True, "nuslerp_row_wise": True}),
    ("multislerp", 3, False, {"weight": WEIGHTS}),
    ("multislerp", 3, True, {"weight": WEIGHTS}),
    ("multislerp", 2, True, {"weight": PAIR, "normalize_weights": False}),
    ("multislerp", 3, True, {"weight": WEIGHTS, "eps": 1e-3}),
    ("karcher", 3, False, {}),
    ("karcher", 3, False, {"max_iter": 1}),
    ("karcher", 3, False, {"max_iter": 50, "tol": 1e-7}),
    ("model_stock", 2, True, {}),
    ("model_stock", 3, True, {}),
    ("model_stock", 3, True, {"filter_wise": True}),
    ("nearswap", 2, False, {"t": 0.01}),
    ("nearswap", 2, False, {"t": 1e-4}),
    ("nearswap", 2, False, {"t": 0.0}),
    ("passthrough", 1, False, {"scale": 0.3}),
    ("passthrough", 1, False, {}),
]
NAMES = [f"{name}-{n}{'-base' * based}-{k}" for k, (name, n, based, _) in enumerate(CASES)]
every_case = pytest.mark.parametrize(("method", "n", "based", "given"), CASES, ids=NAMES)
OURS = ["arcee_fusion", "karcher", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough"]


@pytest.fixture(scope="module")
def mergekit():
    """mergekit's merge of state dicts; the first of two is its base where it knows no order but that."""
    from mergekit.merge_methods.api import merge_state_dicts

    def merge(method: str, members: list[Source], base: Source | None, dtype: torch.dtype = FP32,
              **given: object) -> dict[str, Tensor]:
        if method in ("nearswap", "arcee_fusion"):
            base, members = members[0], members[1:]
        models = {source.name: dict(source.weights) for source in [*([base] if base else []), *members]}
        return merge_state_dicts(models, method, parameters=given, base=base.name if base else None, dtype=dtype,
                                 out_dtype=dtype)
    return merge


def zoo(n: int, dtype: torch.dtype = FP32, apart: float = 0.02) -> tuple[list[Source], Source]:
    """n children of one base, each further from it than the last, so that no two angles are equal, and that base."""
    random = torch.Generator().manual_seed(0)
    below = {name: 0.03 * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    shared = {name: 0.5 * apart * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    children = [{name: tensor + shared[name] + apart * (k + 0.5) * torch.randn(tensor.shape, generator=random)
                 for name, tensor in below.items()} for k in range(n)]
    sources = [Source(name, InMemory({word: tensor.to(dtype) for word, tensor in tensors.items()}))
               for name, tensors in zip([*(f"m{k}" for k in range(n)), "base"], [*children, below], strict=True)]
    return sources[:-1], sources[-1]


def one(*tensors: Tensor, method: str, base: Tensor | None = None, **given: object) -> Tensor:
    """What a method makes of single tensors."""
    members = [Source(f"m{k}", InMemory({"w": tensor})) for k, tensor in enumerate(tensors)]
    below = None if base is None else Source("base", InMemory({"w": base}))
    return dict(merged(merging[method].bind(given), members, below))["w"]


def wide(source: Source, name: str) -> np.ndarray:
    return source.weights[name].double().numpy()


def place(found: Tensor, exact: Tensor) -> float:
    """How far apart, in units of the largest entry."""
    return float((found.double() - exact.double()).abs().max() / exact.double().abs().max())


# --- oracles: fp64, on whole vectors, each in the words of its paper and with none of our inner products -------------

def rows(x: np.ndarray, axis: int | None) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """The vectors of a tensor as rows, and the way back."""
    if axis is None:
        return x.reshape(1, -1), lambda flat: flat.reshape(x.shape)
    moved = np.moveaxis(x, axis, -1)
    return (moved.reshape(-1, moved.shape[-1]),
            lambda flat: np.moveaxis(flat.reshape(moved.shape), -1, axis))


def nuslerp(x: np.ndarray, weight: dict, nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False) -> np.ndarray:
    w = list(weight.values())
    t = w[1] / sum(w)
    axis = None if nuslerp_flatten else 0 if nuslerp_row_wise else -1
    (a, back), (b, _) = rows(x[0], axis), rows(x[1], axis)
    out = []
    for u, v in zip(a, b, strict=True):
        angle = np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
        out.append((np.sin((1 - t) * angle) * u + np.sin(t * angle) * v) / np.sin(angle))
    return back(np.stack(out))


def multislerp(x: np.ndarray, weight: dict, normalize_weights: bool = True, eps: float = 1e-8) -> np.ndarray:
    """With the step along the tangents, which has no length."""
    flat, w = x.reshape(len(x), -1), np.array(list(weight.values()))
    w = w / w.sum() if normalize_weights else w
    length = np.linalg.norm(flat, axis=1)
    unit = flat / (length + eps)[:, None]
    mean = w @ unit
    if np.linalg.norm(mean) < eps:
        return (w @ flat).reshape(x.shape[1:])
    mean = mean / np.linalg.norm(mean)
    tangent = w @ (unit - np.outer(unit @ mean, mean))
    assert np.linalg.norm(tangent) < 1e-14
    return ((w @ length) * mean).reshape(x.shape[1:])


def karcher(x: np.ndarray, max_iter: int = 10, tol: float = 1e-5) -> np.ndarray:
    flat = x.reshape(len(x), -1)
    length = np.linalg.norm(flat, axis=1)
    unit = flat / length[:, None]
    mean = unit.mean(0) / np.linalg.norm(unit.mean(0))
    for _ in range(max_iter):
        angle = np.arccos(unit @ mean)
        step = np.mean([a / np.sin(a) * (u - np.cos(a) * mean) for a, u in zip(angle, unit, strict=True)], axis=0)
        far = np.linalg.norm(step)
        if far < tol:
            break
        mean = np.cos(far) * mean + np.sin(far) * step / far
    return (length.mean() * mean).reshape(x.shape[1:])


def model_stock(x: np.ndarray, filter_wise: bool = False) -> np.ndarray:
    n, axis = len(x), -1 if filter_wise and x.ndim > 2 else None
    flat = np.stack([rows(delta, axis)[0] for delta in x])
    unit = flat / np.linalg.norm(flat, axis=-1, keepdims=True)
    pairs = [(unit[i] * unit[j]).sum(-1) for i in range(n) for j in range(i)]
    cosine = np.mean(pairs, axis=0)[:, None]
    return rows(x[0], axis)[1](n * cosine / (1 + (n - 1) * cosine) * flat.mean(0))


def nearswap(x: np.ndarray, t: float) -> np.ndarray:
    return x[0] + np.sign(x[1] - x[0]) * np.minimum(np.abs(x[1] - x[0]), t)


def passthrough(x: np.ndarray, scale: float = 1.0) -> np.ndarray:
    return scale * x[0]


ORACLES = {call.__name__: call for call in (nuslerp, multislerp, karcher, model_stock, nearswap, passthrough)}


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32])
def test_the_only_error_is_the_one_rounding_at_the_end(method, n, based, given, dtype):
    members, base = zoo(n, dtype)
    ours = dict(merged(merging[method].bind(given), members, base if based else None))
    for name in SHAPES:
        below = wide(base, name) if based else 0.0
        exact = below + ORACLES[method](np.stack([wide(source, name) - below for source in members]), **given)
        found = ours[name].double().numpy()
        term = max(np.abs(wide(source, name)).max() for source in [*members, base])
        slack = 8 * 2.0 ** (-24 if dtype == torch.bfloat16 else -52) * term
        unit = np.ldexp(torch.finfo(dtype).eps, np.frexp(np.abs(exact))[1] - 1)
        assert ours[name].dtype == dtype
        assert np.all(np.abs(found - exact) <= 0.5 * unit + slack)


# --- mergekit ---------------------------------------------------------------------------------------------------------

@every_case
def test_a_merge_is_mergekits_within_its_fp32(mergekit, method, n, based, given):
    """mergekit takes lengths and angles in fp32 and rounds often; ours are fp64 and rounded once."""
    members, base = zoo(n)
    ours = dict(merged(merging[method].bind(given), members, base if based else None))
    theirs = mergekit(method, members, base if based else None, **given)
    assert list(ours) == sorted(theirs)
    assert all(place(ours[name], theirs[name]) <= 2e-6 for name in ours)


@every_case
def test_a_merge_is_mergekits_in_fp64(mergekit, method, n, based, given):
    members, base = zoo(n, FP64)
    ours = dict(merged(merging[method].bind(given), members, base if based else None))
    theirs = mergekit(method, members, base if based else None, FP64, **given)
    # multislerp of theirs adds eps to a step of no length, and multiplies the result by cos(eps).
    limit = 1 - np.cos(given["eps"]) + 1e-12 if given.get("eps") else 1e-12
    assert all(place(ours[name], theirs[name]) <= limit for name in ours)


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_arcee_fusion_keeps_what_mergekit_keeps(mergekit, dtype):
    members, _ = zoo(2, dtype)
    ours, theirs = dict(merged(merging["arcee_fusion"].bind(), members)), mergekit("arcee_fusion", members, None, dtype)
    for name in SHAPES:
        assert place(ours[name], theirs[name]) <= (1e-7 if dtype == FP32 else 1e-15)
        assert 0.03 < float((ours[name] != members[0].weights[name]).double().mean()) < 0.2


def test_arcee_fusion_finds_small_changes_that_mergekits_fp32_does_not(mergekit):
    """The divergence of two rows that differ by 1e-4 is about 1e-8, the rounding of fp32."""
    members, _ = zoo(2, FP32, apart=1e-4)
    exact = [Source(one.name, InMemory({name: one.weights[name].double() for name in SHAPES})) for one in members]
    ours = dict(merged(merging["arcee_fusion"].bind(), members))
    theirs = {dtype: mergekit("arcee_fusion", given, None, dtype) for dtype, given in ((FP32, members), (FP64, exact))}

    def astray(found: dict[str, Tensor]) -> int:
        return sum(int((~torch.isclose(found[name].double(), theirs[FP64][name], rtol=0, atol=2e-8)).sum())
                   for name in SHAPES)

    assert astray(ours) == 0 and astray(theirs[FP32]) > 0.1 * sum(np.prod(shape) for shape in SHAPES.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP32])
def test_arcee_fusion_is_an_oracles(dtype):
    members, _ = zoo(2, dtype)
    ours = dict(merged(merging["arcee_fusion"].bind(), members))
    for name in SHAPES:
        x, y = (wide(member, name) for member in members)
        p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) + 1e-8 for z in (y, x))
        scores = np.abs(y - x) * (p * np.log(p / q)).sum(-1, keepdims=True)
        lower, middle, upper = np.sort(scores, axis=None)[[int(s * (scores.size - 1)) for s in (0.25, 0.5, 0.75)]]
        edge = middle + 1.5 * (upper - lower)
        expected = np.where(scores >= edge, y, x)
        decided = np.abs(scores - edge) > 1e-6 * edge
        assert np.mean(~decided) <= 0.001
        assert np.array_equal(ours[name].double().numpy()[decided], expected[decided])


# --- where we depart, and what becomes of odd tensors -----------------------------------------------------------------

def test_tensors_that_nobody_changed_are_merged():
    base = torch.tensor([1.0, -2.0])
    for method, n in (("nuslerp", 2), ("multislerp", 3), ("model_stock", 3)):
        assert torch.equal(one(*[base] * n, method=method, base=base), base)
    assert torch.equal(one(*[torch.zeros(2)] * 3, method="karcher"), torch.zeros(2))


def test_opposite_models_meet_on_a_straight_line(mergekit):
    x = torch.tensor([3.0, 4.0])
    assert one(x, -x, method="nuslerp", weight=[0.75, 0.25]).tolist() == pytest.approx([1.5, 2.0])
    assert one(x, -x, method="multislerp").tolist() == [0.0, 0.0]
    pair = [Source("m0", InMemory({"w": x})), Source("m1", InMemory({"w": -2 * x}))]
    for method, given in (("multislerp", {"weight": [0.5, 0.5]}), ("nuslerp", {"weight": [0.75, 0.25]})):
        expected = mergekit(method, pair, None, **given)["w"]
        assert torch.allclose(one(x, -2 * x, method=method, **given), expected, rtol=1e-6)


def test_directions_that_cancel_out_fall_back_to_the_weighted_sum():
    tensors = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [0.0, -4.0]])
    assert one(*tensors, method="multislerp").tolist() == pytest.approx([-0.25, -0.25])


def test_the_karcher_mean_of_opposites_is_one_of_them():
    found = one(torch.tensor([3.0, 4.0]), torch.tensor([-3.0, -4.0]), method="karcher")
    assert found.abs().tolist() == pytest.approx([3.0, 4.0])


def test_the_karcher_mean_of_short_tensors_is_as_long_as_they():
    x, y = torch.tensor([1e-7, 0.0]), torch.tensor([0.0, 1e-7])
    assert one(x, y, method="karcher").tolist() == pytest.approx([1e-7 / 2**0.5] * 2)


def test_the_karcher_mean_is_searched_for_step_by_step():
    members, _ = zoo(3, FP64)
    found = {k: dict(merged(merging["karcher"].bind({"max_iter": k}), members))["a.weight"] for k in (0, 1, 50)}
    away = [place(found[k], found[50]) for k in (0, 1)]
    assert away == pytest.approx([9e-3, 5e-4], rel=0.2)


def test_the_karcher_mean_does_not_move_when_it_is_turned_to():
    """At the mean the steps to all members cancel out: what makes it the mean."""
    members, _ = zoo(3, FP64)
    made = dict(merged(merging["karcher"].bind({"max_iter": 100, "tol": 1e-9}), members))["a.weight"].reshape(-1)
    mean, pull = made / made.norm(), torch.zeros_like(made)
    for member in members:
        unit = member.weights["a.weight"].reshape(-1) / member.weights["a.weight"].norm()
        angle = (unit @ mean).acos()
        pull += angle / angle.sin() * (unit - angle.cos() * mean)
    assert float(pull.norm()) < 1e-8


def test_model_stock_goes_all_the_way_where_members_agree_and_nowhere_where_they_do_not():
    base, x, y = torch.zeros(2), torch.tensor([1e-5, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.equal(one(x, 3 * x, method="model_stock", base=base), 2 * x)
    assert torch.equal(one(x, y, method="model_stock", base=base), base)
    assert torch.equal(one(y, -y, method="model_stock", base=base), base)  # 1 + cosine is 0


def test_filters_are_judged_one_by_one():
    x, y = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = one(x, y, method="model_stock", base=torch.zeros(2, 2), filter_wise=True)
    assert found.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_nearswap_takes_what_is_within_t_and_goes_t_towards_the_rest():
    x, y = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([1.2, 0.8, 3.0, -3.0])
    assert one(x, y, method="nearswap", t=0.5).tolist() == pytest.approx([1.2, 0.8, 1.5, 0.5])
    near = torch.tensor([5e-8]).double()
    assert one(torch.zeros(1).double(), near, method="nearswap", t=1e-7).item() == near.item()


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_member_with_a_number_that_is_not_finite_is_named(method, bad):
    count = merging[method].traits.get("members", (1, None))[1] or 3
    for broken in range(count):
        tensors = [torch.ones(3, 4) for _ in range(count)]
        tensors[broken][1, 1] = bad
        with pytest.raises(CheckpointError, match=f"'w' of 'm{broken}' holds numbers that are not finite"):
            one(*tensors, method=method, base=torch.zeros(3, 4))


def test_single_numbers_are_merged():
    for method in OURS:
        count = merging[method].traits.get("members", (1, None))[1] or 3
        assert one(*[torch.tensor(2.0)] * count, method=method, base=torch.tensor(1.0)).item() == pytest.approx(2)


# --- the base that may be left out ------------------------------------------------------------------------------------

def test_an_optional_base_of_zeros_is_no_base():
    members, base = zoo(2)
    zeros = Source("zeros", InMemory({name: torch.zeros(shape) for name, shape in SHAPES.items()}))
    for method in [method for method in merging if method.traits.get("base") == "optional"]:
        free, tied, based = (dict(merged(method.bind(), members, below)) for below in (None, zeros, base))
        assert all(torch.equal(free[name], tied[name]) for name in SHAPES)
        assert all(not torch.equal(free[name], based[name]) for name in SHAPES)


def test_a_method_whose_base_is_not_optional_asks_for_it():
    members, _ = zoo(2)
    with pytest.raises(MethodError, match="'model_stock' works on differences to a base, and no base is given"):
        check(merging["model_stock"].bind(), members)


def test_weights_that_cancel_out_are_refused_before_any_work():
    members, _ = zoo(2)
    for method in ("nuslerp", "multislerp"):
        with pytest.raises(MethodError, match=r"the weights \[1.0, -1.0\] sum to 0"):
            check(merging[method].bind({"weight": [1.0, -1.0]}), members)
    check(merging["multislerp"].bind({"weight": [1.0, -1.0], "normalize_weights": False}), members)


# --- inner products ---------------------------------------------------------------------------------------------------

def test_inner_products_are_those_of_fp64():
    tensors = torch.randn(3, 50, 4, 30, generator=torch.Generator().manual_seed(1))
    exact = tensors.double()
    for axis, letters in ((None, "iabc,jabc->ij"), (0, "iabc,jabc->ijbc"), (-1, "iabc,jabc->ijab")):
        found = gram(Held(Leaf("w", tensors))) if axis is None else gram_along(tensors, axis)
        assert found.shape == {None: (3, 3), 0: (3, 3, 1, 4, 30), -1: (3, 3, 50, 4, 1)}[axis]
        expected = torch.einsum(letters, exact, exact)
        assert torch.allclose(found.reshape(-1), expected.reshape(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}])
def test_the_order_of_two_members_and_of_threads_changes_no_bit_row_by_row(given):
    x, y = torch.randn(2, 500, 700, generator=torch.Generator().manual_seed(2))
    method = replace(merging["nuslerp"], traits={**merging["nuslerp"].traits, "symmetric": False})
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            for pair in ((x, y), (y, x)):
                members = [Source(f"m{k}", InMemory({"w": tensor})) for k, tensor in enumerate(pair)]
                made.append(dict(merged(method.bind(given), members))["w"])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, made[0]) for one in made)
