"""The page of the benchmark: how often racing reached the grid's choice, and the zoos one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.zoos.compare import SHARE, Compared, Search
from glue.evaluate.statistics import Interval


def markdown(zoos: Sequence[Compared], made: Mapping[str, Any]) -> str:
    """The whole page.

    made  what it was made on: see `machine`, and `commit`
    """
    return "\n".join([*_head(zoos), "", *_table(zoos), "", *_found(zoos), "", _foot(made), ""])


def _head(zoos: Sequence[Compared]) -> Iterator[str]:
    shares = [zoo.share for zoo in zoos]
    yield "# Racing against the grid"
    yield ""
    yield "Made by `python -m benchmarks.zoos`; do not edit."
    yield ""
    yield (f"In **{sum(zoo.reached for zoo in zoos)} of {len(zoos)}** zoos racing reached the grid's choice with at "
           f"most {SHARE:.0%} of its answers. The same members: {sum(zoo.alike for zoo in zoos)}; not behind by more "
           f"than noise on dev items: {sum(zoo.level for zoo in zoos)}; at most {SHARE:.0%} of the answers: "
           f"{sum(share <= SHARE for share in shares)} (median {median(shares):.1%}, at most {max(shares):.1%}). "
           f"On test items what racing found is clearly worse in {sum(zoo.test.high < 0 for zoo in zoos)}, clearly "
           f"better in {sum(zoo.test.low > 0 for zoo in zoos)}.")
    yield ""
    yield (f"Every zoo is {zoos[0].members} members, family A of `recipes/tiny_zoo.yaml` trained anew from its seed; "
           f"both searches look at {zoos[0].items} dev items, and take members by accuracy at the coefficients .05, .1 "
           "to .95. The grid measures every one on all items. Differences are in points of the mean over tasks, with "
           "paired 95 % intervals; no search has seen the test items.")


def _table(zoos: Sequence[Compared]) -> Iterator[str]:
    yield ("| seed | answers: grid | racing | share | same members | dev: grid | racing | racing - grid, dev | "
           "racing - grid, test | grid - best member, test | reached |")
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for zoo in zoos:
        cells = [zoo.seed, zoo.grid.answers, zoo.raced.answers, f"{zoo.share:.1%}", _yes(zoo.alike),
                 f"{zoo.grid.value * 100:.1f}", f"{zoo.raced.value * 100:.1f}",
                 *map(_points, (zoo.dev, zoo.test, zoo.gain)), _yes(zoo.reached)]
        yield f"| {' | '.join(map(str, cells))} |"


def _found(zoos: Sequence[Compared]) -> Iterator[str]:
    yield "| seed | the grid found | racing found |"
    yield "|---|---|---|"
    for zoo in zoos:
        yield f"| {zoo.seed} | {_weights(zoo.grid)} | {_weights(zoo.raced)} |"


def _foot(made: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"{made['cpu']}, Linux {made['kernel']}; Python {made['python']}, {versions}; commit {made['commit']}."


def _weights(search: Search) -> str:
    """Member and weight, the heaviest first."""
    told = sorted(search.candidate.weights.items(), key=lambda item: (-item[1], item[0]))
    merge = " + ".join(f"{weight:g} {name.rsplit('/', 1)[-1]}" for name, weight in told)
    return f"{merge}, of {search.candidates} candidates" if search.candidate.merged else f"{merge} as it is"


def _points(gap: Interval) -> str:
    return f"{gap.value * 100:+.1f} [{gap.low * 100:+.1f}, {gap.high * 100:+.1f}]"


def _yes(held: bool) -> str:
    return "yes" if held else "no"
