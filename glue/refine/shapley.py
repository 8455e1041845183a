"""Shapley values of players from the values of subsets of them, which is all that is known of the game.

Players leave one after the other, or in blocks, in random orders; what the value loses is what they were worth. Each
order is walked by halves: first the value in its middle, then those between, so that whole orders are asked together,
and a stretch along which the value stays the same is left alone.

Departs from SHED (arXiv:2405.00705): a block's contribution is divided among its players; the value of nobody is asked
and not taken to be 0, so that contributions of each order sum to v(all) - v(nobody) exactly; orders come in pairs, one
the other reversed; flat stretches are not walked; it ends once the table is as precise as was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from glue.errors import MethodError
from glue.refine.journal import Journal

Value = Callable[[Sequence[frozenset[int]]], Iterable[float]]
Report = Callable[[int, int, str], None]
ENUMERATED = 12  # players whose subsets, 4096 of them, can all be asked
SURE = 0.95


@dataclass(frozen=True)
class Valued:
    """What each of n players is worth.

    mean       [n], in the unit of the value; over all players they sum to v(all) - v(nobody)
    error      [n], standard errors of the means; 0 where all subsets were asked, inf where one order or pair was
    low, high  [n], the 95 % interval of each, by Student's t
    fits       how many different subsets were valued, nobody and all of them too
    exact      whether those were all subsets
    values     those subsets, and the value of each
    """

    mean: np.ndarray
    error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    fits: int
    exact: bool
    values: Mapping[frozenset[int], float] = field(repr=False, default_factory=dict)


def shapley(n: int, value: Value, *, chains: int = 10, block: int = 1, antithetic: bool = True, tolerance: float = 0.0,
            precision: float = 0.0, most: int | None = None, exact: bool | None = None, seed: int = 0,
            journal: Journal | None = None, report: Report = lambda done, total, note: None) -> Valued:
    """The Shapley value of each of n players.

    value       told several subsets at once, answers in their order; never asked the same subset twice
    chains      the most orders in which players leave; two by two where they are antithetic, one the other reversed
    block       how many leave at a time. More than one shrinks values towards each other, and tells them apart less
    tolerance   a stretch of an order is taken to be flat where its ends and its middle differ by no more. Where more
                players are never worse, no contribution is off by more than this
    precision   ends once standard errors (root mean square) are at most this share of the standard deviation between
                players; r correlates about as sqrt(1 - r^2) with what all orders would give. 0: all chains
    most        how many subsets may be valued. An order that is cut off by this counts only if it is the first
    exact       ask all subsets; None does so for up to 12 players, where `most` allows
    journal     what was valued before, and is valued now; it is gone on with as if nothing had happened

    Raises MethodError for a value that is no number, for what cannot be enumerated, and for a budget below 2.
    """
    assert n > 0 and chains > 0 and block > 0, "there are players, orders and blocks"
    if most is not None and most < 2:
        raise MethodError(f"a budget of {most} does not reach the values of all players and of nobody",
                          fix="give it 2 or more; one for each player makes one order")
    if exact and (n > ENUMERATED or (most is not None and most < 2 ** n)):
        budget = f", the budget is {most}" if most else ""
        raise MethodError(f"all subsets of {n} players are {2 ** n} values{budget}",
                          fix=f"leave 'exact' out for more than {ENUMERATED} players, or raise the budget")
    enumerated = exact or (exact is None and n <= ENUMERATED and (most is None or most >= 2 ** n))
    steps = math.ceil(n / block)
    total = 2 ** n if enumerated else 2 + chains * (steps - 1)
    game = Game(value, most, journal, lambda done: report(min(done, total), min(total, most or total), "subsets"))
    if enumerated:
        return _exactly(n, game)

    game.ask([frozenset(range(n)), frozenset()])
    units, apart = _orders(n, chains, antithetic, seed), bool(precision or most)
    found: list[np.ndarray] = []
    for first in range(0, len(units), 1 if apart else len(units)):
        wave = units[first:first + 1] if apart else units
        walks = [[Walk(order, block) for order in unit] for unit in wave]
        _walk([walk for unit in walks for walk in unit], game, tolerance)
        if game.spent and found:
            break
        found += [np.mean([walk.contributions(game) for walk in unit], axis=0) for unit in walks]
        if game.spent or (precision and _settled(found, precision)):
            break
    return replace(_told(np.array(found)), fits=game.fits, values=game.known)


class Game:
    """Values of subsets: asked once, remembered, written down.

    most   how many may be valued; `spent` is whether that has ended something
    known  what was valued, now or as the journal tells
    """

    def __init__(self, value: Value, most: int | None, journal: Journal | None, told: Callable[[int], None]):
        self._value, self._most, self._journal, self._told = value, most, journal, told
        self.known: dict[frozenset[int], float] = {}
        self.spent = False

    @property
    def fits(self) -> int:
        """How many subsets have been valued."""
        return len(self.known)

    def ask(self, subsets: Iterable[frozenset[int]]) -> None:
        """Value all that are new, in one call, as far as the budget goes."""
        fresh = [subset for subset in dict.fromkeys(subsets) if subset not in self.known]
        if self._most is not None and len(fresh) > self._most - self.fits:
            fresh, self.spent = fresh[:self._most - self.fits], True
        heard: dict[frozenset[int], float] = {}
        for subset in fresh if self._journal else ():
            if (before := self._journal.get(subset)) is not None:  # type: ignore[union-attr]
                heard[subset] = before
        missing = [subset for subset in fresh if subset not in heard]
        for subset, value in zip(missing, self._value(missing) if missing else [], strict=True):
            if not math.isfinite(value):
                raise MethodError(f"a subset of {len(subset)} players has the value {value}",
                                  fix="a value is a finite number: look at what the step measures of them")
            heard[subset] = float(value)
            if self._journal:
                self._journal.add(subset, heard[subset])
            self._told(self.fits + len(heard))
        self.known |= {subset: heard[subset] for subset in fresh}


class Walk:
    """One order in which players leave, at most `block` at a time; place k is before the k-th block leaves."""

    def __init__(self, order: np.ndarray, block: int):
        self.order = order
        self.gone = [*range(0, len(order), block), len(order)]  # how many have left at each place
        self.last = len(self.gone) - 1

    def left(self, place: int) -> frozenset[int]:
        """Who is still there."""
        return frozenset(self.order[self.gone[place]:].tolist())

    def contributions(self, game: Game) -> np.ndarray:
        """What the value lost with each player, [n]; players between two known places share the loss."""
        values = [game.known.get(self.left(place)) for place in range(self.last + 1)]
        known = [place for place, value in enumerate(values) if value is not None]
        found = np.empty(len(self.order))
        for a, b in zip(known, known[1:], strict=False):
            left = self.order[self.gone[a]:self.gone[b]]
            found[left] = (values[a] - values[b]) / len(left)  # type: ignore[operator]
        return found


def _walk(walks: Sequence[Walk], game: Game, tolerance: float) -> None:
    """Value what lies along some orders: stretches that are not flat are halved, all of one round together."""
    stretches = [(walk, 0, walk.last) for walk in walks]
    while stretches := [(walk, a, b) for walk, a, b in stretches if b - a > 1]:
        halved = [(walk, a, (a + b) // 2, b) for walk, a, b in stretches]
        game.ask(walk.left(middle) for walk, _, middle, _ in halved)
        stretches = []
        for walk, a, middle, b in halved:
            values = [value for place in (a, middle, b) if (value := game.known.get(walk.left(place))) is not None]
            # the ends alone would call two players flat of whom one gains what the other loses
            if len(values) == 3 and not (tolerance and max(values) - min(values) <= tolerance):
                stretches += [(walk, a, middle), (walk, middle, b)]


def _orders(n: int, chains: int, antithetic: bool, seed: int) -> list[list[np.ndarray]]:
    """Random orders of the players, in units that are independent of each other: pairs, or single ones."""
    rng = np.random.default_rng([seed, n])
    if not antithetic:
        return [[rng.permutation(n)] for _ in range(chains)]
    orders = [rng.permutation(n) for _ in range(math.ceil(chains / 2))]
    pairs = [[order, order[::-1]] for order in orders]
    return pairs if chains % 2 == 0 else [*pairs[:-1], pairs[-1][:1]]


def _settled(found: Sequence[np.ndarray], precision: float) -> bool:
    told = _told(np.array(found))
    return bool(np.sqrt(np.mean(told.error ** 2)) <= precision * told.mean.std())


def _told(samples: np.ndarray) -> Valued:
    """Means and their errors from independent samples [units, n]."""
    from scipy.stats import t

    count, mean = len(samples), samples.mean(axis=0)
    if count == 1:
        wide = np.full(len(mean), math.inf)
        return Valued(mean, wide, -wide, wide, 0, False)
    error = samples.std(axis=0, ddof=1) / math.sqrt(count)
    half = t.ppf((1 + SURE) / 2, count - 1) * error
    return Valued(mean, error, mean - half, mean + half, 0, False)


def _exactly(n: int, game: Game) -> Valued:
    """The mean over all orders, from all subsets."""
    subsets = [frozenset(some) for size in range(n + 1) for some in combinations(range(n), size)]
    game.ask(subsets)
    values = game.known
    mean = np.array([math.fsum((values[subset | {i}] - values[subset]) / (n * math.comb(n - 1, len(subset)))
                               for subset in subsets if i not in subset) for i in range(n)])
    return Valued(mean, np.zeros(n), mean, mean, game.fits, True, game.known)
