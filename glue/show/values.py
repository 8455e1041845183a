"""Values in the terminal: what each player is worth."""

from __future__ import annotations

import json
from dataclasses import asdict

from glue.report.values import Values, summary, table
from glue.show.terminal import console, titled


def print_values(values: Values, as_json: bool = False) -> None:
    """One row a player, the most worthy first."""
    if as_json:
        print(json.dumps(asdict(values), indent=1))
        return
    out = console()
    titled(out, summary(values), *table(values))
    out.print("\n[dim]value: what a player adds to some of the others, in the mean over all orders in which they may "
              "come, with 95 % intervals over other items; all values sum to everybody - nobody[/]")
