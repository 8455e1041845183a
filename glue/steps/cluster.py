"""`step: cluster`: families of members whose weights are alike."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Literal

from glue.errors import ZooError
from glue.family import Probability
from glue.member import Element, Member
from glue.steps import Job, Made, Many, steps

Linkage = Literal["leader", "single", "average", "complete"]
Part = Literal["all", "attention", "mlp"]


def readable(members: list[Member], **_: Any) -> None:
    """Weights that can be read without running code; looks at headers alone."""
    from glue.kinds import weights

    for member in members:
        weights(member)


@steps.add("cluster", makes="group", named=True, check=readable, source="arXiv:2410.05357")
def cluster(job: Job, *, members: Many, threshold: Probability = 0.95,
            linkage: Linkage = "average", part: Part = "all") -> Made:
    """Every member in exactly one family: alike above the threshold, and of one architecture.

    Similarity is Model-GLUE's: the cosine of weight columns, averaged over attention and MLP matrices. Members that
    could not be merged, because any tensor differs in shape, are in different families, also where only the number of
    tokens differs. A family's root is the ancestor that most of its members declare or were made from, or its medoid.
    """
    similar, families, medoids = job.workers.call("glue.steps.cluster:work", members, threshold, linkage, part)
    elements = _elements([[members[k] for k in family] for family in families], [members[k] for k in medoids])
    text = {"names": [member.name for member in members], "similarity": similar}
    (job.folder / "similarity.json").write_text(json.dumps(text))
    sizes = ", ".join(f"{element.name} ({len(element.members)})" for element in elements)
    return Made("group", elements=elements, note=f"{len(elements)} families: {sizes}")


def work(members: list[Member], threshold: float, linkage: Linkage, part: Part) -> tuple[list, list, list]:
    """In a worker: (similarity [n, n] as lists with null where shapes differ, families, medoid of each)."""
    import numpy as np

    from glue.cluster.linkage import clusters, medoid
    from glue.cluster.similarity import compatible, similarity
    from glue.kinds import weights

    sources = [weights(member) for member in members]
    alike = similarity(sources, part=part)
    for i, one in enumerate(sources):
        for j, other in enumerate(sources[:i]):
            if compatible(one, other):
                alike[i, j] = alike[j, i] = np.nan
    families = clusters(alike, threshold, linkage)
    rows = [[None if np.isnan(value) else float(value) for value in row] for row in alike]
    return rows, families, [medoid(alike, family) for family in families]


def _elements(families: list[list[Member]], medoids: list[Member]) -> tuple[Element, ...]:
    roots = [_ancestor(family) or medoid for family, medoid in zip(families, medoids, strict=True)]
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
