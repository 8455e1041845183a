"""The layout of a result: its modules and layers, and for each the slice and the settings that make it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glue.errors import Place, RecipeError, did_you_mean
from glue.merge.mergekit import architecture as lists
from glue.merge.mergekit.architecture import COMPUTED, LAYER_KEYS, Architecture, Part, Weight, looked_up
from glue.merge.mergekit.nouns import Config, Loc, Model, ModelRef, Settings, Slice, Source

BY_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists in config.json with an entry for each layer


@dataclass(frozen=True)
class Stretch:
    """Tensors that are made alike: those before the layers of a module, those of one layer, or those behind.

    tensors  of the result, each with the tensors of the sources, in their order
    scopes   settings that hold for all sources, the nearest first, without those of the top level
    locs     where these stand
    t        the place among the layers of the slice, from 0 to 1
    origin   of a layer: the first model and the layer of it that this is made of
    """

    sources: tuple[Source, ...]
    base: ModelRef | None
    tensors: tuple[tuple[Weight, list[Weight]], ...]
    scopes: tuple[Settings, ...]
    locs: tuple[Loc, ...]
    t: float
    module: str
    origin: tuple[ModelRef, int] | None = None


def architecture_of(config: Config, models: Sequence[Model]) -> tuple[Architecture, list[str]]:
    """The architecture of the result, and notes. Raises RecipeError where the models' differ."""
    names = [[name for name in model.weights.headers if not COMPUTED.search(name)] for model in models]
    configs = [_config(model) for model in models]
    listed = [lists.known(each) for each in configs]
    first = listed[0]
    if first is None or any(each is None for each in listed):
        return lists.inferred(names, configs), []
    for model, other in zip(models, listed, strict=True):
        if other and not other.alike(first):
            raise RecipeError(f"'{model.ref}' is a {other.name} and '{models[0].ref}' a {first.name}; only models of "
                              f"one architecture can be merged", place=place_of(config, model.ref),
                              fix="drop the odd one")
    extra, layers = set(), 0
    for own, each in zip(names, configs, strict=True):
        layers = max(layers, *(part.layers(each, own) for part in first.parts.values()))
        usual = {name for part in first.parts.values() for weight in part.weights(part.layers(each, own))
                  for name in (*weight.names, *weight.tied)}
        extra |= set(own) - usual
    if not extra or any(".experts." in name for name in extra):  # a list has them together, a file may have them apart
        return first, []
    if any(piece for _, piece, _ in config.groups()):  # where layers move, one behind the last belongs nowhere
        extra = {name for name in extra if not (match := lists.INDEX.search(name)) or int(match[1]) < layers}
    one = min(extra, default="")
    more = f" and {len(extra) - 1} more are" if len(extra) > 1 else " is"
    note = f"'{one}'{more} not on mergekit's list for {first.name}, and merged all the same"
    return lists.completed(first, extra, layers), [note] if extra else []


def _config(model: Model) -> Mapping[str, Any]:
    forced = model.ref.architecture
    return {**model.config, "architectures": [forced]} if forced else model.config


def place_of(config: Config, ref: ModelRef) -> Place:
    """Where a config first names a model."""
    loc = next((source.loc for sources, _, _ in config.groups() for source in sources if source.model == ref), None)
    return config.place(*loc, "model") if loc else config.place("base_model")


def laid_out(config: Config, architecture: Architecture, opened: Mapping[ModelRef, Model]) -> Iterator[Stretch]:
    """Every stretch of the result, in order. Raises RecipeError for modules and layers that are not there."""
    for name, module, slices in _modules(config, architecture, opened):
        part = architecture.parts[name]
        total = sum(end - begin for begin, end in (each.sources[0].layers or (0, 0) for each in slices))
        above: tuple[Settings, ...] = (module.settings,) if module else ()
        beside: tuple[Loc, ...] = (module.loc,) if module else ()
        done = 0

        def stretch(each: Slice, tensors: Iterator[tuple[Weight, list[Weight]]], t: float, origin: Any = None,
                    above: Any = above, beside: Any = beside, name: str = name) -> Stretch:
            return Stretch(each.sources, each.base or config.base_model, tuple(tensors), (each.settings, *above),
                           (each.loc, *beside), t, name, origin)

        def outside(weights: tuple[Weight, ...], each: Slice, total: int = total) -> Iterator[Any]:
            for weight in (weight.at(None, total) for weight in weights):
                yield weight, [weight] * len(each.sources)

        yield stretch(slices[0], outside(part.before, slices[0]), 0.0)
        for each in slices:
            begins = [source.layers[0] if source.layers else 0 for source in each.sources]
            length = each.sources[0].layers[1] - begins[0] if each.sources[0].layers else 0
            for k in range(length):
                t = k / (length - 1) if length > 1 else 1.0
                yield stretch(each, ((weight.at(done, total), [weight.at(begin + k, total) for begin in begins])
                                     for weight in part.layer), t, (each.sources[0].model, begins[0] + k))
                done += 1
        yield stretch(slices[-1], outside(part.after, slices[-1]), 0.0)


def _modules(config: Config, architecture: Architecture, opened: Mapping[ModelRef, Model]) -> Iterator[tuple]:
    """Name, what the config says of it, and slices with their layers, of every module of the result."""
    parts = architecture.parts
    if config.slices and len(parts) != 1:
        raise RecipeError(f"these models have {len(parts)} modules ({', '.join(parts)}), so 'slices' does not say of "
                          f"which", place=config.place("slices"), fix="write  modules: {name: {slices: [...]}}")
    for name in config.modules:
        if name not in parts:
            raise RecipeError(f"these models have no module '{name}'{did_you_mean(name, parts)}",
                              place=config.place("modules", name))
    for name, part in parts.items():
        module = config.modules.get(name)
        if config.modules and module is None:
            continue
        models = module.models if module else config.models
        slices = module.slices if module else config.slices
        if models:
            listed = [*models]
            if config.base_model and config.base_model not in [source.model for source in models]:
                listed.append(Source(config.base_model, None, {}, ()))
            ranges = [(0, _layers(part, opened[source.model])) for source in listed]
            odd = next((k for k, each in enumerate(ranges) if each != ranges[0]), None)
            if odd is not None:
                raise RecipeError(f"'{listed[odd].model}' has {ranges[odd][1]} layers and '{listed[0].model}' has "
                                  f"{ranges[0][1]}", place=place_of(config, listed[odd].model),
                                  fix="drop the odd one, or choose layers with  slices:")
            whole = tuple(Source(source.model, layers, source.settings, source.loc)
                          for source, layers in zip(listed, ranges, strict=True))
            slices = (Slice(whole),)
        for each in slices:
            for source in each.sources:
                count = _layers(part, opened[source.model])
                if source.layers and source.layers[1] > max(count, source.layers[0]):
                    raise RecipeError(f"'{source.model}' has {count} layers, and the layer_range goes to "
                                      f"{source.layers[1]}", place=config.place(*source.loc, "layer_range"),
                                      fix=f"layers are counted from 0; the last is {count - 1}, so end with {count}")
        yield name, module, slices


def _layers(part: Part, model: Model) -> int:
    return part.layers(model.config, model.weights.headers)


def changes(config: Config, architecture: Architecture, opened: Mapping[ModelRef, Model],
            stretches: Collection[Stretch]) -> dict[str, Any]:
    """What becomes different in config.json: the number of layers, and lists with an entry for each layer."""
    found: dict[str, Any] = {}
    for name, part in architecture.parts.items():
        origins = [each.origin for each in stretches if each.module == name and each.origin]
        if not origins or not (config.slices or (config.modules and config.modules[name].slices)) or not part.key:
            continue
        donor = opened[config.base_model or config.referenced()[0]].config
        key = part.key if looked_up(donor, part.key.split(".")) is not None else next(
            (word for word in LAYER_KEYS if isinstance(donor.get(word), int)), part.key)
        found[key] = len(origins)
        *above, _ = key.split(".")
        for word in BY_LAYER:
            said = {ref: looked_up(opened[ref].config, [*above, word]) for ref, _ in origins}
            if all(isinstance(each, list) for each in said.values()):
                found[".".join([*above, word])] = [said[ref][layer] for ref, layer in origins if layer < len(said[ref])]
    return found
