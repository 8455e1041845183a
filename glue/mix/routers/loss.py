"""Router "loss": no training; the expert that finds the prompt least surprising answers it."""

from __future__ import annotations

from glue.mix import routing
from glue.mix.site import LossGate, Site


@routing.add("loss", needs="text", form="text")
def loss(site: Site) -> LossGate:
    """Let every expert read the prompt, and the one with the lowest loss per byte of it answer.

    A baseline with more to look at than any gate has, and as dear: each prompt is read by all experts. It knows what
    an expert has read much of, which need not be what it answers well. Always one expert a prompt.
    """
    return LossGate()
