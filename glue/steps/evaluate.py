"""`step: evaluate`: members measured by lm-eval on a suite; it leaves a table of scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glue.errors import SuiteError
from glue.files import append_line, whole_lines
from glue.kinds import Place
from glue.member import Member, Score, Table, canonical
from glue.steps import AtOnce, Device, Job, Made, ManyThatRun, Measured, OnAnySuite, RunsIn, ran, steps
from glue.workers import Report

if TYPE_CHECKING:
    import numpy as np

    from glue.evaluate.suite import Named, Task

HARNESS = "lm-eval 0.4"
SPEED_NOTE = "speed.json"  # beside a table: digest of a member -> tokens a second
LOSS_NOTE = "loss.json"  # beside a table: digest of a member -> task -> bits a byte of each right answer
PARTS = 1000  # of the work on one member, for progress
Results = dict[str, tuple[tuple[float, ...], str]]  # task -> one number per item, digest of the items


def noted(suite: Measured, speed: bool, loss: bool, **_: Any) -> None:
    """Speed and losses are measured on items of dataset members."""
    for word, asked in (("speed", speed), ("loss", loss)):
        if asked and not suite.suite.tasks:
            raise SuiteError(f"suite '{suite.suite.name}' has no dataset with whose items {word} could be measured",
                             fix=f"remove  {word}: true,  or measure a suite that has a task with  data:")


@steps.add("evaluate", makes="table", named=True, holds="runs", unkeyed=("device", "batch_size"), later=("dtype",),
           check=noted)
def evaluate(job: Job, *, members: ManyThatRun, suite: OnAnySuite, speed: bool = False, loss: bool = False,
             device: Device = "cpu", dtype: RunsIn = "float32", batch_size: AtOnce = "auto") -> Made:
    """Every member on every task of the suite, item by item. What was measured before is not measured again, and what
    was killed goes on after its last batch.

    speed       also time each member alone as it writes after the first question, with one thread; it is noted beside
                the table and is no part of it, since it is different every time
    loss        also note beside the table how surprised each member is by every right answer, in bits a byte
    device      where members run: cpu, cuda, cuda:1; auto: an accelerator where there is one. Like the machine, it is
                no part of the origin
    dtype       what they calculate in, or in nf4 and int8 are kept in; auto: what their files hold. Scores in one are
                never taken for scores in another
    batch_size  how many questions are read at once; auto: as many as most likely fit, and half as many where they do
                not, again and again
    """
    from glue.evaluate.answered import Answered
    from glue.evaluate.suite import write_tasks

    folder = job.shared / "tasks" / f"{suite.suite.name}-{_mark(suite)}"
    names = write_tasks(suite.suite, suite.split, suite.folders(), folder)
    store, wanted = job.shared / "scores.jsonl", _wanted(suite, dtype)
    place, spread = job.place(device, dtype, batch_size), dict[str, str]()
    known = {key: score for score in map(Score.from_dict, map(json.loads, whole_lines(store))) for key in _keys(score)}
    asked = {member.digest: member for member in members}  # one member may have several names
    missing = [member for member in asked.values()
               if any((member.digest, split, how) not in known for _, split, how in wanted)]
    progress = _Progress(job, len(missing), len(asked))

    def journal(member: Member) -> Path:
        what = suite.split + f"-{dtype}" * (dtype != "float32")
        return job.shared / "answered" / f"{member.digest}-{folder.name}-{what}.jsonl"

    def keep(k: int, found: tuple[Results, str]) -> None:
        results, spread[missing[k].short] = found
        for score in _scores(missing[k], suite, results, dtype):
            known.update(dict.fromkeys(_keys(score), score))
            append_line(store, canonical(score.as_dict()))
        Answered(journal(missing[k])).end()
        progress(1, 1, missing[k].name)

    job.workers.map("glue.steps.evaluate:work", [(member, suite, folder, names, journal(member), place)
                                                 for member in missing], report=progress, each=keep)
    Table(tuple(replace(known[member.digest, split, how], member=member.name, suite=_name(suite), task=task.name,
                        chance=task.chance, seen_by_search=known[member.digest, split, how].split in member.seen)
                for member in members for task, split, how in wanted)).write(job.folder)
    if speed:
        question = next(iter(suite.items().values()))[0].question
        paces = {member.digest: job.workers.call("glue.steps.evaluate:timed", member, question, place)
                 for member in asked.values()}
        (job.folder / SPEED_NOTE).write_text(json.dumps(paces, indent=1))
    if loss:
        kept = list(asked.values())
        lost = job.workers.map("glue.steps.evaluate:surprised", [(member, suite, place) for member in kept])
        told = {member.digest: {task: items.tolist() for task, items in each.items()}
                for member, each in zip(kept, lost, strict=True)}
        (job.folder / LOSS_NOTE).write_text(json.dumps(told))
    where = "; ".join(["", *(f"{name} is spread over {parts}" for name, parts in spread.items() if parts)])
    return Made("table", note=f"{len(members)} members on {_name(suite)}{told_dtype(dtype)}{where}")


def told_dtype(dtype: str) -> str:
    """In what members ran, in words, where it is not fp32."""
    return "" if dtype == "float32" else " in what their files hold" if dtype == "auto" else f" in {dtype}"


def surprised(member: Member, suite: Measured, place: Place) -> dict[str, np.ndarray]:
    """In a worker: bits a byte of each right answer, task -> [items]."""
    from glue.evaluate.fast import losses

    return losses(place.load(member), suite.suite.tasks, suite.items())


def timed(member: Member, question: str, place: Place) -> float:
    """In a worker: tokens a second."""
    from glue.kinds.text import pace

    return pace(place.load(member), question)


def work(member: Member, suite: Measured, tasks: Path, names: list[str], journal: Path, place: Place, *,
         report: Report = lambda done, total, note: None) -> tuple[Results, str]:
    """In a worker: what a member scores on every task, and over what it was spread; answers go into the journal.

    names  of the task files in `tasks`, in the order of the suite's local tasks
    """
    from glue.evaluate.answered import Answered
    from glue.evaluate.lm_eval import evaluate as measure
    from glue.evaluate.lm_eval import evaluate_named

    running, batch_size = place.load(member), place.batch_size
    answered = Answered(journal, running.room)
    results, local, every = Results(), len(suite.suite.tasks), len(suite.suite.every)
    if local:
        found = measure(running, tasks, names, batch_size=batch_size, answered=answered,
                        report=lambda done, total: report(done * local, total * every, member.name))
        digests = suite.digests()
        results |= {task.name: (tuple(found[name]), digests[task.name])
                    for task, name in zip(suite.suite.tasks, names, strict=True)}
    if local < every:
        named = evaluate_named(running, suite.suite.named, suite.split, batch_size=batch_size, answered=answered,
                               report=lambda done, total: report(local * total + done * (every - local), total * every,
                                                                 member.name))
        results |= {name: (one.items, one.split) for name, one in named.items()}
    return results, running.spread


class _Progress:
    """How far all members are together: those that were measured before are done, others by what they have answered."""

    def __init__(self, job: Job, missing: int, every: int):
        self.job, self.every, self.came = job, every, every - missing
        self.shares: dict[str, float] = {}
        job.report(self.came * PARTS, every * PARTS, "members")

    def __call__(self, done: int, total: int, note: str) -> None:
        self.shares[note] = max(self.shares.get(note, 0.0), done / total)
        self.job.report(int(PARTS * (self.came + sum(self.shares.values()))), PARTS * self.every,
                        note.rpartition("/")[2])


def _name(suite: Measured) -> str:
    return f"{suite.suite.name}:{suite.split}"


def _scores(member: Member, suite: Measured, results: Results, dtype: str) -> Iterator[Score]:
    for task, _, how in _wanted(suite, dtype):
        items, split = results[task.name]
        yield Score(member.name, member.digest, _name(suite), task.name, task.metric, items, split, how, task.chance)


def _wanted(suite: Measured, dtype: str) -> list[tuple[Task | Named, str, str]]:
    """Each task with what its scores are known by, beside the member: the items, and how they are asked.

    Whether items of the hub are the same is told by the bytes that lie here, which `how` names; their own digest is
    known when they have been asked, and is "" until then.
    """
    digests = suite.digests()
    return [*((task, digests[task.name], _how(task, dtype)) for task in suite.suite.tasks),
            *((task, "", _how_named(task, suite, dtype)) for task in suite.suite.named)]


def _how(task: Task, dtype: str) -> str:
    told = {key: value for key, value in asdict(task).items() if key != "data"}
    return canonical({"harness": HARNESS, **ran(dtype), **told})


def _how_named(task: Named, suite: Measured, dtype: str) -> str:
    return canonical({"harness": f"lm-eval {version('lm_eval')}", **ran(dtype), "task": task.task,
                      "metric": task.metric, "filter": task.filter, "num_fewshot": task.shots[suite.split],
                      "data": suite.sources[task.name]})


def _keys(score: Score) -> tuple[tuple[str, str, str], ...]:
    """What a score is known by: the bytes of the member, the items where they were known, and how they were asked."""
    return (score.digest, score.split, score.how), (score.digest, "", score.how)


def _mark(suite: Measured) -> str:
    """Tells apart the task files and journals of different data under one suite name."""
    from glue.checkpoint import combined

    return combined({**{name: member.digest for name, member in suite.data.items()}, **suite.sources})[:8]
