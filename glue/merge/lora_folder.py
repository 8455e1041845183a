"""Writing LoRA folders that peft loads: changes streamed into safetensors, and the configuration that scales them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.checkpoint import Header
from glue.files import write_aside
from glue.kinds.lora import CONFIG, PREFIX, WEIGHTS
from glue.merge.factors import Factors
from glue.writer import Stream, Writer

NOTE = "factors.json"  # beside the weights: what was cut off of each layer
ENTRIES = 1 << 17  # of b that are put together at once
Parts = Sequence[Factors]  # changes of one weight whose sum is meant


@dataclass(frozen=True)
class Kept:
    """A tensor that is written beside the factors, under its name in the file.

    pieces  makes it as flat pieces, first to last
    """

    header: Header
    pieces: Callable[[], Iterator[Tensor]]


@dataclass(frozen=True)
class About:
    """What an adapter's configuration says besides its ranks and scales.

    base     id on the hub, or folder, of the model that it sits on; and the revision of the former
    targets  peft's words for the layers that it changes; unless given, their full names
    more     other keys, as peft has them
    """

    base: str
    revision: str | None = None
    targets: Sequence[str] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


def write_folder(folder: Path, changes: Mapping[str, Parts], about: About, *, dtype: torch.dtype = torch.float32,
                 kept: Mapping[str, Kept] | None = None, key: str = "",
                 report: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Write an adapter into a folder and return the digest of its weights.

    changes  module -> changes of its weight that are summed by standing side by side: of several, no more than one is
             in memory
    dtype    of the factors, rounded to once
    key      of what is written; the same call goes on from what a killed one has finished
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = kept or {}
    headers: dict[str, Header] = {name: each.header for name, each in kept.items()}
    for module, parts in changes.items():
        rank, (m, n) = sum(part.rank for part in parts), parts[0].shape
        headers |= {_name(module, "A"): Header(dtype, (rank, n)), _name(module, "B"): Header(dtype, (m, rank))}
    headers = dict(sorted(headers.items()))
    size = sum(header.nbytes for header in headers.values()) + 1
    streams = {_name(module, side): made(parts, dtype) for module, parts in changes.items()
               for side, made in (("A", _a), ("B", _b))} | {name: each.pieces for name, each in kept.items()}
    with Writer(folder, headers, shard_size=size, key=key, single=WEIGHTS) as writer:
        for k, name in enumerate(writer.left):
            with Stream(writer.layout, name) as stream:
                for piece in streams[name]():
                    stream.write(piece)
                writer.done({name: stream.close()})
            report(k + 1, len(headers))
        write_aside(folder / NOTE, json.dumps(lost(changes), indent=1))
        write_aside(folder / CONFIG, json.dumps(_config(changes, about), indent=2, sort_keys=True) + "\n")
        return writer.close()


def lost(changes: Mapping[str, Parts]) -> dict[str, Any]:
    """What was cut off, layer by layer and in all: its Frobenius norm, and that of the whole change.

    Where nothing was cut, the error is 0 and the norm is not computed.
    """
    cut = {module: parts[0] for module, parts in changes.items() if parts[0].spectrum is not None}
    ranks = {module: sum(part.rank for part in parts) for module, parts in changes.items()}
    modules: dict[str, dict[str, Any]] = {
        module: {"rank": rank, **(_cut(cut[module]) if module in cut else {"error": 0.0})}
        for module, rank in ranks.items()}
    told: dict[str, Any] = {"rank": max(ranks.values()), "error": 0.0, "modules": modules}
    if cut:
        for word in ("norm", "error"):
            told[word] = sqrt(sum(modules[module][word]**2 for module in cut))
    return told


def _cut(change: Factors) -> dict[str, Any]:
    assert change.spectrum is not None
    return {"error": change.error, "norm": float(change.spectrum.norm()), "of": int((change.spectrum > 0).sum()),
            "next": [float(value) for value in change.spectrum[change.rank:change.rank + 4]]}


def _name(module: str, side: str) -> str:
    return f"{PREFIX}{module}.lora_{side}.weight"


def _scale(parts: Parts) -> float:
    """What the configuration scales by: the scale of a change that stands alone; of several, each one's goes into a."""
    return parts[0].scale if len(parts) == 1 and parts[0].scale else 1.0


def _a(parts: Parts, dtype: torch.dtype) -> Callable[[], Iterator[Tensor]]:
    common = _scale(parts)
    return lambda: ((part.a.double() * (part.scale / common)).to(dtype) for part in parts if part.rank)


def _b(parts: Parts, dtype: torch.dtype) -> Callable[[], Iterator[Tensor]]:
    m, rows = parts[0].shape[0], max(1, ENTRIES // sum(part.rank for part in parts))
    return lambda: (torch.cat([part.b[start:start + rows].to(dtype) for part in parts], dim=1)
                    for start in range(0, m, rows))


def _config(changes: Mapping[str, Parts], about: About) -> dict[str, Any]:
    ranks = {module: sum(part.rank for part in parts) for module, parts in changes.items()}
    alphas = {module: _whole(_scale(parts) * ranks[module]) for module, parts in changes.items()}
    (rank, alpha), _ = Counter(sorted((ranks[module], alphas[module]) for module in ranks)).most_common(1)[0]
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": about.base,
            "revision": about.revision, "inference_mode": True, "r": rank, "lora_alpha": alpha,
            "rank_pattern": {name: ranks[name] for name in _longest_first(ranks) if ranks[name] != rank},
            "alpha_pattern": {name: alphas[name] for name in _longest_first(alphas) if alphas[name] != alpha},
            "target_modules": sorted(about.targets or changes), "lora_dropout": 0.0,
            "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True,
            **about.more}


def _longest_first(names: Mapping[str, Any]) -> list[str]:
    """So that no name is taken for the end of another one's."""
    return sorted(names, key=lambda name: (-len(name), name))


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha
