"""A large model steered by two small ones: its logits, and what tuning has changed in the logits of a small model.

    logits = large + alpha * (tuned - small)

So p is in proportion to p_large * (p_tuned / p_small)^alpha. The large model is only asked for logits: it may be a
mixture, or a stand-in without weights for a model elsewhere.

Letters: b batch, s sequence, v tokens of the vocabulary. Heads may have more rows, which are no tokens and are cut off.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from glue.kinds.modelling.routed import positions

TAKEN_FROM_LARGE = ("hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "pad_token_id")


class GlueProxyConfig(PretrainedConfig):
    """What others ask of a model's configuration; the folder's own config.json is read by glue.kinds.proxy."""

    model_type = "glue_proxy"


@dataclass
class ProxiedOutput(CausalLMOutputWithPast):
    """Also tells which experts of the large model answered, where it has any."""

    routes: Tensor | None = None


class ProxyCache(Cache):
    """What the parts have read of the same texts: a cache each, or none for a part that keeps nothing.

    ids  [b, s] the tokens that were read; a part without a cache reads them again
    """

    def __init__(self, slots: Sequence[Cache | None], ids: Tensor):
        super().__init__(layers=[])
        self.slots, self.ids = list(slots), ids

    def _each(self) -> list[Cache]:
        return [slot for slot in self.slots if slot is not None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.ids.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many tokens are seen when so many more are read, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, which is no limit."""
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        for slot in self._each():
            slot.batch_select_indices(indices.cpu())  # parts may lie on several devices
        self.ids = self.ids[indices.to(self.ids.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; beam search asks for this."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times, one after the other."""
        self.batch_select_indices(torch.arange(len(self.ids), device=self.ids.device).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given negative, as transformers does."""
        for slot in self._each():
            slot.crop(tokens_to_remove)
        self.ids = self.ids[:, :self.ids.shape[1] - abs(tokens_to_remove)]

    def reset(self) -> None:
        """Forget all tokens."""
        for slot in self._each():
            slot.reset()
        self.ids = self.ids[:, :0]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.ids)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace."""
        return all(slot.is_croppable for slot in self._each())


class Switched:
    """One set of weights that is both small models: the adapter off is the untuned one, on the tuned one.

    A forward pass goes through one of the two at a time, whatever thread it comes from.
    """

    def __init__(self, adapted: Any):
        self._layers, self._lock = adapted.base_model, RLock()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is the untuned one."""
        with self._lock:
            self._layers.disable_adapter_layers()
            try:
                yield
            finally:
                self._layers.enable_adapter_layers()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, nobody makes it the untuned one."""
        with self._lock:
            yield


class GlueProxiedForCausalLM(PreTrainedModel, GenerationMixin):
    """A large model, and a small one before and after it was tuned; see the top of the file.

    alpha   how much of what tuning has changed is added; 0 is the large model alone, which then runs by itself
    switch  where both small models are one set of weights; then `tuned` is None
    """

    config_class = GlueProxyConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # whatever the parts support

    def __init__(self, config: GlueProxyConfig, large: PreTrainedModel, small: PreTrainedModel,
                 tuned: PreTrainedModel | None, *, alpha: float, switch: Switched | None = None):
        super().__init__(config)  # and no post_init, which would draw new weights for what peft has put in
        assert (tuned is None) == (switch is not None), "the tuned model is another, or the small one with an adapter"
        self.large, self.small, self.tuned = large, small, tuned
        self.alpha, self._switch = alpha, switch
        if large.generation_config is not None:
            self.generation_config = large.generation_config

    def tie_weights(self, *args, **kwargs) -> None:
        """Nothing to do: each part was tied when it was loaded."""

    def get_input_embeddings(self) -> nn.Module:
        """Those of the large model."""
        return self.large.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: there are several tables."""
        raise NotImplementedError("every part has embeddings of its own; change them on model.large or model.small")

    @property
    def device(self) -> torch.device:
        """Where the small model is; the large one may be nowhere."""
        return self.small.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the small model's weights."""
        return self.small.dtype

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a ProxyCache

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: Any = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, **more) -> ProxiedOutput:
        """Logits [b, s, v] for token ids [b, s]; `more` is for the large model, such as routes of a mixture."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids: every part has embeddings of its own, inputs_embeds would fit one")
        if self.alpha and not (past_key_values is None or isinstance(past_key_values, ProxyCache)):
            raise ValueError(f"a proxy keeps a ProxyCache, this is a {type(past_key_values).__name__}; "
                             "leave past_key_values out and one is made")
        told = {"attention_mask": attention_mask, "position_ids": position_ids}
        if not self.alpha:  # as if nothing stood around it
            first = self.large(input_ids=input_ids, **_known(self.large, {
                **told, "past_key_values": past_key_values, "use_cache": use_cache, "logits_to_keep": logits_to_keep,
                **more}))
            logits, cache = first.logits[..., :self.config.vocab_size], getattr(first, "past_key_values", None)
        else:
            keeps = bool(use_cache) or past_key_values is not None
            first, large, change, slots = self._parts(input_ids, told, past_key_values, keeps, logits_to_keep, more)
            logits, cache = large + self.alpha * change, None
            if keeps:
                cache = ProxyCache(slots, input_ids[:, :0]) if past_key_values is None else past_key_values
                cache.slots, cache.ids = slots, torch.cat([cache.ids, input_ids], dim=1)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return ProxiedOutput(loss=loss, logits=logits, past_key_values=cache, routes=getattr(first, "routes", None))

    def apart(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of whole texts [b, s]: the large model's logits, and what tuning has changed in the small one's. [b, s, v]"""
        told = {"attention_mask": None, "position_ids": None}
        _, large, change, _ = self._parts(input_ids.to(self.device), told, None, False, 0, {})
        return large, change

    def _parts(self, input_ids: Tensor, told: dict[str, Any], cache: ProxyCache | None, keeps: bool,
               kept: int | Tensor, more: dict[str, Any]) -> tuple[Any, Tensor, Tensor, list[Cache | None]]:
        """What the large model said, its logits, what is to be added to them, and what each part keeps of the text."""
        tuned = self.small if self.tuned is None else self.tuned
        off, on = (self._switch.off, self._switch.on) if self._switch else (nullcontext, nullcontext)
        asked: list[tuple[PreTrainedModel, Callable, dict[str, Any]]] = [
            (self.large, nullcontext, more), (self.small, off, {}), (tuned, on, {})]
        said, logits, slots = [], [], []
        for k, (model, inside, extra) in enumerate(asked):
            slot = cache.slots[k] if cache is not None else None
            again = cache.ids if cache is not None and slot is None else input_ids[:, :0]
            with inside():
                output, out = _ask(model, input_ids, again, told, slot, keeps, kept, extra)
            said.append(output)
            logits.append(out[..., :self.config.vocab_size])
            slots.append(getattr(output, "past_key_values", None) if keeps else None)
        large = logits[0].to(torch.promote_types(logits[0].dtype, torch.float32))
        return said[0], large, logits[2].to(large) - logits[1].to(large), slots

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        if outputs.routes is not None:  # without a cache the whole text is read again; it keeps the route of its prompt
            model_kwargs["routes"] = outputs.routes
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)


def _ask(model: PreTrainedModel, ids: Tensor, again: Tensor, told: dict[str, Any], slot: Cache | None, keeps: bool,
         kept: int | Tensor, extra: dict[str, Any]) -> tuple[Any, Tensor]:
    """What a part says, and its logits at the places of `ids` that are kept.

    again  [b, r] tokens before these, for a part that keeps nothing of what it reads
    """
    r, s = again.shape[1], ids.shape[1]
    where, mask = told["position_ids"], told["attention_mask"]
    if r and where is not None:
        where = None if mask is None else positions(mask, r + s)
    asked = {"attention_mask": mask, "position_ids": where, "past_key_values": slot, "use_cache": keeps, **extra}
    slices = not r and "logits_to_keep" in inspect.signature(model.forward).parameters
    output = model(input_ids=torch.cat([again, ids], dim=1) if r else ids,
                   **_known(model, {**asked, **({"logits_to_keep": kept} if slices else {})}))
    if slices:
        return output, output.logits
    return output, output.logits[:, r:][:, kept if isinstance(kept, Tensor) else slice(-kept, None)]


def _known(model: PreTrainedModel, given: dict[str, Any]) -> dict[str, Any]:
    """The words that a part understands."""
    known = inspect.signature(model.forward).parameters
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return given
    return {word: value for word, value in given.items() if word in known}
