"""Router "uniform": every expert answers every prompt, with equal weight; an ensemble, not a choice."""

from __future__ import annotations

import torch

from glue.mix import routing
from glue.mix.site import Gate, Site


@routing.add("uniform", needs="none", form="linear")
def uniform(site: Site) -> Gate:
    """Average the next-token probabilities of all experts. As dear as all of them together."""
    e, h = len(site.names), site.hidden.shape[1]
    return Gate(torch.zeros(e, h), torch.zeros(e), torch.zeros(h), torch.ones(h), top_k=e)
