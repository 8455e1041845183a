"""Routing reports in the terminal: whom mixtures ask for what, and what a better choice would score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from glue.report.routing import Report, shares, summary
from glue.show.terminal import console


def print_routes(reports: Sequence[Report], as_json: bool = False) -> None:
    """The summary, then the shares of each mixture."""
    if as_json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
        return
    out = console()
    titled(out, f"routes on {reports[0].suite}", *summary(reports))
    for report in reports:
        titled(out, f"{report.mixture}: share of items by expert; * scores best on the task", *shares(report))
    out.print("\n[dim]to the ...: what that choice would score more, in points, with paired 95 % intervals; it is made "
              "in hindsight, so it flatters itself[/]")


def titled(out: Console, title: str, headings: list[str], rows: list[list[str]]) -> None:
    """A title, and a table below it."""
    out.print(f"\n[italic]{escape(title)}[/]")
    # a title of the table would be broken to its width
    grid = Grid(box=None, pad_edge=False)
    for k, heading in enumerate(headings):
        grid.add_column(escape(heading), justify="right" if k else "left", no_wrap=not k)
    for row in rows:
        grid.add_row(*map(escape, row))
    out.print(grid)
