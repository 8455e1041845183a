"""Recorded headers: the tensors of models that are not on this machine, from a few numbers of their configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue import document
from glue.checkpoint import Header
from glue.errors import ZooError, did_you_mean

FOLDER = Path("benchmarks") / "headers"  # beside zoo.yaml
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NUMBERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MORE = ("num_key_value_heads", "head_dim", "tie_word_embeddings")


@dataclass(frozen=True)
class Recorded(Mapping[str, Tensor]):
    """The headers of a model without its numbers: enough to plan with, and nothing can be read.

    exact  False where its files may differ a little from what is recorded
    """

    name: str
    headers: Mapping[str, Header]
    exact: bool = True

    @property
    def fingerprint(self) -> str:
        """Of the name: nothing else tells two of them apart."""
        return self.name

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(header.numel for header in self.headers.values())

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(header.nbytes for header in self.headers.values())

    def __getitem__(self, name: str) -> Tensor:
        raise ZooError(f"{self.name} is not on this machine", fix=f"get it with  hf download {self.name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


def read_recorded(zoo: Path) -> dict[str, Recorded]:
    """owner/name on the hub -> its headers, from the files in benchmarks/headers beside a zoo.yaml.

    Raises ZooError, with the place, for words that are not known and for a repository without a build.
    """
    found: dict[str, Recorded] = {}
    for file in sorted((zoo.parent / FOLDER).glob("*.yaml")):
        page = document.read(file, ZooError)
        builds, repositories = page.value.get("builds", {}), page.value.get("repositories", {})
        for name, entry in repositories.items():
            place = page.place("repositories", name)
            told = repositories.get(entry.get("like"), {}) if "like" in entry else entry
            if set(entry) not in ({"like"}, {"build", "dtype"}) or told.get("build") not in builds \
                    or told.get("dtype") not in TYPES:
                raise ZooError(f"'{name}' has no build and dtype, and is like no repository that has",
                               fix="write  {build: ..., dtype: ...}  or  {like: owner/name}", place=place)
            build = builds[told["build"]]
            for word in build:
                if word not in (*NUMBERS, *MORE):
                    raise ZooError(f"a build has no '{word}'{did_you_mean(word, (*NUMBERS, *MORE))}",
                                   place=page.place("builds", told["build"]))
            if lacking := [word for word in NUMBERS if word not in build]:
                raise ZooError(f"the build has no {lacking[0]}", place=page.place("builds", told["build"]))
            found[name] = Recorded(name, tensors(build, TYPES[told["dtype"]]), "like" not in entry)
    return found


def tensors(build: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Header]:
    """Every tensor of a Llama, or of what is named like one, as its files have it."""
    v, h, f, heads = (build[word] for word in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"))
    head = build.get("head_dim", h // heads)
    q, kv = heads * head, build.get("num_key_value_heads", heads) * head
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, q),
        "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (v, h), "model.norm": (h,)}
    shapes |= {} if build.get("tie_word_embeddings") else {"lm_head": (v, h)}
    shapes |= {f"model.layers.{k}.{name}": shape for k in range(build["num_hidden_layers"])
               for name, shape in layer.items()}
    return {f"{name}.weight": Header(dtype, shape) for name, shape in shapes.items()}


def factor_numbers(headers: Mapping[str, Header], targets: list[str] | None, rank: int) -> int:
    """How many numbers a LoRA of this rank has on the layers whose names end so: rank * (in + out) for each.

    targets  the ends of names; None: all that is given are layers
    """
    layers = [header.shape for name, header in headers.items() if targets is None or
              any(name == f"{target}.weight" or name.endswith(f".{target}.weight") for target in targets)]
    return sum(rank * (m + n) for m, n in layers)
