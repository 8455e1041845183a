"""The step that mixes, for every level, unit and router: what can be is made, and what cannot be is told."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from glue.checkpoint import Checkpoint, Header
from glue.errors import GlueError, Mistakes, RunError
from glue.kinds import load
from glue.kinds.compressed import Compressed
from glue.kinds.mixture import register
from glue.kinds.size import size
from glue.kinds.text import continued
from glue.mix import PLACES, fitting
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.report.routing import read as read_routes
from glue.run import run
from glue.workers import Workers
from glue.writer import Writer
from glue.zoo import Zoo
from tests.conftest import WORDS, word_tokenizer

PAIRS = [(level, unit, router) for level, unit in PLACES for router in fitting(level, unit)]
SHAPE = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 1,
         "eos_token_id": 2}
ODD = {"biased": {"attention_bias": True}, "turned": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
       "long": {"vocab_size": 48}, "wide": {"intermediate_size": 64}, "half": {"dtype": torch.bfloat16}}
ITEMS, RANK = 24, 2


def model_folder(folder: Path, *, seed: int = 0, words: dict[str, int] = WORDS, dtype: torch.dtype = torch.float32,
                 **shape) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**SHAPE, **shape}))
    model.to(dtype).save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)


def changed(base: Path, folder: Path, seed: int, norms: float = 0.0) -> None:
    """A copy of a model whose matrices were all changed by RANK directions, and its norms by a number."""
    rng, source = torch.Generator().manual_seed(seed), Checkpoint(base)
    folder.mkdir()
    for file in base.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    headers = {name: Header(header.dtype, header.shape) for name, header in source.headers.items()}
    with Writer(folder, headers) as writer:
        for name, tensor in source.items():
            left, right = (torch.randn(side, RANK, generator=rng) for side in (tensor.shape[0], tensor.shape[-1]))
            writer.write(name, tensor + 0.15 * left @ right.T if tensor.dim() == 2 else tensor + norms)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A zoo of a base, three experts near it, odd ones beside them, and 24 questions of two tasks."""
    folder = tmp_path_factory.mktemp("zoo")
    model_folder(folder / "base", seed=1)
    for k, name in enumerate(("one", "two", "three")):
        changed(folder / "base", folder / name, seed=10 + k)
    for name, shape in ODD.items():
        model_folder(folder / name, seed=2, **shape)
    changed(folder / "base", folder / "stranger", seed=20, norms=0.1)
    model_folder(folder / "foreign", words={"<unk>": 0, "<s>": 1, "</s>": 2, **{f"v{k}": k for k in range(3, 40)}})
    rng = random.Random(7)
    for task, first in (("low", 3), ("high", 20)):
        (folder / task).mkdir()
        for split in ("dev", "test"):
            lines = []
            for _ in range(ITEMS // 2):
                words = [f"w{rng.randrange(first, first + 17)}" for _ in range(rng.randrange(2, 7))]
                choices = rng.sample([f"w{k}" for k in range(3, 40)], 2)
                gold = rng.randrange(2)
                lines.append(json.dumps({"question": " ".join(words), "choices": choices, "gold": gold,
                                         "answer": choices[gold]}) + "\n")
            (folder / task / f"{split}.jsonl").write_text("".join(lines))
    (folder / "benchmarks/suites").mkdir(parents=True)
    (folder / "benchmarks/suites/words.yaml").write_text("tasks:\n" + "".join(
        f"  {task}: {{data: {task}, output: choice, metric: acc, chance: 0.5}}\n" for task in ("low", "high")))
    names = ("base", "one", "two", "three", *ODD, "stranger", "foreign")
    listed = [f"  {name}: {{path: {name}}}\n" for name in names]
    listed += [f"  {name}: {{path: {name}, kind: dataset}}\n" for name in ("low", "high")]
    (folder / "zoo.yaml").write_text("members:\n" + "".join(listed) + "include: zoo/members.yaml\n")
    return folder


def line(name: str, members: str = "one, two, three", **words) -> str:
    told = "".join(f", {key}: {json.dumps(value)}" for key, value in ({"router": "linear"} | words).items())
    return f"  - {{as: {name}, step: mix, members: [{members}], suite: words:dev{told}}}\n"


@pytest.fixture(scope="module")
def ran(place) -> Callable[[str, str], Plan]:
    """Run lines of a recipe in this process."""
    def go(name: str, lines: str) -> Plan:
        (place / f"{name}.yaml").write_text(f"steps:\n{lines}")
        with Workers(0) as workers:
            return run(read_recipe(place / f"{name}.yaml"), Zoo(place / "zoo.yaml"), workers)
    return go


# everything that may be made

def named(level: str, unit: str, router: str) -> str:
    return f"{level}-{unit}-{router}"


@pytest.fixture(scope="module")
def every(ran) -> Plan:
    """All allowed pairs in one recipe, with two experts at a time to save time, and a report on one of each place."""
    lines = "".join(line(named(level, unit, router), "one, two", level=level,
                         router={"mlp": {"width": 4}} if router == "mlp" else router,
                         **({"routing": unit} if level == "ffn" else {})) for level, unit, router in PAIRS)
    reported = ", ".join(named(level, unit, "linear") for level, unit in PLACES)
    return ran("every", f"{lines}  - {{as: routes, step: routing, members: [{reported}], experts: [two, one], "
                        f"suite: words:test}}\n")


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: named(*pair))
def test_a_mixture_of_every_level_and_router_is_made_from_a_line_of_a_recipe_and_answers(every, pair):
    level, unit, router = pair
    member = every[named(*pair)]
    assert member.kind == "mixture" and f"behind a {router} router" in member.note and len(member.seen) == 2
    running = load(member)
    first, again = (continued(running, "w5 w9 w21", 5) for _ in range(2))
    assert first == again
    decides = [running.route is not None, running.choose is not None]
    assert decides == [level != "text" and unit == "sentence", level == "text"]
    if level == "text":
        assert set(running.choose(["w3 w4", "w30 w31 w32"])) <= {0, 1}
    else:
        ids = torch.tensor([[1, 5, 9, 21]])
        with torch.no_grad():
            logits = running.model(ids).logits
        assert logits.shape == (1, 4, 40) and float(logits.std()) > 0.1
    assert size(member).active < size(member).whole or router == "uniform"
    assert size(member).whole > size(every.zoo["one"]).whole


def test_no_two_routers_of_a_place_leave_the_same_bytes(every):
    for place in PLACES:
        digests = [every[named(*pair)].digest for pair in PAIRS if pair[:2] == place]
        assert len(set(digests)) == len(digests)


def test_what_was_mixed_is_not_mixed_again(every, place):
    again = make_plan(read_recipe(place / "every.yaml"), Zoo(place / "zoo.yaml"))
    assert {task.name: task.state for task in again} == {task.name: "done" for task in every}


def test_another_seed_draws_another_random_router_and_the_same_linear_one(every, place):
    seeded = "".join(line(f"{level}-{router}", "one, two", level=level, router=router, seed=5)
                     for level in ("model", "block") for router in ("random", "linear"))
    (place / "seeded.yaml").write_text(f"steps:\n{seeded}")
    plan = make_plan(read_recipe(place / "seeded.yaml"), Zoo(place / "zoo.yaml"))
    assert [task.state for task in plan] == ["ready"] * 4


def test_routes_are_told_of_mixtures_of_every_level(every):
    reports = read_routes(every["routes"])
    assert [report.mixture.split("/")[-1] for report in reports] == [named(*at, "linear") for at in PLACES]
    for report in reports:
        assert [name.split("/")[-1] for name in report.experts] == ["one", "two"]
        assert sum(report.load) == pytest.approx(1) and report.items == (12, 12)
        oracle, regret = report.hindsight["best for each item"]
        assert regret.value == pytest.approx(oracle.value - report.score.value)
    assert [report.places for report in reports] == [2 if level in ("ffn", "block") else 1 for level, _ in PLACES]


# what cannot be

REFUSED = {
    "a hidden layer in a stock architecture": (
        {"level": "ffn", "router": "mlp"}, "router 'mlp' has a hidden layer"),
    "experts that read first, one model": ({"router": "loss"}, "which only level text does"),
    "an average of different tokens": ({"level": "text", "router": "uniform"}, "one has to answer alone"),
    "two experts a text": ({"level": "text", "router": {"linear": {"top_k": 2}}}, "one has to answer alone"),
    "tokens at block level": ({"level": "block", "routing": "token"}, "only level ffn can route token by token"),
    "a base of nothing at text level": ({"level": "text", "base": "base"}, "at level text they share nothing"),
    "a base of nothing at model level": ({"base": "base"}, "at level model they share nothing"),
    "a reader where none reads": ({"level": "block", "reader_layer": 1}, "'reader_layer' is for level model without"),
    "a reader above dense layers": ({"dense_layers": 1, "reader_layer": 1}, "'reader_layer' is for level model"),
    "compression of layers": ({"level": "block", "compress": {"svd": {"rank": 2}}}, "at level block there are none"),
    "half a direction": ({"compress": {"svd": {"rank": 2.5}}}, "a rank is a whole number of at least 1, not 2.5"),
    "a misspelled rank": ({"compress": {"svd": {"rnak": 2}}}, "did you mean 'rank'"),
    "a rank and an energy": ({"compress": {"svd": {"rank": 2, "energy": 0.5}}}, "at most 1 item"),
    "more energy than there is": ({"compress": {"svd": {"energy": 1.5}}}, "a share above 0, up to 1, not 1.5"),
    "one expert": ({"members": "one"}, "at least two experts; this is 1"),
    "dense layers at text level": ({"level": "text", "dense_layers": 1}, "at level text they share nothing"),
    "more dense layers than there are": ({"level": "block", "dense_layers": 3}, "and the experts have 2"),
    "attention biases in a stock architecture": ({"level": "ffn", "members": "one, biased"}, "has attention biases"),
    "attention biases in a layer": ({"level": "block", "members": "one, biased"}, "has attention_bias: False"),
    "another vocabulary": ({"members": "one, foreign"}, "different vocabularies"),
    "another vocabulary at ffn level": ({"level": "ffn", "members": "one, foreign"}, "different vocabularies"),
    "another vocabulary at block level": ({"level": "block", "members": "one, foreign"}, "different vocabularies"),
    "a longer vocabulary": ({"members": "one, long"}, r"\(40 and 48 rows\)"),
    "another rope at ffn level": ({"level": "ffn", "members": "one, turned"}, "has rope_parameters: "),
    "another rope at block level": ({"level": "block", "members": "one, turned"}, "has rope_parameters: "),
    "another rope on dense layers": ({"dense_layers": 1, "members": "one, turned"}, "has rope_parameters: "),
    "a base of another rope": ({"level": "ffn", "base": "turned"}, "has rope_parameters: "),
    "another shape at ffn level": ({"level": "ffn", "members": "one, wide"}, "size: 48, 'wide' has 64"),
    "compression of another shape": ({"members": "one, wide", "compress": {"svd": {"rank": 2}}},
                                     r"as \(\(32, 48\), 'float32'\), 'wide' as \(\(32, 64\), 'float32'\)"),
    "compression of another type": ({"members": "one, half", "compress": {"svd": {"rank": 2}}}, "'bfloat16'"),
    "compression of nothing": ({"dense_layers": 2, "compress": {"svd": {"rank": 2}}}, "no changes of experts"),
}


def files(place: Path) -> dict[Path, int]:
    """When each was changed last, but for the note of which digests are known, which any plan may write."""
    return {path: path.stat().st_mtime_ns for path in place.rglob("*")
            if path.is_file() and "digests.json" not in path.name}


@pytest.mark.parametrize("words, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_mixed_is_one_error_of_the_plan_and_nothing_is_written(place, words, said):
    (place / "refused.yaml").write_text("steps:\n" + line("m", words.get("members", "one, two, three"), **{
        key: value for key, value in words.items() if key != "members"}))
    before = files(place)
    with pytest.raises(Mistakes) as told:
        make_plan(read_recipe(place / "refused.yaml"), Zoo(place / "zoo.yaml"))
    error, = told.value.errors
    assert isinstance(error, GlueError) and error.place is not None and error.place.line == 2 and error.fix
    with pytest.raises(Mistakes, match=said):
        raise told.value
    assert files(place) == before


@pytest.mark.parametrize("level", ["model", "text"])
def test_what_shares_nothing_takes_experts_of_other_shapes_and_ropes(ran, level):
    plan = ran(f"odd-{level}", line("m", "one, wide, turned, biased", level=level, router="random"))
    assert len(continued(load(plan["m"]), "w5 w6", 4)) > 0


# experts that are stored as changes of one base

@pytest.fixture(scope="module")
def pair(ran) -> Callable[..., tuple[Plan, list]]:
    """A mixture as it is, and others like it with these values of compress."""
    def go(name: str, *values: dict, **words) -> tuple[Plan, list]:
        plain = {key: value for key, value in words.items() if key != "base" or words.get("dense_layers")}
        plan = ran(name, line("plain", **plain) + "".join(
            line(f"m{k}", compress={"svd": value}, **words) for k, value in enumerate(values)))
        return plan, [plan["plain"], *(plan[f"m{k}"] for k in range(len(values)))]
    return go


def logits_of(member) -> torch.Tensor:
    ids = torch.randint(3, 40, (6, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return load(member).model(ids).logits


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("dense", [0, 1])
def test_all_directions_of_the_changes_make_the_same_mixture_within_rounding(pair, dense):
    plan, (plain, full, part) = pair(f"full-{dense}", {"rank": RANK}, {"rank": 1}, base="base", dense_layers=dense)
    assert far(logits_of(full), logits_of(plain)) <= 1e-5 < 1e-2 < far(logits_of(part), logits_of(plain))
    assert Checkpoint(full.path).nbytes < 0.8 * Checkpoint(plain.path).nbytes
    running, dense_one = load(full), load(plain)
    texts = [[1, 5, 9], [1, 30, 31, 33], [1, 22]]
    assert running.route(texts) == dense_one.route(texts)
    assert [continued(running, text, 6) for text in ("w3 w4", "w30")] == [
        continued(dense_one, text, 6) for text in ("w3 w4", "w30")]
    assert size(full) == size(plain)


def test_what_compression_lost_is_told_with_the_member_and_recorded(pair):
    plan, (_, member, _) = pair("told", {"rank": 1}, {"energy": 0.999}, base="base")
    told = json.loads((member.folder / "compress.json").read_text())
    assert told["svd"] == {"rank": 1} and 0.05 < told["of_change"] < 0.7 and told["of_weights"] < told["of_change"]
    stored = Checkpoint(member.path)
    router = sum(header.nbytes for name, header in stored.headers.items() if name.startswith("router."))
    assert told["after"] == stored.nbytes - router
    assert f"compressed to {told['ratio']:.0%}" in member.note and f"loses {told['of_change']:.2%} of" in member.note
    read, lost, norm = Compressed(Checkpoint(member.path), 3), 0.0, 0.0
    for k, name in enumerate(("one", "two", "three")):
        for part, tensor in Checkpoint(plan.zoo[name].path).items():
            lost += float((read[f"expert_{k}.{part}"].double() - tensor.double()).square().sum())
            norm += float(tensor.double().square().sum())
    assert told["of_weights"] == pytest.approx((lost / norm) ** 0.5, rel=1e-6)
    assert member.origin and member.origin.params["compress"] == {"svd": {"rank": 1.0}}
    assert member.origin.inputs["base"] == (plan.zoo.identified(plan.zoo["base"]).digest,)


def test_more_energy_loses_less_and_the_average_is_the_base_unless_one_is_named(pair):
    plan, (plain, *members) = pair("energy", {"energy": 0.3}, {"energy": 0.9}, {"energy": 1.0})
    losses = [json.loads((member.folder / "compress.json").read_text())["of_change"] for member in members]
    assert losses[0] > losses[1] > losses[2] and losses[2] <= 1e-5 and losses[0] <= 0.7 ** 0.5 + 1e-6
    assert far(logits_of(members[2]), logits_of(plain)) <= 1e-5
    average = sum(Checkpoint(plan.zoo[name].path)["model.layers.0.mlp.up_proj.weight"]
                  for name in ("one", "two", "three")) / 3
    stored = Checkpoint(members[0].path)["base.model.layers.0.mlp.up_proj.weight"]
    assert far(stored, average) <= 1e-6


def test_an_adapter_over_the_base_is_stored_as_its_two_factors(place, ran):
    """What a rank-2 adapter changes has rank 2, so nothing is lost."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(place / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
                   ).save_pretrained(place / "lora")
    listed = (place / "zoo.yaml").read_text()
    if "lora" not in listed:
        (place / "zoo.yaml").write_text(listed.replace("members:\n", "members:\n  lora: {path: lora, kind: adapter, "
                                                                     "base: base}\n"))
    plan = ran("lora", line("m", "one, lora", base="base", compress={"svd": {"rank": 2}}))
    stored = Checkpoint(plan["m"].path).headers
    assert sorted(name.removeprefix("expert_1.model.layers.0.") for name in stored if "expert_1.model.layers.0." in name
                  ) == [f"{part}.weight.svd_{side}" for part in ("mlp.up_proj", "self_attn.q_proj")
                        for side in ("left", "right")]
    assert json.loads((plan["m"].folder / "compress.json").read_text())["of_change"] <= 1e-5


def test_a_compression_that_would_save_nothing_is_refused_and_leaves_no_member(place, ran):
    with pytest.raises(RunError, match=r"would take [\d,]+ bytes, and without a base they take [\d,]+"):
        ran("vain", line("m", "one, stranger", compress={"svd": {"rank": 30}}, base="base"))
    assert not list(place.glob("zoo/vain*"))


def test_transformers_loads_what_is_compressed_once_glue_is_registered(pair):
    _, (_, member) = pair("auto", {"rank": RANK}, base="base")
    register()
    loaded = AutoModelForCausalLM.from_pretrained(member.path, dtype=torch.float32)
    assert type(loaded).__name__ == "GlueModelMixtureForCausalLM"
    assert "auto_map" not in json.loads((member.folder / "config.json").read_text())
    assert not list(member.folder.glob("*.py"))
