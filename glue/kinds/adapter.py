"""Kind "adapter": a LoRA folder as peft writes it, run and read through the model it sits on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.checkpoint import Checkpoint, Header, Weights
from glue.errors import CheckpointError
from glue.hub import locate
from glue.kinds import Dtype, Running, kinds, load, weights
from glue.kinds.frame import framed
from glue.member import Member

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
# Say how the adapter was trained or which modules it has, which its tensors say too.
HARMLESS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
            "layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "init_lora_weights", "runtime_config"}
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # other initialisations change the base as well


def adapter_weights(member: Member) -> LoraWeights:
    """The tensors of the model below with this adapter added. Raises CheckpointError for what is not plain LoRA."""
    framed(member)
    assert member.base is not None
    return LoraWeights(weights(member.base), locate(member.path))


@kinds.add("adapter", weights=adapter_weights)
def adapter(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """The model below with the adapter merged into it by peft."""
    from peft import PeftModel

    framed(member)
    assert member.base is not None
    folder = locate(member.path)
    read_config(folder)
    below = load(member.base, device=device, dtype=dtype)
    with_adapter = PeftModel.from_pretrained(below.model, folder, torch_device=device)
    return Running(member, with_adapter.merge_and_unload().eval(), below.tokenizer)


class LoraWeights(Mapping[str, Tensor]):
    """A base and a LoRA folder seen as one dense model: W + scale * B @ A, in fp32, rounded once to the base's type.

    Nothing is computed before it is asked for, and nothing is kept.
    """

    def __init__(self, base: Weights, folder: Path):
        self.config, self._base = read_config(folder), base
        self._factors = Checkpoint(folder / WEIGHTS)
        self._modules = self._checked(folder)
        # a tensor that the adapter changes is in no file, whatever the base says of it
        self.headers = {name: Header(header.dtype, header.shape) if name in self._modules else header
                        for name, header in base.headers.items()}

    def _checked(self, folder: Path) -> dict[str, str]:
        """Name of each tensor that the adapter changes -> its module."""
        sides: dict[str, dict[str, Header]] = {}
        for name, header in self._factors.headers.items():
            match = FACTOR.fullmatch(name)
            if not match:
                raise CheckpointError(f"{folder}: '{name}' is not a LoRA factor of a linear layer", fix=_MERGE_FIRST)
            sides.setdefault(match["module"], {})[match["side"]] = header
        for module, found in sides.items():
            target = self._base.headers.get(f"{module}.weight")
            if target is None:
                raise CheckpointError(f"{folder} changes '{module}.weight', which its base does not have",
                                      fix="give the base that the adapter was trained on")
            shapes = {side: header.shape for side, header in found.items()}
            rank = _rank(self.config, module)
            if len(target.shape) != 2 or shapes != {"A": (rank, target.shape[1]), "B": (target.shape[0], rank)}:
                raise CheckpointError(f"{folder}: the factors of '{module}' are {shapes}, which do not make "
                                      f"{target.shape} at rank {rank}", fix="give the base it was trained on")
        return {f"{module}.weight": module for module in sides}

    def __getitem__(self, name: str) -> Tensor:
        weight, module = self._base[name], self._modules.get(name)
        if module is None:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (self._factors[f"base_model.model.{module}.lora_{side}.weight"].to(wide) for side in "AB")
        return (weight.to(wide) + b @ a * scale(self.config, module)).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base, the factors and what scales them; no product is computed for it."""
        told = json.dumps({key: self.config[key] for key in sorted(READ & set(self.config))}, sort_keys=True)
        parts = (self._base.fingerprint, self._factors.fingerprint, told)
        return hashlib.sha256("|".join(parts).encode()).hexdigest()


def scale(config: Mapping[str, Any], module: str) -> float:
    """What B @ A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA, each by module where a pattern says so."""
    rank = _rank(config, module)
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _rank(config: Mapping[str, Any], module: str) -> int:
    return _by_pattern(config.get("rank_pattern"), module, config["r"])


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, dot by dot."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return otherwise


_MERGE_FIRST = "merge it into its base with peft (merge_and_unload, save_pretrained) and register the result as a model"


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA or rsLoRA, checked. Raises CheckpointError for everything else."""
    file = folder / CONFIG
    for needed in (file, folder / WEIGHTS):
        if not needed.is_file():
            raise CheckpointError(f"{folder} has no {needed.name}", fix="an adapter is a folder as peft writes it, "
                                                                        "with safetensors weights")
    try:
        config = json.loads(file.read_text())
        plain = isinstance(config, dict) and config.get("peft_type") == "LORA" and _understood(config)
    except (ValueError, re.error) as error:
        raise CheckpointError(f"{file} is not understood ({error})", fix="download or write it again") from None
    if not plain:
        raise CheckpointError(f"{file} does not describe a LoRA with a rank and an alpha",
                              fix=f"only LoRA adapters are read; else {_MERGE_FIRST}")
    extras = {key: value for key, value in config.items()
              if value and key not in READ | HARMLESS and (key, value) != ("bias", "none")}
    if config.get("init_lora_weights", True) not in KEEPS_BASE:
        extras["init_lora_weights"] = config["init_lora_weights"]
    if extras:
        key, value = next(iter(extras.items()))
        raise CheckpointError(f"{file} asks for {key}: {json.dumps(value)}, which is more than plain LoRA",
                              fix=_MERGE_FIRST)
    return config


def _understood(config: Mapping[str, Any]) -> bool:
    """Whether ranks are counts, alphas are numbers and patterns are patterns."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        return False
    for pattern in (*ranks, *alphas):
        re.compile(pattern)
    return (all(type(rank) is int and rank > 0 for rank in (config.get("r"), *ranks.values()))
            and all(type(alpha) in (int, float) for alpha in (config.get("lora_alpha"), *alphas.values())))
