"""The merge engine: what it refuses, what it writes, and how little it holds."""

from __future__ import annotations

import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from glue.checkpoint import Checkpoint, Header, InMemory, weights_digest
from glue.errors import CheckpointError, MethodError
from glue.family import PerMember, Probability
from glue.merge import merging
from glue.merge.engine import check, merged, prepared
from glue.merge.gram import gram
from glue.merge.leaf import CHANCES, Leaf, Source, random_key, steps, summed
from glue.merge.parameters import settled
from glue.merge.sparsify import cut, keep_largest, keep_random
from glue.merge.target import Held
from glue.merge.write import write


def source(name: str, **tensors: Tensor) -> Source:
    return Source(name, InMemory(tensors))


def children(n: int = 3, dtype: torch.dtype = torch.float32) -> list[Source]:
    """n members with two matrices and a counter."""
    random = torch.Generator().manual_seed(n)
    return [source(f"zoo/m{k}", a=torch.randn(6, 4, generator=random).to(dtype),
                   b=torch.randn(5, generator=random).to(dtype), steps=torch.arange(3)) for k in range(n)]


def leaf(*rows: list[float], start: int = 0, seed: int = 0) -> Leaf:
    keys = tuple(random_key(seed, f"f{k}", "w") for k in range(len(rows)))
    return Leaf("w", torch.tensor(rows), start=start, keys=keys)


# --- what is refused, and how it is worded ----------------------------------------------------------------------------

def test_unlike_shapes_are_named_before_any_work():
    members = [source("llama", w=torch.ones(3, 4)), source("code", w=torch.ones(5, 4))]
    with pytest.raises(CheckpointError) as error:
        check(merging["linear"].bind(), members)
    assert str(error.value) == ("'w' has shapes (3, 4) in 'llama', (5, 4) in 'code'; only members of one shape can be "
                                "merged\n  run the cluster step first, or drop the odd member")


def test_a_base_of_another_shape_is_refused():
    with pytest.raises(CheckpointError, match=r"'w' has shapes \(3,\) in 'child', \(2,\) in 'base'"):
        check(merging["ties"].bind(), [source("child", w=torch.ones(3))], source("base", w=torch.ones(2)))


def test_a_tensor_that_one_member_lacks_is_named():
    members = [source("a", w=torch.ones(3), bias=torch.ones(1)), source("b", w=torch.ones(3))]
    with pytest.raises(CheckpointError, match="'bias' is in 'a' and not in 'b'"):
        merged(merging["linear"].bind(), members)  # not one tensor is asked for


def test_a_method_on_differences_asks_for_its_base():
    with pytest.raises(MethodError, match="'ties' works on differences to a base, and no base is given\n  add  base:"):
        check(merging["ties"].bind(), children())


@pytest.mark.parametrize("n", [1, 3])
def test_slerp_takes_two_members(n):
    with pytest.raises(MethodError, match=f"'slerp' takes exactly 2 members; {n} are given"):
        check(merging["slerp"].bind(), children(n))


def test_nothing_is_merged_of_no_members():
    with pytest.raises(MethodError, match="'linear' takes at least 1 member; 0 are given"):
        check(merging["linear"].bind(), [])


def test_settings_that_only_the_method_understands_are_refused_before_any_work():
    with pytest.raises(MethodError, match=r"the weights \[1.0, -1.0\] sum to 0"):
        merged(merging["linear"].bind({"weight": [1.0, -1.0]}), children(2))
    dict(merged(merging["linear"].bind({"weight": [1.0, -1.0], "normalize": False}), children(2)))


def test_whole_numbers_pass_through_and_may_not_differ():
    members = children(2)
    assert torch.equal(dict(merged(merging["linear"].bind(), members))["steps"], torch.arange(3))
    odd = source("odd", **{**dict(members[0].weights), "steps": torch.arange(3) + 1})
    with pytest.raises(CheckpointError, match="'steps' holds whole numbers, which are not averaged, and they differ"):
        dict(merged(merging["linear"].bind(), [*members, odd]))


@pytest.mark.parametrize(("tensor", "word"), [(torch.ones(2), "fractions"), (torch.ones(2).int(), "torch.int32")])
def test_whole_numbers_do_not_mix_with_other_types(tensor, word):
    with pytest.raises(CheckpointError, match=f"'w' holds {word} in 'a', torch.int64 in 'b'; whole numbers are not"):
        check(merging["linear"].bind(), [source("a", w=tensor), source("b", w=torch.ones(2).long())])


def test_weights_with_scales_of_their_own_are_refused():
    with pytest.raises(CheckpointError, match="'w' of 'a' is stored as torch.float8_e4m3fn"):
        check(merging["linear"].bind(), [source("a", w=torch.ones(2).to(torch.float8_e4m3fn))])


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_member_with_a_nan_is_named(method):
    bad = source("bad", w=torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(CheckpointError, match="'w' of 'bad' holds numbers that are not finite"):
        dict(merged(merging[method].bind(), [source("good", w=torch.ones(3)), bad], source("base", w=torch.zeros(3))))


def test_an_overflow_is_refused():
    with pytest.raises(CheckpointError, match="the merged 'w' has numbers too large for torch.float16"):
        dict(merged(merging["linear"].bind(), [source("a", w=torch.tensor([1e5]))], out_dtype="float16"))


def test_an_unknown_output_type_is_refused():
    with pytest.raises(MethodError, match="cannot be written as 'bfloat'; did you mean 'bfloat16'?"):
        merged(merging["linear"].bind(), children(), out_dtype="bfloat")


# --- one value for each member ----------------------------------------------------------------------------------------

def test_a_value_by_member_is_a_number_a_list_or_a_mapping():
    names = ["owner/math", "owner/code", "poet"]
    for given, row in ((0.5, [0.5, 0.5, 0.5]), ([1, 2, 3], [1, 2, 3]),
                       ({"poet": 3.0, "math": 1.0, "owner/code": 2.0}, [1, 2, 3])):
        found = settled(merging["ties"].bind({"weight": given, "lambda": 0.3}), names, 2)
        assert found["weight"].shape == (3, 1, 1) and found["weight"].dtype == torch.float32
        assert found["weight"].flatten().tolist() == row
        assert (found["lambda"], found["normalize"]) == (0.3, True)


@pytest.mark.parametrize(("given", "message"), [
    ({"mat": 1.0, "code": 1.0}, "'weight' names 'mat', which is not merged here; did you mean 'math'?"),
    ({"math": 1.0}, "'weight' has no value for 'o/code'"),
    ({"math": 1.0, "code": 1.0, "o/code": 2.0}, "'weight' names 'o/code' twice, as 'code' and 'o/code'"),
    ([1.0, 2.0, 3.0], r"'weight' has 3 values for 2 members \(math, o/code\)"),
    (float("nan"), "'weight' cannot be nan"),
])
def test_a_value_by_member_that_does_not_fit_the_members_is_refused(given, message):
    with pytest.raises(MethodError, match=message):
        settled(merging["linear"].bind({"weight": given}), ["math", "o/code"], 1)


def test_a_last_part_that_two_members_share_must_be_written_in_full():
    choice = merging["linear"].bind({"weight": {"m": 1.0}})
    with pytest.raises(MethodError, match=r"names 'm', which fits 2 members \(a/m, b/m\)"):
        settled(choice, ["a/m", "b/m"], 1)


def test_a_mapping_follows_the_names_and_a_list_the_order():
    a, b = source("z/a", w=torch.tensor([1.0])), source("z/b", w=torch.tensor([2.0]))
    for weight, members, mean in (({"a": 3.0, "b": 1.0}, [a, b], 1.25), ({"a": 3.0, "b": 1.0}, [b, a], 1.25),
                                  ([3.0, 1.0], [a, b], 1.25), ([3.0, 1.0], [b, a], 1.75)):
        assert dict(merged(merging["linear"].bind({"weight": weight}), members))["w"].item() == mean


# --- types ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_goes_in_as_one_type_comes_out_as_it(dtype):
    found = dict(merged(merging["linear"].bind(), children(dtype=dtype)))
    assert found["a"].dtype == found["b"].dtype == dtype and found["steps"].dtype == torch.int64


def test_the_base_decides_the_type_and_out_dtype_overrules_it():
    members, base = children(2), children(1, torch.bfloat16)[0]
    assert dict(merged(merging["ties"].bind(), members, base))["a"].dtype == torch.bfloat16
    assert dict(merged(merging["ties"].bind(), members, base, out_dtype="float16"))["a"].dtype == torch.float16


def test_members_of_unlike_types_give_one_that_holds_both():
    members = [source("a", w=torch.ones(2).bfloat16()), source("b", w=torch.ones(2).half())]
    assert dict(merged(merging["linear"].bind(), members))["w"].dtype == torch.float32


# --- what is written, and what is held --------------------------------------------------------------------------------

def test_shards_hold_what_one_file_holds(tmp_path):
    choice, members, base = merging["dare_ties"].bind({"density": 0.5}), children(3, torch.bfloat16), children(1)[0]
    told: list[tuple[int, int]] = []
    merge = prepared(choice, members, base)
    one = write(merge, tmp_path / "one", report=lambda done, total: told.append((done, total)))
    many = write(merge, tmp_path / "many", shard_size=40)
    assert one == many == weights_digest(Checkpoint(tmp_path / "many"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 3
    loaded = {name: tensor for file in (tmp_path / "many").glob("*.safetensors")
              for name, tensor in load_file(file).items()}
    expected = dict(merged(choice, members, base))
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in loaded)
    assert told == [(96, 140), (116, 140), (140, 140)]  # bytes of a, b and steps


def test_shards_of_the_inputs_change_no_bit(tmp_path):
    choice, members, base = merging["dare_linear"].bind({"density": 0.5}), children(3), children(1)[0]
    for k, member in enumerate(members):
        write(prepared(merging["linear"].bind(), [member]), tmp_path / str(k), shard_size=100 if k else 10**9)
    on_disk = [Source(f"d{k}", Checkpoint(tmp_path / str(k))) for k in range(3)]
    ours, theirs = dict(merged(choice, on_disk, base, seed=4)), dict(merged(choice, members, base, seed=4))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_tensors_come_in_the_order_of_their_names():
    member = source("m", b=torch.ones(1), a=torch.ones(1), c=torch.ones(1))
    assert [name for name, _ in merged(merging["linear"].bind(), [member])] == ["a", "b", "c"]


def test_empty_tensors_and_single_numbers_are_merged():
    members = [source(f"m{k}", none=torch.empty(0, 3), one=torch.tensor(float(k))) for k in range(2)]
    base = source("base", none=torch.empty(0, 3), one=torch.zeros(()))
    for method in ("linear", "slerp", "ties"):
        found = dict(merged(merging[method].bind(), members, base))
        assert found["none"].shape == (0, 3) and found["one"].shape == ()


class Counted:
    """Weights that are made when asked for, and know how many of their tensors are alive."""

    alive, most = 0, 0

    def __init__(self, seed: int):
        self.seed, self.fingerprint = seed, str(seed)
        self.headers = {f"w{k:02d}": Header(torch.float32, (10, 10)) for k in range(20)}

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.full((10, 10), float(self.seed))
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(tensor.untyped_storage(), self._gone)
        return tensor

    @staticmethod
    def _gone() -> None:
        Counted.alive -= 1

    def __iter__(self):
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


def test_only_the_tensors_of_one_name_are_held():
    members = [Source(f"m{seed}", Counted(seed)) for seed in range(3)]
    Counted.alive = Counted.most = 0
    for _, tensor in merged(merging["ties"].bind({"density": 0.5}), members, Source("base", Counted(9))):
        assert tensor.shape == (10, 10)
    assert Counted.most <= 4  # three members and the base; a whole model would be twenty


def test_unlike_members_that_share_a_fingerprint_still_have_one_order():
    one, other = children(2)
    for member in (one, other):
        member.weights.fingerprint = "same"
    choice = merging["linear"].bind()
    first = [member.name for member in prepared(choice, [one, other]).members]
    assert [member.name for member in prepared(choice, [other, one]).members] == first


# --- the parts --------------------------------------------------------------------------------------------------------

def test_keep_largest_takes_exactly_its_share_and_the_first_of_equals():
    some = leaf([1.0, -3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0])
    found = keep_largest(some, cut(Held(some), torch.tensor([[0.4], [0.4], [0.1]], dtype=torch.float64)))
    assert found.tolist() == [[0, -3, 3, 0, 0], [0] * 5, [5, 0, 0, 0, 0]]


def test_keep_largest_judges_a_piece_as_part_of_its_tensor():
    row = [1.0, 3.0, 2.0, 3.0, 3.0, 0.0]
    edges = cut(Held(leaf(row)), torch.tensor([[0.34]], dtype=torch.float64))  # two of the three threes
    pieces = [keep_largest(leaf(row[k:k + 2], start=k), edges) for k in (0, 2, 4)]
    assert torch.cat(pieces, 1).tolist() == [[0, 3, 0, 3, 0, 0]]


def test_a_share_is_counted_in_fp64():
    some = leaf([float(k) for k in range(100)])
    kept = keep_largest(some, cut(Held(some), torch.tensor([[0.29]], dtype=torch.float64)))
    assert int((kept != 0).sum()) == int(0.29 * 100) == 28  # the nearest fp32 to 0.29 would keep 29


def test_draws_depend_on_seed_member_tensor_and_place_alone():
    whole = leaf([0.0] * 1000, [0.0] * 1000)
    first = whole.uniform(0)
    assert not torch.equal(first, whole.uniform(1)) and not torch.equal(first, leaf([0.0] * 1000, seed=1).uniform(0))
    for start in (1, 7, 8, 9, 501):
        assert torch.equal(leaf([0.0] * 100, start=start).uniform(0), first[start:start + 100])
    # What was merged once must be merged again the same way, whatever the version of numpy.
    assert [round(float(draw), 6) for draw in first[:3]] == [0.057226, 0.930744, 0.37563]


def test_what_stays_depends_on_the_place_alone_and_as_often_as_it_should():
    whole = leaf([0.0] * 100_000, [0.0] * 100_000)
    first = whole.stays(0, 0.3)
    assert not torch.equal(first, whole.stays(1, 0.3))
    for start in (1, 15, 16, 17, 31, 99_000):
        assert torch.equal(leaf([0.0] * 100, start=start).stays(0, 0.3), first[start:start + 100]), start
    assert abs(first.double().mean() - 0.3) < 4 * (0.21 / 1e5) ** 0.5
    assert bool((whole.stays(0, 0.5) >= first).all())  # who stays at a low chance stays at a higher one
    assert steps(1e-9) == 1 and steps(0.5) == CHANCES // 2 and steps(1.0) == CHANCES and whole.stays(0, 1.0).all()


def test_draws_are_uniform():
    draws = leaf([0.0] * 100_000).uniform(0).double()
    assert draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 * (1 / 12 / 1e5) ** 0.5
    counts = torch.histc(draws, 20, 0, 1)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 43.8  # chi-square of 19 degrees of freedom, 1 in 1000


def test_keep_random_keeps_or_zeroes():
    some = leaf([1.0] * 10_000, [2.0] * 10_000)
    before = some.tensors.clone()
    kept = keep_random(some, torch.tensor([[0.2], [1.0]]))
    assert set(kept[0].tolist()) == {0.0, 1.0} and abs(float(kept[0].mean()) - 0.2) < 4 * (0.16 / 1e4) ** 0.5
    assert torch.equal(kept[1], before[1])


def test_sums_are_plain():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert summed(rows).tolist() == [9.0, 12.0] and rows[0].tolist() == [1.0, 2.0]
    many = torch.full((100_003,), 0.1)
    assert float(gram(Held(Leaf("w", many[None])))) == pytest.approx(100_003 * float(many[0]) ** 2, rel=1e-15)


def test_slerp_keeps_lengths_and_takes_the_arc():
    members = [source("x", w=torch.tensor([2.0, 0.0])), source("y", w=torch.tensor([0.0, 2.0]))]
    found = dict(merged(merging["slerp"].bind({"t": 0.5}), members))["w"]
    assert found.tolist() == pytest.approx([2**0.5, 2**0.5], rel=1e-7)


def test_slerp_of_opposite_models_is_a_straight_line():
    members = [source("x", w=torch.tensor([1.0, 2.0])), source("y", w=torch.tensor([-1.0, -2.0]))]
    assert dict(merged(merging["slerp"].bind({"t": 0.25}), members))["w"].tolist() == [0.5, 1.0]


@pytest.fixture
def room(monkeypatch):
    """Methods registered by a test are forgotten after it."""
    monkeypatch.setattr(merging, "_methods", dict(merging.load()._methods))


@pytest.mark.parametrize("dtype", ["float16", "float64"])  # in one of them, sums are made in the type of the input
def test_a_method_may_work_in_place(room, dtype):
    @merging.add("spoiler", source="this test", space="weight", why_not="a probe")
    def spoiler(leaf: Leaf) -> Tensor:
        """Change all it is given."""
        return leaf.tensors.add_(1)[0].mul_(leaf.base.add_(1))

    member, base = source("m", w=torch.tensor([1.0, 2.0])), source("base", w=torch.tensor([3.0, 4.0]))
    assert dict(merged(merging["spoiler"].bind(), [member], base, out_dtype=dtype))["w"].tolist() == [8, 15]
    assert member.weights["w"].tolist() == [1, 2] and base.weights["w"].tolist() == [3, 4]


def test_a_method_that_needs_shapes_gets_them(room):
    @merging.add("rows", source="this test", space="delta", sees="whole", why_not="a probe")
    def rows(leaf: Leaf, *, weight: PerMember[Probability] = 1.0) -> Tensor:
        """Each row of the first member's difference becomes its sum."""
        assert weight.shape == (leaf.n, 1, 1)
        return leaf.tensors[0].sum(-1, keepdim=True).expand(leaf.base.shape)

    member, base = source("m", w=torch.tensor([[1.0, 2.0], [3.0, 4.0]])), source("base", w=torch.ones(2, 2))
    assert dict(merged(merging["rows"].bind(), [member], base, piece=1))["w"].tolist() == [[2, 2], [6, 6]]
