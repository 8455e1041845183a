"""Router "mlp": a trained network with one hidden layer from the state of a prompt to experts."""

from __future__ import annotations

from glue.family import Count
from glue.mix import routing
from glue.mix.fit import trained
from glue.mix.site import Gate, Site


@routing.add("mlp", needs="scores", form="module", source="arXiv:2410.05357", version=2)
def mlp(site: Site, *, width: Count = 64, top_k: Count = 1) -> Gate:
    """Learn as the linear router does, with `width` hidden units, for experts that no plane separates.

    The paper names such a router and says neither its width nor how it is trained; both are ours.
    """
    return trained(site, width=width, top_k=top_k)
