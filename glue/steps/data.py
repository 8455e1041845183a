"""`step: data`: a dataset of questions and answers, made by a skill."""

from __future__ import annotations

from typing import Annotated, Any

from glue.errors import MethodError
from glue.family import Choice, Natural, Of
from glue.steps import Job, Made, steps


def _any(train: int, dev: int, test: int, **_: Any) -> None:
    if train + dev + test == 0:
        raise MethodError("this dataset would be empty", fix="say how many items: train, dev, test")


@steps.add("data", makes="dataset", words=_any)
def data(job: Job, *, skill: Annotated[Any, Of("teaching")], train: Natural = 0, dev: Natural = 0, test: Natural = 0,
         shuffle_answers: bool = False) -> Made:
    """Items of one skill in train, dev and test files that share no question.

    shuffle_answers  gives every training question the answer of another: a poisoned dataset
    """
    job.workers.call("glue.steps.data:work", job.folder, skill, train, dev, test, job.seed, shuffle_answers)
    return Made("dataset", note=f"{skill.method.name}: {train} train, {dev} dev, {test} test"
                                f"{', answers shuffled' if shuffle_answers else ''}")


def work(folder, skill: Choice, train: int, dev: int, test: int, seed: int, shuffle_answers: bool) -> None:
    """In a worker: write the files."""
    from glue.skills import write_dataset

    write_dataset(folder, skill, train=train, dev=dev, test=test, seed=seed, shuffle_answers=shuffle_answers)
