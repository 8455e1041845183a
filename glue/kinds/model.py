"""Kind "model": an ordinary Hugging Face folder of a causal language model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glue.checkpoint import Checkpoint
from glue.errors import CheckpointError
from glue.hub import locate
from glue.kinds import Dtype, Running, kinds
from glue.kinds.frame import config_of, first_line, tokenizer_of
from glue.member import Member

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@kinds.add("model", weights=lambda member: Checkpoint(locate(member.path)))
def model(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """A causal language model with its tokenizer, in evaluation mode, padding on the left."""
    return Running(member, model_of(member, device, dtype), tokenizer_of(member))


def model_of(member: Member, device: str, dtype: Dtype) -> PreTrainedModel:
    """The model in a member's folder. Raises CheckpointError where the files do not fill it exactly."""
    config_of(member)  # first, for its plainer errors
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    folder = locate(member.path)
    loaded: Any = _filled(folder, f"'{member.name}' in {folder}", dtype=kind, use_safetensors=True)
    return loaded.to(device)


def assembled(frame: Member, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> Running:
    """A model of these tensors with the configuration and the tokenizer of `frame`, in fp32, without any file."""
    config = config_of(frame)
    # cloned: transformers may keep a tensor as it is, and a view of a file does not survive that file
    loaded = _filled(None, f"the tensors for '{frame.name}'", config=config, dtype=torch.float32,
                     state_dict={name: tensor.clone() for name, tensor in dict(tensors).items()})
    return Running(frame, loaded, tokenizer_of(frame))


def _filled(source: Any, told_as: str, **how: Any) -> PreTrainedModel:
    """A model in evaluation mode, every tensor of which came from the source."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        if source is None:  # the auto class wants files
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(how["config"])]
        else:
            kind, how = AutoModelForCausalLM, {**how, "trust_remote_code": False, "local_files_only": True}
        loaded, found = kind.from_pretrained(source, output_loading_info=True, **how)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{told_as}: {first_line(error)}",
                              fix="a model needs config.json and safetensors weights of the shapes it says") from None
    for what in ("missing", "mismatched"):
        if names := sorted(map(str, found[f"{what}_keys"])):
            # transformers would go on with random numbers in these places
            raise CheckpointError(f"{told_as}: {len(names)} tensors that its configuration asks for are {what}, "
                                  f"e.g. {names[0]}", fix="download or write the weights again")
    return loaded.eval()
