"""Adapters merged into one, layer by layer: what is written, in which order, how much memory, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glue.errors import CheckpointError, GlueError, MethodError
from glue.kinds import load, weights
from glue.kinds.lora import Adapter
from glue.member import Member
from glue.merge import merging
from glue.merge.adapters import Update, away, check, combine, products
from glue.merge.lora_folder import ENTRIES, NOTE
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.steps.merge import sources_of, told_base
from glue.workers import Workers
from glue.zoo import Zoo

PREFIX = "base_model.model."
LAYERS = {f"model.layers.{k}.{name}": shape for k in range(2)
          for name, shape in {"self_attn.q_proj": (32, 32), "mlp.up_proj": (48, 32)}.items()}


def lora(folder: Path, rank: int = 4, *, alpha: float = 8, seed: int = 0, dtype: torch.dtype = torch.float32,
         layers: dict[str, tuple[int, int]] = LAYERS, more: dict[str, Tensor] | None = None, **config) -> Path:
    """A folder as peft writes it, with random factors."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: tensor for module, (m, n) in layers.items() for name, tensor in (
        (f"{PREFIX}{module}.lora_A.weight", torch.randn(rank, n, generator=rng).to(dtype)),
        (f"{PREFIX}{module}.lora_B.weight", 0.1 * torch.randn(m, rank, generator=rng).to(dtype)))}
    folder.mkdir(parents=True)
    save_file({**tensors, **(more or {})}, folder / "adapter_model.safetensors")
    targets = sorted({name.rsplit(".", 1)[-1] for name in layers})
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": targets,
        "base_model_name_or_path": "base", **config}))
    return folder


def update(folder: Path) -> Update:
    return Update(folder.name, Adapter(folder))


@pytest.fixture
def three(tmp_path) -> list[Update]:
    """Clients whose ranks and scales differ."""
    return [update(lora(tmp_path / f"c{k}", rank, alpha=alpha, seed=k))
            for k, (rank, alpha) in enumerate([(4, 8), (2, 8), (6, 3)])]


def dense(one: Update | Path) -> dict[str, Tensor]:
    """Layer -> its change, fp64, computed here from files."""
    folder = one if isinstance(one, Path) else one.adapter.folder
    tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads(
        (folder / "adapter_config.json").read_text())
    found = {}
    for name in tensors:
        if name.endswith("lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a, b = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
            found[module] = alpha / len(a) * b @ a
    return found


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert set(found) == set(wanted)
    return float(sum((found[k] - wanted[k]).square().sum() for k in wanted)
                 / sum(wanted[k].square().sum() for k in wanted)) ** 0.5


def summed(updates: list[Update], shares: tuple[float, ...]) -> dict[str, Tensor]:
    changes = [dense(one) for one in updates]
    return {module: sum(share * change[module] for share, change in zip(shares, changes, strict=True))
            for module in changes[0]}


def made(method: str, updates: list[Update], out: Path, dtype: str = "float32", **params) -> Path:
    combine(merging[method].bind(params), updates, out, base="base", dtype=dtype)
    return out


# what is written

def test_the_sum_of_adapters_is_an_adapter_with_the_sum_of_their_ranks(three, tmp_path):
    out = made("flora", three, tmp_path / "out", weight={"c0": 1, "c1": 2, "c2": 5})
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (12, 12, {}, {})
    assert config["target_modules"] == ["q_proj", "up_proj"] and config["base_model_name_or_path"] == "base"
    assert off(dense(out), summed(three, (1 / 8, 2 / 8, 5 / 8))) <= 5e-8
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", NOTE]
    assert away(Adapter(out), three, [1, 2, 5]) <= 5e-8


def test_what_one_adapter_weighs_alone_is_that_adapter(three, tmp_path):
    for k, one in enumerate(three):
        found, was = (load_file(folder / "adapter_model.safetensors")
                      for folder in (made("flora", [one], tmp_path / f"out{k}"), one.adapter.folder))
        assert set(found) == set(was) and all(torch.equal(found[name], was[name]) for name in was)
        assert Adapter(tmp_path / f"out{k}").scale("any") == one.adapter.scale("any")


def test_methods_that_average_factors_are_far_from_the_mean_of_changes(three, tmp_path):
    exact = summed(three, (1 / 3, 1 / 3, 1 / 3))
    padded = made("zero_pad", three, tmp_path / "padded")
    assert off(dense(padded), exact) > 0.1
    assert away(Adapter(padded), three, [1, 1, 1]) == pytest.approx(off(dense(padded), exact), rel=1e-6)
    assert json.loads((padded / "adapter_config.json").read_text())["r"] == 6


def test_an_adapter_that_is_cut_says_what_that_costs_layer_by_layer(three, tmp_path):
    out = made("flora", three, tmp_path / "out", energy=0.9)
    told, exact, found = json.loads((out / NOTE).read_text()), summed(three, (1 / 3, 1 / 3, 1 / 3)), dense(out)
    config = json.loads((out / "adapter_config.json").read_text())
    for module, one in told["modules"].items():
        rank, values = one["rank"], torch.linalg.svdvals(exact[module])
        assert float(values[:rank].norm() / values.norm()) ** 2 >= 0.9 > float(
            values[:rank - 1].norm() / values.norm()) ** 2
        assert one["error"] == pytest.approx(float((found[module] - exact[module]).norm()), rel=1e-4)
        assert one["norm"] == pytest.approx(float(exact[module].norm()), rel=1e-6)
        assert config["rank_pattern"].get(module, config["r"]) == rank
    assert len({one["rank"] for one in told["modules"].values()}) > 1, "layers should differ, or this tests little"
    assert told["error"] == pytest.approx(off(found, exact) * told["norm"], rel=1e-4)


def test_the_type_of_factors_can_be_chosen(three, tmp_path):
    out = made("flora", three, tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.bfloat16}
    assert off(dense(out), summed(three, (1 / 3, 1 / 3, 1 / 3))) <= 4e-3


def test_adapters_in_half_precision_are_summed_as_exactly_as_others(tmp_path):
    halves = [update(lora(tmp_path / f"c{k}", seed=k, dtype=torch.bfloat16)) for k in range(3)]
    assert off(dense(made("flora", halves, tmp_path / "out")), summed(halves, (1 / 3, 1 / 3, 1 / 3))) <= 5e-8


def test_a_rank_of_the_hidden_size_is_no_exception(tmp_path):
    updates = [update(lora(tmp_path / f"c{k}", rank, seed=k)) for k, rank in enumerate([32, 4, 48])]
    assert off(dense(made("flora", updates, tmp_path / "out")), summed(updates, (1 / 3, 1 / 3, 1 / 3))) <= 5e-8


def test_a_client_that_leaves_a_layer_alone_adds_nothing_to_it(tmp_path):
    one = dict(list(LAYERS.items())[:1])
    both = [update(lora(tmp_path / "all")), update(lora(tmp_path / "part", seed=1, layers=one))]
    out, first = made("flora", both, tmp_path / "out"), next(iter(LAYERS))
    exact = {module: 0.5 * change + (0.5 * dense(both[1])[module] if module == first else 0)
             for module, change in dense(both[0]).items()}
    assert off(dense(out), exact) <= 5e-8
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {first: 8}, {first: 8})
    assert config["target_modules"] == sorted(LAYERS)


def test_biases_and_saved_modules_are_averaged_by_weight(tmp_path):
    head, bias = f"{PREFIX}lm_head.weight", f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias"
    updates = [update(lora(tmp_path / f"c{k}", seed=k, bias="lora_only", modules_to_save=["lm_head"],
                           more={head: torch.full((5, 32), float(k)), bias: torch.full((32,), 10.0 * k)}))
               for k in range(3)]
    out = made("flora", updates, tmp_path / "out", weight=[1, 1, 2])
    tensors = load_file(out / "adapter_model.safetensors")
    assert torch.equal(tensors[head], torch.full((5, 32), 1.25)) and torch.equal(tensors[bias], torch.full((32,), 12.5))
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["bias"], config["modules_to_save"]) == ("lora_only", ["lm_head"])
    assert set(Adapter(out).replaced) == {"lm_head.weight", "model.layers.0.self_attn.q_proj.bias"}


# order, restarts, memory

@pytest.mark.parametrize("method, params", [("flora", {}), ("flora", {"rank": 3}), ("zero_pad", {}), ("flexlora", {})])
def test_no_order_of_arrival_changes_a_bit(three, tmp_path, method, params):
    share = {"c0": 1, "c1": 2, "c2": 5}
    files = set()
    for k, order in enumerate(permutations(three)):
        weight = {one.name: share[one.name] for one in order}
        out = made(method, list(order), tmp_path / str(k), weight=weight, **params)
        files.add((out / "adapter_model.safetensors").read_bytes())
        config = (out / "adapter_config.json").read_bytes()
        assert config == (tmp_path / "0" / "adapter_config.json").read_bytes()
    assert len(files) == 1


def test_clients_that_only_a_digest_tells_apart_have_an_order_too(tmp_path):
    """A fingerprint samples 64 bytes here and there: one changed number in between is not seen."""
    wide = {"layer.proj": (4096, 512)}
    for k in range(2):
        lora(tmp_path / f"c{k}", layers=wide)
    file = tmp_path / "c1/adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}layer.proj.lora_B.weight"][100, 1] += 1
    save_file(tensors, file)
    pair = [update(tmp_path / f"c{k}") for k in range(2)]
    assert pair[0].adapter.fingerprint == pair[1].adapter.fingerprint
    one, other = (made("flora", order, tmp_path / f"out{k}") for k, order in enumerate((pair, pair[::-1])))
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()


def test_a_merge_that_was_interrupted_goes_on_and_leaves_the_same_bytes(three, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def dies(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    whole, torn = made("flora", three, tmp_path / "whole"), tmp_path / "torn"
    choice = merging["flora"].bind()
    with pytest.raises(Killed):
        combine(choice, three, torn, base="base", report=dies)
    assert not (torn / "adapter_model.safetensors").exists()
    told: list[int] = []
    combine(choice, three[::-1], torn, base="base", report=lambda done, total: told.append(total))
    assert len(told) == 8 - 3, "what was finished is written once"
    for name in ("adapter_model.safetensors", "adapter_config.json", NOTE):
        assert (torn / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("method", ["flora", "fedit", "zero_pad"])
def test_memory_does_not_grow_with_the_number_of_clients(tmp_path, method):
    from tests.test_merge_memory import Live

    wide = {"layer.proj": (1024, 2048)}
    updates = [update(lora(tmp_path / f"c{k}", 16, seed=k, layers=wide)) for k in range(32)]
    client = 16 * (1024 + 2048) * 4

    def peak(n: int, out: Path) -> int:
        with Live() as live:
            made(method, updates[:n], out)
        return live.peak

    few, many = peak(4, tmp_path / "few"), peak(32, tmp_path / "many")
    assert few <= 4 * client and many <= few + 2 * ENTRIES * 4, (few / client, many / client)


ANONYMOUS = """
import sys
from pathlib import Path
from glue.kinds.lora import Adapter
from glue.merge import merging
from glue.merge.adapters import Update, combine

def held() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

method, out, *folders = sys.argv[1:]
choice = merging[method].bind({})
combine(choice, [Update("c", Adapter(Path(folder))) for folder in folders[:2]], Path(out) / "few", base="base")
updates, before = [Update(folder, Adapter(Path(folder))) for folder in folders], held()
combine(choice, updates, Path(out) / "many", base="base")
print(held() - before)
"""


def test_what_is_made_in_passing_leaves_no_holes_in_memory(tmp_path):
    """Copies between things that stay cannot be used again by the allocator; no tensor shows that, the process does."""
    wide = {f"layers.{k}.proj": (1024, 2048) for k in range(2)}
    folders = [str(lora(tmp_path / f"c{k}", 16, seed=k, layers=wide)) for k in range(48)]
    done = subprocess.run([sys.executable, "-c", ANONYMOUS, "flora", str(tmp_path), *folders], capture_output=True,
                          text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    all_clients = 48 * 2 * 16 * (1024 + 2048) * 4
    assert int(done.stdout) <= all_clients / 3, int(done.stdout) / all_clients


# lengths and angles of whole adapters

def test_products_of_adapters_are_those_of_their_dense_changes(three):
    found = products(three)
    flat = torch.stack([torch.cat([change[module].flatten() for module in sorted(change)])
                        for change in map(dense, three)])
    assert torch.allclose(found, flat @ flat.T, rtol=1e-9)


# what is refused

def refused(updates: list[Update], method: str = "flora", **params) -> str:
    with pytest.raises(GlueError) as caught:
        check(merging[method].bind(params), updates)
    return str(caught.value)


def test_what_cannot_be_merged_is_refused_from_headers_alone(three, tmp_path):
    assert "'linear' does not work on factors\n  use fedit, ffa, flexlora, flora, zero_pad" in refused(three, "linear")
    assert "have ranks 2, 4, 6" in refused(three, "fedit")
    assert "sum to 0" in refused(three, "flora", weight=[1, -1, 0])
    assert "names 'c9'" in refused(three, "flora", weight={"c9": 1})
    other = update(lora(tmp_path / "other", layers={name: (m, 40) for name, (m, _) in LAYERS.items()}))
    assert "only adapters of one base" in refused([*three, other])
    dora = update(lora(tmp_path / "dora", use_dora=True, more={
        f"{PREFIX}{name}.lora_magnitude_vector": torch.ones(m) for name, (m, _) in LAYERS.items()}))
    assert "'dora' is a DoRA adapter" in refused([*three, dora]) and "step: extract" in refused([*three, dora])
    headed = update(lora(tmp_path / "headed", modules_to_save=["lm_head"],
                         more={f"{PREFIX}lm_head.weight": torch.ones(5, 32)}))
    assert "'headed' brings its own 'lm_head.weight', and 'c0' does not" in refused([*three, headed])


@pytest.mark.parametrize("side", "AB")
def test_a_client_with_a_number_that_is_none_is_named(three, tmp_path, side):
    file = three[1].adapter.folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}model.layers.1.mlp.up_proj.lora_{side}.weight"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"'model.layers.1.mlp.up_proj' of 'c1' has numbers in its {side} that"):
        made("flora", [three[0], update(three[1].adapter.folder)], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


# in a recipe

@pytest.fixture
def zoo(tiny, tmp_path) -> Callable[[str], Plan]:
    """zoo(steps) runs a recipe over a tiny base, another one, a tuned child of the first, and their adapters."""
    tiny("base"), tiny("other", seed=1), tiny("child", seed=2)
    lora(tmp_path / "one"), lora(tmp_path / "two", 2, seed=1), lora(tmp_path / "far", seed=2)
    (tmp_path / "zoo.yaml").write_text("""
members:
  base: {path: base}
  other: {path: other}
  child: {path: child, base: base}
  one: {path: one, kind: adapter, base: base}
  two: {path: two, kind: adapter, base: base}
  far: {path: far, kind: adapter, base: other}
include: zoo/members.yaml
""")

    def plan(text: str, *, ready: bool = False) -> Plan:
        (tmp_path / "r.yaml").write_text(f"steps:\n{text}")
        recipe, found = read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml")
        return make_plan(recipe, found) if ready else run(recipe, found, Workers())

    return plan


def test_merging_adapters_by_their_factors_leaves_an_adapter_that_runs_and_merges_on(zoo):
    plan = zoo("  - {as: sum, step: merge, members: [one, two], method: {flora: {weight: {one: 3, two: 1}}}}\n"
               "  - {as: again, step: merge, members: [sum, one], method: {flora: {rank: 4}}}\n"
               "  - {as: mixed, step: merge, members: [sum, child], method: linear}\n"
               "  - {as: tied, step: merge, members: [sum, one], base: base, method: {ties: {density: 0.5}}}\n")
    made = plan["sum"]
    assert (made.kind, made.base.name, made.note) == ("adapter", "base", "flora of one, two, rank 6")
    assert [task.makes for task in plan] == ["adapter", "adapter", "model", "model"]
    assert plan["again"].kind == "adapter" and "rank 4, off by" in plan["again"].note
    assert plan["mixed"].kind == plan["tied"].kind == "model"
    exact = summed([update(plan[name].folder) for name in ("one", "two")], (0.75, 0.25))
    assert off(dense(made.folder), exact) <= 5e-8
    assert "library_name: peft" in (made.folder / "README.md").read_text()


def test_a_stacked_adapter_answers_as_the_model_that_it_is_merged_into(zoo):
    made = zoo("  - {as: sum, step: merge, members: [one, two], method: flora}\n")["sum"]
    from peft import PeftModel

    ids = torch.tensor([[1, 5, 9, 7, 30, 11]])
    beside = PeftModel.from_pretrained(load(made.base).model, made.folder)
    merged = load(made).model
    with torch.no_grad():
        one, other = beside(ids).logits, merged(ids).logits
        merged.load_state_dict(dict(weights(made)), strict=False)
        ours, bare = merged(ids).logits, load(made.base).model(ids).logits
    assert float((one - other).abs().max()) <= 1e-5 and float((one - ours).abs().max()) <= 1e-5
    assert float((one - bare).abs().max()) > 0.1, "the adapter changes nothing"


def test_merges_of_adapters_that_cannot_be_are_refused_while_planning(zoo):
    for members, more, said in (
            ("[one, far]", "", r"'one' sits on base@.* and 'far' on other@"),
            ("[one, child]", "", "'child' is a model"),
            ("[one, two]", "base: other, ", "the base is 'other', and the adapters sit on 'base'")):
        with pytest.raises(GlueError, match=said):
            zoo(f"  - {{as: a, step: merge, members: {members}, {more}method: flora}}\n", ready=True)
    with pytest.raises(GlueError, match="have ranks 2, 4"):
        zoo("  - {as: a, step: merge, members: [one, two], method: fedit}\n", ready=True)
    plan = zoo("  - {as: a, step: merge, members: [one, two], base: base, method: flora}\n", ready=True)
    assert [task.state for task in plan] == ["ready"]


def test_an_adapter_names_its_base_as_others_find_it():
    def base(path: str) -> tuple[str, str | None]:
        return told_base(Member("base", "model", path))

    assert base("hub:some/model@v1") == ("some/model", "v1") and base("hub:some/model") == ("some/model", None)
    assert base("/models/base") == ("/models/base", None)


def test_a_method_on_factors_is_refused_where_models_are_merged(zoo, tmp_path):
    from glue.merge.engine import prepared
    from glue.merge.mergekit.words import Dialect
    from glue.search import searching
    from glue.steps.search import searchable

    model = Member("m", "model", str(tmp_path / "base"))
    with pytest.raises(MethodError, match="here whole models are merged"):
        prepared(merging["flora"].bind(), sources_of([model, model]))
    with pytest.raises(MethodError, match="a config merges models"):
        Dialect.of("flora")
    with pytest.raises(MethodError, match="a search tries models"):
        searchable(merging["flora"].bind(), searching["greedy"].bind())


def test_a_model_is_extracted_as_an_adapter_that_says_what_it_keeps(zoo, tmp_path):
    plan = zoo("  - {as: model, step: merge, members: [one, two], base: base, method: {task_arithmetic: {}}}\n"
               "  - {as: lora, step: extract, model: model, base: base, energy: 1.0}\n"
               "  - {as: small, step: extract, model: model, base: base, rank: 2, targets: [q_proj]}\n"
               "  - {as: child2, step: extract, model: child, base: base, error: 0.5, dtype: bfloat16}\n")
    made, exact = plan["lora"], summed([update(tmp_path / name) for name in ("one", "two")], (1.0, 1.0))
    assert (made.kind, made.base.name) == ("adapter", "base")
    assert off(dense(made.folder), exact) <= 1e-6, "rank 6 of a change of rank 6"
    assert "rank 6, keeps 100.00% of its squared norm" in made.note and "left out" not in made.note
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (6, ["q_proj", "up_proj"])
    q = [name for name in LAYERS if "q_proj" in name]
    small, told = dense(plan["small"].folder), json.loads((plan["small"].folder / NOTE).read_text())
    assert set(small) == set(q)
    for name in q:
        u, values, v = torch.linalg.svd(exact[name])
        assert off({name: small[name]}, {name: (u[:, :2] * values[:2]) @ v[:2]}) <= 1e-5
    lost = sum(float((small[name] - exact[name]).square().sum()) for name in q)
    left = {f"{name}.weight": float(exact[name].norm()) for name in LAYERS if name not in q}
    assert set(told["left_out"]) == set(left)
    assert told["left_out"] == pytest.approx(left, rel=1e-5)
    kept = 1 - (lost + sum(away**2 for away in left.values())) / sum(float(exact[n].square().sum()) for n in exact)
    assert f"keeps {kept:.2%} of its squared norm; left out: 2 tensors" in plan["small"].note
    child = plan["child2"]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(json.loads(
        (child.folder / NOTE).read_text())["left_out"]) and "left out: " in child.note
    stored = load_file(child.folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    delta = {name: weights(plan["child"])[f"{name}.weight"].double() - weights(plan["base"])[f"{name}.weight"].double()
             for name in dense(child.folder)}
    assert 0.3 < off(dense(child.folder), delta) <= 0.501


@pytest.mark.parametrize("words, said", [
    ("rank: 2, targets: [q_prj]", "did you mean 'q_proj'"), ("", "how much of the change is kept"),
    ("rank: 2, base: wide", "has shapes"), ("rank: 2, targets: [embed_tokens]", "no linear layer"),
    ("rank: 2, base: child", "changes nothing"),
])
def test_what_cannot_be_extracted_is_refused(zoo, tiny, tmp_path, words, said):
    tiny("wide", hidden_size=64)
    file = tmp_path / "zoo.yaml"
    file.write_text(file.read_text().replace("members:\n", "members:\n  wide: {path: wide}\n"))
    base = "" if "base:" in words else "base: base, "
    with pytest.raises(GlueError, match=said):
        zoo(f"  - {{as: a, step: extract, model: child, {base}{words or 'targets: [q_proj]'}}}\n")
