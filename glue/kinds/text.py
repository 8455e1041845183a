"""What a running member says: a prompt goes in, its continuation comes out."""

from __future__ import annotations

from typing import Any

import torch

from glue.kinds import Running


@torch.no_grad()
def continued(running: Running, prompt: str, tokens: int) -> str:
    """The text that follows `prompt`, greedily, up to `tokens` tokens or the end of text."""
    model, tokenizer = running.model, running.tokenizer
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    ids: Any = encoded["input_ids"]
    generate: Any = model.generate
    made = generate(input_ids=ids, attention_mask=encoded["attention_mask"], max_new_tokens=tokens, do_sample=False,
                    pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(made[0, ids.shape[1]:], skip_special_tokens=True))
