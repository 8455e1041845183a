"""`step: merge`: members of one shape merged into one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from glue.family import Choice, Of
from glue.member import Member
from glue.steps import Job, Made, Many, One, steps

if TYPE_CHECKING:
    from glue.merge.engine import Merge
    from glue.merge.leaf import Source
    from glue.workers import Workers


def compatible(members: list[Member], method: Choice, base: Member | None = None, **_: Any) -> None:
    """Arity, base, parameters and shapes, from headers alone."""
    from glue.merge.engine import check

    check(method, sources_of(members), source_of(base))


@steps.add("merge", makes="model", lone=True, writes="one", resumes=True, check=compatible)
def merge(job: Job, *, members: Many, method: Annotated[Any, Of("merging")], base: One | None = None,
          dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> Made:
    """One model out of several, by any merge method; `base` is what deltas are taken from.

    dtype  of the result; unless given that of the base, or without a base the smallest that holds every member's
    """
    merge_into(job, members, base, method, dtype)
    names = ", ".join(member.short for member in members)
    return Made("model", base=base or members[0], note=f"{method.method.name} of {names}")


def merge_into(job: Job, members: list[Member], base: Member | None, method: Choice, dtype: str | None) -> None:
    """Stream a merge into the job's folder, by all workers, and put configuration and tokenizer beside it."""
    from glue.merge.engine import prepared

    made = prepared(method, sources_of(members), source_of(base), seed=job.seed, out_dtype=dtype)
    spread(made, job.folder, job.workers, report=lambda done, total: job.report(done, total, ""))
    job.workers.call("glue.kinds.frame:copy_frame", base or members[0], job.folder)


def spread(merge: Merge, folder: Path, workers: Workers, **how: Any) -> str:
    """Write a merge with all workers; see `glue.merge.write.write`."""
    from glue.merge.write import write

    def by_workers(calls, each) -> None:
        workers.map("glue.merge.write:fill", calls, each=each)

    return write(merge, folder, number=max(1, workers.number), spread=by_workers, **how)


def sources_of(members: list[Member]) -> list[Source]:
    """Members as merging sees them; nothing is read yet."""
    from glue.kinds import weights
    from glue.merge.leaf import Source

    return [Source(member.name, weights(member)) for member in members]


def source_of(member: Member | None) -> Source | None:
    """A base as merging sees it, where there is one."""
    return sources_of([member])[0] if member else None
