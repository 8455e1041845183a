"""Heterogeneity: how far clients went and how much they disagree, before anything is combined.

Norms and cosines come from small Gram matrices, exact and without the dense changes; signs from some rows of each
matrix. The advice follows one rule, see `advice`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

ROWS = 32  # of each matrix, evenly spaced, whose signs are compared
# On the tiny zoo (one_shot.yaml) one round cost 3 points at most where all were below NEAR, and up to 8 beyond it.
NEAR, AGAINST = 0.3, -0.05


@dataclass(frozen=True)
class Change:
    """What a client changes in one matrix [m, n]: scale * b @ a, or a dense difference where `a` is None.

    b  [m, r], or the difference [m, n]
    """

    b: Tensor
    a: Tensor | None = None
    scale: float = 1.0

    def rows(self, index: Tensor | slice) -> Tensor:
        """Some rows of the change, [k, n] in fp64."""
        rows = self.b[index].double()
        return rows if self.a is None else self.scale * rows @ self.a.double()

    @property
    def square(self) -> float:
        """The sum of the squares of all entries, in fp64."""
        return float(gram([self])[0, 0])


Changes = Mapping[str, Change]  # matrix -> change


@dataclass(frozen=True)
class Heterogeneity:
    """What clients did, side by side; k clients.

    tau        [k], |delta| / |base| over all weights of the base
    cosines    [k, k]
    conflicts  [k, k], share of compared entries that both change, with opposite signs
    """

    clients: tuple[str, ...]
    tau: np.ndarray
    cosines: np.ndarray
    conflicts: np.ndarray

    @property
    def advice(self) -> Literal["one round is enough", "use several rounds"]:
        """One round, where every tau is below NEAR and the mean cosine of two clients is not below AGAINST.

        While clients stay near the base, their losses keep the curvature they have there, and averaging commutes with
        training; and clients that pull against each other cancel what a second round would bring back.
        """
        others = ~np.eye(len(self.clients), dtype=bool)
        cosine = float(self.cosines[others].mean()) if len(self.clients) > 1 else 1.0
        return "one round is enough" if self.tau.max() < NEAR and cosine >= AGAINST else "use several rounds"

    def as_data(self) -> dict[str, Any]:
        """As plain data, for rounds.json."""
        return {"clients": list(self.clients), "tau": self.tau.tolist(), "cosines": self.cosines.tolist(),
                "sign_conflicts": self.conflicts.tolist(), "advice": self.advice,
                "rule": f"one round where every tau < {NEAR} and the mean cosine >= {AGAINST}"}


def compare(clients: Sequence[str], changes: Sequence[Changes], base_norm: float) -> Heterogeneity:
    """Compare what clients did; one matrix of all clients is looked at at a time.

    base_norm  Frobenius norm of all weights of the base
    """
    k = len(clients)
    products, alike, both = np.zeros((k, k)), np.zeros((k, k)), np.zeros((k, k))
    for name in sorted(set().union(*changes)):
        here = [i for i in range(k) if name in changes[i]]
        parts, place = [changes[i][name] for i in here], np.ix_(here, here)
        products[place] += gram(parts)
        some = torch.linspace(0, len(parts[0].b) - 1, min(ROWS, len(parts[0].b))).long()
        signs = torch.stack([torch.sign(part.rows(some)).flatten() for part in parts])
        alike[place] += (signs @ signs.T).numpy()  # how many agree, less how many do not
        both[place] += (signs.abs() @ signs.abs().T).numpy()
    norms = np.sqrt(np.diag(products))
    lengths = np.outer(norms, norms)
    cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
    return Heterogeneity(tuple(clients), norms / base_norm, cosines, (both - alike) / 2 / np.maximum(both, 1))


def gram(parts: Sequence[Change]) -> np.ndarray:
    """Inner products of changes of one matrix, [k, k] in fp64; from factors, where all have them, without a product."""
    if all(part.a is not None for part in parts):
        a = torch.cat([part.a.double() * part.scale for part in parts if part.a is not None])
        b = torch.cat([part.b.double() for part in parts], dim=1)
        blocks = ((b.T @ b) * (a @ a.T)).numpy()
        starts = np.cumsum([0, *(part.b.shape[1] for part in parts[:-1])])
        return np.add.reduceat(np.add.reduceat(blocks, starts, axis=0), starts, axis=1)
    found = np.zeros((len(parts), len(parts)))
    for start in range(0, len(parts[0].b), ROWS):
        rows = torch.stack([part.rows(slice(start, start + ROWS)).flatten() for part in parts])
        found += (rows @ rows.T).numpy()
    return found
