"""Traffic reports: what each way of asking a black box sends and is sent, beside what it scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glue.errors import ZooError
from glue.evaluate.statistics import Interval, proportion
from glue.member import Member, Table
from glue.steps.traffic import NOTE


@dataclass(frozen=True)
class Asked:
    """One way of asking on one task; numbers are of all its items.

    score     with its interval
    written   tokens          calls  round trips
    up, down  bytes of bodies; heads of all headers beside them
    sure      share of tokens that are proven to be those of the exact mixture
    paces     milliseconds of a round trip -> tokens a second, on a few items
    revealed  what the server can read
    """

    way: str
    task: str
    score: Interval
    written: int
    calls: int
    up: int
    down: int
    heads: int
    sure: float
    acceptance: float
    paces: dict[str, float]
    revealed: str

    def saves(self, plain: Asked) -> tuple[float, float]:
        """Shares of calls and of bytes, a token, that another way takes and this one does not."""
        return tuple(1 - mine / theirs for mine, theirs in zip(self._each(), plain._each(), strict=True))  # type: ignore[return-value]

    def _each(self) -> tuple[float, float]:
        return self.calls / self.written, (self.up + self.down) / self.written


@dataclass(frozen=True)
class Report:
    """What a traffic step has left: ways in their order, task after task; what others save is of the first."""

    member: str
    asked: tuple[Asked, ...]

    def plain(self, task: str) -> Asked:
        """What the other ways on a task are compared with."""
        return next(one for one in self.asked if one.task == task)

    def as_data(self) -> list[dict[str, Any]]:
        """For machines."""
        return [{**vars(one), "score": one.score.value, "low": one.score.low, "high": one.score.high,
                 "calls_saved": one.saves(self.plain(one.task))[0], "bytes_saved": one.saves(self.plain(one.task))[1]}
                for one in self.asked]


def read(member: Member) -> Report:
    """The report of a table. Raises ZooError for one that is of something else."""
    note = member.folder / NOTE
    if not note.is_file():
        raise ZooError(f"'{member.name}' is not what a traffic step has left", fix="name the table of  step: traffic")
    told = json.loads(note.read_text())
    scores = {(row.member.split(": ", 1)[1], row.task): row for row in Table.read(member).rows}
    paces: dict[str, dict[str, float]] = {}
    for one in told["times"]:
        paces.setdefault(one["way"], {})[f"{one['round_trip']:g}"] = one["tokens_per_second"]
    return Report(told["member"], tuple(Asked(
        one["way"], one["task"], proportion(np.asarray(scores[one["way"], one["task"]].results)), one["written"],
        one["calls"], one["up"], one["down"], one["head_up"] + one["head_down"], 1 - one["bound"] / one["written"],
        one["accepted"] / one["judged"] if one["judged"] else 1.0, paces.get(one["way"], {}),
        one["revealed"]) for one in told["ways"]))


def tables(report: Report) -> list[tuple[str, list[str], list[list[str]]]]:
    """For each task a title, headings and rows of text."""
    found = []
    for task in dict.fromkeys(one.task for one in report.asked):
        rows = [one for one in report.asked if one.task == task]
        trips = list(rows[0].paces) if task == report.asked[0].task else []
        headings = ["way of asking", "score", "95 %", "stay", "calls/token", "saved", "bytes up", "down", "saved",
                    "sure", *(f"tok/s at {trip} ms" for trip in trips)]
        found.append((f"{report.member} on {task}: a token costs", headings,
                      [_cells(one, rows[0], trips) for one in rows]))
    return found


def _cells(one: Asked, plain: Asked, trips: Sequence[str]) -> list[str]:
    calls, size = one.saves(plain)
    tokens = one.written
    return [one.way, f"{one.score.value * 100:.1f}", f"{one.score.low * 100:.1f}-{one.score.high * 100:.1f}",
            f"{one.acceptance:.0%}" if one.calls < tokens else "", f"{one.calls / tokens:.2f}",
            f"{calls:.0%}" if one is not plain else "", f"{one.up / tokens:,.0f}", f"{one.down / tokens:,.0f}",
            f"{size:.1%}" if one is not plain else "", f"{one.sure:.1%}",
            *(f"{one.paces[trip]:.1f}" for trip in trips)]


CLOSING = ("bytes are those of HTTP bodies, the prompt's among them, and saved is of the first way; sure: tokens that "
           "are proven to be those of the exact mixture, whatever was left out or rounded")


def markdown(report: Report) -> Iterator[str]:
    """The tables as lines of Markdown."""
    for title, headings, rows in tables(report):
        yield f"### {title}"
        yield ""
        yield f"| {' | '.join(headings)} |"
        yield f"|{'---|' * len(headings)}"
        for row in rows:
            yield f"| {' | '.join(row)} |"
        yield ""
    yield f"{CLOSING[:1].upper()}{CLOSING[1:]}."
