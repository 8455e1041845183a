"""Router "linear": a trained linear map from the state of a prompt to experts."""

from __future__ import annotations

from glue.family import Count
from glue.mix import routing
from glue.mix.fit import trained
from glue.mix.site import Gate, Site


@routing.add("linear", needs="scores", form="linear", version=2)
def linear(site: Site, *, top_k: Count = 1) -> Gate:
    """Learn from the dev items on which the experts differ which of them is right: penalised logistic regression.

    An item that several experts answer is content with any of them. The penalty on large weights, of five, and the
    temperature are those that suit dev items which the gate was not fitted to.
    """
    return trained(site, width=0, top_k=top_k)
