"""How many fits a table of values takes, beside the published scheme, until both rank clusters as a long run does.

The game is ridge regression, refitted in closed form on the examples of some clusters and worth what it explains of dev
items; it has the shape of recipes/shed.yaml: 60 clusters that bring less the more there are, a fifth of them with wrong
labels, a tenth off the task. The published scheme (arXiv:2405.00705) walks independent orders, six clusters leaving at
a time, to the end, and knows no reason to stop: it is given chains until it is as near as ours is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.speed.machine import commit
from benchmarks.speed.pairs import ROOT
from glue.files import write_aside
from glue.refine.shapley import Valued, shapley

CLUSTERS, WRONG, OFF = 60, 12, 6
EACH, WIDTH, DEV = 16, 32, 800  # examples of a cluster, features, dev items
STAY = 300.0  # how much a fit stays where it begins: so much that a pair of orders tells a value to about a half
LONG = 1000  # chains of the run that both are compared with
NEAR = 0.95  # rank correlation with it
BATCH = 512  # subsets that are solved at once
PUBLISHED: Mapping[str, Any] = {"block": 6, "antithetic": False}
OURS: Mapping[str, Any] = {"chains": 400, "precision": 0.2, "tolerance": 0.002}
WAYS: Mapping[str, Mapping[str, Any]] = {  # what each part does, by leaving it out
    "ours": OURS, "ours without pairs": {**OURS, "antithetic": False},
    "ours without truncation": {**OURS, "tolerance": 0.0}}
MORE = (10, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)  # chains that the published scheme is given
ONES = 6  # of these also with clusters that leave one at a time, which is six times as dear


class Ridge:
    """A game whose players are clusters of examples; `wrong` are those whose labels say nothing, `off` the task."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=WIDTH) / np.sqrt(WIDTH)
        middle = rng.normal(size=(CLUSTERS, 1, WIDTH))
        x = middle + rng.normal(size=(CLUSTERS, EACH, WIDTH))
        y = x @ truth + rng.normal(size=(CLUSTERS, EACH))
        kind = rng.permutation(CLUSTERS)
        self.wrong, self.off = kind[:WRONG], kind[WRONG:WRONG + OFF]
        y[self.wrong] = rng.permuted(y[self.wrong].ravel()).reshape(WRONG, EACH)
        x[self.off, :, :WIDTH // 2] = 0
        y[self.off] = x[self.off] @ rng.normal(size=WIDTH) / np.sqrt(WIDTH)
        self.start = truth / 2 + rng.normal(size=WIDTH) / np.sqrt(WIDTH) / 2  # knows a half
        self.grams, self.moments = np.einsum("cnd,cne->cde", x, x), np.einsum("cnd,cn->cd", x, y)
        self.x = middle[rng.integers(0, CLUSTERS, DEV), 0] + rng.normal(size=(DEV, WIDTH))
        self.y = self.x @ truth + rng.normal(size=DEV)

    def __call__(self, subsets: Sequence[frozenset[int]]) -> list[float]:
        """The share of the variance of dev items that a refit explains."""
        member, found = np.zeros((len(subsets), CLUSTERS)), list[float]()
        for row, subset in zip(member, subsets, strict=True):
            row[list(subset)] = 1
        for first in range(0, len(member), BATCH):
            some = member[first:first + BATCH]
            grams = np.tensordot(some, self.grams, 1) + STAY * np.eye(WIDTH)
            fits = np.linalg.solve(grams, (some @ self.moments + STAY * self.start)[..., None])[..., 0]
            found += (1 - ((self.y - fits @ self.x.T) ** 2).mean(axis=1) / (self.y ** 2).mean()).tolist()
        return found


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)


def measured(games: int) -> dict[str, Any]:
    """Fits and rank correlation with the long run of each way, game by game; and of the published one, by chains."""
    rows: dict[str, Any] = {name: [] for name in (*WAYS, "published", "published, one at a time")}
    for seed in range(games):
        game = Ridge(seed)
        long = shapley(CLUSTERS, game, chains=LONG, seed=10_000 + seed).mean
        print(f"game {seed + 1} of {games} ...", file=sys.stderr, flush=True)

        def run(game: Ridge = game, long: np.ndarray = long, seed: int = seed, **given: Any) -> dict[str, float]:
            found: Valued = shapley(CLUSTERS, game, seed=seed, **given)
            return {"fits": found.fits, "alike": alike(found.mean, long)}

        for name, given in WAYS.items():
            rows[name].append(run(**given))
        rows["published"].append({str(k): run(chains=k, **PUBLISHED) for k in MORE})
        rows["published, one at a time"].append({str(k): run(chains=k, antithetic=False) for k in MORE[:ONES]})
    return rows


def told(rows: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Each way in two numbers, means over games; of the published one with the fewest chains that come near enough."""
    def mean(some: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {word: float(np.mean([one[word] for one in some])) for word in ("fits", "alike")}

    found = {name: mean(rows[name]) for name in WAYS}
    for name in rows.keys() - WAYS.keys():
        by_chains = [mean([one[k] for one in rows[name]]) for k in rows[name][0]]
        # where the most chains are not enough, those are told with how near they came
        found[name] = next((one for one in by_chains if one["alike"] >= NEAR), by_chains[-1])
    return found


def main(given: argparse.Namespace) -> int:
    """Measure, print a table, write it down; 1 where we need more than a third of the fits, or are not near."""
    rows = measured(given.games)
    table = told(rows)
    print(f"| way | fits | rank correlation with {LONG} chains |\n|---|---:|---:|")
    for name, row in sorted(table.items(), key=lambda item: item[1]["fits"]):
        print(f"| {name} | {row['fits']:.0f} | {row['alike']:.3f} |")
    if given.json:
        write_aside(given.json, json.dumps({"commit": commit(ROOT), "table": table, "rows": rows}, indent=1) + "\n")
    ours = table["ours"]
    return int(ours["alike"] < NEAR or 3 * ours["fits"] > table["published"]["fits"])
