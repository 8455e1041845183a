"""Router "centroid": no training; a prompt goes to the expert whose dev prompts it lies nearest to."""

from __future__ import annotations

from functools import partial

from glue.family import Count
from glue.mix import routing
from glue.mix.fit import calibrated, standardisation, telling
from glue.mix.site import Gate, Site

PRIORS = (1.0, 3.0, 10.0, 30.0, 100.0)  # how much the logarithm of an expert's share of prompts counts as distance


@routing.add("centroid", needs="scores", form="linear")
def centroid(site: Site, *, top_k: Count = 1) -> Gate:
    """Score an expert by minus half the squared distance from the mean state of the dev prompts that it answers best.

    Experts that are equally good at a prompt share it; prompts at which all are equal count for none; an expert that is
    never the best is never first; one that is best on few prompts has to lie nearer than the others.

    Distances are between standardised states. They, and not cosines, since the mean of an expert that is right about a
    little of everything lies near the middle, where an angle means nothing. Their differences are linear in the state,
    so that this is a linear gate. How much the number of prompts counts, and the temperature, are those that suit dev
    prompts which were left out of the means.
    """
    return calibrated(site, partial(_nearest, top_k=top_k))


def _nearest(site: Site, top_k: int) -> list[Gate]:
    """A gate for each weight of the number of prompts."""
    rows = telling(site)
    mean, scale = standardisation(site.hidden)
    best = (site.wins[rows] >= site.wins[rows].amax(1, keepdim=True) - 1e-9).float()
    best = best / best.sum(1, keepdim=True)
    held = best.sum(0)
    centres = best.T @ ((site.hidden[rows] - mean) / scale) / held.clamp(min=1e-9)[:, None]
    number, near = (held / len(rows)).clamp(min=1e-9).log(), -centres.square().sum(1) / 2
    barred = (held == 0).nonzero()[:, 0].tolist()
    return [site.gate(centres, near + prior * number, mean, scale, top_k=top_k, barred=barred) for prior in PRIORS]
