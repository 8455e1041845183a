"""A mixture of MLPs routed by sentence: each mixed layer chooses once for a prompt which MLPs answer all its tokens.

The gate of a layer judges the mean, over the tokens of the prompt that are not padding, of the states that its MLPs are
about to see. It does so when the prompt is read; the choice is kept in the cache and stays for everything that follows.

Letters: b batch, s sequence, h hidden size, e experts, l mixed layers, k experts chosen per prompt and layer.

This file needs torch, transformers and the two files that it imports, and nothing else: people without glue load the
folder they lie in with trust_remote_code=True.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from .paths import Routes
from .routed import Router, averaged, chosen, positions

TAKEN_FROM_TRUNK = ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "pad_token_id",
                    "max_position_embeddings")


class GlueFfnMixtureConfig(PretrainedConfig):
    """The shape of a mixture of MLPs.

    trunk               configuration of the model around the experts as plain data, model_type included
    experts             how many MLPs each mixed layer has
    dense               so many layers, from the first on, have one MLP only
    experts_per_prompt  how many of the experts of a layer answer a prompt
    router_width        hidden units of the routers; 0 is linear routers
    """

    model_type = "glue_ffn_mixture"
    _auto_class = "AutoConfig"

    def __init__(self, trunk: dict | None = None, experts: int = 0, dense: int = 0, experts_per_prompt: int = 1,
                 router_width: int = 0, **kwargs):
        self.trunk, self.experts, self.dense = dict(trunk or {}), experts, dense
        self.experts_per_prompt, self.router_width = experts_per_prompt, router_width
        if self.trunk:
            known = AutoConfig.for_model(**self.trunk)
            for name in TAKEN_FROM_TRUNK:
                kwargs[name] = getattr(known, name, None)
        super().__init__(**kwargs)


@dataclass
class GlueFfnMixtureOutput(CausalLMOutputWithPast):
    """Also tells the weights [b, l, e] that the answer was made with."""

    routes: Tensor | None = None


class SentenceCache(DynamicCache):
    """The cache of the trunk, with the routes decided for every row; none until a prompt was read."""

    def __init__(self, config: PretrainedConfig):
        super().__init__(config=config)
        self.routes = Routes()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        super().batch_select_indices(indices.cpu())  # layers may lie on several devices
        self.routes.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; beam search asks for this."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times, one after the other."""
        super().batch_repeat_interleave(repeats)
        if self.routes.weights:
            self.routes.select(torch.arange(len(self.routes.weights[0])).repeat_interleave(repeats))


class MixedMLP(nn.Module):
    """The MLPs of all experts in one layer, in the place of one; its router decides what the routes do not say yet.

    number  of this layer among the mixed ones
    asked   the routes to follow, and the mask [b, s] of tokens that are not padding or None; set for each forward
    """

    def __init__(self, mlps: Sequence[nn.Module], router: Router, k: int, number: int):
        super().__init__()
        self.experts, self.router, self.k, self.number = nn.ModuleList(mlps), router, k, number
        self.asked: tuple[Routes, Tensor | None] = Routes(), None

    def forward(self, states: Tensor) -> Tensor:
        """[b, s, h] -> [b, s, h]"""
        routes, mask = self.asked
        if len(routes.plans) == self.number:
            routes.decide(chosen(self.router(averaged(states, mask)), self.k).to(states.device))
        plan = routes.plans[self.number]
        if plan.alone is not None:
            return self.experts[plan.alone](states)
        parts = zip(plan.rows, plan.gathered(states, len(states)), strict=True)
        return plan.joined([self.experts[i](part) for i, part in parts])


class GlueFfnMixtureForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with MLPs of several experts in its layers; see the top of the file."""

    config_class = GlueFfnMixtureConfig
    _auto_class = "AutoModelForCausalLM"
    _keep_in_fp32_modules_strict = ["router"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # whatever the trunk supports

    def __init__(self, config: GlueFfnMixtureConfig):
        super().__init__(config)
        asked = config._attn_implementation
        kind = {} if asked in (None, "sdpa") else {"attn_implementation": asked}
        self.trunk = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.trunk), **kind)
        for number, layer in enumerate(self.trunk.model.layers[config.dense:]):
            mlps = [layer.mlp, *(type(layer.mlp)(self.trunk.config) for _ in range(config.experts - 1))]
            router = Router(config.hidden_size, config.experts, config.router_width)
            layer.mlp = MixedMLP(mlps, router, config.experts_per_prompt, number)
        self._pin: Tensor | None = None
        self.post_init()

    @property
    def mixed(self) -> list[MixedMLP]:
        """The places with several experts, from the first mixed layer on."""
        return [layer.mlp for layer in self.trunk.model.layers[self.config.dense:]]

    def get_input_embeddings(self) -> nn.Module:
        """Those of the trunk."""
        return self.trunk.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Those of the trunk."""
        self.trunk.set_input_embeddings(value)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a SentenceCache, which knows the routes

    @torch.no_grad()
    def gate(self, input_ids: Tensor, attention_mask: Tensor | None = None,
             position_ids: Tensor | None = None) -> Tensor:
        """The weight of each expert in each mixed layer for each prompt; k of e are not zero. [b, s] -> [b, l, e]"""
        return self(input_ids, attention_mask, position_ids, use_cache=False, logits_to_keep=1).routes

    @contextmanager
    def pinned(self, route: int | Sequence[float]) -> Iterator[None]:
        """Inside, prompts are not judged: every row takes this expert in every layer, or these weights [l * e]."""
        before, self._pin = self._pin, self._weights(torch.as_tensor([route]))[0]
        try:
            yield
        finally:
            self._pin = before

    def _weights(self, routes: Tensor) -> Tensor:
        """Expert indices [b] for all layers, or weights of b * l * e numbers, to weights [b, l, e] that sum to 1."""
        e, layers = self.config.experts, len(self.mixed)
        if routes.dim() == 1 and not routes.is_floating_point() and bool(((routes >= 0) & (routes < e)).all()):
            return nn.functional.one_hot(routes.long(), e).float()[:, None].expand(-1, layers, -1)
        if routes.dim() > 1 and routes[0].numel() == layers * e:
            given = routes.float().view(len(routes), layers, e)
            if bool((given >= 0).all() & (given.sum(-1) > 0).all()):
                return given / given.sum(-1, keepdim=True)
        raise ValueError(f"routes are expert indices [b] below {e} or weights [b, {layers}, {e}] of at least 0; "
                         f"these are {routes.dtype} of shape {tuple(routes.shape)}")

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: SentenceCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, routes: Tensor | None = None, **kwargs) -> GlueFfnMixtureOutput:
        """Logits [b, s, v] for token ids [b, s].

        routes  expert indices [b] or weights [b, l, e] to use instead of judging the prompt; a cache that has read the
                prompt knows better and is followed
        """
        if past_key_values is not None and not isinstance(past_key_values, SentenceCache):
            raise ValueError(f"this mixture keeps a SentenceCache, this is a {type(past_key_values).__name__}; "
                             "leave past_key_values out and one is made")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"the attention mask is [b, s]; this has shape {tuple(attention_mask.shape)}")
        read = input_ids if inputs_embeds is None else inputs_embeds
        if read is None:
            raise ValueError("give input_ids or inputs_embeds")
        b, s = read.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = SentenceCache(self.trunk.config)
        followed = Routes() if past_key_values is None else past_key_values.routes
        given = None if self._pin is None else self._pin.expand(b, -1, -1)
        given = given if routes is None else self._weights(routes)
        if given is not None and not followed.weights:
            if len(given) != b:
                raise ValueError(f"{b} prompts, but routes for {len(given)}")
            for weights in given.to(self.device).unbind(1):
                followed.decide(weights)
        if attention_mask is not None and position_ids is None:
            position_ids = positions(attention_mask, s)

        for place in self.mixed:
            place.asked = followed, None if attention_mask is None else attention_mask[:, -s:]
        output = self.trunk(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                            past_key_values=past_key_values, inputs_embeds=inputs_embeds,
                            use_cache=past_key_values is not None, logits_to_keep=logits_to_keep, **kwargs)
        taken = followed.stacked(output.logits) if followed.weights else torch.zeros(b, 0, self.config.experts)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=output.logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return GlueFfnMixtureOutput(loss=loss, logits=output.logits, past_key_values=past_key_values, routes=taken,
                                    hidden_states=output.hidden_states, attentions=output.attentions)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        # without a cache the whole text is read again at every step; it keeps the routes of its prompt
        model_kwargs["routes"] = outputs.routes
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
