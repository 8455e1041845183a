"""Level "block": one model whose later layers stand there whole, once for each expert; gates pick them for a prompt.

An expert brings the attention, norms and MLP of each layer from `dense` on. Embeddings, the layers before that, the
final norm and the head are the trunk's, so even a path through one expert alone is that expert between the trunk's ends
and not the expert itself; level "model" is for that. The model that runs it is glue/kinds/modelling/block_mixture.py.

What a gate judges is the mean state that enters its layer, which depends on the experts chosen below. So sites come one
by one, each read behind the gates that were made for the layers before: a router learns from the very states that are
served. (The paper's code takes them from the input of the layers of one base model.)
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glue.checkpoint import Weights
from glue.errors import MethodError
from glue.kinds import weights
from glue.kinds.frame import config_of, widest
from glue.member import Member
from glue.mix.folder import UNMERGED, agreed, fits, needed, router_tensors, shape_told, stream, write_frame
from glue.mix.layerwise import KNOWN, Batch, Layer, Walk, decisive, pooled
from glue.mix.parts import Dev, Parts
from glue.mix.site import Gate, Site
from glue.mix.vocabulary import check
from glue.writer import SHARD

if TYPE_CHECKING:
    from glue.kinds.modelling.block_mixture import GlueBlockMixtureConfig

def refuse(experts: Sequence[Member], dense: int) -> None:
    """Raise MethodError or CheckpointError unless the layers of these experts can stand side by side from `dense` on.

    Looks at configurations, tokenizers and headers only.
    """
    configs = [config_of(expert) for expert in experts]
    first = configs[0]
    for expert, config in zip(experts, configs, strict=True):
        if config.model_type not in KNOWN:
            raise MethodError(f"'{expert.name}' is of the architecture '{config.model_type}'; whole layers are mixed "
                              f"of {', '.join(KNOWN)}", fix="use level: model, or level: text")
        one, other = decisive(first), decisive(config)
        for key in one:
            if one[key] != other[key]:
                raise MethodError(f"'{experts[0].name}' has {key}: {one[key]}, '{expert.name}' has {other[key]}; their "
                                  f"layers cannot take each other's states and positions",
                                  fix="mix members of one shape, or use level: model")
    if not 0 <= dense <= first.num_hidden_layers:
        raise MethodError(f"{dense} layers are to stay dense, and the experts have {first.num_hidden_layers}",
                          fix=f"set dense_layers to at most {first.num_hidden_layers}")
    check(experts)
    shapes = Layer(first, 0).shapes  # all layers of these architectures have the same
    wanted = {f"model.layers.{i}.{name}": shape for i in range(dense, first.num_hidden_layers)
              for name, shape in shapes.items()}
    for expert in experts:
        fits(f"'{expert.name}'", {name: header for name, header in weights(expert).headers.items()
                                  if _layer(name) >= dense}, wanted)


def _layer(name: str) -> int:
    """The number of the layer that a tensor belongs to, or -1."""
    words = name.split(".")
    return int(words[2]) if words[:2] == ["model", "layers"] else -1


def sites(parts: Parts, dev: Dev) -> Generator[Site, Gate | None, None]:
    """What a router may look at for the gate of each mixed layer, in order; the gate that was made is sent back:

        walk = sites(parts, dev)
        site = next(walk)
        while ...: site = walk.send(router(site))

    Where nothing is sent, as in a plain loop, the next site is read behind the trunk's own layer instead. Holds one
    layer and the states of all dev prompts, in fp32.
    """
    reading = _Reading(parts)
    names, prompts = tuple(expert.name for expert in parts.experts), list(dev.prompts)
    wins, tasks = torch.as_tensor(dev.wins, dtype=torch.float32), torch.as_tensor(dev.tasks)
    for i in range(parts.dense, reading.config.num_hidden_layers):
        gate = yield Site(names, reading.pooled(i, prompts), wins, tasks, prompts, partial(reading.pooled, i), layer=i,
                          seed=dev.seed, where=f"layer {i}")
        reading.passed.append(gate)


class _Reading:
    """Tells the states that enter the layers of a mixture that is being made, behind the gates of the layers below.

    passed  what stands in each layer so far: a gate, or None where the trunk's own layer does
    """

    def __init__(self, parts: Parts):
        assert parts.trunk is not None, "the layers of a block mixture need a trunk around them"
        self.trunk, self.experts = parts.trunk, [weights(expert) for expert in parts.experts]
        self.passed: list[Gate | None] = [None] * parts.dense
        self._walk = Walk(parts.trunk, parts.frame, self._through, device=parts.device)
        self._device = parts.device
        self.config = self._walk.config

    @torch.no_grad()
    def pooled(self, layer: int, texts: Sequence[str]) -> Tensor:
        """The mean state of each text where it enters a layer. [m] -> [m, h] fp32"""
        assert layer <= len(self.passed), f"nothing is decided yet about layer {len(self.passed)}"
        return pooled(self._walk.at(layer, texts), self.config.hidden_size)

    def _through(self, i: int, batches: list[Batch]) -> list[Batch]:
        """The same texts behind layer i."""
        from glue.kinds.modelling.routed import averaged, chosen

        gate, layer = self.passed[i], Layer(self.config, i, device=self._device)
        if gate is None:
            layer.fill(self.trunk)
            return layer.through(batches)
        shares = [chosen(gate.logits(averaged(state, mask).cpu()), gate.top_k).to(state.device)
                  for _, mask, state in batches]
        passed = [torch.zeros_like(state) for _, _, state in batches]
        for j, expert in enumerate(self.experts):
            layer.fill(expert)
            for (_, mask, state), share, out in zip(batches, shares, passed, strict=True):
                rows = share[:, j].nonzero()[:, 0]
                if len(rows):
                    out[rows] += share[rows, j, None, None] * layer(state[rows], mask[rows])
        return [(places, mask, out) for (places, mask, _), out in zip(batches, passed, strict=True)]


def write(out: Path, parts: Parts, gates: Sequence[Gate], *, shard_size: int = SHARD) -> str:
    """Write the mixture into the folder `out`, one tensor after the other; returns the digest of its weights.

    gates  of the layers from parts.dense on, all choosing equally many experts
    Raises MethodError or CheckpointError before anything is written.
    """
    from glue.kinds.modelling.block_mixture import GlueBlockMixtureForCausalLM

    assert parts.trunk is not None, "the layers of a block mixture need a trunk around them"
    refuse((*parts.experts, *(() if parts.frame in parts.experts else (parts.frame,))), parts.dense)
    sources, config = [weights(expert) for expert in parts.experts], _config(parts, gates)
    wanted, tied = needed(config, GlueBlockMixtureForCausalLM)
    taken, made = _taken(wanted, parts, sources), dict[str, Tensor]()
    for i, gate in enumerate(gates, parts.dense):
        made |= router_tensors(gate, f"trunk.model.layers.{i}.router", gate.temperature)
    fits("the trunk", {name: header for name, header in parts.trunk.headers.items() if _layer(name) < parts.dense},
         {part: wanted[name] for name, (source, part) in taken.items() if source is parts.trunk},
         {name.removeprefix("trunk.") for name in tied}, fix=UNMERGED)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        name: shape for name, shape in wanted.items() if name not in taken}, "a gate has another shape than its place"

    config.dtype = widest(source.headers[part] for source, part in taken.values())
    out.mkdir(parents=True, exist_ok=True)
    write_frame(out, config, GlueBlockMixtureForCausalLM, parts.frame)
    return stream(out, taken, made, shard_size=shard_size)


def _config(parts: Parts, gates: Sequence[Gate]) -> GlueBlockMixtureConfig:
    from glue.kinds.modelling.block_mixture import GlueBlockMixtureConfig

    frame, e = config_of(parts.frame), len(parts.experts)
    assert len(gates) == frame.num_hidden_layers - parts.dense, f"{len(gates)} gates, each mixed layer needs one"
    shape = shape_told(frame)
    shape["max_position_embeddings"] = min(config_of(expert).max_position_embeddings for expert in parts.experts)
    k, width = agreed(gates, e)
    return GlueBlockMixtureConfig(shape, experts=e, dense=parts.dense, experts_per_prompt=k, router_width=width)


def _taken(wanted: Iterable[str], parts: Parts, sources: Sequence[Weights]) -> dict[str, tuple[Weights, str]]:
    """Where each tensor comes from and what it is called there; gates come from nowhere."""
    assert parts.trunk is not None, "checked before"
    taken: dict[str, tuple[Weights, str]] = {}
    for name in wanted:
        words = name.split(".")  # trunk.model.layers.3.experts.1.mlp.up_proj.weight
        if "experts" in words:
            taken[name] = sources[int(words[5])], ".".join((*words[1:4], *words[6:]))
        elif "router" not in words:
            taken[name] = parts.trunk, ".".join(words[1:])
    return taken
