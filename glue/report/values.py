"""What players are worth, as rows: values with their intervals, and what each does alone and beside all the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from glue.errors import ZooError
from glue.member import Member
from glue.steps.value import NOTE

HEADINGS = {"score": "value, points", "loss": "value, bits a byte"}


@dataclass(frozen=True)
class Player:
    """One player.

    low, high  ends of the 95 % interval, over other items and other orders; None where one order was walked
    alone      what it makes of nobody      last  what it adds to all the others, where that was asked
    items      the standard error for which items account      orders  for which orders do
    """

    player: str
    digest: str
    value: float
    low: float | None
    high: float | None
    items: float
    orders: float | None
    alone: float | None
    last: float | None


@dataclass(frozen=True)
class Values:
    """What a value step has left; players are sorted, the most worthy first.

    by     score, in shares of 1; loss, in bits a byte of right answers
    merge  how subsets were merged      subsets  how many were, and whether these are all
    """

    suite: str
    by: str
    merge: str
    exact: bool
    subsets: int
    items: tuple[int, ...]
    nobody: float
    everybody: float
    players: tuple[Player, ...]


def read(table: Member) -> Values:
    """The values that a step has left. Raises ZooError for any other member."""
    file = table.folder / NOTE
    if table.kind != "table" or not file.is_file():
        raise ZooError(f"'{table.name}' tells nothing of values", fix="name what a step  value  has left")
    about, *rows = (json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1])
    told: dict[str, Any] = {**about, "items": tuple(about["items"]), "merge": about["merge"]["name"]}
    return Values(**told, players=tuple(Player(**row) for row in rows))


def table(values: Values) -> tuple[list[str], list[list[str]]]:
    """(headings, rows): one row a player; scores in points, losses in bits a byte."""
    names = [one.player for one in values.players]
    shared = commonprefix(names).rfind("/") + 1 if len(names) > 1 else 0
    rows = [[one.player[shared:], _ranged(one, values.by), _number(one.alone, values.by), _number(one.last, values.by)]
            for one in values.players]
    return ["player", HEADINGS[values.by], "alone", "beside all others"], rows


def summary(values: Values) -> str:
    """One sentence about the whole."""
    how = f"all {values.subsets} subsets" if values.exact else f"{values.subsets} subsets along random orders"
    nobody, everybody = (_plain(value, values.by) for value in (values.nobody, values.everybody))
    return (f"{len(values.players)} players on {values.suite}, {sum(values.items)} items; {values.merge} of {how}; "
            f"nobody {nobody}, everybody {everybody}")


def markdown(values: Values) -> Iterator[str]:
    """The values as lines of Markdown."""
    headings, rows = table(values)
    yield summary(values)
    yield ""
    for row in (headings, ["---"] * len(headings), *rows):
        yield "| " + " | ".join(row) + " |"


def _ranged(one: Player, by: str) -> str:
    ends = "" if one.low is None or one.high is None else f" [{_number(one.low, by)}, {_number(one.high, by)}]"
    return f"{_number(one.value, by)}{ends}"


def _number(value: float | None, by: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:+.1f}" if by == "score" else f"{value:+.3f}"


def _plain(value: float, by: str) -> str:
    return f"{100 * value:.1f} points" if by == "score" else f"{value:.3f}"
