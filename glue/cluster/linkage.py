"""From similarities to families: every member in exactly one, whichever linkage is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from typing import Literal

import numpy as np

Linkage = Literal["leader", "single", "average", "complete"]


def clusters(similarity: np.ndarray, threshold: float, linkage: Linkage = "average") -> list[list[int]]:
    """A partition of the members: a list of families, each a list of indices.

    similarity  [n, n], symmetric; NaN means not comparable
    threshold   families join while their similarity is greater than this
    linkage     single, average, complete: the similarity of two families is the largest, the mean, the smallest over
                their pairs; leader: the published code, where a member joins the first family whose first element
                it resembles, so that the order of the members counts

    A NaN joins nothing: under average and complete linkage no family holds a pair that is NaN; under single and
    leader linkage such a pair meets only through a third member. Indices ascend in each family, families by
    their first. Apart from leader linkage the order of members counts only where similarities are equal.
    """
    similarity = np.asarray(similarity, dtype=np.float64)
    assert similarity.ndim == 2 and similarity.shape[0] == similarity.shape[1], "similarities are a square [n, n]"
    found = _led(similarity, threshold) if linkage == "leader" else _linked(similarity, threshold, linkage)
    return sorted(sorted(family) for family in found)


def families(similarity: np.ndarray, keys: Sequence[str], threshold: float,
             linkage: Linkage = "average") -> list[tuple[list[int], int]]:
    """The clusters, each with its medoid, for members of any order: a list of (indices, index of the medoid).

    keys  of the members, all different. Members are taken in the order of their keys, so that where similarities are
          equal the order of members does not decide either; under leader linkage it does, as in the published code
    """
    n = len(similarity)
    assert len(set(keys)) == len(keys) == n, "each member has a key of its own"
    order = list(range(n)) if linkage == "leader" else sorted(range(n), key=keys.__getitem__)
    ordered = np.asarray(similarity)[np.ix_(order, order)]
    found = [(sorted(order[k] for k in family), order[medoid(ordered, family)])
             for family in clusters(ordered, threshold, linkage)]
    return sorted(found)


def medoid(similarity: np.ndarray, members: Sequence[int]) -> int:
    """The member with the highest mean similarity to the others; the lowest index where several have it.

    A pair that cannot be compared counts as unrelated, 0.
    """
    known = np.nan_to_num(np.asarray(similarity, dtype=np.float64), nan=0.0)
    # an exact sum: members that tie on paper tie here too, whatever the order of the terms
    return max(sorted(members), key=lambda k: fsum(known[k, other] for other in members if other != k))


def _led(similarity: np.ndarray, threshold: float) -> list[list[int]]:
    families: list[list[int]] = []
    for k in range(len(similarity)):
        for family in families:
            if similarity[k, family[0]] > threshold:
                family.append(k)
                break
        else:
            families.append([k])
    return families


def _linked(similarity: np.ndarray, threshold: float, linkage: Linkage) -> list[list[int]]:
    from scipy.cluster import hierarchy

    n = len(similarity)
    if n < 2:
        return [[k] for k in range(n)]
    # scipy wants finite distances: one so large that a single such pair keeps the mean of n * n / 4 pairs above 2
    distance = np.where(np.isnan(similarity), 8.0 * n * n, np.maximum(1 - similarity, 0.0))
    tree = hierarchy.linkage(distance[np.triu_indices(n, 1)], method=linkage)
    limit = np.nextafter(1 - threshold, -np.inf)  # fcluster joins at the limit too; here greater means greater
    labels = hierarchy.fcluster(tree, limit, criterion="distance") if limit >= 0 else np.arange(n)
    return [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
