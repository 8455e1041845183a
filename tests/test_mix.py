"""Building mixtures: experts stream into one folder, and a router learns from dev items who answers what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from glue.checkpoint import Checkpoint, InMemory, Weights, weights_digest
from glue.errors import CheckpointError, MethodError
from glue.family import families
from glue.kinds import load, weights
from glue.kinds.mixture import left_padded
from glue.kinds.modelling.model_mixture import chosen, pooled
from glue.member import Member
from glue.mix.levels import model as model_level
from glue.mix.levels.model import refuse, sites, write
from glue.mix.parts import Dev, Parts


def some_prompts(b: int = 9, s: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 40, (b, s), generator=torch.Generator().manual_seed(seed))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def two_experts(tiny) -> list[Member]:
    return [tiny("one", seed=1), tiny("two", seed=2, hidden_size=24, tie_word_embeddings=True)]


TEXTS = ["w3 w4 w5", "w30 w31", "w9", "w38 w2 w20 w11", "w7 w7", "w25"]
WINS = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 3)
DEV = Dev(TEXTS, WINS, torch.arange(6) % 2)
ROUTERS = families("routing")


def alike(tiny, count: int = 2, name: str = "like", **shape) -> list[Member]:
    """Experts of one shape, each three layers deep."""
    return [tiny(f"{name}{i}", seed=20 + i, num_hidden_layers=3, **shape) for i in range(count)]


def average(experts: list[Member]) -> InMemory:
    sources = [weights(expert) for expert in experts]
    return InMemory({name: torch.stack([source[name] for source in sources]).mean(0) for name in sources[0]})


def parts_of(experts: list[Member], dense: int = 0, frame: Member | None = None) -> Parts:
    return Parts(tuple(experts), average(experts) if dense else None, frame or experts[0], dense)


def built(tmp_path, parts: list[Member] | Parts, router="linear", name: str = "mixture", **more) -> Member:
    parts = parts if isinstance(parts, Parts) else parts_of(parts)
    gates = [ROUTERS.choose(router)(site) for site in sites(parts, DEV, **more)]
    write(tmp_path / name, parts, gates, **more)
    return Member(name, "mixture", str(tmp_path / name))


def test_a_built_mixture_routes_as_its_gate_was_taught(tiny, tmp_path):
    running = load(built(tmp_path, two_experts(tiny)))
    contexts = [running.tokenizer(text)["input_ids"] for text in TEXTS]
    assert running.route(contexts) == [0, 1] * 3
    assert running.route([contexts[3], contexts[0]]) == [1, 0]


@pytest.mark.parametrize("router", [{"linear": {"top_k": 2}}, {"mlp": {"width": 5, "top_k": 2}},
                                    {"prompt": {"temperature": 3.0, "top_k": 2}}, "random", "uniform"], ids=str)
@pytest.mark.parametrize("dense", [0, 1, 2])
def test_a_written_router_weighs_as_the_gate_it_was_made_from(tiny, tmp_path, router, dense):
    parts = parts_of(alike(tiny), dense)
    site, = sites(parts, DEV)
    gate = ROUTERS.choose(router)(site)
    write(tmp_path / "mixture", parts, [gate])
    running = load(Member("mixture", "mixture", str(tmp_path / "mixture")))
    served = torch.cat([running.model.gate(torch.tensor([running.tokenizer(text)["input_ids"]])) for text in TEXTS])
    assert difference(served, chosen(gate.logits(site.hidden), gate.top_k)) <= 1e-5


def test_a_pinned_route_of_a_built_mixture_is_the_expert_it_was_built_from(tiny, tmp_path):
    experts, ids = two_experts(tiny), some_prompts()
    running = load(built(tmp_path, experts))
    for i, expert in enumerate(experts):
        with running.pinned(i):
            assert torch.equal(running.model(ids).logits, load(expert).model(ids).logits)


def test_several_experts_a_prompt_are_pinned_by_their_weights(tiny, tmp_path):
    running = load(built(tmp_path, two_experts(tiny), {"linear": {"top_k": 2}}))
    ids = torch.tensor([[1, 9, 4, 30]])
    route, = running.route(ids.tolist())
    assert len(route) == 2 and abs(sum(route) - 1) <= 1e-6
    with running.pinned(route):
        pinned = running.model(ids).logits
    assert difference(pinned, running.model(ids).logits) <= 1e-5


def test_an_empty_context_has_a_route(tiny, tmp_path):
    running = load(built(tmp_path, two_experts(tiny)))
    assert running.route([[]]) == running.route([[1]])


@pytest.mark.parametrize("layer", [0, 1, 2, -1])
def test_the_frame_reads_and_any_of_its_layers_may_be_judged(tiny, tmp_path, layer):
    experts = two_experts(tiny)
    running = load(built(tmp_path, parts_of(experts, frame=experts[1]), layer=layer))
    assert running.model.config.hidden_size == 24 and len(running.model.router.mean) == 24
    assert running.model.config.layer == layer
    assert running.route([running.tokenizer(text)["input_ids"] for text in TEXTS]) == [0, 1] * 3


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_the_reader_has_not_is_refused(tiny, layer):
    with pytest.raises(MethodError, match=f"enter layer {layer}, and the reader has 2"):
        sites(parts_of(two_experts(tiny)), DEV, layer=layer)


# layers that all share

@pytest.mark.parametrize("shape", [{}, {"tie_word_embeddings": True}], ids=["own head", "tied head"])
@pytest.mark.parametrize("dense", [1, 2])
def test_an_expert_on_a_trunk_is_its_later_layers_norm_and_head_on_the_trunks_first(tiny, tmp_path, dense, shape):
    experts, ids = alike(tiny, **shape), some_prompts()
    parts = parts_of(experts, dense)
    running = load(built(tmp_path, parts))
    assert running.route([running.tokenizer(text)["input_ids"] for text in TEXTS]) == [0, 1] * 3
    for i, expert in enumerate(experts):
        whole = load(expert).model
        head = whole.lm_head.weight.clone()
        if shape:
            whole.lm_head.weight = torch.nn.Parameter(head)
        for name, tensor in whole.state_dict().items():
            words = name.split(".")
            if words[1] == "embed_tokens" or (words[1] == "layers" and int(words[2]) < dense):
                tensor.copy_(parts.trunk[name])
        with running.pinned(i):
            assert torch.equal(running.model(ids).logits, whole(ids).logits)
            made = running.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(made, whole.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))
        assert not torch.equal(whole(ids).logits, load(expert).model(ids).logits)


def test_all_layers_dense_is_the_trunk(tiny, tmp_path):
    """Nothing is left to choose between, so it is written as the plain model that it is."""
    experts, ids = alike(tiny), some_prompts()
    parts = parts_of(experts, 3)
    assert sites(parts, DEV) == []
    running = load(built(tmp_path, parts))
    plain = load(experts[0]).model
    plain.load_state_dict(dict(parts.trunk))
    assert type(running.model).__name__ == "LlamaForCausalLM" and running.route is None
    assert torch.equal(running.model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("dense", [0, 1, 2, 3])
def test_a_mixture_of_copies_is_the_model(tiny, tmp_path, dense):
    model, ids = tiny("model", num_hidden_layers=3), some_prompts()
    running = load(built(tmp_path, parts_of([model.named("a"), model.named("b")], dense), {"random": {"top_k": 2}}
                         if dense < 3 else "random"))
    assert difference(running.model(ids).logits, load(model).model(ids).logits) <= 1e-5


def test_a_mixture_on_a_trunk_holds_what_is_shared_once(tiny, tmp_path):
    experts = alike(tiny)
    sizes = {}
    for dense in (0, 1, 2, 3):
        held = Checkpoint(built(tmp_path, parts_of(experts, dense), name=f"m{dense}").folder)
        sizes[dense] = sum(header.numel for name, header in held.headers.items() if not name.startswith("router."))
    layer = sum(header.numel for name, header in weights(experts[0]).headers.items() if ".layers.0." in name)
    assert [sizes[dense] - sizes[dense + 1] for dense in (0, 1, 2)] == [layer + 40 * 32, layer, layer + 40 * 32 + 32]


class Watched:
    """Weights that count how many of their tensors are held at once."""

    held, most = 0, 0

    def __init__(self, source: Weights):
        self._source, self.headers, self.fingerprint = source, source.headers, source.fingerprint

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._source[name].clone()
        Watched.held += 1
        Watched.most = max(Watched.most, Watched.held)
        weakref.finalize(tensor, self._less)
        return tensor

    @staticmethod
    def _less() -> None:
        Watched.held -= 1

    def __iter__(self):
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)


@pytest.mark.parametrize("dense", [0, 1, 2])
def test_reading_holds_one_layer_at_a_time(tiny, monkeypatch, dense):
    parts = parts_of(alike(tiny), dense)
    monkeypatch.setattr(model_level, "weights", lambda expert: Watched(weights(expert)))
    monkeypatch.setattr(Watched, "most", 0)
    sites(replace(parts, trunk=parts.trunk and Watched(parts.trunk)), DEV)
    assert Watched.most <= 2 * 9 + 1  # of one layer, the last of those before it, and of the norm


@pytest.mark.parametrize("dense", [0, 1, 3])
def test_writing_holds_one_tensor_at_a_time(tiny, tmp_path, monkeypatch, dense):
    experts = alike(tiny)
    parts = parts_of(experts, dense)
    gates = [ROUTERS.choose("random")(site) for site in sites(parts, DEV)]
    monkeypatch.setattr(model_level, "weights", lambda expert: Watched(weights(expert)))
    monkeypatch.setattr(Watched, "most", 0)
    write(tmp_path / "mixture", replace(parts, trunk=parts.trunk and Watched(parts.trunk)), gates)
    assert Watched.most <= 2  # the next is made before the name of the last is given up


SHAPES = {"llama": {}, "bfloat16": {"dtype": torch.bfloat16}, "mistral": {"model_type": "mistral", "sliding_window": 3},
          "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
          "qwen3": {"model_type": "qwen3", "head_dim": 8}, "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4}}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("layer", [0, 1, 2, -1])
def test_states_for_the_router_are_those_it_sees_when_it_serves(tiny, layer, kind):
    shape = {"num_hidden_layers": 3, "initializer_range": 0.3, "vocab_size": 40, **SHAPES[kind]}
    member = tiny("one", seed=1, **shape) if kind in ("llama", "bfloat16") else other(tiny("one"), **shape)
    site, = sites(parts_of([member, member]), DEV, layer=layer)
    running = load(member)
    for text, state in zip(TEXTS, site.hidden, strict=True):
        ids = torch.tensor([running.tokenizer(text)["input_ids"]])
        assert difference(pooled(running.model, ids, None, layer)[0], state) <= 1e-5
        plain = running.model(ids, output_hidden_states=True).hidden_states[layer][0].mean(0)
        assert difference(plain, state) <= 1e-5
    assert torch.equal(site.prompt_states(TEXTS[:2]), sites(parts_of([member]), replace(
        DEV, prompts=TEXTS[:2], wins=WINS[:2, :1], tasks=torch.zeros(2)), layer=layer)[0].hidden)


def test_a_model_that_was_trained_with_dropout_is_read_without(tiny):
    plain, dropping = (tiny(name, seed=1, attention_dropout=share) for name, share in (("plain", 0.0), ("drops", 0.5)))
    states = [sites(parts_of([member, member]), DEV)[0].hidden for member in (plain, dropping)]
    assert torch.equal(*states)


def other(member: Member, **shape) -> Member:
    """The same member with a model of another architecture."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{
            "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, **shape}))
    model.save_pretrained(member.path)
    return member


@pytest.mark.parametrize("dense", [0, 2, 3])
def test_the_digest_is_that_of_the_weights_whatever_the_shards(tiny, tmp_path, dense):
    parts = parts_of(alike(tiny), dense)
    gates = [ROUTERS.choose("linear")(site) for site in sites(parts, DEV)]
    digests = [write(tmp_path / name, parts, gates, shard_size=size)
               for name, size in (("whole", 10**9), ("parts", 20_000))]
    assert digests[0] == digests[1] == weights_digest(Checkpoint(tmp_path / "parts"))
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 2
    logits = [load(Member("m", "mixture", str(tmp_path / name))).model(some_prompts()).logits
              for name in ("whole", "parts")]
    assert torch.equal(*logits)


def test_whole_experts_keep_the_names_and_settings_that_mixtures_had_from_the_start(tiny, tmp_path):
    """A mixture that is made again is the member that it was."""
    folder = built(tmp_path, two_experts(tiny)).folder
    told = json.loads((folder / "config.json").read_text())
    assert set(told) - {"dtype", "transformers_version", "auto_map", "architectures"} == {
        "bos_token_id", "eos_token_id", "experts", "experts_per_prompt", "hidden_size", "layer",
        "max_position_embeddings", "model_type", "num_hidden_layers", "pad_token_id", "reader", "router_temperature",
        "router_width", "vocab_size"}
    assert {name.split(".")[0] for name in Checkpoint(folder)} == {"expert_0", "expert_1", "router"}
    assert "expert_1.model.layers.1.mlp.up_proj.weight" in Checkpoint(folder)


def test_an_adapter_can_be_an_expert(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = tiny("base", seed=3)
    get_peft_model(load(base).model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
                   ).save_pretrained(tmp_path / "lora")
    experts = [base, Member("lora", "adapter", str(tmp_path / "lora"), base=base)]
    running, ids = load(built(tmp_path, experts)), some_prompts()
    with running.pinned(1):
        assert difference(running.model(ids).logits, load(experts[1]).model(ids).logits) <= 1e-5


@pytest.mark.parametrize("dense", [0, 1])
def test_a_mixture_runs_in_plain_transformers_for_who_trusts_its_code(tiny, tmp_path, dense):
    member, ids = built(tmp_path, parts_of(alike(tiny), dense)), some_prompts(3)
    torch.save({"ids": ids, "logits": load(member).model(ids).logits}, tmp_path / "expected.pt")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
told = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({member.path!r}, trust_remote_code=True)
difference = (model(told["ids"]).logits - told["logits"]).abs().max()
assert difference <= 1e-5 * told["logits"].abs().max(), difference
assert AutoTokenizer.from_pretrained({member.path!r})("w3")["input_ids"] == [1, 3]
assert not [name for name in sys.modules if name == "glue" or name.startswith("glue.")]
print("the same")
"""
    home = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
                          env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | home)
    assert done.stdout.strip().endswith("the same"), done.stderr


def test_experts_of_different_vocabularies_are_refused_with_the_odd_token(tiny):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"v{k}": k for k in range(3, 40)}}
    with pytest.raises(MethodError, match=r"different vocabularies \(40 and 40 rows, e.g. 'v3' is token 3"):
        refuse([tiny("one"), tiny("two", words=words)], 0)
    with pytest.raises(MethodError, match=r"\(40 and 48 rows\)"):
        refuse([tiny("one"), tiny("long", vocab_size=48)], 0)


def test_more_experts_a_prompt_than_there_are_is_refused(tiny, tmp_path):
    with pytest.raises(MethodError, match="would choose 3 of 2 experts"):
        built(tmp_path, two_experts(tiny), {"random": {"top_k": 3}})


def test_an_expert_that_does_not_fit_its_configuration_is_refused_before_anything_is_written(tiny, tmp_path):
    experts = two_experts(tiny)
    config = LlamaConfig.from_pretrained(experts[1].path)
    config.intermediate_size = 50
    config.save_pretrained(experts[1].path)
    for dense in (0, 1):
        with pytest.raises(CheckpointError, match=r"'two': its weights have 'model.layers.0.mlp.down_proj.weight' as "
                                                  r"\(24, 48\), its configuration asks for \(24, 50\)"):
            refuse([experts[1]], dense)
    with pytest.raises(CheckpointError, match="'two': its weights have"):
        built(tmp_path, experts)
    assert not (tmp_path / "mixture").exists()


@pytest.mark.parametrize("level", ["model", "block", "ffn"])
def test_quantised_weights_are_refused_though_their_shapes_fit(tiny, level):
    from safetensors.torch import load_file, save_file

    experts = alike(tiny)
    file, name = experts[1].folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'like1': its weights have '{name}' as \(48, 32\) in int8"):
        import_module(f"glue.mix.levels.{level}").refuse(experts, 0)


@pytest.mark.parametrize("shape, said", [
    ({"intermediate_size": 50}, "has intermediate_size: 48, 'odd' has 50"),
    ({"attention_bias": True}, "has attention_bias: False, 'odd' has True"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "has rope_parameters: "),
    ({"num_hidden_layers": 2}, "has num_hidden_layers: 3, 'odd' has 2")], ids=lambda value: str(value)[:20])
def test_an_expert_that_cannot_stand_on_the_same_trunk_is_refused(tiny, shape, said):
    experts = [*alike(tiny, 1), tiny("odd", **{"num_hidden_layers": 3, **shape})]
    with pytest.raises(MethodError, match=said):
        refuse(experts, 1)
    refuse(experts, 0)


def test_more_dense_layers_than_there_are_is_refused(tiny):
    with pytest.raises(MethodError, match="4 layers are to stay dense, and the experts have 3"):
        refuse(alike(tiny), 4)


def test_an_architecture_that_does_more_to_its_embeddings_has_no_trunk(tiny):
    from transformers import GPT2Config, GPT2LMHeadModel

    odd = tiny("odd")
    GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4)).save_pretrained(odd.path)
    refuse([odd, odd], 0)
    with pytest.raises(MethodError, match="'odd' is of the architecture 'gpt2'; dense layers are shared by llama"):
        refuse([odd, odd], 1)


def test_a_trunk_of_another_shape_is_refused_before_anything_is_written(tiny, tmp_path):
    experts = alike(tiny)
    parts = replace(parts_of(experts, 1), trunk=average(alike(tiny, name="wide", intermediate_size=50)))
    gate = ROUTERS.choose("random")(sites(parts_of(experts, 1), DEV)[0])
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.down_proj.weight' as \(32, 48\), and there is \(32, 50"):
        write(tmp_path / "mixture", parts, [gate])
    assert not (tmp_path / "mixture").exists()


def test_rotary_frequencies_in_old_files_are_left_out(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    experts = two_experts(tiny)
    file = experts[0].folder / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, file,
              metadata={"format": "pt"})
    assert len(weights(experts[0])) == 22
    assert not [name for name in Checkpoint(built(tmp_path, experts).folder) if "inv_freq" in name]


def test_batches_are_of_like_length_and_hold_every_row_once():
    rows = [[5] * n for n in (3, 9000, 1, 8000, 3, 2)]
    batches = list(left_padded(rows))
    assert sorted(place for places, _, _ in batches for place in places) == list(range(6))
    assert [ids.shape for _, ids, _ in batches] == [(1, 9000), (2, 8000), (3, 3)]
    places, ids, mask = batches[2]
    assert [int(mask[places.index(k)].sum()) for k in (4, 5, 2)] == [3, 2, 1] and torch.equal(ids, mask * 5)
