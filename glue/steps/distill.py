"""`step: distill`: an ordinary model that says what another member says, and that can be merged."""

from __future__ import annotations

from typing import Any

from glue.errors import MethodError
from glue.family import Count, Natural, NonNegative, Positive, Probability
from glue.member import Member
from glue.steps import Device, Job, Made, OneThatRuns, Shares, Tunable, steps
from glue.steps._training import LATER, UNKEYED, InDtype, Steps, anew, counted, trainable, trained
from glue.tune.items import Template, TooLong
from glue.tune.loop import Schedule


def agreeable(teacher: Member, student: Member, **_: Any) -> None:
    """Two members with the same tokens, neither of them by text."""
    from glue.kinds.proxy import by_text, one_vocabulary

    if by_text(teacher):
        raise MethodError(f"'{teacher.name}' is a mixture by text: it has no logits of its own",
                          fix="distil a mixture at another level, or one of the experts")
    one_vocabulary([teacher, student])


@steps.add("distill", makes="model", writes="one", holds="trains", resumes=True, unkeyed=UNKEYED, later=LATER,
           words=trainable, check=agreeable, source="arXiv:1503.02531")
def distill(job: Job, *, teacher: OneThatRuns, student: Tunable, data: Shares, steps: Steps, learning_rate: Positive,
            temperature: Positive = 1.0, batch_size: Count = 64, weight_decay: NonNegative = 0.0,
            prompt_weight: NonNegative = 0.05, schedule: Schedule = "cosine", warm_up: Probability = 0.05,
            accumulation: Count = 2, group_by_length: bool = False, max_length: Natural = 0,
            too_long: TooLong = "refuse", template: Template = "auto", dtype: InDtype = "float32",
            checkpointing: bool = False, device: Device = "cpu", save_every: NonNegative = 300.0) -> Made:
    """The student, taught in every weight to give the teacher's probabilities on the texts of datasets.

    teacher        whatever runs and has the student's tokens: a proxy, a mixture, a larger model
    temperature    divides the logits of both; above 1 what is unlikely counts for more
    prompt_weight  of the places of a question; those of answers count 1
    dtype          bfloat16: the teacher is held in it too

    All other parameters are those of `tune`.
    """
    options = {"steps": steps, "learning_rate": learning_rate, "temperature": temperature, "batch_size": batch_size,
               "weight_decay": weight_decay, "prompt_weight": prompt_weight, "schedule": schedule, "warm_up": warm_up,
               "accumulation": accumulation, "group_by_length": group_by_length, "max_length": max_length,
               "too_long": too_long, "template": template, "dtype": dtype, "checkpointing": checkpointing,
               "device": device, "save_every": save_every, "seed": job.seed}
    figures = job.workers.call("glue.steps.distill:work", job.folder, teacher, student, data, options,
                               report=job.report)
    return Made("model", base=student, told=figures,
                note=f"{student.short} taught for {counted(steps)} to say what {teacher.short} says on "
                     f"{', '.join(member.short for member in data)}{anew(figures)}")


def work(folder, teacher: Member, student: Member, data: dict[Member, float], options: dict[str, Any],
         report=None) -> dict[str, Any]:
    """In a worker: train and write. Returns what the journal says of it."""
    from glue.tune.distill import distill as taught

    about = {"teacher": teacher.digest, "student": student.digest,
             "data": [[member.digest, share] for member, share in data.items()]}
    return trained(folder, about, options, report, lambda **how: taught(
        folder, teacher=teacher, student=student, data=[(member.folder, share) for member, share in data.items()],
        **how))
