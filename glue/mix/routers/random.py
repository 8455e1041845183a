"""Router "random": the control that any other router should beat."""

from __future__ import annotations

import torch

from glue.family import Count
from glue.mix import routing
from glue.mix.fit import standardisation
from glue.mix.site import Gate, Site


@routing.add("random", needs="hidden", form="linear", source="arXiv:2410.05357", version=2)
def random(site: Site, *, top_k: Count = 1) -> Gate:
    """Random directions in the space of standardised states: the same prompt always gets the same expert.

    The direction of an expert follows from its name, the seed and the place, whatever the order of experts.
    """
    mean, scale = standardisation(site.hidden)
    h = site.hidden.shape[1]
    weight = torch.stack([torch.randn(h, generator=site.generator(name)) for name in site.names]) / h ** 0.5
    return site.gate(weight, torch.zeros(len(weight)), mean, scale, top_k=top_k)
