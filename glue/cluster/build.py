"""What models are built like, from configurations and headers, as far as it decides which of them can be merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

HARD = {"model_type": "architecture", "num_hidden_layers": "layers", "hidden_size": "width",
        "intermediate_size": "width of the MLP", "num_attention_heads": "heads",
        "num_key_value_heads": "key-value heads", "head_dim": "size of a head", "hidden_act": "activation",
        "n_head": "heads", "activation_function": "activation"}  # the last two are GPT-2's words
SOFT = {"rms_norm_eps": "epsilon of the norms", "layer_norm_eps": "epsilon of the norms",
        "sliding_window": "attention window"}
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
UNSAID = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}  # what silence means
OF_TOKENS = ("embed_tokens.", "lm_head.", "wte.", "embed_in.", "embed_out.", "word_embeddings.")  # first axis: tokens
ENOUGH = 0.9  # share of tokens that must have the same number in both, for their embeddings to be rows of like meaning


@dataclass(frozen=True)
class Build:
    """How a model is made.

    config  its configuration, as the file has it
    shapes  of every tensor
    tokens  token -> its number; empty where that is not known
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    tokens: Mapping[str, int] = field(default_factory=dict)


def differences(one: Build, other: Build) -> tuple[str, tuple[str, ...]]:
    """(what keeps them apart, "" if nothing does; what a merge survives if something is done about it)."""
    hard = _keys(one, other, HARD)
    shapes = _shapes(one, other)
    apart, soft = _tokens(one, other)
    soft += _tied(one, other) + _rope(one, other) + [f"different {told}" for told in _keys(one, other, SOFT)]
    return f"different {', '.join(hard)}" if hard else shapes or apart, tuple(soft)


def _keys(one: Build, other: Build, names: Mapping[str, str]) -> list[str]:
    """Values that both state and that differ."""
    pairs = [(told, _stated(one.config, key), _stated(other.config, key)) for key, told in names.items()]
    return [f"{told} ({a} and {b})" for told, a, b in pairs if a is not None and b is not None and a != b]


def _stated(config: Mapping[str, Any], key: str) -> Any:
    """A value, or what its absence means."""
    value = config.get(key)
    if value is None and key == "num_key_value_heads":
        return config.get("num_attention_heads")
    if value is None and key == "head_dim" and config.get("num_attention_heads") and config.get("hidden_size"):
        return config["hidden_size"] // config["num_attention_heads"]
    return value


def _shapes(one: Build, other: Build) -> str:
    """The first tensor that is not in both, or has other extents than the number of tokens."""
    for name in sorted(set(one.shapes) | set(other.shapes)):
        of_tokens = any(word in name for word in OF_TOKENS)
        a, b = one.shapes.get(name), other.shapes.get(name)
        if a is None or b is None:
            if of_tokens and "lm_head" in name:
                continue
            return f"different shapes: '{name}' is only in the {'first' if b is None else 'second'}"
        if a[of_tokens:] != b[of_tokens:]:
            return f"different shapes: '{name}' is {list(a)} and {list(b)}"
    return ""


def _tokens(one: Build, other: Build) -> tuple[str, list[str]]:
    """Differences in vocabulary: (one that keeps them apart, those that can be mended)."""
    sizes = [next((shape[0] for name, shape in sorted(build.shapes.items())
                   if any(word in name for word in OF_TOKENS) and shape), 0) for build in (one, other)]
    soft = []
    if sizes[0] != sizes[1]:
        soft.append(f"vocabulary differs: {sizes[0]} and {sizes[1]} rows; give both the same tokenizer first")
    if one.tokens and other.tokens and one.tokens is not other.tokens:
        same = sum(other.tokens.get(token) == number for token, number in one.tokens.items())
        fewer = min(len(one.tokens), len(other.tokens))
        if same < ENOUGH * fewer:
            return f"vocabulary differs: only {same} of {fewer} tokens have the same number in both", []
        if same < fewer:
            soft.append(f"vocabulary differs: {fewer - same} of {fewer} tokens have another number")
    return "", soft


def _tied(one: Build, other: Build) -> list[str]:
    has = [any("lm_head" in name for name in build.shapes) for build in (one, other)]
    return ["only one has an output layer of its own, the other uses its embedding: merge with --untie"] \
        if has[0] != has[1] else []


def _rope(one: Build, other: Build) -> list[str]:
    a, b = (_turned(build.config) for build in (one, other))
    told = ", ".join(f"{key} {a.get(key, 'none')} and {b.get(key, 'none')}" for key in sorted(set(a) | set(b))
                     if a.get(key) != b.get(key))
    return [f"rotary embedding differs ({told}): positions mean other angles in the two"] if told else []


def _turned(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says of rotary embeddings, in whichever of its dialects, as one flat mapping."""
    found: dict[str, Any] = {}
    for key in ROPE:
        value = config.get(key)
        if isinstance(value, Mapping):
            found |= {"rope_type" if name == "type" else name: inner for name, inner in value.items()}
        elif value is not None:
            found[key] = value
    return {**UNSAID, **{key: float(value) if isinstance(value, int | float) else value
                         for key, value in found.items() if value is not None}}
