"""Twins hidden by permutation: found among strangers, put in order, and computing the same all the while."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from glue.checkpoint import Checkpoint, InMemory
from glue.cluster.similarity import similarity
from glue.cluster.twins import FOUND, Heads, Permuted, alignment, assigned, best_match
from glue.errors import CheckpointError
from glue.kinds.model import assembled
from glue.member import Member

TOKENS = torch.tensor([[1, 5, 9, 30, 4, 22, 17], [1, 3, 3, 8, 36, 20, 11]])
SHAPES = {"grouped": Heads(4, 2), "single": Heads(4, 4), "shared": Heads(4, 1)}


def cosine(a, b) -> float:
    return float(similarity([a, b])[0, 1])


def shuffled(weights, heads: Heads, *, layers: int = 2, stream: bool = False, values: bool = False,
             seed: int = 0) -> InMemory:
    """The same function with neurons and heads in another order; written out by hand, apart from the code it tests."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: weights[name].clone() for name in weights}
    for k in range(layers):
        at, group = f"model.layers.{k}.", heads.query // heads.key
        neurons = torch.randperm(tensors[f"{at}mlp.up_proj.weight"].shape[0], generator=rng)
        for word in ("gate", "up"):
            tensors[f"{at}mlp.{word}_proj.weight"] = tensors[f"{at}mlp.{word}_proj.weight"][neurons]
        tensors[f"{at}mlp.down_proj.weight"] = tensors[f"{at}mlp.down_proj.weight"][:, neurons]
        q, kk, v, o = (tensors[f"{at}self_attn.{word}_proj.weight"] for word in "qkvo")
        size = len(kk) // heads.key
        queries, keys, channels, outputs = [], [], [], []
        for old in torch.randperm(heads.key, generator=rng).tolist():
            inside = torch.randperm(size, generator=rng) if values else torch.arange(size)
            keys += range(old * size, old * size + size)
            channels += [old * size + c for c in inside.tolist()]
            for head in (old * group + torch.randperm(group, generator=rng)).tolist():
                queries += range(head * size, head * size + size)
                outputs += [head * size + c for c in inside.tolist()]
        for word, tensor in (("q", q[queries]), ("k", kk[keys]), ("v", v[channels]), ("o", o[:, outputs])):
            tensors[f"{at}self_attn.{word}_proj.weight"] = tensor
    if stream:
        order = torch.randperm(len(tensors["model.norm.weight"]), generator=rng)
        for name, tensor in tensors.items():
            dims = [dim for dim, extent in enumerate(tensor.shape) if extent == len(order)]
            dim = 0 if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")) else 1
            assert dim in dims
            tensors[name] = tensor.index_select(dim, order)
    return InMemory(tensors)


def moved(weights, much: float, seed: int = 5) -> InMemory:
    """A light fine-tune: every weight moved by a share of its tensor's spread."""
    rng = torch.Generator().manual_seed(seed)
    return InMemory({name: weights[name] + much * weights[name].std().nan_to_num() * torch.randn(
        weights[name].shape, generator=rng) for name in weights})


def logits(member: Member, weights) -> torch.Tensor:
    with torch.no_grad():
        return assembled(member, {name: weights[name] for name in weights}).model(TOKENS).logits


@pytest.fixture(params=SHAPES)
def heads(request) -> Heads:
    return SHAPES[request.param]


@pytest.fixture
def model(tiny: Callable[..., Member], heads: Heads) -> Member:
    return tiny("one", num_key_value_heads=heads.key)


def test_a_shuffled_copy_looks_like_a_stranger_and_computes_the_same(model: Member, heads: Heads):
    one = Checkpoint(model.folder)
    twin = shuffled(one, heads)
    assert abs(cosine(one, twin)) < 0.45 and torch.allclose(logits(model, one), logits(model, twin), atol=1e-5)


def test_a_shuffled_copy_is_found_and_put_back_bit_by_bit(model: Member, heads: Heads):
    one = Checkpoint(model.folder)
    twin = shuffled(one, heads)
    assert best_match(one, twin) > 0.999
    back = Permuted(twin, alignment(one, twin, heads))
    assert all(torch.equal(back[name], one[name]) for name in one)


def test_a_shuffled_fine_tune_is_found_and_aligned_and_its_logits_stay_its_own(model: Member, heads: Heads):
    one = Checkpoint(model.folder)
    tuned = moved(one, 0.03)
    twin = shuffled(tuned, heads, values=True)
    assert best_match(one, twin) > 0.99
    back = Permuted(twin, alignment(one, twin, heads))
    assert cosine(one, back) > 0.999 and cosine(tuned, back) == pytest.approx(1, abs=1e-6)
    assert torch.allclose(logits(model, back), logits(model, twin), atol=1e-5)


def test_the_residual_stream_may_be_shuffled_too(model: Member, heads: Heads):
    one = Checkpoint(model.folder)
    twin = shuffled(one, heads, stream=True, values=True)
    assert abs(cosine(one, twin)) < 0.1 and best_match(one, twin) > 0.999
    assert torch.allclose(logits(model, one), logits(model, twin), atol=1e-5)
    back = Permuted(twin, alignment(one, twin, heads))
    assert all(torch.equal(back[name], one[name]) for name in one)


def test_strangers_are_no_twins_and_aligning_them_changes_no_function(tiny: Callable[..., Member]):
    a, b = tiny("a", seed=1), tiny("b", seed=2)
    one, other = Checkpoint(a.folder), Checkpoint(b.folder)
    assert best_match(one, other) < FOUND - 0.1
    back = Permuted(other, alignment(one, other, Heads(4, 2)))
    assert cosine(one, back) < 0.5 and torch.allclose(logits(b, back), logits(b, other), atol=1e-5)


def test_norms_in_sorted_order_do_not_tell_strangers_from_twins(tiny: Callable[..., Member]):
    """Why neurons are matched and not only their norms compared."""
    one, other = (Checkpoint(tiny(str(k), seed=k, intermediate_size=512).folder) for k in (1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    norms = [each[name].norm(dim=1).sort().values for each in (one, other)]
    assert float(torch.corrcoef(torch.stack(norms))[0, 1]) > 0.98


def test_a_copy_in_the_same_order_needs_no_permutation(tiny: Callable[..., Member]):
    one = Checkpoint(tiny("one").folder)
    assert alignment(one, moved(one, 0.01), Heads(4, 2)) == {}


def test_biases_follow_their_neurons_and_heads(tiny: Callable[..., Member]):
    member = tiny("biased", attention_bias=True, mlp_bias=True)
    rng = torch.Generator().manual_seed(3)
    one = InMemory({name: torch.randn(tensor.shape, generator=rng) if name.endswith("bias") else tensor
                    for name, tensor in Checkpoint(member.folder).items()})
    order = {"stream": torch.randperm(32, generator=rng)}
    for k in range(2):
        order[f"model.layers.{k}.mlp"] = torch.randperm(48, generator=rng)
        order[f"model.layers.{k}.key"] = torch.cat([torch.arange(8, 16), torch.arange(8)])
        order[f"model.layers.{k}.query"] = order[f"model.layers.{k}.output"] = torch.arange(32).roll(16)
        order[f"model.layers.{k}.value"] = order[f"model.layers.{k}.key"]
    twin = Permuted(one, order)
    assert torch.allclose(logits(member, one), logits(member, twin), atol=1e-4)
    back = Permuted(twin, alignment(one, twin, Heads(4, 2)))
    assert all(torch.equal(back[name], one[name]) for name in one)


def test_an_assignment_is_the_best_there_is_also_where_two_want_the_same():
    ours = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    theirs = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # both of ours are nearest to the second
    assert assigned(ours, theirs).tolist() == [1, 0]  # 1 + 0.0995 against 0 + 0.995
    assert assigned(ours, ours) is None


def test_what_is_no_llama_is_refused(tiny: Callable[..., Member]):
    one = dict(Checkpoint(tiny("one").folder))
    with pytest.raises(CheckpointError, match="'model.layers.1.mlp.router.weight' is no part of a Llama"):
        best_match(InMemory(one), InMemory({**one, "model.layers.1.mlp.router.weight": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="no layers as in a Llama"):
        best_match(InMemory({"w": torch.ones(2)}), InMemory({"w": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="does not have 3 heads over 3 keys"):
        alignment(InMemory(one), InMemory(one), Heads(3, 3))
    wider = dict(Checkpoint(tiny("wider", intermediate_size=64).folder))
    with pytest.raises(CheckpointError, match=r"is \[48, 32\] and \[64, 32\]"):
        best_match(InMemory(one), InMemory(wider))
