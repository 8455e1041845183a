"""Partitions: which client has which items. Every item goes to exactly one client, and the seed decides."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from glue.errors import GlueError

TRIES = 200  # draws of a Dirichlet before it is given up that each client has something


def iid(count: int, clients: int, seed: int) -> list[np.ndarray]:
    """Indices for each client, ascending: a random part of all items, of equal size but for one."""
    order = np.random.default_rng(seed).permutation(count)
    return _fit([np.sort(part) for part in np.array_split(order, clients)], 1)


def by_dataset(groups: Sequence[Hashable], clients: int) -> list[np.ndarray]:
    """Indices for each client: whole datasets, dealt out one after the other in order of appearance."""
    dealt = {group: k % clients for k, group in enumerate(dict.fromkeys(groups))}
    owner = np.asarray([dealt[group] for group in groups])
    return _fit([np.flatnonzero(owner == client) for client in range(clients)], 1)


def dirichlet(groups: Sequence[Hashable], clients: int, alpha: float, seed: int, least: int = 1) -> list[np.ndarray]:
    """Indices for each client: of each group, shares drawn from Dirichlet(alpha); a small alpha makes them one-sided.

    least  items that each client has at least; drawn again until that is so. Raises GlueError where it never is
    """
    random = np.random.default_rng(seed)
    for _ in range(TRIES):
        shares = {group: random.dirichlet(np.full(clients, alpha)) for group in dict.fromkeys(groups)}
        parts = _dealt(groups, shares, random)
        if min(map(len, parts)) >= least:
            return parts
    raise GlueError(f"no draw of {TRIES} from Dirichlet({alpha:g}) leaves each of {clients} clients {least} items of "
                    f"{len(groups)}", fix="raise alpha, give more items, or ask for fewer clients")


def given(groups: Sequence[Hashable], shares: Sequence[Mapping[Hashable, float]], seed: int) -> list[np.ndarray]:
    """Indices for each client: of each group, parts that are as large to each other as the shares of the clients."""
    told = {}
    for group in dict.fromkeys(groups):
        row = np.asarray([share.get(group, 0.0) for share in shares])
        if not row.sum():
            raise GlueError(f"no client has a share of '{group}'", fix="give it to one, or leave it out of the data")
        told[group] = row / row.sum()
    return _fit(_dealt(groups, told, np.random.default_rng(seed)), 1)


def _dealt(groups: Sequence[Hashable], shares: Mapping[Hashable, np.ndarray],
           random: np.random.Generator) -> list[np.ndarray]:
    clients = len(next(iter(shares.values())))
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    places: dict[Hashable, list[int]] = {}
    for k, group in enumerate(groups):
        places.setdefault(group, []).append(k)
    for group, row in shares.items():
        mine = random.permutation(places[group])
        cuts = np.rint(np.cumsum(row)[:-1] * len(mine)).astype(int)
        for part, some in zip(parts, np.split(mine, cuts), strict=True):
            part.append(some)
    return [np.sort(np.concatenate(part)) for part in parts]


def _fit(parts: list[np.ndarray], least: int) -> list[np.ndarray]:
    for client, part in enumerate(parts):
        if len(part) < least:
            raise GlueError(f"client {client} of {len(parts)} would have {len(part)} items",
                            fix="ask for fewer clients, or give them more data")
    return parts
