"""`step: cluster`: families of members whose weights are alike."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glue.errors import CheckpointError, MethodError, ZooError
from glue.family import Probability
from glue.member import Element, Member
from glue.steps import Job, Made, Many, One, steps

if TYPE_CHECKING:
    import numpy as np

    from glue.checkpoint import Weights

Linkage = Literal["leader", "single", "average", "complete"]
Part = Literal["all", "attention", "mlp"]
Mode = Literal["raw", "delta"]
Per = Literal["column", "tensor"]
Vocabulary = Literal["same", "any"]


def sensible(mode: Mode, per: Per, sketch: bool, base: str | None = None, **_: Any) -> None:
    """What excludes each other."""
    if mode == "raw" and base is not None:
        raise MethodError("'base' is what changes are measured from, and mode raw compares whole weights",
                          fix="say  mode: delta , or leave base out")
    if sketch and per == "tensor":
        raise MethodError("a sketch holds some columns of each matrix, and few columns can make up most of a matrix",
                          fix="say  per: column , or  sketch: false")


def readable(members: list[Member], mode: Mode, base: Member | None = None, **_: Any) -> None:
    """Weights that can be read without running code, from headers alone; for deltas, something to start from."""
    from glue.kinds import weights

    for member in [*members, *([base] if base else [])]:
        weights(member)
    if mode == "delta":
        _start(members, base)


@steps.add("cluster", makes="group", named=True, holds="matrices", words=sensible, check=readable,
           source="arXiv:2410.05357")
def cluster(job: Job, *, members: Many, threshold: Probability = 0.95, linkage: Linkage = "average",
            part: Part = "all", mode: Mode = "raw", base: One | None = None, per: Per = "column",
            sketch: bool = False, vocabulary: Vocabulary = "same") -> Made:
    """Every member in exactly one family: alike above the threshold, and of one architecture.

    Similarity is Model-GLUE's: the cosine of weight columns, averaged over attention and MLP matrices. Members that
    could not be merged are in different families. A family's root is the ancestor that most of its members declare
    or were made from, or its medoid. Only under leader linkage does the order of the members count.

    mode        raw compares weights, delta what was changed from `base`, or without one from the common ancestor
    per         one cosine for each column, as in the paper, or one for each matrix
    sketch      estimate from sampled columns, kept in the zoo by digest, and be exact only about pairs at the threshold
    vocabulary  any: members may differ in the number of tokens, and must be aligned before they are merged
    """
    ordered = members if linkage == "leader" else sorted(members, key=_key)
    start = _start(members, base) if mode == "delta" else None
    read = [*ordered, *([start] if start else [])] if sketch else []
    files = [sketch_file(job.shared, member) for member in read]
    job.workers.map("glue.steps.cluster:sketched", list(zip(read, files, strict=True)))
    threads = job.workers.threads * (1 if job.workers.apart else max(1, job.workers.number))  # of one machine
    told, families = job.workers.call("glue.steps.cluster:work", ordered, start, threshold, linkage, part, per,
                                      vocabulary, files, threads, report=job.report)
    settings = {"threshold": threshold, "linkage": linkage, "part": part, "mode": mode, "per": per,
                "base": start and start.name}
    (job.folder / "similarity.json").write_text(json.dumps({**settings, **told}))
    place = {member.name: k for k, member in enumerate(members)}  # families are told in the order of the recipe
    found = [(sorted((ordered[k] for k in family), key=lambda member: place[member.name]), ordered[middle])
             for family, middle in families]
    found.sort(key=lambda item: place[item[0][0].name])
    elements = _elements([family for family, _ in found], [middle for _, middle in found])
    sizes = ", ".join(f"{element.name} ({len(element.members)})" for element in elements)
    return Made("group", elements=elements, note=f"{len(elements)} families: {sizes}")


def sketch_file(shared: Path, member: Member) -> Path:
    """Where the sketch of a member is kept in a zoo's folder."""
    return shared / "sketches" / f"{member.digest[:16]}.safetensors"


def sketched(member: Member, file: Path) -> None:
    """In a worker: make the sketch of a member where it is not there yet."""
    from glue.cluster.similarity import matrices
    from glue.cluster.sketch import ENTRIES, Sketch, sketch
    from glue.kinds import weights

    source = weights(member)
    try:
        known = Sketch.load(file)
        wanted = source.fingerprint, ENTRIES, matrices(source, "all", f"'{member.name}'")
        if (known.fingerprint, known.entries, known.matrices) == wanted:
            return
    except (OSError, CheckpointError):  # not there, or not whole
        pass
    sketch(source).save(file)


def work(members: list[Member], base: Member | None, threshold: float, linkage: Linkage, part: Part, per: Per,
         vocabulary: Vocabulary, files: list[Path], threads: int,
         report: Callable[[int, int, str], None] = lambda done, total, note: None) -> tuple[dict[str, Any], list]:
    """In a worker: (what similarity.json tells, families with the medoid of each, as indices).

    files  sketches of the members, and at last of the base; none where all is to be exact
    """
    import numpy as np

    from glue.cluster.linkage import families
    from glue.cluster.similarity import similarities
    from glue.cluster.sketch import Sketch, similar
    from glue.kinds import weights

    def progress(names: list[str]) -> Iterator[str]:
        for k, name in enumerate(names):
            yield name
            report(k + 1, len(names), "tensors")

    sources = [weights(member) for member in members]
    below = None if base is None else weights(base)
    told: dict[str, Any] = {"names": [member.name for member in members]}
    if files:
        known = [Sketch.load(file) for file in files]
        alike, error = similar(sources, threshold, known[:len(members)], part=part, base=below, threads=threads,
                               base_sketch=None if base is None else known[-1], progress=progress)
        told["error"] = _rows(error)
    else:
        scores = similarities(sources, base=below, per=per, threads=threads, progress=progress)
        alike = scores.cosine[part].copy()
        told |= {"cosine": {word: _rows(found) for word, found in scores.cosine.items()}, "ratio": _rows(scores.ratio)}
        if scores.agreement is not None and scores.overlap is not None:
            told |= {"agreement": _rows(scores.agreement), "overlap": _rows(scores.overlap)}
    told["differences"] = _separate(alike, members, sources, vocabulary)
    told["similarity"] = _rows(alike)
    return told, families(np.asarray(alike), [_key(member) for member in members], threshold, linkage)


def _separate(alike: np.ndarray, members: list[Member], sources: list[Weights], vocabulary: Vocabulary) -> list:
    """Make NaN of pairs that could not be merged; returns [one, other, difference] of all that differ in build."""
    from glue.cluster.build import Build, differences
    from glue.cluster.similarity import compatible
    from glue.hub import locate
    from glue.kinds.frame import config_json, framed

    builds = [Build(config_json(locate(framed(member).path), member.name),
                    {name: header.shape for name, header in source.headers.items()})
              for member, source in zip(members, sources, strict=True)]
    told = []
    for i, one in enumerate(sources):
        for j, other in enumerate(sources[:i]):
            hard, soft = differences(builds[j], builds[i])
            hard = hard or (compatible(other, one) if vocabulary == "same" else "")
            if hard:
                alike[i, j] = alike[j, i] = float("nan")
            told += [[members[j].name, members[i].name, line] for line in ([hard] if hard else soft)]
    return told


def _start(members: list[Member], base: Member | None) -> Member:
    """What deltas are taken from: the base that was named, or what most members derive from."""
    found = base or _ancestor(sorted(members, key=_key))
    if found is None:
        raise ZooError("mode delta compares what was changed, and these members declare no common ancestor",
                       fix="name it:  base: <member>")
    return found


def _key(member: Member) -> str:
    """What members are ordered by: their content, so that no order of a recipe counts."""
    return f"{member.digest}|{member.name}"


def _rows(matrix: np.ndarray) -> list[list[float | None]]:
    """Plain data, with null for what is not known."""
    return [[None if value != value else value for value in row] for row in matrix.tolist()]


def _elements(families: list[list[Member]], medoids: list[Member]) -> tuple[Element, ...]:
    roots = [_ancestor(sorted(family, key=_key)) or middle for family, middle in zip(families, medoids, strict=True)]
    names = [root.short for root in roots]
    names = [medoid.short if names.count(name) > 1 else name for name, medoid in zip(names, medoids, strict=True)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ZooError(f"two families would both be called '{twice[0]}'", fix="rename one of these members in zoo.yaml")
    return tuple(Element(name, root, tuple(family)) for name, root, family in zip(names, roots, families, strict=True))


def _ancestor(family: list[Member]) -> Member | None:
    """The nearest ancestor shared by most members of the family, itself counted; None where there is no lineage."""
    found: Counter[str] = Counter()
    known: dict[str, Member] = {}
    for member in family:
        for ancestor in (member, *member.lineage()):
            key = ancestor.version if ancestor.origin else ancestor.name  # a hand-written one may not be read yet
            found[key] += 1
            known.setdefault(key, ancestor)
    key, votes = max(found.items(), key=lambda item: item[1])
    inside = [member for member in family if key in (member.name, member.version)]
    return None if votes < 2 else inside[0] if inside else known[key]
