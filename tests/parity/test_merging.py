"""Our merges against mergekit's, and against fp64 oracles written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from glue.checkpoint import InMemory
from glue.family import Choice
from glue.merge import merging
from glue.merge.engine import merged, prepared
from glue.merge.leaf import Source

WEIGHTS = {"m0": 0.1, "m1": 0.2, "m2": 0.3, "m3": 0.4}
SHAPES = {"a.weight": (160, 256), "b.weight": (256, 96), "c.norm": (256,)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
BF16, FP32, FP64 = torch.bfloat16, torch.float32, np.float64


@pytest.fixture(scope="module")
def mergekit():
    """mergekit's merge of state dicts in fp32, rounded once at the end."""
    from mergekit.merge_methods.api import merge_state_dicts

    def merge(method: str, members: list[Source], base: Source | None, out: torch.dtype = BF16,
              **parameters: object) -> dict[str, Tensor]:
        torch.manual_seed(0)
        models = {source.name: dict(source.weights) for source in [*([base] if base else []), *members]}
        return merge_state_dicts(models, method, parameters=parameters, base=base.name if base else None,
                                 dtype=FP32, out_dtype=out)
    return merge


def zoo(dtype: torch.dtype = BF16) -> tuple[list[Source], Source]:
    """Four children of one base, of the sizes that tuned weights have, and that base."""
    random = torch.Generator().manual_seed(0)
    below = {name: 0.03 * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    children = [{name: tensor + 0.004 * torch.randn(tensor.shape, generator=random) for name, tensor in below.items()}
                for _ in WEIGHTS]
    sources = [Source(name, InMemory({word: tensor.to(dtype) for word, tensor in tensors.items()}))
               for name, tensors in zip([*WEIGHTS, "base"], [*children, below], strict=True)]
    return sources[:-1], sources[-1]


def in_our_order(choice: Choice, members: list[Source], base: Source | None) -> list[Source]:
    """The members as the engine sums them, so that sums can be compared bit by bit."""
    return list(prepared(choice, members, base).members)


def different(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> int:
    assert list(ours) == sorted(theirs)
    return sum(int((ours[name] != theirs[name]).sum()) for name in ours)


def wide(source: Source, name: str) -> np.ndarray:
    return source.weights[name].double().numpy()


# --- mergekit ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("normalize", [True, False])
def test_linear_is_mergekits_bit_by_bit(mergekit, normalize):
    members, _ = zoo()
    choice = merging["linear"].bind({"weight": WEIGHTS, "normalize": normalize})
    theirs = mergekit("linear", in_our_order(choice, members, None), None, weight=WEIGHTS, normalize=normalize)
    assert different(dict(merged(choice, members)), theirs) == 0


@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic_is_mergekits_bit_by_bit(mergekit, normalize):
    members, base = zoo()
    given = {"weight": WEIGHTS, "normalize": normalize, "lambda": 0.7}
    choice = merging["task_arithmetic"].bind(given)
    theirs = mergekit("task_arithmetic", in_our_order(choice, members, base), base, **given)
    assert different(dict(merged(choice, members, base)), theirs) == 0


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_mergekits_but_for_its_fp32_angle(mergekit, t):
    rng = torch.Generator().manual_seed(1)
    a, b = ({name: torch.randn(shape, generator=rng).to(BF16) for name, shape in SHAPES.items()} for _ in range(2))
    a["parallel"], b["parallel"] = a["c.norm"], (1.5 * a["c.norm"].float()).to(BF16)
    members = [Source("a", InMemory(a)), Source("b", InMemory(b))]
    ours = dict(merged(merging["slerp"].bind({"t": t}), members))
    theirs = mergekit("slerp", members[1:], members[0], t=t)
    assert different(ours, theirs) <= 0.001 * SIZE
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), rtol=2**-7, atol=1e-6) for name in ours)


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_ties_is_mergekits_but_for_entries_at_the_cut(mergekit, density, normalize):
    members, base = zoo()
    given = {"weight": WEIGHTS, "density": density, "normalize": normalize, "lambda": 0.9}
    choice = merging["ties"].bind(given)
    ours = dict(merged(choice, members, base))
    theirs = mergekit("ties", in_our_order(choice, members, base), base, **given)
    apart = 0
    for name, shape in SHAPES.items():
        deltas = np.stack([wide(source, name) - wide(base, name) for source in members]).reshape(len(members), -1)
        kept = max(1, int(density * deltas.shape[1]))
        edge = -np.sort(-np.abs(deltas), axis=1)[:, kept - 1:kept]
        tied = (np.abs(deltas) == edge).any(axis=0).reshape(shape)
        differs = (ours[name] != theirs[name]).numpy()
        assert not (differs & ~tied).any()  # mergekit's sort is not stable: it takes any of the entries at the cut
        apart += int(differs.sum())
    assert apart == 0 if density == 1 else 0 < apart < 0.02 * SIZE


@pytest.mark.parametrize("rescale", ["none", "l1"])
def test_ties_that_restores_norms_is_mergekits(mergekit, rescale):
    members, base = zoo(FP32)
    given = {"weight": WEIGHTS, "density": 0.2, "lambda": 0.9}
    ours = dict(merged(merging["ties"].bind({**given, "rescale": rescale}), members, base))
    theirs = mergekit("ties", members, base, FP32, **given, rescale=rescale == "l1")
    plain = mergekit("ties", members, base, FP32, **given)
    assert all(float((ours[name] - theirs[name]).abs().max()) <= 6e-8 for name in SHAPES)
    assert (max(float((theirs[name] - plain[name]).abs().max()) for name in SHAPES) > 1e-3) == (rescale == "l1")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", ["none", "share", "l1"])
def test_dare_that_keeps_everything_is_mergekits_bit_by_bit(mergekit, method, rescale):
    members, base = zoo()
    given = {"weight": WEIGHTS, "density": 1.0, "lambda": 1.2}
    choice = merging[method].bind({**given, "rescale": rescale})
    theirs = mergekit(method, in_our_order(choice, members, base), base, **given)
    assert different(dict(merged(choice, members, base)), theirs) == 0


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_has_the_statistics_of_mergekits(mergekit, method):
    members, base = zoo(FP32)
    given = {"weight": WEIGHTS, "density": 0.3}
    theirs = mergekit(method, members, base, FP32, **given)
    for rescale in ("share", "l1"):
        ours = dict(merged(merging[method].bind({**given, "rescale": rescale}), members, base))
        for name in ("a.weight", "b.weight"):
            one, other = ours[name] - base.weights[name], theirs[name] - base.weights[name]
            assert float(one.square().mean().sqrt() / other.square().mean().sqrt()) == pytest.approx(1, abs=0.02)
            assert float((one == 0).float().mean()) == pytest.approx(float((other == 0).float().mean()), abs=0.01)
            assert 0.2 < float((one == 0).float().mean()) < 0.27  # 0.7 ** 4 = 0.24 of the entries nobody keeps


# --- oracles ----------------------------------------------------------------------------------------------------------

def linear(tensors: np.ndarray, base: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.tensordot(weight, tensors, 1) / weight.sum()


def slerp(tensors: np.ndarray, base: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x, y = tensors
    angle = np.arccos((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))
    return (np.sin(0.7 * angle) * x + np.sin(0.3 * angle) * y) / np.sin(angle)


def task_arithmetic(tensors: np.ndarray, base: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return base + 0.7 * np.tensordot(weight, tensors - base, 1)


def ties(tensors: np.ndarray, base: np.ndarray, weight: np.ndarray) -> np.ndarray:
    deltas = (tensors - base).reshape(len(tensors), -1)
    for delta in deltas:
        delta[np.argsort(-np.abs(delta), kind="stable")[int(0.3 * delta.size):]] = 0
    votes = weight[:, None] * deltas
    agrees = np.sign(votes) == np.where(votes.sum(0) >= 0, 1, -1)
    counted = (weight[:, None] * agrees).sum(0)
    total = (votes * agrees).sum(0) / np.where(counted == 0, 1, counted)
    # Votes such as 0.1 + 0.2 - 0.3, whose sum is zero but for the rounding of the weights: nobody has won.
    total[(np.abs(votes.sum(0)) < 1e-6 * np.abs(votes).sum(0))] = np.nan
    return base + total.reshape(base.shape)


ORACLES = [("linear", linear, {"weight": WEIGHTS}), ("slerp", slerp, {"t": 0.3}),
           ("task_arithmetic", task_arithmetic, {"weight": WEIGHTS, "lambda": 0.7}),
           ("ties", ties, {"weight": WEIGHTS, "density": 0.3})]


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("method", "oracle", "given"), ORACLES, ids=[row[0] for row in ORACLES])
def test_the_only_error_is_the_one_rounding_at_the_end(method, oracle, given, dtype):
    members, base = zoo(dtype)
    if method == "slerp":  # of children of one base it would be a straight line
        members = [members[0], Source("m9", InMemory({name: members[1].weights[name].flip(0) for name in SHAPES}))]
    weight = np.array(list(WEIGHTS.values()))
    ours = dict(merged(merging[method].bind(given), members, base))
    for name in SHAPES:
        exact = oracle(np.stack([wide(source, name) for source in members]), wide(base, name), weight)
        decided = np.isfinite(exact)
        assert np.mean(~decided) <= (0.001 if method == "ties" and dtype == BF16 else 0)
        found, exact = ours[name].double().numpy()[decided], exact[decided]
        # Where terms cancel, the last place of the result is smaller than the error of the sum.
        term = max(np.abs(wide(source, name)).max() for source in [*members, base])
        slack = 8 * 2.0 ** (-24 if dtype == BF16 else -52) * term
        unit = np.ldexp(torch.finfo(dtype).eps, np.frexp(np.abs(exact))[1] - 1)
        assert ours[name].dtype == dtype
        assert np.all(np.abs(found - exact) <= 0.5 * unit + slack)
        assert np.quantile(np.abs(found - exact) / unit, 0.99) <= 0.501


@pytest.mark.parametrize("rescale", ["none", "l1"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_ties_can_cut_the_whole_model_at_once(dtype, rescale):
    """As its paper does; tensors that changed little then keep little."""
    members, base = zoo(dtype)
    calm = {name: base.weights[name] + (0.25 if name == "a.weight" else 1) * (tensor - base.weights[name])
            for name, tensor in members[2].weights.items()}
    members[2] = Source("m2", InMemory(calm))
    given = {"weight": WEIGHTS, "density": {"m0": 0.1, "m1": 0.2, "m2": 0.3, "m3": 1.0}, "rescale": rescale}
    weight = np.array(list(WEIGHTS.values()))
    flat = np.stack([np.concatenate([(wide(member, name) - wide(base, name)).ravel() for name in SHAPES])
                     for member in members])
    if dtype == BF16:
        flat = flat.astype(np.float32).astype(np.float64)
    whole = np.abs(flat).sum(1)
    for delta, density in zip(flat, given["density"].values(), strict=True):
        delta[np.argsort(-np.abs(delta), kind="stable")[max(1, int(density * SIZE)):]] = 0
    if rescale == "l1":
        flat *= (whole / np.abs(flat).sum(1))[:, None]
    votes = weight[:, None] * flat
    agrees = np.sign(votes) == np.where(votes.sum(0) >= 0, 1, -1)
    counted = (weight[:, None] * agrees).sum(0)
    exact = (votes * agrees).sum(0) / np.where(counted == 0, 1, counted)
    decided = ~(np.abs(votes.sum(0)) < 1e-6 * np.abs(votes).sum(0))
    assert decided.mean() > (0.997 if dtype == BF16 else 0.9999)
    for piece in (1000, 1 << 17):
        made = dict(merged(merging["ties"].bind({**given, "scope": "model"}), members, base, piece=piece,
                           out_dtype="float32"))
        found = np.concatenate([(made[name].double().numpy() - wide(base, name)).ravel() for name in SHAPES])
        assert np.abs(found - exact)[decided].max() <= 3e-8  # half a unit in the last place of weights up to 0.25
    alone = dict(merged(merging["ties"].bind(given), members, base, out_dtype="float32"))
    assert different(made, alone) > 0.1 * SIZE


def test_a_model_of_one_tensor_is_cut_as_its_tensor_is():
    members, base = ([Source(source.name, InMemory({"w": source.weights["a.weight"]})) for source in sources]
                     for sources in (zoo()[0], [zoo()[1]]))
    one, other = (dict(merged(merging["ties"].bind({"density": 0.2, "scope": scope}), members, base[0]))
                  for scope in ("tensor", "model"))
    assert torch.equal(one["w"], other["w"])


def test_dare_keeps_its_share_and_divides_by_it():
    members, base = zoo(FP32)
    ours = dict(merged(merging["dare_linear"].bind({"density": 0.3}), members[:1], base, seed=1))
    for name, shape in SHAPES.items():
        delta, moved = wide(members[0], name) - wide(base, name), ours[name].double().numpy() - wide(base, name)
        kept = moved != 0
        chance = round(0.3 * 65536) / 65536  # chances count in such steps
        assert np.allclose(moved[kept], delta[kept] / chance, rtol=0, atol=2e-8)  # half a unit in the last place of 0.2
        size = np.prod(shape)
        assert abs(kept.mean() - 0.3) <= 4 * np.sqrt(0.3 * 0.7 / size)


def test_dare_with_l1_keeps_the_l1_norm_of_every_tensor():
    members, base = zoo(FP32)
    ours = dict(merged(merging["dare_linear"].bind({"density": 0.3, "rescale": "l1"}), members[:1], base, seed=1))
    for name in SHAPES:
        delta, moved = wide(members[0], name) - wide(base, name), ours[name].double().numpy() - wide(base, name)
        assert np.abs(moved).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-5)
