"""Nearest members: how alike one member is to every other of a zoo, from sketches that are made once and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isnan
from typing import get_args

from glue.atlas import known_word, looked_at
from glue.cluster.similarity import Part
from glue.cluster.sketch import SURE, Sketch, compare_one
from glue.errors import ZooError
from glue.kinds import weights
from glue.member import Member
from glue.steps.cluster import sketch_file, sketched
from glue.zoo import Zoo

Progress = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True)
class Near:
    """A member beside the one that was asked about.

    cosine  as `glue zoo atlas` tells it, estimated; NaN between models of other shapes
    within  the exact cosine is this near to the estimate: five standard errors; 0 where nothing was estimated
    """

    name: str
    cosine: float
    within: float


def near(zoo: Zoo, name: str, selector: str | None = None, *, base: str | None = None, part: Part = "all",
         progress: Progress = iter) -> list[Near]:
    """Every other member, or those that `selector` picks, the most alike first and what has other shapes last.

    Each member is read once, and its sketch of some megabytes kept in the zoo's folder; sketches are then compared at
    hundreds a second.

    base      compare what was changed from this member instead of whole weights
    progress  wraps the names of the members that are sketched
    Raises ZooError and CheckpointError where `name` or `base` cannot be read; others that cannot are left out.
    """
    known_word("part", part, get_args(Part))
    asked, start = zoo[name], None if base is None else zoo[base]
    for member in filter(None, (asked, start)):
        weights(member)  # raises before anything is read
    found, _, _ = looked_at(zoo, selector, part)
    others = [sight.member for sight in found if sight.member.path != asked.path]
    if not others:
        raise ZooError(f"there is no other member that '{name}' could be compared with",
                       fix="glue zoo list  shows what there is")
    known = {member.name: member for member in [asked, *others, *([start] if start else [])]}
    sketches = {each: _sketch(zoo, known[each]) for each in progress(list(known))}
    cosine, error = compare_one(sketches[name], [sketches[member.name] for member in others], part=part,
                                base=None if base is None else sketches[base])
    told = [Near(member.name, float(c), SURE * float(e)) for member, c, e in zip(others, cosine, error, strict=True)]
    return sorted(told, key=lambda one: (isnan(one.cosine), -one.cosine, one.name))


def _sketch(zoo: Zoo, member: Member) -> Sketch:
    identified = zoo.identified(member)
    file = sketch_file(zoo.folder, identified)
    sketched(identified, file)
    return Sketch.load(file)
