"""Fit: whether what a plan takes fits into what is left here, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glue.errors import GlueError, Mistakes, RunError
from glue.plan import Plan, Task
from glue.preflight.footprint import WIDTHS, Footprint, together
from glue.preflight.needs import Need, Needs, needs
from glue.room import free_disk, free_on, human
from glue.spare import DRAFTS, products, size_of, unreferenced

SMALL = 500_000_000  # bytes of models in memory below which nothing is refused: the estimate is no better than that
ANYWAY = "add --force to try it all the same"


def refuse(plan: Plan, workers: int, memory: int | None) -> None:
    """Raise RunError, or Mistakes of several, where something that is yet to be made cannot fit.

    memory  bytes that the processes of the run may take here; None: not known, or they are somewhere else

    What is not known is not refused. What is decided by a group that is yet to be made counts once, and is looked at
    again when the group is there.
    """
    taken = needs(plan, workers)
    problems = [*_disk(plan, taken), *_memory(plan, taken, workers, memory), *_devices(plan, taken, workers)]
    if problems:
        raise problems[0] if len(problems) == 1 else Mistakes(problems)


def _disk(plan: Plan, taken: Needs) -> Iterator[GlueError]:
    zoo, (written, whole) = plan.zoo, taken.written
    written = max(0, written - _begun(plan))
    least = "" if whole else "at least "
    free = free_disk(zoo.folder)
    spare = sum(size for _, size in unreferenced(zoo, delete=False)) if written > free or zoo.budget else 0
    clear = f"glue zoo gc --yes  would free {human(spare)}" if spare else "glue zoo gc  finds nothing to delete"
    if written > free:
        yield RunError(f"what {plan.recipe.name} is yet to make takes {least}{human(written)}, and the disk of "
                       f"{zoo.folder} has {human(free)} left", fix=f"make room ({clear}), or {ANYWAY}")
    if zoo.budget is not None and written and (there := products(zoo)[1]) + written > zoo.budget:
        yield RunError(f"what {plan.recipe.name} is yet to make takes {least}{human(written)}; with {human(there)} of "
                       f"products that are there, that is more than the budget of {human(zoo.budget)}",
                       fix=f"raise  budget:  in {zoo.file.name}, make room ({clear}), or {ANYWAY}")


def _begun(plan: Plan) -> int:
    """Bytes that drafts of these very tasks hold already."""
    keys = {task.origin.key[:16] for task in plan if task.origin}
    return sum(size_of(draft) for draft in (plan.zoo.folder / DRAFTS).glob("*-*")
               if draft.name.rsplit("-", 1)[0] in keys)


def _memory(plan: Plan, taken: Needs, workers: int, free: int | None) -> Iterator[GlueError]:
    """Each task alone, and together those that would begin at once."""
    if free is None:
        return
    refused = False
    for task, need, hold in _held(plan, taken):
        if need.device != "cpu" or (peak := hold.peak(workers)) <= free:
            continue
        refused = True
        yield RunError(f"{task.name} takes {_about(need)}{human(peak)} of memory with {_named(workers)}, and "
                       f"{human(free)} are free", fix=_instead(task, need, hold, workers, free),
                       place=task.line.place("as"))
    ready = [hold for task, need, hold in _held(plan, taken) if task.state == "ready" and need.device == "cpu"]
    if ready and not refused and (peak := together(ready, workers)) > free:
        fewer = _fewer(ready, workers, free)
        yield RunError(f"{len(ready)} tasks that would run at once take about {human(peak)} of memory with "
                       f"{_named(workers)}, and {human(free)} are free",
                       fix=f"add {fewer}, or {ANYWAY}" if fewer else ANYWAY)


def _devices(plan: Plan, taken: Needs, workers: int) -> Iterator[GlueError]:
    left: dict[str, int | None] = {}
    for task, need, hold in _held(plan, taken):
        if need.device == "cpu":
            continue
        free = left[need.device] = left[need.device] if need.device in left else free_on(need.device)
        peak = need.on_device(workers)
        if free is not None and peak > free:
            yield RunError(f"{task.name} takes {_about(need)}{human(peak)} of the memory of {need.device} with "
                           f"{_named(workers)}, and {human(free)} are free",
                           fix=_instead(task, need, hold, workers, free), place=task.line.place("as"))


def _held(plan: Plan, taken: Needs) -> list[tuple[Task, Need, Footprint]]:
    """What is large, and known."""
    return [(task, need, need.hold) for task in plan if (need := taken.tasks.get(task.name)) and need.hold
            and need.hold.call > SMALL]


def _instead(task: Task, need: Need, hold: Footprint, workers: int, free: int) -> str:
    """What would make a task fit, of what its line or the command line can say; nothing that would not."""
    assert task.choice is not None
    workers = max(1, workers)
    for words, other in [("", hold), *_lighter(task, hold)]:
        for number in range(workers, 0, -1):
            peak = other.peak(number) if need.device == "cpu" else sum(other.largest(number))
            if peak <= free and (words or number < workers):
                said = [*([words] if words else []), *([f"--workers {number}"] if number < workers else [])]
                return f"say {' and '.join(said)}, which takes {human(peak)}, or {ANYWAY}"
    more = free_on("cuda") if need.device == "cpu" and "device" in task.choice.params else None
    if more is not None and hold.call <= more:
        return f"say  device: cuda,  which has {human(more)} free, or {ANYWAY}"
    return f"nothing that its line can say makes it fit: take a larger machine, or {ANYWAY}"


def _lighter(task: Task, hold: Footprint) -> Iterator[tuple[str, Footprint]]:
    """Other words for a line, and what it would hold with them."""
    assert task.choice is not None
    params = task.choice.params
    if task.choice.method.traits.get("holds") == "runs" and params.get("dtype") in ("float32", "auto"):
        yield "dtype: bfloat16", hold.times(WIDTHS["bfloat16"] / WIDTHS["float32"])
    if task.step == "tune":
        yield "step: lora", hold.times(1 / 4)


def _fewer(ready: Sequence[Footprint], workers: int, free: int) -> str:
    return next((f"--workers {number}" for number in range(workers - 1, 0, -1) if together(ready, number) <= free), "")


def _about(need: Need) -> str:
    return "" if need.exact else "about "


def _named(workers: int) -> str:
    return f"{workers} worker{'s' * (workers != 1)}"
