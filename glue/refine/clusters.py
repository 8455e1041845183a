"""Clusters of examples, and the examples that stand for each."""

from __future__ import annotations

import numpy as np

from glue.errors import MethodError

STARTS = 4  # of K-means, of which the best is kept


def clustered(places: np.ndarray, count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """K-means over places [n, h]: the cluster of each, counted in the order of their first examples, and its distance.

    Where fewer places than clusters differ there are fewer clusters. Raises MethodError where there are fewer examples.
    """
    from sklearn.cluster import KMeans

    if count > len(places):
        raise MethodError(f"{len(places)} examples cannot be in {count} clusters", fix="ask for fewer:  clusters: 60")
    different = len(np.unique(places, axis=0))
    found = KMeans(min(count, different), n_init=STARTS, random_state=seed).fit(places)
    distance = np.linalg.norm(places - found.cluster_centers_[found.labels_], axis=1)
    _, first, label = np.unique(found.labels_, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return rank[label], distance


def representatives(cluster: np.ndarray, distance: np.ndarray, each: int) -> list[np.ndarray]:
    """The examples nearest to the centroid of each cluster, at most `each`; the earlier one where two are as near."""
    found = []
    for k in range(int(cluster.max()) + 1):
        mine = np.flatnonzero(cluster == k)
        found.append(mine[np.argsort(distance[mine], kind="stable")][:each])
    return found
