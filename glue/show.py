"""What people see in a terminal: progress, plans, boards, members, methods. Nothing else uses rich."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
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
)
from rich.table import Table as Grid

from glue.board import Leaderboard, leaderboard, markdown
from glue.family import HOMES, describe, families
from glue.files import write_aside
from glue.hub import locate
from glue.member import Member
from glue.merges import order_row
from glue.orders import Order
from glue.plan import Plan, Task
from glue.run import Watcher

FAMILIES = tuple(HOMES)
STATES = {"done": "green", "alias": "green", "ready": "yellow", "waiting": "dim", "deferred": "dim"}


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


def print_plan(plan: Plan, as_json: bool) -> None:
    """The tasks of a plan: state, inputs with their size, place of the product."""
    rows = plan_rows(plan)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    grid = Grid(title=f"{plan.recipe.name}: {plan.recipe.about}", title_justify="left", box=None, pad_edge=False)
    for heading in ("state", "step", "makes", "reads", "writes"):
        grid.add_column(heading, overflow="fold")
    for row in rows:
        colour = STATES[row["state"]]
        reads = f"{len(row['inputs'])} members, {human(row['bytes_read'])}" if row["bytes_read"] else ""
        why = f" ({row['why']})" if row["why"] else ""
        writes = f"{row['folder']}, {human(row['bytes_written'])}" if row["bytes_written"] else row["folder"]
        grid.add_row(f"[{colour}]{row['state']}[/]", row["step"], escape(row["name"] + why), reads, writes)
    console().print(grid)
    done = sum(task.state in ("done", "alias") for task in plan)
    rest = "" if plan.done else f"; glue run {plan.recipe.file} makes the rest"
    print(f"{done} of {len(rows)} tasks are done{rest}")


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


def print_orders(orders: Sequence[Order], as_json: bool) -> None:
    """What a merge config will do: each output with its method, models, sizes, memory and time; and the notes."""
    rows = [order_row(order) for order in orders]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    grid = Grid(box=None, pad_edge=False)
    for heading in ("makes", "by", "tensors", "reads", "writes", "memory", "time"):
        grid.add_column(heading, overflow="fold")
    for row in rows:
        reads = f"{len(row['models'])} models, {human(row['bytes_read'])}"
        time = "" if row["seconds"] is None else f"~{max(1, round(row['seconds']))} s"
        tensors, memory = str(row["tensors"] or ""), human(row["bytes_memory"]) if row["bytes_memory"] else ""
        grid.add_row(escape(row["out"]), escape(row["method"]), tensors, reads, human(row["bytes_written"]), memory,
                     time)
    console().print(grid)
    for row in rows:
        for note in row["notes"]:
            print(f"note: {note}")
        if row["through"]:
            print(f"{row['out']} goes through mergekit: {row['through']}")


def print_merged(done: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """What `glue merge` has done."""
    if as_json:
        print(json.dumps({**done[-1], "stages": list(done[:-1])}, indent=1))
        return
    for each in done:
        for note in each["notes"]:
            print(f"note: {note}")
        if each["made"]:
            print(f"{each['out']}: {each['method']}, {human(each['bytes_written'])} in "
                  f"{each['seconds']['merge']:.1f} s, weights {each['digest'][:16]}")
        else:
            print(f"{each['out']} is there already, made of the same")
        if each["kept"]:
            print(f"what was there is now {each['kept']}")


def plan_rows(plan: Plan) -> list[dict[str, Any]]:
    """Every task of a plan as plain data: its state and why, its inputs, bytes to read and to write, its folder."""
    return [_told(task, plan) for task in plan]


def _told(task: Task, plan: Plan) -> dict[str, Any]:
    why = ""
    if task.state == "deferred":
        why = f"x {task.waits_for[0].rsplit('/', 1)[-1]}, decided after that step"
    elif task.state == "waiting":
        names = [name.removeprefix(f"{plan.recipe.name}/") for name in task.waits_for]
        why = "after " + ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    folder = task.member.path if task.member else str(task.folder(plan.zoo)) if task.origin else ""
    root = str(plan.zoo.file.parent) + "/"
    sizes = {member: _size(member.path) for member in task.inputs} if task.state == "ready" else {}
    models = [size for member, size in sizes.items() if member.kind != "dataset"] or [0]
    writes = families("steps")[task.step].traits.get("writes") if task.choice else None
    return {"name": task.name, "step": task.step, "state": task.state, "why": why,
            "inputs": [member.version for member in task.inputs],
            "bytes_read": sum(sizes.values()),
            "bytes_written": {"one": max(models), "all": sum(models)}.get(writes or "", 0),
            "folder": folder.removeprefix(root)}


def _size(path: str) -> int:
    folder = locate(path)
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file()) if folder.is_dir() else 0


def human(size: int) -> str:
    """Bytes as a person says them."""
    number = float(size)
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def print_board(board: Leaderboard, as_json: bool = False) -> None:
    """A leaderboard, its claims and its closing line."""
    if as_json:
        print(json.dumps(board_data(board), indent=1))
        return
    out = console()
    out.print()
    out.print(_grid(board))
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
    grid.add_column("#", justify="right", style="dim")
    grid.add_column("member", overflow="fold", max_width=44)
    grid.add_column("type", style="dim")
    grid.add_column("mean", justify="right", style="bold")
    grid.add_column("95 %", style="dim", no_wrap=True)
    grid.add_column("")
    best = {task: max(row.tasks[task] for row in board.rows) for task in tasks}
    for task in tasks:
        grid.add_column(task, justify="right")
    for rank, row in enumerate(board.rows, start=1):
        cells = [f"[{'bold green' if row.tasks[task] == best[task] else 'default'}]{row.tasks[task] * 100:.0f}[/]"
                 for task in tasks]
        bar = "█" * round(row.mean.value * 20)
        others = "".join(f" = {name}" for name in row.others[:2])
        others += f" and {len(row.others) - 2} more" if len(row.others) > 2 else ""
        name = f"[{'dim' if row.seen else 'default'}]{escape(row.member)}{'*' if row.seen else ''}[/]"
        grid.add_row(str(rank), f"{name}[dim]{escape(others)}[/]", row.kind, f"{row.mean.value * 100:.1f}",
                     f"{row.mean.low * 100:.1f}-{row.mean.high * 100:.1f}", f"[cyan]{bar}[/]", *cells)
    if any(row.seen for row in board.rows):
        grid.caption = "* a search of its lineage has seen these items"
    return grid


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
        log += [f"seed {plan.recipe.seed}  {task.member.version}  {task.member.note}" for task in plan if task.member]
    write_aside(file, "\n".join(lines))
    write_aside(file.with_suffix(".log"), "\n".join(log) + "\n")
    return file


def board_data(board: Leaderboard) -> dict[str, Any]:
    """A leaderboard as plain data."""
    return {"title": board.title, "items": board.items, "headline": board.headline,
            "claims": [{"text": claim.text, "holds": claim.holds} for claim in board.claims],
            "searches": [{"search": search.name, "items": search.items, "candidates": search.candidates,
                          "found": search.found, "mean": search.mean.value} for search in board.searches],
            "rows": [{"member": row.member, "others": list(row.others), "kind": row.kind, "mean": row.mean.value,
                      "low": row.mean.low, "high": row.mean.high, "tasks": row.tasks, "seen": row.seen}
                     for row in board.rows]}


def print_members(members: Sequence[Member], as_json: bool) -> None:
    """Members, one a line."""
    if as_json:
        print(json.dumps([as_data(member) for member in members], indent=1))
        return
    grid = Grid(box=None, pad_edge=False)
    for heading in ("name", "kind", "made by", "tags", "note"):
        grid.add_column(heading, overflow="fold")
    for member in members:
        step = member.origin.step if member.origin else ""
        grid.add_row(escape(member.name), member.kind, step, ", ".join(sorted(member.tags)), escape(member.note))
    console().print(grid)


def as_data(member: Member) -> dict[str, Any]:
    """A member as plain data."""
    return {"name": member.name, "kind": member.kind, "path": member.path, "tags": sorted(member.tags),
            "digest": member.digest, "base": member.base.name if member.base else None, "licence": member.licence,
            "note": member.note, "seen": sorted(member.seen),
            "origin": member.origin.as_dict() if member.origin else None,
            "elements": [{"name": item.name, "root": item.root.name if item.root else None,
                          "members": [one.name for one in item.members]} for item in member.elements]}


def print_member(member: Member, versions: Sequence[Member], as_json: bool) -> None:
    """One member with its origin and versions."""
    if as_json:
        print(json.dumps({**as_data(member), "versions": [one.version for one in versions]}, indent=1))
        return
    out = console()
    out.print(f"[bold]{escape(member.name)}[/]  {member.kind}  [dim]{member.digest}[/]")
    out.print(escape(member.path))
    for label, value in (("note", member.note), ("tags", ", ".join(sorted(member.tags))), ("licence", member.licence),
                         ("derives from", " <- ".join(one.name for one in member.lineage()))):
        if value:
            out.print(f"{label}: {escape(value)}")
    for item in member.elements:
        root = f" (root {item.root.name})" if item.root else ""
        out.print(f"  {item.name}{root}: {', '.join(one.name for one in item.members)}")
    if member.origin:
        out.print(f"made by {member.origin.step}, seed {member.origin.seed}, from")
        for role, names in member.origin.names.items():
            out.print(f"  {role}: {escape(', '.join(names))}")
        out.print(f"with {escape(json.dumps(member.origin.params))}")
        out.print(f"[dim]{escape(json.dumps(dict(member.origin.made_with)))}[/]")
    if len(versions) > 1:
        out.print("versions, oldest first: " + ", ".join(one.version for one in versions))


def method_rows(family: str) -> list[dict[str, Any]]:
    """Every method of a family: name, parameters in words, first sentence, source."""
    return [{"family": family, "name": method.name, "about": method.doc.split("\n\n")[0].replace("\n", " "),
             "parameters": {name: describe(info) for name, info in method.parameters.items()},
             "source": method.source} for method in families(family)]


def print_methods(family: str | None, as_json: bool) -> None:
    """All methods of one family, or of all."""
    from glue.errors import MethodError, did_you_mean

    if family is not None and family not in FAMILIES:
        raise MethodError(f"there is no family '{family}'{did_you_mean(family, FAMILIES)}")
    chosen = [family] if family else [name for name in FAMILIES if name != "kinds"]
    if as_json:
        print(json.dumps([row for name in chosen for row in method_rows(name)], indent=1))
        return
    out = console()
    for name in chosen:
        out.print(f"\n[bold]{name}[/] [dim]({families(name).noun}: {families(name).first})[/]")
        for row in method_rows(name):
            out.print(f"  [cyan]{row['name']}[/]  {escape(row['about'])} [dim]{row['source']}[/]")
            for word, about in row["parameters"].items():
                out.print(f"      {word}: [dim]{escape(about)}[/]")
