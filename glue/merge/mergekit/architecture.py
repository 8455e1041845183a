"""Which tensors a model has: those before its layers, those of each layer, and those behind.

The lists for known architectures are mergekit's data files, read where that package is installed, without importing
it. For all others, and for those whose layers differ from each other, they are made from the names of the tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

INDEX = re.compile(r"\.(\d+)\.")  # the first number that stands alone in a name is that of a layer
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Tables that older checkpoints carry and that models compute for themselves.
COMPUTED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$|\.h\.\d+\.attn\.bias$|"
                      r"^h\.\d+\.attn\.bias$|gpt_neox\.layers\.\d+\.attention\.bias$")
MIXED = ("AfmoeForCausalLM", "Glm4MoeForCausalLM")  # dense layers first, experts later: no one list fits all
_SLOT = re.compile(r"\$\{(layer_index|num_layers)([+-]1)?\}")


@dataclass(frozen=True)
class Weight:
    """One tensor of an architecture; its names may have a slot for the number of the layer.

    optional    a model may lack it
    aliases     other names that it may have in a file
    tied        tensors that it is one with where it is absent
    vocabulary  the axis that token ids index, or None
    forced      the type that it always has, or ""
    """

    name: str
    optional: bool = False
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    vocabulary: int | None = None
    forced: str = ""

    def at(self, layer: int | None, layers: int) -> Weight:
        """The same with its slots filled in."""
        if not any("$" in name for name in (self.name, *self.aliases, *self.tied)):
            return self

        def filled(name: str) -> str:
            return _SLOT.sub(lambda slot: str((layers if slot[1] == "num_layers" else layer or 0) + int(slot[2] or 0)),
                             name)

        return replace(self, name=filled(self.name), aliases=tuple(map(filled, self.aliases)),
                       tied=tuple(map(filled, self.tied)))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its own that it may have in a file."""
        return self.name, *self.aliases


@dataclass(frozen=True)
class Part:
    """A module of an architecture, such as the text decoder.

    key    of config.json that says how many layers there are, dots between levels; "" for none
    fixed  that number where it does not depend on the model
    """

    before: tuple[Weight, ...]
    layer: tuple[Weight, ...]
    after: tuple[Weight, ...]
    key: str = ""
    fixed: int | None = None

    def layers(self, config: Mapping[str, Any], names: Collection[str]) -> int:
        """How many layers a model has: as its config.json says, or as the names of its tensors do."""
        if self.fixed is not None:
            return self.fixed
        path = self.key.split(".") if self.key else []
        for keys in (path, path[-1:], *((key,) for key in LAYER_KEYS if path[-1:] and path[-1] in LAYER_KEYS)):
            found = looked_up(config, keys)
            if isinstance(found, int):
                return found
        patterns = [re.compile(re.escape(weight.name).replace(r"\$\{layer_index\}", r"(\d+)") + "$")
                    for weight in self.layer]
        return max((int(match[1]) + 1 for name in names for pattern in patterns if (match := pattern.match(name))),
                   default=0)

    def weights(self, layers: int) -> Iterator[Weight]:
        """All of a model with so many layers."""
        yield from (weight.at(None, layers) for weight in self.before)
        for k in range(layers):
            yield from (weight.at(k, layers) for weight in self.layer)
        yield from (weight.at(None, layers) for weight in self.after)


@dataclass(frozen=True)
class Architecture:
    """All modules of a model by name. `tagalong`: files that belong to it; `vocabulary_key`: of config.json."""

    name: str
    parts: Mapping[str, Part]
    tagalong: tuple[str, ...] = ()
    vocabulary_key: str = "vocab_size"
    inferred: bool = False

    def alike(self, other: Architecture) -> bool:
        """Whether both have the same tensors."""
        return self.parts == other.parts


def looked_up(config: Any, keys: Sequence[str]) -> Any:
    """What stands in nested mappings at a path of keys, or None."""
    for key in keys:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config if keys else None


def class_of(config: Mapping[str, Any]) -> str:
    """The class of model that config.json names, or ""."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str) else ""


def known(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture that config.json names, if there is a list of its tensors."""
    name = class_of(config)
    candidates = _definitions().get(name, []) if name not in MIXED else []
    if len(candidates) > 1:
        candidates = [each for each in candidates if each[0] == config.get("model_type")]
    return candidates[0][1] if candidates else None


def inferred(models: Sequence[Collection[str]], configs: Sequence[Mapping[str, Any]] = ()) -> Architecture:
    """The architecture that the names of the models' tensors show.

    What stands before the number of the layer is the name of a module, or "default" where all have the same; a tensor
    without a number comes before the layers. One that is not in every layer of every model is optional.
    """
    everywhere = set.intersection(*map(set, models))
    names = set.union(*map(set, models))
    split = {name: match for name in names if (match := INDEX.search(name)) and not COMPUTED.search(name)}
    counts: dict[str, int] = {}
    templates: dict[str, set[str]] = {}
    for name, match in split.items():
        prefix = name[:match.start()]
        counts[prefix] = max(counts.get(prefix, 0), int(match[1]) + 1)
        templates.setdefault(prefix, set()).add(f"{prefix}.${{layer_index}}.{name[match.end():]}")
    if len(counts) == 1:
        (prefix, count), = counts.items()
        counts, templates = {"": count}, {"": templates[prefix]}
    loose: dict[str, list[str]] = {}
    for name in sorted(names - set(split)):
        if not COMPUTED.search(name):
            home = max((prefix for prefix in counts if prefix and name.startswith(prefix)), key=len, default="")
            loose.setdefault(home, []).append(name)

    def templated(template: str, count: int) -> Weight:
        full = [template.replace("${layer_index}", str(k)) for k in range(count)]
        return Weight(template, optional=not everywhere.issuperset(full))

    parts = {}
    for prefix in sorted({*counts, *loose}):
        count = counts.get(prefix, 0)
        parts[prefix or "default"] = Part(tuple(Weight(name, optional=name not in everywhere)
                                                for name in loose.get(prefix, [])),
                                          tuple(templated(each, count) for each in sorted(templates.get(prefix, ()))),
                                          (), _key(configs, count), count)
    return Architecture(next(map(class_of, configs), ""), parts, inferred=True)


def _key(configs: Sequence[Mapping[str, Any]], count: int) -> str:
    """The key of config.json that holds the number of layers, as far as can be told."""
    for path in [(key,) for key in LAYER_KEYS] + [("text_config", key) for key in LAYER_KEYS]:
        if configs and looked_up(configs[0], path) == count:
            return ".".join(path)
    return ""


def completed(architecture: Architecture, extra: Collection[str], layers: int) -> Architecture:
    """The same architecture with tensors that it does not list, all of them optional.

    Those of its first `layers` layers become part of these layers, and all others come before the first.
    """
    parts = dict(architecture.parts)
    prefixes = {weight.name[:weight.name.index(".${layer_index}")]: word for word, part in parts.items()
                for weight in part.layer if ".${layer_index}" in weight.name}
    for name in sorted(extra):
        match = INDEX.search(name)
        word = prefixes.get(name[:match.start()]) if match and int(match[1]) < layers else None
        if match and word:
            weight = Weight(f"{name[:match.start()]}.${{layer_index}}.{name[match.end():]}", optional=True)
            if weight not in parts[word].layer:
                parts[word] = replace(parts[word], layer=(*parts[word].layer, weight))
        else:
            first = next(iter(parts))
            parts[first] = replace(parts[first], before=(*parts[first].before, Weight(name, optional=True)))
    return replace(architecture, parts=parts)


@lru_cache(maxsize=1)
def _definitions() -> dict[str, list[tuple[str, Architecture]]]:
    """Class of model -> its types and what is known of each."""
    found: dict[str, list[tuple[str, Architecture]]] = {}
    spec = find_spec("mergekit")  # finds the package without importing it
    homes = spec.submodule_search_locations or [] if spec else []
    for file in sorted(file for home in homes for file in Path(home, "_data", "architectures").glob("*.json")):
        data = json.loads(file.read_text("utf-8"))
        if data.get("kind", "module") == "modular":
            parts = {name: _part(entry["architecture"], entry.get("weight_prefix") or "")
                     for name, entry in data["modules"].items()}
        else:
            parts = {"default": _part(data, "")}
        for name in data["architectures"]:
            each = Architecture(name, parts, tuple(data.get("tagalong_files") or ()),
                                data.get("vocab_size_config_key") or "vocab_size")
            found.setdefault(name, []).append((data.get("model_type", ""), each))
    return found


def _part(data: Mapping[str, Any], prefix: str) -> Part:
    def optional(entry: Mapping[str, Any]) -> bool:  # newer files do not hold what is computed
        return bool(entry.get("optional") or COMPUTED.search(_SLOT.sub("0", prefix + entry["name"])))

    def weights(entries: list[dict[str, Any]]) -> tuple[Weight, ...]:
        return tuple(Weight(prefix + entry["name"], optional(entry),
                            tuple(prefix + name for name in entry.get("aliases") or ()),
                            tuple(prefix + name for name in entry.get("tied_names") or ()),
                            entry.get("vocabulary_axis"), entry.get("force_dtype") or "") for entry in entries)

    return Part(weights(data["pre_weights"]), weights(data["layer_templates"]["weights"]),
                weights(data["post_weights"]), data.get("num_layers_config_key") or "", data.get("override_num_layers"))
