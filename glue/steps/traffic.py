"""`step: traffic`: a proxy whose large member is asked over the network; what goes there, what comes back, how long."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from glue.errors import MethodError, RunError
from glue.family import Natural, NonNegative
from glue.kinds import Place
from glue.member import Member, Score, Table, canonical
from glue.steps import Device as Here
from glue.steps import Job, Made, Measured, OnSuite, RunsIn, Takes, ran, steps
from glue.steps._device import Device, Way, served

if TYPE_CHECKING:
    from glue.evaluate.suite import Item, Task

    Proxied = Member
else:
    Proxied = Annotated[str, Takes("one", ("proxy",))]

NOTE = "traffic.json"  # beside the table: what each way took, by task
PIECE = 25  # items that a worker answers before others may have it


def ways_of(ways: list[dict[str, Any]], **_: Any) -> None:
    """Every way must be one."""
    if not ways:
        raise MethodError("no way of asking is named", fix="add  ways: [{draft: 0}, {draft: auto, top_k: 20}]")
    told = [str(Way.of(way)) for way in ways]
    if len(set(told)) < len(told):
        raise MethodError(f"a way of asking is named twice: {max(told, key=told.count)}", fix="remove one")


def written_tasks(suite: Measured, **_: Any) -> None:
    """Only what is written can be asked for token by token."""
    if not any(task.output == "generate" for task in suite.suite.tasks):
        raise MethodError(f"suite '{suite.suite.name}' has no task whose answer is written",
                          fix="name a suite that has a task with  output: generate")


@steps.add("traffic", makes="table", named=True, holds="runs", words=ways_of, check=written_tasks,
           unkeyed=("device",), later=("dtype",), source="arXiv:2503.14932")
def traffic(job: Job, *, member: Proxied, suite: OnSuite, ways: list[dict[str, Any]],
            round_trips: list[NonNegative] = [], timed: Natural = 8, device: Here = "cpu",  # noqa: B006
            dtype: RunsIn = "float32") -> Made:
    """What a device sends to its black box, and is sent, for each answer that is written: one way of asking after the
    other, over HTTP between two processes. The table has what each way scores; the first is what others are compared
    with.

    member       a proxy; where its large member lies here, it is served by a process of its own for as long as this
                 takes
    suite        its tasks with written answers are asked
    ways         {draft: 4 | auto, bits: 16, top_k: 0, extra: 0, budget: 1e-3}: how many tokens are drafted before the
                 large member is asked, and how much it tells
    round_trips  milliseconds: the first items are asked again as if the server were so far away, and timed
    timed        how many items those are
    device, dtype  where the pair runs, and the large member while it is served, and in what
    """
    if job.workers.apart and member.base is not None and member.base.kind != "endpoint":
        raise RunError(f"the large member of '{member.name}' is served by this machine for itself alone, and these "
                       f"workers are on others", fix="run this recipe with  --on here, or name a proxy of an endpoint")
    told, place = [Way.of(way) for way in ways], job.place(device, dtype)
    tasks = [task for task in suite.suite.tasks if task.output == "generate"]
    items = suite.items()
    with ExitStack() as stack:
        large = _far(stack, place, member)
        pieces = [(way, task, first) for way in told for task in tasks
                  for first in range(0, len(items[task.name]), PIECE)]
        done = list[int]()

        def told_of(k: int, _: Any) -> None:
            done.append(k)
            job.report(len(done), len(pieces), str(pieces[k][0]))

        came = job.workers.map("glue.steps.traffic:work",
                               [(member, large, way, task, items[task.name][first:first + PIECE], place)
                                for way, task, first in pieces], each=told_of)
        found: dict[tuple[Way, str], list[Any]] = {}
        for (way, task, _), piece in zip(pieces, came, strict=True):
            found.setdefault((way, task.name), []).append(piece)
        paces = [{"way": str(way), "round_trip": trip, "tokens_per_second": job.workers.call(
            "glue.steps.traffic:timing", member, large, way, tasks[0], items[tasks[0].name][:timed], trip / 1000,
            place)} for way in told for trip in round_trips if timed]
    rows, digests = [], suite.digests()
    for way in told:
        for task in tasks:
            results = tuple(result for results, _ in found[way, task.name] for result in results)
            rows.append(Score(f"{member.name}: {way}", _digest(member, way), f"{suite.suite.name}:{suite.split}",
                              task.name, task.metric, results, digests[task.name], _how(task, way, dtype),
                              seen_by_search=digests[task.name] in member.seen))
    Table(tuple(rows)).write(job.folder)
    counts = [{"way": str(way), **asdict(way), "task": task.name,
               **_summed([count for _, count in found[way, task.name]])} for way in told for task in tasks]
    (job.folder / NOTE).write_text(json.dumps({"member": member.name, "ways": counts, "times": paces}, indent=1))
    return Made("table", note=f"{member.short} asked in {len(told)} ways on {suite.suite.name}:{suite.split}")


def _far(stack: ExitStack, here: Place, member: Member) -> Member:
    """The large member as an endpoint: as it is, or served for now."""
    from glue.kinds.endpoint import connect

    assert member.base is not None
    if member.base.kind == "endpoint":
        return member.base
    place = Path(stack.enter_context(_scratch()), "large")
    connect(place, stack.enter_context(served(member.base, here)), tokenizer=member.base)
    return Member(f"{member.base.name} (served)", "endpoint", str(place))


def _scratch() -> Any:
    from tempfile import TemporaryDirectory

    return TemporaryDirectory(prefix="glue-traffic-")


def work(member: Member, large: Member, way: Way, task: Task,
         items: Sequence[Item], place: Place) -> tuple[list[float], dict[str, Any]]:
    """In a worker: results of some items, and what they took."""
    from glue.kinds.link import Traffic

    over = Traffic()
    device = Device(member, large, way, traffic=over, place=place)
    # who the server is was asked once; that is no part of an answer
    before = replace(over)
    results, ledger = [], None
    for item in items:
        text, done = device.write(item.question, task.max_tokens, ("\n",))
        results.append(float(text.split("\n")[0].strip() == item.answer))
        ledger = done.ledger if ledger is None else ledger + done.ledger
    assert ledger is not None, "a piece has items"
    sent = {name: getattr(over, name) - getattr(before, name)
            for name in ("calls", "up", "down", "head_up", "head_down")}
    counts = {name: value for name, value in ledger.as_dict().items() if isinstance(value, int | float)}
    return results, {"items": len(items), "revealed": ledger.revealed,
                     "formula": {name: counts[name] for name in ("up", "down")},
                     **{name: counts[name] for name in ("widened", "places", "drafted", "judged", "accepted", "written",
                                                        "asked_for", "bound", "truncated", "uncertain")}, **sent}


def timing(member: Member, large: Member, way: Way, task: Task, items: Sequence[Item], distance: float,
           place: Place) -> float:
    """In a worker: tokens a second, the large member so many seconds away."""
    device = Device(member, large, way, distance=distance, place=place)
    device.write(items[0].question, task.max_tokens, ("\n",))  # the first of everything takes longer
    began, tokens = perf_counter(), 0
    for item in items:
        tokens += len(device.write(item.question, task.max_tokens, ("\n",))[1].tokens)
    return tokens / (perf_counter() - began)


def _summed(counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of several pieces together."""
    total = dict(counts[0])
    for more in counts[1:]:
        for name, value in more.items():
            if isinstance(value, dict):
                total[name] = {key: total[name][key] + value[key] for key in value}
            elif isinstance(value, str):
                total[name] = max(total[name], value, key=len)
            else:
                total[name] += value
    return total


def _digest(member: Member, way: Way) -> str:
    """What tells one way of asking a member from others."""
    return hashlib.sha256(canonical([member.digest, asdict(way)]).encode()).hexdigest()[:32]


def _how(task: Task, way: Way, dtype: str) -> str:
    return canonical({"harness": "glue traffic", **ran(dtype), "way": asdict(way), "max_tokens": task.max_tokens})
