"""Leaderboards: in the terminal, as plain data, and as the files of a full run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table as Grid

from glue.board import Leaderboard, costs, leaderboard
from glue.files import write_aside
from glue.plan import Plan
from glue.report.markdown import markdown, ranked
from glue.report.traffic import markdown as traffic
from glue.report.traffic import read
from glue.show.terminal import console


def print_board(board: Leaderboard, as_json: bool = False) -> None:
    """A leaderboard, its claims and its closing line."""
    if as_json:
        print(json.dumps(board_data(board), indent=1))
        return
    out = console()
    out.print()
    out.print(_grid(board))
    for line in _foot(board):
        out.print(f"[dim]{escape(line)}[/]")
    if board.searches:
        out.print()
        out.print(_costs(board))
    if board.claims:
        out.print("\n[dim]differences on the same items, in points, with paired 95 % intervals[/]")
    for claim in board.claims:
        out.print(f"{'[green]✓[/]' if claim.holds else '[red]✗[/]'} {escape(claim.text)}")
    if board.headline:
        out.print(f"\n[bold]{escape(board.headline)}[/]")


def _grid(board: Leaderboard) -> Grid:
    tasks = list(board.rows[0].tasks)
    grid = Grid(title=board.title, title_justify="left", box=None, pad_edge=False)
    grid.add_column("rank", style="dim", no_wrap=True)
    grid.add_column("member", overflow="fold", max_width=44)
    grid.add_column("type", style="dim")
    grid.add_column("mean", justify="right", style="bold")
    grid.add_column("95 %", style="dim", no_wrap=True)
    grid.add_column("")
    best = {task: max(row.tasks[task] for row in board.rows) for task in tasks}
    more = costs(board)
    for heading in (*tasks, *more):
        grid.add_column(heading, justify="right")
    for place, row in enumerate(board.rows, start=1):
        cells = [f"[{'bold green' if row.tasks[task] == best[task] else 'default'}]{row.tasks[task] * 100:.0f}[/]"
                 for task in tasks]
        bar = "█" * round(row.mean.value * 20)
        others = "".join(f" = {name}" for name in row.others[:2])
        others += f" and {len(row.others) - 2} more" if len(row.others) > 2 else ""
        name = f"{escape(row.member)}{'*' if row.seen else ''}[dim]{escape(others)}[/]"
        mean = row.mean
        grid.add_row(ranked(row.rank, place), name, row.kind, f"{mean.value * 100:.1f}",
                     f"{mean.low * 100:.1f}-{mean.high * 100:.1f}", f"[cyan]{bar}[/]", *cells,
                     *(f"[dim]{tell(row)}[/]" for tell in more.values()), style="dim" if row.seen else None)
    return grid


def _foot(board: Leaderboard) -> Iterator[str]:
    """What has to be known to read the grid."""
    if any(row.seen for row in board.rows):
        yield "* a search of its lineage has seen these items"
    ends = [row.interval(task) for row in board.rows for task in row.tasks]
    most = max(max(end.high - end.value, end.value - end.low) for end in ends)
    yield f"rank (95 % interval); a single task is known within {most * 100:.1f} points or better"
    if board.scale.suite:
        yield f"mean: {board.scale.about}"
    if board.sure:
        yield str(board.sure)
    yield from board.notes


def _costs(board: Leaderboard) -> Grid:
    """What searches came to for what they cost."""
    grid = Grid(box=None, pad_edge=False)
    for heading in ("search", "answers asked for", "candidates", "where it searched", "here", "95 %"):
        grid.add_column(heading, justify="left" if heading == "search" else "right")
    for search in board.searches:
        grid.add_row(escape(search.name), f"{search.items:,}", str(search.candidates), f"{search.found * 100:.1f}",
                     f"[bold]{search.mean.value * 100:.1f}[/]",
                     f"[dim]{search.mean.low * 100:.1f}-{search.mean.high * 100:.1f}[/]")
    return grid


def write_boards(plans: Sequence[Plan]) -> Path:
    """The boards of a full run as one Markdown file in benchmarks/boards, and beside it what was made, as a log."""
    recipe = plans[0].recipe
    file = Path("benchmarks/boards") / f"{recipe.name}.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    first = next((task.member.origin for task in plans[0] if task.member and task.member.origin), None)
    made_with: Mapping[str, str] = first.made_with if first else {}
    versions = ", ".join(f"{name} {version}" for name, version in sorted(made_with.items()))
    lines = [f"# {recipe.name}", "", f"Made by `glue run {recipe.file} --full`; do not edit.", "", versions, ""]
    log = []
    for plan in plans:
        lines += [f"## Seed {plan.recipe.seed}", "", *markdown(leaderboard(plan)), ""]
        for task in plan:
            if task.step == "traffic" and task.member is not None:
                lines += [*traffic(read(task.member)), ""]
        log += [f"seed {plan.recipe.seed}  {task.member.version}  {task.member.note}" for task in plan if task.member]
    write_aside(file, "\n".join(lines))
    write_aside(file.with_suffix(".log"), "\n".join(log) + "\n")
    return file


def board_data(board: Leaderboard) -> dict[str, Any]:
    """A leaderboard as plain data."""
    return {"title": board.title, "items": board.items, "headline": board.headline,
            "notes": list(board.notes),
            "leaders": list(board.sure.leaders) if board.sure else None,
            "detectable": board.sure.least if board.sure else None,
            "claims": [{"text": claim.text, "holds": claim.holds,
                        **({"gap": claim.gap.value, "low": claim.gap.low, "high": claim.gap.high} if claim.gap else {})}
                       for claim in board.claims],
            "searches": [{"search": search.name, "items": search.items, "candidates": search.candidates,
                          "found": search.found, "mean": search.mean.value} for search in board.searches],
            "rows": [{"member": row.member, "others": list(row.others), "kind": row.kind, "mean": row.mean.value,
                      "low": row.mean.low, "high": row.mean.high, "seen": row.seen, "tasks": row.tasks,
                      "intervals": {task: row.interval(task)[1:] for task in row.tasks},
                      "rank": row.rank and {"value": row.rank.value, "best": row.rank.best, "worst": row.rank.worst},
                      "loss": list(row.loss) if row.loss else None,
                      "parameters": row.size and row.size.whole, "active": row.size and row.size.active,
                      "tokens_per_second": row.pace}
                     for row in board.rows]}
