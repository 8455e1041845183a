"""The picture of an atlas: a heat map in the order of the dendrogram that stands beside it.

Below the diagonal the cosine of two members, above it the verdict on them. Cosines are drawn on a scale of
sqrt(1 - cosine), the tree too: what tells relatives apart lies between 0.9 and 1, strangers are all near 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, sqrt
from os.path import commonprefix

import numpy as np

from glue.atlas import Atlas, Family, Pair
from glue.report.drawing import Box, Disc, Drawing, Shape, Trace, Words, blend, room

COLOURS = ((-0.3, "#e9967a"), (0.0, "#f7f9fb"), (0.3, "#cfe0ee"), (0.65, "#74a9cf"), (0.85, "#2b7bb9"),
           (1.0, "#08386b"))
UNKNOWN, INK, QUIET, GOOD, CARE, NO = "#e3e3e3", "#222222", "#7a7a7a", "#1a8754", "#d98200", "#b9b9b9"
MARGIN, TREE, GAP, BAR = 18.0, 130.0, 7.0, 90.0
BEYOND = 1.12  # where in the tree those meet that cannot be compared
LONG = 38      # letters of a name that are shown


@dataclass(frozen=True)
class Branch:
    """Two parts of the tree that meet: their rows and depths, and where they meet; depth 0 is a member."""

    rows: tuple[float, float]
    depths: tuple[float, float]
    depth: float


def picture(atlas: Atlas) -> Drawing:
    """Heat map, dendrogram, families with their roots, and what all of it means."""
    order, branches = tree(atlas.joinable, atlas.linkage)
    n = len(order)
    cell = min(30.0, max(10.0, 560 / n))
    size = min(9.0, 0.8 * cell)
    before = _before(atlas.names)
    labels = [_short(atlas.names[k][len(before):]) + (" (adapter)" if atlas.kinds[k] == "adapter" else "")
              for k in order]
    roots = [f"{'from' if family.ancestor else 'around'} {_short(family.root.removeprefix(before))}"
             for family in atlas.families]
    left, top = MARGIN + TREE + GAP, MARGIN + 84
    side = n * cell
    named = room(labels, size)
    sides = {atlas.names[k]: place for place, k in enumerate(order)}
    shapes: list[Shape] = [*_head(atlas, before), *_legend(atlas, MARGIN, MARGIN + 42)]
    shapes += _tree(branches, atlas.threshold, left - GAP, top, cell, n)
    shapes += _cells(atlas, sides, left, top, cell)
    for place, label in enumerate(labels):
        middle = top + (place + 0.5) * cell + 0.36 * size
        shapes.append(Words(left + side + 6, middle, label, size, INK))
        shapes.append(Words(left + (place + 0.5) * cell + 0.36 * size, top + side + 6, label, size, INK, "end", 90))
    for family, root in zip(atlas.families, roots, strict=True):
        shapes += _family(family, root, sides, left, top, cell, left + side + 6 + named + 6)
    width = max(shape.x + room([shape.text], shape.size) for shape in shapes
                if isinstance(shape, Words) and shape.anchor == "start") + MARGIN
    return Drawing(width, top + side + 8 + room(labels, size) + MARGIN, shapes)


def tree(similarity: np.ndarray, linkage: str) -> tuple[list[int], list[Branch]]:
    """(members from top to bottom, where their branches meet); a leader's families have the tree of averages.

    similarity  [n, n]; NaN joins last
    """
    from scipy.cluster import hierarchy

    n = len(similarity)
    distance = np.where(np.isnan(similarity), 8.0 * n * n, np.maximum(1 - similarity, 0.0))
    joins = hierarchy.linkage(distance[np.triu_indices(n, 1)], method="average" if linkage == "leader" else linkage)
    parts: list[tuple[list[int], float]] = [([k], 0.0) for k in range(n)]  # members, depth
    pairs = []
    for one, other, height, _ in joins:
        pair = sorted((int(one), int(other)), key=lambda k: (-len(parts[k][0]), min(parts[k][0])))  # large ones on top
        pairs.append(pair)
        parts.append((parts[pair[0]][0] + parts[pair[1]][0], _depth(1 - height)))
    order = parts[-1][0]
    rows = [float(order.index(k)) for k in range(n)]
    branches = []
    for k, (one, other) in enumerate(pairs):
        branches.append(Branch((rows[one], rows[other]), (parts[one][1], parts[other][1]), parts[n + k][1]))
        rows.append((rows[one] + rows[other]) / 2)
    return order, branches


def _depth(cosine: float) -> float:
    return BEYOND if cosine < -2 else sqrt(min(max(1 - cosine, 0.0), 1.0))


def _tone(cosine: float) -> str:
    """The colour of a cosine."""
    if isnan(cosine):
        return UNKNOWN
    return blend(COLOURS, 1 - sqrt(max(1 - cosine, 0.0)) if cosine > 0 else cosine)


def _head(atlas: Atlas, before: str) -> Iterator[Shape]:
    n, many = len(atlas.names), len(atlas.families)
    families = "1 family" if many == 1 else f"{many} families"
    yield Words(MARGIN, MARGIN + 10, f"{n} members, {families}", 14, INK, bold=True)
    parts = {"all": "attention and MLP matrices", "attention": "attention matrices", "mlp": "MLP matrices"}
    told = (f"cosine of columns, mean over {parts[atlas.part]}; families by {atlas.linkage} linkage "
            f"above {atlas.threshold:g}") + (f"; names without {before}" if before else "")
    yield Words(MARGIN, MARGIN + 26, told, 8, QUIET)


def _legend(atlas: Atlas, x: float, y: float) -> Iterator[Shape]:
    """A bar of colours for what is below the diagonal, marks for what is above it."""
    yield Words(x, y + 7, "below the diagonal: cosine", 8, INK)
    start, steps = x + 128, 45
    for k in range(steps):  # from 0 to 1, on the scale of the colours
        yield Box(start + k * BAR / steps, y, BAR / steps + 0.3, 9, _tone(1 - (1 - (k + 0.5) / steps) ** 2))
    for cosine in (0.0, 0.5, 0.9, 1.0):
        at = start + BAR * (1 - sqrt(1 - cosine))
        yield Words(at, y + 17, f"{cosine:g}", 6.5, QUIET, "middle")
    yield Box(start + BAR + 12, y, 9, 9, UNKNOWN)
    yield Words(start + BAR + 25, y + 7, "other shapes", 8, INK)
    x = start + BAR + 96
    yield Words(x, y + 7, "above: verdict", 8, INK)
    x += 72
    counts = atlas.counts()
    for word, cause in (("merge", "near"), ("merge with care", "far"), ("do not merge", "unrelated")):
        yield from _mark(word, cause, x + 5, y + 4.5, 5)
        yield Words(x + 14, y + 7, f"{word} ({counts[word]})", 8, INK)
        x += 24 + room([f"{word} ({counts[word]})"], 8) * 0.92
    causes = {pair.verdict.cause for pair in atlas.pairs}
    for cause, told in (("copy", "a copy"), ("twin", "a hidden twin")):
        if cause in causes:
            yield from _mark("", cause, x + 5, y + 4.5, 5)
            yield Words(x + 14, y + 7, told, 8, INK)
            x += 24 + room([told], 8)


def _mark(word: str, cause: str, x: float, y: float, radius: float) -> Iterator[Shape]:
    """The sign of a verdict around a point."""
    if cause in ("copy", "twin"):
        for off in (-0.4, 0.4) if cause == "copy" else (-0.7, 0.0, 0.7):
            level = y + off * radius
            yield Trace(((x - 0.7 * radius, level), (x + 0.7 * radius, level)), CARE, 0.3 * radius)
    elif word == "merge":
        yield Disc(x, y, 0.8 * radius, GOOD)
    elif word == "merge with care":
        yield Disc(x, y, 0.66 * radius, "white", CARE, 0.36 * radius)
    else:
        arm = 0.4 * radius
        yield Trace(((x - arm, y - arm), (x + arm, y + arm)), NO, 0.22 * radius)
        yield Trace(((x - arm, y + arm), (x + arm, y - arm)), NO, 0.22 * radius)


def _tree(branches: Sequence[Branch], threshold: float, right: float, top: float, cell: float,
          n: int) -> Iterator[Shape]:
    """The dendrogram, with members at its right edge and a line at the threshold."""
    def x(depth: float) -> float:
        return right - depth * TREE / BEYOND

    bottom = top + n * cell
    for cosine in (1.0, 0.9, 0.5, 0.0):
        at = x(_depth(cosine))
        yield Trace(((at, top), (at, bottom)), "#eeeeee", 0.6)
        yield Words(at, bottom + 10, f"{cosine:g}", 6.5, QUIET, "middle")
    for branch in branches:
        y = [top + (row + 0.5) * cell for row in branch.rows]
        at, beyond = x(branch.depth), branch.depth == BEYOND
        points = ((x(branch.depths[0]), y[0]), (at, y[0]), (at, y[1]), (x(branch.depths[1]), y[1]))
        yield Trace(points, NO if beyond else INK, 0.8 if beyond else 1.1, dashed=beyond)
    cut = x(_depth(threshold))
    yield Trace(((cut, top - 3), (cut, bottom + 3)), CARE, 0.9, dashed=True)
    yield Words(cut, top - 5, f"{threshold:g}", 7, CARE, "middle")


def _cells(atlas: Atlas, sides: Mapping[str, int], left: float, top: float, cell: float) -> Iterator[Shape]:
    thin = 0.4 if cell > 14 else 0.2
    for place in sides.values():
        yield Box(left + place * cell, top + place * cell, cell, cell, "#d5dbe1", "white", thin)
    for pair in atlas.pairs:
        low, high = sorted((sides[pair.one], sides[pair.other]))
        about, cosine = _about(pair), pair.facts.cosine
        yield Box(left + low * cell, top + high * cell, cell, cell, _tone(cosine), "white", thin, about)
        if cell >= 20 and not isnan(cosine):
            ink = "white" if cosine > 0.8 else INK if abs(cosine) > 0.05 else NO
            yield Words(left + (low + 0.5) * cell, top + (high + 0.5) * cell + 0.13 * cell, _number(cosine),
                        0.36 * cell, ink, "middle")
        yield Box(left + high * cell, top + low * cell, cell, cell, "#fbfbfb", "#ececec", thin, about)
        yield from _mark(pair.verdict.word, pair.verdict.cause, left + (high + 0.5) * cell, top + (low + 0.5) * cell,
                         0.36 * cell)


def _about(pair: Pair) -> str:
    return f"{pair.one} and {pair.other}\n{pair.verdict.word}: {pair.verdict.reason}"


def _number(cosine: float) -> str:
    """Two digits, cut and not rounded where that would say 1 of what is not quite."""
    if cosine > 0.9995:
        return "1"
    shown = f"{min(cosine, 0.994):.2f}".replace("0.", ".")
    return "0" if shown in (".00", "-.00") else shown


def _family(family: Family, root: str, sides: Mapping[str, int], left: float, top: float, cell: float,
            right: float) -> Iterator[Shape]:
    """A frame around a family in the heat map, and a bracket with its root beside the names."""
    places = sorted(sides[name] for name in family.members)
    low, high = places[0], places[-1] + 1
    if len(places) < 2 or high - low != len(places):  # under leader linkage a family may lie apart in the tree
        return
    yield Box(left + low * cell, top + low * cell, (high - low) * cell, (high - low) * cell, "none", INK, 1.3)
    ends = top + low * cell + 2, top + high * cell - 2
    yield Trace(((right, ends[0]), (right + 4, ends[0]), (right + 4, ends[1]), (right, ends[1])), QUIET, 1.0)
    yield Words(right + 9, (ends[0] + ends[1]) / 2 + 3, root, 8, INK, bold=True)


def _before(names: Sequence[str]) -> str:
    """What all names begin with, up to a slash."""
    shared = commonprefix(list(names))
    return shared[:shared.rfind("/") + 1]


def _short(name: str) -> str:
    return name if len(name) <= LONG else f"{name[:LONG // 2]}…{name[-(LONG // 2 - 1):]}"
