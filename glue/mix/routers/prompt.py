"""Router "prompt": no training; an expert answers what looks like its own prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from glue.errors import MethodError, did_you_mean
from glue.family import Count, Positive
from glue.mix import routing
from glue.mix.fit import standardisation
from glue.mix.site import Gate, Site


@routing.add("prompt", needs="text", form="linear", source="arXiv:2410.05357", version=2)
def prompt(site: Site, *, prompts: dict[str, list[str]] | None = None, negatives: dict[str, list[str]] | None = None,
           temperature: Positive = 1.0, top_k: Count = 1) -> Gate:
    """Point each expert from the mean state of its negative prompts to that of its own; rows have length 1.

    prompts      texts for each expert, by its name; else the dev questions of the tasks on which it is the best, and an
                 expert that is best on no task is never first
    negatives    texts that are not for an expert, by its name; where it has none, the prompts of all others
    temperature  divides the logits; with several experts a prompt it sets how much the weights differ

    Departs from the paper's code, which takes the last token's input of a layer and applies it behind that layer's
    norm: states here are those that the gate itself will see, standardised, and 0 lies halfway between the experts.
    """
    if prompts is None:
        if negatives:
            raise MethodError("router 'prompt' has negatives and no prompts that they could be the negatives of",
                              fix="give the experts prompts as well")
        own = [site.hidden[rows] for rows in _best_on(site)]
    else:
        _check(site, prompts, negatives or {})
        own = [site.prompt_states(prompts[name]) for name in site.names]
    barred = [i for i, rows in enumerate(own) if not len(rows)]
    ready = [i for i, rows in enumerate(own) if len(rows)]
    _, scale = standardisation(torch.cat(own))
    centres = torch.stack([rows.mean(0) if len(rows) else torch.zeros(len(scale)) for rows in own])
    mean = centres[ready].mean(0)  # halfway between experts, however many prompts each has
    away = mean.expand(len(own), -1).clone()  # from all experts is, but for its length, from all others
    for i, name in enumerate(site.names):
        if negatives and name in negatives:
            away[i] = site.prompt_states(negatives[name]).mean(0)
    weight = (centres - away) / scale
    weight[barred] = 0.0
    weight = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return site.gate(weight, torch.zeros(len(own)), mean, scale, barred=barred, temperature=temperature, top_k=top_k)


def _best_on(site: Site) -> list[Tensor]:
    """For each expert the items of the tasks on which none scores more; experts that tie share a task. e x [m] bool"""
    numbers = site.tasks.unique()
    values = torch.stack([site.wins[site.tasks == number].double().mean(0) for number in numbers])
    best = values >= values.amax(1, keepdim=True) - 1e-9
    return [torch.isin(site.tasks, numbers[best[:, i]]) for i in range(len(site.names))]


def _check(site: Site, prompts: dict[str, list[str]], negatives: dict[str, list[str]]) -> None:
    for name in (*prompts, *negatives):
        if name not in site.names:
            raise MethodError(f"router 'prompt' has prompts for '{name}', which is no expert of this mixture"
                              f"{did_you_mean(name, site.names)}")
    for name in site.names:
        if not prompts.get(name):
            raise MethodError(f"router 'prompt' has no prompts for the expert '{name}'",
                              fix=f"add  {name}: [...]  to prompts, or leave prompts out")
        if negatives.get(name) == []:
            raise MethodError(f"router 'prompt' has an empty list of negatives for the expert '{name}'",
                              fix="leave the name out to use the prompts of the others")
