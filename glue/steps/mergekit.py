"""`step: mergekit`: one model out of members, as a config of mergekit says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glue.kinds import weights
from glue.member import Member
from glue.steps import Configured, Device, Job, Made, OnConfig, steps
from glue.steps.merge import spread

if TYPE_CHECKING:
    from glue.merge.mergekit.nouns import ModelRef
    from glue.merge.mergekit.targets import Model, Planned


def mergeable(config: Configured, **_: Any) -> None:
    """Layers, shapes, names and settings, from headers alone."""
    planned_of(config)


@steps.add("mergekit", makes="model", writes="one", resumes=True, check=mergeable, unkeyed=("device",))
def mergekit(job: Job, *, config: OnConfig, device: Device = "cpu") -> Made:
    """One model out of several, as a mergekit YAML beside the recipe says; its models are members of the zoo.

    config  a path ending in .yaml or .yml
    device  where it is merged
    """
    from glue.merge.mergekit.targets import merge_of

    plan = planned_of(config)
    donor = config.models[plan.donor]
    spread(merge_of(plan, seed=job.seed, device=device), job.folder, job.workers,
           report=lambda done, total: job.report(done, total, ""))
    job.workers.call("glue.steps.mergekit:furnished", job.folder, config, donor, plan.config, job.name, job.seed)
    base = config.config.base_model
    return Made("model", base=config.models[base] if base else donor,
                note=f"{config.config.merge_method} of {', '.join(member.short for member in config.models.values())}")


def planned_of(config: Configured) -> Planned:
    """The plan of a config over members of the zoo. Raises RecipeError with the place in the config."""
    from glue.errors import RecipeError
    from glue.merge.mergekit.targets import planned

    plan = planned(config.config, lambda ref: opened(ref, config.models[ref]))
    if plan.through:
        raise RecipeError(f"this config has to go through mergekit itself: {plan.through}",
                          fix="run  glue merge CONFIG OUT  and add the result with  glue zoo add OUT",
                          place=config.config.place())
    return plan


def opened(ref: ModelRef, member: Member) -> Model:
    """A member as a config sees it."""
    from glue.hub import locate
    from glue.kinds.frame import config_json, framed
    from glue.merge.mergekit.targets import Model

    return Model(ref, member.name, weights(member), config_json(locate(framed(member).path), member.name))


def furnished(folder, config: Configured, donor: Member, changes: dict, name: str, seed: int) -> None:
    """In a worker: configuration, tokenizer and card."""
    from glue.hub import locate
    from glue.kinds.card import Card, Source
    from glue.kinds.frame import framed
    from glue.kinds.furnish import furnish

    cards = {ref: Source(member.name, digest=member.digest, licence=member.licence)
             for ref, member in config.models.items()}
    base = config.config.base_model
    card = Card(name, config.config.merge_method, tuple(card for ref, card in cards.items() if ref != base),
                config.config.text, base=cards.get(base) if base else None, seed=seed)
    furnish(folder, locate(framed(donor).path), card, changes=changes,
            chat_template=config.config.chat_template or None,
            members=[locate(framed(member).path) for member in config.models.values()])
