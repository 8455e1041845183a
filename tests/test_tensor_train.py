"""Tensor trains: taken apart and put together, added exactly, cut with a bound; a member like any other change."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glue.checkpoint import InMemory
from glue.errors import CheckpointError, GlueError, MethodError
from glue.family import families
from glue.identity import identify
from glue.kinds import load, weights
from glue.kinds.tt import Train, Trained, read_trains, sides, write_trains
from glue.member import Member
from glue.merge.factors import Factors
from glue.merge.tensor_train import (
    Keep,
    added,
    as_factors,
    averaged,
    decomposed,
    inner,
    norm,
    of_factors,
    rounded,
)
from glue.steps import Job
from glue.tune.trains import start, taught_trains, zeroed
from glue.workers import Workers

ROWS, COLUMNS = (4, 3, 2), (5, 2, 3)
M, N = math.prod(ROWS), math.prod(COLUMNS)


def matrix(seed: int = 0, m: int = M, n: int = N) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some(seed: int = 0, rank: int = 3) -> Train:
    """A train with cores drawn at random."""
    rng, every = torch.Generator().manual_seed(seed), (*ROWS, *COLUMNS)
    ends = [1, *[rank] * (len(every) - 1), 1]
    return Train(tuple(torch.randn(ends[k], side, ends[k + 1], generator=rng, dtype=torch.float64)
                       for k, side in enumerate(every)), len(ROWS))


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_a_train_of_full_rank_is_the_matrix():
    cut = decomposed(matrix(), ROWS, COLUMNS)
    assert apart(cut.train.dense(), matrix()) < 1e-13 and cut.bound < 1e-12
    assert cut.train.sides == (*ROWS, *COLUMNS) and cut.train.shape == (M, N)


def test_a_train_finds_the_ranks_that_a_matrix_has():
    train = decomposed(some(rank=3).dense(), ROWS, COLUMNS).train
    assert max(train.ranks) == 3 and apart(train.dense(), some(rank=3).dense()) < 1e-12
    assert train.numel == sum(core.numel() for core in train.cores) < M * N


def test_entries_are_products_of_slices_of_cores():
    train = some()
    i, j = 17, 23
    digits = [*torch.unravel_index(torch.tensor(i), ROWS), *torch.unravel_index(torch.tensor(j), COLUMNS)]
    product = torch.eye(1, dtype=torch.float64)
    for core, digit in zip(train.cores, digits, strict=True):
        product = product @ core[:, digit]
    assert float(train.dense()[i, j]) == pytest.approx(product.item(), rel=1e-12)


@given(rank=st.integers(1, 12), seed=st.integers(0, 50))
def test_what_a_cut_loses_is_within_its_bound_and_the_nearest_of_one_cut_is_reached(rank, seed):
    cut = decomposed(matrix(seed), ROWS, COLUMNS, Keep(rank=rank))
    lost = float((cut.train.dense() - matrix(seed)).norm())
    assert lost <= cut.bound * (1 + 1e-12) + 1e-12 and max(cut.train.ranks) <= rank
    # no train of these ranks is nearer than the nearest matrix of one of its cuts
    values = torch.linalg.svdvals(matrix(seed))
    assert lost >= float(values[rank:].norm()) - 1e-9


@given(error=st.floats(0.01, 0.9), seed=st.integers(0, 50))
def test_an_error_that_is_asked_for_is_kept(error, seed):
    for cut in (decomposed(matrix(seed), ROWS, COLUMNS, Keep(error=error)),
                rounded(decomposed(matrix(seed), ROWS, COLUMNS).train, Keep(error=error))):
        assert apart(cut.train.dense(), matrix(seed)) <= error


def test_two_sides_are_the_truncated_svd():
    cut = decomposed(matrix(), (M,), (N,), Keep(rank=5))
    u, values, vt = torch.linalg.svd(matrix(), full_matrices=False)
    assert apart(cut.train.dense(), u[:, :5] * values[:5] @ vt[:5]) < 1e-12
    assert cut.bound == pytest.approx(float(values[5:].norm()), rel=1e-12)


# sums and means

def test_a_sum_is_exact_and_its_ranks_add_up():
    trains, told = [some(1, 2), some(2, 3), some(3, 1)], [0.5, 0.3, 0.2]
    total = added(trains, told)
    exact = sum(weight * train.dense() for weight, train in zip(told, trains, strict=True))
    assert apart(total.dense(), exact) < 1e-13 and set(total.ranks) == {6}  # type: ignore[arg-type]


def test_rounding_a_sum_loses_no_more_than_it_says_and_nothing_that_is_double():
    trains = [some(1, 2), some(2, 3)]
    exact = trains[0].dense() + trains[1].dense()
    cut = rounded(added(trains), Keep(rank=3))
    assert 0 < float((cut.train.dense() - exact).norm()) <= cut.bound * (1 + 1e-12)
    twice = rounded(added([some(1, 2), some(1, 2)]), Keep())
    assert set(twice.train.ranks) == {2} and apart(twice.train.dense(), 2 * some(1, 2).dense()) < 1e-12


def test_a_mean_of_one_core_is_the_mean_of_the_changes_and_of_two_is_refused():
    one, told = some(), [3.0, 1.0]
    others = []
    for seed in (5, 6):
        cores = list(one.cores)
        cores[2] = torch.randn(cores[2].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        others.append(Train(tuple(cores), one.rows))
    exact = (3 * others[0].dense() + others[1].dense()) / 4
    mean = averaged(others, told)
    assert apart(mean.dense(), exact) < 1e-12 and mean.ranks == one.ranks
    assert averaged([one, one], [1, 1]).cores[0] is one.cores[0]
    with pytest.raises(MethodError, match="cores 0, 1, 2, 3, 4, 5 differ"):
        averaged([some(1), some(2)], [1, 1])
    apart_by = torch.stack([(a + b) / 2 for a, b in zip(some(1).cores[0], some(2).cores[0], strict=True)])
    naive = Train((apart_by, *((a + b) / 2 for a, b in zip(some(1).cores[1:], some(2).cores[1:], strict=True))), 3)
    assert apart(naive.dense(), (some(1).dense() + some(2).dense()) / 2) > 0.1


def test_inner_products_are_those_of_the_dense_changes():
    one, other = some(1), some(2, 2)
    assert inner(one, other) == pytest.approx(float((one.dense() * other.dense()).sum()), rel=1e-10)
    assert norm(one) == pytest.approx(float(one.dense().norm()), rel=1e-12)


def test_a_train_whose_last_core_is_zero_changes_nothing():
    train = some()
    off = Train((*train.cores[:-1], torch.zeros_like(train.cores[-1])), train.rows)
    base = InMemory({"w.weight": matrix()})
    assert not off.dense().any() and norm(off) == 0
    assert base["w.weight"].shape == off.shape


def test_trains_of_other_sides_are_not_added():
    with pytest.raises(MethodError, match="cannot be added core by core"):
        added([some(), decomposed(matrix(), (M,), (N,)).train])
    with pytest.raises(MethodError, match="do not make a weight"):
        decomposed(matrix(), (4, 4), COLUMNS)


# LoRA

@pytest.mark.parametrize("rank", [1, 4, 9])
def test_a_lora_becomes_a_train_and_back_without_a_loss(rank):
    lora = Factors(matrix(1, rank, N), matrix(2, M, rank), 0.7)
    cut = of_factors(lora, ROWS, COLUMNS)
    assert apart(cut.train.dense(), lora.dense()) < 1e-12
    back = as_factors(cut.train)
    assert back.rank == rank == cut.train.ranks[len(ROWS) - 1] and apart(back.dense(), lora.dense()) < 1e-12


def test_a_lora_cut_to_low_ranks_loses_no_more_than_is_told():
    lora = Factors(matrix(1, 9, N), matrix(2, M, 9), 0.7)
    cut = of_factors(lora, ROWS, COLUMNS, Keep(rank=4))
    assert 0 < float((cut.train.dense() - lora.dense()).norm()) <= cut.bound * (1 + 1e-9)


@given(st.integers(1, 5000))
def test_sides_make_their_extent_and_are_short_where_they_can_be(extent):
    found = sides(extent)
    assert math.prod(found) == extent
    assert all(side <= 8 or all(side % p for p in range(2, int(side**0.5) + 1)) for side in found)


def test_sides_of_usual_widths():
    assert sides(128) == (8, 8, 2) and sides(352) == (8, 4, 11) and sides(1) == (1,) and sides(4096) == (8, 8, 8, 8)


# the member

def over(base: Member, folder, rank: int = 3) -> Member:
    folder.mkdir()
    changes = {f"model.layers.{k}.self_attn.q_proj": of_factors(
        Factors(0.1 * matrix(k, rank, 32), matrix(k + 9, 32, rank)), (4, 8), (8, 4)).train for k in range(2)}
    write_trains(folder, changes)
    return Member(folder.name, "tensor_train", str(folder), base=base)


def test_a_train_is_a_member_that_runs_as_the_model_that_it_makes(tiny, tmp_path):
    base = tiny("base")
    member = over(base, tmp_path / "tt")
    own, below = weights(member), weights(base)
    name = "model.layers.1.self_attn.q_proj.weight"
    exact = below[name].double() + read_trains(member.folder)["model.layers.1.self_attn.q_proj"].dense()
    assert torch.equal(own[name], exact.float()) and not torch.equal(own[name], below[name])
    assert torch.equal(own["model.norm.weight"], below["model.norm.weight"])
    assert all(torch.equal(tensor, own[name]) for name, tensor in load(member).model.named_parameters() if name in own)
    assert own.fingerprint != below.fingerprint and len(identify(member.folder)[1]) == 32


def test_a_folder_that_is_damaged_or_over_another_base_is_refused(tiny, tmp_path):
    member = over(tiny("base"), tmp_path / "tt")
    with pytest.raises(CheckpointError, match="its base has \\(64, 64\\)"):
        Trained(weights(tiny("wide", hidden_size=64)), member.folder)
    file = member.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][..., :1].contiguous()}, file)
    with pytest.raises(CheckpointError, match="the cores of 'model.layers"):
        read_trains(member.folder)
    save_file({**tensors, "extra": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match="'extra' belongs to no train"):
        read_trains(member.folder)
    (member.folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="peft_type is LORA"):
        read_trains(member.folder)


# the step

def lora(base: Member, folder, seed: int, rank: int = 3) -> Member:
    folder.mkdir()
    tensors = {}
    for module in (f"model.layers.{k}.self_attn.q_proj" for k in range(2)):
        tensors |= {f"base_model.model.{module}.lora_A.weight": matrix(seed, rank, 32).float(),
                    f"base_model.model.{module}.lora_B.weight": matrix(seed + 1, 32, rank).float()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 0.3}))
    return Member(folder.name, "adapter", str(folder), base=base)


def stepped(members: list[Member], out, **more) -> Member:
    choice = families("steps")["tensor_train"].bind({"members": [member.name for member in members], **more})
    choice.method.traits["check"](**{**choice.params, "members": members})
    out.mkdir()
    left = choice(Job("t/tt", out, 0, Workers(0), out), members=members)
    return Member("t/tt", left.kind, str(out), base=left.base, note=left.note)


def test_adapters_become_one_train_whose_model_is_their_mean(tiny, tmp_path):
    base = tiny("base")
    members = [lora(base, tmp_path / "a", 1), lora(base, tmp_path / "b", 5, rank=2)]
    one = stepped(members, tmp_path / "one", weight=[3, 1])
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = [weights(member)[name].double() - weights(base)[name].double() for member in members]
    assert apart(weights(one)[name].double() - weights(base)[name].double(), (3 * parts[0] + parts[1]) / 4) < 1e-5
    again = stepped([one], tmp_path / "again", side=4)  # other sides: by way of factors, exactly
    assert apart(weights(again)[name].double(), weights(one)[name].double()) < 1e-6
    small = stepped([one], tmp_path / "small", rank=3)
    told = json.loads((small.folder / "trains.json").read_text())["model.layers.0.self_attn.q_proj"]
    away = float((weights(small)[name].double() - weights(one)[name].double()).norm())
    assert 0 < away <= told["lost"] * (1 + 1e-5) and max(told["ranks"]) == 3
    assert "numbers in place of 640" in small.note


def test_a_train_becomes_a_lora_by_extracting_it(tiny, tmp_path):
    base = tiny("base")
    member = over(base, tmp_path / "tt")
    choice = families("steps")["extract"].bind({"model": "tt", "base": "base", "energy": 1.0})
    (tmp_path / "lora").mkdir()
    made = choice(Job("t/lora", tmp_path / "lora", 0, Workers(0), tmp_path), model=member, base=base)
    back = Member("t/lora", made.kind, str(tmp_path / "lora"), base=base)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert made.kind == "adapter" and apart(weights(back)[name], weights(member)[name]) < 1e-5


def test_what_is_no_product_of_factors_is_refused_while_planning(tiny, tmp_path):
    base = tiny("base")
    with pytest.raises(MethodError, match="'base' is a model, whose changes are no products"):
        stepped([base], tmp_path / "x")
    with pytest.raises(MethodError, match="sit on different bases"):
        stepped([lora(base, tmp_path / "a", 1), lora(tiny("other", seed=1), tmp_path / "b", 1)], tmp_path / "y")
    with pytest.raises(MethodError, match="2 weights for 1 members"):
        stepped([lora(base, tmp_path / "c", 1)], tmp_path / "z", weight=[1, 2])


# taught

@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A base that has seen a little of its 40 items, and members taught over it: taught("name", cores="one", ...)."""
    from glue.tune.pretrain import pretrain

    folder = tmp_path_factory.mktemp("taught")
    torch.set_num_threads(1)
    for name, word in (("ones", "a"), ("twos", "b")):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(
            json.dumps({"question": f"{word} {k % 7} {k % 5} =", "answer": f"{k % 5} {word}"}) + "\n"
            for k in range(40)))
    pretrain(folder / "base", data=[(folder / "ones", 1.0)], vocabulary=[folder / "ones", folder / "twos"], steps=60,
             architecture={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
                           "max_position_embeddings": 16}, batch_size=8, learning_rate=1e-2, seed=0,
             report=lambda *_: None)
    base = Member("base", "model", str(folder / "base"))
    losses: list[float] = []

    def make(name: str, data: str = "ones", **more) -> tuple[Member, list[float]]:
        losses.clear()
        (folder / name).mkdir()
        taught_trains(folder / name, base=base, data=[(folder / data, 1.0)], report=lambda _, __, loss: losses.append(
            loss), **{"steps": 30, "learning_rate": 2e-2, "rank": 4, "targets": ["q_proj", "up_proj"], "side": 4,
                      "batch_size": 8, **more})
        return Member(name, "tensor_train", str(folder / name), base=base), list(losses)

    return make


def test_a_train_that_is_begun_changes_nothing_and_is_as_long_as_its_zero_core(tiny):
    begun = start("layer", (48, 32), 4, 4, 7)
    assert begun.shape == (48, 32) and not begun.dense().any() and max(begun.ranks) == 4
    most = zeroed(begun)
    cores = list(begun.cores)
    cores[most] = torch.randn(cores[most].shape, generator=torch.Generator().manual_seed(0))
    assert norm(Train(tuple(cores), begun.rows)) == pytest.approx(float(cores[most].norm()), rel=1e-5)
    again, other = start("layer", (48, 32), 4, 4, 7), start("layer", (48, 32), 4, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(begun.cores, again.cores, strict=True))
    assert not torch.equal(begun.cores[0], other.cores[0])


@pytest.mark.parametrize("cores", ["all", "one"])
def test_trains_are_taught_and_what_is_written_is_what_was_trained(taught, cores):
    member, losses = taught(f"told-{cores}", "twos", cores=cores)
    assert losses[-1] < losses[0] - 0.3
    trains = read_trains(member.folder)
    assert set(trains) == {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"}
    own, below = weights(member), weights(member.base)
    assert {name for name in own if not torch.equal(own[name], below[name])} == {f"{name}.weight" for name in trains}
    begun = start("model.layers.0.mlp.up_proj", (48, 32), 4, 4, 0)
    same = [torch.equal(a, b) for a, b in zip(trains["model.layers.0.mlp.up_proj"].cores, begun.cores, strict=True)]
    assert same.count(False) == (1 if cores == "one" else len(same))


def test_clients_who_teach_one_core_can_be_averaged_exactly_at_their_rank(taught):
    trains = [read_trains(taught(f"client-{data}", data, cores="one", seed=k)[0].folder)
              for k, data in enumerate(("ones", "twos"))]
    for module in trains[0]:
        mean = averaged([one[module] for one in trains], [3, 1])
        exact = (3 * trains[0][module].dense() + trains[1][module].dense()) / 4
        assert apart(mean.dense(), exact) < 1e-12 and mean.ranks == trains[0][module].ranks


def test_the_step_averages_one_core_and_keeps_the_others(taught, tmp_path):
    members = [taught(f"one-{data}", data, cores="one", seed=k)[0] for k, data in enumerate(("ones", "twos"))]
    mean = read_trains(stepped(members, tmp_path / "mean", weight=[3, 1], side=4).folder)
    for module, train in read_trains(members[0].folder).items():
        kept = [torch.equal(a, b) for a, b in zip(mean[module].cores, train.cores, strict=True)]
        other = read_trains(members[1].folder)[module].dense()
        assert kept.count(False) == 1 and apart(mean[module].dense(), (3 * train.dense() + other) / 4) < 1e-6


def test_an_unknown_layer_is_told(taught):
    with pytest.raises(GlueError, match="no layer 'q_prj' to adapt; did you mean 'q_proj'"):
        taught("wrong", targets=["q_prj"])
