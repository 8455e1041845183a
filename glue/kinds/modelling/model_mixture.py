"""A mixture of whole causal language models: a router reads each prompt once, and the models it chose answer.

dense = 0  Every expert keeps its own embeddings, layers, norm and head, so an expert that gets all the weight answers
           as it did alone. One expert, the reader, turns the prompt into the state that the router judges. A reader
           that is chosen need not read again; a state from an early layer needs no more than the layers below it.
dense > 0  Embeddings and the first `dense` layers are one trunk for all experts. It runs once for every row, and the
           state in which it leaves a prompt is what the router judges. Norms and heads are the experts' own.

That state is the mean over the positions that are not padding. The choice is made when the prompt is read and kept in
the cache.

Letters: b batch, s sequence, v vocabulary, h hidden size of the reader, e experts, k experts chosen per prompt.

k = 1  each sample runs through its expert only, and the logits are that expert's, unchanged.
k > 1  next-token probabilities are mixed: p = sum_i w_i p_i. The logits returned are log p plus the weighted mean of
       the experts' own log-normalisers, so that a mixture of copies has the logits of the model, not just its odds.

This file needs torch and transformers and nothing else: people without glue load the folder it lies in with
trust_remote_code=True.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .routed import RoutedCache, Router, answering, averaged, chosen, only, positions

TAKEN_FROM_READER = ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "pad_token_id")


class GlueModelMixtureConfig(PretrainedConfig):
    """The shape of a model-level mixture.

    experts             configuration of each expert as plain data, model_type included
    experts_per_prompt  how many of them answer a prompt
    reader              index of the expert whose hidden states the router judges
    layer               which of them: an index of hidden_states; -1 is the last, after the final norm. A low one
                        spares the layers above it when a prompt is read
    router_width        hidden units of the router; 0 is a linear router
    router_temperature  divides the router's logits; changes weights, never the order of experts
    dense               so many layers are the trunk's; reader and layer then only say whose shape the trunk has
    """

    model_type = "glue_model_mixture"
    _auto_class = "AutoConfig"
    dense = 0

    def __init__(self, experts: Sequence[dict] = (), experts_per_prompt: int = 1, reader: int = 0, layer: int = -1,
                 router_width: int = 0, router_temperature: float = 1.0,
                 dense: int = 0, **kwargs):
        self.experts, self.experts_per_prompt = [dict(expert) for expert in experts], experts_per_prompt
        self.reader, self.layer = reader, layer
        if dense:  # else it is not written down, and what holds whole experts stays the same file
            self.dense = dense
        self.router_width, self.router_temperature = router_width, router_temperature
        if self.experts:
            known = [AutoConfig.for_model(**expert) for expert in self.experts]
            for name in TAKEN_FROM_READER:
                kwargs[name] = getattr(known[reader], name, None)
            lengths = [getattr(config, "max_position_embeddings", None) for config in known]
            kwargs["max_position_embeddings"] = min((length for length in lengths if length), default=None)
        super().__init__(**kwargs)


@dataclass
class GlueModelMixtureOutput(CausalLMOutputWithPast):
    """Also tells the weights [b, e] that the answer was made with."""

    routes: Tensor | None = None


def instead(module: nn.Module, forward: Callable | None = None, **children: nn.Module) -> Any:
    """A copy that shares every weight and does something else when called; the module stays as it is."""
    other: Any = copy(module)
    other._modules = {**module._modules, **children}
    if forward is not None:
        other.forward = forward
    elif hook := vars(module).get("_hf_hook"):  # of accelerate, where weights lie elsewhere: it calls what it is put on
        def hooked(*args: Any, **asked: Any) -> Any:
            args, asked = hook.pre_forward(other, *args, **asked)
            return hook.post_forward(other, type(module).forward(other, *args, **asked))

        other.forward = hooked
    return other


def brought(model: PreTrainedModel, **given: Any) -> dict[str, Any]:
    """What a model is given, where it begins to read: its embeddings may lie on a device of their own."""
    table: Any = model.get_input_embeddings()
    hook = vars(table).get("_hf_hook") if table is not None else None  # of accelerate, which tells where it will run
    where: Any = next((each.execution_device for each in getattr(hook, "hooks", (hook,)) if each is not None), None)
    if where is None:
        where = given["inputs_embeds"].device if table is None else table.weight.device
    return {name: value.to(where) if isinstance(value, Tensor) else value for name, value in given.items()}


class Reached(Exception):
    """Leaves a model at the layer that is not wanted any more, and takes the state along."""


def entering(model: Any, layer: int, **asked) -> Tensor:
    """hidden_states[layer] of a model without a head; the layers from there on do not run. -> [b, s, h]"""
    def stop(hidden_states: Tensor, *_, **__):
        raise Reached(hidden_states)

    count = model.config.num_hidden_layers
    if layer == count:
        return model(**asked).last_hidden_state
    stacks = {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
    name = next((name for name, stack in stacks.items() if len(stack) == count), None)
    if name is None:  # the layers lie deeper
        return model(**asked, output_hidden_states=True).hidden_states[layer]
    short = nn.ModuleList([*stacks[name][:layer], instead(stacks[name][layer], stop)])
    try:
        instead(model, **{name: short})(**asked)
    except Reached as reached:
        return reached.args[0]
    raise RuntimeError(f"{type(model).__name__} does not go through its {name} one by one")


def said(model: PreTrainedModel, read: Any, rows: Tensor) -> PreTrainedModel:
    """A model that need not read any more: it was read already for more rows than these, and only the head runs."""
    read = copy(read)
    read["last_hidden_state"] = only(rows, read.last_hidden_state)
    return instead(model, **{model.base_model_prefix: instead(model.base_model, lambda *_, **__: read)})


def pooled(reader: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, layer: int,
           position_ids: Tensor | None = None) -> Tensor:
    """Mean hidden state of each prompt over the tokens that are not padding, in fp32. [b, s] -> [b, h]"""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    where = positions(mask, input_ids.shape[1]) if position_ids is None else position_ids
    asked = brought(reader, input_ids=input_ids, attention_mask=mask, position_ids=where)
    state = entering(reader.base_model, layer % (reader.config.num_hidden_layers + 1), **asked, use_cache=False)
    return averaged(state, mask)


def blended(weights: Tensor, parts: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """The logits of the mixture [b, s, v] from (expert, its rows [n], their logits [n, s, v]); see the top of the file.

    weights  [b, e]
    """
    first = parts[0][2]
    if len(parts) == 1:
        return first  # one expert answers every row
    shape = (len(weights), *first.shape[1:])
    if sum(len(rows) for _, rows, _ in parts) == len(weights):  # each row has one expert
        out = first.new_empty(shape)
        for _, rows, logits in parts:
            out[rows] = logits
        return out
    alone = (weights > 0).sum(1) == 1
    out = first.new_zeros(shape)
    mixed = first.new_full(shape, -torch.inf, dtype=torch.float32)
    level = first.new_zeros((*shape[:2], 1), dtype=torch.float32)
    for i, rows, logits in parts:
        one = alone[rows]
        out[rows[one]] = logits[one]
        if not one.all():
            several, wide = rows[~one], logits[~one].float()
            share = weights[several, i].view(-1, 1, 1)
            norm = wide.logsumexp(-1, keepdim=True)
            mixed[several] = torch.logaddexp(mixed[several], share.log() + wide - norm)
            level[several] += share * norm
    out[~alone] = (mixed + level)[~alone].to(out)
    return out


def lower(expert: dict, count: int, **kind) -> PreTrainedModel:
    """Embeddings and the first layers of a model, without the norm that follows its last."""
    model = AutoModel.from_config(cut(expert, slice(count)), **kind)
    model.norm = nn.Identity()
    return model


def upper(expert: dict, start: int, **kind) -> PreTrainedModel:
    """The layers from `start` on, norm and head: a model that reads states, not tokens."""
    model = AutoModelForCausalLM.from_config(cut(expert, slice(start, None)), **kind)
    model.base_model.embed_tokens = None
    return model


def cut(expert: dict, layers: slice) -> PretrainedConfig:
    """The configuration of a model that has these layers only, and a head of its own."""
    whole = AutoConfig.for_model(**expert)
    kinds = getattr(whole, "layer_types", None)
    part = {**expert, "num_hidden_layers": len(range(whole.num_hidden_layers)[layers]), "tie_word_embeddings": False}
    return AutoConfig.for_model(**{**part, **({"layer_types": kinds[layers]} if kinds else {})})


class GlueModelMixtureForCausalLM(PreTrainedModel, GenerationMixin):
    """Whole causal language models of one vocabulary behind one router; see the top of the file."""

    config_class = GlueModelMixtureConfig
    _auto_class = "AutoModelForCausalLM"
    _keep_in_fp32_modules_strict = ["router"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # whatever the experts support

    def __init__(self, config: GlueModelMixtureConfig):
        super().__init__(config)
        asked = config._attn_implementation
        kind = {} if asked in (None, "sdpa") else {"attn_implementation": asked}
        if config.dense:
            self.trunk = lower(config.experts[config.reader], config.dense, **kind)
        for i, expert in enumerate(config.experts):
            # direct children, not a ModuleList: transformers gathers tied weights and the like from children only
            self.add_module(f"expert_{i}", upper(expert, config.dense, **kind) if config.dense else
                            AutoModelForCausalLM.from_config(AutoConfig.for_model(**expert), **kind))
        hidden = self.experts[config.reader].config.hidden_size
        self.router = Router(hidden, len(config.experts), config.router_width)
        self._pin: Tensor | None = None
        self.post_init()

    @property
    def experts(self) -> list[PreTrainedModel]:
        """The whole models, in the order of their indices."""
        return [getattr(self, f"expert_{i}") for i in range(len(self.config.experts))]

    def get_input_embeddings(self) -> nn.Module:
        """Those of the trunk, or of the reader."""
        return (self.trunk if self.config.dense else self.experts[self.config.reader]).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: there is no one table to set."""
        raise NotImplementedError("every expert has embeddings of its own; change them on model.experts[i]")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a RoutedCache when it has decided the routes

    @torch.no_grad()
    def gate(self, input_ids: Tensor, attention_mask: Tensor | None = None,
             position_ids: Tensor | None = None) -> Tensor:
        """The weight of each expert for each prompt; k of them are not zero. [b, s] -> [b, e]"""
        reader, layer = (self.trunk, -1) if self.config.dense else (self.experts[self.config.reader], self.config.layer)
        state = pooled(reader, input_ids, attention_mask, layer, position_ids)
        return self._judged(state).to(input_ids.device)

    @property
    def _reads_all(self) -> bool:
        """Whether the router judges the state in which the reader's last layer leaves a prompt."""
        count = self.experts[self.config.reader].config.num_hidden_layers
        return self.config.layer % (count + 1) == count

    @torch.no_grad()
    def _judged(self, state: Tensor) -> Tensor:
        """The weights [b, e] of prompts in this state [b, h]."""
        where = self.router.outer.weight.device
        if where.type != "meta":  # else accelerate brings both together
            state = state.to(where)
        logits = self.router(state) / self.config.router_temperature
        return chosen(logits, self.config.experts_per_prompt)

    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None,
              position_ids: Tensor | None = None) -> Tensor:
        """The expert of largest weight for each prompt. [b, s] -> [b]"""
        return self.gate(input_ids, attention_mask, position_ids).argmax(-1)

    @contextmanager
    def pinned(self, route: int | Sequence[float]) -> Iterator[None]:
        """Inside, prompts are not judged: every row takes this expert, or these weights [e]."""
        before, self._pin = self._pin, self._weights(torch.as_tensor([route]))[0]
        try:
            yield
        finally:
            self._pin = before

    def _weights(self, routes: Tensor) -> Tensor:
        """Expert indices [b], or weights [b, e], to weights [b, e] that sum to 1."""
        e = len(self.config.experts)
        if routes.dim() == 1 and not routes.is_floating_point() and bool(((routes >= 0) & (routes < e)).all()):
            return nn.functional.one_hot(routes.long(), e).float()
        if routes.dim() == 2 and routes.shape[1] == e and bool((routes >= 0).all() & (routes.sum(1) > 0).all()):
            return routes.float() / routes.float().sum(1, keepdim=True)
        raise ValueError(f"routes are expert indices [b] below {e} or weights [b, {e}] of at least 0; "
                         f"these are {routes.dtype} of shape {tuple(routes.shape)}")

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: RoutedCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, routes: Tensor | None = None, **kwargs) -> GlueModelMixtureOutput:
        """Logits [b, s, v] for token ids [b, s].

        routes  expert indices [b] or weights [b, e] to use instead of judging the prompt; a cache that has read the
                prompt knows better and is followed
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids: every expert has embeddings of its own, inputs_embeds would fit one")
        if past_key_values is not None and not isinstance(past_key_values, RoutedCache):
            raise ValueError(f"a mixture keeps a RoutedCache, this is a {type(past_key_values).__name__}; "
                             "leave past_key_values out and one is made")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"the attention mask is [b, s]; this has shape {tuple(attention_mask.shape)}")
        b, s = input_ids.shape
        weights = None
        if past_key_values is not None:
            weights = past_key_values.weights
        elif routes is not None:
            weights = self._weights(routes).to(input_ids.device)
        elif self._pin is not None:
            weights = self._pin.to(input_ids.device).expand(b, -1)
        if weights is not None and len(weights) != b:
            raise ValueError(f"{b} prompts, but routes for {len(weights)}")
        if position_ids is None and attention_mask is not None:
            position_ids = positions(attention_mask, s)
        if position_ids is not None:
            position_ids = position_ids.expand(b, -1)

        dense, reader = self.config.dense, self.config.reader
        asked = {"attention_mask": attention_mask, "position_ids": position_ids}
        first: Any = None  # what every row goes through, and its cache
        slot: Cache | None = None
        if dense or (weights is None and self._reads_all):
            model = self.trunk if dense else self.experts[reader].base_model
            if past_key_values is not None:
                slot = past_key_values.trunk
            elif use_cache:
                slot = DynamicCache(config=model.config)
            first = model(**brought(model, input_ids=input_ids, **asked), past_key_values=slot,
                          use_cache=slot is not None)
        if weights is None and first is not None:
            weights = self._judged(averaged(first.last_hidden_state, attention_mask)).to(input_ids.device)
        elif weights is None:
            weights = self.gate(input_ids, attention_mask, position_ids)
        if use_cache and past_key_values is None:
            past_key_values = RoutedCache(weights, self.experts, slot if dense else None)
            if slot is not None and not dense:
                past_key_values.adopt(reader, slot)

        parts = []
        for i, rows in answering(weights) if past_key_values is None else past_key_values.rows:
            expert, given = self.experts[i], {"input_ids": only(rows, input_ids)}
            if dense:
                given = {"inputs_embeds": only(rows, first.last_hidden_state)}
            elif first is not None and i == reader:
                expert = said(expert, first, rows)
            output = expert(**brought(expert, **given, **{name: only(rows, tensor) for name, tensor in asked.items()}),
                            past_key_values=None if past_key_values is None else past_key_values.slots[i],
                            use_cache=past_key_values is not None, logits_to_keep=logits_to_keep)
            parts.append((i, rows, output.logits.to(input_ids.device)))
        logits = blended(weights, parts)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return GlueModelMixtureOutput(loss=loss, logits=logits, past_key_values=past_key_values, routes=weights)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        # without a cache the whole text is read again at every step; it keeps the route of its prompt
        model_kwargs["routes"] = outputs.routes
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
