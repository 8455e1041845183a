"""Our reading of merge configs against mergekit's: what is read, what is planned, and what comes out."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from glue.checkpoint import Checkpoint, Header
from glue.merge.engine import Merge, in_one_order
from glue.merge.mergekit.architecture import MIXED, known
from glue.merge.mergekit.config import read_configs
from glue.merge.mergekit.nouns import Config, ModelRef, Source
from glue.merge.mergekit.settings import converted, evaluated
from glue.merge.mergekit.targets import Model, Planned, planned
from glue.merge.mergekit.words import PEERS, Dialect
from glue.writer import Writer

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def peers() -> dict[str, Any]:
    """mergekit's methods by name."""
    from mergekit.merge_methods import registered_methods

    return {method.spec.name: method.spec for method in registered_methods()}


# --- the table of methods ---------------------------------------------------------------------------------------------

def test_the_table_of_methods_is_mergekits(peers):
    alone = {"error": "", "passthrough_singleton": "any", "passthrough_base_singleton": "base", "base_or_skip": "fewer"}
    bases = {"required": "needed", "optional": "optional", "ignored": "ignored"}
    assert set(PEERS) == set(peers)
    for name, spec in peers.items():
        ours = Dialect.of(name)
        assert {word.name for word in spec.parameters} <= {*ours.kinds, *ours.unread}, name
        assert set(ours.peer.needs) == {word.name for word in spec.parameters if word.required}, name
        assert (ours.base, ours.peer.alone) == (bases[spec.contract.base], alone[spec.optional_tensor_policy]), name
        per_input = {word.name for word in spec.input_parameters} - set(ours.unread)
        assert per_input == ours.by_model & {word.name for word in spec.parameters}, name
        for word in spec.parameters:
            if word.name in ours.kinds and not word.required and word.default is not None:
                default = ours.peer.differs.get(word.name, ours.method.parameters[word.name].default)
                assert default == ours.settled(word.name, word.default), (name, word.name)


def test_every_method_takes_as_many_models_as_mergekits(peers):
    for name, spec in peers.items():
        ours, contract = Dialect.of(name), spec.contract
        for count in range(1, 6):
            for based in {ours.base != "ignored", ours.base == "needed"}:
                ids = [str(k) for k in range(count)]
                try:
                    contract.validate_ids(ids, ids[0] if based else None)
                    theirs = True
                except ValueError:
                    theirs = False
                counted = count - (based and not ours.peer.first)
                fewest, most = ours.members
                fits = fewest <= counted <= (most or counted) or (counted == 0 and fewest == 1 and based
                                                                  and ours.base == "needed")
                assert fits == theirs, (name, count, based)


# --- what is read -----------------------------------------------------------------------------------------------------

WRITTEN = [
    "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 0.5}\n- {model: b, parameters: {weight: 1}}",
    "merge_method: linear\nmodels: [{model: a@main, parameters: {weight: 1e-3}}, {model: b+c, parameters: {weight: "
    "1}}]",
    "merge_method: linear\nmodels: [{model: a/b@v1+c/d@v2}]\nparameters: {weight: '0.5', normalize: no}\ndtype: "
    "float32",
    "merge_method: linear\nbase_model: z\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: [0, 0.5, 1]}",
    """merge_method: slerp
base_model: a
slices:
- sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
dtype: bfloat16""",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: {value: 0.25}}\ntokenizer_source: union",
    "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: [{filter: '*', value: 1}]}",
    "merge_method: nearswap\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 1e-4}",
    "merge_method: arcee_fusion\nbase_model: a\nmodels: [{model: a}, {model: b}]\ndtype: float16",
    "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 3]}]}, "
    "{sources: [{model: b, layer_range: ['1', 4]}]}]\ndtype: torch.float16",
    "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 2]\n    parameters: {scale: "
    "[{filter: o_proj, value: 0.0}, {filter: down_proj, value: 0}, {value: 1.0}]}",
    "merge_method: passthrough\nmodels: [{model: a}]",
    "merge_method: ties\nbase_model: z\nmodels: [{model: a, parameters: {weight: 0.5, density: 0.4}}, "
    "{model: b, parameters: {weight: [0.1, 0.9], density: [1, 0.7, 0.1]}}]\nparameters: {normalize: yes, int8_mask: "
    "on}",
    "merge_method: ties\nbase_model: z\nmodels: [{model: a}]\nparameters: {weight: 1, rescale: true, lambda: 0.7}",
    "merge_method: task_arithmetic\nbase_model: z\nmodels: [{model: a, parameters: {weight: -0.5}}]\nout_dtype: "
    "float16",
    "merge_method: task_arithmetic\nbase_model: {model: {path: z, revision: r}}\nmodels: [{model: {model: a, lora: "
    "{path: l, revision: x}}, parameters: {weight: 1}}]",
    "merge_method: dare_ties\nbase_model: z\nmodels: [{model: a, parameters: {weight: 0.3, density: 0.5}}, "
    "{model: b, parameters: {weight: {filter: mlp, value: 0.2}}}]\nparameters: {weight: 0.9, rescale: False}",
    "merge_method: dare_linear\nbase_model: z\nmodels: [{model: a}, {model: z}]\nparameters: {weight: 1, density: .5}",
    "merge_method: breadcrumbs\nbase_model: z\nmodels: [{model: a}]\nparameters: {weight: 1, density: 0.9, gamma: "
    "0.01}",
    "merge_method: della\nbase_model: z\nmodels: [{model: a, parameters: {epsilon: 0.1}}]\nparameters: {weight: 1, "
    "density: 0.5}",
    "merge_method: sce\nbase_model: z\nmodels: [{model: a}, {model: b}]\nparameters: {select_topk: '0.1'}",
    "merge_method: model_stock\nbase_model: z\nmodels: [{model: a}, {model: b}]\nparameters: {filter_wise: 'off'}",
    "merge_method: nuslerp\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]\n"
    "parameters: {nuslerp_row_wise: true, nuslerp_flatten: n}",
    "merge_method: multislerp\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]\n"
    "parameters: {normalize_weights: 1, eps: 1e-8}",
    "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: 20.0, tol: 1.0e-6}",
    "merge_method: ram\nbase_model: z\nmodels: [{model: a}]\nparameters: {epsilon: 1e-5}",
    "merge_method: ramplus_tl\nbase_model: z\nmodels: [{model: a}]\nparameters: {r: 0.2, alpha: [0.1, 0.3]}",
    "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\ntokenizer: {source: base}",
    "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\ntokenizer: {source: a@r, "
    "pad_to_multiple_of: 64}",
    "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\ntokenizer_source: a\nchat_template: chatml",
    """merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: a}
    <|im_end|>: {source: b, force: true}
    <pad>: {source: {kind: zero}}
    <x>: {source: {kind: model_token, model: b, token: y}}
    <z>: {source: {kind: model_token, model: b, token_id: 3}}
chat_template: auto""",
    "merge_method: linear\nmodules: {text_decoder: {models: [{model: a}, {model: b}], parameters: {weight: 0.5}}}",
    "merge_method: slerp\nbase_model: a\nmodules:\n  d:\n    slices:\n    - sources: [{model: a, layer_range: [0, 2]}, "
    "{model: b, layer_range: [1, 3]}]\n      parameters: {t: 0.3}\n    - base_model: b\n      sources: [{model: a, "
    "layer_range: [2, 3]}, {model: b, layer_range: [0, 1]}]\nparameters: {t: 0.7}",
    "merge_method: linear\nmodels: [{model: a}]\nslices:\nparameters: {weight: 1}\nchat_template: "
    "'{% for m in messages %}{{ m.content }}{% endfor %}'",
    "merge_method: linear\nmodels: &m [{model: a}]\nparameters: &p {weight: &w 1}\n",
    "merge_method: linear\nslices:\n- {sources: [{model: a, layer_range: [0, 1]}], residual_weight: 0.5}\nparameters: "
    "{weight: 1}",
]


def generated(seed: int) -> str:
    """A config made by chance: any method, any shape of config, any form of setting."""
    chance = random.Random(seed)
    name = chance.choice(sorted(PEERS))
    method = Dialect.of(name)
    count = chance.randint(max(1, method.members[0]), min(4, method.members[1] or 4))
    based = method.base == "needed" or (method.base == "optional" and chance.random() < 0.5)
    models = [f"m{k}" + chance.choice(["", "@r", "+l"]) for k in range(count)]
    base = models[0] if method.peer.first else "z" if based else None
    listed = [*models, *(["z"] if base == "z" else [])]

    def number(word: str) -> Any:
        if method.kinds[word] == "truth" or word == "rescale":
            return chance.choice([True, False, "yes", "off"])
        value = chance.choice([1, 0.5, 0.25, "0.75"] if word != "density" else [0.5, 0.25, "0.75"])
        value = 0.05 if word == "epsilon" else value
        return int(float(value) * 8) if method.kinds[word] == "whole" else value

    def setting(word: str) -> Any:
        gradient = [number(word) for _ in range(chance.randint(1, 4))]
        rules = [{"filter": chance.choice(["mlp", "q_proj", "norm", "*"]), "value": number(word)},
                 {"value": chance.choice([number(word), gradient])}]
        whole = method.kinds[word] == "whole"
        return chance.choice([number(word), number(word) if whole else gradient, rules])

    def some(words: list[str]) -> dict[str, Any]:
        return {word: setting(word) for word in words if chance.random() < 0.5 or word in method.peer.needs}

    words = sorted(set(method.kinds) - {"scope"})
    top = some(words)
    entry = {"merge_method": name, "parameters": top}
    if base:
        entry["base_model"] = base
    if chance.random() < 0.4:
        entry["slices"] = [{"sources": [{"model": model, "layer_range": [k, k + 2], "parameters": some(
            sorted(method.by_model))} for model in listed], "parameters": some(words)} for k in (0, 1)]
    else:
        entry["models"] = [{"model": model, "parameters": some(sorted(method.by_model))} for model in listed]
        if chance.random() < 0.3:
            entry["modules"] = {"default": {"models": entry.pop("models"), "parameters": some(words)}}
    for word in ("dtype", "out_dtype"):
        if chance.random() < 0.5:
            entry[word] = chance.choice(["float32", "bfloat16"])
    return yaml.safe_dump(entry, sort_keys=False)


CONFIGS = [*WRITTEN, *map(generated, range(60))]


def plain(value: Any, name: str) -> Any:
    """Settings with every value as its parameter reads it, words that change nothing left out."""
    dialect = Dialect.of(name)

    def one(word: str, setting: Any) -> Any:
        if isinstance(setting, list):
            return [one(word, item) for item in setting]
        if isinstance(setting, dict):
            filtered = {"filter": setting["filter"]} if setting.get("filter") is not None else {}
            return {**filtered, "value": one(word, setting["value"])}
        return converted(setting, dialect.kind(word, setting))

    return {word: one(word, setting) for word, setting in (value or {}).items() if word in dialect.kinds}


def ours_in_plain(config: Config) -> dict[str, Any]:
    name = config.merge_method

    def source(each: Source) -> dict[str, Any]:
        return {"model": str(each.model), "layers": each.layers, "parameters": plain(each.settings, name)}

    def slices(pieces) -> list[dict[str, Any]]:
        return [{"sources": list(map(source, each.sources)), "base": each.base and str(each.base),
                 "parameters": plain(each.settings, name)} for each in pieces]

    token = config.tokenizer
    return {"method": name, "base": config.base_model and str(config.base_model), "dtype": config.dtype,
            "out_dtype": config.out_dtype, "models": list(map(source, config.models)), "slices": slices(config.slices),
            "modules": {word: {"models": list(map(source, each.models)), "slices": slices(each.slices),
                               "parameters": plain(each.settings, name)} for word, each in config.modules.items()},
            "parameters": plain(config.settings, name), "chat_template": config.chat_template,
            "tokenizer": token and {"source": str(token.source), "pad": token.pad_to_multiple_of,
                                    "tokens": {word: (str(entry["source"]) if isinstance(entry.get("source"), str)
                                                      else entry.get("source"), entry.get("force", False))
                                               for word, entry in (token.tokens or {}).items()}}}


def theirs_in_plain(text: str) -> dict[str, Any]:
    from mergekit.config import MergeConfiguration

    config = MergeConfiguration.model_validate(yaml.safe_load(text))
    name = config.merge_method

    def settings(value) -> dict[str, Any]:
        def undone(setting: Any) -> Any:
            if isinstance(setting, list):
                return [undone(item) for item in setting]
            return setting.model_dump() if hasattr(setting, "model_dump") else setting

        return plain({word: undone(setting) for word, setting in (value or {}).items()}, name)

    def source(each) -> dict[str, Any]:
        return {"model": str(each.model), "layers": getattr(each, "layer_range", None),
                "parameters": settings(each.parameters)}

    def slices(pieces) -> list[dict[str, Any]]:
        return [{"sources": list(map(source, each.sources)), "base": each.base_model and str(each.base_model),
                 "parameters": settings(each.parameters)} for each in pieces or ()]

    def token(source: Any) -> Any:
        return source.model_dump(exclude_none=True) if hasattr(source, "kind") else source and str(source)

    block = config.tokenizer
    made_of = block.source if block else config.tokenizer_source
    return {"method": name, "base": config.base_model and str(config.base_model),
            "dtype": (config.dtype or "").removeprefix("torch."), "out_dtype": config.out_dtype or "",
            "models": list(map(source, config.models or ())), "slices": slices(config.slices),
            "modules": {word: {"models": list(map(source, each.models or ())), "slices": slices(each.slices),
                               "parameters": settings(each.parameters)}
                        for word, each in (config.modules or {}).items()},
            "parameters": settings(config.parameters), "chat_template": config.chat_template or "",
            "tokenizer": made_of and {"source": str(made_of), "pad": block.pad_to_multiple_of if block else None,
                                      "tokens": {word: (token(entry.source), entry.force) for word, entry in
                                                 ((block.tokens if block else None) or {}).items()}}}


@pytest.mark.parametrize("k", range(len(CONFIGS)))
def test_a_config_is_read_as_mergekit_reads_it(tmp_path: Path, k: int):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIGS[k])
    config, = read_configs(file)
    assert ours_in_plain(config) == theirs_in_plain(CONFIGS[k])
    assert config.text == CONFIGS[k]


def test_several_documents_are_the_merges_that_mergekit_multi_makes(tmp_path: Path):
    from mergekit.scripts.multimerge import load_config

    text = "\n---\n".join(f"{name}{WRITTEN[k]}" for name, k in (("", 3), ("name: a\n", 4), ("name: z\n", 37)))
    text = text.replace("base_model: a\n", "base_model: e\n")
    (tmp_path / "c.yaml").write_text(text)
    found = read_configs(tmp_path / "c.yaml")
    theirs, needed = load_config(text, "out")
    assert [config.name for config in found][-1] == "" and {config.name or None for config in found} == set(theirs)
    for k, config in enumerate(found):
        used = needed[config.name or None]
        assert used <= {other.name for other in found[:k]}
        assert config.merge_method == theirs[config.name or None].merge_method


# --- what a setting is at one tensor ----------------------------------------------------------------------------------

SETTINGS = [("number", setting) for setting in (
    0.3, 1, "0.5", "1e-3", [0, 1], [0.1, 0.9, 0.4], ["0.2", 1, 0, 0.6], [0.7], [], {"value": 2},
    {"filter": "mlp", "value": 2},
    [{"filter": "mlp", "value": [0, 1]}, {"filter": "q_proj", "value": 0.25}], [{"filter": "*", "value": [3, 1, 2]}],
    [{"filter": "norm", "value": []}, {"value": 1}], [{"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]}, {"value": 0.5}], [{"filter": "", "value": 4}])] + [
    ("truth", setting) for setting in (True, "yes", "off", 0, 1, [True, False], ["y", "n", "t"],
                                       [{"filter": "mlp", "value": "no"}, {"value": [1, 0]}])] + [
    ("whole", setting) for setting in (10, "7", 3.0, [2, 2], [{"filter": "mlp", "value": 4}])]
TENSORS = ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight",
           "model.norm.weight", ""]


@pytest.mark.parametrize("kind, setting", SETTINGS)
def test_a_setting_has_mergekits_value_at_every_tensor_and_layer(kind: str, setting: Any):
    from mergekit.config import ConditionalParameter, evaluate_setting
    from pydantic import TypeAdapter

    def models(item: Any) -> Any:
        return [models(one) for one in item] if isinstance(item, list) else \
            ConditionalParameter(**item) if isinstance(item, dict) else item

    python = {"number": float, "truth": bool, "whole": int}[kind]
    for tensor in TENSORS:
        for t in [k / layers for layers in (1, 2, 3, 7, 31) for k in range(layers + 1)]:
            theirs = evaluate_setting(tensor, models(setting), t, validate=TypeAdapter(python).validate_python)
            ours = evaluated(setting, kind, tensor, t)
            assert ours == theirs and type(ours) is type(theirs)


# --- which tensors there are ------------------------------------------------------------------------------------------

TABLES = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq")  # computed; newer files lack them


def test_every_listed_architecture_has_mergekits_tensors():
    from mergekit.architecture.json_definitions import NAME_TO_ARCH

    compared = 0
    assert len(NAME_TO_ARCH) > 50
    for name, candidates in NAME_TO_ARCH.items():
        for theirs in candidates:
            config = nested({module.architecture.num_layers_config_key(): 3 for module in theirs.modules.values()
                             if module.architecture.num_layers_config_key()})
            ours = known({"architectures": [name], "model_type": theirs.expected_model_type})
            if name in MIXED:
                assert ours is None  # made out by their names
                continue
            for word, module in theirs.modules.items():
                prefix, part = module.weight_prefix or "", ours.parts[word]
                listed = [(prefix + each.name, each.optional or each.name.endswith(TABLES),
                           tuple(prefix + one for one in each.aliases or ()), tuple(
                    prefix + one for one in each.tied_names or ()), each.vocabulary_axis, each.force_dtype or "")
                    for each in module.architecture.all_weights(namespace(config))]
                layers = part.layers(config, ())
                assert layers == module.architecture.num_layers(namespace(config))
                assert [(each.name, each.optional, each.aliases, each.tied, each.vocabulary, each.forced)
                        for each in part.weights(layers)] == listed
                compared += len(listed)
            assert ours.tagalong == tuple(theirs.tagalong_files or ())
    print(f"\n{compared} tensors of {len(NAME_TO_ARCH)} classes of models compared")


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        inner = found
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return found


def namespace(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return SimpleNamespace(**{key: namespace(item) for key, item in value.items()})


# --- what is planned --------------------------------------------------------------------------------------------------

def llama(folder: Path, seed: int, *, layers: int = 4, near: Path | None = None, dtype: torch.dtype = BF16,
          head: bool = True, **config: Any) -> Path:
    """A tiny Llama-shaped checkpoint without a tokenizer; `near` another one, where that is given."""
    folder.mkdir(parents=True)
    size, inner, words = 16, 24, 40
    shapes = {"model.embed_tokens.weight": (words, size), "model.norm.weight": (size,)}
    shapes |= {"lm_head.weight": (words, size)} if head else {}
    for k in range(layers):
        shapes |= {f"model.layers.{k}.{name}.weight": shape for name, shape in {
            "input_layernorm": (size,), "post_attention_layernorm": (size,), "self_attn.q_proj": (size, size),
            "self_attn.k_proj": (size, size), "self_attn.v_proj": (size, size), "self_attn.o_proj": (size, size),
            "mlp.up_proj": (inner, size), "mlp.gate_proj": (inner, size), "mlp.down_proj": (size, inner)}.items()}
    chance = torch.Generator().manual_seed(seed)
    below = Checkpoint(near) if near else None
    with Writer(folder, {name: Header(dtype, shape) for name, shape in shapes.items()}) as writer:
        for name, shape in shapes.items():
            fresh = torch.randn(shape, generator=chance)
            writer.write(name, (below[name].float() + 0.1 * fresh if below else fresh).to(dtype))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "hidden_size": size,
        "intermediate_size": inner, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": words,
        "tie_word_embeddings": not head, "torch_dtype": "bfloat16", **config}))
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A folder with a base `z` and its children `a` to `d` and `m0` to `m3`."""
    folder = tmp_path_factory.mktemp("zoo")
    base = llama(folder / "z", 0)
    for k, name in enumerate(["a", "b", "c", "d", "m0", "m1", "m2", "m3"]):
        llama(folder / name, k + 1, near=base)
    return folder


def opened(ref: ModelRef) -> Model:
    folder = Path(ref.path)
    return Model(ref, folder.name, Checkpoint(folder), json.loads((folder / "config.json").read_text()))


def settled(text: str, zoo: Path) -> str:
    """The same config with the paths of the models instead of their names."""
    def moved(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {word: moved(item, word) for word, item in value.items()}
        if isinstance(value, list):
            return [moved(item) for item in value]
        return str(zoo / value.split("@")[0].split("+")[0]) if key in ("model", "base_model") else value

    return yaml.safe_dump(moved(yaml.safe_load(text)), sort_keys=False)


def ours_of(text: str, folder: Path) -> Planned:
    (folder / "config.yaml").write_text(text)
    config, = read_configs(folder / "config.yaml")
    return planned(config, opened)


def test_an_architecture_without_a_list_is_planned_as_by_mergekit(tmp_path: Path):
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    for name in "ab":
        llama(tmp_path / name, ord(name), layers=3, architectures=["MysteryForCausalLM"])
    text = settled("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [{filter: mlp, value: "
                   "[1, 2]}, {value: 3}]}", tmp_path)
    theirs = MergeConfiguration.model_validate(yaml.safe_load(text))
    architecture = get_architecture_info(theirs, MergeOptions())
    planner = MergePlanner(theirs, architecture, MergeOptions(), theirs.models[0].model.config())
    planner._plan()
    rows = {weight.name: [task.input_parameters[ref]["weight"] for ref in task.model_order]
            for weight, task in planner._tensors}
    ours = {each.name: each.choice.params["weight"] for each in ours_of(text, tmp_path).targets}
    assert ours == rows and len(rows) == 30


PLANS = [text for text in CONFIGS if "tokenizer" not in text and "lora" not in text and "text_decoder" not in text
         and "a/b" not in text and "  d:\n" not in text]


@pytest.mark.parametrize("k", range(len(PLANS)))
def test_a_config_is_planned_as_mergekit_plans_it(tmp_path: Path, zoo: Path, k: int, peers):
    from mergekit.architecture import get_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.merge import _model_out_config
    from mergekit.merge_methods.base import ParameterScope
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    text = settled(PLANS[k], zoo)
    theirs, options = MergeConfiguration.model_validate(yaml.safe_load(text)), MergeOptions()
    name = theirs.merge_method
    dialect, spec = Dialect.of(name), peers[name]
    architecture = get_architecture_info(theirs, options)
    out = _model_out_config(theirs, architecture)
    planner = MergePlanner(theirs, architecture, options, out)
    planner._plan()
    ours = ours_of(text, tmp_path)
    targets = {target.name: target for target in ours.targets}
    assert set(targets) == {weight.name for weight, _ in planner._tensors}
    for weight, task in planner._tensors:
        target, base = targets[weight.name], task.base_model if dialect.base != "ignored" else None
        order = [ref for ref in task.model_order if ref != base]
        order = [base, *order] if dialect.peer.first else order
        read = {ref: info.name for ref, info in task.gather_tensors.weight_info.items()}
        apart = None if dialect.peer.first else base
        assert [each.name for each in target.inputs] == [read[ref] for ref in order]
        assert [each.source.name for each in target.inputs] == [Path(ref.model.path).name for ref in order]
        assert (target.base and (target.base.source.name, target.base.name)) == \
            (apart and (Path(apart.model.path).name, read[apart]))
        assert target.choice.method.name == name
        for word in spec.parameters:
            if word.name in dialect.unread:
                continue
            if word.scope == ParameterScope.SHARED:
                given = dialect.settled(word.name, task.parameters[word.name])
                assert target.choice.params[word.name] == given, (weight.name, word.name)
            else:
                row = [task.input_parameters[ref][word.name] for ref in order]
                held = target.choice.params[word.name]
                row = [1.0 if value is None else value for value in row]
                assert (held if isinstance(held, list) else [held] * len(row)) == row, (weight.name, word.name)
    layers = ours.config.get("num_hidden_layers")
    assert layers in (None, out.num_hidden_layers) and (layers or not theirs.modules or out.num_hidden_layers == 4)
    assert ours.config["dtype" if "dtype" in ours.config else "torch_dtype"] in str(out.dtype or out.torch_dtype)


# --- what comes out ---------------------------------------------------------------------------------------------------

EXAMPLES = {
    "arcee_fusion": "models: [{model: a}, {model: b}]\nmerge_method: arcee_fusion\nbase_model: a",
    "bio-merge": "models:\n- {model: a, parameters: {density: 0.53, weight: 0.4}}\n- {model: b, parameters: "
                 "{density: 0.53, "
                 "weight: 0.6}}\nmerge_method: dare_ties\nbase_model: z\nparameters: {int8_mask: true}",
    "gradient-slerp": WRITTEN[6].replace("dtype: bfloat16", ""),
    "linear": "models:\n- {model: a, parameters: {weight: 1.0}}\n- {model: b, parameters: {weight: 0.3}}\n- {model: c, "
              "parameters: {weight: 0.5}}\nmerge_method: linear",
    "orcamini-platy-44layer": "slices:\n- sources: [{model: a, layer_range: [0, 3]}]\n- sources: [{model: b, "
                              "layer_range: "
                              "[1, 4]}]\nmerge_method: passthrough",
    "ties": "models:\n- {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}\n- {model: b, parameters: "
            "{density: "
            "0.5, weight: [0, 0.3, 0.7, 1]}}\n- model: c\n  parameters:\n    density: 0.33\n    weight:\n    - "
            "{filter: mlp, "
            "value: 0.5}\n    - value: 0\nmerge_method: ties\nbase_model: z\nparameters: {normalize: true, "
            "int8_mask: true}",
}
GTA = "base_model: z\nmodels:\n- {model: a, parameters: {weight: [0.2, 0.9], DENSITY}}\n" \
      "- {model: b, parameters: {weight: " \
      "[{filter: mlp, value: [0.8, 0.1]}, {value: 0.6}], DENSITY}}\n- {model: c, parameters: {weight: 0.3, DENSITY}}"
DENSITY = "density: [{filter: self_attn, value: [0.8, 0.4]}, {value: 0.6}]"
METHODS = {
    "linear": "models: [{model: a, parameters: {weight: [0.1, 0.9]}}, {model: b, parameters: {weight: [{filter: mlp, "
              "value: "
              "2}, {value: [1, 0.5, 0.2]}]}}]\nbase_model: z\nparameters: {weight: 0.7, normalize: [true, false]}",
    "slerp": "base_model: b\nmodels: [{model: a}]\nparameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.4}]}",
    "nuslerp": "models: [{model: a, parameters: {weight: [0.1, 0.9]}}, {model: b, parameters: {weight: "
               "1}}]\nbase_model: z",
    "multislerp": "models: [{model: a, parameters: {weight: [1, 2]}}, {model: b}, {model: c}]\nparameters: {weight: 1}",
    "karcher": "models: [{model: a}, {model: b}, {model: c}]\nparameters: {max_iter: 20, tol: 1e-6}",
    "task_arithmetic": GTA.replace(", DENSITY", "") + "\nparameters: {lambda: [0.5, 1.2], normalize: yes}",
    "ties": GTA.replace("DENSITY", DENSITY) + "\nparameters: {lambda: 1.1}",
    "dare_linear": GTA.replace("DENSITY", DENSITY), "dare_ties": GTA.replace("DENSITY", DENSITY),
    "breadcrumbs": GTA.replace("DENSITY", DENSITY) + "\nparameters: {gamma: [{filter: mlp, value: 0.05}, {value: "
                                                     "0.02}]}",
    "breadcrumbs_ties": GTA.replace("DENSITY", DENSITY) + "\nparameters: {gamma: 0.05}",
    "della": GTA.replace("DENSITY", DENSITY) + "\nparameters: {epsilon: 0.1}",
    "della_linear": GTA.replace("DENSITY", DENSITY) + "\nparameters: {epsilon: [0.1, 0.05]}",
    "sce": "base_model: z\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {select_topk: [0.2, 0.7]}",
    "ram": "base_model: z\nmodels: [{model: a}, {model: b}]\nparameters: {epsilon: [0.01, 0.05]}",
    "ramplus_tl": "base_model: z\nmodels: [{model: a}, {model: b}]\nparameters: {epsilon: 0.05, r: [0.1, 0.3]}",
    "model_stock": "base_model: z\nmodels: [{model: a}, {model: b}, {model: c}]\nparameters: {filter_wise: [{filter: "
                   "mlp, "
                   "value: true}, {value: false}]}",
    "nearswap": "base_model: z\nmodels: [{model: a}]\nparameters: {t: [{filter: mlp, value: [0.01, 0.1]}, {value: "
                "0.02}]}",
    "arcee_fusion": "base_model: z\nmodels: [{model: a}, {model: z}]",
    "passthrough": "slices: [{sources: [{model: a, layer_range: [0, 2], parameters: {scale: [{filter: o_proj, value: "
                   "0.5}, "
                   "{value: 1}]}}]}, {sources: [{model: b, layer_range: [1, 4]}]}]",
}
METHODS = {name: f"merge_method: {name}\n{text}" for name, text in METHODS.items()}
CHANCE = {"dare_linear", "dare_ties", "della", "della_linear"}
EXACT = {"linear", "task_arithmetic", "passthrough"}


def method_of(text: str) -> str:
    return yaml.safe_load(text)["merge_method"]


def both(text: str, zoo: Path, folder: Path, types: str) -> tuple[Planned, dict[str, Tensor], dict[str, Tensor]]:
    """Our plan, what we make, and what mergekit makes."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    text = f"{settled(text, zoo)}\n{types}"
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(folder / "theirs"),
              MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0))
    theirs = Checkpoint(folder / "theirs")
    plan = ours_of(text, folder)
    targets = {target.name: target for target in plan.targets} if plan.keeps_order else in_one_order(plan.targets)
    merge = Merge(targets, work=plan.work).glanced()
    return plan, {name: merge.tensor(name) for name in sorted(targets)}, {name: theirs[name] for name in sorted(theirs)}


ALL = {**METHODS, **{f"example {name}": text for name, text in EXAMPLES.items()}}
BITWISE = {f"{name}, {types}": (text, types) for name, text in ALL.items() if method_of(text) in EXACT
           for types in ("dtype: float32", "dtype: float32\nout_dtype: bfloat16")}


@pytest.mark.parametrize("name", BITWISE)
def test_sums_are_mergekits_bit_by_bit(tmp_path: Path, zoo: Path, name: str):
    _, ours, theirs = both(BITWISE[name][0], zoo, tmp_path, BITWISE[name][1])
    assert list(ours) == list(theirs)
    assert sum(int((ours[word] != theirs[word]).sum()) for word in ours) == 0
    assert {tensor.dtype for tensor in ours.values()} == {tensor.dtype for tensor in theirs.values()}


OTHERS = {name: text for name, text in ALL.items() if method_of(text) not in EXACT | CHANCE}


@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_mergekits_within_a_unit_in_the_last_place(tmp_path: Path, zoo: Path, name: str):
    plan, ours, theirs = both(OTHERS[name], zoo, tmp_path, "dtype: float32\nout_dtype: bfloat16")
    assert list(ours) == list(theirs)
    total = beyond = tied = 0
    for target in plan.targets:
        one, other = ours[target.name].double(), theirs[target.name].double()
        scale = sum(each.source.weights[each.name].double().abs() for each in
                    [*target.inputs, *([target.base] if target.base else [])])
        unit = torch.maximum(torch.maximum(one.abs(), other.abs()), scale * 2.0**-16) * 2.0**-7
        off = (one - other).abs() > unit
        ties = off & near_tie(target)
        total, beyond, tied = total + off.numel(), beyond + int((off & ~ties).sum()), tied + int(ties.sum())
    print(f"\n{name}: {total} entries, {tied} at ties of signs or thresholds, {beyond} others beyond one ulp")
    assert beyond == 0 and tied <= 0.02 * total


def near_tie(target) -> Tensor:
    """Where the weighted differences to the base cancel, or one is as large as the threshold it is compared with."""
    params, n = target.choice.params, len(target.inputs)
    inputs = torch.stack([each.source.weights[each.name].double() for each in target.inputs])
    if target.base is None:
        return torch.zeros(target.header.shape, dtype=torch.bool)
    deltas = inputs - target.base.source.weights[target.base.name].double()
    weight = torch.tensor(params.get("weight", [1.0] * n)).double().reshape(-1, *[1] * (deltas.ndim - 1))
    found = (weight * deltas).sum(0).abs() <= 8 * 2.0**-23 * (weight * deltas).abs().sum(0)
    shares = params.get("density", [])
    for k, share in enumerate(shares):
        found |= at_cut(deltas[k].abs(), share, params["gamma"][k] if "gamma" in params else 0.0)
    if "select_topk" in params:  # which of those at the cut is taken decides on the share of each member everywhere
        found |= int(at_cut(deltas.var(0, unbiased=False), params["select_topk"], nonzero=True).sum()) > 1
    return found


def at_cut(sizes: Tensor, share: float, dropped: float = 0.0, nonzero: bool = False) -> Tensor:
    """Where a size is, but for rounding, that of the last that is kept, or of the last that is dropped as too large."""
    if share >= 1:
        return torch.zeros_like(sizes, dtype=torch.bool)
    ordered = sizes.reshape(-1).sort(descending=True).values
    count = int((sizes > 0).sum()) if nonzero else sizes.numel()
    most = min(int(dropped * count), count - int(share * count))
    last = most + int(share * count)
    cuts = [ordered[min(count - 1, k)] for k in (most - 1, most, last - 1, last) if k >= 0]
    return torch.stack([(sizes - cut).abs() <= 1e-6 * cut for cut in cuts]).any(0)


@pytest.mark.parametrize("name", [name for name, text in ALL.items() if method_of(text) in CHANCE])
def test_chance_keeps_as_much_as_mergekits(tmp_path: Path, zoo: Path, name: str):
    plan, ours, theirs = both(ALL[name], zoo, tmp_path, "dtype: float32")
    changed: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
    for target in plan.targets:
        below = target.base.source.weights[target.base.name].float()
        changed["ours"].append((ours[target.name] - below).reshape(-1))
        changed["theirs"].append((theirs[target.name] - below).reshape(-1))
    one, other = (torch.cat(parts).double() for parts in changed.values())
    kept = [float((part != 0).double().mean()) for part in (one, other)]
    sizes = [float(part.square().mean().sqrt()) for part in (one, other)]
    print(f"\n{name}: {kept[0]:.4f} and {kept[1]:.4f} of {len(one)} entries changed, rms {sizes[0]:.5f} and "
          f"{sizes[1]:.5f}")
    assert abs(kept[0] - kept[1]) < 4 * (0.25 / len(one)) ** 0.5 * 2**0.5
    assert abs(sizes[0] / sizes[1] - 1) < 0.03
