"""The frame of a member: what a model folder holds besides weights - configuration, generation settings, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glue.checkpoint import Header
from glue.errors import ZooError
from glue.hub import locate
from glue.identity import UNCOUNTED_KEYS
from glue.member import Member, canonical, with_article

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase


NO_SHAPE = (*UNCOUNTED_KEYS, "dtype", "torch_dtype")  # in a configuration


def framed(member: Member) -> Member:
    """The member whose folder has the frame: that of a change is the model below it. Raises ZooError."""
    while member.changes:
        if member.base is None:
            raise ZooError(f"'{member.name}' is {with_article(member.kind)}, and nothing says what it sits on",
                           fix="add  base: <the model it was trained on>  to its entry in zoo.yaml")
        member = member.base
    return member


def config_of(member: Member) -> PretrainedConfig:
    """The configuration of a member. Raises ZooError for architectures that transformers does not have."""
    from transformers import AutoConfig

    name, folder = member.name, locate(framed(member).path)
    told = config_json(folder, name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        if told.get("auto_map"):
            raise ZooError(f"'{name}' brings code of its own for '{told.get('model_type')}', which is never run",
                           fix="use a member whose architecture is part of transformers") from None
        raise ZooError(f"'{name}' has a config.json that is not understood: {first_line(error)}",
                       fix=f"see {folder / 'config.json'}") from None


def generation_of(member: Member) -> GenerationConfig:
    """The generation settings in a member's folder, or those that its configuration implies."""
    from transformers import GenerationConfig

    folder = locate(framed(member).path)
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(config_of(member))


def tokenizer_of(member: Member) -> PreTrainedTokenizerBase:
    """The tokenizer of a member, padding on the left, with the end of text as padding where it has none."""
    from transformers import AutoTokenizer

    folder = locate(framed(member).path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ZooError(f"'{member.name}' has no tokenizer that can be loaded from {folder}: {first_line(error)}",
                       fix="put its tokenizer files into that folder") from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def copy_frame(member: Member, folder: Path) -> None:
    """Put the frame of `member` beside weights that are written already; the configuration says their type.

    Code that lay beside the member is not brought along, so nothing there asks for it any more.
    """
    from glue.checkpoint import Checkpoint

    config, tokenizer = config_of(member), tokenizer_of(member)
    config.dtype = widest(Checkpoint(folder).headers.values())
    vars(config).pop("auto_map", None)
    tokenizer.init_kwargs.pop("auto_map", None)
    config.save_pretrained(folder)
    generation_of(member).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def widest(headers: Iterable[Header]) -> torch.dtype:
    """The floating type that holds every one of these tensors; float32 where none is floating."""
    found = torch.float32
    for k, kind in enumerate(dict.fromkeys(header.dtype for header in headers if header.dtype.is_floating_point)):
        found = torch.promote_types(found, kind) if k else kind
    return found


def architecture(member: Member) -> str:
    """What a member's configuration says, but for the type of its weights and where they came from."""
    told = config_json(locate(framed(member).path), member.name)
    return canonical({key: value for key, value in told.items() if key not in NO_SHAPE})


def first_line(error: Exception) -> str:
    """What an exception of another library says, without its page of advice."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def config_json(folder: Path, name: str) -> dict[str, Any]:
    """The config.json of a folder as it is. Raises ZooError where there is none, or it is no mapping."""
    file = folder / "config.json"
    try:
        told = json.loads(file.read_text())
    except FileNotFoundError:
        raise ZooError(f"'{name}' has no config.json in {folder}", fix="name a Hugging Face model folder") from None
    except ValueError as error:
        raise ZooError(f"{file} is not JSON ({error})", fix="download or write it again") from None
    if not isinstance(told, dict):
        raise ZooError(f"{file} is not a mapping", fix="download or write it again")
    return told
