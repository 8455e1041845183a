"""Level "model": whole models side by side; one decision for a prompt.

dense = 0  Each expert is there whole, with embeddings, norm and head of its own, so one that is chosen alone answers
           bit for bit as it does without the others. Experts may differ in shape, but not in vocabulary. One of them,
           the frame, reads the prompt for the router.
dense > 0  Embeddings and the first layers are the trunk's, and the router judges the state that leaves them. Each
           expert has its later layers, its norm and its head.
dense = L  Nothing is left that experts could differ in, so what is written is the trunk as the plain model it is.

Experts that were tuned from one base can be stored as that base and low-rank changes of it; see glue/mix/compress.py.

The model that runs it is glue/kinds/modelling/model_mixture.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glue.checkpoint import Weights
from glue.errors import CheckpointError, MethodError
from glue.files import write_aside
from glue.kinds import weights
from glue.kinds.frame import config_of, copy_frame, widest
from glue.member import Member
from glue.mix.compress import NOTE, Energy, Packed, Rank
from glue.mix.folder import (
    DERIVED,
    UNMERGED,
    agreed,
    fits,
    needed,
    router_tensors,
    shape_told,
    stream,
    write_frame,
    write_words,
)
from glue.mix.layerwise import KNOWN, decisive, states_within
from glue.mix.parts import Dev, Parts
from glue.mix.site import Gate, Site, pooled_states
from glue.mix.vocabulary import check
from glue.writer import SHARD

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from glue.kinds.modelling.model_mixture import GlueModelMixtureConfig

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def refuse(experts: Sequence[Member], dense: int, *, kept: Rank | Energy | None = None) -> None:
    """Raise MethodError or CheckpointError unless these experts can stand side by side behind one router.

    kept  of what each of them changes of one base, so that all tensors have one shape and type; None is everything
    Looks at configurations, tokenizers and headers only.
    """
    check(experts)
    configs = [config_of(expert) for expert in experts]
    layers = configs[0].num_hidden_layers
    if not 0 <= dense <= layers:
        raise MethodError(f"{dense} layers are to stay dense, and the experts have {layers}",
                          fix=f"set dense_layers to at most {layers}")
    for expert, config in zip(experts, configs, strict=True):
        if dense:
            _divisible(experts[0], configs[0], expert, config)
        fits(f"'{expert.name}'", weights(expert).headers, *needed(config))
    if kept is not None and dense == layers:
        raise MethodError(f"all {layers} layers are dense, so there are no changes of experts to compress",
                          fix="leave compress out, or set dense_layers lower")
    if kept is not None:
        for expert in experts[1:]:
            _comparable(experts[0], expert)


def _comparable(first: Member, expert: Member) -> None:
    """Raise MethodError unless one can be stored as a change of the other."""
    both: list[dict[str, Any]] = [
        {name: (header.shape, str(header.dtype).removeprefix("torch."))
         for name, header in weights(member).headers.items() if not name.endswith(DERIVED)}
        | {"tie_word_embeddings": config_of(member).tie_word_embeddings} for member in (first, expert)]
    for name in sorted(set(both[0]) | set(both[1])):
        one, other = (found.get(name, "nothing") for found in both)
        if one != other:
            raise MethodError(f"'{first.name}' has '{name}' as {one}, '{expert.name}' as {other}; compress stores what "
                              f"experts changed of one model", fix="leave compress out, or mix members of one shape")


def _divisible(first: Member, like: PretrainedConfig, expert: Member, config: PretrainedConfig) -> None:
    """Raise MethodError unless the later layers of both can stand on one trunk."""
    if config.model_type not in KNOWN:
        raise MethodError(f"'{expert.name}' is of the architecture '{config.model_type}'; dense layers are shared by "
                          f"{', '.join(KNOWN)}", fix="leave dense_layers at 0")
    one, other = decisive(like), decisive(config)
    for key in one:
        if one[key] != other[key]:
            raise MethodError(f"'{first.name}' has {key}: {one[key]}, '{expert.name}' has {other[key]}; they cannot "
                              f"share their first layers", fix="mix members of one shape, or leave dense_layers at 0")


def sites(parts: Parts, dev: Dev, *, layer: int = -1) -> list[Site]:
    """What the router may look at: the mean state of each prompt where the gate will judge it.

    layer  which of the frame's hidden states are judged, where dense is 0. The last by default; a low one spares the
           layers above it when a prompt is read
    There is none where all layers are dense: nothing is to be decided.
    """
    count = config_of(parts.experts[_reader(parts)]).num_hidden_layers
    if parts.dense == count:
        return []
    _in_range(layer, count)
    names, wins = tuple(expert.name for expert in parts.experts), torch.as_tensor(dev.wins, dtype=torch.float32)
    states, layer = _states(parts, layer % (count + 1)), parts.dense or layer
    return [Site(names, states(dev.prompts), wins, torch.as_tensor(dev.tasks), list(dev.prompts), states,
                 _reader(parts), layer, dev.seed)]


def _states(parts: Parts, layer: int) -> Callable[[Sequence[str]], Tensor]:
    """The function from texts to the states that the router judges. [m] -> [m, h] fp32"""
    reader = parts.experts[_reader(parts)]
    if parts.dense or config_of(reader).model_type in KNOWN:
        source, frame, at = (parts.trunk, parts.frame, parts.dense) if parts.dense else (weights(reader), reader, layer)
        assert source is not None, "dense layers need a trunk"
        return partial(states_within, source, frame, at, device=parts.device)
    running = parts.place.load(reader)
    return lambda texts: pooled_states(running, texts, layer)


def _reader(parts: Parts) -> int:
    """The expert that is the frame, or the first."""
    return parts.experts.index(parts.frame) if parts.frame in parts.experts else 0


def _in_range(layer: int, count: int) -> None:
    if not -count - 1 <= layer <= count:
        raise MethodError(f"the router is to judge the states that enter layer {layer}, and the reader has {count}",
                          fix=f"set it to 0 (embeddings) up to {count} (after the last), or to -1, which is the same")


def write(out: Path, parts: Parts, gates: Sequence[Gate], *, shard_size: int = SHARD, layer: int = -1,
          kept: Rank | Energy | None = None) -> str:
    """Write the mixture into the folder `out`, one tensor after the other; returns the digest of its weights.

    gates  one, or none where all layers are dense
    layer  as it was for `sites`
    kept   of what experts change of the trunk, which is then needed without dense layers too; what that loses is told
           in compress.json. None stores them whole
    Raises MethodError or CheckpointError before anything is written, also where compression saves nothing.
    """
    from glue.kinds.modelling.model_mixture import GlueModelMixtureForCausalLM

    refuse([*parts.experts, *([parts.frame] if parts.dense and parts.frame not in parts.experts else [])], parts.dense,
           kept=kept)
    assert (parts.trunk is None) == (parts.dense == 0 and kept is None), "a trunk goes with what is shared"
    count = config_of(parts.experts[_reader(parts)]).num_hidden_layers
    if parts.dense == count:
        return _plain(out, parts, shard_size)
    gate, = gates
    _in_range(layer, count)
    taken: dict[str, tuple[Weights, str]] = _taken(parts)
    made = router_tensors(gate, "router")
    config = _config(parts, gate, layer)
    config.dtype = widest(source.headers[part] for source, part in taken.values())
    _complete(config, {name: source.headers[part].shape for name, (source, part) in taken.items()}
              | {name: tuple(tensor.shape) for name, tensor in made.items()})

    out.mkdir(parents=True, exist_ok=True)
    if kept is not None:
        packed = _packed(out, parts, taken, kept)
        taken = {name: (packed, name) for name in packed} | {
            name: found for name, found in taken.items() if not name.startswith("expert_")}
        _write_as_changes(out, config, parts.frame)
    else:
        write_frame(out, config, GlueModelMixtureForCausalLM, parts.frame)
    return stream(out, taken, made, shard_size=shard_size)


def _packed(out: Path, parts: Parts, taken: Mapping[str, tuple[Weights, str]], kept: Rank | Energy) -> Packed:
    """The experts as changes of the trunk, and beside them, in compress.json, what that loses."""
    assert parts.trunk is not None, "checked before"
    own = {name.removeprefix("expert_0."): part for name, (_, part) in taken.items() if name.startswith("expert_0.")}
    packed = Packed(parts.trunk, [weights(expert) for expert in parts.experts], own, kept, out)
    loss = packed.loss
    if loss.after >= loss.before:
        raise MethodError(f"compressed, the experts and their base would take {loss.after:,} bytes, and without a base "
                          f"they take {loss.before:,}", fix="keep less, name the base that they were tuned from, or "
                                                            "leave compress out")
    write_aside(out / NOTE, json.dumps({"svd": kept.spelled(), **loss.as_dict()}, indent=1) + "\n")
    return packed


def _plain(out: Path, parts: Parts, shard_size: int) -> str:
    """The trunk as a model like any other."""
    trunk = parts.trunk
    assert trunk is not None, "a trunk goes with dense layers"
    out.mkdir(parents=True, exist_ok=True)
    digest = stream(out, {name: (trunk, name) for name in trunk.headers}, {}, shard_size=shard_size)
    copy_frame(parts.frame, out)
    return digest


def _config(parts: Parts, gate: Gate, layer: int) -> GlueModelMixtureConfig:
    from glue.kinds.modelling.model_mixture import GlueModelMixtureConfig

    k, width = agreed([gate], len(parts.experts))
    return GlueModelMixtureConfig(
        [shape_told(config_of(expert)) for expert in parts.experts], experts_per_prompt=k, reader=_reader(parts),
        layer=-1 if parts.dense else layer, router_width=width, router_temperature=float(gate.temperature),
        dense=parts.dense)


def _taken(parts: Parts) -> dict[str, tuple[Weights, str]]:
    """What the mixture calls each tensor that it takes over -> where it comes from, and what it is called there."""
    taken: dict[str, tuple[Weights, str]] = {}
    dense = parts.dense
    if dense:
        assert parts.trunk is not None, "checked before"
        wanted, _ = needed(config_of(parts.frame))
        for name in parts.trunk.headers:
            if name in wanted and (name == EMBEDDINGS or _layer(name) in range(dense)):
                taken[f"trunk.{name.removeprefix('model.')}"] = parts.trunk, name
    for i, expert in enumerate(parts.experts):
        source, (wanted, tied) = weights(expert), needed(config_of(expert))
        for name in source.headers:
            depth = _layer(name)
            if name not in wanted or (dense and (name == EMBEDDINGS or depth in range(dense))):
                continue
            moved = name if depth < dense else name.replace(f"layers.{depth}.", f"layers.{depth - dense}.", 1)
            taken[f"expert_{i}.{moved if dense else name}"] = source, name
        if dense and HEAD in tied:
            taken[f"expert_{i}.{HEAD}"] = source, EMBEDDINGS
    return taken


def _layer(name: str) -> int:
    """The number of the layer that a tensor belongs to, or -1."""
    words = name.split(".")
    return int(words[2]) if words[:2] == ["model", "layers"] else -1


def _complete(config: GlueModelMixtureConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless these are all tensors of the mixture. Experts are known to fit, a trunk is not."""
    from glue.kinds.modelling.model_mixture import GlueModelMixtureForCausalLM

    wanted, _ = needed(config, GlueModelMixtureForCausalLM)
    for name in sorted(set(wanted) | set(found)):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(f"the mixture needs '{name}' as {wanted.get(name, 'nothing')}, and there is "
                                  f"{found.get(name, 'nothing')}", fix=UNMERGED)


def _write_as_changes(out: Path, config: GlueModelMixtureConfig, frame: Member) -> None:
    """The frame of experts that are stored as changes: it needs glue to be read, so no code lies beside it."""
    from glue.kinds.modelling.compressed_mixture import GlueCompressedMixtureConfig, GlueCompressedMixtureForCausalLM

    told = GlueCompressedMixtureConfig.of(config)
    told.architectures = [GlueCompressedMixtureForCausalLM.__name__]
    told.save_pretrained(out)
    write_words(out, frame)
