"""Speculative decoding and its warps against transformers' own, which know one target model and no mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import utils

from glue.kinds import load
from glue.kinds.local_source import Local
from glue.proxy.mixing import Sampling
from glue.proxy.speculative import generate, judge, opened


def test_greedy_text_is_that_of_assisted_generation(tiny):
    """With alpha 0 the target is the large model alone: transformers' assisted decoding, and its plain decoding."""
    large, small = (load(tiny(name, seed=seed, spread=0.35)) for name, seed in (("large", 0), ("small", 1)))
    for one in (large, small):
        one.model.double()
        one.model.generation_config.eos_token_id = None
    with torch.no_grad():  # near enough that some drafts stay
        for mine, theirs in zip(small.model.parameters(), large.model.parameters(), strict=True):
            mine.mul_(0.15).add_(theirs, alpha=0.85)
    for prompt in ([1, 5, 9], [30, 2], [7, 7, 7, 8]):
        ids = torch.tensor([prompt])
        words = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 18, "pad_token_id": 0}
        plain = large.model.generate(ids, **words)[0, len(prompt):].tolist()
        assisted = large.model.generate(ids, assistant_model=small.model, **words)[0, len(prompt):].tolist()
        with opened(Local(large), Local(small), Local(small)) as sessions:
            found = generate(prompt, **sessions, alpha=0.0, gamma=4, new=18)
        assert found.tokens == assisted == plain
        assert found.ledger.accepted > 0


@pytest.mark.parametrize(("temperature", "top_p", "top_k"),
                         [(0.7, 1.0, 0), (1.0, 0.8, 0), (1.3, 1.0, 5), (1.1, 0.6, 9)])
def test_cuts_are_those_of_transformers(temperature, top_p, top_k):
    logits = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = Sampling(temperature, top_p, top_k)(logits)
    assert torch.allclose(ours, torch.softmax(theirs, -1), atol=1e-12)


def test_drafts_are_accepted_as_by_transformers(monkeypatch):
    """The same uniform numbers keep the same number of drafted tokens, and what is drawn from then is the same."""
    rng = np.random.default_rng(0)
    kept = set()
    for _ in range(200):
        draft, target = (torch.from_numpy(rng.normal(0, 0.8, (1, 6, 12))) for _ in range(2))
        target = 0.6 * draft + 0.4 * target  # six places: five are drafted
        ids = torch.from_numpy(rng.integers(0, 12, 5))
        uniforms = rng.random(6)

        class Given:
            def __init__(self, numbers):
                self.numbers = iter(numbers)

            def random(self):
                return next(self.numbers)

        asked = {}

        def chosen(probabilities, num_samples, asked=asked):
            asked["probabilities"] = probabilities[0]
            return torch.zeros(1, 1, dtype=torch.long)

        monkeypatch.setattr(torch, "rand_like", lambda like, uniforms=uniforms: torch.from_numpy(uniforms[:5])[None])
        monkeypatch.setattr(torch, "multinomial", chosen)
        _, theirs = utils._speculative_sampling(ids[None], draft[:, :5], 5, target)
        monkeypatch.undo()
        q, pi = torch.softmax(draft[0], -1), torch.softmax(target[0], -1)
        accepted, token = judge(ids.tolist(), q, lambda place, pi=pi: pi[place], Given(uniforms))
        assert accepted == int(theirs)
        left = (pi[accepted] - q[accepted]).clamp(min=0) if accepted < 5 else pi[5]
        assert torch.allclose(asked["probabilities"], left / left.sum(), atol=1e-12)
        assert left[token] > 0
        kept.add(accepted)
    assert kept >= {0, 1, 2, 3}
