"""Merges from a config file: what `glue merge` and `glue plan` do with a YAML of mergekit.

A folder appears under its name when it is complete. Until then everything lies in a draft beside it, from which the
same command goes on after a kill.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glue.errors import CheckpointError, MethodError, RecipeError, RunError
from glue.files import publish, write_aside
from glue.member import FOLDER_NOTE
from glue.merge.estimate import cost, held
from glue.merge.estimate import memory as taken
from glue.orders import Dense, Order, Promised, Report, Settings, orders
from glue.preflight.fit import ANYWAY, SMALL
from glue.room import free_disk, free_memory, human
from glue.spare import size_of
from glue.workers import Workers

if TYPE_CHECKING:
    from glue.zoo import Zoo

OURS = re.compile(r"^(merge_method|models|slices|modules|experts|gate_mode)\s*:", re.MULTILINE)
ALONE = 50_000_000  # bytes that are read sooner than another process is there


def ready(order: Order) -> None:
    """Raise RecipeError where the place of the result is taken by something else."""
    out = order.out
    if order.done or order.settings.overwrite or not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise RecipeError(f"{out} is there already and holds something else",
                          fix="choose another folder, or add --overwrite, which keeps what is there beside it")


def carried_out(order: Order, workers: Workers, report: Report = lambda done, total: None) -> dict[str, Any]:
    """Make what is ordered and publish it; returns what was done, as plain data. Nothing, where it is there already."""
    told = {"out": str(order.out), "method": order.method, "notes": list(order.notes), **_bytes(order), "kept": ""}
    if order.done:
        record = json.loads((order.out / FOLDER_NOTE).read_bytes())
        return {**told, "made": False, "digest": record["weights"], "seconds": {"merge": 0.0}}
    draft = _draft(order)
    began = time.perf_counter()
    try:
        draft.mkdir(parents=True, exist_ok=True)
        digest = order.into(draft, workers, report)
        write_aside(draft / FOLDER_NOTE, json.dumps(_note(order, digest), indent=1))
        with suppress(OSError):
            order.out.rmdir()  # an empty folder is no reason to keep anything
        kept = publish(draft, order.out)
    except (MethodError, CheckpointError, RecipeError):
        shutil.rmtree(draft, ignore_errors=True)  # what the user must change; all else can be gone on with
        raise
    except OSError as problem:
        raise RunError(f"{order.out} cannot be written: {problem.strerror or problem}",
                       fix="choose another place, or make this one writable") from None
    return {**told, "made": True, "kept": str(kept) if kept else "", "digest": digest,
            "seconds": {"merge": time.perf_counter() - began}}


def _bytes(order: Order) -> dict[str, int]:
    """What is read, each tensor once, and written, as far as it is known."""
    targets = order.plan.targets if isinstance(order, Dense) else []
    inputs = {(each.source.name, each.name): each.header.nbytes for target in targets
              for each in [*target.inputs, *([target.base] if target.base else [])]}
    return {"bytes_read": sum(inputs.values()), "bytes_written": sum(target.header.nbytes for target in targets)}


def _note(order: Order, digest: str) -> dict[str, Any]:
    """What the folder says of itself, enough to make it again."""
    models: dict[str, dict[str, Any]] = {str(ref): {"folders": [str(path.resolve()) for path in paths]}
                                         for ref, paths in order.folders.items()}
    if isinstance(order, Dense):
        for model in order.plan.models:
            models[str(model.ref)]["fingerprint"] = model.weights.fingerprint
    names = ("glue", "torch", "safetensors", *(("mergekit", "transformers") if order.through else ()))
    return {"kind": "model", "weights": digest, "order": order.key, "config": order.text, "seed": order.settings.seed,
            "models": models, "through": order.through,
            "made_with": {**{name: version(name) for name in names}, "python": platform.python_version()}}


def merge_file(file: Path, out: Path, settings: Settings, zoo: Zoo | None = None, workers: int | None = None,
               report: Callable[[str, int, int], None] = lambda name, done, total: None,
               crew: Workers | None = None, *, force: bool = False) -> list[dict[str, Any]]:
    """Carry out a config file, all its documents in order; what is done already is not done again.

    workers  processes; by default one a core, and none beside this one where there is little to do
    crew     workers that are there already, in place of these processes
    force    begin also with what does not fit, as far as can be told
    Returns one record for each document. Raises before any work for whatever can be known from headers.
    """
    began = time.perf_counter()
    todo = orders(file, out, settings, zoo)
    for order in todo:
        ready(order)
    if not force:
        refuse([order for order in todo if not order.done], workers)
    planned_in = time.perf_counter() - began
    done: list[dict[str, Any]] = []
    for k, order in enumerate(todo):
        if k and isinstance(order, Dense):  # what it is made of is there now
            order = orders(file, out, settings, zoo)[k]
        with nullcontext(crew) if crew else Workers(_processes(order, workers), start="fork") as pool:
            try:
                done.append(carried_out(order, pool, partial(report, str(order.out))))
            except KeyboardInterrupt:
                pool.close(now=True)
                raise
        done[-1]["seconds"]["plan"] = planned_in if not k else 0.0
    return done


def refuse(todo: Sequence[Order], workers: int | None) -> None:
    """Raise RunError where what is to be made has no room on its disk, or in memory while it is made."""
    if not todo:
        return
    written, free = sum(_bytes(order)["bytes_written"] for order in todo), free_disk(todo[0].out)
    begun = sum(size_of(draft) for order in todo if (draft := _draft(order)).is_dir())
    if written - begun > free:
        raise RunError(f"what is to be made takes {human(written - begun)}, and the disk of {todo[0].out} has "
                       f"{human(free)} left", fix="choose a folder on another disk, say  --out-dtype bfloat16  if it "
                       f"would be wider, or {ANYWAY}")
    memory = free_memory()
    for order in todo:
        if memory is None or not isinstance(order, Dense) or order.merge is None or order.settings.device != "cpu":
            continue
        number, merge = _processes(order, workers), order.merge
        if held(merge) > SMALL and (peak := taken(merge, number)) > memory:
            fewer = next((f"--workers {k}" for k in range(number - 1, 0, -1) if taken(merge, k) <= memory), "")
            raise RunError(f"{order.out} takes {human(peak)} of memory with {max(1, number)} processes, and "
                           f"{human(memory)} are free", fix=f"add {fewer}, or {ANYWAY}" if fewer else ANYWAY)


def _draft(order: Order) -> Path:
    return order.out.with_name(f".{order.out.name}.draft")


def _processes(order: Order, workers: int | None) -> int:
    """How many beside this one: 0 for what one does at once, and where a device does the work."""
    if not isinstance(order, Dense) or order.merge is None or order.done or order.settings.device != "cpu":
        return 0
    if workers is not None:
        return workers if workers > 1 else 0
    return 0 if _bytes(order)["bytes_read"] < ALONE else min(len(os.sched_getaffinity(0)), 8)


def order_row(order: Order, workers: int | None = None) -> dict[str, Any]:
    """An order as plain data, with what it will take."""
    row = {"out": str(order.out), "method": order.method, "models": [str(ref) for ref in order.folders],
           "tensors": len(order.plan.targets) if isinstance(order, Dense) else None, "notes": list(order.notes),
           "through": order.through, "done": order.done, **_bytes(order), "bytes_memory": None, "seconds": None,
           "passes": None}
    if not isinstance(order, Dense) or order.merge is None or any(
            isinstance(model.weights, Promised) for model in order.plan.models):
        return row
    disk = next(folder for folder in (order.out, *order.out.absolute().parents) if folder.is_dir())
    takes = cost(order.merge, max(1, _processes(order, workers)), disk)
    return {**row, "bytes_memory": takes.memory, "seconds": takes.seconds, "passes": takes.passes}


def is_config(file: Path) -> bool:
    """Whether a file is a merge config rather than a recipe, by the keys at its left edge."""
    try:
        text = file.read_text(errors="replace") if file.is_file() else ""
    except OSError:
        return False
    return bool(OURS.search(text)) and not re.search(r"^steps\s*:", text, re.MULTILINE)
