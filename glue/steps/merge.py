"""`step: merge`: members of one shape merged into one model, or adapters of one base into one adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from glue.errors import MethodError
from glue.family import Choice, Of
from glue.hub import locate
from glue.member import Member
from glue.steps import Device, Job, Made, Many, One, steps

if TYPE_CHECKING:
    from glue.merge.adapters import Update
    from glue.merge.engine import Merge
    from glue.merge.leaf import Source
    from glue.workers import Workers


def kind_of(method: Choice, **_: Any) -> str:
    """What a merge leaves: methods in the space of factors make an adapter, all others a model."""
    return "adapter" if method.method.traits["space"] == "factors" else "model"


def compatible(members: list[Member], method: Choice, base: Member | None = None, **_: Any) -> None:
    """Arity, base, parameters and shapes, from headers alone."""
    if kind_of(method) == "adapter":
        from glue.merge.adapters import check as check_adapters

        below(members, method, base)
        check_adapters(method, updates_of(members))
        return
    from glue.merge.engine import check

    check(method, sources_of(members), source_of(base))


@steps.add("merge", makes=kind_of, lone=True, writes="one", holds="pieces", resumes=True, check=compatible,
           unkeyed=("device",))
def merge(job: Job, *, members: Many, method: Annotated[Any, Of("merging")], base: One | None = None,
          dtype: Literal["float32", "bfloat16", "float16"] | None = None, device: Device = "cpu") -> Made:
    """One model out of several, by any merge method; `base` is what deltas are taken from.

    Methods that work on factors (flora, fedit, ...) take adapters of one base, and make one adapter of that base.

    dtype  of the result; unless given that of the base, or without a base the smallest that holds every member's;
           of the factors of an adapter float32
    device  where models are merged; adapters always on the processor
    """
    names = ", ".join(member.short for member in members)
    if kind_of(method) == "adapter":
        under = below(members, method, base)
        job.workers.call("glue.steps.merge:combined", job.folder, members, method, under, dtype or "float32",
                         report=job.report)
        return Made("adapter", base=under, note=f"{method.method.name} of {names}{cut(job.folder)}")
    merge_into(job, members, base, method, dtype, device)
    return Made("model", base=base or members[0], note=f"{method.method.name} of {names}")


def below(members: list[Member], method: Choice, base: Member | None = None) -> Member:
    """The one base that all these adapters sit on. Raises MethodError for anything else."""
    name = method.method.name
    for member in members:
        if member.kind != "adapter" or member.base is None:
            raise MethodError(f"merge method '{name}' works on the factors of adapters, and '{member.name}' is a "
                              f"{member.kind}{' without a base' if member.kind == 'adapter' else ''}",
                              fix="use a method on models (linear, ties, ...), or make one of it (step: extract)")
    bases = {member.base.digest or member.base.path: member for member in members if member.base}
    if len(bases) > 1:
        one, other, *_ = bases.values()
        assert one.base and other.base
        raise MethodError(f"'{one.name}' sits on {one.base.version} and '{other.name}' on {other.base.version}; "
                          f"changes can be added where they are changes of one base",
                          fix="merge adapters of one base, or merge them as models (linear, ties, ...)")
    under = members[0].base
    assert under is not None
    if base is not None and (base.digest, base.path) != (under.digest, under.path) and base.digest != under.digest:
        raise MethodError(f"the base is '{base.name}', and the adapters sit on '{under.name}'",
                          fix="leave base out: adapters know theirs")
    return under


def updates_of(members: list[Member]) -> list[Update]:
    """Adapters as merging sees them; headers are read."""
    from glue.kinds.lora import Adapter
    from glue.merge.adapters import Update

    return [Update(member.name, Adapter(locate(member.path))) for member in members]


def combined(folder: Path, members: list[Member], method: Choice, under: Member, dtype: str, report=None) -> None:
    """In a worker: merge adapters into one."""
    from glue.merge.adapters import combine

    base, revision = told_base(under)
    combine(method, updates_of(members), folder, base=base, revision=revision, dtype=dtype,
            report=lambda done, total: report(done, total, "") if report else None)


def told_base(member: Member) -> tuple[str, str | None]:
    """What the configuration of an adapter names as its base: the id on the hub and its revision, or a folder."""
    if not member.path.startswith("hub:"):
        return member.path, None
    name, _, revision = member.path.removeprefix("hub:").partition("@")
    return name, revision or None


def cut(folder: Path) -> str:
    """What was cut off an adapter, in words."""
    from glue.merge.lora_folder import NOTE

    told = json.loads((folder / NOTE).read_text())
    if "norm" not in told:
        return f", {cut_to(told)}"
    share = told["error"] / told["norm"] if told["norm"] else 0.0
    return f", {cut_to(told)}, off by {share:.2%} of the norm of the exact sum"


def cut_to(told: dict[str, Any]) -> str:
    """The ranks that a note about factors tells, in words."""
    ranks = [one["rank"] for one in told["modules"].values()]
    return f"rank {min(ranks)}" + (f" to {max(ranks)}" if min(ranks) < max(ranks) else "")


def merge_into(job: Job, members: list[Member], base: Member | None, method: Choice, dtype: str | None,
               device: str = "cpu") -> None:
    """Stream a merge into the job's folder, by all workers, and put configuration and tokenizer beside it."""
    from glue.merge.engine import prepared

    made = prepared(method, sources_of(members), source_of(base), seed=job.seed, out_dtype=dtype, device=device)
    spread(made, job.folder, job.workers, report=lambda done, total: job.report(done, total, ""))
    job.workers.call("glue.kinds.frame:copy_frame", base or members[0], job.folder)


def spread(merge: Merge, folder: Path, workers: Workers, **how: Any) -> str:
    """Write a merge with all workers; see `glue.merge.write.write`."""
    from glue.merge.write import write

    def by_workers(calls, each) -> None:
        workers.map("glue.merge.write:fill", calls, each=each)

    return write(merge, folder, number=max(1, workers.number), spread=by_workers, apart=workers.apart, **how)


def sources_of(members: list[Member]) -> list[Source]:
    """Members as merging sees them; nothing is read yet."""
    from glue.kinds import weights
    from glue.merge.leaf import Source

    return [Source(member.name, weights(member)) for member in members]


def source_of(member: Member | None) -> Source | None:
    """A base as merging sees it, where there is one."""
    return sources_of([member])[0] if member else None
