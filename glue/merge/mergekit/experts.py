"""The models of a mixture by mergekit-moe: what they can become, and whether their parts fit together."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from glue.checkpoint import Checkpoint, Header
from glue.errors import GlueError, MethodError, ZooError, did_you_mean, one_line
from glue.merge.mergekit.moe_words import MoeConfig

OUTPUTS = {"mixtral": "Mixtral", "deepseek": "DeepSeek MoE", "qwen": "Qwen MoE", "qwen3": "Qwen3 MoE"}
TYPES = {"mixtral": ("llama", "mistral"), "deepseek": ("llama", "mistral"), "qwen": ("llama", "mistral", "qwen2"),
         "qwen3": ("qwen3",)}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "hidden_act")
TOP = ("model.embed_tokens.weight", "model.norm.weight")
LAYER = ("input_layernorm.weight", "post_attention_layernorm.weight",
         *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
         *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")))
MORE = {"qwen": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
        "qwen3": ("self_attn.q_norm.weight", "self_attn.k_norm.weight")}
HEAD, DERIVED = "lm_head.weight", "rotary_emb.inv_freq"  # old files hold the second; it follows from the configuration


class Outcome(NamedTuple):
    """What a mixture becomes: mixtral, qwen or qwen3, and notes for people."""

    architecture: str
    notes: tuple[str, ...]


class _Model:
    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder
        self.told = _json(folder / "config.json", name)
        self.weights: Mapping[str, Header] = {tensor: header for tensor, header in Checkpoint(folder).headers.items()
                                              if not tensor.endswith(DERIVED)}


def check_moe(config: MoeConfig, folders: Mapping[str, Path]) -> Outcome:
    """What the mixture will be. Reads configurations, tokenizers and headers, and no weights.

    folders  each of `config.referenced()`, as text -> its folder
    Raises MethodError for models that mergekit-moe would join into something else than is meant, and CheckpointError
    or ZooError for those that are damaged.
    """
    base, architecture = None, ""
    for ref in config.referenced():
        try:
            if str(ref) not in folders:
                raise MethodError(f"no folder is known for '{ref}'{did_you_mean(str(ref), folders)}")
            model = _Model(str(ref), Path(folders[str(ref)]))
            if base is None:
                base, architecture = model, _architecture(config, str(model.told.get("model_type")))
                _speaks(base)
            else:
                _alike(base, model)
                _one_vocabulary(base, model)
            _whole(model, architecture)
        except GlueError as error:
            raise error.at(config.place_of(ref)) from None
    assert base is not None, "there is always a base"
    return Outcome(architecture, tuple(_notes(config, base, architecture)))


def _speaks(base: _Model) -> None:
    if not any((base.folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise MethodError(f"'{base.name}' has no tokenizer, which the mixture is to have and prompts need",
                          fix="put its tokenizer files into its folder")


def _architecture(config: MoeConfig, model_type: str) -> str:
    """What mergekit-moe would choose; raises MethodError where it would choose nothing, or what needs code."""
    shared = config.shared_experts
    prompted = any(expert.positive_prompts or expert.negative_prompts for expert in shared)
    asked = [word for word, name in OUTPUTS.items() if name.lower().startswith(config.architecture.lower())]
    if not asked:
        raise MethodError(f"there is no output '{one_line(config.architecture, 60)}'"
                          f"{did_you_mean(config.architecture.lower(), ('mixtral', 'qwen', 'qwen3'))}")
    known = sorted({name for names in TYPES.values() for name in names})
    if model_type not in known:
        raise MethodError(f"mergekit-moe makes no mixture of '{one_line(model_type, 60)}' models",
                          fix=f"it takes {', '.join(known)}")
    takes = {"mixtral": not shared, "deepseek": len(shared) < 2 and not prompted, "qwen3": not shared,
             "qwen": len(shared) == 1 and (config.gate_mode == "random" or bool(shared[0].positive_prompts))}
    found = [word for word in asked if takes[word] and model_type in TYPES[word]]
    if not found:
        names = " or ".join(OUTPUTS[word] for word in asked)
        raise MethodError(f"{len(config.experts)} {model_type} experts with {len(shared)} shared do not make a {names}",
                          fix="Mixtral and Qwen3 MoE take no shared expert; Qwen MoE takes one, with positive_prompts")
    if found[0] == "deepseek":
        raise MethodError("this would become a DeepSeek MoE, which runs only with code from the hub, and whose rotary "
                          "angles mergekit-moe 0.1.5 loses",
                          fix="give the shared expert positive_prompts and write  architecture: qwen, or leave it out")
    owners = {config.base_model, *(expert.model for expert in config.experts)}
    for expert in shared:
        if expert.model not in owners:
            raise MethodError(f"the shared expert '{expert.model}' is neither the base nor an expert, and mergekit-moe "
                              f"0.1.5 opens no other models", fix="name the base or an expert as shared expert")
    return found[0]


def _alike(base: _Model, model: _Model) -> None:
    """Whether the parts of a model work in the place of the base's."""
    kinds = (base.told.get("model_type"), model.told.get("model_type"))
    if kinds[0] != kinds[1]:
        raise _odd(model, "model_type", kinds[1], kinds[0], base)
    for key in SIZES:
        first, second = base.told.get(key), model.told.get(key)
        if None not in (first, second) and first != second:
            raise _odd(model, key, second, first, base)
    first, second = rotary(base.told), rotary(model.told)
    for key in sorted(set(first) | set(second)):
        if first.get(key) != second.get(key):
            raise _odd(model, key, second.get(key), first.get(key), base)
    for name in sorted(set(base.weights) | set(model.weights)):
        if name == HEAD:  # the base's is taken, and embeddings may be tied in one of the two
            continue
        shapes = [of.weights[name].shape if name in of.weights else None for of in (base, model)]
        if shapes[0] != shapes[1]:
            raise _odd(model, f"the tensor '{name}'", shapes[1] or "nothing", shapes[0] or "nothing", base)


def _odd(model: _Model, key: str, value: Any, other: Any, base: _Model) -> MethodError:
    return MethodError(f"'{model.name}' has {one_line(str(value), 60)} for {key}, and the base '{base.name}' has "
                       f"{one_line(str(other), 60)}; mergekit-moe would join them without a word",
                       fix="experts are tuned from the base or made alike; name another base, or drop this expert")


def rotary(told: Mapping[str, Any]) -> dict[str, Any]:
    """How positions turn a query, in one form, for configurations of transformers 4 and 5 alike."""
    params = told.get("rope_parameters")
    scaling = params if isinstance(params, dict) else told.get("rope_scaling")
    found = {"rope_theta": told.get("rope_theta"), **(scaling if isinstance(scaling, dict) else {})}
    kind = found.pop("type", None) or "default"
    found = {"rope_type": kind, **{key: value for key, value in found.items() if value is not None}}
    return {"rope_theta": 10000.0, **found}


def _whole(model: _Model, architecture: str) -> None:
    """Whether mergekit-moe takes every tensor, and finds all it needs."""
    if model.told.get("quantization_config"):
        raise MethodError(f"'{model.name}' is quantised; mergekit-moe would copy its numbers as they are packed",
                          fix="name the model that it was quantised from")
    layers = model.told.get("num_hidden_layers")
    parts = (*LAYER, *MORE.get(architecture, ()))
    known = {*TOP, HEAD, *(f"model.layers.{k}.{part}" for k in range(layers if isinstance(layers, int) else 0)
                           for part in parts)}
    for name in sorted(set(model.weights) - known):
        what = "a bias" if name.endswith(".bias") else "the tensor"
        raise MethodError(f"'{model.name}' has {what} '{one_line(name)}', which a {OUTPUTS[architecture]} has no place "
                          f"for; mergekit-moe would drop it without a word",
                          fix="only models without biases and additions can be joined into one")
    optional = {HEAD, *(name for name in known if name.endswith(".bias"))}
    for name in sorted(known - optional - set(model.weights)):
        raise MethodError(f"'{model.name}' has no tensor '{name}'", fix="download or write the model again")
    if architecture == "qwen" and model.told.get("model_type") != "qwen2":
        width, heads, each = (model.told.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
        if each and width and heads and each * heads != width:
            raise MethodError(f"'{model.name}' has {heads} heads of {each} for a hidden_size of {width}; mergekit-moe "
                              f"would write biases of another length", fix="leave the shared expert out")


def _one_vocabulary(base: _Model, model: _Model) -> None:
    """Whether a number is the same token to both; where only tokenizer.model says it, whether that is the same."""
    pairs = {name: (base.folder / name, model.folder / name) for name in ("tokenizer.json", "tokenizer.model")}
    found = [name for name, (own, other) in pairs.items() if own.is_file() and other.is_file()]
    if not found or filecmp.cmp(pairs[found[0]][0], pairs[found[0]][1], shallow=False):
        return
    if found[0] == "tokenizer.model":
        raise _odd(model, "its tokenizer.model", "another content", "its own", base)
    first, second = (_tokens(_json(file, model.name)) for file in pairs[found[0]])
    if first != second:
        odd = min(set(first.items()) ^ set(second.items()), key=lambda item: (item[1], item[0]))
        token = odd[0]
        raise _odd(model, f"the number of token {token!r}", second.get(token), first.get(token), base)


def _tokens(told: Mapping[str, Any]) -> dict[str, int]:
    """Token -> number, as tokenizer.json has them."""
    inner = told.get("model")
    listed = inner.get("vocab") if isinstance(inner, dict) else None
    found = {str(piece[0]): k for k, piece in enumerate(listed)} if isinstance(listed, list) else dict(listed or {})
    added = told.get("added_tokens")
    return found | {str(each.get("content")): each.get("id") for each in (added if isinstance(added, list) else [])}


def _notes(config: MoeConfig, base: _Model, architecture: str) -> Iterator[str]:
    count = len(config.experts)
    if count & (count - 1):
        yield f"{count} experts are no power of two, so llama.cpp cannot run the result"
    if base.told.get("sliding_window") and base.told.get("use_sliding_window", True):
        yield (f"'{base.name}' attends to the last {base.told['sliding_window']} tokens only, and mergekit-moe makes a "
               f"{OUTPUTS[architecture]} that attends to all")


def _json(file: Path, name: str) -> dict[str, Any]:
    try:
        told = json.loads(file.read_bytes())
    except OSError:
        raise ZooError(f"'{name}' has no {file.name} in {file.parent}",
                       fix="name a Hugging Face model folder") from None
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        raise ZooError(f"{file} is not a mapping in JSON", fix="download or write it again")
    return told
