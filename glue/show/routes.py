"""Routing reports in the terminal: whom mixtures ask for what, and what a better choice would score."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from glue.report.routing import Report, shares, summary
from glue.show.terminal import console, titled


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
