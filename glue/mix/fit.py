"""Fitting a router to dev items: raise the gate's weight on the experts that answer each item well."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glue.errors import MethodError
from glue.mix.site import Gate, Site


def standardisation(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature; a feature that never changes is divided by 1. [m, h] -> [h], [h]"""
    mean, spread = hidden.mean(0), hidden.std(0, correction=0)
    return mean, torch.where(spread > 1e-6 * (1 + mean.abs()), spread, 1.0)


@torch.enable_grad()
def fitted(site: Site, *, width: int, steps: int, lr: float, weight_decay: float, top_k: int) -> Gate:
    """A gate trained by AdamW on all items at once; width 0 is a linear gate.

    Only items on which the experts differ say anything about routing. The loss of one is -log(sum_e p_e w_e / max w),
    with gate probabilities p and results w: zero when all weight lies on its best experts.
    Raises MethodError where the experts differ nowhere.
    """
    differ = site.wins.amax(1) > site.wins.amin(1)
    if not bool(differ.any()):
        raise MethodError(f"the experts score the same on each of the {len(site.prompts)} dev items, so there is "
                          f"nothing to learn from", fix="use the router uniform, or mix members that differ")
    mean, scale = standardisation(site.hidden.double())
    state = (site.hidden.double()[differ] - mean) / scale
    wins = site.wins.double()[differ]
    share = wins / wins.amax(1, keepdim=True)
    h, e = state.shape[1], len(site.names)
    rng = site.generator()
    inner = _layer(h, width, rng) if width else None
    outer = _layer(width or h, e, rng)
    gate = nn.Sequential(inner, nn.ReLU(), outer) if inner else outer
    optimizer = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -(gate(state).log_softmax(1) + share.log()).logsumexp(1).mean()
        loss.backward()
        optimizer.step()
    hidden_layer = (inner.weight.detach().float(), inner.bias.detach().float()) if inner else None
    return Gate(outer.weight.detach().float(), outer.bias.detach().float(), mean.float(), scale.float(), hidden_layer,
                top_k=top_k)


def _layer(inputs: int, outputs: int, rng: torch.Generator) -> nn.Linear:
    """A layer drawn from a generator; fp64, so that the result hardly depends on the machine."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.uniform_(-inputs ** -0.5, inputs ** -0.5, generator=rng)
        layer.bias.zero_()
    return layer
