"""Text and running members: what one writes after a prompt, how well it knows a text, how much of one it can see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from glue.kinds import Running

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 4096  # padded tokens of which there are logits at once


@torch.no_grad()
def continued(running: Running, prompt: str, tokens: int) -> str:
    """The text that follows `prompt`, greedily, up to `tokens` tokens or the end of text."""
    one = running.answering(prompt)
    return str(one.tokenizer.decode(_written(one, prompt, max_new_tokens=tokens), skip_special_tokens=True))


def pace(running: Running, prompt: str, tokens: int = 32, times: int = 3) -> float:
    """Tokens a second that a member writes after `prompt`, reading it and choosing experts included; the median."""
    taken = []
    for _ in range(times):
        began = perf_counter()
        _written(running.answering(prompt), prompt, min_new_tokens=tokens, max_new_tokens=tokens)
        taken.append(perf_counter() - began)
    return tokens / sorted(taken)[times // 2]


def _written(one: Running, prompt: str, **how: int) -> Tensor:
    """The tokens that are written greedily after a prompt; how: limits of transformers' `generate`."""
    encoded = one.tokenizer(prompt, return_tensors="pt").to(one.model.device)
    ids: Any = encoded["input_ids"]
    generate: Any = one.model.generate
    made = generate(input_ids=ids, attention_mask=encoded["attention_mask"], do_sample=False,
                    pad_token_id=one.tokenizer.pad_token_id, **how)
    return made[0, ids.shape[1]:]


@torch.inference_mode()
def losses(running: Running, texts: Sequence[str]) -> Tensor:
    """How badly a member knows each text: nats a byte, which members of any tokenizer can be compared by. [m] fp64

    The first token is guessed after the start of text, or its end where the tokenizer has no start. Of a text that is
    longer than the member can see, its end counts. What the tokenizer has no token for would cost nothing to guess, so
    an unknown token costs as much as bytes guessed blindly. A text without bytes costs nothing.
    """
    model, tokenizer = running.model, running.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    seen: list[list[int]] = []  # of each text what the model reads
    sizes, blind = torch.zeros(2, len(texts), dtype=torch.float64)  # bytes that it guesses; what unknown tokens cost
    for k, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = ([] if start is None else [start]) + ids
        seen.append(whole[-longest(model, tokenizer):])
        guessed = seen[k][1:]
        sizes[k] = len(text.encode(errors="surrogatepass")) * len(guessed) / max(1, len(ids))
        unknown = guessed.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
        blind[k] = math.log(256) * unknown / max(1, len(guessed))
    sums = torch.zeros(len(texts), dtype=torch.float64)
    order = sorted((k for k in range(len(texts)) if sizes[k]), key=lambda k: -len(seen[k]))
    while order:
        width = len(seen[order[0]])
        most = running.room.of(BATCH_TOKENS // width)
        some, order = order[:most], order[most:]
        sums[some] = torch.stack(running.room.read(some, lambda part: _summed(
            model, [seen[k] for k in part], width)))  # noqa: B023 - called at once
    return sums / torch.where(sizes > 0, sizes, 1.0) + blind


def _summed(model: Any, texts: Sequence[Sequence[int]], width: int) -> list[Tensor]:
    """What all tokens of a text after its first cost together, in nats; all texts as wide as the widest of them."""
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    wanted = torch.full((len(texts), width), -100)  # what cross_entropy passes over
    for line, text in enumerate(texts):  # padded on the right, where no token that counts can see it
        ids[line, :len(text)] = torch.tensor(text)
        wanted[line, :len(text) - 1] = torch.tensor(text[1:])
    logits = model(ids.to(model.device), use_cache=False).logits.float()
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.to(logits.device).flatten(),
                                             reduction="none")
    return list(each.view(ids.shape).double().sum(1).cpu())


def longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the model can see, found where lm-eval finds it."""
    config = getattr(model.config, "text_config", None) or model.config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return tokenizer.model_max_length if tokenizer.model_max_length < 10 ** 9 else 2048
