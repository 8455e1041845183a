"""Values in the terminal: what each player is worth."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table as Grid

from glue.report.values import Values, summary, table
from glue.show.terminal import console


def print_values(values: Values, as_json: bool = False) -> None:
    """One row a player, the most worthy first."""
    if as_json:
        print(json.dumps(asdict(values), indent=1))
        return
    out = console()
    out.print(f"\n[italic]{escape(summary(values))}[/]")
    headings, rows = table(values)
    grid = Grid(box=None, pad_edge=False)
    for k, heading in enumerate(headings):
        grid.add_column(escape(heading), justify="right" if k else "left", no_wrap=not k)
    for row in rows:
        grid.add_row(*map(escape, row))
    out.print(grid)
    out.print("\n[dim]value: what a player adds to some of the others, in the mean over all orders in which they may "
              "come, with 95 % intervals over other items; all values sum to everybody - nobody[/]")
