"""`step: distill`: an ordinary model that says what another member says, and that can be merged."""

from __future__ import annotations

from typing import Any

from glue.errors import MethodError
from glue.family import Count, NonNegative, Positive
from glue.member import Member
from glue.steps import Job, Made, OneThatRuns, Shares, Tunable, steps
from glue.steps.pretrain import told


def agreeable(teacher: Member, student: Member, **_: Any) -> None:
    """Two members with the same tokens, neither of them by text."""
    from glue.kinds.proxy import by_text, one_vocabulary

    if by_text(teacher):
        raise MethodError(f"'{teacher.name}' is a mixture by text: it has no logits of its own",
                          fix="distil a mixture at another level, or one of the experts")
    one_vocabulary([teacher, student])


@steps.add("distill", makes="model", writes="one", holds="trains", check=agreeable, source="arXiv:1503.02531")
def distill(job: Job, *, teacher: OneThatRuns, student: Tunable, data: Shares, steps: Count, learning_rate: Positive,
            temperature: Positive = 1.0, batch_size: Count = 64, weight_decay: NonNegative = 0.0,
            prompt_weight: NonNegative = 0.05) -> Made:
    """The student, taught in every weight to give the teacher's probabilities on the texts of datasets.

    teacher        whatever runs and has the student's tokens: a proxy, a mixture, a larger model
    temperature    divides the logits of both; above 1 what is unlikely counts for more
    prompt_weight  of the places of a question; those of answers count 1
    """
    options = {"steps": steps, "learning_rate": learning_rate, "temperature": temperature, "batch_size": batch_size,
               "weight_decay": weight_decay, "prompt_weight": prompt_weight, "seed": job.seed}
    job.workers.call("glue.steps.distill:work", job.folder, teacher, student, data, options, report=job.report)
    return Made("model", base=student, note=f"{student.short} taught for {steps} steps to say what {teacher.short} "
                                            f"says on {', '.join(member.short for member in data)}")


def work(folder, teacher: Member, student: Member, data: dict[Member, float], options: dict[str, Any],
         report=None) -> None:
    """In a worker: train and write."""
    from glue.tune.distill import distill as taught

    taught(folder, teacher=teacher, student=student,
           data=[(member.folder, share) for member, share in data.items()], **options, report=told(report))
