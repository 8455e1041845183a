"""`step: merge`: members of one shape merged into one model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from glue.family import Choice, Of
from glue.member import Member
from glue.steps import Job, Made, Many, One, steps

if TYPE_CHECKING:
    from glue.merge.leaf import Source


def compatible(members: list[Member], method: Choice, base: Member | None = None, **_: Any) -> None:
    """Arity, base, parameters and shapes, from headers alone."""
    from glue.merge.engine import check

    check(method, sources_of(members), source_of(base))


@steps.add("merge", makes="model", lone=True, writes="one", check=compatible)
def merge(job: Job, *, members: Many, method: Annotated[Any, Of("merging")], base: One | None = None,
          dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> Made:
    """One model out of several, by any merge method; `base` is what deltas are taken from.

    dtype  of the result; unless given that of the base, or without a base the smallest that holds every member's
    """
    job.workers.call("glue.steps.merge:work", job.folder, members, base, method, job.seed, dtype, report=job.report)
    names = ", ".join(member.short for member in members)
    return Made("model", base=base or members[0], note=f"{method.method.name} of {names}")


def work(folder, members: list[Member], base: Member | None, method: Choice, seed: int, dtype: str | None,
         report=None) -> None:
    """In a worker: stream the merge into the folder, then put configuration and tokenizer beside it."""
    from glue.kinds.frame import copy_frame
    from glue.merge.engine import write

    told = (lambda done, total: report(done, total, "")) if report else (lambda done, total: None)
    write(method, sources_of(members), source_of(base), folder, seed=seed, out_dtype=dtype, report=told)
    copy_frame(base or members[0], folder)


def sources_of(members: list[Member]) -> list[Source]:
    """Members as merging sees them; nothing is read yet."""
    from glue.kinds import weights
    from glue.merge.leaf import Source

    return [Source(member.name, weights(member)) for member in members]


def source_of(member: Member | None) -> Source | None:
    """A base as merging sees it, where there is one."""
    return sources_of([member])[0] if member else None
