"""Privacy: what is clipped is no longer than it may be, noise is as large as told, and epsilon is not understated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy import optimize, stats

from glue.errors import GlueError
from glue.federate.heterogeneity import Change
from glue.federate.privacy import Privacy, balanced, epsilon, private, privatise
from glue.kinds.lora import Adapter

SHAPES = {"one": (40, 30, 4), "two": (20, 50, 2)}  # m, n, r


def changes(seed: int = 0, scale: float = 2.0) -> dict[str, Change]:
    rng = torch.Generator().manual_seed(seed)
    return {name: Change(torch.randn(m, r, generator=rng), torch.randn(r, n, generator=rng), scale)
            for name, (m, n, r) in SHAPES.items()}


def dense(change: Change) -> torch.Tensor:
    return change.rows(torch.arange(len(change.b)))


def norm(some: dict[str, Change]) -> float:
    return math.sqrt(sum(float(dense(change).square().sum()) for change in some.values()))


# what epsilon it is

@pytest.mark.parametrize("noise, answers", [(0.5, 1), (1.0, 1), (1.0, 50), (4.0, 200), (30.0, 1000)])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_epsilon_is_above_the_exact_one_of_a_gaussian_and_not_far(noise, answers, delta):
    """Answers of the Gaussian mechanism are one answer of it; its exact curve is theorem 8 of arXiv:1805.06530."""
    mu = math.sqrt(answers) / noise

    def left(eps: float) -> float:
        return (stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps + stats.norm.logcdf(-mu / 2 - eps / mu))) - delta

    exact = optimize.brentq(left, 0, 1000) if left(0) > 0 else 0.0
    found = epsilon(noise, answers, delta)
    assert exact <= found <= exact * 1.25 + 0.06


def test_more_answers_cost_more_and_none_cost_nothing():
    spent = [epsilon(2.0, answers, 1e-5) for answers in (0, 1, 10, 100)]
    assert spent == sorted(spent) and spent[0] == 0.0 and math.isinf(epsilon(0.0, 1, 1e-5))
    assert Privacy(1.0).told({"c0": 3})["epsilon"] == {"c0": "none"}


def test_what_is_no_privacy_is_refused():
    for given in ({"clip": 0.0}, {"clip": 1.0, "noise": -1.0}, {"clip": 1.0, "delta": 1.0}):
        with pytest.raises(GlueError, match="are no privacy"):
            Privacy(**given)


# slopes

def test_slopes_are_clipped_by_value_and_noised_by_the_clip():
    keep = Privacy(0.5).slope(np.random.default_rng(0))
    assert [keep(value) for value in (-3.0, 0.2, 0.7)] == [-0.5, 0.2, 0.5]
    noised = Privacy(0.5, noise=2.0).slope(np.random.default_rng(0))
    drawn = [noised(9.0) - 0.5 for _ in range(4000)]
    assert stats.kstest(np.asarray(drawn) / 1.0, "norm").pvalue > 0.01
    again = Privacy(0.5, noise=2.0).slope(np.random.default_rng(0))
    assert again(9.0) - 0.5 == drawn[0]


# changes of an adapter

@pytest.mark.parametrize("frozen", [True, False])
def test_a_change_is_clipped_by_its_norm_over_all_layers_and_keeps_its_direction(frozen):
    some = changes()
    found = private(some, Privacy(norm(some) / 3), np.random.default_rng(0), frozen=frozen)
    for name, change in some.items():
        assert torch.allclose(dense(found[name]), dense(change) / 3, rtol=1e-9, atol=1e-12)
        assert found[name].b.shape == change.b.shape and found[name].a.shape == change.a.shape  # type: ignore[union-attr]
        assert found[name].scale == change.scale
    small = private(some, Privacy(norm(some) * 2), np.random.default_rng(0), frozen=frozen)
    assert norm(small) == pytest.approx(norm(some), rel=1e-9)


def test_noise_under_a_frozen_a_is_even_in_its_rows_and_of_the_size_that_is_told():
    some = changes()
    privacy = Privacy(norm(some), noise=0.5)
    found = private(some, privacy, np.random.default_rng(0), frozen=True)
    drawn = []
    for name, change in some.items():
        assert torch.equal(found[name].a, change.a)  # type: ignore[arg-type]
        basis = torch.linalg.qr(change.a.double().T).Q  # type: ignore[union-attr]
        noise = dense(found[name]) - dense(change)
        assert torch.allclose(noise @ basis @ basis.T, noise)
        drawn.append((noise @ basis).flatten())
    assert stats.kstest(torch.cat(drawn).numpy() / (0.5 * norm(some)), "norm").pvalue > 0.01


def test_balanced_factors_are_no_longer_than_the_noise_assumes():
    for seed in range(20):
        some = changes(seed)
        ranks = sum(r for *_, r in SHAPES.values())
        length = math.sqrt(sum(float(side.square().sum()) for change in some.values() for side in balanced(change)))
        assert length <= math.sqrt(2 * math.sqrt(ranks) * norm(some)) * (1 + 1e-12)
    a, b = balanced(some["one"])
    assert torch.allclose(b @ a, dense(some["one"])) and torch.allclose(b.T @ b, a @ a.T)
    flat = {"one": Change(torch.eye(3), torch.eye(3))}  # all singular values alike: the bound is met
    a, b = balanced(flat["one"])
    assert float(a.square().sum() + b.square().sum()) == pytest.approx(2 * math.sqrt(3) * norm(flat))


def test_noise_on_trained_factors_is_of_the_size_that_is_told():
    some, ranks = changes(), sum(r for *_, r in SHAPES.values())
    found = private(some, Privacy(norm(some), noise=0.1), np.random.default_rng(0))
    drawn = []
    for name, change in some.items():
        a, b = balanced(change)
        drawn += [(found[name].a - a).flatten(), (found[name].b * change.scale - b).flatten()]  # type: ignore[operator]
    spread = 0.1 * math.sqrt(2 * math.sqrt(ranks) * norm(some))
    assert stats.kstest(torch.cat(drawn).numpy() / spread, "norm").pvalue > 0.01


def test_dense_changes_are_clipped_and_noised_too():
    some = {"bias": Change(torch.ones(3000, 1))}
    found = private(some, Privacy(1.0, noise=0.2), np.random.default_rng(0))["bias"].b
    assert stats.kstest((found.flatten() - 1 / math.sqrt(3000)).numpy() / 0.2, "norm").pvalue > 0.01


def test_what_is_no_number_or_no_basis_is_refused():
    with pytest.raises(GlueError, match="no number"):
        private({"w": Change(torch.full((2, 1), math.nan), torch.ones(1, 2))}, Privacy(1.0), np.random.default_rng(0))
    with pytest.raises(GlueError, match="rows of a frozen A depend"):
        private({"w": Change(torch.ones(4, 2), torch.ones(2, 4))}, Privacy(1.0), np.random.default_rng(0), frozen=True)


# folders

def adapter(folder: Path, **config) -> Path:
    folder.mkdir()
    tensors = {}
    for name, change in changes().items():
        tensors |= {f"base_model.model.{name}.lora_{side}.weight": factor
                    for side, factor in (("A", change.a), ("B", change.b))}
    save_file(tensors, folder / "adapter_model.safetensors")  # type: ignore[arg-type]
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"two": 2}, "alpha_pattern": {"two": 4},
        **config}))
    return folder


def test_a_folder_of_an_adapter_is_made_private_in_its_place(tmp_path):
    folder = adapter(tmp_path / "a")
    before = {module: Adapter(folder).factors(module) for module in SHAPES}
    whole = norm(changes())
    privatise(folder, Privacy(whole / 2), np.random.default_rng(0))
    after = Adapter(folder)
    for module, (a, b) in before.items():
        now = after.factors(module)
        assert torch.allclose(now[1] @ now[0], b @ a / 2, atol=1e-5)
    assert after.config == json.loads((adapter(tmp_path / "b") / "adapter_config.json").read_text())


def test_a_folder_that_holds_more_than_factors_is_refused(tmp_path):
    folder = adapter(tmp_path / "a", use_dora=True)
    tensors = dict(Adapter(adapter(tmp_path / "plain")).tensors)
    tensors |= {f"base_model.model.{name}.lora_magnitude_vector": torch.ones(m) for name, (m, _, _) in SHAPES.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(GlueError, match="more than factors"):
        privatise(folder, Privacy(1.0), np.random.default_rng(0))


# somebody else's

def test_dense_changes_are_clipped_as_flower_clips_them():
    from flwr.supercore.differential_privacy import compute_clip_model_update

    rng = np.random.default_rng(0)
    before = [rng.standard_normal((6, 5)), rng.standard_normal((4, 3))]
    after = [one + rng.standard_normal(one.shape) for one in before]
    mine = private({str(k): Change(torch.from_numpy(new - old))
                    for k, (old, new) in enumerate(zip(before, after, strict=True))}, Privacy(0.7), rng)
    compute_clip_model_update(after, before, 0.7)
    for k, (old, new) in enumerate(zip(before, after, strict=True)):
        assert np.allclose(mine[str(k)].b.numpy(), new - old, rtol=1e-12)
