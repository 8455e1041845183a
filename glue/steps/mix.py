"""`step: mix`: models joined by a router into one mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from glue.errors import MethodError
from glue.family import Choice, Field, Natural, Of, Positive
from glue.kinds import Place
from glue.member import Member
from glue.steps import AtOnce, Device, Job, Made, Many, Measured, OnDev, One, RunsIn, steps

if TYPE_CHECKING:
    from glue.checkpoint import Weights
    from glue.mix.compress import Energy, Rank

Level = Literal["model", "block", "ffn", "text"]
Unit = Literal["token", "sentence"]
Kept = Annotated[dict[Literal["rank", "energy"], Positive], Field(min_length=1, max_length=1)]
Compress = Annotated[dict[Literal["svd"], Kept], Field(min_length=1)]  # {svd: {rank: 16}} or {svd: {energy: 0.95}}


def unit_of(level: Level, routing: Unit | None) -> Unit:
    """What is routed: at ffn level each token unless something else is said, elsewhere always a whole prompt."""
    return routing or ("token" if level == "ffn" else "sentence")


def sensible(router: Choice, level: Level = "model", routing: Unit | None = None, dense_layers: int = 0,
             reader_layer: int = -1, base: str | None = None, compress: Compress | None = None, **_: Any) -> None:
    """Routers that the level has room for, and parameters that mean something at it."""
    from glue.mix import why_not

    if why := why_not(level, unit_of(level, routing), router):
        what, instead = why.rsplit("; ", 1)
        raise MethodError(what, fix=instead)
    if kept_of(compress) is not None and level != "model":
        raise MethodError(f"'compress' stores whole models as changes of one, and at level {level} there are none",
                          fix="leave compress out, or use level: model")
    if base is not None and not shares(level, dense_layers, compress):
        more = ", or say how many dense_layers they share" if level == "model" else ""
        raise MethodError(f"'base' is what the experts share, and at level {level} they share nothing",
                          fix=f"leave base out{more}")
    if reader_layer != -1 and (level != "model" or dense_layers):
        raise MethodError("'reader_layer' is for level model without dense_layers: nowhere else an expert reads first",
                          fix="leave reader_layer out")


def shares(level: Level, dense_layers: int, compress: Compress | None) -> bool:
    """Whether there is anything that one model has or stores for all experts."""
    return level in ("block", "ffn") or (level == "model" and (dense_layers > 0 or compress is not None))


def kept_of(compress: Compress | None) -> Rank | Energy | None:
    """What is kept of the experts' changes; None is everything. Raises MethodError for numbers that mean nothing."""
    from glue.mix.compress import keep

    try:
        return None if compress is None else keep({str(word): value for word, value in compress["svd"].items()})
    except MethodError as error:
        error.loc = ("compress", "svd")
        raise


def joinable(members: list[Member], level: Level = "model", routing: Unit | None = None, dense_layers: int = 0,
             base: Member | None = None, compress: Compress | None = None, **_: Any) -> None:
    """Two experts or more that this level can hold, from configurations, tokenizers and headers."""
    if len(members) < 2:
        raise MethodError(f"a mixture needs at least two experts; this is {len(members)}",
                          fix="name more members, or lower the threshold of the cluster step that leaves them")
    refuse([*members, *([base] if base is not None and base not in members else [])], level, routing, dense_layers,
           compress)


@steps.add("mix", makes="mixture", named=True, writes="all", holds="runs", words=sensible, check=joinable,
           unkeyed=("device", "batch_size"), later=("dtype",), source="arXiv:2410.05357", version=2)
def mix(job: Job, *, members: Many, router: Annotated[Any, Of("routing")], suite: OnDev, level: Level = "model",
        base: One | None = None, dense_layers: Natural = 0, routing: Unit | None = None, reader_layer: int = -1,
        compress: Compress | None = None, device: Device = "cpu", dtype: RunsIn = "float32",
        batch_size: AtOnce = "auto") -> Made:
    """One model that answers with the experts that its router picks.

    level   model: whole models, each with its own embeddings and head; one decision for a prompt. block: decoder
            layers, ffn: their MLPs, inside a model that all share; a decision in every layer. text: whatever can write,
            each with its own tokenizer; the text of the prompt decides
    suite   dev questions from which the router learns which expert is for what
    base    what the experts share at level block and ffn, and in dense_layers: embeddings, attention, norms, head;
            with compress, what they were tuned from. Unless given, the plain average of the experts
    dense_layers  the first so many layers are the base's alone
    routing       at level ffn: token, a stock architecture that needs no code of ours, or sentence
    reader_layer  at level model: after which of its layers the first expert tells the router of a prompt; -1 the last
    compress      at level model: {svd: {rank: r}} or {svd: {energy: share}} stores each matrix of an expert as the
                  base's and two factors of that rank, or of the rank that holds that share of the squared change
    device, dtype, batch_size  where experts are asked and states are read, what experts calculate in, and how many
                  questions they read at once. States that are read layer by layer are in fp32
    """
    told = (level, unit_of(level, routing), dense_layers, reader_layer, compress)
    place = job.place(device, dtype, batch_size)
    results = job.workers.map("glue.steps.mix:results", [(member, suite, place) for member in members])
    job.workers.call("glue.steps.mix:work", job.folder, members, base, router, suite, results, told, job.seed, place)
    names = ", ".join(member.short for member in members)
    where = "" if level == "model" else f" at level {level}"
    return Made("mixture", seen=frozenset(suite.digests().values()),
                note=f"{len(members)} experts ({names}) behind a {router.method.name} router{where}"
                     f"{lost(job.folder) if compress else ''}")


def lost(folder: Path) -> str:
    """What compression saved and lost, in words."""
    from glue.mix.compress import NOTE

    told = json.loads((folder / NOTE).read_text())
    return (f", compressed to {told['ratio']:.0%} of {told['before']:,} bytes, which loses {told['of_change']:.2%} of "
            f"what they changed and {told['of_weights']:.2%} of their weights")


def refuse(experts: list[Member], level: Level, routing: Unit | None, dense: int, compress: Compress | None) -> None:
    """Raise what keeps these experts from being joined at this level."""
    from importlib import import_module

    more: dict[str, Any] = {"ffn": {"routing": unit_of(level, routing)}, "model": {"kept": kept_of(compress)}}
    import_module(f"glue.mix.levels.{level}").refuse(experts, dense, **more.get(level, {}))


def results(member: Member, suite: Measured, place: Place) -> dict[str, Any]:
    """In a worker: per-item results of one expert by task."""
    return suite.ask(place.load(member))


def work(folder: Path, members: list[Member], base: Member | None, router: Choice, suite: Measured,
         found: list[dict[str, Any]], told: tuple[Level, Unit, int, int, Compress | None], seed: int,
         place: Place) -> None:
    """In a worker: make the gates, each at its place, and write the mixture."""
    from importlib import import_module

    import numpy as np
    import torch

    from glue.mix.parts import Dev, Parts
    from glue.mix.site import gates

    level, unit, dense, layer, compress = told
    items = suite.items()
    wins = torch.from_numpy(np.stack([np.concatenate([one[task] for task in items]) for one in found], axis=1))
    tasks = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(some) for some in items.values()]))
    prompts = [item.question for some in items.values() for item in some]
    common = shares(level, dense, compress)
    parts = Parts(tuple(members), shared(members, base) if common else None,
                  base if base is not None and (level != "model" or dense) else members[0], dense, place)
    at = import_module(f"glue.mix.levels.{level}")
    more: dict[str, Any] = {"routing": unit} if level == "ffn" else {"layer": layer} if level == "model" else {}
    stored = {"kept": kept_of(compress)} if level == "model" else {}
    at.write(folder, parts, gates(router, at.sites(parts, Dev(prompts, wins, tasks, seed), **more)), **more, **stored)


def shared(members: list[Member], base: Member | None) -> Weights:
    """What experts share: a member, or their plain average, tensor by tensor as it is asked for."""
    from glue.family import families
    from glue.kinds import weights
    from glue.merge.engine import Result, prepared
    from glue.steps.merge import sources_of

    if base is not None:
        return weights(base)
    return Result(prepared(families("merging")["linear"].bind(), sources_of(members)))
