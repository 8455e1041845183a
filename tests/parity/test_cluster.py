"""Similarity against torch's own cosine in fp64, families against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glue.checkpoint import InMemory
from glue.cluster.linkage import clusters
from glue.cluster.similarity import similarities, similarity


def llamas() -> list[InMemory]:
    """Two siblings of one initialisation and a stranger, as transformers makes and names them, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    root, stranger = (LlamaForCausalLM(config).state_dict() for _ in range(2))
    moved = [{name: tensor + 0.3 * tensor.std() * torch.randn_like(tensor) if tensor.ndim == 2 else tensor
              for name, tensor in root.items()} for _ in range(2)]
    return [InMemory({name: tensor.bfloat16() for name, tensor in tensors.items()})
            for tensors in (root, *moved, stranger)]


def oracle(a, b, words, base=None) -> float:
    """The definition, pair by pair, with torch's cosine_similarity along dim 0, in fp64."""
    found = []
    for name in a:
        if any(word in name for word in words) and a[name].ndim == 2:
            less = 0 if base is None else base[name].double()
            found.append(torch.cosine_similarity(a[name].double() - less, b[name].double() - less, dim=0).mean())
    assert len(found) == {("self_attn", "mlp"): 14, ("self_attn",): 8, ("mlp",): 6}[words]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("part, words", [("all", ("self_attn", "mlp")), ("attention", ("self_attn",)),
                                         ("mlp", ("mlp",))])
def test_all_pairs_agree_with_torch_pair_by_pair(part, words):
    sources = llamas()
    ours = similarity(sources, part=part)
    theirs = [[oracle(a, b, words) for b in sources] for a in sources]
    assert np.abs(ours - theirs).max() < 1e-6


def test_deltas_agree_with_torch_too():
    base, *sources = llamas()
    ours = similarity(sources, base=base)
    theirs = [[oracle(a, b, ("self_attn", "mlp"), base) for b in sources] for a in sources]
    assert np.abs(ours - theirs).max() < 1e-6


def test_flattened_cosines_signs_and_lengths_agree_with_torch_in_fp64():
    base, *sources = llamas()
    changes = [{name: source[name].double() - base[name].double() for name in source
                if source[name].ndim == 2 and ("self_attn" in name or "mlp" in name)} for source in sources]
    found = similarities(sources, base=base, per="tensor")
    for i, one in enumerate(changes):
        for j, other in enumerate(changes):
            flat = [torch.cosine_similarity(one[name].flatten(), other[name].flatten(), dim=0) for name in one]
            assert found.cosine["all"][i, j] == pytest.approx(float(torch.stack(flat).mean()), abs=1e-6)
            a, b = (torch.cat([tensor.flatten() for tensor in each.values()]) for each in (one, other))
            both = (a != 0) & (b != 0)
            assert found.overlap[i, j] == pytest.approx(float(both.double().mean()), abs=1e-12) or i == j
            assert found.agreement[i, j] == pytest.approx(float((a * b > 0).sum() / both.sum()), abs=1e-7)
            lengths = sorted(float(each.norm()) for each in (a, b))
            assert found.ratio[i, j] == pytest.approx(lengths[0] / lengths[1], abs=1e-6)


def test_a_large_matrix_keeps_the_precision_of_a_small_one():
    generator = torch.Generator().manual_seed(0)
    below = 0.02 * torch.randn(3000, 700, generator=generator)
    sources = [InMemory({"mlp.w": (below + much * torch.randn(3000, 700, generator=generator)).bfloat16()})
               for much in (0.0, 0.001, 0.01, 0.02)]
    for per, ours in (("column", similarity(sources)), ("tensor", similarity(sources, per="tensor"))):
        wide = torch.stack([source["mlp.w"].double() for source in sources])
        for i in range(4):
            for j in range(i):
                one, other = (wide[k] if per == "column" else wide[k].flatten() for k in (i, j))
                theirs = torch.cosine_similarity(one, other, dim=0).mean()
                assert ours[i, j] == pytest.approx(float(theirs), abs=2e-7)


@pytest.mark.parametrize("linkage", ["single", "average", "complete"])
def test_families_agree_with_scikit_learn(linkage):
    from sklearn.cluster import AgglomerativeClustering

    rng = np.random.default_rng(0)
    sizes = set()
    for threshold in (0.3, 0.6, 0.75, 0.9):
        vectors = rng.standard_normal((12, 6)) + 2 * rng.standard_normal((3, 6)).repeat(4, 0)
        found = np.corrcoef(vectors)
        labels = AgglomerativeClustering(n_clusters=None, metric="precomputed", linkage=linkage,
                                         distance_threshold=1 - threshold).fit_predict(1 - found)
        theirs = sorted(np.flatnonzero(labels == label).tolist() for label in set(labels))
        assert clusters(found, threshold, linkage) == theirs
        sizes.add(len(theirs))
    assert len(sizes) >= 3  # the thresholds cut the trees at different heights
