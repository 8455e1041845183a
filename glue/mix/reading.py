"""Reading: texts on their way through a mixture of MLPs that is being made, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glue.kinds import weights
from glue.mix.layerwise import Batch, Layer, Walk, fill, pooled
from glue.mix.parts import Parts
from glue.mix.site import Gate

READ = 2048  # padded tokens of one batch


class Reading:
    """Tells the states at the gates of a mixture, behind the gates that were made for the layers below.

    gates        of the mixed layers so far; None where all experts count equally
    by_sentence  whether a gate chooses once for a text or for each of its tokens
    """

    def __init__(self, parts: Parts, by_sentence: bool):
        assert parts.trunk is not None, "MLPs need a trunk around them"
        self.trunk, self.experts = parts.trunk, [weights(expert) for expert in parts.experts]
        self.dense, self.by_sentence, self.gates = parts.dense, by_sentence, list[Gate | None]()
        self._device = parts.device
        self._walk = Walk(parts.trunk, parts.frame, self._through, READ, self._device)
        self.config = self._walk.config

    @torch.no_grad()
    def pooled(self, i: int, texts: Sequence[str]) -> Tensor:
        """The mean over the tokens of each text of what the MLPs of layer i are about to see. [m] -> [m, h] fp32"""
        return pooled(self._at(i, texts), self.config.hidden_size, self._norm(i))

    @torch.no_grad()
    def tokens(self, i: int, texts: Sequence[str], shares: Tensor) -> Tensor:
        """What the MLPs of layer i are about to see of some tokens of each text. [m * r, h] fp32, text after text

        shares  [m, r] in 0..1, how far into its text each of these tokens is
        """
        (m, r), norm = shares.shape, self._norm(i)
        states = torch.empty(m, r, self.config.hidden_size)
        for places, mask, state in self._at(i, texts):
            length = mask.sum(1, keepdim=True)
            at = mask.shape[1] - length + (shares[places].to(mask.device) * length).long().clamp(max=length - 1)
            states[places] = norm(state.gather(1, at[..., None].expand(-1, -1, state.shape[2]))).cpu()
        return states.flatten(0, 1)

    def _at(self, i: int, texts: Sequence[str]) -> list[Batch]:
        assert i <= self.dense + len(self.gates), f"nothing is decided yet about layer {self.dense + len(self.gates)}"
        return self._walk.at(i + 1, texts)

    def _through(self, place: int, batches: list[Batch]) -> list[Batch]:
        """From the embeddings, or from before the MLPs of one layer, to before those of the next."""
        if place:
            batches = self._answered(place - 1, batches)
        layer = Layer(self.config, place, answers=False, device=self._device)
        layer.fill(self.trunk)
        return layer.through(batches)

    def _answered(self, i: int, batches: list[Batch]) -> list[Batch]:
        """From before the MLPs of layer i to behind it."""
        mlp, norm = Layer(self.config, i).mlp, self._norm(i)
        if i < self.dense:
            fill(mlp, self.trunk, f"model.layers.{i}.mlp", self._device)
            return [(places, mask, state + mlp(norm(state))) for places, mask, state in batches]
        shares = [self._shares(self.gates[i - self.dense], norm(state), mask) for _, mask, state in batches]
        passed = [state.clone() for _, _, state in batches]
        for j, expert in enumerate(self.experts):
            fill(mlp, expert, f"model.layers.{i}.mlp", self._device)
            for (_, _, state), share, out in zip(batches, shares, passed, strict=True):
                asked = share[:, j].nonzero()[:, 0]
                answer = mlp(norm(state).flatten(0, 1)[asked])
                out.flatten(0, 1).index_add_(0, asked, share[asked, j, None] * answer)
        return [(places, mask, out) for (places, mask, _), out in zip(batches, passed, strict=True)]

    def _shares(self, gate: Gate | None, states: Tensor, mask: Tensor) -> Tensor:
        """The weight of each expert for each token. [b, s, h] -> [b * s, e]"""
        from glue.kinds.modelling.routed import averaged, chosen

        (b, s, _), e = states.shape, len(self.experts)
        if gate is None:
            return torch.full((b * s, e), 1 / e, device=states.device)
        if self.by_sentence:
            found = chosen(gate.logits(averaged(states, mask).cpu()), gate.top_k).repeat_interleave(s, 0)
        else:
            found = chosen(gate.logits(states.flatten(0, 1).cpu()), gate.top_k)
        return found.to(states.device)

    def _norm(self, i: int) -> nn.Module:
        norm = Layer(self.config, i).inner.post_attention_layernorm
        fill(norm, self.trunk, f"model.layers.{i}.post_attention_layernorm", self._device)
        return norm
