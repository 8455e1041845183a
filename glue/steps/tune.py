"""`step: tune`: a model taught more, in every weight or by a LoRA adapter."""

from __future__ import annotations

from typing import Any, Literal

from glue.family import Count, Natural, NonNegative, Positive, Probability
from glue.hub import locate
from glue.member import Member
from glue.steps import Device, Job, Made, Shares, Tunable, steps
from glue.steps._training import LATER, UNKEYED, InDtype, Steps, anew, counted, trainable, trained
from glue.tune.items import Template, TooLong
from glue.tune.loop import Schedule


@steps.add("tune", makes="model", writes="one", holds="trains", resumes=True, unkeyed=UNKEYED, later=LATER,
           words=trainable)
def tune(job: Job, *, base: Tunable, data: Shares, steps: Steps, learning_rate: Positive, batch_size: Count = 64,
         weight_decay: NonNegative = 0.05, prompt_weight: NonNegative = 0.05, schedule: Schedule = "cosine",
         warm_up: Probability = 0.05, accumulation: Count = 2, group_by_length: bool = False, max_length: Natural = 0,
         too_long: TooLong = "refuse", template: Template = "auto", dtype: InDtype = "float32",
         checkpointing: bool = False, device: Device = "cpu", save_every: NonNegative = 300.0) -> Made:
    """A full fine-tune of `base` on datasets in the given shares. One that was killed goes on after its last state.

    steps            how many, or  {epochs: 3}: so many that each item comes three times, where there is one dataset
    batch_size       items of a step, however they are read
    prompt_weight    of the loss on question tokens; answers count 1. In a chat, what the assistant says counts alone
    schedule         of the learning rate after its warm-up: cosine and linear come down to a twentieth
    warm_up          share of the steps in which it rises
    accumulation     pieces of a batch that are read one after the other, their gradients summed; where the memory of a
                     device runs out they are halved, and bits may differ from those of a larger one
    group_by_length  batches of items of like lengths, so that less is padding
    max_length       the most tokens of an item; 0: as many as the base takes
    too_long         longer ones: refuse them, cut off what is too much, or drop them; the curve tells how many
    template         chat: items are conversations as the base's chat template renders them; auto: those of datasets
                     that keep turns are, where the base has one; plain: question and answer with a space between
    dtype            bfloat16: layers calculate in it and the result is written in it; weights that train, gradients and
                     moments stay in fp32. auto: where the base's files hold 16 bits a number
    checkpointing    calculate what layers give again where it is needed, and do not hold it: the same bits from less
                     memory in about a third more time
    save_every       seconds from one state in the draft to the next, of which a kill costs no more; more where writing
                     one would take over a tenth of the time; 0: after every step
    """
    return _tuned(job, "model", base, data, None, steps=steps, learning_rate=learning_rate, batch_size=batch_size,
                  weight_decay=weight_decay, prompt_weight=prompt_weight, schedule=schedule, warm_up=warm_up,
                  accumulation=accumulation, group_by_length=group_by_length, max_length=max_length, too_long=too_long,
                  template=template, dtype=dtype, checkpointing=checkpointing, device=device, save_every=save_every)


@steps.add("lora", makes="adapter", writes="one", holds="trains", resumes=True, unkeyed=UNKEYED,
           later=(*LATER, "dropout", "rslora"), words=trainable, source="arXiv:2106.09685")
def lora(job: Job, *, base: Tunable, data: Shares, steps: Steps, learning_rate: Positive, rank: Count = 8,
         alpha: Positive = 16.0, targets: list[str], batch_size: Count = 64, weight_decay: NonNegative = 0.0,
         prompt_weight: NonNegative = 0.05, dropout: Probability = 0.0, rslora: bool = False,
         schedule: Schedule = "cosine", warm_up: Probability = 0.05, accumulation: Count = 2,
         group_by_length: bool = False, max_length: Natural = 0, too_long: TooLong = "refuse",
         template: Template = "auto", dtype: InDtype = "float32", checkpointing: bool = False, device: Device = "cpu",
         save_every: NonNegative = 300.0) -> Made:
    """A LoRA adapter over `base`, a PEFT folder: rank r, scale alpha / r, on the named linear layers.

    targets  names of layers, such as q_proj; or  [all-linear]: all that are linear, but the head
    dropout  share of what goes into the adapter that is set to zero at each step, at random
    rslora   scale alpha / sqrt(r)
    dtype    bfloat16: the base is held and calculates in it; the adapter trains and is written in fp32

    All other parameters are those of `tune`.
    """
    return _tuned(job, "adapter", base, data, {"r": rank, "alpha": alpha, "targets": targets, "dropout": dropout,
                                               "rslora": rslora},
                  steps=steps, learning_rate=learning_rate, batch_size=batch_size, weight_decay=weight_decay,
                  prompt_weight=prompt_weight, schedule=schedule, warm_up=warm_up, accumulation=accumulation,
                  group_by_length=group_by_length, max_length=max_length, too_long=too_long, template=template,
                  dtype=dtype, checkpointing=checkpointing, device=device, save_every=save_every)


def _tuned(job: Job, kind: Literal["model", "adapter"], base: Member, data: dict[Member, float],
           adapter: dict[str, Any] | None, **options: Any) -> Made:
    options |= {"seed": job.seed, "lora": adapter}
    figures = job.workers.call("glue.steps.tune:work", job.folder, base, data, options, report=job.report)
    return Made(kind, base=base, note=f"{base.short} tuned for {counted(options['steps'])} on "
                                      f"{', '.join(member.short for member in data)}{anew(figures)}", told=figures)


def work(folder, base: Member, data: dict[Member, float], options: dict[str, Any], report=None) -> dict[str, Any]:
    """In a worker: train and write. Returns what the journal says of it."""
    from glue.tune.finetune import finetune

    about = {"base": base.digest, "data": [[member.digest, share] for member, share in data.items()]}
    return trained(folder, about, options, report, lambda **how: finetune(
        folder, base=locate(base.path), data=[(member.folder, share) for member, share in data.items()], **how))
