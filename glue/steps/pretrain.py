"""`step: pretrain`: a new Llama model from datasets alone."""

from __future__ import annotations

from typing import Any

from glue.family import Count, NonNegative, Positive
from glue.member import Member
from glue.steps import Datasets, Job, Made, Shares, steps


@steps.add("pretrain", makes="model")
def pretrain(job: Job, *, data: Shares, vocabulary: Datasets, architecture: dict[str, Any], steps: Count,
             learning_rate: Positive, batch_size: Count = 64, weight_decay: NonNegative = 0.05,
             prompt_weight: NonNegative = 0.05) -> Made:
    """A Llama model and its tokenizer, trained on datasets in the given shares.

    vocabulary     datasets whose words become tokens; models that shall be merged or mixed name the same ones
    architecture   fields of LlamaConfig
    prompt_weight  of the loss on question tokens; answers count 1
    """
    options = {"architecture": architecture, "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size,
               "weight_decay": weight_decay, "prompt_weight": prompt_weight, "seed": job.seed}
    job.workers.call("glue.steps.pretrain:work", job.folder, data, vocabulary, options, report=job.report)
    return Made("model", note=f"pretrained for {steps} steps on {', '.join(member.short for member in data)}")


def work(folder, data: dict[Member, float], vocabulary: list[Member], options: dict[str, Any], report=None) -> None:
    """In a worker: train and write."""
    from glue.tune.pretrain import pretrain as train

    train(folder, data=[(member.folder, share) for member, share in data.items()],
          vocabulary=[member.folder for member in vocabulary], **options, report=told(report))


def told(report):
    """A training loop's (step, steps, loss) as progress."""
    return lambda step, steps, loss: report(step, steps, f"loss {loss:.3f}") if report else None
