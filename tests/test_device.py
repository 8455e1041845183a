"""Devices and numbers: one word means the same in every command, and what is spread over devices answers the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from glue import cli
from glue.board import of_suite
from glue.checkpoint import Checkpoint, Header
from glue.errors import GlueError, MethodError
from glue.evaluate.lm_eval import evaluate
from glue.evaluate.suite import Suite, Task, write_tasks
from glue.hub import locate
from glue.kinds import Place, device, load
from glue.kinds.batches import NOTES, Room
from glue.kinds.device import WORKER, device_of, footprint, loading, settled
from glue.kinds.mixture import register
from glue.kinds.text import continued
from glue.member import Member, Table
from glue.plan import Plan, make_plan
from glue.recipe import read_recipe
from glue.reproduce import reproduce
from glue.run import run
from glue.steps import Measured, steps, wide
from glue.workers import Workers
from glue.zoo import Zoo
from tests.test_block_mixture import a_mixture as of_layers
from tests.test_evaluate_batches import Small
from tests.test_kinds import adapter_over
from tests.test_mixture_model import a_mixture as of_models
from tests.test_mixture_model import some_prompts

GB = 10 ** 9


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def gpus(monkeypatch) -> Callable[..., None]:
    """gpus(8 * GB, 2 * GB) lets this machine have GPUs with so much free memory, which nothing can be put on."""
    def have(*free: int, cpu: int = 64 * GB) -> None:
        found = torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
        monkeypatch.setattr(device, "free_on", lambda where: free[torch.device(where).index or 0])
        monkeypatch.setattr(device, "memory", lambda: {**dict(enumerate(free)), "cpu": cpu})

    return have


@pytest.fixture
def little_room(monkeypatch) -> Callable[[float], None]:
    """little_room(0.6) lets only that share of any weights into memory; the others stay in their files."""
    def have(share: float) -> None:
        monkeypatch.setattr(device, "_placing", lambda word, nbytes, stays: {
            "device_map": "auto", "max_memory": {"cpu": int(share * nbytes), "disk": 10 ** 15}})

    return have


def ran(place: Path, lines: str, **words) -> Plan:
    (place / "r.yaml").write_text("steps:\n" + lines)
    return run(read_recipe(place / "r.yaml", wide=words), Zoo(place / "zoo.yaml"), Workers(0))


def refused(words: list[str], monkeypatch, capsys) -> str:
    """What the command line says when it ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["glue", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


SCORED = "  - {as: s, step: evaluate, members: [m, n], suite: 'own:test'}\n"


# -- words --

def test_every_step_that_runs_members_is_told_where():
    for method in steps:
        if method.traits.get("holds") in ("runs", "trains"):
            words = wide(method)
            assert words["device"] == "device" and "device" in method.traits["unkeyed"], method.name
            assert words.get("dtype", "none") in ("none", *method.traits.get("later", ())), method.name
            assert words.get("batch_size", "device") in method.traits["unkeyed"], method.name


@pytest.mark.parametrize("word, why", [("meta", "a shape and no numbers"), ("gpu", "Expected one of"),
                                       ("cuda:7", "CUDA devices"), ("cuda", "CUDA devices")])
def test_a_device_that_is_not_here_is_refused_at_its_place_before_anything_runs(asked_zoo, monkeypatch, word, why):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(GlueError, match=f"'{word}' cannot be calculated on: .*{why}"):
        ran(asked_zoo, SCORED, device=word)
    (asked_zoo / "r.yaml").write_text("steps:\n" + SCORED.replace("suite", f"device: '{word}', suite"))
    with pytest.raises(GlueError) as caught:
        make_plan(read_recipe(asked_zoo / "r.yaml"), Zoo(asked_zoo / "zoo.yaml"))
    assert caught.value.errors[0].place.line == 2 and not (asked_zoo / "zoo/answered").exists()


def test_quantised_numbers_without_their_package_are_one_clear_error(asked_zoo, monkeypatch, capsys):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    with pytest.raises(GlueError, match=r"nf4 needs the package bitsandbytes(?s:.*)pip install 'glue\[quantised\]'"):
        ran(asked_zoo, SCORED, dtype="nf4")
    monkeypatch.chdir(asked_zoo)
    for command in (["generate", "m", "--prompt", "w5"], ["serve", "m"], ["eval", "m", "--suite", "own:test"]):
        assert "int8 needs the package bitsandbytes" in refused([*command, "--dtype", "int8"], monkeypatch, capsys)


def test_what_is_put_together_in_memory_is_not_quantised(asked_zoo, tiny, monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: True)
    with pytest.raises(GlueError, match="'runs_in' cannot be 'nf4'"):
        ran(asked_zoo, "  - {as: s, step: search, members: [m, n], suite: 'own:dev', strategy: best}\n", dtype="nf4")


def test_a_word_that_is_none_is_named_on_the_command_line(asked_zoo, monkeypatch, capsys):
    monkeypatch.chdir(asked_zoo)
    for words, why in ((["--dtype", "float61"], "there is no dtype 'float61'; did you mean 'float16'"),
                       (["--device", "gpu"], "'gpu' cannot be calculated on")):
        assert why in refused(["generate", "m", "--prompt", "w5", *words], monkeypatch, capsys)


def test_a_gpu_of_other_machines_is_not_looked_for_on_this_one(asked_zoo, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv(device.ELSEWHERE, "1")
    (asked_zoo / "r.yaml").write_text("steps:\n" + SCORED)
    zoo = Zoo(asked_zoo / "zoo.yaml")
    task, = make_plan(read_recipe(asked_zoo / "r.yaml", wide={"device": "cuda", "dtype": "nf4"}), zoo)
    assert task.state == "ready" and task.choice.params["device"] == "cuda"
    for word in ("gpu", "meta", "cuda:x"):
        with pytest.raises(GlueError, match=f"'{word}' cannot be calculated on"):
            make_plan(read_recipe(asked_zoo / "r.yaml", wide={"device": word}), zoo)


# -- which device --

def test_each_worker_takes_a_gpu_of_its_own_and_a_number_means_that_one(gpus, monkeypatch):
    gpus(GB, GB, GB)
    taken = []
    for worker in range(5):
        monkeypatch.setenv(WORKER, str(worker))
        taken.append((device_of("auto"), device_of("cuda"), device_of("cuda:2")))
    assert taken == [(f"cuda:{k % 3}", f"cuda:{k % 3}", "cuda:2") for k in range(5)]
    gpus(GB)
    assert device_of("auto") == "cuda", "the only one"


def test_workers_know_which_they_are():
    with Workers(3) as workers:
        found = workers.map("os:getenv", [(WORKER,)] * 24)
    assert set(found) <= {"0", "1", "2"} and len(set(found)) > 0
    assert Workers(0).call("os:getenv", WORKER) is None


def test_one_gpu_is_enough_or_all_are_used_and_a_numbered_one_never_shares(gpus, monkeypatch):
    headers = {"model.layers.0.mlp.up_proj.weight": Header(torch.float32, (GB // 4, 2))}  # 2 GB in fp32
    gpus(8 * GB, 1 * GB)
    assert loading("auto", "float32", headers) == {"dtype": torch.float32, "device_map": {"": "cuda:0"}}
    monkeypatch.setenv(WORKER, "1")
    spread = loading("auto", "float32", headers)
    assert spread["device_map"] == "auto"
    assert spread["max_memory"] == {0: int(6.8 * GB), 1: int(.85 * GB), "cpu": int(54.4 * GB)}
    assert loading("cuda:1", "float32", headers)["device_map"] == {"": "cuda:1"}, "as it is told"
    assert loading("cpu", "float32", headers) == {"dtype": torch.float32}
    assert loading("auto", "nf4", headers)["device_map"] == {"": "cuda:1"}, "0.28 GB are left of it"


def test_quantised_weights_that_no_gpus_hold_are_refused_and_others_wait_in_memory(gpus):
    headers = {"model.layers.0.mlp.up_proj.weight": Header(torch.float32, (4 * GB, 2))}
    gpus(2 * GB, 2 * GB)
    with pytest.raises(MethodError, match="do not fit into the 3.4 GB that are free on all GPUs"):
        loading("auto", "nf4", headers)
    assert "cpu" in loading("auto", "bfloat16", headers)["max_memory"]
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=9 * GB)], buffers=list)
    with pytest.raises(MethodError, match="do not fit"):
        settled(model, "cuda")
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(nbytes=GB)], buffers=list)
    with pytest.raises(MethodError, match="do not fit into the 3.4 GB"):
        settled(model, "cuda", times=4)


def test_a_footprint_is_what_the_loaded_weights_take(tiny):
    member = tiny("m")
    model = load(member, dtype="bfloat16").model
    headers = Checkpoint(locate(member.path)).headers
    assert footprint(headers, "bfloat16") == sum(each.nbytes for each in model.parameters())
    assert footprint(headers, "auto") == footprint(headers, "float32") == 2 * footprint(headers, "float16")


# -- spread --

def expected(member: Member, ids: torch.Tensor) -> torch.Tensor:
    return load(member).model(ids).logits


@pytest.mark.parametrize("share", [0.5, 0.75])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "tied"])
def test_a_model_over_two_places_has_the_logits_of_one_and_writes_the_same(tiny, little_room, tmp_path, share, kind):
    member = tiny("m", num_hidden_layers=6, tie_word_embeddings=kind == "tied")
    if kind == "qwen2":
        from transformers import Qwen2Config, Qwen2ForCausalLM

        told = json.loads((Path(member.path) / "config.json").read_text())
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "initializer_range")
        Qwen2ForCausalLM(Qwen2Config(**{key: told[key] for key in keys})).save_pretrained(member.path)
    ids = some_prompts(5, 9)
    plain = load(member)
    whole, text = plain.model(ids).logits, continued(plain, "w5 w9", 8)
    little_room(share)
    running = load(member)
    assert set(running.model.hf_device_map.values()) == {"cpu", "disk"} and "cpu (" in running.spread
    assert torch.equal(running.model(ids).logits, whole) and continued(running, "w5 w9", 8) == text
    assert plain.spread == ""


def a_mixture_of_mlps():
    from glue.kinds.modelling.ffn_mixture import GlueFfnMixtureConfig, GlueFfnMixtureForCausalLM
    from tests.test_mixture_model import SHAPE

    torch.manual_seed(3)
    model = GlueFfnMixtureForCausalLM(GlueFfnMixtureConfig({**SHAPE, "hidden_size": 32, "num_hidden_layers": 3},
                                                           experts=3, dense=1)).eval()
    for part in model.mixed:
        torch.nn.init.normal_(part.router.outer.weight, std=0.3)
    return model


MIXTURES = {"models": of_models, "two at a time": lambda: of_models(2), "on a trunk": lambda: of_models(1, 1),
            "layers": lambda: of_layers(1, 1), "two layers at a time": lambda: of_layers(2, 0),
            "mlps": a_mixture_of_mlps}


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_over_two_places_choose_and_answer_as_in_one(tmp_path, kind, share):
    register()
    MIXTURES[kind]().save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    size = sum(each.nbytes for each in plain.parameters())
    parted = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto",
                                                  max_memory={"cpu": int(size * share), "disk": 10 ** 15}).eval()
    assert "disk" in parted.hf_device_map.values()
    ids = some_prompts()
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    routes = plain.gate(ids).flatten(1)
    assert torch.equal(parted.gate(ids).flatten(1), routes) and len(routes.unique(dim=0)) > 1
    assert torch.equal(parted(ids).logits, plain(ids).logits)
    assert torch.equal(parted.generate(ids, **how), plain.generate(ids, **how))


def test_no_layer_of_a_mixture_is_cut_in_two():
    assert {"RoutedLayer", "LlamaDecoderLayer"} <= set(of_layers()._no_split_modules)
    assert "LlamaDecoderLayer" in of_models()._no_split_modules and "LlamaDecoderLayer" in \
        a_mixture_of_mlps()._no_split_modules


def test_what_is_spread_is_measured_by_lm_eval_as_what_is_not(tiny, little_room, asked_zoo):
    member, suite = tiny("big", num_hidden_layers=6), Suite("own", (Task("t", "asked", "choice", "acc", 0.3),))
    names = write_tasks(suite, "test", {"asked": asked_zoo / "data"}, asked_zoo / "tasks")
    whole = evaluate(load(member), asked_zoo / "tasks", names)
    little_room(0.6)
    assert evaluate(load(member), asked_zoo / "tasks", names) == whole


def test_an_adapter_cannot_be_merged_into_what_waits_in_a_file_and_says_so(tiny, little_room, tmp_path):
    adapter = adapter_over(tiny("m", num_hidden_layers=6), tmp_path / "a", r=2, target_modules=["up_proj"])
    little_room(0.6)
    with pytest.raises(MethodError, match="has no room on the device: it lies on cpu .*disk(?s:.*)nf4, or device: cpu"):
        load(adapter)


# -- numbers --

def test_scores_in_other_numbers_stand_beside_those_in_fp32_and_replace_none(asked_zoo):
    plain = ran(asked_zoo, SCORED)["s"]
    store = asked_zoo / "zoo/scores.jsonl"
    before = store.read_text()
    narrow = ran(asked_zoo, SCORED, dtype="bfloat16")["s"]
    assert store.read_text().startswith(before) and len(store.read_text().splitlines()) == 4
    rows, others = Table.read(plain).rows, Table.read(narrow).rows
    for one, other in zip(rows, others, strict=True):
        same = sum(a == b for a, b in zip(one.results, other.results, strict=True))
        assert one.member == other.member and same >= 0.8 * len(one.results)
        assert "dtype" not in json.loads(one.how) and json.loads(other.how)["dtype"] == "bfloat16"
    assert plain.digest != narrow.digest and narrow.note.endswith("on own:test in bfloat16")
    assert ran(asked_zoo, SCORED)["s"].digest == plain.digest and len(store.read_text().splitlines()) == 4


def test_a_board_of_members_in_different_numbers_says_who_was_left_out_for_that(asked_zoo):
    ran(asked_zoo, SCORED)
    zoo = Zoo(asked_zoo / "zoo.yaml")
    ran(asked_zoo, SCORED.replace("[m, n]", "[m]"), dtype="bfloat16")
    board = of_suite(zoo, "own:test")
    assert {row.member[0] for row in board.rows} == {"m", "n"} and "bfloat16" not in board.title
    (asked_zoo / "zoo/scores.jsonl").write_text("".join(
        line + "\n" for line in (asked_zoo / "zoo/scores.jsonl").read_text().splitlines()
        if '"member":"n"' in line or "bfloat16" in line))
    board = of_suite(zoo, "own:test")
    told = f"{board.title} {board.notes}"  # one each: which of them is shown is as good as the other
    assert len(board.rows) == 1 and ("(in bfloat16)" in told or "1 member in bfloat16" in told)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_kind_runs_in_what_it_is_told(tiny, tmp_path, dtype):
    base, kind = tiny("m"), getattr(torch, dtype)
    for member in (base, adapter_over(base, tmp_path / "a", r=2, target_modules=["up_proj"])):
        assert {each.dtype for each in load(member, dtype=dtype).model.parameters()} == {kind}
        assert (load(member, dtype=dtype).model(some_prompts()).logits.float() - expected(member, some_prompts())
                ).abs().max() < 0.3


def test_a_search_can_ask_its_candidates_in_other_numbers_and_somewhere_else(asked_zoo):
    line = "  - {as: s, step: search, members: [m, n], suite: 'own:dev', strategy: uniform, merge: linear}\n"
    found = [ran(asked_zoo, line, **words)["s"] for words in ({}, {"dtype": "bfloat16"}, {"device": "auto"})]
    assert found[0].digest == found[2].digest and found[0].origin.key == found[2].origin.key
    assert found[1].origin.params["runs_in"] == "bfloat16" and "runs_in" not in found[0].origin.params


# -- origins --

OLD = {"evaluate": "cec79bddb1fc926a1f16ecd91338ad3e1f7a40dc7c55acb50ddf03eeb32f9075",
       "search": "c8c4f237a033f870ef199b864c36926a473f0fa2fa0977fc4284df895796b6ce",
       "mix": "5b411ed3662384e1dcb8b5798d3dab5e10030df50d11304b4c161f941bb798f1",
       "proxy": "92ee096c51bacc284e8f2e0e625ff0fa896b3ec17329a271e8b79a4dbd14d5b5",
       "federate": "24cc92437ff2a148015809e08ad23506f60e32f177c88da2bf8a4cef53d48240",
       "merge": "31a8c717a9f087524c21e7151cb0dc72f2ce331df14c5d9b91b1435e97538ae6"}


@pytest.mark.parametrize("name", OLD)
def test_what_was_made_before_devices_could_be_told_is_still_known(name):
    from glue.plan import _origin

    data = Member("d", "dataset", "/d", digest="d" * 32)
    suite = Measured(Suite("s", (Task("t", "d", "choice", "acc", 0.25),)), "dev", {"d": data})
    m = [Member(f"m{k}", "model", f"/m{k}", digest=str(k) * 32) for k in range(3)]
    params, given = {
        "evaluate": ({"members": ["m0"], "suite": "s:dev"}, {"members": m[:2], "suite": suite}),
        "search": ({"members": ["m0"], "suite": "s:dev", "strategy": "greedy", "base": "m0"},
                   {"members": m, "suite": suite, "base": m[0]}),
        "mix": ({"members": ["m0"], "suite": "s:dev", "router": "linear"}, {"members": m, "suite": suite}),
        "proxy": ({"large": "m0", "tuned": "m1", "small": "m2"}, {"large": m[0], "tuned": m[1], "small": m[2]}),
        "federate": ({"base": "m0", "data": {"d": 1}, "steps": 3, "learning_rate": 1e-3},
                     {"base": m[0], "data": {data: 1.0}}),
        "merge": ({"members": ["m0"], "method": "linear"}, {"members": m})}[name]
    assert _origin(steps[name], steps[name].bind(params), given, 7).key == OLD[name]
    assert _origin(steps[name], steps[name].bind({**params, "device": "auto"}), given, 7).key == OLD[name]


def test_a_product_is_made_again_where_one_says_and_what_is_not_here_is_told(asked_zoo):
    ran(asked_zoo, "  - {as: a, step: merge, members: [m, n], method: linear, device: auto}\n")
    zoo = Zoo(asked_zoo / "zoo.yaml")
    assert "device" not in zoo["r/a"].origin.made_with, "it was the processor"
    assert reproduce("r/a", zoo, Workers(0), device="auto").equal
    with pytest.raises(MethodError, match="'gpu' cannot be calculated on"):
        reproduce("r/a", zoo, Workers(0), device="gpu")


def test_a_client_elsewhere_trains_where_it_says_and_not_where_the_recipe_does(monkeypatch, tmp_path):
    from glue.steps import _flower_app as app
    from glue.steps._clients import Client, Errand

    words, trained = [], []
    monkeypatch.setattr(app, "_started", lambda command, given: words.extend(given) or 0)
    with pytest.raises(MethodError, match="'gpu' cannot be calculated on"):
        app.join("far:9190", 0, 2, device="gpu")
    assert app.join("far:9190", 0, 2, device="auto") == 0 and 'device="auto"' in words[words.index("--node-config") + 1]
    monkeypatch.setattr(app, "train", lambda errand, out, secret: trained.append(errand.device))
    client = Client("c0", 0, 2, 4.0, 10, ((tmp_path, 1.0),))
    errand = Errand(client, 1, Member("m", "model", "/m", digest="m"), None, "", 0, "lora", ("q_proj",), "own",
                    device="cuda")
    told = json.dumps({**errand.as_data(), "threads": 1})
    for node in ({}, {"device": "cpu"}):
        app.fit(told, None, tmp_path, node)
    assert trained == ["cuda", "cpu"]


# -- batches --

def test_what_fitted_is_where_the_next_reading_begins_and_a_damaged_note_is_none(tmp_path):
    room = Room(tmp_path / NOTES, "small models on a GPU")
    assert room.of(64) == 64
    sizes = []

    def read(some):
        if len(some) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory (as told)")
        sizes.append(len(some))
        return [k * k for k in some]

    assert room.read(range(64), read) == [k * k for k in range(64)] and sizes == [8] * 8
    again = Room(tmp_path / NOTES, "small models on a GPU")
    assert again.of(64) == 8 and again.of(3) == 1 and Room(tmp_path / NOTES, "others").of(64) == 64
    for text in ("", "[1]", "{", '{"small models on a GPU": "x"}', '{"small models on a GPU": -3}'):
        (tmp_path / NOTES).write_text(text)
        assert Room(tmp_path / NOTES, "small models on a GPU").of(64) == 64
    with pytest.raises(torch.OutOfMemoryError):
        room.read([1], lambda some: read(range(11)))


def test_an_evaluation_begins_with_the_batches_that_fitted_the_last_one(asked_zoo, monkeypatch):
    import glue.kinds

    calls: dict[str, Small] = {}
    plain = glue.kinds.load

    def small(member, **how):
        running = plain(member, **how)
        running.model.forward = calls[member.name] = Small(running.model, 20)
        return running

    monkeypatch.setattr(glue.kinds, "load", small)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    ran(asked_zoo, SCORED.replace("[m, n]", "[m]"))
    told = json.loads((asked_zoo / "zoo" / NOTES).read_text())
    assert list(told.values()) == [2] and next(iter(told)).endswith("in float32 on cpu")
    refused = []
    monkeypatch.setattr(Room, "halve", lambda self: refused.append(self))
    ran(asked_zoo, SCORED.replace("[m, n]", "[n]"))
    assert refused == [] and max(calls["n"].calls) <= 20, "one of the same shape"


def test_a_place_tells_how_many_questions_are_read_at_once(asked_zoo, tiny, monkeypatch):
    from glue.evaluate.fast import prepare, score
    from glue.evaluate.suite import task_items

    task = Task("t", "asked", "choice", "acc", 0.3)
    running = Place(batch_size=3).load(tiny("m"))
    running.model.forward = small = Small(running.model, 3)
    prepared = prepare(running.tokenizer, (task,), {"t": task_items(task, asked_zoo / "data", "test")})
    assert len(score(running, prepared)["t"]) == 40 and max(small.calls) == 3


def test_the_words_for_all_lines_are_those_of_the_steps():
    assert wide(steps["search"]) == {"device": "device", "dtype": "runs_in", "batch_size": "batch_size"}
    assert wide(steps["evaluate"]) == {word: word for word in ("device", "dtype", "batch_size")}
