"""`step: evaluate`: members measured by lm-eval on a suite; it leaves a table of scores."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from glue.files import append_line, whole_lines
from glue.member import Member, Score, Table, canonical
from glue.steps import Job, Made, ManyThatRun, Measured, OnSuite, steps

HARNESS = "lm-eval 0.4"
SPEED_NOTE = "speed.json"  # beside a table: digest of a member -> tokens a second


@steps.add("evaluate", makes="table", named=True)
def evaluate(job: Job, *, members: ManyThatRun, suite: OnSuite, speed: bool = False) -> Made:
    """Every member on every task of the suite, item by item. What was measured before is not measured again.

    speed  also time each member alone as it writes after the first question, with one thread; it is noted beside the
           table and is no part of it, since it is different every time
    """
    from glue.evaluate.suite import write_tasks

    folder = job.shared / "tasks" / f"{suite.suite.name}-{_mark(suite)}"
    names = write_tasks(suite.suite, suite.split, suite.folders(), folder)
    store, digests = job.shared / "scores.jsonl", suite.digests()
    known = {_key(score): score for score in map(Score.from_dict, map(json.loads, whole_lines(store)))}
    asked = {member.digest: member for member in members}  # one member may have several names
    missing = [member for member in asked.values()
               if any(key not in known for key in _keys(member, suite, digests))]
    came = len(asked) - len(missing)
    job.report(came, len(asked), "members")

    def keep(k: int, results: list[list[float]]) -> None:
        nonlocal came
        came += 1
        for score in _scores(missing[k], suite, digests, results):
            known[_key(score)] = score
            append_line(store, canonical(score.as_dict()))
        job.report(came, len(asked), missing[k].short)

    job.workers.map("glue.steps.evaluate:work", [(member, folder, names) for member in missing], each=keep)
    Table(tuple(replace(known[key], member=member.name, seen_by_search=known[key].split in member.seen)
                for member in members for key in _keys(member, suite, digests))).write(job.folder)
    if speed:
        question = next(iter(suite.items().values()))[0].question
        paces = {member.digest: job.workers.call("glue.steps.evaluate:timed", member, question)
                 for member in asked.values()}
        (job.folder / SPEED_NOTE).write_text(json.dumps(paces, indent=1))
    return Made("table", note=f"{len(members)} members on {suite.suite.name}:{suite.split}")


def timed(member: Member, question: str) -> float:
    """In a worker: tokens a second."""
    from glue.kinds import load
    from glue.kinds.text import pace

    return pace(load(member), question)


def work(member: Member, tasks: Path, names: list[str]) -> list[list[float]]:
    """In a worker: per-item results of each task, in the order of `names`."""
    from glue.evaluate.lm_eval import evaluate as measure
    from glue.kinds import load

    found = measure(load(member), tasks, names)
    return [found[name] for name in names]


def _scores(member: Member, suite: Measured, digests: dict[str, str], results: list[list[float]]) -> Iterable[Score]:
    for task, items in zip(suite.suite.tasks, results, strict=True):
        yield Score(member.name, member.digest, f"{suite.suite.name}:{suite.split}", task.name, task.metric,
                    tuple(map(float, items)), digests[task.name], _how(task), task.chance)


def _how(task) -> str:
    return canonical({"harness": HARNESS, **{key: value for key, value in asdict(task).items() if key != "data"}})


def _key(score: Score) -> tuple[str, str, str]:
    """What a score is known by: the bytes of the member, the items, and how they were asked."""
    return score.digest, score.split, score.how


def _keys(member: Member, suite: Measured, digests: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(member.digest, digests[task.name], _how(task)) for task in suite.suite.tasks]


def _mark(suite: Measured) -> str:
    """Tells apart the task files of different data under one suite name."""
    from glue.checkpoint import combined

    return combined({name: member.digest for name, member in suite.data.items()})[:8]
