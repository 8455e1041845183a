"""Privacy: what leaves a client is clipped, then noised, and an accountant says what that is worth.

The guarantee is by client: what it sends in a round is one answer of the Gaussian mechanism, whether it takes part with
its data or with nothing, or as many answers as it sends slopes. It holds against the server too, since the client adds
the noise itself. No credit is taken for clients being drawn, nor for secure aggregation.

What is not promised: numbers of a computer are not real numbers, and an attack on their rounding is not defended
against; and the noise protects only while its seed is the client's secret. Where a federation is played in one process,
from one seed, whoever knows that seed can take the noise away again.

Factors of an adapter, by how they travel:

    frozen A     delta = M Q, where Q is an orthonormal basis of the rows of A, which all know. M has the norm of delta;
                 it is clipped and noised, so noise is added to delta itself, within the rows of A
    trained A    both factors are balanced (the root of each singular value in both), and both are noised: what is sent
                 is (B + e)(A + f), so noise also meets noise. Where |delta| <= clip, balanced factors of rank r have at
                 most the norm sqrt(2 sqrt(r) clip) together, r summed over layers, and that is what noise is sized by

What FLoRA broadcasts is the stack: every client's own factors, in slots that tell them apart. Secure aggregation hides
nothing there, and without noise each client reads what each other one has learnt. Cutting the stack to a lower rank
(combine: {flora: {rank: ...}}) mixes the slots, and is no guarantee; a frozen A with the mean of B sends sums alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glue.errors import GlueError
from glue.federate.heterogeneity import Change
from glue.files import write_aside
from glue.kinds.lora import PREFIX, WEIGHTS, Adapter

ORDERS = np.concatenate([np.linspace(1.01, 10, 900), np.geomspace(10, 1e6, 2000)])


@dataclass(frozen=True)
class Privacy:
    """How much of what one answer says is let through.

    clip   the largest slope in size, or Frobenius norm of a change; what is larger is scaled down to it
    noise  standard deviation of the noise, in units of the clip (with trained factors: of what their clip allows)
    delta  the chance that is left out of the guarantee
    """

    clip: float
    noise: float = 0.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        if not (self.clip > 0 and self.noise >= 0 and 0 < self.delta < 1):
            raise GlueError(f"clip {self.clip:g}, noise {self.noise:g}, delta {self.delta:g} are no privacy",
                            fix="clip is above 0, noise is 0 or more, delta is between 0 and 1")

    def spent(self, answers: int) -> float:
        """The epsilon of so many answers, at `delta`; infinite without noise."""
        return epsilon(self.noise, answers, self.delta)

    def told(self, answers: Mapping[str, int]) -> dict[str, Any]:
        """For the ledger: what was done, and what each client spent; `answers` counts what each has sent."""
        spent = {client: self.spent(count) for client, count in answers.items()}
        return {"mechanism": "gaussian", "clip": self.clip, "noise": self.noise, "delta": self.delta,
                "unit": "client, present or absent", "accountant": "rdp, without amplification",
                "answers": dict(answers),
                "epsilon": {client: value if math.isfinite(value) else "none" for client, value in spent.items()}}

    def slope(self, rng: np.random.Generator) -> Callable[[float], float]:
        """A function that clips one number and adds noise to it."""
        return lambda value: (min(max(value, -self.clip), self.clip)
                              + (self.noise * self.clip * rng.standard_normal() if self.noise else 0.0))


def epsilon(noise: float, answers: int, delta: float) -> float:
    """The epsilon of so many answers of the Gaussian mechanism at this delta, by Renyi divergence.

    Of order a, that of one answer is a / (2 noise^2), and answers add up (Mironov, arXiv:1702.07476); from there to
    epsilon as in proposition 12 of arXiv:2004.00010, at the best order.
    """
    if not answers:
        return 0.0
    if not noise:
        return math.inf
    a = ORDERS
    found = a * answers / (2 * noise**2) + np.log1p(-1 / a) - (math.log(delta) + np.log(a)) / (a - 1)
    return max(0.0, float(found.min()))


def private(changes: Mapping[str, Change], privacy: Privacy, rng: np.random.Generator, *,
            frozen: bool = False) -> dict[str, Change]:
    """What a client may send in place of what it has changed: clipped by the norm of all of it, and noised.

    frozen  A is the same for all and was not trained, so that it is sent as it is
    Factors keep their shapes and their scale. Raises GlueError for a frozen A whose rows depend on each other.
    """
    whole = math.sqrt(abs(sum(_square(change) for change in changes.values())))
    if not math.isfinite(whole):
        raise GlueError("a change that is no number cannot be clipped", fix="train with a lower learning_rate")
    factor = min(1.0, privacy.clip / whole) if whole else 1.0
    spread = privacy.noise * privacy.clip
    if not frozen:
        ranks = sum(len(change.a) for change in changes.values() if change.a is not None)
        if ranks:
            # those without factors are at most `clip` beside what the factors can be
            dense = any(change.a is None for change in changes.values())
            spread = privacy.noise * math.sqrt(2 * math.sqrt(ranks) * privacy.clip + dense * privacy.clip**2)
    found = {}
    for name in sorted(changes):
        change = changes[name]
        if change.a is None:
            found[name] = replace(change, b=change.b.double() * factor + _noise(change.b, spread, rng))
        elif frozen:
            found[name] = _within(change, change.a, factor, spread, rng)
        else:
            a, b = balanced(change, factor)
            found[name] = replace(change, b=(b + _noise(b, spread, rng)) / change.scale, a=a + _noise(a, spread, rng))
    return found


def privatise(folder: Path, privacy: Privacy, rng: np.random.Generator, *, frozen: bool = False) -> None:
    """Replace the factors of an adapter's folder by what may be sent of them, see `private`; its configuration stays.

    Raises GlueError where it holds more than factors, such as biases or DoRA's magnitudes.
    """
    from safetensors.torch import save

    adapter = Adapter(folder)
    if adapter.replaced or adapter.stretched:
        raise GlueError(f"{folder} holds more than factors, and nothing is known of what that tells",
                        fix="train without biases, saved modules and DoRA, or without privacy")
    changes = {module: Change(b, a, adapter.scale(module)) for module in adapter.modules
               for a, b in (adapter.factors(module),)}
    tensors = {f"{PREFIX}{module}.lora_{side}.weight": factor.to(torch.float32).contiguous()
               for module, change in private(changes, privacy, rng, frozen=frozen).items()
               for side, factor in (("A", change.a), ("B", change.b)) if factor is not None}
    write_aside(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))


def balanced(change: Change, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Factors a [r, n] and b [m, r] of factor * change with the root of each singular value in both, fp64."""
    assert change.a is not None
    left, right = torch.linalg.qr(change.b.double()), torch.linalg.qr(change.a.double().T)
    u, values, vt = torch.linalg.svd(factor * change.scale * left.R @ right.R.T)
    root = values.sqrt()
    k, r = len(values), len(change.a)
    a, b = torch.zeros(r, change.a.shape[1], dtype=torch.float64), torch.zeros(len(change.b), r, dtype=torch.float64)
    a[:k], b[:, :k] = root[:, None] * (vt[:k] @ right.Q.T), left.Q @ u[:, :k] * root
    return a, b


def _within(change: Change, a: Tensor, factor: float, spread: float, rng: np.random.Generator) -> Change:
    """factor * change with noise in the rows of a: b is moved by so much that delta gets it, evenly in all rows."""
    triangle = torch.linalg.qr(a.double().T).R
    size = triangle.diagonal().abs()
    if len(triangle) < len(a) or float(size.min()) < 1e-6 * float(size.max()):
        raise GlueError("the rows of a frozen A depend on each other, so noise in them cannot be even",
                        fix="use a rank below the width of the layers")
    noise = _noise(change.b, spread, rng) / change.scale
    added = torch.linalg.solve_triangular(triangle.T, noise, upper=False, left=False)
    return replace(change, b=change.b.double() * factor + added)


def _square(change: Change) -> float:
    """The square of the Frobenius norm, from r x r products where there are factors."""
    b = change.b.double()
    if change.a is None:
        return float(b.square().sum())
    a = change.a.double()
    return change.scale**2 * float(((b.T @ b) * (a @ a.T)).sum())


def _noise(like: Tensor, spread: float, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(spread * rng.standard_normal(tuple(like.shape)))
