"""`step: pretrain`: a new Llama model from datasets alone."""

from __future__ import annotations

from typing import Any

from glue.family import Count, NonNegative, Positive, Probability
from glue.member import Member
from glue.steps import Datasets, Device, Job, Made, Shares, steps
from glue.steps._training import LATER, UNKEYED, InDtype, Steps, anew, counted, trainable, trained
from glue.tune.items import TooLong
from glue.tune.loop import Schedule


@steps.add("pretrain", makes="model", resumes=True, unkeyed=UNKEYED,
           later=tuple(word for word in LATER if word not in ("max_length", "template")), words=trainable)
def pretrain(job: Job, *, data: Shares, vocabulary: Datasets, architecture: dict[str, Any], steps: Steps,
             learning_rate: Positive, batch_size: Count = 64, weight_decay: NonNegative = 0.05,
             prompt_weight: NonNegative = 0.05, schedule: Schedule = "cosine", warm_up: Probability = 0.05,
             accumulation: Count = 2, group_by_length: bool = False, too_long: TooLong = "refuse",
             dtype: InDtype = "float32", checkpointing: bool = False, device: Device = "cpu",
             save_every: NonNegative = 300.0) -> Made:
    """A Llama model and its tokenizer, trained on datasets in the given shares.

    vocabulary     datasets whose words become tokens; models that shall be merged or mixed name the same ones
    architecture   fields of LlamaConfig
    prompt_weight  of the loss on question tokens; answers count 1

    All other parameters are those of `tune`.
    """
    options = {"architecture": architecture, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size,
               "weight_decay": weight_decay, "prompt_weight": prompt_weight, "schedule": schedule, "warm_up": warm_up,
               "accumulation": accumulation, "group_by_length": group_by_length, "too_long": too_long, "dtype": dtype,
               "checkpointing": checkpointing, "device": device, "save_every": save_every, "seed": job.seed}
    figures = job.workers.call("glue.steps.pretrain:work", job.folder, data, vocabulary, options, report=job.report)
    return Made("model", note=f"pretrained for {counted(steps)} on {', '.join(member.short for member in data)}"
                              f"{anew(figures)}", told=figures)


def work(folder, data: dict[Member, float], vocabulary: list[Member], options: dict[str, Any],
         report=None) -> dict[str, Any]:
    """In a worker: train and write. Returns what the journal says of it."""
    from glue.tune.pretrain import pretrain as train

    about = {"data": [[member.digest, share] for member, share in data.items()],
             "vocabulary": [member.digest for member in vocabulary]}
    return trained(folder, about, options, report, lambda **how: train(
        folder, data=[(member.folder, share) for member, share in data.items()],
        vocabulary=[member.folder for member in vocabulary], **how))
