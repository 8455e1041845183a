"""Distillation: an ordinary model taught to say what another member says, whatever that member is made of.

    minimised: KL(softmax(teacher / temperature) || softmax(student / temperature)), place by place

The texts are those of datasets; teacher and student both read the right answers, and nothing is generated. There is no
factor temperature^2: AdamW would take it out again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.errors import MethodError
from glue.hub import locate
from glue.kinds import Running, load
from glue.kinds.proxy import one_vocabulary
from glue.kinds.text import longest
from glue.member import Member
from glue.tune.curve import Curve
from glue.tune.finetune import in_half
from glue.tune.items import Item
from glue.tune.kept import Kept
from glue.tune.loop import Course, Loss, Report, TrainsIn, train
from glue.tune.pretrain import save
from glue.tune.reading import Reading, Steps, read


def distill(out: Path, *, teacher: Member, student: Member, data: Sequence[tuple[Path, float]], steps: Steps,
            learning_rate: float, report: Report, temperature: float = 1.0, batch_size: int = 64,
            weight_decay: float = 0.0, prompt_weight: float = 0.05, seed: int = 0, device: str = "cpu",
            dtype: TrainsIn = "float32", course: Course = Course(),  # noqa: B008 - frozen, as the next one
            reading: Reading = Reading(), kept: Kept | None = None) -> Curve:  # noqa: B008
    """Teach every weight of `student` what `teacher` says of these datasets, and write the result into `out`.

    data         dataset folders and how much of the training is theirs, in any scale
    temperature  divides the logits of both; above 1 what is unlikely counts for more
    dtype        bfloat16: the teacher is held in it, the student calculates and is written in it
    kept         where the state is kept meanwhile

    Raises MethodError where their tokens differ, and GlueError for an empty dataset, an item that is too long, a loss
    that is no number.
    """
    known = one_vocabulary([teacher, student])
    half = in_half(locate(student.path), dtype)
    says = load(teacher, device=device, dtype="bfloat16" if half else "float32")
    learns = load(student, device=device)
    if says.choose is not None:
        raise MethodError(f"'{teacher.name}' is a mixture by text: it has no logits of its own",
                          fix="distil a mixture at another level, or one of the experts")
    limit = min(longest(running.model, running.tokenizer) for running in (says, learns))
    found = read(data, learns.tokenizer, limit, steps=steps, batch_size=batch_size, seed=seed, reading=reading,
                 kept=kept)
    model: Any = learns.model.requires_grad_(True)
    curve = train(model, found.batches, steps=found.steps, learning_rate=learning_rate, weight_decay=weight_decay,
                  prompt_weight=prompt_weight, report=report, loss=agreeing(asked(says), known.size, temperature),
                  course=replace(course, bfloat16=half), seed=seed, kept=kept)
    curve.left_out, curve.cut = found.left_out, found.cut
    save(model, learns.tokenizer, out, half=half)
    return curve


def agreeing(teacher: Callable[[list[Item], Tensor], Tensor], v: int, temperature: float = 1.0) -> Loss:
    """The loss of a student that shall agree with a teacher.

    teacher  (items, tokens [b, s]) -> logits [b, s, v or more]; tokens from v on are none and do not count
    """
    def loss(items: list[Item], tokens: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = (teacher(items, tokens[:, :-1])[..., :v].to(logits) / temperature).log_softmax(-1)
        return _Divergence.apply(logits[..., :v] / temperature, wanted)

    return loss


class _Divergence(torch.autograd.Function):
    """KL of the wanted log-probabilities from those of the logits, summed over tokens. [b, s, v], [b, s, v] -> [b, s]

    Its gradient is said and not derived: q - p, which is nothing where both are the same. Through log_softmax some
    rounding would be left, and AdamW makes whole steps of that.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor) -> Tensor:
        logs = logits.log_softmax(-1)
        p = wanted.exp()
        ctx.save_for_backward(logs.exp() - p)
        return (p * (wanted - logs)).nan_to_num(0.0).sum(-1)  # what is never said by either costs nothing

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        change, = ctx.saved_tensors
        return change * grads[0][..., None], None


def asked(running: Running) -> Callable[[list[Item], Tensor], Tensor]:
    """A member as a teacher; one that chooses experts by the prompt chooses them by the question alone."""
    def says(items: list[Item], tokens: Tensor) -> Tensor:
        model = running.model
        tokens = tokens.to(model.device)
        if running.route is None or running.pinned is None:
            return model(input_ids=tokens, use_cache=False).logits
        routes = running.route([item.tokens[:item.question] for item in items])
        found: list[Tensor] = [tokens] * len(items)
        for route in dict.fromkeys(routes):
            rows = [k for k, other in enumerate(routes) if other == route]
            with running.pinned(route):
                for k, logits in zip(rows, model(input_ids=tokens[rows], use_cache=False).logits, strict=True):
                    found[k] = logits
        return torch.stack(found)

    return says
