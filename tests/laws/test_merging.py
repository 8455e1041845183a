"""The laws of merging, tested over every merge method there is: a new file in the folder is tested without an edit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

from glue.checkpoint import InMemory, as_bytes
from glue.errors import CheckpointError
from glue.family import Choice, Method, is_per_member
from glue.merge import merging
from glue.merge.engine import merged
from glue.merge.factors import Factors, stacked
from glue.merge.leaf import Leaf, Source
from glue.merge.parameters import settled

LAST_THREE = ("symmetric", "idempotent", "unbiased")
NUMBERS = some.floats(-1e4, 1e4, width=32)
TENSORS = arrays(np.float32, array_shapes(max_dims=3, max_side=5), elements=NUMBERS)
DTYPES = some.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def every(trait: str = "space", factors: bool = False) -> pytest.MarkDecorator:
    """All methods on tensors, or all on factors, that declare a trait; all methods declare a space."""
    return pytest.mark.parametrize("method", [method for method in merging if trait in method.traits and
                                              (method.traits["space"] == "factors") == factors],
                                   ids=lambda method: method.name)


def how_many(method: Method) -> int:
    """Three members, or as many as the method takes."""
    return method.traits.get("members", (1, None))[1] or 3


def told(method: Method, n: int, **given: object) -> Choice:
    """The method with unlike parameters for each of n members; they sum to 1."""
    shares = [(k + 1) / (n * (n + 1) / 2) for k in range(n)]
    unlike = {word: shares for word, info in method.parameters.items() if is_per_member(info.annotation, info.metadata)}
    return method.bind({**unlike, **given})


def source(name: str, tensor: Tensor) -> Source:
    return Source(name, InMemory({"w": tensor}))


def result(choice: Choice, members: list[Tensor], base: Tensor | None, **how: object) -> Tensor:
    """What the engine makes of one tensor."""
    named = [source(f"m{k}", tensor) for k, tensor in enumerate(members)]
    return dict(merged(choice, named, None if base is None else source("base", base), **how))["w"]


def over(method: Method, base: Tensor) -> Tensor | None:
    return base if method.traits["space"] == "delta" else None


def ulp(at: Tensor) -> Tensor:
    """The gap between neighbours of the numbers `at`, in their own type: fp64."""
    info = torch.finfo(at.dtype)
    _, exponent = torch.frexp(at.double().abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full(at.shape, info.eps, dtype=torch.float64), exponent - 1)


def assert_order_changes_no_bit(method: Method, tensors: list[Tensor], base: Tensor) -> None:
    choice, n = told(method, len(tensors)), len(tensors)
    members = [source(f"m{k}", tensor) for k, tensor in enumerate(tensors)]
    below = source("base", base)
    rows = {word: value for word, value in choice.params.items() if isinstance(value, list)}

    def outcome(choice: Choice, members: list[Source]) -> bytes | str:
        """The bits of the result, or the refusal of what is too large for its type, which no order may change."""
        try:
            return bytes(as_bytes(dict(merged(choice, members, below, seed=5))["w"]))
        except CheckpointError as refusal:
            return str(refusal)

    first = outcome(choice, members)
    for order in permutations(range(n)):
        moved = method.bind({word: [row[k] for k in order] for word, row in rows.items()})
        assert outcome(moved, [members[k] for k in order]) == first, order
        named = method.bind({word: {f"m{k}": row[k] for k in order} for word, row in rows.items()})
        assert outcome(named, [members[k] for k in order]) == first, order


def assert_order_means_nothing(method: Method) -> None:
    """Past the engine, which sorts the members of symmetric methods and would hide one that is not."""
    *tensors, base = torch.randn(how_many(method) + 1, 40, 5, generator=torch.Generator().manual_seed(6))
    unsorted = replace(method, traits={trait: value for trait, value in method.traits.items() if trait != "symmetric"})
    choice = told(unsorted, len(tensors))
    rows = {word: value for word, value in choice.params.items() if isinstance(value, list)}
    first = result(choice, tensors, base)
    for order in permutations(range(len(tensors))):
        moved = unsorted.bind({**choice.params, **{word: [row[k] for k in order] for word, row in rows.items()}})
        assert torch.allclose(result(moved, [tensors[k] for k in order], base), first, rtol=1e-6, atol=1e-6), order


def assert_copies_give_themselves(method: Method, copy: Tensor, base: Tensor) -> None:
    n = how_many(method)
    choice = told(method, n, **method.traits["idempotent"])
    away = (result(choice, [copy] * n, over(method, base)).double() - copy.double()).abs()
    assert torch.all(away <= ulp(torch.maximum(copy.abs(), base.abs()))), away.max()


@every()
@settings(max_examples=25, deadline=None)
@given(numbers=TENSORS, dtype=DTYPES)
def test_members_that_all_equal_the_base_give_it_back(method, numbers, dtype):
    same, n = torch.from_numpy(numbers).to(dtype), how_many(method)
    made = result(told(method, n), [same] * n, over(method, same))
    assert made.dtype == dtype and made.shape == same.shape
    assert torch.all((made.double() - same.double()).abs() <= ulp(same))


@every()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_of_the_pieces_changes_no_bit(method, dtype):
    numbers = torch.randn(how_many(method) + 1, 7, 31, generator=torch.Generator().manual_seed(1))
    *members, base = (8 * numbers).round().div(8).to(dtype)  # many magnitudes are equal
    for more in ({}, {"rescale": "l1"}) if "rescale" in method.parameters else ({},):
        whole = result(told(method, len(members), **more), members, base, seed=3, piece=7 * 31)
        for piece in (1, 5, 64, 216):
            assert torch.equal(result(told(method, len(members), **more), members, base, seed=3, piece=piece), whole)


@every()
def test_the_number_of_threads_changes_no_bit(method):
    *members, base = torch.randn(how_many(method) + 1, 600, 500, generator=torch.Generator().manual_seed(2))
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            made.append(result(told(method, len(members)), members, base, seed=3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@every()
@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])  # fp32 in, bf16 out: sums are made in the type of the input
def test_inputs_are_untouched(method, out_dtype):
    *members, base = torch.randn(how_many(method) + 1, 9, 11, generator=torch.Generator().manual_seed(3))
    kept = [tensor.clone() for tensor in (*members, base)]
    made = result(told(method, len(members)), members, base, out_dtype=out_dtype)
    made.zero_()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((*members, base), kept, strict=True))


@every("symmetric")
@settings(max_examples=10, deadline=None)
@given(numbers=arrays(np.float32, (4, 3, 5), elements=NUMBERS), dtype=DTYPES)
def test_the_order_of_members_changes_no_bit_of_a_symmetric_method(method, numbers, dtype):
    *members, base = torch.from_numpy(numbers).to(dtype)
    assert_order_changes_no_bit(method, members[:how_many(method)], base)


@every("symmetric")
def test_a_symmetric_method_treats_its_members_alike(method):
    assert_order_means_nothing(method)


@every("idempotent")
@settings(max_examples=25, deadline=None)
@given(numbers=arrays(np.float32, (2, 3, 5), elements=NUMBERS), dtype=DTYPES)
def test_copies_of_a_member_give_that_member(method, numbers, dtype):
    copy, base = torch.from_numpy(numbers).to(dtype)
    assert_copies_give_themselves(method, copy, base)


@every("unbiased")
def test_the_mean_over_seeds_is_what_was_merged(method):
    copy, base = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(4))
    n = how_many(method)
    choice = told(method, n, **method.traits["unbiased"])
    made = torch.stack([result(choice, [copy] * n, over(method, base), seed=seed) for seed in range(1000)]).double()
    error = made.std(dim=0) / 1000**0.5
    assert torch.all(error > 0)
    assert torch.all((made.mean(dim=0) - copy).abs() <= 4 * error)


# methods on factors: their dense products are compared, with rounding told in units of the largest entry

def adapters(n: int, *, ranks: tuple[int, ...] = (3, 3, 3), shape: tuple[int, int] = (40, 24), seed: int = 0,
             one_a: bool = False) -> list[Factors]:
    """Random changes of one layer, whose scales differ; ranks as large as a side of the layer are no exception."""
    rng = torch.Generator().manual_seed(seed)
    found = [Factors(torch.randn(rank, shape[1], generator=rng), torch.randn(shape[0], rank, generator=rng), 0.5 + k)
             for k, rank in zip(range(n), ranks, strict=False)]
    return [replace(each, a=found[0].a) for each in found] if one_a else found


def joined(method: Method, parts: list[Factors], choice: Choice | None = None) -> Factors:
    """What the method makes of changes of one layer."""
    choice = choice or told(method, len(parts))
    names = [f"m{k}" for k in range(len(parts))]
    leaf = Leaf("layer", torch.empty(len(parts), 0), shape=parts[0].shape, factors=tuple(parts))
    made = choice(leaf, **settled(choice, names, 0, torch.float64))
    return made if isinstance(made, Factors) else stacked(made)


def near(made: Tensor, wanted: Tensor) -> bool:
    return bool((made - wanted).abs().max() <= 1e-13 * max(1.0, float(wanted.abs().max())))


@every(factors=True)
def test_factors_that_change_nothing_are_merged_into_such(method):
    parts = [replace(part, b=torch.zeros_like(part.b)) for part in adapters(3, one_a=True)]
    made = joined(method, parts)
    assert made.shape == parts[0].shape and not made.dense().any()


@every("idempotent", factors=True)
@settings(max_examples=25, deadline=None)
@given(b=arrays(np.float32, (6, 4), elements=NUMBERS), a=arrays(np.float32, (4, 5), elements=NUMBERS),
       scale=some.floats(0.01, 64))
def test_copies_of_factors_give_the_same_change(method, b, a, scale):
    copy = Factors(torch.from_numpy(a), torch.from_numpy(b), scale)
    made = joined(method, [copy] * 3, told(method, 3, **method.traits["idempotent"]))
    assert near(made.dense(), copy.dense())


@every("symmetric", factors=True)
def test_a_symmetric_method_on_factors_treats_its_members_alike(method):
    parts = adapters(3, one_a=method.name == "ffa")
    choice = told(method, 3)
    rows = {word: value for word, value in choice.params.items() if isinstance(value, list)}
    first = joined(method, parts, choice).dense()
    for order in permutations(range(3)):
        moved = method.bind({**choice.params, **{word: [row[k] for k in order] for word, row in rows.items()}})
        assert near(joined(method, [parts[k] for k in order], moved).dense(), first), order


@every(factors=True)
def test_no_number_of_threads_changes_a_bit_of_factors(method):
    parts = adapters(3, ranks=(64, 64, 64), shape=(700, 600), one_a=True)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            made.append(joined(method, parts))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one.a, made[0].a) and torch.equal(one.b, made[0].b) for one in made)


@every(factors=True)
def test_factors_that_were_merged_are_untouched(method):
    parts = adapters(3, one_a=True)
    kept = [(part.a.clone(), part.b.clone()) for part in parts]
    made = joined(method, parts)
    made.b.zero_()
    assert all(torch.equal(part.a, a) and torch.equal(part.b, b) for part, (a, b) in zip(parts, kept, strict=True))


@pytest.mark.parametrize("method", merging, ids=lambda method: method.name)
def test_a_method_says_where_it_comes_from_and_why_it_lacks_a_law(method):
    assert method.source and method.traits["space"] in ("weight", "delta", "factors")
    assert any(trait in method.traits for trait in LAST_THREE) or method.traits.get("why_not")


def test_a_trait_that_is_untrue_is_caught():
    slerp, ties = merging["slerp"], merging["ties"]
    with pytest.raises(AssertionError):
        assert_order_means_nothing(replace(slerp, traits={**slerp.traits, "symmetric": True},
                                           call=lambda leaf, *, t=0.5: leaf.tensors[0] * t))
    with pytest.raises(AssertionError):
        assert_copies_give_themselves(replace(ties, traits={**ties.traits, "idempotent": {"lambda": 0.5}}),
                                      *torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(5)))


MIDRANGE = '''
"""Midrange: half way between the smallest and the largest of the members, entry by entry."""

from __future__ import annotations

from torch import Tensor

from glue.merge import merging
from glue.merge.leaf import Leaf


@merging.add("midrange", source="folklore", space="weight", symmetric=True, idempotent={})
def midrange(leaf: Leaf) -> Tensor:
    """Take the mean of the smallest and the largest that the members have of each entry.

    leaf.tensors  [n, c]
    """
    return leaf.tensors.amin(dim=0) / 2 + leaf.tensors.amax(dim=0) / 2
'''

LAWS_FOR_MIDRANGE = """
import sys, pytest, glue.merge.methods
from glue.merge import merging

class Count:
    passed = 0
    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed

glue.merge.methods.__path__.append(sys.argv[1])
print("listed:", *(method.name for method in merging))
count = Count()
code = pytest.main(["-p", "no:cacheprovider", "-k", "midrange", sys.argv[2]], plugins=[count])
print("passed:", count.passed)
sys.exit(code)
"""


def test_adding_one_file_makes_a_method_that_the_laws_test(tmp_path):
    assert len(MIDRANGE.strip().splitlines()) <= 30
    (tmp_path / "midrange.py").write_text(MIDRANGE)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", LAWS_FOR_MIDRANGE, str(tmp_path), __file__], cwd=root,
                          env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "midrange" in done.stdout.splitlines()[0].split()
    laws = [name for name, law in globals().items()
            if name.startswith("test_") and hasattr(law, "pytestmark") and "factors" not in name]
    undeclared, run_twice = 1, 2  # unbiased; pieces and inputs, each for two types
    assert len(laws) == 9 and f"passed: {len(laws) - undeclared + run_twice}\n" in done.stdout, done.stdout
