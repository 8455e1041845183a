"""A mixture of decoder layers: in each layer a router reads the prompt once, and the expert layers it chose answer.

Embeddings, the first `dense` layers, the final norm and the head are those of one model, the trunk. Every later layer
stands there once for each expert, with its attention, norms and MLP. Its router judges the mean of what enters the
layer over the positions that are not padding; the outputs of the chosen experts, residual included, are summed with
their weights. What enters a layer depends on the experts before it, so a route is a path: one choice a layer.

Letters: b batch, s sequence, v vocabulary, h hidden size, e experts, l layers that have experts, k chosen in each.

Routes are decided when a prompt is read and kept in the cache, with one slot of keys and values for each layer and
expert that holds only the rows this expert answers. Whatever is read later into the same cache follows them: decoded
tokens, but also the next piece of a prompt that is read in pieces, so there the first piece decides. Who wants the
whole prompt to decide gives `routes=model.gate(prompt)` with the first piece.

This file, paths.py and routed.py need torch and transformers and nothing else: people without glue load the folder they
lie in with trust_remote_code=True.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .paths import PathCache, Routes, slot
from .routed import Router, averaged, chosen, positions

TAKEN_FROM_TRUNK = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "bos_token_id",
                    "eos_token_id", "pad_token_id")


class GlueBlockMixtureConfig(PretrainedConfig):
    """The shape of a block-level mixture.

    trunk               configuration of the trunk as plain data, model_type included; the experts have the same
    experts             how many layers stand side by side
    dense               the first so many layers are the trunk's alone
    experts_per_prompt  how many experts of a layer answer a prompt
    router_width        hidden units of the routers; 0 is a linear router
    """

    model_type = "glue_block_mixture"
    _auto_class = "AutoConfig"

    def __init__(self, trunk: dict | None = None, experts: int = 2, dense: int = 0, experts_per_prompt: int = 1,
                 router_width: int = 0, **kwargs):
        self.trunk, self.experts, self.dense = dict(trunk or {}), experts, dense
        self.experts_per_prompt, self.router_width = experts_per_prompt, router_width
        if self.trunk:
            known = AutoConfig.for_model(**self.trunk)
            for name in TAKEN_FROM_TRUNK:
                kwargs[name] = getattr(known, name, None)
        super().__init__(**kwargs)


@dataclass
class GlueBlockMixtureOutput(CausalLMOutputWithPast):
    """Also tells the weights [b, l, e] that the answer was made with."""

    routes: Tensor | None = None


class RoutedLayer(nn.Module):
    """One layer of every expert behind a router. Takes what a decoder layer takes, and the routes beside it."""

    def __init__(self, kind: type[nn.Module], shape: PretrainedConfig, layer: int, config: GlueBlockMixtureConfig):
        super().__init__()
        self.number, self.k = layer - config.dense, config.experts_per_prompt
        self.experts = nn.ModuleList(kind(shape, layer) for _ in range(config.experts))
        for i, expert in enumerate(self.experts):
            for part in expert.modules():
                if hasattr(part, "layer_idx"):
                    setattr(part, "layer_idx", slot(layer, i, config.dense, config.experts))  # noqa: B010 - no Tensor
        self.router = Router(shape.hidden_size, config.experts, config.router_width)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                position_embeddings: tuple[Tensor, ...] = (), *, routes: Routes, real: Tensor | None = None,
                **kwargs) -> Tensor:
        """[b, s, h] -> [b, s, h]; decides where nothing is decided yet, by the tokens that are real [b, s]."""
        if self.number == len(routes.plans):
            with torch.no_grad():
                routes.decide(chosen(self.router(averaged(hidden_states, real)), self.k).to(hidden_states.device))
        plan = routes.plans[self.number]
        if plan.alone is not None:
            return self.experts[plan.alone](hidden_states, attention_mask=attention_mask, position_ids=position_ids,
                                            position_embeddings=position_embeddings, **kwargs)
        given = [plan.gathered(value, len(hidden_states))
                 for value in (hidden_states, attention_mask, position_ids, *position_embeddings)]
        return plan.joined([
            self.experts[i](states, attention_mask=mask, position_ids=where, position_embeddings=(cos, sin), **kwargs)
            for i, states, mask, where, cos, sin in zip(plan.rows, *given, strict=True)])


class GlueBlockMixtureForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model whose layers are chosen for each prompt; see the top of the file."""

    config_class = GlueBlockMixtureConfig
    _auto_class = "AutoModelForCausalLM"
    _keep_in_fp32_modules_strict = ["router"]
    _no_split_modules = ["RoutedLayer"]
    _supports_sdpa = _supports_flash_attn = True  # flex attention has masks that cannot be taken row by row

    def __init__(self, config: GlueBlockMixtureConfig):
        super().__init__(config)
        asked = config._attn_implementation
        kind = {} if asked in (None, "sdpa") else {"attn_implementation": asked}
        self.trunk = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.trunk), **kind)
        layers, shape = self.trunk.model.layers, self.trunk.model.config
        for i in range(config.dense, len(layers)):
            layers[i] = RoutedLayer(type(layers[i]), shape, i, config)
        self._pin: Tensor | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The trunk's."""
        return self.trunk.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Give the trunk another table."""
        self.trunk.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The trunk's head."""
        return self.trunk.get_output_embeddings()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a PathCache

    def empty_cache(self) -> PathCache:
        """A cache that has read nothing."""
        return PathCache(self.trunk.config, self.config.dense, self.config.experts)

    @torch.no_grad()
    def gate(self, input_ids: Tensor, attention_mask: Tensor | None = None,
             position_ids: Tensor | None = None) -> Tensor:
        """The weight of each expert in each layer for each prompt; k in a layer are not zero. [b, s] -> [b, l, e]

        Costs what reading the prompts costs, since what enters a layer comes out of the experts before it.
        """
        routes = Routes()
        self._read(self.trunk.model, routes, input_ids, None, attention_mask, position_ids, None)
        return self._told(routes, input_ids)

    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None,
              position_ids: Tensor | None = None) -> Tensor:
        """The expert of largest weight in each layer for each prompt. [b, s] -> [b, l]"""
        return self.gate(input_ids, attention_mask, position_ids).argmax(-1)

    @contextmanager
    def pinned(self, route: int | Sequence[int] | Sequence[Sequence[float]]) -> Iterator[None]:
        """Inside, prompts are not judged: every row takes this expert, this path [l], or these weights [l, e]."""
        before, self._pin = self._pin, self._weights(torch.as_tensor([route]))
        try:
            yield
        finally:
            self._pin = before

    def _weights(self, routes: Tensor) -> Tensor:
        """Expert indices [b] or [b, l], or weights [b, e], [b, l, e] or [b, l * e], to weights [b, l, e] of sum 1."""
        e, depth = self.config.experts, self.config.num_hidden_layers - self.config.dense
        shape = tuple(routes.shape[1:])
        if not depth and not routes.numel():
            return torch.zeros(len(routes), 0, e)
        if routes.is_floating_point() and shape in ((e,), (depth, e), (depth * e,)):
            weights = routes.float().view(len(routes), -1, e)
        elif not routes.is_floating_point() and shape in ((), (depth,)) and bool(((routes >= 0) & (routes < e)).all()):
            weights = nn.functional.one_hot(routes.long(), e).float().view(len(routes), -1, e)
        else:
            weights = torch.zeros(1, e)
        if not bool((weights >= 0).all() & (weights.sum(-1) > 0).all()):
            raise ValueError(f"routes are expert indices below {e}, [b] or [b, {depth}], or weights of at least 0, "
                             f"[b, {e}] or [b, {depth}, {e}]; these are {routes.dtype} of shape {tuple(routes.shape)}")
        return (weights / weights.sum(-1, keepdim=True)).expand(-1, depth, -1)

    def _told(self, routes: Routes, like: Tensor) -> Tensor:
        return routes.stacked(like) if routes.weights else torch.zeros(len(like), 0, self.config.experts)

    def _read(self, reader: nn.Module, routes: Routes, input_ids: Tensor | None, inputs_embeds: Tensor | None,
              attention_mask: Tensor | None, position_ids: Tensor | None, cache: PathCache | None, **kwargs):
        """Let the trunk read, with or without its head; layers that are reached undecided decide."""
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        b, s = tokens.shape[:2]
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"the attention mask is [b, s]; this has shape {tuple(attention_mask.shape)}")
        real = None
        if attention_mask is not None and len(routes.plans) < self.config.num_hidden_layers - self.config.dense:
            real = attention_mask[:, -s:]
            if not bool(real.any(1).all()):
                row = int(real.any(1).int().argmin())
                raise ValueError(f"row {row} of this batch is padding alone, so there is nothing to route it by; leave "
                                 "it out, or give routes")
        if position_ids is None and attention_mask is not None:
            position_ids = positions(attention_mask, s)
        if routes.weights and len(routes.weights[0]) != b:
            raise ValueError(f"{b} prompts, but routes for {len(routes.weights[0])}")
        return reader(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                      position_ids=position_ids, past_key_values=cache, use_cache=cache is not None, routes=routes,
                      real=real, **kwargs)

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: PathCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, routes: Tensor | None = None, **kwargs) -> GlueBlockMixtureOutput:
        """Logits [b, s, v] for token ids [b, s].

        routes  expert indices [b] or [b, l], or weights [b, e] or [b, l, e], to use instead of judging the prompt; a
                cache that has read something knows better and is followed
        """
        if kwargs.pop("output_hidden_states", None) or kwargs.pop("output_attentions", None):
            raise ValueError("a block mixture does not tell what its layers see; leave output_hidden_states and "
                             "output_attentions out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if past_key_values is not None and not isinstance(past_key_values, PathCache):
            raise ValueError(f"a mixture keeps a PathCache, this is a {type(past_key_values).__name__}; "
                             "leave past_key_values out and one is made")
        tokens: Any = input_ids if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = self.empty_cache()
        if past_key_values is not None and past_key_values.routes.weights:
            decided = past_key_values.routes
        else:
            given = self._pin if routes is None else self._weights(routes)
            if given is not None:
                given = given.to(tokens.device).expand(len(tokens) if routes is None else -1, -1, -1)
            decided = Routes() if given is None else Routes(given.unbind(1))
            if past_key_values is not None:
                past_key_values.routes = decided
        output = self._read(self.trunk, decided, input_ids, inputs_embeds, attention_mask, position_ids,
                            past_key_values, logits_to_keep=logits_to_keep)
        loss = None
        if labels is not None:
            kwargs.pop("return_dict", None)
            loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return GlueBlockMixtureOutput(loss=loss, logits=output.logits, past_key_values=past_key_values,
                                      routes=self._told(decided, tokens))

    def _assisted_decoding(self, input_ids: Tensor, *args, **kwargs):
        # what is read first ends with what the assistant drafted, which is no part of the prompt and must not decide
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = self.empty_cache()
        if kwargs.get("routes") is None and not kwargs["past_key_values"].routes.weights:
            kwargs["routes"] = self.gate(input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        above: Any = super()
        return above._assisted_decoding(input_ids, *args, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        # without a cache the whole text is read again at every step; it keeps the route of its prompt
        model_kwargs["routes"] = outputs.routes
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
