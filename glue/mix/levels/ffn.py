"""Level "ffn": one model whose mixed layers hold the MLPs of all experts behind a gate; the rest is the trunk's.

Two ways to route. By token: written as a stock architecture, which plain transformers loads, see glue/mix/stock.py. By
sentence: each layer chooses once for a prompt, which is code of our own, glue/kinds/modelling/ffn_mixture.py.

A gate judges the states behind the second norm of its layer, which depend on the gates below. So sites come one by one,
each read behind the gates that were made for the layers before: a router learns from the very states that are served.
(The paper's code takes the states that enter the layer, which no gate ever sees.)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from glue.errors import MethodError
from glue.kinds import weights
from glue.kinds.frame import config_of, widest
from glue.member import Member
from glue.mix import stock
from glue.mix.folder import (
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
from glue.mix.parts import Dev, Parts
from glue.mix.reading import Reading
from glue.mix.site import Gate, Site
from glue.mix.vocabulary import check
from glue.writer import SHARD

Routing = Literal["token", "sentence"]
TOKENS, ROWS = 4, 4096  # of each prompt that token routing learns from, and of all of them
KNOWN = ("llama", "mistral", "qwen2")
ALIKE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters", "attention_bias", "mlp_bias",
         "sliding_window", "layer_types", "tie_word_embeddings")


def refuse(experts: Sequence[Member], dense: int, *, routing: Routing = "token") -> None:
    """Raise MethodError or CheckpointError unless these experts can share all but their MLPs from layer `dense` on.

    Looks at configurations, tokenizers and headers only.
    """
    configs = [config_of(expert) for expert in experts]
    for expert, config in zip(experts, configs, strict=True):
        if config.model_type not in KNOWN:
            raise MethodError(f"'{expert.name}' is a '{config.model_type}'; MLPs are mixed of {', '.join(KNOWN)}",
                              fix="use level: model, or level: text")
        if routing == "token":
            stock.refuse(expert.name, config, dense)
    for expert, config in zip(experts[1:], configs[1:], strict=True):
        for key in ALIKE:
            one, other = getattr(configs[0], key, None), getattr(config, key, None)
            if one != other:
                raise MethodError(f"'{experts[0].name}' has {key}: {one}, '{expert.name}' has {other}; with one "
                                  f"attention around them, the MLPs of one would not see what they are used to",
                                  fix="mix members that agree in it, or use level: model")
    check(experts)
    layers = configs[0].num_hidden_layers
    if not 0 <= dense <= layers:
        raise MethodError(f"{dense} layers are to stay dense, and the experts have {layers}",
                          fix=f"set dense_layers to at most {layers}")
    wanted, tied = needed(configs[0])
    for expert in experts:
        fits(f"'{expert.name}'", weights(expert).headers, wanted, tied)


def sites(parts: Parts, dev: Dev, *, routing: Routing = "token") -> Generator[Site, Gate | None, None]:
    """What a router may look at for the gate of each mixed layer, in order; the gate that was made is sent back:

        walk = sites(parts, dev)
        site = next(walk)
        while ...: site = walk.send(router(site))

    Where nothing is sent, as in a plain loop, the next site is read behind equal weights for all experts. A state is
    the mean over the tokens of a prompt, or where the gate will judge token by token one token of it, a few of each;
    states of texts that a router brings are means there too. Holds the states of all dev prompts in fp32, and one layer
    of the trunk or one MLP.
    """
    reading = Reading(parts, routing == "sentence")
    names, prompts, m = tuple(expert.name for expert in parts.experts), list(dev.prompts), len(dev.prompts)
    r = max(1, min(TOKENS, ROWS // max(m, 1))) if routing == "token" else 1
    drawn = torch.rand(m, r, generator=torch.Generator().manual_seed(dev.seed))
    shares = (torch.arange(r) + drawn) / r  # one token of each part of a prompt
    row = torch.arange(m).repeat_interleave(r)
    wins, tasks = torch.as_tensor(dev.wins, dtype=torch.float32)[row], torch.as_tensor(dev.tasks)[row]
    for i in range(parts.dense, reading.config.num_hidden_layers):
        seen = reading.tokens(i, prompts, shares) if routing == "token" else reading.pooled(i, prompts)
        gate = yield Site(names, seen, wins, tasks, [prompts[j] for j in row], partial(reading.pooled, i), layer=i,
                          seed=dev.seed, affine=routing == "sentence", where=f"layer {i}")
        reading.gates.append(gate)


def write(out: Path, parts: Parts, gates: Sequence[Gate], *, shard_size: int = SHARD,
          routing: Routing = "token") -> str:
    """Write the mixture into the folder `out`, one tensor after the other; returns the digest of its weights.

    gates  one for each layer from parts.dense on
    Raises MethodError or CheckpointError before anything is written.
    """
    from glue.kinds.modelling.ffn_mixture import GlueFfnMixtureConfig, GlueFfnMixtureForCausalLM

    assert parts.trunk is not None, "MLPs need a trunk around them"
    refuse([*parts.experts, *([parts.frame] if parts.frame not in parts.experts else [])], parts.dense, routing=routing)
    config, sources = config_of(parts.frame), [weights(expert) for expert in parts.experts]
    assert len(gates) == config.num_hidden_layers - parts.dense, f"{len(gates)} gates, each mixed layer needs one"
    k, width = agreed(gates, len(sources))
    wanted, tied = needed(config)
    mixed = {name for name in {*wanted, *parts.trunk.headers} if _mixed(name, parts.dense)}
    fits("the trunk", {name: header for name, header in parts.trunk.headers.items() if name not in mixed},
         {name: shape for name, shape in wanted.items() if name not in mixed}, tied, fix=UNMERGED)
    kind = widest(header for source in (parts.trunk, *sources) for header in source.headers.values())

    renamed: Callable[[str, int | None], str]
    made: dict[str, Tensor] = {}
    told: Any
    if routing == "token":
        told = stock.stock_config(config, len(sources), parts.dense, k)
        made, renamed = stock.stock_gates(told, gates, parts.dense, kind), partial(stock.stock_name, told.model_type)
    else:
        told = GlueFfnMixtureConfig(shape_told(config), experts=len(sources), dense=parts.dense, experts_per_prompt=k,
                                    router_width=width)
        renamed = _own_name
        for i, gate in enumerate(gates, parts.dense):
            made |= router_tensors(gate, f"trunk.model.layers.{i}.mlp.router", gate.temperature)
    taken = {renamed(name, None): (parts.trunk, name) for name in wanted if name not in mixed}
    taken |= {renamed(name, i): (source, name) for name in wanted if name in mixed for i, source in enumerate(sources)}

    out.mkdir(parents=True, exist_ok=True)
    told.dtype = kind
    if routing == "token":
        stock.write_stock_config(told, out)
        write_words(out, parts.frame)
    else:
        write_frame(out, told, GlueFfnMixtureForCausalLM, parts.frame)
    return stream(out, taken, made, kind=kind, shard_size=shard_size)


def _mixed(name: str, dense: int) -> bool:
    """Whether a tensor belongs to an MLP that the experts bring."""
    words = name.split(".")
    return words[:2] == ["model", "layers"] and words[3] == "mlp" and int(words[2]) >= dense


def _own_name(name: str, expert: int | None) -> str:
    return f"trunk.{name}" if expert is None else f"trunk.{name.replace('.mlp.', f'.mlp.experts.{expert}.')}"
