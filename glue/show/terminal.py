"""A terminal: where tables go and how they look, bars while something takes long, and sizes as people say them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
    track,
)
from rich.table import Table as Grid

from glue.member import Member
from glue.plan import Plan, Task
from glue.run import Watcher


def console() -> Console:
    """Standard output, wide enough for a table where it is no terminal."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=160)


class _Live(Watcher):
    """A line for the whole run and one for each task that is under way."""

    def __init__(self, bars: Progress):
        self.bars = bars
        self.whole = bars.add_task("recipe", total=None, note="")
        self.rows: dict[str, Any] = {}

    def planned(self, plan: Plan) -> None:
        done = sum(task.state in ("done", "alias") for task in plan)
        self.bars.update(self.whole, completed=done, total=len(plan.tasks), note=f"{done} of {len(plan.tasks)} steps")

    def started(self, task: Task) -> None:
        self.rows[task.name] = self.bars.add_task(f"  {task.step} {task.name}", total=None, note="")

    def progress(self, task: Task, done: int, total: int, note: str) -> None:
        if task.name in self.rows:
            self.bars.update(self.rows[task.name], completed=done, total=total, note=escape(note))

    def finished(self, task: Task, member: Member, seconds: float) -> None:
        if task.name in self.rows:
            self.bars.remove_task(self.rows.pop(task.name))
        self.bars.console.print(f"[green]✓[/] {task.name} [dim]{escape(member.note)}  {seconds:.1f} s[/]")


@contextmanager
def progress(quiet: bool) -> Iterator[Watcher]:
    """A watcher that draws progress on standard error, or one that is silent."""
    if quiet:
        yield Watcher()
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24),
               TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    stream = Console(stderr=True, highlight=False)
    with Progress(*columns, console=stream, transient=True, disable=not stream.is_terminal) as bars:
        yield _Live(bars)


@contextmanager
def bar(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for bytes on standard error: called with what is made, bytes written, and bytes in all."""
    stream = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(),
               TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stream, transient=True, disable=quiet or not stream.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(escape(name), total=total)
            bars.update(tasks[name], completed=done, total=total)

        yield report


def passes(quiet: bool) -> Callable[[list[str]], Iterable[str]]:
    """Wraps the names of the tensors of each pass over a zoo in a bar on standard error."""
    stream = Console(stderr=True, highlight=False)
    return lambda names: track(names, "reading", console=stream, transient=True,
                               disable=quiet or not stream.is_terminal)


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
