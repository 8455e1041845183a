"""`step: evaluate`: members measured by lm-eval on a suite; it leaves a table of scores."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from glue.files import append_line, whole_lines
from glue.member import Member, Score, Table, canonical
from glue.steps import Job, Made, ManyThatRun, Measured, OnSuite, steps
from glue.steps.search import splits

HARNESS = "lm-eval 0.4"


@steps.add("evaluate", makes="table", named=True)
def evaluate(job: Job, *, members: ManyThatRun, suite: OnSuite) -> Made:
    """Every member on every task of the suite, item by item. What was measured before is not measured again."""
    from glue.evaluate.suite import write_tasks

    tasks = job.shared / "tasks" / f"{suite.suite.name}-{_mark(suite)}"
    names = write_tasks(suite.suite, suite.split, suite.folders(), tasks)
    store, digests = job.shared / "scores.jsonl", splits(suite)
    known = {_measured(score): score for score in map(Score.from_dict, map(json.loads, whole_lines(store)))}
    missing = [member for member in members
               if any(key not in known for key in _keys(member, suite, digests))]
    job.report(len(members) - len(missing), len(members), "members")
    came = len(members) - len(missing)

    def keep(k: int, results: dict[str, list[float]]) -> None:
        nonlocal came
        came += 1
        for score in _scores(missing[k], suite, digests, dict(zip(digests, results.values(), strict=True))):
            known[_measured(score)] = score
            append_line(store, canonical(score.as_dict()))
        job.report(came, len(members), missing[k].short)

    job.workers.map("glue.steps.evaluate:work", [(member, tasks, names) for member in missing], each=keep)
    rows = [known[key] for member in members for key in _keys(member, suite, digests)]
    Table(tuple(_of(row, member, digests) for row, member in
                zip(rows, (member for member in members for _ in digests), strict=True))).write(job.folder)
    return Made("table", note=f"{len(members)} members on {suite.suite.name}:{suite.split}")


def work(member: Member, tasks: Path, names: list[str]) -> dict[str, list[float]]:
    """In a worker: per-item results by task."""
    from glue.evaluate.lm_eval import evaluate as measure
    from glue.kinds import load

    return measure(load(member), tasks, names)


def _scores(member: Member, suite: Measured, digests: dict[str, str],
            results: dict[str, list[float]]) -> Iterable[Score]:
    for task in suite.suite.tasks:
        yield Score(member.name, member.digest, f"{suite.suite.name}:{suite.split}", task.name, task.metric,
                    tuple(float(value) for value in results[task.name]), digests[task.name], _how(task), task.chance)


def _of(row: Score, member: Member, digests: dict[str, str]) -> Score:
    """A stored score under the name its member has here, marked where a search has seen its items."""
    return Score.from_dict({**row.as_dict(), "member": member.name, "seen_by_search": row.split in member.seen})


def _how(task) -> str:
    return canonical({"harness": HARNESS, **{key: value for key, value in asdict(task).items() if key != "data"}})


def _measured(score: Score) -> tuple[str, str, str]:
    return score.digest, score.split, score.how


def _keys(member: Member, suite: Measured, digests: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(member.digest, digests[task.name], _how(task)) for task in suite.suite.tasks]


def _mark(suite: Measured) -> str:
    """Tells apart the task files of different data under one suite name."""
    from glue.checkpoint import combined

    return combined({name: member.digest for name, member in suite.data.items()})[:8]
