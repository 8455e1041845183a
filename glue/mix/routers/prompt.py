"""Router "prompt": no training; an expert answers what looks like its own prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from glue.errors import MethodError, did_you_mean
from glue.family import Count, Positive
from glue.mix import routing
from glue.mix.fit import standardisation
from glue.mix.site import Gate, Site


@routing.add("prompt", needs="text", form="linear", source="arXiv:2410.05357")
def prompt(site: Site, *, prompts: dict[str, list[str]] | None = None, temperature: Positive = 1.0,
           top_k: Count = 1) -> Gate:
    """Point each expert at the mean state of its prompts, away from the mean of all experts; rows have length 1.

    prompts      texts for each expert, by its name; else the dev questions of the tasks on which it is the best, and an
                 expert that is best on no task is never chosen
    temperature  divides the logits; with several experts a prompt it sets how much the weights differ

    Departs from the paper's code, which subtracts what the layer input of the last token is for hand-written negative
    prompts: states here are those the router sees when it serves, standardised, and the others' prompts are the
    negatives.
    """
    if prompts is None:
        states = [site.hidden[rows] for rows in _best_on(site)]
    else:
        _check(site, prompts)
        states = [site.prompt_states(prompts[name]) for name in site.names]
    ready = torch.tensor([len(rows) > 0 for rows in states])
    _, scale = standardisation(torch.cat(states))
    centres = torch.stack([rows.mean(0) if len(rows) else torch.zeros(len(scale)) for rows in states])
    mean = centres[ready].mean(0)  # halfway between experts, however many prompts each has
    weight = (centres - mean) / scale * ready[:, None]
    weight = weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return Gate(weight, torch.where(ready, 0.0, -torch.inf), mean, scale, temperature=temperature, top_k=top_k)


def _best_on(site: Site) -> list[Tensor]:
    """For each expert the items of the tasks on which none scores more; experts that tie share a task. e x [m] bool"""
    numbers = site.tasks.unique()
    values = torch.stack([site.wins[site.tasks == number].double().mean(0) for number in numbers])
    best = values >= values.amax(1, keepdim=True) - 1e-9
    return [torch.isin(site.tasks, numbers[best[:, i]]) for i in range(len(site.names))]


def _check(site: Site, prompts: dict[str, list[str]]) -> None:
    for name in prompts:
        if name not in site.names:
            raise MethodError(f"router 'prompt' has prompts for '{name}', which is no expert of this mixture"
                              f"{did_you_mean(name, site.names)}")
    for name in site.names:
        if not prompts.get(name):
            raise MethodError(f"router 'prompt' has no prompts for the expert '{name}'",
                              fix=f"add  {name}: [...]  to prompts, or leave prompts out")
