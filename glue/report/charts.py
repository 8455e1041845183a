"""Charts of the page: searches and trainings as they went, a lineage as a graph. SVG in the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor

from glue.report.gathered import Node, Walk
from glue.tune.curve import Curve

WIDE, HIGH = 340.0, 176.0                       # of a search
LEFT, RIGHT, TOP, BOTTOM = 34.0, 40.0, 12.0, 26.0
BOX, TALL, ACROSS, DOWN = 184.0, 36.0, 64.0, 12.0  # of a node, and the space between nodes
POINTS = 120  # of a curve
LONG, LONGER = 19, 22  # letters that are shown of a name, and of the step that made it


def search(walk: Walk, low: float, high: float) -> str:
    """Scores of the candidates against the answers asked for; the line is the best so far of those measured whole.

    low, high  ends of the axis of scores
    """
    total = max((each.asked for each in walk.tries), default=0) or 1

    def x(asked: float) -> float:
        return LEFT + asked / total * (WIDE - LEFT - RIGHT)

    def y(value: float) -> float:
        return HIGH - BOTTOM - (value - low) / (high - low) * (HIGH - TOP - BOTTOM)

    parts = []
    for tens in range(ceil(low * 10 - 1e-9), floor(high * 10 + 1e-9) + 1, 2 if high - low > 0.55 else 1):
        value = tens / 10
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{_n(y(value))}" y2="{_n(y(value))}"/>'
                     f'<text class="tick" x="{LEFT - 6}" y="{_n(y(value) + 3)}" text-anchor="end">'
                     f'{value * 100:.0f}</text>')
    for asked in (0, total):
        parts.append(f'<text class="tick" x="{_n(x(asked))}" y="{HIGH - 9}" text-anchor="middle">{asked:,}</text>')
    best: float | None = None
    line: list[tuple[float, float]] = []
    for each in walk.tries:
        if each.whole and (best is None or each.value > best):
            line += [(x(each.asked), y(best))] if best is not None else []
            line.append((x(each.asked), y(each.value)))
            best = each.value
    for each in walk.tries:
        tip = f"{each.candidate}\n{each.value * 100:.1f} after {each.asked:,} answers\n{each.purpose}"
        kind = "dot" if each.whole else "dot part"
        parts.append(f'<circle class="{kind}" cx="{_n(x(each.asked))}" cy="{_n(y(each.value))}" r="2.6" '
                     f'data-tip="{escape(tip)}"/>')
    if best is not None:
        line.append((x(total), y(best)))
        points = " ".join(f"{_n(a)},{_n(b)}" for a, b in line)
        parts.append(f'<polyline class="best" points="{points}"/>'
                     f'<text class="end" x="{WIDE - RIGHT + 6}" y="{_n(y(best) + 4)}">{best * 100:.1f}</text>')
    told = f"search {walk.name}: {walk.candidates} candidates, {total:,} answers, best {walk.value * 100:.1f}"
    return (f'<svg class="walk" viewBox="0 0 {_n(WIDE)} {_n(HIGH)}" role="img" aria-label="{escape(told)}">'
            f'{"".join(parts)}</svg>')


def training(name: str, curve: Curve) -> str:
    """The loss of a training against its steps; where there are many, each point is the mean of some."""
    size = ceil(len(curve.loss) / POINTS)
    parts = [curve.loss[k:k + size] for k in range(0, len(curve.loss), size)]
    points = [(min(k * size + (size + 1) / 2, len(curve.loss)), sum(some) / len(some)) for k, some in enumerate(parts)]
    low, high = min(y for _, y in points), max(y for _, y in points)
    steps, spread = max(len(curve.loss) - 1, 1), high - low or 1.0

    def x(step: float) -> float:
        return LEFT + (step - 1) / steps * (WIDE - LEFT - RIGHT)

    def y(loss: float) -> float:
        return HIGH - BOTTOM - (loss - low) / spread * (HIGH - TOP - BOTTOM)

    drawn = [f'<line class="grid" x1="{LEFT}" x2="{WIDE - RIGHT}" y1="{_n(y(value))}" y2="{_n(y(value))}"/>'
             f'<text class="tick" x="{LEFT - 6}" y="{_n(y(value) + 3)}" text-anchor="end">{value:.3g}</text>'
             for value in dict.fromkeys((low, high))]
    drawn += [f'<text class="tick" x="{_n(x(step))}" y="{HIGH - 9}" text-anchor="middle">{step:,}</text>'
              for step in dict.fromkeys((1, len(curve.loss)))]
    line = " ".join(f"{_n(x(step))},{_n(y(loss))}" for step, loss in points)
    drawn.append(f'<polyline class="best" points="{line}"/><text class="end" x="{WIDE - RIGHT + 6}" '
                 f'y="{_n(y(points[-1][1]) + 4)}">{points[-1][1]:.3g}</text>')
    return (f'<svg class="walk" viewBox="0 0 {_n(WIDE)} {_n(HIGH)}" role="img" '
            f'aria-label="{escape(f"training {name}: {curve.sentence()}")}">{"".join(drawn)}</svg>')


def lineage(nodes: Sequence[Node], scores: Sequence[float]) -> str:
    """Members from left to right as they were made; every node is a link to its origin.

    scores  of the rows of the board, best first
    """
    columns = _columns(nodes)
    most = max(len(column) for column in columns)
    wide, high = len(columns) * (BOX + ACROSS) - ACROSS + 4, most * (TALL + DOWN) - DOWN + 4
    at: dict[int, tuple[float, float]] = {}
    for c, column in enumerate(columns):
        first = (high - (len(column) * (TALL + DOWN) - DOWN)) / 2
        for r, k in enumerate(column):
            at[k] = 2 + c * (BOX + ACROSS), first + r * (TALL + DOWN)
    parts = []
    for k, node in enumerate(nodes):
        for up in node.parents:
            start, end = at[up][0] + BOX, at[k][0]
            y0, y1 = at[up][1] + TALL / 2, at[k][1] + TALL / 2
            bend = max(28.0, (end - start) * 0.45)
            parts.append(f'<path class="edge" data-from="{up}" data-to="{k}" d="M{_n(start)} {_n(y0)}C'
                         f'{_n(start + bend)} {_n(y0)} {_n(end - bend)} {_n(y1)} {_n(end)} {_n(y1)}"/>')
    for column in columns:  # from left to right, so that the keyboard goes through generations in order
        for k in column:
            parts.append(_node(k, nodes[k], at[k], scores))
    return (f'<svg class="graph" width="{_n(wide)}" height="{_n(high)}" viewBox="0 0 {_n(wide)} {_n(high)}" '
            f'role="group" aria-label="lineage of {len(nodes)} members">{"".join(parts)}</svg>')


def _node(k: int, node: Node, place: tuple[float, float], scores: Sequence[float]) -> str:
    x, y = place
    score = "" if node.rank is None else f"{scores[node.rank - 1] * 100:.1f}"
    step = made(node)
    told = step if len(step) <= LONGER else step[:LONGER - 1] + "…"
    role = escape(f"{' = '.join(node.names[:3])}, {node.member.kind}, {step}" + (f", {score}" if score else ""))
    lit = f' data-m="{escape(node.names[0])}"' if node.rank is not None else ""
    marks = f"node kind-{escape(node.member.kind)}" + (" ranked" if score else "")
    return (f'<a class="{marks}" href="#origin-{k}" data-node="{k}"{lit} aria-label="{role}" '
            f'data-tip="{escape(tip(node))}"><rect x="{_n(x)}" y="{_n(y)}" width="{_n(BOX)}" height="{_n(TALL)}" '
            f'rx="6"/><rect class="edge-mark" x="{_n(x)}" y="{_n(y)}" width="4" height="{_n(TALL)}" rx="2"/>'
            f'<text class="name" x="{_n(x + 12)}" y="{_n(y + 15)}">{escape(short(node.names[0]))}</text>'
            f'<text class="sub" x="{_n(x + 12)}" y="{_n(y + 28)}">{escape(told)}</text>'
            f'<text class="score" x="{_n(x + BOX - 9)}" y="{_n(y + 22)}" text-anchor="end">{score}</text></a>')


def made(node: Node) -> str:
    """How a member came about, in a word or two."""
    origin = node.member.origin
    if origin is None:
        return "given"
    step = origin.step.partition("/")[0]
    chosen = next((value["name"] for word in ("method", "strategy", "router") for value in [origin.params.get(word)]
                   if isinstance(value, dict) and isinstance(value.get("name"), str)), "")
    level = origin.params.get("level")
    words = [step, *([str(level)] if isinstance(level, str) else []), *([chosen] if chosen else [])]
    return " · ".join(words)


def tip(node: Node) -> str:
    """What is shown when the pointer rests on a node."""
    lines = [" = ".join(node.names[:4]), node.member.note]
    if node.above:
        names = list(dict.fromkeys(name for _, name, place in node.above if place is not None or not node.parents))
        lines.append("from " + ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else ""))
    return "\n".join(line for line in lines if line)


def short(name: str) -> str:
    """A name cut in its middle where it is too long for its box."""
    return name if len(name) <= LONG else f"{name[:LONG // 2]}…{name[-(LONG // 2):]}"


def _columns(nodes: Sequence[Node]) -> list[list[int]]:
    """Nodes by generation: one after the latest of its parents; near its parents inside a column."""
    depth: list[int] = []
    for node in nodes:  # ancestors come first
        depth.append(1 + max((depth[up] for up in node.parents), default=-1))
    columns: list[list[int]] = [[] for _ in range(max(depth) + 1)]
    for k, d in enumerate(depth):
        columns[d].append(k)
    below: dict[int, list[int]] = {k: [] for k in range(len(nodes))}
    for k, node in enumerate(nodes):
        for up in node.parents:
            below[up].append(k)
    for turn in range(6):  # the middle of the neighbours, first from the left, then from the right
        order = columns if turn % 2 == 0 else columns[::-1]
        where = {k: (r + 0.5) / len(column) for column in columns for r, k in enumerate(column)}
        for column in order:
            near = {k: [where[up] for up in (nodes[k].parents if turn % 2 == 0 else below[k])] for k in column}
            column.sort(key=lambda k: (sum(near[k]) / len(near[k]) if near[k] else where[k], where[k]))
            where.update({k: (r + 0.5) / len(column) for r, k in enumerate(column)})
    return columns


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
