"""Traffic reports in the terminal: what each way of asking a black box costs."""

from __future__ import annotations

import json

from rich.markup import escape

from glue.plan import Plan
from glue.report.traffic import CLOSING, Report, read, tables
from glue.show.terminal import console, titled


def print_traffic(report: Report, as_json: bool = False) -> None:
    """A table for each task."""
    if as_json:
        print(json.dumps(report.as_data(), indent=1))
        return
    out = console()
    for title, headings, rows in tables(report):
        titled(out, title, headings, rows)
    out.print(f"\n[dim]{escape(CLOSING)}[/]")


def print_tables(plan: Plan) -> None:
    """The traffic of every step of a plan that has counted some."""
    for task in plan:
        if task.step == "traffic" and task.member is not None:
            print_traffic(read(task.member))
