"""Router "linear": a trained linear map from the state of a prompt to experts."""

from __future__ import annotations

from glue.family import Count, NonNegative, Positive
from glue.mix import routing
from glue.mix.fit import fitted
from glue.mix.site import Gate, Site


@routing.add("linear", needs="scores", form="linear")
def linear(site: Site, *, steps: Count = 300, lr: Positive = 0.01, weight_decay: NonNegative = 0.1,
           top_k: Count = 1) -> Gate:
    """Learn from the dev items on which the experts differ which of them is right; logistic regression by AdamW."""
    return fitted(site, width=0, steps=steps, lr=lr, weight_decay=weight_decay, top_k=top_k)
