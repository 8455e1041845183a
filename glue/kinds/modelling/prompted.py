"""A causal language model that reads the same few vectors before every text, and tells of the text alone.

The vectors stand at the positions 0..t-1 of every row, and its first real token at position t, however the row is
padded. Outside nothing shows: logits are those of the text's tokens, a cache counts the text's tokens, and the
configuration says how long a text may be beside the prompt.

Letters: b batch, s sequence, t tokens of the prompt, h hidden size, v vocabulary.
"""

import inspect
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")  # in a configuration: tokens that the model can see


class PromptCache(DynamicCache):
    """What the model has read, the prompt among it; tells of the text's tokens only.

    inner  the same layers as the model sees them: with the prompt
    """

    def __init__(self, inner: Cache, tokens: int):
        super().__init__()
        self.inner, self.tokens = inner, tokens
        self.layers = inner.layers  # one list: whoever selects rows here or crops selects and crops there

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the text that were read."""
        return max(0, self.inner.get_seq_length(layer_idx) - self.tokens)


class PromptedForCausalLM(PreTrainedModel, GenerationMixin):
    """A model behind a soft prompt; see the top of the file.

    inner   the model, which is not changed and may be shared
    prompt  [t, h]
    """

    config_class = PretrainedConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # whatever the inner model supports

    def __init__(self, inner: PreTrainedModel, prompt: Tensor):
        super().__init__(shortened(inner.config, len(prompt)))
        self.inner = inner
        table: Any = inner.get_input_embeddings().weight
        self.prompt = nn.Parameter(prompt.detach().to(table.device, table.dtype), requires_grad=False)
        self.generation_config = deepcopy(inner.generation_config)
        self._keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def get_input_embeddings(self) -> nn.Module:
        """Those of the inner model."""
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The head of the inner model."""
        return self.inner.get_output_embeddings()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a PromptCache

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: Cache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits [b, s, v] for the tokens of a text [b, s], or their embeddings [b, s, h].

        attention_mask, position_ids  of the text; the mask [b, all tokens so far]
        past_key_values               a PromptCache, or any empty cache; also what the inner model has read with it
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"the attention mask is [b, s]; this has shape {tuple(attention_mask.shape)}")
        text = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        b, s = text.shape[:2]
        t, cache = len(self.prompt), self._cache(past_key_values, use_cache)
        begins = cache is None or cache.inner.get_seq_length() == 0
        where = self._positions(text, attention_mask, position_ids, cache)
        mask = None
        if attention_mask is not None:
            mask = torch.cat([attention_mask.new_ones(b, t), attention_mask], 1)
        keep = self._kept(logits_to_keep, s, t if begins else 0)
        if begins:
            text = torch.cat([self.prompt.to(text).expand(b, -1, -1), text], 1)
            first = torch.arange(t, device=where.device).expand(len(where), -1)
            where = torch.cat([first, where], 1)
        output = self.inner(inputs_embeds=text, attention_mask=mask, position_ids=where,
                            past_key_values=None if cache is None else cache.inner, use_cache=cache is not None,
                            **({"logits_to_keep": keep} if self._keeps else {}), **kwargs)
        logits = output.logits
        if not self._keeps:
            logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache,
                                      hidden_states=output.get("hidden_states"), attentions=output.get("attentions"))

    def _cache(self, given: Cache | None, use_cache: bool | None) -> PromptCache | None:
        if isinstance(given, PromptCache):
            return given
        if given is not None:
            return PromptCache(given, len(self.prompt))
        wanted = getattr(self.config, "use_cache", False) if use_cache is None else use_cache
        return PromptCache(DynamicCache(config=self.inner.config), len(self.prompt)) if wanted else None

    def _positions(self, text: Tensor, mask: Tensor | None, given: Tensor | None, cache: PromptCache | None) -> Tensor:
        """Of each token of the text among all that the model reads, padding not counted. [1 or b, s]"""
        s = text.shape[1]
        if given is not None:
            place = given[:, -s:]
        elif mask is not None:
            place = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -s:]
        else:
            read = 0 if cache is None else cache.get_seq_length()
            place = torch.arange(read, read + s, device=text.device)[None]
        return place + len(self.prompt)

    @staticmethod
    def _kept(asked: int | Tensor, s: int, before: int) -> int | Tensor:
        """What the inner model is asked to keep of `before` + s places, so that none of the prompt is among it."""
        if isinstance(asked, int):
            return min(asked, s) if asked else s
        return torch.where(asked < 0, asked, asked + before)


def shortened(config: PretrainedConfig, tokens: int) -> PretrainedConfig:
    """The configuration of a model that sees so many tokens less of a text."""
    config = deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        told = {name: getattr(part, name) for name in LENGTHS if getattr(part, name, None) is not None}
        for name, length in told.items():  # read first: two names may mean one number
            setattr(part, name, length - tokens)
    return config
