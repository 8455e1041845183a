"""What a running member says: a prompt goes in, its continuation comes out."""

from __future__ import annotations

import torch

from glue.kinds import Running


@torch.no_grad()
def continued(running: Running, prompt: str, tokens: int) -> str:
    """The text that follows `prompt`, greedily, up to `tokens` tokens or the end of text."""
    encoded = running.tokenizer(prompt, return_tensors="pt").to(running.model.device)
    made = running.model.generate(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"],
                                  max_new_tokens=tokens, do_sample=False,
                                  pad_token_id=running.tokenizer.pad_token_id)
    return running.tokenizer.decode(made[0, encoded["input_ids"].shape[1]:], skip_special_tokens=True)
