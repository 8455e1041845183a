"""Kind "prompt": a few vectors that a model reads before every text, a PEFT folder of prompt tuning, over its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.checkpoint import ADAPTER, Checkpoint
from glue.errors import CheckpointError, ZooError, one_line
from glue.files import write_aside
from glue.hub import locate
from glue.kinds import Dtype, Running, kinds, load
from glue.kinds.frame import framed
from glue.member import IN_WEIGHTS, Member, canonical, with_article

CONFIG, TYPE, EMBEDDINGS = "adapter_config.json", "PROMPT_TUNING", "prompt_embeddings"
COUNTS = {"num_virtual_tokens", "token_dim"}
# Say how the prompt was begun or what it was made with, which its numbers say too.
HARMLESS = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
            "inference_mode", "num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init",
            "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}


@kinds.add("prompt", source="arXiv:2104.08691")
def prompt(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """The base, which reads the prompt before every text; of logits, caches and lengths only the text shows."""
    from glue.kinds.modelling.prompted import PromptedForCausalLM
    from glue.kinds.text import longest

    framed(member)
    assert member.base is not None
    if member.base.kind not in ("model", *IN_WEIGHTS):
        raise ZooError(f"'{member.name}' is a prompt, and '{member.base.name}' below it is "
                       f"{with_article(member.base.kind)}, which reads no vectors",
                       fix="a prompt sits on a model, or on an adapter over one")
    folder = locate(member.path)
    numbers = read_prompt(folder)
    below = load(member.base, device=device, dtype=dtype)
    table: Any = below.model.get_input_embeddings().weight
    if numbers.shape[1] != table.shape[1]:
        raise CheckpointError(f"{folder}: its vectors have {numbers.shape[1]} numbers, and those of its base "
                              f"{table.shape[1]}", fix="give the base that it was made for")
    if len(numbers) >= (room := longest(below.model, below.tokenizer)):
        raise CheckpointError(f"{folder}: a prompt of {len(numbers)} tokens leaves no room for a text in the {room} "
                              f"that its base can read", fix="give the base that it was made for")
    model: Any = PromptedForCausalLM(below.model, numbers)
    return Running(member, model.eval(), below.tokenizer)


def read_prompt(folder: Path) -> Tensor:
    """The vectors in a folder, [t, h] in fp32. Raises CheckpointError for what is no prompt of a language model."""
    try:
        told = json.loads((folder / CONFIG).read_bytes())
        if told["peft_type"] != TYPE:
            raise ValueError(f"peft_type is {told['peft_type']}")
        if told.get("task_type") not in ("CAUSAL_LM", None) or told.get("num_transformer_submodules") not in (1, None):
            raise ValueError("it is not for a causal language model")
        if more := sorted(key for key, value in told.items() if value and key not in COUNTS | HARMLESS):
            raise ValueError(f"'{more[0]}' is not known")
        shape = told["num_virtual_tokens"], told["token_dim"]
        if not all(type(count) is int and count > 0 for count in shape):
            raise ValueError(f"it has {shape[0]} tokens of {shape[1]} numbers")
        if not (folder / ADAPTER).is_file():
            raise ValueError(f"there is no {ADAPTER}, and pickled weights are never read")
        stored = Checkpoint(folder / ADAPTER)
        if set(stored) != {EMBEDDINGS}:
            raise ValueError(f"its tensors are {', '.join(sorted(stored)[:3]) or 'none'} and not '{EMBEDDINGS}' alone")
        header = stored.headers[EMBEDDINGS]
        if header.shape != shape or not header.dtype.is_floating_point:
            raise ValueError(f"'{EMBEDDINGS}' is {header.dtype} {header.shape}, and {shape} was said")
        numbers = stored[EMBEDDINGS].to(torch.float32, copy=True)
        if not bool(numbers.isfinite().all()):
            raise ValueError(f"'{EMBEDDINGS}' holds numbers that are not finite")
        return numbers
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as problem:
        raise CheckpointError(f"{folder} holds no soft prompt that is understood ({one_line(str(problem), 160)})",
                              fix="write or download it again") from None


def write_prompt(folder: Path, numbers: Tensor) -> None:
    """Put the vectors [t, h] into a folder as peft writes them, in fp32; the configuration comes last."""
    from safetensors.torch import save

    t, h = numbers.shape
    assert t > 0, "a prompt has tokens"
    told = {"peft_type": TYPE, "task_type": "CAUSAL_LM", "num_virtual_tokens": t, "token_dim": h,
            "num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM", "base_model_name_or_path": None,
            "inference_mode": True}
    write_aside(folder / ADAPTER, save({EMBEDDINGS: numbers.to(torch.float32).contiguous()}, {"format": "pt"}))
    write_aside(folder / CONFIG, canonical(told))


def numel(member: Member) -> int:
    """How many numbers a prompt has, from its header."""
    return Checkpoint(locate(member.path) / ADAPTER).headers[EMBEDDINGS].numel
