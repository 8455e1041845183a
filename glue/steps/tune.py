"""`step: tune`: a model taught more, in every weight or by a LoRA adapter."""

from __future__ import annotations

from typing import Any, Literal

from glue.family import Count, NonNegative, Positive
from glue.hub import locate
from glue.member import Member
from glue.steps import Job, Made, Shares, Tunable, steps
from glue.steps.pretrain import told


@steps.add("tune", makes="model", writes="one", holds="trains")
def tune(job: Job, *, base: Tunable, data: Shares, steps: Count, learning_rate: Positive, batch_size: Count = 64,
         weight_decay: NonNegative = 0.05, prompt_weight: NonNegative = 0.05) -> Made:
    """A full fine-tune of `base` on datasets in the given shares."""
    return _tuned(job, "model", base, data, None, steps=steps, learning_rate=learning_rate, batch_size=batch_size,
                  weight_decay=weight_decay, prompt_weight=prompt_weight)


@steps.add("lora", makes="adapter", writes="one", holds="trains", source="arXiv:2106.09685")
def lora(job: Job, *, base: Tunable, data: Shares, steps: Count, learning_rate: Positive, rank: Count = 8,
         alpha: Positive = 16.0, targets: list[str], batch_size: Count = 64, weight_decay: NonNegative = 0.0,
         prompt_weight: NonNegative = 0.05) -> Made:
    """A LoRA adapter over `base`, a PEFT folder: rank r, scale alpha / r, on the named linear layers."""
    return _tuned(job, "adapter", base, data, {"r": rank, "alpha": alpha, "targets": targets}, steps=steps,
                  learning_rate=learning_rate, batch_size=batch_size, weight_decay=weight_decay,
                  prompt_weight=prompt_weight)


def _tuned(job: Job, kind: Literal["model", "adapter"], base: Member, data: dict[Member, float],
           adapter: dict[str, Any] | None, **options: Any) -> Made:
    options |= {"seed": job.seed, "lora": adapter}
    job.workers.call("glue.steps.tune:work", job.folder, base, data, options, report=job.report)
    return Made(kind, base=base, note=f"{base.short} tuned for {options['steps']} steps on "
                                      f"{', '.join(member.short for member in data)}")


def work(folder, base: Member, data: dict[Member, float], options: dict[str, Any], report=None) -> None:
    """In a worker: train and write."""
    from glue.tune.finetune import finetune

    finetune(folder, base=locate(base.path), data=[(member.folder, share) for member, share in data.items()],
             **options, report=told(report))
