"""Compression: factors against numpy's decomposition, and mixtures that are stored as a base and what was changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glue.checkpoint import Checkpoint, InMemory, weights_digest
from glue.errors import CheckpointError, MethodError
from glue.kinds.compressed import Compressed, restored
from glue.mix.compress import Energy, Packed, Rank, factored, keep
from glue.writer import Writer

SIDES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def matrix(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random, with singular values that fall by a factor of about 30."""
    random = torch.Generator().manual_seed(seed)
    least = min(rows, columns)
    left, right = (torch.randn(side, least, generator=random, dtype=torch.float64) for side in (rows, columns))
    return (left * torch.logspace(0, -1.5, least, dtype=torch.float64) @ right.T).to(dtype)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    """Frobenius norm of the difference, as a share of the second's."""
    return float((one.double() - other.double()).norm() / other.double().norm())


# --- factors ----------------------------------------------------------------------------------------------------------

@given(SIDES, st.integers(1, 24), st.integers(0, 99))
def test_no_factors_of_a_rank_are_nearer_than_these(sides, rank, seed):
    delta = matrix(*sides, seed)
    left, right, error = factored(delta, Rank(rank))
    values = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    best, whole = np.sqrt((values[rank:] ** 2).sum()), np.sqrt((values ** 2).sum())
    assert left.shape == (sides[0], min(rank, *sides)) and right.shape == (min(rank, *sides), sides[1])
    there = float((delta.double() - left.double() @ right.double()).norm())
    assert there <= best + 2e-6 * whole and abs(error - best) <= 1e-6 * whole


@given(SIDES, st.floats(0.05, 1.0), st.integers(0, 99))
def test_energy_keeps_the_fewest_directions_with_that_share(sides, share, seed):
    delta = matrix(*sides, seed)
    left, _, error = factored(delta, Energy(share))
    energies = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    rank, whole = left.shape[1], energies.sum()
    assert energies[:rank].sum() >= (share - 1e-9) * whole and error ** 2 <= (1 - share + 1e-9) * whole
    assert rank == 1 or energies[:rank - 1].sum() < (share + 1e-9) * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sides", [(40, 24), (24, 40), (32, 32), (1, 9)])
def test_full_rank_is_the_matrix_within_rounding(sides, dtype):
    delta = matrix(*sides, 3, dtype)
    for kept in (Rank(min(sides)), Energy(1.0)):
        left, right, error = factored(delta, kept)
        assert left.dtype == right.dtype == dtype
        assert far(left @ right, delta) <= 8 * torch.finfo(dtype).eps and error <= 1e-7 * float(delta.norm())


def test_the_error_falls_with_every_rank():
    delta = matrix(30, 20, 4)
    errors = [factored(delta, Rank(r))[2] for r in range(1, 21)]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False)) and errors[-1] < 1e-6


def test_a_change_of_low_rank_has_no_more_directions_than_that():
    delta = matrix(50, 3, 5, torch.float64) @ matrix(3, 40, 6, torch.float64)
    for kept in (Rank(30), Energy(1.0)):
        left, right, _ = factored(delta, kept)
        assert left.shape[1] == 3 and far(left @ right, delta) <= 1e-12
    left, right, error = factored(torch.zeros(5, 7), Rank(3))
    assert (left.shape, right.shape, error) == ((5, 0), (0, 7), 0.0)


def test_both_factors_are_as_large_so_that_narrow_types_hold_them():
    for size in (1e-6, 1e6):
        left, right, _ = factored(size * matrix(30, 20, 7), Rank(5))
        assert left.norm(dim=0).numpy() == pytest.approx(right.norm(dim=1).numpy(), rel=1e-4)


def test_blocks_of_rows_change_nothing_but_rounding(monkeypatch):
    delta = matrix(60, 20, 8)
    whole = factored(delta, Rank(6))
    monkeypatch.setattr("glue.mix.compress.ENTRIES", 100)
    parts = factored(delta, Rank(6))
    assert far(parts[0] @ parts[1], whole[0] @ whole[1]) <= 1e-6 and parts[2] == pytest.approx(whole[2], rel=1e-9)


@pytest.mark.parametrize(("told", "why"), [
    ({}, "one of them has to be said"), ({"rank": 4, "energy": 0.9}, "not both"), ({"rnak": 4}, "did you mean 'rank'"),
    ({"rank": 0}, "at least 1, not 0"), ({"rank": 2.5}, "not 2.5"), ({"energy": 0.0}, "up to 1, not 0"),
    ({"energy": 1.5}, "not 1.5")])
def test_what_is_kept_is_one_of_two_words(told, why):
    with pytest.raises(MethodError, match=why):
        keep(told)
    assert (keep({"rank": 4}), keep({"energy": 1})) == (Rank(4), Energy(1.0))


# --- what is stored ---------------------------------------------------------------------------------------------------

SHAPES = {"embed.weight": (40, 16), "up.weight": (24, 16), "norm.weight": (16,), "frozen.weight": (16, 16)}
SAME = {name: name for name in SHAPES}


def sources(dtype: torch.dtype = torch.float32) -> tuple[InMemory, list[InMemory]]:
    """A base and two experts: three directions of change and a little noise; one tensor nobody changed."""
    random = torch.Generator().manual_seed(9)
    base = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in SHAPES.items()}
    experts = []
    for seed in (10, 20):
        tensors = dict(base)
        for k, name in enumerate(("embed.weight", "up.weight")):
            rows, columns = SHAPES[name]
            change = 0.05 * matrix(rows, 3, seed + k) @ matrix(3, columns, seed + k + 5)
            tensors[name] = (base[name].float() + change + 1e-4 * matrix(rows, columns, seed + k + 7)).to(dtype)
        tensors["norm.weight"] = (base["norm.weight"].float() * 1.1).to(dtype)
        experts.append(InMemory(tensors))
    return InMemory(base), experts


def written(packed: Packed, folder: Path, **more: torch.Tensor) -> tuple[str, Compressed]:
    headers = dict(packed.headers) | dict(InMemory(more).headers)
    folder.mkdir(exist_ok=True)
    with Writer(folder, headers) as writer:
        for name in headers:
            writer.write(name, more[name] if name in more else packed[name])
        return writer.close(), Compressed(Checkpoint(folder), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_read_again_is_as_near_as_was_told(tmp_path, dtype):
    base, experts = sources(dtype)
    packed = Packed(base, experts, SAME, Rank(3), tmp_path)
    _, read = written(packed, tmp_path / "m")
    assert set(read) == {f"expert_{k}.{name}" for k in range(2) for name in SHAPES}
    for one in packed.stored:
        k, name = int(one.name[7]), one.name.partition(".")[2]
        expert, loaded = experts[k][name], read[one.name]
        assert (loaded.dtype, loaded.shape) == (expert.dtype, expert.shape)
        error = float((loaded.double() - expert.double()).norm())
        assert error == pytest.approx(one.error, rel=1e-6, abs=1e-9)
        assert error <= {torch.float32: 3e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype] * one.norm
    by_name = {one.name: one for one in packed.stored}
    assert [by_name[f"expert_0.{name}"].how for name in SHAPES] == ["factors", "factors", "whole", "same"]
    assert torch.equal(read["expert_1.norm.weight"], experts[1]["norm.weight"])
    assert torch.equal(read["expert_1.frozen.weight"], base["frozen.weight"])


def test_losses_and_bytes_are_those_of_the_files(tmp_path):
    base, experts = sources()
    packed = Packed(base, experts, SAME, Rank(3), tmp_path)
    written(packed, tmp_path / "m")
    loss = packed.loss
    assert loss.before == 2 * 4 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert loss.after == Checkpoint(tmp_path / "m").nbytes == loss.as_dict()["ratio"] * loss.before
    assert loss.after == 4 * (40 * 16 + 24 * 16 + 16 * 16 + 2 * 16) + 2 * 4 * 3 * (40 + 16 + 24 + 16)
    read = Compressed(Checkpoint(tmp_path / "m"), 2)
    error, change = (np.sqrt(sum(float((left[name].double() - experts[k][name].double()).norm()) ** 2
                                 for k, left in enumerate(both) for name in SHAPES))
                     for both in ([{name: read[f"expert_{k}.{name}"] for name in SHAPES} for k in range(2)],
                                  [base, base]))
    assert loss.of_change == pytest.approx(error / change, rel=1e-6) and 1e-4 < loss.of_change < 0.05
    assert loss.worst_lost >= loss.of_change and loss.worst.endswith(("embed.weight", "up.weight"))


def test_more_energy_loses_less_and_stores_more(tmp_path):
    base, experts = sources()
    losses = [Packed(base, experts, SAME, Energy(share), tmp_path).loss for share in (0.9, 0.9995, 0.999999)]
    assert losses[0].of_change > losses[1].of_change > losses[2].of_change
    assert losses[0].after < losses[1].after <= losses[2].after
    assert losses[0].of_change <= (1 - 0.9) ** 0.5 + 1e-6


def test_factors_that_save_nothing_are_not_made(tmp_path):
    base, experts = sources()
    packed = Packed(base, experts, SAME, Rank(16), tmp_path)
    assert {one.how for one in packed.stored} == {"whole", "same"} and packed.loss.of_change == 0
    digest, read = written(packed, tmp_path / "m")
    assert "base.up.weight" not in Checkpoint(tmp_path / "m") and "base.frozen.weight" in Checkpoint(tmp_path / "m")
    assert all(torch.equal(read[f"expert_{k}.{name}"], experts[k][name]) for k in range(2) for name in SHAPES)


def test_a_mixture_may_call_tensors_by_other_names(tmp_path):
    base, experts = sources()
    packed = Packed(base, experts, {f"moved.{name}": name for name in SHAPES}, Rank(3), tmp_path)
    _, read = written(packed, tmp_path / "m")
    plain = Compressed(Packed(base, experts, SAME, Rank(3), tmp_path), 2)
    assert set(read) == {f"expert_{k}.moved.{name}" for k in range(2) for name in SHAPES}
    assert all(torch.equal(read[name], plain[name.replace("moved.", "")]) for name in read)


def test_the_digest_is_that_of_what_is_stored_and_a_router_stays_as_it_is(tmp_path):
    base, experts = sources()
    router = torch.arange(6.0).view(2, 3)
    for name in ("one", "two"):
        digest, read = written(Packed(base, experts, SAME, Rank(2), tmp_path), tmp_path / name,
                               **{"router.outer.weight": router})
        assert digest == weights_digest(Checkpoint(tmp_path / name))
        assert torch.equal(read["router.outer.weight"], router)
    assert weights_digest(Checkpoint(tmp_path / "one")) == digest
    assert Compressed(Checkpoint(tmp_path / "one"), 2).fingerprint == read.fingerprint


def test_an_expert_that_lacks_a_tensor_or_has_another_shape_is_refused(tmp_path):
    base, experts = sources()
    odd = InMemory({**experts[1], "up.weight": torch.zeros(24, 17)})
    with pytest.raises(CheckpointError, match=r"'up.weight' is \(24, 16\) in the base and \(24, 17\) in expert 1"):
        Packed(base, [experts[0], odd], SAME, Rank(2), tmp_path)
    odd = InMemory({name: experts[1][name] for name in SHAPES if name != "norm.weight"})
    with pytest.raises(CheckpointError, match="and nothing in expert 1"):
        Packed(base, [experts[0], odd], SAME, Rank(2), tmp_path)
    odd = InMemory({**experts[1], "up.weight": torch.full((24, 16), torch.nan)})
    with pytest.raises(CheckpointError, match="'expert_1.up.weight': a change from the base has numbers that are not"):
        Packed(base, [experts[0], odd], SAME, Rank(2), tmp_path)


@pytest.mark.parametrize(("tensors", "why"), [
    ({"expert_0.w": (4, 4)}, "nothing is stored for 'expert_1.w', and no base"),
    ({"base.w": (4, 4), "expert_2.w": (4, 4)}, "of expert 2, and there are 2"),
    ({"base.w": (4, 4), "expert_1.w.svd_left": (4, 2)}, "do not make a change"),
    ({"base.w": (4, 4), "expert_1.w.svd_left": (4, 2), "expert_1.w.svd_right": (3, 4)}, "do not make a change"),
    ({"base.w": (4, 4), "expert_1.w.svd_left": (4, 2), "expert_1.w.svd_right": (2, 5)}, "do not make a change"),
    ({"base.w": (4, 4), "expert_1.w": (4, 4), "expert_1.w.svd_left": (4, 2), "expert_1.w.svd_right": (2, 4)},
     "do not make a change")])
def test_parts_that_do_not_fit_are_refused(tensors, why):
    with pytest.raises(CheckpointError, match=why):
        Compressed(InMemory({name: torch.zeros(shape) for name, shape in tensors.items()}), 2)


def test_restoring_rounds_once():
    base, left, right = matrix(20, 12, 1).bfloat16(), matrix(20, 2, 2).bfloat16(), matrix(2, 12, 3).bfloat16()
    exact = base.double() + left.double() @ right.double()
    assert torch.equal(restored(base, left, right), exact.float().bfloat16())


# --- a mixture --------------------------------------------------------------------------------------------------------

@pytest.fixture
def mixture(tiny, tmp_path):
    """A mixture of two experts near one base, built as any; and its compressed form in another folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from glue.family import families
    from glue.kinds.mixture import register
    from glue.kinds.modelling.compressed_mixture import GlueCompressedMixtureConfig, GlueCompressedMixtureForCausalLM
    from glue.mix.levels.model import sites, write
    from glue.mix.parts import Dev, Parts

    experts = [tiny(name, seed=seed) for name, seed in (("base", 1), ("one", 1), ("two", 1))]
    for k, expert in enumerate(experts[1:]):
        checkpoint = {name: tensor.clone() for name, tensor in Checkpoint(expert.path).items()}
        name = f"model.layers.{k}.mlp.up_proj.weight"
        checkpoint[name] += 0.1 * matrix(*checkpoint[name].shape, seed=30 + k)
        with Writer(Path(expert.path), InMemory(checkpoint).headers) as writer:
            for tensor in checkpoint:
                writer.write(tensor, checkpoint[tensor])
    texts, wins = ["w3 w4", "w30 w31", "w9", "w38 w2"], torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 2)
    dense, small = tmp_path / "dense", tmp_path / "small"
    parts, dev = Parts(tuple(experts[1:]), None, experts[1]), Dev(texts, wins, torch.zeros(4))
    write(dense, parts, [families("routing").choose("linear")(site) for site in sites(parts, dev)])
    register()
    AutoConfig.register(GlueCompressedMixtureConfig.model_type, GlueCompressedMixtureConfig, exist_ok=True)
    AutoModelForCausalLM.register(GlueCompressedMixtureConfig, GlueCompressedMixtureForCausalLM, exist_ok=True)
    stored = Checkpoint(dense)
    base, sources = Checkpoint(experts[0].path), [Checkpoint(expert.path) for expert in experts[1:]]
    small.mkdir()

    def make(kept) -> tuple[Path, Path, Packed]:
        packed = Packed(base, sources, {name: name for name in base}, kept, small)
        routers = {name: stored[name] for name in stored if name.startswith("router.")}
        headers = packed.headers | InMemory(routers).headers
        with Writer(small, headers) as writer:
            for name in headers:
                writer.write(name, routers[name] if name in routers else packed[name])
        GlueCompressedMixtureConfig.of(AutoConfig.from_pretrained(dense)).save_pretrained(small)
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            (small / file).write_bytes((dense / file).read_bytes())
        return dense, small, packed
    return make


IDS = torch.randint(3, 40, (6, 7), generator=torch.Generator().manual_seed(0))


def test_a_compressed_mixture_loads_as_any_other_and_answers_as_the_experts_it_stands_for(mixture):
    from glue.kinds import load
    from glue.member import Member

    dense, small, packed = mixture(Rank(19))  # one less than saves nothing
    one, other = (load(Member("m", "mixture", str(folder))) for folder in (dense, small))
    with torch.no_grad():
        logits = [running.model(IDS).logits for running in (one, other)]
    assert one.route(IDS.tolist()) == other.route(IDS.tolist())
    read = Compressed(Checkpoint(small), 2)
    state = other.model.state_dict()
    assert all(torch.equal(state[name], read[name]) for name in read)
    assert 0 < packed.loss.of_change < 0.2 and packed.loss.after < 0.6 * packed.loss.before
    assert 0 < far(logits[1], logits[0]) < 0.2


def test_losses_of_answers_fall_to_nothing_as_the_energy_grows(mixture):
    from glue.kinds import load
    from glue.member import Member

    told = []
    for share in (0.3, 0.99, 1 - 1e-9):
        dense, small, packed = mixture(Energy(share))
        with torch.no_grad():
            logits = [load(Member("m", "mixture", str(folder))).model(IDS).logits for folder in (dense, small)]
        told.append(far(logits[1], logits[0]))
    assert told[0] > told[1] > told[2] and told[2] <= 1e-5


def test_a_loaded_one_saves_itself_as_an_ordinary_mixture(mixture, tmp_path):
    from transformers import AutoModelForCausalLM

    _, small, _ = mixture(Rank(4))
    loaded = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    assert type(loaded).__name__ == "GlueModelMixtureForCausalLM"
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    assert json.loads((tmp_path / "again/config.json").read_text())["model_type"] == "glue_model_mixture"


def test_experts_that_share_a_tensor_of_the_base_do_not_share_its_memory(mixture):
    from transformers import AutoModelForCausalLM

    _, small, _ = mixture(Rank(4))
    loaded = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    places = [tensor.data_ptr() for name, tensor in loaded.state_dict().items() if name.startswith("expert_")]
    assert len(set(places)) == len(places)


def test_transformers_alone_refuses_it_instead_of_filling_it_with_random_numbers(mixture):
    _, small, _ = mixture(Rank(4))
    program = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(small)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and "glue_compressed_mixture" in done.stderr
