"""Router "random": the control that any other router should beat."""

from __future__ import annotations

import torch

from glue.family import Count
from glue.mix import routing
from glue.mix.fit import standardisation
from glue.mix.site import Gate, Site


@routing.add("random", needs="hidden", form="linear", source="arXiv:2410.05357")
def random(site: Site, *, top_k: Count = 1) -> Gate:
    """Random directions in the space of standardised states: the same prompt always gets the same expert."""
    mean, scale = standardisation(site.hidden)
    e, h = len(site.names), site.hidden.shape[1]
    weight = torch.randn(e, h, generator=site.generator()) / h ** 0.5
    return Gate(weight, torch.zeros(e), mean, scale, top_k=top_k)
