"""What a GPU makes of the same work: merges to the bit, answers within their intervals. Left out where none is."""

from __future__ import annotations

import pytest
import torch

from glue.board import plain
from glue.family import families
from glue.kinds import load
from glue.member import Table
from glue.merge.engine import prepared
from glue.merge.write import write
from glue.steps.merge import source_of, sources_of
from tests.test_device import MIXTURES, SCORED, ran
from tests.test_kinds import adapter_over
from tests.test_mixture_model import some_prompts

pytestmark = pytest.mark.gpu


def test_members_score_on_a_gpu_what_they_score_here_within_their_intervals(asked_zoo):
    here = ran(asked_zoo, SCORED)
    rows = {row.member: row for row in plain(here, here["s"]).rows}
    (asked_zoo / "zoo/scores.jsonl").unlink()
    there = ran(asked_zoo, SCORED.replace("as: s", "as: t"), device="cuda")
    for row in plain(there, there["t"]).rows:
        assert rows[row.member].mean.low <= row.mean.value <= rows[row.member].mean.high
    for one, other in zip(Table.read(here["s"]).rows, Table.read(there["t"]).rows, strict=True):
        assert sum(a == b for a, b in zip(one.results, other.results, strict=True)) >= 0.95 * len(one.results)


@pytest.mark.parametrize("method", ["linear", "slerp", {"ties": {"density": 0.5}}, {"dare_linear": {"density": 0.5}}])
def test_a_merge_on_a_gpu_has_the_digest_of_one_on_the_processor(tiny, tmp_path, method):
    choice, members = families("merging").choose(method), [tiny(name, seed=k) for k, name in enumerate("bmn")]
    base = source_of(members[0]) if choice.method.traits["space"] == "delta" else None
    digests = {write(prepared(choice, sources_of(members[1:]), base, device=device), tmp_path / device)
               for device in ("cpu", "cuda")}
    assert len(digests) == 1


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_choose_on_a_gpu_as_here(tmp_path, kind):
    model, ids = MIXTURES[kind](), some_prompts()
    with torch.no_grad():
        gate, logits = model.gate(ids), model(ids).logits
        model.to("cuda")
        assert torch.allclose(model.gate(ids.cuda()).cpu(), gate, atol=1e-4)
        assert torch.allclose(model(ids.cuda()).logits.cpu(), logits, atol=1e-3)


def test_every_dtype_of_a_model_and_an_adapter_lies_on_the_gpu(tiny, tmp_path):
    base = tiny("m", hidden_size=64, intermediate_size=128)
    for member in (base, adapter_over(base, tmp_path / "a", r=2, target_modules=["up_proj"])):
        with torch.no_grad():
            here = load(member).model(some_prompts()).logits
            for dtype, far in (("float32", 1e-3), ("bfloat16", 0.5), ("float16", 0.1)):
                model = load(member, device="cuda", dtype=dtype).model
                assert {each.device.type for each in model.parameters()} == {"cuda"}
                assert (model(some_prompts().cuda()).logits.float().cpu() - here).abs().max() < far
