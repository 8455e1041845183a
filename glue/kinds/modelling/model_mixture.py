"""A mixture of whole causal language models: a router reads each prompt once, and the models it chose answer.

Every expert keeps its own embeddings, layers, norm and head, so an expert that gets all the weight answers as it did
alone. One expert, the reader, also turns the prompt into the state that the router judges: the mean of its hidden
states over the positions that are not padding. The choice is made when the prompt is read and kept in the cache.

Letters: b batch, s sequence, v vocabulary, h hidden size of the reader, e experts, k experts chosen per prompt.

k = 1  each sample runs through its expert only, and the logits are that expert's, unchanged.
k > 1  next-token probabilities are mixed: p = sum_i w_i p_i. The logits returned are log p plus the weighted mean of
       the experts' own log-normalisers, so that a mixture of copies has the logits of the model, not just its odds.

This file needs torch and transformers and nothing else: people without glue load the folder it lies in with
trust_remote_code=True.
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
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

TAKEN_FROM_READER = ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "pad_token_id")


class GlueModelMixtureConfig(PretrainedConfig):
    """The shape of a model-level mixture.

    experts             configuration of each expert as plain data, model_type included
    experts_per_prompt  how many of them answer a prompt
    reader              index of the expert whose hidden states the router judges
    layer               which of them: an index of hidden_states; -1 is the last, after the final norm
    router_width        hidden units of the router; 0 is a linear router
    router_temperature  divides the router's logits; changes weights, never the order of experts
    """

    model_type = "glue_model_mixture"
    _auto_class = "AutoConfig"

    def __init__(self, experts: Sequence[dict] = (), experts_per_prompt: int = 1, reader: int = 0, layer: int = -1,
                 router_width: int = 0, router_temperature: float = 1.0, **kwargs):
        self.experts, self.experts_per_prompt = [dict(expert) for expert in experts], experts_per_prompt
        self.reader, self.layer = reader, layer
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


class RoutedCache(Cache):
    """One cache per expert, holding the rows that this expert answers, with the weights decided for every row.

    weights  [b, e]; never change once a prompt was read
    """

    def __init__(self, weights: Tensor, experts: Sequence[PreTrainedModel]):
        super().__init__(layers=[])
        self.weights = weights
        self.slots = [DynamicCache(config=expert.config) for expert in experts]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far; the same for every expert that has rows."""
        return max(slot.get_seq_length() for slot in self.slots)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, which is no limit."""
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        indices = indices.to(self.weights.device)
        for weight, slot in zip(self.weights.unbind(1), self.slots, strict=True):
            place = torch.where(weight > 0, (weight > 0).cumsum(0) - 1, -1)[indices]
            slot.batch_select_indices(place[place >= 0])
        self.weights = self.weights[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; beam search asks for this."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times, one after the other."""
        rows = torch.arange(len(self.weights), device=self.weights.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given negative, as transformers does."""
        for slot in self.slots:
            slot.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens; routes stay."""
        for slot in self.slots:
            slot.reset()

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.weights)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace."""
        return all(slot.is_croppable for slot in self.slots)


class Router(nn.Module):
    """Pooled states [b, h] -> logits [b, e]: standardise, one hidden layer if it has a width, one linear map."""

    mean: Tensor
    scale: Tensor

    def __init__(self, hidden: int, experts: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("scale", torch.ones(hidden))
        self.inner = nn.Linear(hidden, width) if width else None
        self.outer = nn.Linear(width or hidden, experts)

    def forward(self, pooled: Tensor) -> Tensor:
        """[b, h] -> [b, e]"""
        state = (pooled.to(self.mean) - self.mean) / self.scale
        if self.inner is not None:
            state = self.inner(state).relu()
        return self.outer(state)


def positions(attention_mask: Tensor, length: int) -> Tensor:
    """Position of each of the last `length` tokens, padding not counted. [b, s] -> [b, length]"""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def pooled(reader: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, layer: int,
           position_ids: Tensor | None = None) -> Tensor:
    """Mean hidden state of each prompt over the tokens that are not padding, in fp32. [b, s] -> [b, h]"""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    where = positions(mask, input_ids.shape[1]) if position_ids is None else position_ids
    output = reader.base_model(input_ids=input_ids, attention_mask=mask, position_ids=where, use_cache=False,
                               output_hidden_states=layer != -1)
    state = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    share = mask.to(state.device, torch.float32).unsqueeze(-1)
    return (state.float() * share).sum(1) / share.sum(1).clamp(min=1)


def chosen(logits: Tensor, k: int) -> Tensor:
    """Router logits to weights: softmax, the k largest (the first among equals), renormalised. [b, e] -> [b, e]"""
    weights = logits.float().softmax(-1)
    order = weights.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(weights).scatter(1, order, weights.gather(1, order))
    return kept / kept.sum(-1, keepdim=True)


def blended(weights: Tensor, parts: Sequence[tuple[int, Tensor, Tensor]]) -> Tensor:
    """The logits of the mixture [b, s, v] from (expert, its rows [n], their logits [n, s, v]); see the top of the file.

    weights  [b, e]
    """
    first = parts[0][2]
    if len(parts) == 1:
        return first  # one expert answers every row
    alone = (weights > 0).sum(1) == 1
    shape = (len(weights), *first.shape[1:])
    out = first.new_zeros(shape)
    mixed = first.new_full(shape if not alone.all() else (0,), -torch.inf, dtype=torch.float32)
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
    if not alone.all():
        out[~alone] = (mixed + level)[~alone].to(out)
    return out


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
        for i, expert in enumerate(config.experts):
            # direct children, not a ModuleList: transformers gathers tied weights and the like from children only
            self.add_module(f"expert_{i}", AutoModelForCausalLM.from_config(AutoConfig.for_model(**expert), **kind))
        hidden = self.experts[config.reader].config.hidden_size
        self.router = Router(hidden, len(config.experts), config.router_width)
        self._pin: Tensor | None = None
        self.post_init()

    @property
    def experts(self) -> list[PreTrainedModel]:
        """The whole models, in the order of their indices."""
        return [getattr(self, f"expert_{i}") for i in range(len(self.config.experts))]

    def get_input_embeddings(self) -> nn.Module:
        """Those of the reader."""
        return self.experts[self.config.reader].get_input_embeddings()

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
        reader = self.experts[self.config.reader]
        states = pooled(reader, input_ids, attention_mask, self.config.layer, position_ids)
        logits = self.router(states.to(self.router.outer.weight.device)) / self.config.router_temperature
        return chosen(logits, self.config.experts_per_prompt).to(input_ids.device)

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
        if past_key_values is not None:
            weights = past_key_values.weights
        elif routes is not None:
            weights = self._weights(routes).to(input_ids.device)
        elif self._pin is not None:
            weights = self._pin.to(input_ids.device).expand(b, -1)
        else:
            weights = self.gate(input_ids, attention_mask, position_ids)
        if len(weights) != b:
            raise ValueError(f"{b} prompts, but routes for {len(weights)}")
        if use_cache and past_key_values is None:
            past_key_values = RoutedCache(weights, self.experts)
        if position_ids is None and attention_mask is not None:
            position_ids = positions(attention_mask, s)
        if position_ids is not None:
            position_ids = position_ids.expand(b, -1)

        parts = []
        for i, expert in enumerate(self.experts):
            rows = weights[:, i].nonzero()[:, 0]
            if len(rows):
                output = expert(
                    input_ids=input_ids[rows],
                    attention_mask=None if attention_mask is None else attention_mask[rows],
                    position_ids=None if position_ids is None else position_ids[rows],
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
