"""Similarity against torch's own cosine in fp64, families against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glue.checkpoint import InMemory
from glue.cluster.linkage import clusters
from glue.cluster.similarity import similarity


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
