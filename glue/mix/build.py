"""Writing a mixture: experts stream one tensor at a time into a folder that transformers can load."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from glue.checkpoint import Header, Weights
from glue.errors import CheckpointError, MethodError
from glue.family import Choice
from glue.kinds import weights
from glue.kinds.frame import config_of, generation_of, tokenizer_of, widest
from glue.member import Member
from glue.mix.site import Gate, Site
from glue.writer import Writer

if TYPE_CHECKING:
    from glue.kinds.modelling.model_mixture import GlueModelMixtureConfig

NOISE = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
DERIVED = "rotary_emb.inv_freq"  # old Llama files hold it; it follows from the configuration


def build(out: Path, experts: Sequence[Member], router: Choice, site: Site, *,
          shard_size: int = 5_000_000_000) -> str:
    """Make the gate and write the mixture into the folder `out`; returns the digest of its weights.

    experts  models and adapters of one vocabulary, in the order of site.names
    site     what the router sees; also says which expert is the reader
    Raises MethodError or CheckpointError before anything is written.
    """
    check(experts)
    gate = _sound(router(site), router, site)
    sources = [weights(expert) for expert in experts]
    config = _config(experts, sources, gate, site)
    taken = {f"expert_{i}.{name}": (source, name) for i, source in enumerate(sources) for name in source.headers}
    routing = _router_tensors(gate)
    _fit(config, taken, routing, experts)
    headers = {name: Header(source.headers[part].dtype, source.headers[part].shape)
               for name, (source, part) in taken.items()}
    headers |= {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in routing.items()}

    out.mkdir(parents=True, exist_ok=True)
    _write_frame(out, config, experts[site.reader])
    with Writer(out, headers, shard_size=shard_size) as writer:
        for name, (source, part) in taken.items():
            writer.write(name, source[part])
        for name, tensor in routing.items():
            writer.write(name, tensor)
        return writer.close()


def check(experts: Sequence[Member]) -> None:
    """Raise MethodError unless all experts have one vocabulary, token by token."""
    first, vocabulary = experts[0], tokenizer_of(experts[0]).get_vocab()
    rows = config_of(first).vocab_size
    for expert in experts[1:]:
        other = tokenizer_of(expert).get_vocab()
        if other != vocabulary or config_of(expert).vocab_size != rows:
            odd = sorted(set(vocabulary.items()) ^ set(other.items()), key=lambda item: (item[1], item[0]))
            said = f", e.g. {odd[0][0]!r} is token {odd[0][1]} of one of them" if odd else ""
            raise MethodError(f"'{first.name}' and '{expert.name}' have different vocabularies ({rows} and "
                              f"{config_of(expert).vocab_size} rows{said}), so one text is different tokens to them",
                              fix="mix members of one tokenizer; mixing by text (level: text) is not there yet")


def _sound(gate: Gate, router: Choice, site: Site) -> Gate:
    e, name = len(site.names), router.method.name
    if gate.top_k > e:
        raise MethodError(f"router '{name}' would choose {gate.top_k} of {e} experts", fix=f"set top_k to {e} or less")
    assert gate.bias.shape == (e,) and len(gate.weight) == e, f"router '{name}' made no row for each expert"
    return gate


def _config(experts: Sequence[Member], sources: Sequence[Weights], gate: Gate, site: Site) -> GlueModelMixtureConfig:
    from glue.kinds.modelling.model_mixture import GlueModelMixtureConfig

    shapes = [{key: value for key, value in config_of(expert).to_diff_dict().items() if key not in NOISE}
              for expert in experts]
    kind = widest(header for source in sources for header in source.headers.values())
    return GlueModelMixtureConfig(
        shapes, experts_per_prompt=gate.top_k, reader=site.reader, layer=site.layer,
        router_width=len(gate.inner[1]) if gate.inner else 0, router_temperature=float(gate.temperature), dtype=kind)


def _router_tensors(gate: Gate) -> dict[str, Tensor]:
    tensors = {"mean": gate.mean, "scale": gate.scale, "outer.weight": gate.weight, "outer.bias": gate.bias}
    if gate.inner is not None:
        tensors |= {"inner.weight": gate.inner[0], "inner.bias": gate.inner[1]}
    return {f"router.{name}": tensor.detach().float().contiguous() for name, tensor in tensors.items()}


def _fit(config: GlueModelMixtureConfig, taken: dict[str, tuple[Weights, str]], routing: dict[str, Tensor],
         experts: Sequence[Member]) -> None:
    """Compare with an empty model of this configuration, so that nothing is left to chance when it is loaded.

    Drops from `taken` what the model derives itself: tied heads and rotary frequencies.
    """
    from glue.kinds.modelling.model_mixture import GlueModelMixtureForCausalLM

    with torch.device("meta"):
        empty = GlueModelMixtureForCausalLM(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    tied = set(empty.all_tied_weights_keys)
    for name in list(taken):
        if name in tied or (name.endswith(DERIVED) and name not in wanted):
            del taken[name]
    found = {name: source.headers[part].shape for name, (source, part) in taken.items()}
    found |= {name: tuple(tensor.shape) for name, tensor in routing.items()}
    for name in sorted(set(wanted) - tied | set(found)):
        if found.get(name) != wanted.get(name):
            i = int(name.split(".")[0].removeprefix("expert_")) if name.startswith("expert_") else 0
            raise CheckpointError(
                f"'{experts[i].name}': its weights have '{name.partition('.')[2]}' as {found.get(name, 'nothing')}, "
                f"its configuration asks for {wanted.get(name, 'nothing')}",
                fix="a mixture takes unquantised models under the names that transformers itself gives their tensors")


def _write_frame(out: Path, config: GlueModelMixtureConfig, reader: Member) -> None:
    from glue.kinds.modelling import model_mixture

    code = Path(model_mixture.__file__)
    config.architectures = [model_mixture.GlueModelMixtureForCausalLM.__name__]
    config.auto_map = {"AutoConfig": f"{code.stem}.{model_mixture.GlueModelMixtureConfig.__name__}",
                       "AutoModelForCausalLM": f"{code.stem}.{model_mixture.GlueModelMixtureForCausalLM.__name__}"}
    config.save_pretrained(out)
    shutil.copyfile(code, out / code.name)
    generation_of(reader).save_pretrained(out)
    tokenizer_of(reader).save_pretrained(out)
