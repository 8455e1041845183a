"""The routing report, as rows and as a picture: whom mixtures ask for what, and what a better choice would score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import log2
from os.path import commonprefix
from typing import Any

from glue.errors import ZooError
from glue.evaluate.statistics import Interval
from glue.member import Member
from glue.report.drawing import Box, Disc, Drawing, Shape, Trace, Words, blend, room
from glue.steps.routing import NOTE

COLOURS = ((0.0, "#f7f9fb"), (0.25, "#cfe0ee"), (0.6, "#74a9cf"), (1.0, "#08386b"))
INK, QUIET, GOOD, CARE, LINE = "#222222", "#7a7a7a", "#1a8754", "#d98200", "#d5dbe1"
MARGIN, CELL, HIGH, SCALE = 18.0, 52.0, 20.0, 230.0  # of the page; of a cell; length of the axis of scores
KEY = ("left: share of a task's items that each expert answers, in per cent; framed: who scores best on the task",
       "right: scores with 95 % intervals; choices made in hindsight flatter themselves")
LONG = 30  # letters of a name that are shown


@dataclass(frozen=True)
class Report:
    """One mixture on one suite; numbers as in glue.mix.regret.Choices, for e experts and t tasks.

    places     how many decisions an answer takes: 1 at model and text level, else the routed layers
    shares     [t][e]                       best      [t] the expert of the highest score on each task
    promised   what its experts score alone, as often as they are asked
    hindsight  word -> (score of that choice, how much more than the mixture's)
    hits, luck None where the experts never differ
    """

    mixture: str
    suite: str
    experts: tuple[str, ...]
    tasks: tuple[str, ...]
    items: tuple[int, ...]
    places: int
    shares: tuple[tuple[float, ...], ...]
    load: tuple[float, ...]
    entropy: float
    within: tuple[float, ...]
    doubt: float
    variation: float
    agrees: float
    follows: float
    hits: float | None
    luck: float | None
    score: Interval
    promised: float
    best: tuple[int, ...]
    hindsight: dict[str, tuple[Interval, Interval]]


def read(table: Member) -> list[Report]:
    """The reports that a routing step has left. Raises ZooError for any other member."""
    file = table.folder / NOTE
    if not file.is_file():
        raise ZooError(f"'{table.name}' tells nothing of routes", fix="name what a step  routing  has left")
    return [_report(json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def _report(told: dict[str, Any]) -> Report:
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in told.items()
        if key != "digest"}
    there = {word: (Interval(*found["score"]), Interval(*found["regret"])) for word, found in told["hindsight"].items()}
    return Report(**{**plain, "shares": tuple(map(tuple, told["shares"])), "score": Interval(*told["score"]),
                     "hindsight": there})


# --- rows -------------------------------------------------------------------------------------------------------------

def shares(report: Report) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): whom one mixture asks, task by task and over all; the best expert of a task has a star."""
    names = shown(report.experts)
    rows = []
    for k, task in enumerate(report.tasks):
        cells = [_percent(share) + ("*" if i == report.best[k] else "") for i, share in enumerate(report.shares[k])]
        rows.append([task, str(report.items[k]), *cells, f"{report.within[k]:.2f}"])
    rows.append(["all", str(sum(report.items)), *map(_percent, report.load), f"{report.entropy:.2f}"])
    return ["task", "items", *names, "entropy, bits"], rows


def summary(reports: Sequence[Report]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): one row a mixture, with what it could score more; in points, with paired 95 % intervals."""
    headings = ["mixture", "score", "experts alone", *(f"to the {word}" for word in reports[0].hindsight),
                "entropy, bits", "load variation", "asks the task's best (adjusted)",
                "asks an item's best (blindly)"]
    rows = []
    for name, report in zip(shown([report.mixture for report in reports]), reports, strict=True):
        hits = "-" if report.hits is None or report.luck is None else \
            f"{_percent(report.hits)} ({_percent(report.luck)})"
        rows.append([name, f"{100 * report.score.value:.1f} [{100 * report.score.low:.1f}, "
                           f"{100 * report.score.high:.1f}]", f"{100 * report.promised:.1f}",
                     *(_points(regret) for _, regret in report.hindsight.values()),
                     f"{report.entropy:.2f} of {log2(len(report.experts)):.2f}", f"{report.variation:.2f}",
                     _followed(report), hits])
    return headings, rows


def markdown(reports: Sequence[Report]) -> Iterator[str]:
    """The whole report as lines of Markdown."""
    yield f"### Routes on {reports[0].suite}"
    yield ""
    yield from _table(*summary(reports))
    for report in reports:
        yield ""
        yield f"{report.mixture}: share of items by expert" + (
            "" if report.places == 1 else f", mean over {report.places} layers") + "; * scores best on the task"
        yield ""
        yield from _table(*shares(report))
    yield ""
    yield ("Adjusted: mutual information of the experts that are asked and those that are best for the tasks, 1 where "
           "each tells the other, about 0 by chance. Blindly: what the same loads would hit, dealt out to any items. "
           "Regrets are what the choice would score more, in points, with paired 95 % intervals. All three choices are "
           "made in hindsight, with the answers to these very items at hand, so they flatter the choice.")


def shown(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin with, up to a slash."""
    shared = commonprefix(list(names)) if len(names) > 1 else names[0]
    return [name[shared.rfind("/") + 1:] for name in names]


def _table(headings: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(headings) + " |"
    yield "|" + "---|" * len(headings)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _followed(report: Report) -> str:
    return f"{_percent(report.agrees)} ({report.follows:.2f})".replace("-0.00", "0.00")


def _points(gap: Interval) -> str:
    return f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


# --- picture ----------------------------------------------------------------------------------------------------------

def picture(reports: Sequence[Report]) -> Drawing:
    """For each mixture a map of tasks and experts with the loads below it; beside it, scores with their intervals."""
    ends = [end for report in reports for score in (report.score, *(score for score, _ in report.hindsight.values()))
            for end in (score.low, score.high)]
    low, high = max(0.0, min(ends) - 0.02), min(1.0, max(ends) + 0.02)
    label = room([task for report in reports for task in report.tasks] + ["all items"], 8.5) + 8
    named = room([_short(name) for report in reports for name in shown(report.experts)], 8) * 0.7
    words = room([word for report in reports for word in report.hindsight], 8.5)
    left = MARGIN + label
    across = max(len(report.experts) for report in reports) * CELL
    right = left + across + max(40.0, named) + words
    all_shapes: list[Shape] = [Words(MARGIN, MARGIN + 10, f"Routes on {reports[0].suite}", 14, INK, bold=True),
                               *(Words(MARGIN, MARGIN + 25 + 11 * k, line, 8, QUIET) for k, line in enumerate(KEY))]
    top = MARGIN + 58.0
    for report, name in zip(reports, shown([report.mixture for report in reports]), strict=True):
        all_shapes.append(Words(MARGIN, top + 8, _short(name), 10, INK, bold=True))
        all_shapes.append(Words(max(left, MARGIN + room([_short(name)], 10) + 10), top + 8, _told(report), 8, QUIET))
        body = top + 20 + named
        all_shapes += _map(report, left, body)
        all_shapes += _scores(report, right, body, low, high)
        top = body + max(len(report.tasks) + 1.5, len(report.hindsight) + 2) * HIGH + 22
    wide = max(right + SCALE + 30, *(shape.x + room([shape.text], shape.size) for shape in all_shapes
                                     if isinstance(shape, Words) and shape.anchor == "start"))
    return Drawing(wide + MARGIN, top + MARGIN / 2, all_shapes)


def _told(report: Report) -> str:
    told = (f"entropy {report.entropy:.2f} of {log2(len(report.experts)):.2f} bits, load variation "
            f"{report.variation:.2f}, asks the task's best {_followed(report)}")
    if report.hits is not None and report.luck is not None:
        told += f", an item's best {_percent(report.hits)} (blindly {_percent(report.luck)})"
    return told + (f"; mean over {report.places} layers" if report.places > 1 else "")


def _map(report: Report, left: float, top: float) -> Iterator[Shape]:
    """Shares as a heat map; a frame marks the expert that scores best on a task; bars are loads."""
    for i, name in enumerate(shown(report.experts)):
        yield Words(left + (i + 0.35) * CELL, top - 5, _short(name), 8, INK, turned=45)
    for k, task in enumerate(report.tasks):
        y = top + k * HIGH
        yield Words(left - 6, y + 0.68 * HIGH, task, 8.5, INK, "end")
        for i, share in enumerate(report.shares[k]):
            about = f"{_percent(share)} of the items of {task} go to {report.experts[i]}"
            yield Box(left + i * CELL, y, CELL, HIGH, blend(COLOURS, share), "white", 0.6, about)
            yield Words(left + (i + 0.5) * CELL, y + 0.67 * HIGH, f"{100 * share:.0f}", 8,
                        "white" if share > 0.55 else INK, "middle")
    for k, i in enumerate(report.best):
        yield Box(left + i * CELL + 1.2, top + k * HIGH + 1.2, CELL - 2.4, HIGH - 2.4, "none", CARE, 1.4)
    y = top + len(report.tasks) * HIGH + 6
    yield Words(left - 6, y + 0.68 * HIGH, "all items", 8.5, INK, "end")
    for i, share in enumerate(report.load):
        yield Box(left + i * CELL + 3, y + 3, CELL - 6, HIGH - 6, "none", LINE, 0.8)
        yield Box(left + i * CELL + 3, y + 3, (CELL - 6) * share, HIGH - 6, "#74a9cf")
        yield Words(left + (i + 0.5) * CELL, y + 0.67 * HIGH, f"{100 * share:.0f}", 8, INK, "middle")


def _scores(report: Report, left: float, top: float, low: float, high: float) -> Iterator[Shape]:
    """Scores with their 95 % intervals, the mixture's first; regrets in words behind them."""
    def x(value: float) -> float:
        return left + (value - low) / (high - low) * SCALE * 0.62

    lines = [("this mixture", report.score, "")]
    lines += [(word, score, _points(regret)) for word, (score, regret) in report.hindsight.items()]
    bottom = top + len(lines) * HIGH
    for step in range(5):
        value = low + (high - low) * step / 4
        yield Trace(((x(value), top), (x(value), bottom)), "#eeeeee", 0.6)
        yield Words(x(value), bottom + 10, f"{100 * value:.0f}", 6.5, QUIET, "middle")
    yield Trace(((x(report.score.value), top), (x(report.score.value), bottom)), GOOD, 0.8, dashed=True)
    yield Words(left + SCALE * 0.66, top - 5, "more than the mixture", 7, QUIET)
    for k, (word, score, more) in enumerate(lines):
        y, tone = top + (k + 0.5) * HIGH, GOOD if k == 0 else INK
        yield Words(left - 8, y + 3, word, 8.5, tone, "end", bold=k == 0)
        yield Trace(((x(score.low), y), (x(score.high), y)), tone, 1.2)
        yield Disc(x(score.value), y, 3.0, tone)
        yield Words(left + SCALE * 0.66, y + 3, more, 8, INK)


def _short(name: str) -> str:
    return name if len(name) <= LONG else f"{name[:LONG // 2]}…{name[-(LONG // 2 - 1):]}"
