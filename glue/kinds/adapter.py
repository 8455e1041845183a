"""Kind "adapter": a LoRA, rsLoRA or DoRA folder, run and read through the model it sits on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.checkpoint import Header, Weights
from glue.errors import CheckpointError, MethodError
from glue.kinds import QUANTISED, Dtype, Running, kinds, load, weights
from glue.kinds.device import waits
from glue.kinds.frame import framed
from glue.kinds.lora import CONFIG, Adapter, linear_layers, scale
from glue.kinds.model import EMBEDDINGS, HEADS
from glue.member import Member
from glue.snapshot import whole


def adapter_weights(member: Member) -> LoraWeights:
    """The tensors of the model below with this adapter added. Raises CheckpointError for what is not understood."""
    framed(member)
    assert member.base is not None
    folder = whole(member.path, member.kind)
    _refuse_turned(Adapter(folder), member.base)
    return LoraWeights(weights(member.base), folder)


def _refuse_turned(adapter: Adapter, base: Member) -> None:
    """Raise where the adapter and the architecture disagree on how a matrix stands, which square ones do not tell.

    peft goes by the architecture, whatever the adapter says.
    """
    if not adapter.transposed and not any(module.rsplit(".", 1)[-1].startswith("c_") for module in adapter.modules):
        return  # the architectures with matrices [in, out] call them c_attn, c_fc and c_proj
    linear = set(linear_layers(base))
    for module in adapter.modules:
        if (module in linear) == adapter.transposed:
            way = "[in, out]" if adapter.transposed else "[out, in]"
            said = json.dumps(adapter.transposed)
            raise CheckpointError(f"{adapter.folder / CONFIG} says fan_in_fan_out: {said}, so that weights stand {way}"
                                  f", and '{module}' of '{base.name}' does not",
                                  fix="give the base it was trained on, or correct the configuration")


@kinds.add("adapter", weights=adapter_weights)
def adapter(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """The model below with the adapter merged into it by peft; where its weights are quantised, beside them.

    Merged weights would be quantised a second time.
    """
    from peft import PeftModel

    framed(member)
    assert member.base is not None
    folder = whole(member.path, member.kind)
    refuse_shared(Adapter(folder), weights(member.base))
    below = load(member.base, device=device, dtype=dtype)
    if waits(below.model):
        raise MethodError(f"'{member.name}' would be merged into '{member.base.name}', which has no room on the "
                          f"device: it lies on {below.spread}",
                          fix="say a smaller dtype, such as nf4, or device: cpu, or merge them first")
    with_adapter: Any = PeftModel.from_pretrained(below.model, folder, torch_device=str(below.model.device))
    model = with_adapter.get_base_model() if dtype in QUANTISED else with_adapter.merge_and_unload()
    return Running(member, model.eval(), below.tokenizer)


def refuse_shared(adapter: Adapter, base: Weights) -> None:
    """Raise CheckpointError for factors of a head that is one tensor with the embedding.

    They change what is written and not what is read: merged into the one tensor, as peft would do it, they change both.
    """
    for module in adapter.modules:
        if module in HEADS and f"{module}.weight" not in base.headers:
            raise CheckpointError(f"{adapter.folder} changes '{module}', which its base has in one tensor with its "
                                  f"embedding, so that the change cannot be added to it",
                                  fix="train it on other layers, or on a base with a head of its own")


class LoraWeights(Mapping[str, Tensor]):
    """A base and an adapter seen as one dense model, each tensor computed in fp32 and rounded once to the base's type.

    W + scale * B @ A; with DoRA, each row of that at the length that the adapter says. Nothing is computed before it
    is asked for, and nothing is kept.
    """

    def __init__(self, base: Weights, folder: Path):
        self.adapter, self._base = Adapter(folder), base
        self.config = self.adapter.config
        refuse_shared(self.adapter, base)
        self._refuse_parted()
        self._modules = self._checked()
        # a tensor that the adapter changes is in no file, whatever the base says of it
        self.headers = {name: Header(header.dtype, header.shape) if name in self._modules or
                        name in self.adapter.replaced else header for name, header in base.headers.items()}

    def _refuse_parted(self) -> None:
        """Raise where the adapter saves one of embedding and head, and the base has both in one tensor."""
        own = [name for name in self.adapter.replaced if name in (*EMBEDDINGS, *(f"{head}.weight" for head in HEADS))]
        if own and not any(f"{head}.weight" in self._base.headers for head in HEADS):
            raise CheckpointError(f"{self.adapter.folder} has a '{own[0]}' of its own, and its base has embedding and "
                                  f"head in one tensor: seen as one model, both would change",
                                  fix="merge it into its base with peft, which parts the two, and register the result")

    def _checked(self) -> dict[str, str]:
        """Name of each linear weight that the adapter changes -> its module."""
        folder, stored_as = self.adapter.folder, self.adapter.replaced
        shapes: dict[str, tuple[int, ...]] = {name: self.adapter.tensors.headers[stored].shape
                                              for name, stored in stored_as.items()}
        turned = -1 if self.adapter.transposed else 1
        shapes |= {f"{module}.weight": self.adapter.shape(module)[::turned] for module in self.adapter.modules}
        for name, shape in shapes.items():
            target = self._base.headers.get(name)
            if target is None:
                raise CheckpointError(f"{folder} changes '{name}', which its base does not have",
                                      fix="give the base that the adapter was trained on")
            if target.shape != shape:
                raise CheckpointError(f"{folder}: its tensors for '{name}' do not make {target.shape}, but {shape}",
                                      fix="give the base it was trained on")
        for module, stored in self.adapter.stretched.items():
            if self.adapter.tensors.headers[stored].shape != self.adapter.shape(module)[:1]:
                raise CheckpointError(f"{folder}: '{stored}' has not one magnitude for each row of '{module}.weight'",
                                      fix="write or download the adapter again")
        return {f"{module}.weight": module for module in self.adapter.modules}

    def __getitem__(self, name: str) -> Tensor:
        weight, module = self._base[name], self._modules.get(name)
        if name in self.adapter.replaced:
            weight = self.adapter.tensors[self.adapter.replaced[name]].to(weight.dtype)
        if module is None:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (side.to(wide) for side in self.adapter.factors(module))
        turned = self.adapter.transposed
        changed = (weight.T if turned else weight).to(wide) + b @ a * scale(self.config, module)
        if module in self.adapter.stretched:
            lengths = self.adapter.tensors[self.adapter.stretched[module]].to(wide)
            changed *= (lengths / torch.linalg.vector_norm(changed, dim=1))[:, None]
        return (changed.T.contiguous() if turned else changed).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base, the factors and what scales them; no product is computed for it."""
        parts = (self._base.fingerprint, self.adapter.tensors.fingerprint, self.adapter.told)
        return hashlib.sha256("|".join(parts).encode()).hexdigest()
