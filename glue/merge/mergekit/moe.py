"""Mixtures by mergekit-moe: the models checked for what it does wrong without a word, then built by it.

It takes attention, norms and embeddings from the base and the MLPs from the experts by their names alone. So whatever
has another name is dropped, such as biases, and whatever the experts' own attention, rotary angles or vocabulary would
have made of a token is not asked. Both are refused here. The result is written with the names that every loader of
Mixtral and Qwen3-MoE knows, where mergekit 0.1.5 leaves those of transformers 5 alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glue.checkpoint import Checkpoint, Header
from glue.kinds.card import Card
from glue.kinds.furnish import furnish
from glue.merge.mergekit.experts import Outcome, check_moe
from glue.merge.mergekit.moe_words import Expert, MoeConfig, read_moe
from glue.merge.mergekit.peer import run_moe_through_mergekit
from glue.writer import SHARD, Writer

__all__ = ["Expert", "MoeConfig", "Outcome", "build_moe", "check_moe", "read_moe"]
DRAFT = ".mergekit"  # where mergekit writes, inside the folder that is to be


def build_moe(config: MoeConfig, folders: Mapping[str, Path], out: Path, card: Card, *, seed: int = 0,
              shard_size: int = SHARD, device: str = "cpu") -> tuple[str, tuple[str, ...]]:
    """Write the mixture into the folder `out`; returns the digest of its weights, and notes for people.

    The models are checked first. For a time the weights are on the disk twice.
    """
    outcome = check_moe(config, folders)
    draft = out / DRAFT
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    try:
        warned = run_moe_through_mergekit(_told(config), draft, models=folders, seed=seed, device=device)
        digest = _spread(Checkpoint(draft), out, outcome.architecture, shard_size)
        shutil.copyfile(draft / "config.json", out / "config.json")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    furnish(out, folders[str(config.base_model)], card, keep=["config"])
    return digest, tuple(dict.fromkeys((*config.notes, *outcome.notes, *warned)))


def _told(config: MoeConfig) -> dict[str, Any]:
    """The config in mergekit's own words."""
    def expert(one: Expert) -> dict[str, Any]:
        return {"source_model": str(one.model), "positive_prompts": list(one.positive_prompts) or None,
                "negative_prompts": list(one.negative_prompts) or None, "noise_scale": one.noise_scale,
                "residual_scale": one.residual_scale}

    return {"base_model": str(config.base_model), "experts": [expert(one) for one in config.experts],
            "shared_experts": [expert(one) for one in config.shared_experts] or None, "gate_mode": config.gate_mode,
            "dtype": config.dtype or None, "experts_per_token": config.experts_per_token,
            "architecture": config.architecture or None}


NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen3": ("mlp", "gate_proj", "up_proj", "down_proj")}


def _spread(weights: Checkpoint, out: Path, architecture: str, shard_size: int) -> str:
    """Write the same weights with one tensor an expert; returns their digest."""
    parts = {name: part for fused in weights for name, part in _parts(weights, fused, architecture)}
    headers = {name: Header(weights.headers[fused].dtype, shape) for name, (fused, _, shape) in parts.items()}
    with Writer(out, headers, shard_size=shard_size) as writer:
        for name, (fused, (expert, rows), _) in parts.items():
            tensor = weights[fused]
            writer.write(name, tensor if expert is None else tensor[expert, rows])
        return writer.close()


Part = tuple[str, tuple[int | None, slice], tuple[int, ...]]


def _parts(weights: Checkpoint, fused: str, architecture: str) -> Iterator[tuple[str, Part]]:
    """The names that a tensor is to have, each with the expert and the rows it takes of it, and its shape."""
    shape = weights.headers[fused].shape
    block, gate, up, down = NAMES.get(architecture, ("mlp", "", "", ""))
    head, _, last = fused.partition(".mlp.")
    if last == "experts.gate_up_proj":  # [e, 2f, h]
        half = shape[1] // 2
        pieces = [(gate, slice(0, half)), (up, slice(half, 2 * half))]
    elif last == "experts.down_proj":  # [e, h, f]
        pieces = [(down, slice(0, shape[1]))]
    else:
        name = f"{head}.{block}.{last}" if last else fused
        yield name, (fused, (None, slice(None)), shape)
        return
    for expert in range(shape[0]):
        for word, rows in pieces:
            yield f"{head}.{block}.experts.{expert}.{word}.weight", (fused, (expert, rows),
                                                                     (rows.stop - rows.start, shape[2]))
