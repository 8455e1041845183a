"""`step: mix`: models joined by a router into one mixture."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np

from glue.errors import MethodError
from glue.family import Choice, Of
from glue.member import Member
from glue.steps import Job, Made, Many, Measured, OnDev, steps


def several(members: list[Member], **_: Any) -> None:
    """A mixture needs two experts; whether they have one vocabulary is looked at when the step starts."""
    if len(members) < 2:
        raise MethodError(f"a mixture needs at least two experts; this is {len(members)}",
                          fix="name more members, or lower the threshold of the cluster step that leaves them")


@steps.add("mix", makes="mixture", named=True, writes="all", check=several, source="arXiv:2410.05357")
def mix(job: Job, *, members: Many, router: Annotated[Any, Of("routing")], suite: OnDev,
        level: Literal["model"] = "model") -> Made:
    """One model that answers each question with the expert its router picks.

    level  model: whole models side by side, each with its own embeddings and head; one decision for a question
    suite  dev questions from which the router learns which expert is for what
    """
    job.workers.call("glue.mix.build:check", members)
    results = job.workers.map("glue.steps.mix:results", [(member, suite) for member in members])
    job.workers.call("glue.steps.mix:work", job.folder, members, router, suite, results, job.seed)
    names = ", ".join(member.short for member in members)
    return Made("mixture", seen=frozenset(suite.digests().values()),
                note=f"{len(members)} experts ({names}) behind a {router.method.name} router")


def results(member: Member, suite: Measured) -> dict[str, np.ndarray]:
    """In a worker: per-item results of one expert by task."""
    from glue.kinds import load

    return suite.ask(load(member))


def work(folder, members: list[Member], router: Choice, suite: Measured, found: list[dict[str, np.ndarray]],
         seed: int) -> None:
    """In a worker: let the first expert read the dev questions, make the router, write the mixture."""
    import torch

    from glue.mix.build import build
    from glue.mix.site import survey

    items = suite.items()
    wins = torch.from_numpy(np.stack([np.concatenate([one[task] for task in items]) for one in found], axis=1))
    tasks = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(some) for some in items.values()]))
    prompts = [item.question for some in items.values() for item in some]
    build(folder, members, router, survey(members, prompts, wins, tasks, seed=seed))
