"""Layerwise: what a model makes of texts, with one layer of it in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glue.checkpoint import Weights
from glue.kinds.frame import config_of, tokenizer_of
from glue.member import Member

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KNOWN = ("llama", "mistral", "qwen2", "qwen3")  # take a state in the place of embeddings, and do nothing else to it
ALIKE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias",
         "sliding_window", "layer_types")
Batch = tuple[list[int], Tensor, Tensor]  # of texts on their way: places of these, mask [b, s], states [b, s, h] fp32


def decisive(config: PretrainedConfig) -> dict[str, Any]:
    """What of a configuration decides the shapes of a layer, and the numbers that it computes."""
    told = {key: getattr(config, key, None) for key in ALIKE}
    told["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stretched = config.rope_parameters.get("rope_type", "default") != "default"  # looks at the longest text as well
    return told | {"max_position_embeddings": config.max_position_embeddings if stretched else None}


class Layer:
    """One layer of a model without ends, in fp32, that takes the numbers of any weights of its shape.

    answers  whether it has its MLP; without it, what comes out is what goes in and what attention adds
    inner    the layer itself      mlp, norm  its MLP, and the norm that follows the last layer; not filled with it
    """

    def __init__(self, config: PretrainedConfig, i: int, *, answers: bool = True, device: str = "cpu"):
        from transformers import AutoModel

        shape = deepcopy(config)
        shape.num_hidden_layers, shape.vocab_size, shape.pad_token_id = 1, 1, None
        if getattr(shape, "layer_types", None):
            shape.layer_types = [config.layer_types[i]]
        with torch.device("meta"):
            model: Any = AutoModel.from_config(shape, dtype=torch.float32).eval()
        model.rotary_emb = type(model.rotary_emb)(model.config).to(device)  # its numbers are in no file
        self.norm, model.norm = model.norm, nn.Identity()
        self.inner: Any = model.layers[0]
        self.mlp = self.inner.mlp
        if not answers:
            self.inner.mlp = _Silent()
        self.number, self._model, self._device = i, model, device

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each of its tensors, by the name within a layer."""
        return {name: tuple(tensor.shape) for name, tensor in self.inner.state_dict().items()}

    def fill(self, source: Weights) -> None:
        """Take its numbers from a model."""
        fill(self.inner, source, f"model.layers.{self.number}", self._device)

    def end(self, source: Weights) -> None:
        """Let the norm of a model follow."""
        fill(self.norm, source, "model.norm", self._device)
        self._model.norm = self.norm

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """[b, s, h], mask [b, s] -> [b, s, h]"""
        from glue.kinds.modelling.routed import positions

        return self._model(inputs_embeds=states, attention_mask=mask, position_ids=positions(mask, mask.shape[1]),
                           use_cache=False).last_hidden_state

    def through(self, batches: list[Batch]) -> list[Batch]:
        """The same texts behind it."""
        return [(places, mask, self(state, mask)) for places, mask, state in batches]


class _Silent(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, states: Tensor) -> Tensor:
        return torch.zeros_like(states)


def fill(part: nn.Module, source: Weights, inside: str, device: str = "cpu") -> None:
    """Take the numbers of a part of a model from its weights, in fp32; `inside` is what names there begin with."""
    part.to("meta")  # what it had before leaves memory first
    # a copy of a checkpoint maps its files anew, which leave memory with the tensor
    part.load_state_dict({name: copy(source)[f"{inside}.{name}"].float().to(device) for name in part.state_dict()},
                         assign=True)


class Walk:
    """Texts on their way through a model, from place to place; what was reached is kept for who asks further up.

    trunk    whose embeddings they begin with      through  from place i to the next
    tokens   padded ones of a batch
    """

    def __init__(self, trunk: Weights, frame: Member, through: Callable[[int, list[Batch]], list[Batch]],
                 tokens: int | None = None, device: str = "cpu"):
        from glue.kinds.mixture import BATCH_TOKENS

        self.config, self.tokenizer = config_of(frame), tokenizer_of(frame)
        self._trunk, self._through, self._tokens, self._device = trunk, through, tokens or BATCH_TOKENS, device
        self._reached: dict[tuple[str, ...], tuple[int, list[Batch]]] = {}

    def at(self, i: int, texts: Sequence[str]) -> list[Batch]:
        """These texts where they come to place i."""
        key = tuple(texts)
        reached, batches = self._reached.get(key, (i + 1, []))
        if reached > i:
            reached, batches = 0, self._begun(texts)
        for j in range(reached, i):
            batches = self._through(j, batches)
        self._reached[key] = i, batches
        return batches

    def _begun(self, texts: Sequence[str]) -> list[Batch]:
        from glue.kinds.mixture import left_padded

        table = copy(self._trunk)["model.embed_tokens.weight"]
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        return [(places, mask.to(self._device), table[ids].float().to(self._device))
                for places, ids, mask in left_padded(rows, lambda: self._tokens)]


def pooled(batches: list[Batch], h: int, seen: Callable[[Tensor], Tensor] = lambda state: state) -> Tensor:
    """The mean over its tokens of what a gate sees of each text. [m, h] fp32"""
    from glue.kinds.modelling.routed import averaged

    states = torch.empty(sum(len(places) for places, _, _ in batches), h)
    for places, mask, state in batches:
        states[places] = averaged(seen(state), mask).cpu()
    return states


@torch.no_grad()
def states_within(source: Weights, frame: Member, layer: int, texts: Sequence[str], device: str = "cpu") -> Tensor:
    """The mean over its tokens of each text's state that enters a layer, or that the final norm leaves. [m, h] fp32

    source  weights of a model of one of the KNOWN architectures, with the configuration and the tokenizer of `frame`
    layer   0 up to the number of layers, which means behind the norm
    """
    def through(i: int, batches: list[Batch]) -> list[Batch]:
        one = Layer(walk.config, i, device=device)
        one.fill(source)
        if i + 1 == walk.config.num_hidden_layers:
            one.end(source)
        return one.through(batches)

    walk = Walk(source, frame, through, device=device)
    return pooled(walk.at(layer, texts), walk.config.hidden_size)
