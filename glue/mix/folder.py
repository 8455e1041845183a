"""Folder: what mixtures of all levels write beside and into their files, and how what they take over is looked at."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glue.checkpoint import Header, Weights
from glue.errors import CheckpointError, MethodError
from glue.kinds.frame import generation_of, tokenizer_of
from glue.member import Member
from glue.mix.site import Gate
from glue.writer import SHARD, Writer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NOISE = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
DERIVED = "rotary_emb.inv_freq"  # old Llama files hold it; it follows from the configuration
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
UNQUANTISED = "a mixture takes unquantised models under the names that transformers itself gives their tensors"
UNMERGED = "give a trunk that was merged from the experts"
Shapes = Mapping[str, tuple[int, ...]]
Taken = Mapping[str, tuple[Weights, str]]  # what a mixture calls a tensor -> where it is from, and its name there


def shape_told(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration as plain data, without what says nothing of the shape."""
    return {key: value for key, value in config.to_diff_dict().items() if key not in NOISE}


def needed(config: PretrainedConfig, kind: Any = None) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Names and shapes of the tensors that a model of this configuration needs, and names of those that are tied.

    kind  the class of the model; None is whatever transformers has for the configuration
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config) if kind is None else kind(config)
    tied = set(empty.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items() if name not in tied}, tied


def fits(who: str, headers: Mapping[str, Header], wanted: Shapes, tied: Collection[str] = (), *,
         fix: str = UNQUANTISED) -> None:
    """Raise CheckpointError unless these are the tensors that are wanted, as plain numbers, and nothing is left over.

    Nothing may be left to chance when they are loaded. What is tied may be there or not.
    """
    found = {name: header for name, header in headers.items()
             if name not in tied and (name in wanted or not name.endswith(DERIVED))}
    for name in sorted(set(wanted) | set(found)):
        header, asked = found.get(name), wanted.get(name)
        if header is None or header.shape != asked or header.dtype not in FLOATS:
            plain = header is None or header.dtype in FLOATS
            told = header.shape if header is not None else "nothing"
            kind = "" if plain or header is None else f" in {str(header.dtype).removeprefix('torch.')}"
            raise CheckpointError(f"{who}: its weights have '{name}' as {told}{kind}, its configuration asks for "
                                  f"{'nothing' if asked is None else asked}", fix=fix)


def agreed(gates: Sequence[Gate], e: int) -> tuple[int, int]:
    """How many of e experts the gates of a mixture choose, and their hidden units; one number each for all places.

    Raises MethodError for more experts than there are.
    """
    assert all(len(gate.weight) == e == len(gate.bias) for gate in gates), "a gate has a row for each expert"
    found = {(gate.top_k, len(gate.inner[1]) if gate.inner else 0) for gate in gates} or {(1, 0)}
    if len(found) > 1:
        raise MethodError(f"the gates of the layers differ in (experts chosen, hidden units): {sorted(found)}; a "
                          "mixture has one number of each", fix="use one router for all layers")
    k, width = found.pop()
    if k > e:
        raise MethodError(f"the router would choose {k} of {e} experts", fix=f"set top_k to {e} or less")
    return k, width


def router_tensors(gate: Gate, inside: str, temperature: float = 1.0) -> dict[str, Tensor]:
    """The numbers of a gate in fp32, by name below `inside`; the temperature is folded into the last map."""
    named = {"mean": gate.mean, "scale": gate.scale, "outer.weight": gate.weight / temperature,
             "outer.bias": gate.bias / temperature}
    if gate.inner is not None:
        named |= {"inner.weight": gate.inner[0], "inner.bias": gate.inner[1]}
    return {f"{inside}.{name}": tensor.detach().float().contiguous() for name, tensor in named.items()}


def stream(out: Path, taken: Taken, made: Mapping[str, Tensor], *, kind: torch.dtype | None = None,
           shard_size: int = SHARD) -> str:
    """Write tensors that are taken over, one at a time, and those that were made; returns the digest of them all.

    kind  of everything that is taken over; None leaves each as it is
    """
    headers = {name: Header(kind or source.headers[part].dtype, source.headers[part].shape)
               for name, (source, part) in taken.items()}
    headers |= {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}
    with Writer(out, headers, shard_size=shard_size) as writer:
        for name, (source, part) in taken.items():
            # a copy of a checkpoint maps its files anew: what was read leaves memory with the tensor
            writer.write(name, copy(source)[part].to(headers[name].dtype))
        for name, tensor in made.items():
            writer.write(name, tensor)
        return writer.close()


def write_frame(out: Path, config: PretrainedConfig, model: Any, frame: Member) -> None:
    """Put configuration, generation settings and tokenizer into the folder, and the code of `model` beside them.

    model  a class of ours; its file and those that it imports are copied for people who load it without glue
    """
    import sys

    file = Path(str(sys.modules[model.__module__].__file__))
    config.architectures = [model.__name__]
    config.auto_map = {"AutoConfig": f"{file.stem}.{type(config).__name__}",
                       "AutoModelForCausalLM": f"{file.stem}.{model.__name__}"}
    config.save_pretrained(out)
    beside = re.findall(r"^from \.(\w+) import", file.read_text(encoding="utf-8"), re.MULTILINE)
    for name in (file.name, *(f"{other}.py" for other in beside)):
        shutil.copyfile(file.parent / name, out / name)
    write_words(out, frame)


def write_words(out: Path, frame: Member) -> None:
    """Put the generation settings and the tokenizer of a member into the folder."""
    generation_of(frame).save_pretrained(out)
    tokenizer_of(frame).save_pretrained(out)
