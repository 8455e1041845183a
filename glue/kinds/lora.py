"""LoRA folders as peft writes them: what is in one, checked, and read without the model that it sits on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.checkpoint import Checkpoint
from glue.errors import CheckpointError
from glue.kinds.frame import config_of
from glue.member import Member

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, MAGNITUDE = "base_model.model.", "lora_magnitude_vector"
FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.(lora_(?P<side>[AB])\.weight|lora_magnitude_vector)")
SCALED = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}  # what b @ a is multiplied by
READ = SCALED | {"use_dora", "bias", "modules_to_save", "fan_in_fan_out"}
# Say how the adapter was trained or which modules it has, which its tensors say too.
HARMLESS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform",
            "layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "init_lora_weights", "runtime_config"}
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # other initialisations change the base as well


class Adapter:
    """A LoRA folder by itself: factors of linear layers, and tensors that stand in the place of the model's own.

    config    adapter_config.json, checked
    modules   names of the linear layers that it changes, sorted
    stretched those whose rows DoRA gives a length of their own: module -> name in the file
    replaced  biases and saved modules: name of the model's tensor -> name in the file
    """

    def __init__(self, folder: Path):
        self.folder, self.config = folder, read_config(folder)
        self.tensors = Checkpoint(folder / WEIGHTS)
        self.stretched: dict[str, str] = {}
        self.replaced: dict[str, str] = {}
        sides: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, header in self.tensors.headers.items():
            if match := FACTOR.fullmatch(name):
                if match["side"]:
                    sides.setdefault(match["module"], {})[match["side"]] = header.shape
                else:
                    self.stretched[match["module"]] = name
            else:
                self.replaced[self._replaces(name)] = name
        self.modules = tuple(sorted(sides))
        for module in self.modules:
            a, b, rank = sides[module].get("A", ()), sides[module].get("B", ()), _rank(self.config, module)
            if len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (rank, rank):
                raise CheckpointError(f"{folder}: the factors of '{module}' are {sides[module]}, which is no change "
                                      f"at rank {rank}", fix="write or download the adapter again")
        self._check_extras()

    def _replaces(self, name: str) -> str:
        """The model's tensor that one in the file stands for, where the configuration says that there is such a one."""
        tensor = name.removeprefix(PREFIX)
        biases = (self.config.get("bias") or "none") != "none"
        asked = (biases and name.endswith(".bias")) or any(_within(tensor, saved) for saved in self._saved)
        if ".lora_" in name or not name.startswith(PREFIX) or not asked:
            raise CheckpointError(f"{self.folder}: '{name}' is not a LoRA factor of a linear layer", fix=_MERGE_FIRST)
        return tensor.replace(".base_layer.", ".")

    def _check_extras(self) -> None:
        wanted = set(self.modules) if self.config.get("use_dora") else set()
        if set(self.stretched) != wanted:
            odd = sorted(set(self.stretched) ^ wanted)[0]
            raise CheckpointError(f"{self.folder}: its configuration says use_dora: {json.dumps(bool(wanted))}, and "
                                  f"'{odd}' {'has no' if wanted else 'has a'} magnitude",
                                  fix="write or download the adapter again")
        for saved in self._saved:
            if not any(_within(name, saved) for name in self.replaced):
                raise CheckpointError(f"{self.folder}: its configuration says modules_to_save: {json.dumps([saved])}, "
                                      f"and no such module is in it", fix="write or download the adapter again")

    @property
    def _saved(self) -> list[str]:
        return self.config.get("modules_to_save") or []

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """(a [r, n], b [m, r]) of one layer, as stored; its weight changes by scale(module) * b @ a."""
        a, b = (self.tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        return a, b

    def rank(self, module: str) -> int:
        """Of one layer."""
        return _rank(self.config, module)

    def scale(self, module: str) -> float:
        """See `scale`."""
        return scale(self.config, module)

    @property
    def transposed(self) -> bool:
        """Whether the weights that it changes stand [in, out] in the files of the model, as those of GPT-2 do."""
        return bool(self.config.get("fan_in_fan_out"))

    def shape(self, module: str) -> tuple[int, int]:
        """Of the change of one layer, [m, n]: from n inputs to m outputs."""
        a, b = (self.tensors.headers[f"{PREFIX}{module}.lora_{side}.weight"].shape for side in "AB")
        return b[0], a[1]

    @cached_property
    def told(self) -> str:
        """What the configuration says that changes a number."""
        keys = SCALED & set(self.config) | {key for key in ("use_dora", "fan_in_fan_out") if self.config.get(key)}
        return json.dumps({key: self.config[key] for key in sorted(keys)}, sort_keys=True)

    @property
    def fingerprint(self) -> str:
        """Of the tensors and of what scales them."""
        return hashlib.sha256(f"{self.tensors.fingerprint}|{self.told}".encode()).hexdigest()


def linear_layers(member: Member) -> list[str]:
    """Names of the linear layers of a model but for its head, in its order: what peft puts a LoRA on. Reads no weights.

    Only the architecture tells them from other matrices, such as those of GPT-2, which stand the other way round.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(member), trust_remote_code=False)
    head = model.get_output_embeddings()
    return [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not head]


def scale(config: Mapping[str, Any], module: str) -> float:
    """What B @ A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA, each by module where a pattern says so."""
    rank = _rank(config, module)
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _within(tensor: str, module: str) -> bool:
    """Whether a tensor belongs to a module, which is named by the end of its name."""
    return f".{module}." in f".{tensor}"


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
    """adapter_config.json of a LoRA, rsLoRA or DoRA, checked. Raises CheckpointError for everything else."""
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
    extras = {key: value for key, value in config.items() if value and key not in READ | HARMLESS}
    if config.get("init_lora_weights", True) not in KEEPS_BASE:
        extras["init_lora_weights"] = config["init_lora_weights"]
    if extras:
        key, value = next(iter(extras.items()))
        raise CheckpointError(f"{file} asks for {key}: {json.dumps(value)}, which is more than LoRA, rsLoRA or DoRA",
                              fix=_MERGE_FIRST)
    return config


def _understood(config: Mapping[str, Any]) -> bool:
    """Whether ranks are counts, alphas are numbers, patterns are patterns, and what is saved besides is named."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    saved = config.get("modules_to_save") or []
    if not isinstance(ranks, dict) or not isinstance(alphas, dict) or not isinstance(saved, list):
        return False
    for pattern in (*ranks, *alphas):
        re.compile(pattern)
    return (all(type(rank) is int and rank > 0 for rank in (config.get("r"), *ranks.values()))
            and all(type(alpha) in (int, float) for alpha in (config.get("lora_alpha"), *alphas.values()))
            and (config.get("bias") or "none") in ("none", "all", "lora_only")
            and all(isinstance(module, str) for module in saved))
