"""`step: proxy`: a large member steered by what tuning has changed in a small one; no weight of it is touched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from glue.errors import MethodError, RecipeError
from glue.family import Field, NonNegative
from glue.files import write_aside
from glue.kinds import Place
from glue.member import Member
from glue.steps import Device, Job, Made, Measured, OnDev, One, OneThatRuns, RunsIn, steps

if TYPE_CHECKING:
    from glue.evaluate.suite import Item, Task
    from glue.kinds import Running

NOTE = "alpha.json"  # beside the pair: what every alpha came to on the dev items
Alpha = NonNegative | Annotated[list[NonNegative], Field(min_length=1)]


def sensible(alpha: Any, suite: Any, **_: Any) -> None:
    """Several alphas are compared on dev items, and one is not."""
    if isinstance(alpha, list) and suite is None:
        raise RecipeError("several values of alpha are compared on dev items",
                          fix="add  suite: NAME:dev, or give one number")
    if not isinstance(alpha, list) and suite is not None:
        raise RecipeError(f"alpha is {alpha}, so there is nothing to choose on dev items",
                          fix="leave suite out, or write  alpha: [0, 0.5, 1, 1.5]")


def fitting(large: Member, tuned: Member, small: Member | None = None, **_: Any) -> None:
    """A pair of one small model, with the tokens of the large member."""
    from glue.proxy.pair import refuse

    refuse(large, tuned, untuned(tuned, small))


def untuned(tuned: Member, small: Member | None) -> Member:
    """What the tuned member was before: as the recipe says, or what it sits on."""
    if small is None and tuned.base is None:
        raise MethodError(f"nothing says what '{tuned.name}' was tuned from", fix="add  small: <that model>")
    return small or tuned.base  # type: ignore[return-value]


@steps.add("proxy", makes="proxy", holds="runs", words=sensible, check=fitting, unkeyed=("device",), later=("dtype",),
           source="arXiv:2401.08565")
def proxy(job: Job, *, large: OneThatRuns, tuned: One, small: One | None = None, alpha: Alpha = 1.0,
          suite: OnDev | None = None, device: Device = "cpu", dtype: RunsIn = "float32") -> Made:
    """A member whose logits are large + alpha * (tuned - small).

    large  whatever runs and tells its logits; its weights are neither read nor needed
    small  the small model before it was tuned; what the tuned member sits on unless given
    alpha  how much of the change is added; of several, the one to which the suite's right answers are likeliest. Those
           are read and nothing is generated, so that the parts read them once for all alphas
    device, dtype  where the parts run when alphas are compared, and in what
    """
    before = untuned(tuned, small)
    given = alpha if isinstance(alpha, list) else [alpha]
    job.workers.call("glue.steps.proxy:work", job.folder, large, tuned, before, given, suite, job.place(device, dtype))
    told = json.loads((job.folder / NOTE).read_text()) if suite else {"alpha": given[0]}
    return Made("proxy", base=large, seen=frozenset(suite.digests().values()) if suite else frozenset(),
                note=f"{large.short} + {told['alpha']:g} x ({tuned.short} - {before.short})")


def work(folder: Path, large: Member, tuned: Member, small: Member, alphas: list[float],
         suite: Measured | None, place: Place) -> None:
    """In a worker: write the pair, judge the alphas where there are several, and write down which."""
    from glue.kinds.proxy import Pair
    from glue.proxy.pair import tell, write

    write(folder, large=large, tuned=tuned, small=small, alpha=alphas[0])
    if suite is not None:
        found = compared(Member("proxy", "proxy", str(folder), base=large), suite, alphas, place)
        tell(folder, replace(Pair.read(folder, "proxy"), alpha=found["alpha"]))
        write_aside(folder / NOTE, json.dumps(found, indent=1))


def compared(member: Member, suite: Measured, alphas: list[float], place: Place) -> dict[str, Any]:
    """What each alpha comes to on the suite: losses in nats a byte of right answers, and nats a token it moved.

    The first of the alphas with the least mean loss over tasks is chosen.
    """
    running = place.load(member)
    found = {task.name: judged(running, task, suite.items()[task.name], alphas) for task in suite.suite.tasks}
    lines: list[dict[str, Any]] = []
    for k, alpha in enumerate(alphas):
        tasks = {name: {word: values[k] for word, values in told.items()} for name, told in found.items()}
        lines.append({"alpha": alpha, **{word: sum(told[word] for told in tasks.values()) / len(tasks)
                                         for word in ("loss", "moved")}, "tasks": tasks})
    return {"alpha": min(lines, key=lambda line: line["loss"])["alpha"], "loss_in": "nats a byte of the right answer",
            "moved_in": "nats a token, KL(p || p_large)", "tried": lines}


def judged(running: Running, task: Task, items: Sequence[Item], alphas: list[float]) -> dict[str, list[float]]:
    """Means over items, by alpha: the loss of right answers, and how far the answer is from the large member's."""
    from glue.evaluate.fast import prepare
    from glue.evaluate.routes import by_route
    from glue.kinds.text import longest
    from glue.proxy.alpha import judged

    prepared = prepare(running.tokenizer, [replace(task, output="choice", metric="acc")],
                       {task.name: [item._replace(choices=(item.answer,), gold=0) for item in items]})
    seen, contexts, rows = longest(running.model, running.tokenizer), [], []
    for (place, k), in prepared.places[task.name]:
        row = prepared.rows[place]
        contexts.append(row.context)
        rows.append(((*(row.context + row.tail)[-seen:], row.lasts[k]), len(row.tail) + 1))
    parts: Any = running.model

    def run(some: list[Any]) -> list[Any]:
        found = judged(parts.apart, some, alphas, running.room)
        return list(zip(found.losses.T.tolist(), found.moved.T.tolist(), strict=True))

    found = by_route(running, contexts, rows, run, seen)
    sizes = [len(f" {item.answer}".encode()) for item in items]
    return {"loss": [sum(losses[k] / size for (losses, _), size in zip(found, sizes, strict=True)) / len(items)
                     for k in range(len(alphas))],
            "moved": [sum(moved[k] for _, moved in found) / len(items) for k in range(len(alphas))]}
