"""Router "uniform": every expert answers every prompt, with equal weight; an ensemble, not a choice."""

from __future__ import annotations

import torch

from glue.mix import routing
from glue.mix.site import Gate, Site, plain


@routing.add("uniform", needs="none", form="linear", blends=True)
def uniform(site: Site) -> Gate:
    """Average the answers of all experts: next-token probabilities of whole models, outputs of parts of them.

    As dear as all of them together. It has no top_k: with equal weights the first k would answer everything.
    """
    e, h = len(site.names), site.hidden.shape[1]
    return plain(torch.zeros(e, h), top_k=e)
