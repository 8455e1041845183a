"""What a router's choices come to: who answers what, how evenly, what the choices follow, and how good they could be.

Letters: m items, e experts, t tasks, l places that decide for themselves (one at model and text level, else the routed
layers). All numbers are fp64; all entropies are in bits.

shares  [m, l, e] what each expert adds to each answer; they sum to 1 over e, and are one-hot where one expert answers
wins    [m, e] in 0..1, what each expert scores on each item when it answers alone
tasks   [m] number of the task of each item, from 0
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choices:
    """Numbers of one router on some items; what differs between places is averaged over them.

    by_task    [t, e] share of each task's items that each expert answers
    load       [e] the same over all items
    entropy    of the load: log2(e) where all experts are asked alike, 0 where one always is
    within     [t] of the shares inside each task: 0 where a task has one expert
    doubt      of the shares of one item, mean over items: 0 where one expert answers
    variation  standard deviation of the loads over their mean: 0 where they are even, sqrt(e - 1) where one has all
    agrees     share of answers that come from the expert that scores best on the item's task
    follows    adjusted mutual information of the choices and of those experts: 1 where each tells the other, about 0 by
               chance, however often a router asks whom
    hits       share of answers that come from an expert than which none is better, where the experts differ
    luck       what the same loads would hit if they were dealt out blindly; both NaN where the experts never differ
    """

    by_task: np.ndarray
    load: np.ndarray
    entropy: float
    within: np.ndarray
    doubt: float
    variation: float
    agrees: float
    follows: float
    hits: float
    luck: float


def choices(shares: np.ndarray, wins: np.ndarray, tasks: np.ndarray) -> Choices:
    """All numbers about the choices themselves; see the top of the file for the shapes."""
    m, _, e = shares.shape
    assert wins.shape == (m, e) and tasks.shape == (m,), f"{m} items; wins {wins.shape}, tasks {tasks.shape}"
    numbers = range(int(tasks.max()) + 1)
    loads = shares.mean(0)  # [l, e]
    inside = np.stack([shares[tasks == number].mean(0) for number in numbers])  # [t, l, e]
    best = (wins >= wins.max(1, keepdims=True))[wins.max(1) > wins.min(1)]
    there = shares[wins.max(1) > wins.min(1)]
    known = len(best) > 0
    right = best_by_task(wins, tasks)[tasks]
    return Choices(
        inside.mean(1), loads.mean(0), float(entropy(loads).mean()), entropy(inside).mean(1),
        float(entropy(shares).mean()), float((loads.std(-1) / loads.mean(-1)).mean()),
        float(shares.mean(1)[np.arange(m), right].mean()), adjusted_information(_labels(shares), right.tolist()),
        float((there * best[:, None]).sum(-1).mean()) if known else float("nan"),
        float((loads[None] * best[:, None]).sum(-1).mean()) if known else float("nan"))


def shares_of(route: Hashable, e: int) -> np.ndarray:
    """A route, as Running.route tells it, as shares [l, e].

    route  the number of an expert, or the weights of all e of them, place after place
    """
    if isinstance(route, int):
        return np.eye(e)[[route]]
    assert isinstance(route, tuple) and len(route) % e == 0, f"{route!r} are no weights of {e} experts"
    weights = np.array(route, dtype=np.float64).reshape(-1, e)
    return weights / weights.sum(1, keepdims=True)


def hindsight(wins: np.ndarray, tasks: np.ndarray) -> dict[str, np.ndarray]:
    """What choices would have scored that are made with these very results at hand, [m] each; so all are flattered.

    best for each item  the oracle: no router over these experts scores more, item by item
    best for each task  routing by the true task
    best single expert  no routing; tasks count alike, whatever their size
    """
    chosen = best_by_task(wins, tasks)
    single = int(_by_task(wins, tasks).mean(0).argmax())
    return {"best for each item": wins.max(1), "best for each task": wins[np.arange(len(wins)), chosen[tasks]],
            "best single expert": wins[:, single]}


def best_by_task(wins: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """The expert of the highest mean on each task, the first of equals. [t]"""
    return _by_task(wins, tasks).argmax(1)


def promised(shares: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """What each item would score if experts answered alone, as often as their shares say. [m]

    A mixture that passes the question to one whole expert scores exactly this.
    """
    # shares sum to 1 but for rounding, and no mixture of results is more than the best of them
    return np.clip((shares.mean(1) * wins).sum(1), wins.min(1), wins.max(1))


def entropy(shares: np.ndarray) -> np.ndarray:
    """Bits of distributions along the last axis."""
    logs = np.log2(shares, out=np.zeros_like(shares, dtype=np.float64), where=shares > 0)
    return -(shares * logs).sum(-1) + 0.0  # + 0: no -0


def adjusted_information(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """How far two labellings of the same items tell each other: mutual information, adjusted for chance.

    (I - E[I]) / (mean of both entropies - E[I]), with the expectation over all labellings with the same counts (Vinh,
    Epps and Bailey, 2010). 1 where they are the same but for names, also where both have one label only.
    """
    a, b, table = _counted(one, other)
    n = len(one)
    if len(a) == len(b) == 1:
        return 1.0
    met = table > 0
    information = float((table[met] / n * np.log(n * table[met] / np.outer(a, b)[met])).sum())
    top = np.log(2) * float(entropy(a / n) + entropy(b / n)) / 2
    expected = _expected(a, b, n)
    least = np.finfo(np.float64).eps
    return (information - expected) / max(top - expected, least)


def _counted(one: Sequence[Hashable], other: Sequence[Hashable]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each label stands, [i] and [j], and how often both, [i, j]."""
    rows = {label: k for k, label in enumerate(dict.fromkeys(one))}
    columns = {label: k for k, label in enumerate(dict.fromkeys(other))}
    table = np.zeros((len(rows), len(columns)))
    for left, right in zip(one, other, strict=True):
        table[rows[left], columns[right]] += 1
    return table.sum(1), table.sum(0), table


def _expected(a: np.ndarray, b: np.ndarray, n: int) -> float:
    """Mutual information, in nats, of two labellings with these counts that have nothing to do with each other."""
    from scipy.special import gammaln

    total = 0.0
    for left in a:
        for right in b:
            both = np.arange(max(1, left + right - n), min(left, right) + 1)
            log_chance = (gammaln(left + 1) + gammaln(right + 1) + gammaln(n - left + 1) + gammaln(n - right + 1)
                          - gammaln(n + 1) - gammaln(both + 1) - gammaln(left - both + 1) - gammaln(right - both + 1)
                          - gammaln(n - left - right + both + 1))
            total += float((both / n * np.log(n * both / (left * right)) * np.exp(log_chance)).sum())
    return total


def _labels(shares: np.ndarray) -> list[tuple[int, ...]]:
    """The expert of the largest share at each place, for each item."""
    return [tuple(row) for row in shares.argmax(-1).tolist()]


def _by_task(wins: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    return np.stack([wins[tasks == number].mean(0) for number in range(int(tasks.max()) + 1)])
