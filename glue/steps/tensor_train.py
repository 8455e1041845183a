"""`step: tensor_train`: adapters of one base as one chain of cores for each layer; `tt_lora`: such chains taught."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glue.errors import MethodError
from glue.family import Count, NonNegative, Positive, Probability
from glue.files import write_aside
from glue.hub import locate
from glue.member import Member
from glue.steps import Device, Job, Made, Many, Shares, Tunable, steps
from glue.steps._training import told

if TYPE_CHECKING:
    from glue.kinds.tt import Train
    from glue.merge.tensor_train import Cut, Keep

NOTE = "trains.json"  # beside the cores: ranks and losses, layer by layer
KINDS = ("adapter", "tensor_train")
EPS = 1e-9  # by which shares of all members may miss 1


def over_one_base(members: list[Member], weight: list[float] | None = None, **_: Any) -> None:
    """Changes that are products, of one base."""
    for member in members:
        if member.kind not in KINDS or member.base is None:
            raise MethodError(f"'{member.name}' is a {member.kind}, whose changes are no products of factors",
                              fix="make an adapter of it first (step: extract)")
    if len({member.base.digest or member.base.path for member in members if member.base}) > 1:
        raise MethodError("the members sit on different bases; changes can be added where they are changes of one",
                          fix="name changes of one base")
    if weight is not None and len(weight) != len(members):
        raise MethodError(f"there are {len(weight)} weights for {len(members)} members", fix="give one for each")


@steps.add("tensor_train", makes="tensor_train", check=over_one_base, source="arXiv:2410.13097")
def tensor_train(job: Job, *, members: Many, weight: list[Positive] | None = None, rank: Count | None = None,
                 error: Probability = 0.0, side: Count = 8) -> Made:
    """The weighted mean of LoRA adapters or trains of one base, as trains: summed exactly, then cut.

    weight  of each member, divided by their sum; all alike unless given
    rank    the most between two cores of a layer
    error   the most that may be lost of a layer's change, in units of its Frobenius norm
    side    about how long the sides are that rows and columns are split into
    """
    job.workers.call("glue.steps.tensor_train:work", job.folder, members, weight or [1.0] * len(members),
                     {"rank": rank, "error": error}, side, report=job.report)
    return Made("tensor_train", base=members[0].base,
                note=f"{', '.join(member.short for member in members)} as tensor trains, {_told(job.folder / NOTE)}")


def work(folder: Path, members: list[Member], weight: list[float], keep: dict[str, Any], side: int,
         report=None) -> None:
    """In a worker: convert, sum, cut and write."""
    from glue.kinds.tt import write_trains
    from glue.merge.tensor_train import Keep, norm

    found = [(changes(member, side), share / sum(weight)) for member, share in zip(members, weight, strict=True)]
    modules = sorted(set().union(*(trains for trains, _ in found)))
    cuts: dict[str, Cut] = {}
    noted = {}
    for k, module in enumerate(modules):
        cut, before = summed([(trains[module], share) for trains, share in found if module in trains], Keep(**keep))
        cuts[module] = cut
        noted[module] = {"ranks": cut.train.ranks, "sides": cut.train.sides, "norm": norm(cut.train), "lost": cut.bound,
                        "numbers": cut.train.numel, "before": before}
        if report:
            report(k + 1, len(modules), "layers")
    write_trains(folder, {module: cut.train for module, cut in cuts.items()})
    write_aside(folder / NOTE, json.dumps(noted, indent=1))


def changes(member: Member, side: int) -> dict[str, Train]:
    """What a member changes, layer by layer, with sides of about this length. Raises MethodError for more than that."""
    from glue.kinds.lora import Adapter
    from glue.kinds.tt import read_trains, sides
    from glue.merge.factors import Factors
    from glue.merge.tensor_train import as_factors, of_factors

    folder = locate(member.path)
    if member.kind == "tensor_train":
        trains = read_trains(folder)
        if all(train.sides == (*sides(m, side), *sides(n, side))
               for train in trains.values() for m, n in (train.shape,)):
            return trains
        found = {module: as_factors(train) for module, train in trains.items()}
    else:
        adapter = Adapter(folder)
        if adapter.replaced or adapter.stretched:
            raise MethodError(f"'{member.name}' has biases, saved modules or magnitudes, which are no products of "
                              f"factors", fix="make a plain LoRA of it first (step: extract)")
        found = {module: Factors(*adapter.factors(module), adapter.scale(module)) for module in adapter.modules}
    return {module: of_factors(change, sides(change.shape[0], side), sides(change.shape[1], side)).train
            for module, change in found.items()}


def summed(parts: list[tuple[Train, float]], keep: Keep) -> tuple[Cut, int]:
    """The sum of trains by weight, cut; and how many numbers the sum as a LoRA would have.

    Where one core alone was taught and nothing is to be cut, it is the mean of that core, and the others stay.
    """
    from glue.merge.tensor_train import Cut, added, as_factors, averaged, differing, rounded

    trains, shares = [train for train, _ in parts], [share for _, share in parts]
    if not keep.rank and not keep.error and len(differing(trains)) < 2 and abs(sum(shares) - 1) < EPS:
        whole = Cut(averaged(trains, shares), ())
    else:
        whole = rounded(added(trains, shares), keep)
    m, n = whole.train.shape
    return whole, sum(as_factors(train).rank for train in trains) * (m + n)


def _told(note: Path) -> str:
    """How many numbers are left, and what they have lost, in words."""
    every = json.loads(note.read_text()).values()
    lost, whole = (sqrt(sum(one[key]**2 for one in every)) for key in ("lost", "norm"))
    share = lost / sqrt(whole**2 + lost**2) if whole else 0.0
    numbers, before = (sum(one[key] for one in every) for key in ("numbers", "before"))
    return f"{numbers:,} numbers in place of {before:,}, off by at most {share:.2%} of the norm"


@steps.add("tt_lora", makes="tensor_train", unkeyed=("device",), source="arXiv:2410.13097")
def tt_lora(job: Job, *, base: Tunable, data: Shares, steps: Count, learning_rate: Positive, targets: list[str],
            rank: Count = 8, side: Count = 8, cores: Literal["all", "one"] = "all", batch_size: Count = 64,
            weight_decay: NonNegative = 0.0, prompt_weight: NonNegative = 0.05, device: Device = "cpu") -> Made:
    """An adapter of tensor trains over `base`, taught on datasets in the given shares.

    rank   the most between two cores of a layer
    side   about how long the sides are that rows and columns are split into
    cores  all are taught, or one, the largest: of those, means of cores are means of changes
    """
    options = {"steps": steps, "learning_rate": learning_rate, "targets": targets, "rank": rank, "side": side,
               "cores": cores, "batch_size": batch_size, "weight_decay": weight_decay, "prompt_weight": prompt_weight,
               "seed": job.seed, "shared": job.seed, "device": device}
    job.workers.call("glue.steps.tensor_train:teach", job.folder, base, data, options, report=job.report)
    return Made("tensor_train", base=base, note=f"{base.short} with tensor trains, tuned for {steps} steps on "
                                                f"{', '.join(member.short for member in data)}")


def teach(folder: Path, base: Member, data: dict[Member, float], options: dict[str, Any], report=None) -> None:
    """In a worker: train and write."""
    from glue.kinds.device import device_of
    from glue.tune.trains import taught_trains

    taught_trains(folder, base=base, data=[(member.folder, share) for member, share in data.items()],
                  **{**options, "device": device_of(options["device"])}, report=told(report))
