"""Weights of 4 and 8 bits, by bitsandbytes, which calculates with them on processors too."""

from __future__ import annotations

import json

import pytest
import torch

from glue.errors import MethodError
from glue.kinds import Place, load
from glue.kinds.mixture import register
from glue.kinds.text import continued
from glue.member import Member
from tests.conftest import WORDS, word_tokenizer
from tests.test_device import MIXTURES, SCORED, ran
from tests.test_kinds import adapter_over
from tests.test_mixture_model import some_prompts

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install 'glue[quantised]'")
LIKE = {"nf4": 0.7, "int8": 0.99}  # correlation of logits with those in fp32: random weights are the worst case


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def alike(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.float().flatten(), other.float().flatten()]))[0, 1])


@pytest.mark.parametrize("dtype", LIKE)
def test_a_model_in_few_bits_takes_less_room_and_answers_much_as_before(tiny, dtype):
    member, ids = tiny("m", hidden_size=64, intermediate_size=128), some_prompts()
    plain, small = load(member), load(member, dtype=dtype)
    layer = small.model.model.layers[0].mlp.up_proj
    assert type(layer).__module__.startswith("bitsandbytes") and layer.weight.element_size() == 1
    assert layer.weight.numel() == 128 * 64 // (2 if dtype == "nf4" else 1)
    assert type(small.model.lm_head) is torch.nn.Linear, "what writes is not quantised"
    assert alike(small.model(ids).logits, plain.model(ids).logits) > LIKE[dtype]
    assert continued(small, "w5 w9", 4)


def test_an_adapter_stands_beside_weights_in_few_bits_and_changes_what_they_say(tiny, tmp_path):
    base = tiny("m", hidden_size=64, intermediate_size=128)
    member = adapter_over(base, tmp_path / "a", r=4, target_modules=["up_proj", "q_proj"])
    ids, small = some_prompts(), load(member, dtype="int8")
    layer = small.model.model.layers[0].mlp.up_proj
    assert "lora" in type(layer).__module__ and layer.base_layer.weight.dtype == torch.int8
    told = load(member).model(ids).logits
    assert alike(small.model(ids).logits, told) > 0.99 > alike(load(base, dtype="int8").model(ids).logits, told)


@pytest.mark.parametrize("kind", MIXTURES)
def test_routers_of_mixtures_stay_as_they_are(tmp_path, kind):
    register()
    MIXTURES[kind]().save_pretrained(tmp_path)
    word_tokenizer(WORDS).save_pretrained(tmp_path)
    member = Member("mixture", "mixture", str(tmp_path))
    plain, small = load(member), load(member, dtype="int8")
    kept = {name: tensor for name, tensor in small.model.state_dict().items() if "router" in name}
    assert kept and all(torch.equal(tensor, plain.model.state_dict()[name]) for name, tensor in kept.items())
    assert any(type(part).__name__ == "Linear8bitLt" for part in small.model.modules())
    rows = [[1, 5, 9, 7], [1, 3, 3], [1, 30, 12, 8, 22]]
    assert small.route(rows) and alike(small.model(some_prompts()).logits, plain.model(some_prompts()).logits) > 0.9


def test_members_are_measured_in_few_bits_and_the_scores_say_so(asked_zoo, tiny):
    tiny("m", hidden_size=64, intermediate_size=128)  # blocks of 64 numbers share a scale
    tiny("n", hidden_size=64, intermediate_size=128, seed=1)
    table = ran(asked_zoo, SCORED, dtype="nf4")["s"]
    store = [json.loads(line) for line in (asked_zoo / "zoo/scores.jsonl").read_text().splitlines()]
    assert table.note.endswith("in nf4") and [json.loads(one["how"])["dtype"] for one in store] == ["nf4", "nf4"]


def test_sides_that_a_processor_has_no_kernel_for_are_refused(tiny):
    with pytest.raises(MethodError, match=r"nf4 on a processor is for .*'model.layers.0.mlp.down_proj.weight' is"):
        load(tiny("m", hidden_size=64, intermediate_size=176), dtype="nf4")
    assert load(tiny("m", hidden_size=64, intermediate_size=176), dtype="int8")


def test_what_is_put_together_in_memory_is_refused(tiny):
    from glue.kinds import weights
    from glue.kinds.model import assembled

    member = tiny("m", hidden_size=64, intermediate_size=128)
    with pytest.raises(MethodError, match="'m' is put together in memory, and nf4 is for weights in files"):
        assembled(member, weights(member), dtype="nf4")
    assert Place(dtype="nf4").load(member).model.dtype == torch.bfloat16
