"""Plans of recipes and of merge configs, and what a merge has done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table as Grid

from glue.cards import licence_remarks
from glue.family import families
from glue.hub import locate
from glue.member import Member
from glue.merges import order_row
from glue.orders import Order
from glue.plan import Plan, Task
from glue.preflight.needs import Lacking, Needs, needs
from glue.room import free_disk, free_memory, human
from glue.show.terminal import console

STATES = {"done": "green", "alias": "green", "ready": "yellow", "waiting": "dim", "deferred": "dim",
          "missing": "red"}


def print_plan(plan: Plan, as_json: bool, workers: int = 1) -> None:
    """The tasks of a plan: state, inputs with their size, place of the product, and what each will take."""
    taken = needs(plan, workers, timed=True)
    rows = [_needing(row, taken, workers) for row in plan_rows(plan)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    lacking = any(task.lacks for task in plan)
    device, timed = any(row["bytes_device"] for row in rows), any(row["seconds"] for row in rows)
    grid = Grid(title=f"{plan.recipe.name}: {plan.recipe.about}", title_justify="left", box=None, pad_edge=False)
    more = [*(["on device"] * device), *(["about"] * timed)]
    for heading in ("state", "step", "makes", "reads", "writes", "memory", *more):
        grid.add_column(heading, overflow="fold")
    for row in rows:
        colour = STATES[row["state"]]
        reads = f"{len(row['inputs'])} members, {human(row['bytes_read'])}" if row["bytes_read"] else ""
        why = f" ({row['why']})" if row["why"] else ""
        size = human(row["bytes_written"]) + " each" * row["each"] if row["bytes_written"] else ""
        memory = [human(row[key]) if row[key] else "" for key in ("bytes_peak", *(["bytes_device"] * device))]
        grid.add_row(f"[{colour}]{row['state']}[/]", row["step"], escape(row["name"] + why), reads,
                     ", ".join(filter(None, (row["folder"], size))), *memory, *([_span(row["seconds"])] * timed))
    console().print(grid)
    if taken.lacking:
        _print_lacking(taken, plan.recipe.file)
    _print_totals(plan, taken, workers)
    for remark in licence_remarks(plan):
        console().print(f"[yellow]note[/] {escape(remark)}")
    done = sum(task.state in ("done", "alias") for task in plan)
    when = "once all is here, " if lacking else ""
    rest = "" if done == len(rows) else f"; {when}glue run {plan.recipe.file} makes the rest"
    print(f"{done} of {len(rows)} tasks are done{rest}")


def print_orders(orders: Sequence[Order], as_json: bool, workers: int | None = None) -> None:
    """What a merge config will do: each output with its method, models, sizes, memory and time; and the notes."""
    rows = [order_row(order, workers) for order in orders]
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
    if task.state == "missing":
        why = f"{len(task.lacks)} inputs are not on this machine" if len(task.lacks) > 1 else \
            f"{task.lacks[0].name} is not on this machine"
    root = str(plan.zoo.file.parent) + "/"
    sizes = {member: _size(member) for member in task.inputs} if task.state == "ready" else {}
    models = [size for member, size in sizes.items() if member.kind != "dataset"] or [0]
    writes = families("steps")[task.step].traits.get("writes") if task.choice else None
    return {"name": task.name, "step": task.step, "state": task.state, "why": why,
            "inputs": [member.version if member.digest else member.name for member in task.inputs or task.known],
            "lacks": [member.name for member in task.lacks], "bytes_read": sum(sizes.values()),
            "bytes_written": {"one": max(models), "all": sum(models)}.get(writes or "", 0),
            "folder": folder.removeprefix(root)}


def _needing(row: dict[str, Any], taken: Needs, workers: int) -> dict[str, Any]:
    """The row of a task with what it takes."""
    need = taken.tasks.get(row["name"])
    if need is None:
        return {**row, "bytes_memory": 0, "bytes_peak": 0, "bytes_device": 0, "each": False, "exact": True,
                "seconds": None}
    read, written = row["bytes_read"] or need.read or 0, need.written or row["bytes_written"] or 0
    return {**row, "bytes_read": read, "bytes_written": written, "bytes_memory": need.memory or 0,
            "bytes_peak": need.peak(workers) or 0, "bytes_device": need.on_device(workers), "each": need.each,
            "seconds": [need.takes.least, need.takes.most] if need.takes else None,
            "exact": need.exact, "lacks": [_lacking(one) for one in taken.lacking if one.member.name in row["lacks"]]}


def _lacking(one: Lacking) -> dict[str, Any]:
    return {"name": one.member.name, "how": one.how, "bytes": one.extent.nbytes if one.extent else 0,
            "exact": bool(one.extent and one.extent.exact)}


def _span(seconds: list[float] | None) -> str:
    """How long something takes, as people say it."""
    if seconds is None:
        return ""
    unit, name = (60, "min") if seconds[1] >= 120 else (1, "s")
    least, most = (max(1, round(value / unit)) for value in seconds)
    return f"{least} {name}" if least == most else f"{least}-{most} {name}"


def _print_lacking(taken: Needs, recipe: Path) -> None:
    """What has to be brought."""
    total, exact = taken.download
    about = "" if exact else "about "
    more = f", and {taken.unknown} of unknown size" if taken.unknown else ""
    print(f"{len(taken.lacking)} members are not on this machine, {about}{total / 1e9:.2f} GB of weights in all{more}:")
    for one in taken.lacking:
        size = f"{'' if one.extent.exact else '~'}{one.extent.nbytes / 1e9:.2f} GB" if one.extent else ""
        print(f"  {size:>9}  {one.how}")
    if any(one.member.path.startswith("hub:") for one in taken.lacking):
        print(f"glue zoo fetch {recipe}  brings what is on the hub")


def _print_totals(plan: Plan, taken: Needs, workers: int) -> None:
    """What all that is left to do will take, beside what is there."""
    written, all_of_them = taken.written
    if written:
        least = ("" if taken.download[1] else "about ") if all_of_them else "at least "
        print(f"products take {least}{human(written)}, {human(free_disk(plan.zoo.folder))} are free; "
              f"a worker holds up to {human(taken.memory)} of models")
    peaks = [peak for need in taken.tasks.values() if (peak := need.peak(workers))]
    free = free_memory()
    if peaks:
        there = f", {human(free)} are free" if free else ""
        print(f"one task takes up to {human(max(peaks))} of memory with {workers} workers{there}")


def _size(member: Member) -> int:
    folder = locate(member.path, member.kind)
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file()) if folder.is_dir() else 0
