"""Merges of whole matrices, and medians, against oracles written out in numpy from the papers' formulae, and Adam."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from glue.checkpoint import InMemory
from glue.errors import CheckpointError, MethodError
from glue.merge import merging
from glue.merge.engine import merged
from glue.merge.leaf import Source
from glue.merge.matrices import layer_matrix

NAME = "model.layers.0.self_attn.q_proj.weight"
SHAPES = [(24, 40), (40, 24), (32, 32)]


def deltas(n: int, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Differences with singular values that fall as one over their rank, as those of tuned weights do: [n, *shape]."""
    rng = np.random.default_rng(seed)
    drawn = [np.linalg.svd(rng.standard_normal(shape), full_matrices=False) for _ in range(n)]
    return np.stack([u / np.arange(1, min(shape) + 1) @ v for u, _, v in drawn])


def low_rank(n: int, rank: int, shape: tuple[int, int]) -> np.ndarray:
    """n differences of a rank, whose rows and columns are orthogonal to those of all others: [n, *shape]."""
    rng = np.random.default_rng(1)
    u = np.linalg.qr(rng.standard_normal((shape[0], n * rank)))[0].reshape(shape[0], n, rank)
    v = np.linalg.qr(rng.standard_normal((shape[1], n * rank)))[0].reshape(shape[1], n, rank)
    return np.einsum("ank,nk,bnk->nab", u, rng.uniform(1, 2, (n, rank)), v)


def made(method: str, moved: np.ndarray, name: str = NAME, dtype: torch.dtype = torch.float64,
         **given: object) -> np.ndarray:
    """What a method adds to a base of zeros, in fp64 unless told."""
    tensors = torch.from_numpy(np.asarray(moved)).to(dtype)
    members = [Source(f"m{k}", InMemory({name: tensor})) for k, tensor in enumerate(tensors)]
    base = Source("base", InMemory({name: torch.zeros_like(tensors[0])}))
    return dict(merged(merging[method].bind(given), members, base))[name].double().numpy()


def interference(x: np.ndarray, moved: np.ndarray) -> float:
    return sum(float((((x - d) @ d.T) ** 2).sum() / (d**2).sum()) for d in moved)


def gradient(x: np.ndarray, moved: np.ndarray) -> np.ndarray:
    return sum(2 * (x - d) @ d.T @ d / (d**2).sum() for d in moved)


def procrustes(vectors: np.ndarray) -> np.ndarray:
    u, _, v = np.linalg.svd(vectors, full_matrices=False)
    return u @ v


# --- which tensors are matrices ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "model.layers.0.self_attn.q_proj.weight", "model.layers.31.mlp.down_proj.weight",
    "transformer.h.0.attn.c_attn.weight", "gpt_neox.layers.0.attention.dense.weight",
    "bert.encoder.layer.0.attention.output.dense.weight", "model.layers.3.mlp.shared_experts.up_proj.weight",
    "model.layers.3.mlp.experts.7.w1.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
    "model.decoder.layers.0.fc1.weight"])
def test_weights_of_layers_are_seen_whole(name):
    assert layer_matrix(name, (8, 8), {}) == "whole"
    assert {layer_matrix(name, shape, {}) for shape in ((8,), (), (4, 8, 8), (8, 1, 4, 4))} == {"pieces"}


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "wpe.weight", "gpt_neox.embed_in.weight",
    "embed_out.weight", "transformer.word_embeddings.weight", "model.decoder.embed_positions.weight", "shared.weight",
    "model.tok_embeddings.weight", "output.weight", "bert.embeddings.position_embeddings.weight", "score.weight",
    "transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight", "lm_head.linear.weight",
    "transformer.embd.wte.weight", "backbone.embedding.weight", "head.weight", "text_projection.weight",
    "cls.predictions.decoder.weight", "model.layers.61.shared_head.head.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"])
def test_embeddings_and_heads_are_merged_entry_by_entry(name):
    assert layer_matrix(name, (8, 8), {}) == "pieces"


@pytest.mark.parametrize("method", ["iso_c", "tsv", "wudi"])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_what_is_not_a_matrix_of_a_layer_is_the_mean_or_the_sum(method, name):
    moved = deltas(3, (6, 9))
    assert np.allclose(made(method, moved, name), moved.mean(0), rtol=1e-14, atol=0)
    halved = made(method, moved, name, otherwise="sum", **{"lambda": 0.5})
    assert np.allclose(halved, moved.sum(0) / 2, rtol=1e-14, atol=0)
    vectors = moved.reshape(3, -1)
    assert np.allclose(made(method, vectors, "model.norm.weight"), vectors.mean(0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", ["iso_c", "tsv", "wudi"])
def test_lambda_scales_and_scale_does_not_matter(method):
    moved = deltas(3, (24, 40))
    one = made(method, moved)
    assert np.allclose(made(method, moved, **{"lambda": 0.3}), 0.3 * one, rtol=1e-14, atol=0)
    assert np.allclose(made(method, 1e-6 * moved), 1e-6 * one, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("method", ["iso_c", "tsv", "wudi"])
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_of_16_bits_give_the_fp64_result_rounded_once(method, shape):
    moved = torch.from_numpy(deltas(3, shape)).bfloat16()
    exact, found = made(method, moved.double()), made(method, moved.double(), dtype=torch.bfloat16)
    assert np.all(np.abs(found - exact) <= 2.0**-8 * np.abs(exact) + 2e-6 * np.abs(exact).max())


def test_numbers_that_are_not_finite_are_refused_with_the_name_of_the_tensor():
    moved = deltas(2, (6, 6))
    moved[1, 2, 3] = np.nan
    for method in ("iso_c", "tsv", "wudi"):
        with pytest.raises(CheckpointError, match=f"'{NAME}' of 'm1'.* not finite"):
            made(method, moved)


# --- median -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", range(1, 10))
def test_the_median_is_numpys(n):
    tensors = np.random.default_rng(n).standard_normal((n, 7, 31))
    members = [Source(f"m{k}", InMemory({"w": torch.from_numpy(tensor)})) for k, tensor in enumerate(tensors)]
    found = dict(merged(merging["median"].bind(), members, piece=50))["w"].numpy()
    assert np.allclose(found, np.median(tensors, axis=0), rtol=1e-15, atol=0)


def test_a_median_of_two_large_numbers_does_not_overflow():
    large = torch.full((3,), 1.5e308, dtype=torch.float64)
    members = [Source(f"m{k}", InMemory({"w": large})) for k in range(2)]
    assert torch.equal(dict(merged(merging["median"].bind(), members))["w"], large)


# --- iso_c ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 3])
def test_iso_c_keeps_the_directions_of_the_sum_and_makes_its_singular_values_their_mean(shape, n):
    moved = deltas(n, shape)
    u, s, v = np.linalg.svd(moved.sum(0), full_matrices=False)
    found = made("iso_c", moved)
    assert np.allclose(found, s.mean() * u @ v, rtol=0, atol=1e-9 * s.mean())
    assert np.allclose(np.linalg.svd(found, compute_uv=False), s.mean(), rtol=1e-9)


def test_iso_c_makes_up_no_directions():
    moved = low_rank(2, 3, (24, 40))
    s = np.linalg.svd(moved.sum(0), compute_uv=False)
    made_of = np.linalg.svd(made("iso_c", moved), compute_uv=False)
    assert np.allclose(made_of, [s[:6].mean()] * 6 + [0] * 18, rtol=1e-9, atol=1e-9)
    assert np.sum(made_of) == pytest.approx(s.sum())  # as the paper's mean has it


# --- tsv --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "share"), [(2, 1.0), (3, 1.0), (3, 0.5), (5, 0.7)])
def test_tsv_is_the_papers_formula(shape, n, share):
    moved = deltas(n, shape)
    kept = int(share * min(shape) / n)
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in moved]
    u = np.concatenate([u[:, :kept] for u, _, _ in parts], axis=1)
    s = np.concatenate([s[:kept] for _, s, _ in parts])
    v = np.concatenate([v[:kept] for _, _, v in parts])
    exact = procrustes(u) * s @ procrustes(v)
    assert np.allclose(made("tsv", moved, share=share), exact, rtol=0, atol=1e-9 * np.abs(exact).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_sums_orthogonal_members_of_low_rank_exactly(shape):
    moved = low_rank(4, 3, shape)
    assert np.allclose(made("tsv", moved), moved.sum(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_of_one_member_is_that_member_cut_to_its_share(shape):
    moved = deltas(1, shape)
    assert np.allclose(made("tsv", moved), moved[0], rtol=0, atol=1e-12)
    u, s, v = np.linalg.svd(moved[0], full_matrices=False)
    kept = int(0.25 * min(shape))
    assert np.allclose(made("tsv", moved, share=0.25), u[:, :kept] * s[:kept] @ v[:kept], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tsv_of_copies_is_the_member_cut_and_no_more(dtype):
    member = torch.from_numpy(deltas(1, (24, 40))[0]).to(torch.bfloat16).double().numpy()
    u, s, v = np.linalg.svd(member, full_matrices=False)
    found = made("tsv", np.stack([member] * 3), dtype=dtype)
    eps = {torch.float64: 1e-12, torch.bfloat16: 2.0**-8}[dtype]
    assert np.allclose(found, u[:, :8] * s[:8] @ v[:8], rtol=eps, atol=1e-6 if dtype != torch.float64 else 1e-12)


def test_tsv_keeps_one_vector_of_each_of_many_members():
    moved = low_rank(6, 1, (6, 40))
    assert np.allclose(made("tsv", moved, share=0.1), moved.sum(0), rtol=0, atol=1e-12)


# --- wudi -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [2, 4])
def test_wudi_without_a_ridge_is_the_least_interference(shape, n):
    moved = deltas(n, shape)
    found = made("wudi", moved, ridge=0.0)
    total, mean = moved.sum(0), moved.mean(0)
    curvature = sum(d.T @ d / (d**2).sum() for d in moved)
    least = sum(d @ d.T @ d / (d**2).sum() for d in moved) @ np.linalg.pinv(curvature, rcond=1e-12, hermitian=True)
    assert np.abs(gradient(found, moved)).max() <= 1e-12 * np.abs(gradient(total, moved)).max()
    assert interference(found, moved) <= min(interference(total, moved), interference(mean, moved))
    assert interference(found, moved) == pytest.approx(interference(least, moved), rel=1e-9)
    assert np.allclose(found, least, rtol=0, atol=1e-6 * np.abs(least).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ridge", [0.01, 0.1, 10.0])
def test_wudi_with_a_ridge_balances_interference_against_the_sum(shape, ridge):
    moved = deltas(4, shape)
    found, total = made("wudi", moved, ridge=ridge), moved.sum(0)
    drawn = ridge * 4 / shape[1]
    balance = gradient(found, moved) + 2 * drawn * (found - total)
    assert np.abs(balance).max() <= 1e-12 * np.abs(gradient(total, moved)).max()
    assert interference(found, moved) <= interference(total, moved)


def test_wudi_with_a_large_ridge_is_task_arithmetic():
    moved = deltas(3, (24, 40))
    assert np.allclose(made("wudi", moved, ridge=1e9), moved.sum(0), rtol=0, atol=1e-8)


def test_wudi_is_exact_for_one_member_and_for_members_that_read_unlike_things():
    assert np.allclose(made("wudi", deltas(1, (24, 40))), deltas(1, (24, 40))[0], rtol=0, atol=1e-12)
    moved = low_rank(4, 3, (24, 40))
    assert np.allclose(made("wudi", moved), moved.sum(0), rtol=0, atol=1e-12)


def test_wudi_passes_over_members_that_did_not_change():
    moved = deltas(2, (24, 40))
    more = np.concatenate([moved, np.zeros((1, 24, 40))])
    assert np.allclose(made("wudi", more), made("wudi", moved), rtol=0, atol=1e-12)


def test_wudi_reads_rows_where_inputs_are_rows():
    moved = deltas(3, (24, 40))
    turned = made("wudi", moved.transpose(0, 2, 1), inputs="rows").T
    assert np.allclose(turned, made("wudi", moved), rtol=0, atol=1e-12)
    assert not np.allclose(made("wudi", moved, inputs="rows"), made("wudi", moved), atol=1e-3)


def test_wudi_goes_where_the_papers_300_steps_of_adam_go():
    moved = 5e-4 * deltas(4, (64, 64)) / deltas(4, (64, 64)).std()
    x = torch.nn.Parameter(torch.from_numpy(moved.sum(0)))
    every = torch.from_numpy(moved)
    adam = torch.optim.Adam([x], lr=1e-5)
    for _ in range(300):
        adam.zero_grad()
        away: Tensor = (x - every) @ every.mT
        (away.square() / every.square().sum((1, 2), keepdim=True)).sum().backward()
        adam.step()
    theirs, ours, total = x.detach().numpy(), made("wudi", moved), moved.sum(0)
    assert interference(ours, moved) <= interference(theirs, moved) <= interference(total, moved)
    went, goes = (theirs - total).ravel(), (ours - total).ravel()
    assert went @ goes / np.linalg.norm(went) / np.linalg.norm(goes) > 0.8
    assert np.linalg.norm(ours - theirs) < 0.5 * np.linalg.norm(total)


def test_a_ridge_below_zero_and_a_share_above_one_are_refused():
    for method, given in (("wudi", {"ridge": -0.1}), ("tsv", {"share": 1.5}), ("tsv", {"share": 0.0}),
                          ("iso_c", {"otherwise": "median"})):
        with pytest.raises(MethodError, match=next(iter(given))):
            merging[method].bind(given)
