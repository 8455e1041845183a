"""Synthetic checkpoints of the shapes of known Llamas: a base, and members that differ from it as tuned models do.

A base is N(0, 0.02), its norms N(1, 0.1). A member is its base plus a low-rank part, a sparse heavy-tailed part and a
little noise, rms about 0.0015 in all. In the queries and keys of every fourth layer this is forty times smaller, so
that most entries there are unchanged after rounding to bf16; so are most entries of norms.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glue.checkpoint import Checkpoint, Header
from glue.errors import GlueError
from glue.writer import Writer

SPREAD, STEP = 0.02, 0.0012  # of a base; of a member's difference from it, before its parts are summed
RANK, TOUCHED, QUIET = 8, 0.02, 40  # of the low-rank part; share of the sparse part; how much less quiet layers change
ENTRIES = 1 << 22  # made at once in fp32
EDITION = 1  # of the recipe above; a folder of another edition is made again


@dataclass(frozen=True)
class Shape:
    """A Llama: layers, hidden and intermediate width, heads, key and value heads, words of the vocabulary."""

    layers: int
    hidden: int
    inner: int
    heads: int
    groups: int
    words: int

    def headers(self) -> dict[str, Header]:
        """Every tensor of a model of this shape, in the order of the model."""
        h, kv = self.hidden, self.hidden // self.heads * self.groups
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.words, h)}
        for k in range(self.layers):
            layer = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
                     "self_attn.o_proj": (h, h), "mlp.gate_proj": (self.inner, h), "mlp.up_proj": (self.inner, h),
                     "mlp.down_proj": (h, self.inner), "input_layernorm": (h,), "post_attention_layernorm": (h,)}
            found |= {f"model.layers.{k}.{name}.weight": shape for name, shape in layer.items()}
        found |= {"model.norm.weight": (h,), "lm_head.weight": (self.words, h)}
        return {name: Header(torch.bfloat16, shape) for name, shape in found.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of one checkpoint."""
        return sum(header.nbytes for header in self.headers().values())

    def config(self) -> str:
        """The text of config.json."""
        return json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "torch_dtype": "bfloat16", "hidden_size": self.hidden, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups, "vocab_size": self.words, "tie_word_embeddings": False,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
            "hidden_act": "silu", "synthetic_edition": EDITION}, indent=2)


SHAPES = {"tiny": Shape(2, 64, 128, 4, 2, 256),
          "160m": Shape(12, 768, 3072, 12, 12, 32000),
          "1b1": Shape(22, 2048, 5632, 32, 4, 32000),  # TinyLlama-1.1B
          "7b": Shape(32, 4096, 11008, 32, 32, 32000)}  # Llama-2-7B


def made(folder: Path, shape: Shape, n: int, outputs: int = 2) -> dict[str, Path]:
    """`base` and the members m0 ... of a shape, made where they are not in `folder` yet: name -> its folder.

    Raises GlueError where the disk has no room for what is missing and for this many outputs at once.
    """
    names = ["base", *(f"m{k}" for k in range(n))]
    missing = [name for name in names if not _complete(folder / name, shape)]
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = (len(missing) + outputs) * shape.nbytes, shutil.disk_usage(folder).free
    if needed > free:
        raise GlueError(f"{folder} has {free / 1e9:.1f} GB left; {needed / 1e9:.1f} GB are needed for "
                        f"{len(missing)} more checkpoints and {outputs} outputs",
                        fix="give another --folder, or fewer --members")
    for name in missing:
        print(f"making {folder / name} ({shape.nbytes / 1e9:.2f} GB)", flush=True)
        _make(folder / name, shape, None if name == "base" else folder / "base")
    return {name: folder / name for name in names}


def _complete(folder: Path, shape: Shape) -> bool:
    """config.json is written last, so where it says this shape and edition the weights are there."""
    config = folder / "config.json"
    return config.is_file() and config.read_text() == shape.config()


def _make(folder: Path, shape: Shape, base: Path | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    headers = shape.headers()
    below = Checkpoint(base) if base else None
    with Writer(folder, headers) as writer:
        for name, header in headers.items():
            generator = torch.Generator().manual_seed(_seed(folder.name, name))
            drawn = _fresh(header, generator) if below is None else _moved(name, below[name], generator)
            writer.write(name, drawn)
    (folder / "config.json").write_text(shape.config())


def _fresh(header: Header, generator: torch.Generator) -> Tensor:
    """One tensor of a base."""
    drawn = torch.empty(header.shape, dtype=header.dtype)
    centre, spread = (1.0, 0.1) if len(header.shape) == 1 else (0.0, SPREAD)
    for rows in _blocks(drawn):
        rows.copy_(torch.empty(rows.shape).normal_(centre, spread, generator=generator))
    return drawn


def _moved(name: str, below: Tensor, generator: torch.Generator) -> Tensor:
    """One tensor of a member.

    below  that of its base, [r, c], or [c] for a norm
    """
    step = STEP / (QUIET if _quiet(name) else 1)
    drawn = torch.empty_like(below)
    right = torch.randn(RANK, below.shape[-1], generator=generator) / RANK ** 0.5
    for rows, old in zip(_blocks(drawn), _blocks(below), strict=True):
        delta = torch.randn(rows.shape, generator=generator).mul_(0.3)
        delta.addmm_(torch.randn(len(rows), RANK, generator=generator), right, alpha=0.7)
        count = int(TOUCHED * delta.numel())
        chosen = torch.randint(delta.numel(), (count,), generator=generator)
        heavy = torch.randn(count, generator=generator) * (0.8 * torch.randn(count, generator=generator)).exp()
        delta.view(-1)[chosen] += 4 * heavy
        rows.copy_(delta.mul_(step).add_(old))
    return drawn


def _quiet(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 6 and int(parts[2]) % 4 == 3 and parts[4] in ("q_proj", "k_proj")


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Views of some rows at a time, [rows, c]; a vector is one row."""
    rows = tensor.view(-1, tensor.shape[-1])
    yield from rows.split(max(1, ENTRIES // rows.shape[1]))


def _seed(*words: str) -> int:
    return int.from_bytes(hashlib.sha256("|".join(words).encode()).digest()[:7], "big")
