"""Stock: what Mixtral and Qwen2Moe call the parts of a mixture of MLPs, and what they have no place for.

Mixtral holds mixtures without dense layers. Qwen2Moe holds dense layers too, and biases of queries, keys and values;
its shared expert, which it cannot do without, is one hidden unit of zeros and adds nothing. Tensors have the names from
before experts were fused into one, which old and new versions of transformers read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glue.errors import MethodError
from glue.files import write_aside
from glue.mix.site import Gate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MATRICES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # of an MLP, and what Mixtral calls them
SHARED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
          "tie_word_embeddings", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id")
OTHERWISE = "use routing: sentence, or level: model"


def refuse(name: str, config: PretrainedConfig, dense: int) -> None:
    """Raise MethodError for what neither of the two architectures has a place for."""
    window = getattr(config, "sliding_window", None)
    what, fix = "", OTHERWISE
    if getattr(config, "attention_bias", False):
        what = "attention biases (attention_bias: true)"
    elif getattr(config, "mlp_bias", False):
        what = "biases in its MLPs (mlp_bias: true)"
    elif window and config.model_type != "mistral":
        what = f"a sliding window of {window} tokens in some layers"
    elif window and dense:
        what, fix = f"a sliding window of {window} tokens beside dense layers", f"leave dense_layers at 0, {OTHERWISE}"
    if what:
        raise MethodError(f"'{name}' has {what}, for which the stock architecture of a mixture of MLPs has no place",
                          fix=fix)


def stock_config(config: PretrainedConfig, e: int, dense: int, k: int) -> PretrainedConfig:
    """The configuration of the mixture: k of e experts in each layer but the first `dense`."""
    from transformers import MixtralConfig, Qwen2MoeConfig

    shared = {key: getattr(config, key) for key in SHARED}
    shared |= {"rope_parameters": dict(config.rope_parameters), "num_experts_per_tok": k}
    head = getattr(config, "head_dim", None)
    if head and head * config.num_attention_heads != config.hidden_size:
        shared["head_dim"] = head
    if not dense and config.model_type != "qwen2":
        return MixtralConfig(**shared, num_local_experts=e, architectures=["MixtralForCausalLM"],
                             sliding_window=getattr(config, "sliding_window", None))
    return Qwen2MoeConfig(**shared, num_experts=e, moe_intermediate_size=config.intermediate_size,
                          shared_expert_intermediate_size=1, norm_topk_prob=True, mlp_only_layers=list(range(dense)),
                          qkv_bias=config.model_type == "qwen2", architectures=["Qwen2MoeForCausalLM"])


def stock_name(model_type: str, name: str, expert: int | None) -> str:
    """What the mixture calls a tensor: of the trunk, which it calls as Llama does, or of the MLP of an expert."""
    if expert is None:
        return name
    layer, _, inner = name.partition(".mlp.")
    if model_type == "mixtral":
        return f"{layer}.block_sparse_moe.experts.{expert}.{MATRICES[inner.removesuffix('.weight')]}.weight"
    return f"{layer}.mlp.experts.{expert}.{inner}"


def stock_gates(told: Any, gates: Sequence[Gate], dense: int, kind: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the gates, and what else the architecture asks for. Raises MethodError for more than a matrix."""
    made: dict[str, Tensor] = {}
    for layer, gate in enumerate(gates, dense):
        matrix, shift = gate.matrix()
        if bool(shift.any()):
            raise MethodError(f"the gate of layer {layer} has a bias or a mean, for which the stock architecture of a "
                              f"mixture of MLPs has no place", fix="use routing: sentence, or another router")
        inside = f"model.layers.{layer}.{'block_sparse_moe' if told.model_type == 'mixtral' else 'mlp'}"
        made[f"{inside}.gate.weight"] = matrix
        if told.model_type != "mixtral":
            made[f"{inside}.shared_expert_gate.weight"] = torch.zeros(1, told.hidden_size)
            for name in MATRICES:
                shape = (told.hidden_size, 1) if name == "down_proj" else (1, told.hidden_size)
                made[f"{inside}.shared_expert.{name}.weight"] = torch.zeros(shape)
    return {name: tensor.detach().to(kind).contiguous() for name, tensor in made.items()}


def write_stock_config(told: Any, folder: Path) -> None:
    """Put config.json into the folder, readable by transformers before 5 too, which would silently take defaults."""
    told.save_pretrained(folder)
    file = folder / "config.json"
    read, rope = json.loads(file.read_text()), dict(told.rope_parameters)
    read |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": read["dtype"]}
    if rope.get("rope_type", "default") != "default":
        read["rope_scaling"] = rope
    write_aside(file, json.dumps(read, indent=2, sort_keys=True) + "\n")
