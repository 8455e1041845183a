"""A product made again, as a terminal shows it: while it is made, and what came out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from glue.show.terminal import console

if TYPE_CHECKING:
    from glue.reproduce import Reproduction

SHOWN = 10  # tensors and files that differ


def print_reproduction(done: Reproduction, as_json: bool) -> None:
    """Equal or not, and then what differs and why."""
    if as_json:
        print(json.dumps(done.as_data(), indent=1))
        return
    out = console()
    if done.equal:
        parts = f", {done.same} tensors and files each" if done.same else ""
        out.print(f"[green]equal[/]  {escape(done.name)} made again {done.how}: {done.again}{parts}")
        return
    if done.lost:
        out.print(f"[red]not made[/]  {escape(done.name)}: an input is not what it was")
        for lost in done.lost:
            now = f", now {lost.now[:8]}" if lost.now else ""
            out.print(f"  {escape(lost.role)}: {escape(lost.name)}: {escape(lost.why)} (was {lost.was[:8]}{now})")
        return
    out.print(f"[red]differs[/]  {escape(done.name)} made again {done.how}\n  recorded  {done.digest}\n"
              f"  folder    {done.now or 'cannot be read'}\n  again     {done.again}")
    out.print(f"  {done.same} tensors and files are equal to the folder's, {len(done.differ)} are not")
    for one in done.differ[:SHOWN]:
        out.print(f"    {escape(one.what)}: {one.was[:8] or 'not there'} and {one.again[:8] or 'not there'}")
    if len(done.differ) > SHOWN:
        out.print(f"    and {len(done.differ) - SHOWN} more; --json tells all")
    for why in done.reasons:
        out.print(f"  why: {escape(why)}")


@contextmanager
def working(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error: called with what is done, what there is to do, and a note."""
    stream = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("made again"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"),
               TimeElapsedColumn())
    with Progress(*columns, console=stream, transient=True, disable=quiet or not stream.is_terminal) as bars:
        task = bars.add_task("", total=None, note="")
        yield lambda done, total, note: bars.update(task, completed=done, total=total, note=escape(note))
