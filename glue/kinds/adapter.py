"""Kind "adapter": a LoRA, rsLoRA or DoRA folder, run and read through the model it sits on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from glue.checkpoint import Header, Weights
from glue.errors import CheckpointError
from glue.hub import locate
from glue.kinds import Dtype, Running, kinds, load, weights
from glue.kinds.frame import framed
from glue.kinds.lora import Adapter, scale
from glue.member import Member


def adapter_weights(member: Member) -> LoraWeights:
    """The tensors of the model below with this adapter added. Raises CheckpointError for what is not understood."""
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
    Adapter(folder)
    below = load(member.base, device=device, dtype=dtype)
    with_adapter = PeftModel.from_pretrained(below.model, folder, torch_device=device)
    return Running(member, with_adapter.merge_and_unload().eval(), below.tokenizer)


class LoraWeights(Mapping[str, Tensor]):
    """A base and an adapter seen as one dense model, each tensor computed in fp32 and rounded once to the base's type.

    W + scale * B @ A; with DoRA, each row of that at the length that the adapter says. Nothing is computed before it
    is asked for, and nothing is kept.
    """

    def __init__(self, base: Weights, folder: Path):
        self.adapter, self._base = Adapter(folder), base
        self.config = self.adapter.config
        self._modules = self._checked()
        # a tensor that the adapter changes is in no file, whatever the base says of it
        self.headers = {name: Header(header.dtype, header.shape) if name in self._modules or
                        name in self.adapter.replaced else header for name, header in base.headers.items()}

    def _checked(self) -> dict[str, str]:
        """Name of each linear weight that the adapter changes -> its module."""
        folder, stored_as = self.adapter.folder, self.adapter.replaced
        shapes: dict[str, tuple[int, ...]] = {name: self.adapter.tensors.headers[stored].shape
                                              for name, stored in stored_as.items()}
        shapes |= {f"{module}.weight": self.adapter.shape(module) for module in self.adapter.modules}
        for name, shape in shapes.items():
            target = self._base.headers.get(name)
            if target is None:
                raise CheckpointError(f"{folder} changes '{name}', which its base does not have",
                                      fix="give the base that the adapter was trained on")
            if target.shape != shape:
                raise CheckpointError(f"{folder}: its tensors for '{name}' do not make {target.shape}, but {shape}",
                                      fix="give the base it was trained on")
        for module, stored in self.adapter.stretched.items():
            if self.adapter.tensors.headers[stored].shape != shapes[f"{module}.weight"][:1]:
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
        changed = weight.to(wide) + b @ a * scale(self.config, module)
        if module in self.adapter.stretched:
            lengths = self.adapter.tensors[self.adapter.stretched[module]].to(wide)
            changed *= (lengths / torch.linalg.vector_norm(changed, dim=1))[:, None]
        return changed.to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @cached_property
    def fingerprint(self) -> str:
        """Of the base, the factors and what scales them; no product is computed for it."""
        parts = (self._base.fingerprint, self.adapter.tensors.fingerprint, self.adapter.told)
        return hashlib.sha256("|".join(parts).encode()).hexdigest()
