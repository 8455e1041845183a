"""Our adapters against peft's own: sums, cuts, and what each makes of one adapter alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from glue.errors import MethodError
from glue.kinds import load, weights
from glue.kinds.lora import Adapter
from glue.member import Member
from glue.merge import merging
from glue.merge.adapters import Update, combine
from glue.merge.engine import merged
from glue.steps.merge import compatible, sources_of

SHARES = [0.2, 0.5, 0.3]


def trained(base: Member, folder: Path, *, rank: int = 4, alpha: float = 8, seed: int = 0, **lora) -> Member:
    """An adapter that peft wrote, with random factors, and magnitudes where there are such."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **lora)
    model = get_peft_model(load(base).model, config)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3 + 2 * ("magnitude" in name))
    model.save_pretrained(folder)
    return Member(folder.name, "adapter", str(folder), base=base)


def theirs(members: list[Member], shares: list[float], how: str, **options) -> dict[str, Tensor]:
    """The base's tensors with what peft's add_weighted_adapter makes of the members merged into them."""
    from peft import PeftModel

    first, *others = members
    model = PeftModel.from_pretrained(load(first.base).model, first.path, adapter_name=first.name)
    for other in others:
        model.load_adapter(other.path, adapter_name=other.name)
    model.add_weighted_adapter([member.name for member in members], shares, "all", combination_type=how, **options)
    return dict(model.merge_and_unload(adapter_names=["all"]).state_dict())


def ours(members: list[Member], shares: list[float], out: Path, **params) -> dict[str, Tensor]:
    """The same by FLoRA; peft reads what was written."""
    updates = [Update(member.name, Adapter(member.folder)) for member in members]
    choice = merging["flora"].bind({"weight": shares, "normalize": False, **params})
    combine(choice, updates, out, base=members[0].base.path)
    return dict(load(Member("made", "adapter", str(out), base=members[0].base)).model.state_dict())


def off(found: dict[str, Tensor], wanted: dict[str, Tensor], base: Member) -> float:
    """How far two models are from each other, in units of how far the second is from the base."""
    below = weights(base)
    apart = sum(float((found[name] - wanted[name]).double().square().sum()) for name in below)
    return (apart / sum(float((wanted[name] - below[name]).double().square().sum()) for name in below)) ** 0.5


@pytest.fixture
def members(tiny, tmp_path) -> list[Member]:
    """Adapters of unlike ranks and scales over one base."""
    base = tiny("base")
    return [trained(base, tmp_path / f"c{k}", rank=rank, alpha=alpha, seed=k)
            for k, (rank, alpha) in enumerate([(2, 8), (4, 4), (8, 12)])]


def test_a_stack_is_what_peft_concatenates(members, tmp_path):
    found, wanted = ours(members, SHARES, tmp_path / "out"), theirs(members, SHARES, "cat")
    assert off(found, wanted, members[0].base) <= 1e-6
    assert Adapter(tmp_path / "out").config["r"] == 14


def test_a_cut_sum_is_what_peft_finds_by_decomposing_the_dense_sum(members, tmp_path):
    found, wanted = ours(members, SHARES, tmp_path / "out", rank=5), theirs(members, SHARES, "svd", svd_rank=5)
    assert off(found, wanted, members[0].base) <= 2e-5  # theirs is found in fp32


def test_ranks_that_differ_by_layer_are_read_by_peft_as_we_meant_them(members, tmp_path):
    found = ours(members, SHARES, tmp_path / "out", energy=0.8)
    made = Member("made", "adapter", str(tmp_path / "out"), base=members[0].base)
    assert Adapter(made.folder).config["rank_pattern"]
    assert off(found, dict(weights(made)), members[0].base) <= 1e-6


@pytest.mark.parametrize("lora, error", [({}, 0.0), ({"use_rslora": True}, 1.0)], ids=["lora", "rslora"])
def test_one_adapter_alone_is_itself_which_peft_says_of_lora_only(tiny, tmp_path, lora, error):
    """peft 0.21 sets alpha to the rank, which rsLoRA divides by its root: at rank 4 the change becomes twice itself."""
    one = trained(tiny("base"), tmp_path / "one", **lora)
    itself = dict(load(one).model.state_dict())
    assert off(ours([one], [1.0], tmp_path / "out"), itself, one.base) <= 1e-6
    assert off(theirs([one], [1.0], "cat"), itself, one.base) == pytest.approx(error, abs=1e-6)


def test_dora_alone_is_itself_as_a_model_and_is_no_sum_of_factors(tiny, tmp_path):
    """peft 0.21 stacks its factors all the same, and gives every row the length that the sum happens to have."""
    one = trained(tiny("base"), tmp_path / "dora", use_dora=True)
    itself = dict(load(one).model.state_dict())
    source, base = sources_of([one, one.base])
    for choice in (merging["linear"].bind(), merging["task_arithmetic"].bind({"weight": 1.0})):
        assert off(dict(merged(choice, [source], base)), itself, one.base) <= 1e-6
    assert 0.2 < off(theirs([one], [1.0], "cat"), itself, one.base) < 0.7
    with pytest.raises(MethodError, match="'dora' is a DoRA adapter"):
        compatible([one], merging["flora"].bind())
