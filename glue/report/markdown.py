"""A leaderboard as Markdown, with an interval beside every number."""

from __future__ import annotations

from collections.abc import Iterator

from glue.board import Leaderboard, Row, costs
from glue.errors import one_line
from glue.evaluate.comparisons import Rank
from glue.evaluate.statistics import Interval


def markdown(board: Leaderboard) -> Iterator[str]:
    """The board as lines of Markdown."""
    tasks = list(board.rows[0].tasks)
    yield f"### {_cell(board.title)}"
    yield ""
    more = costs(board)
    yield f"| rank | member | type | {board.scale.about}, 95 % interval | {' | '.join([*map(_cell, tasks), *more])} |"
    yield f"|---|---|---|---|{'---|' * (len(tasks) + len(more))}"
    for place, row in enumerate(board.rows, start=1):
        yield "| " + " | ".join([ranked(row.rank, place), _named(row), row.kind, _mean(row.mean),
                                 *(_task(row.interval(task)) for task in tasks),
                                 *(tell(row) for tell in more.values())]) + " |"
    yield ""
    yield "A rank stands before the ranks that it may be, a share before its interval."
    for line in [*([str(board.sure)] if board.sure else []), *board.notes]:
        yield ""
        yield f"{_cell(line[:1].upper() + line[1:])}."
    if board.searches:
        yield ""
        yield "| search | answers asked for | candidates | where it searched | here |"
        yield "|---|---|---|---|---|"
    for search in board.searches:
        yield (f"| {_cell(search.name)} | {search.items} | {search.candidates} | {search.found * 100:.1f} | "
               f"{_mean(search.mean)} |")
    if board.claims:
        yield ""
        yield "Differences on the same items, in points, with paired 95 % intervals:"
        yield ""
    for claim in board.claims:
        yield f"- {'holds' if claim.holds else 'DOES NOT HOLD'}: {claim.text}"
    if board.headline:
        yield ""
        yield board.headline


def ranked(rank: Rank | None, place: int) -> str:
    """A rank and the ranks that it may be: 3 (2-5); the place in the table where nothing is known about ranks."""
    if rank is None:
        return str(place)
    return str(rank.value) if rank.best == rank.worst else f"{rank.value} ({rank.best}-{rank.worst})"


def _named(row: Row) -> str:
    others = f" = {' = '.join(map(_cell, row.others))}" if row.others else ""
    return f"{_cell(row.member)}{others}{' (searched on these items)' if row.seen else ''}"


def _mean(mean: Interval) -> str:
    return f"**{mean.value * 100:.1f}** [{mean.low * 100:.1f}, {mean.high * 100:.1f}]"


def _task(share: Interval) -> str:
    return f"{share.value * 100:.0f} [{share.low * 100:.0f}, {share.high * 100:.0f}]"


def _cell(text: str) -> str:
    """Text of others that does not end a cell."""
    return one_line(text).replace("|", "\\|")
