"""What the steps that train have in common: words, a state while they work, and the curve that they leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from glue.errors import GlueError, MethodError, one_line
from glue.family import Count, Positive
from glue.member import canonical
from glue.steps import Wide
from glue.tune.curve import Curve
from glue.tune.kept import Kept
from glue.tune.loop import Course, TrainsIn
from glue.tune.reading import Reading

Steps = Count | dict[Literal["epochs"], Positive]
InDtype = Annotated[TrainsIn, Wide("dtype")]
COURSE, READING = ("accumulation", "schedule", "warm_up"), ("max_length", "too_long", "template", "group_by_length")
UNKEYED = ("device", "checkpointing", "save_every")  # tests hold that no bit depends on them
LATER = ("dtype", *COURSE, *READING)
STATE = "state"  # in the draft of a step, while it trains


def trainable(device: str, steps: Any, **_: Any) -> None:
    """A device that this machine has, and a number of steps or of epochs."""
    from glue.kinds.device import device_of

    device_of(device)
    if steps == {}:
        raise MethodError("steps are a number, or  {epochs: ...}", fix="write  steps: 100  or  steps: {epochs: 3}")


def counted(steps: Any) -> str:
    """How long a training takes, in words."""
    return f"{steps['epochs']:g} epochs" if isinstance(steps, dict) else f"{steps} steps"


def trained(folder: Path, about: Mapping[str, Any], options: Mapping[str, Any], report: Any,
            teach: Callable[..., Curve]) -> dict[str, Any]:
    """In a worker: train, leave the curve beside the product, and return what the journal says of it.

    about    digests of everything that is read
    options  of the step; those that are of the course or of reading are gathered
    teach    trains and writes into `folder`: it is given the other options, and course, reading, report and kept
    """
    keyed = {name: value for name, value in options.items() if name not in UNKEYED}
    key = sha256(canonical({"about": about, "options": keyed}).encode()).hexdigest()
    kept = Kept(folder / STATE, key, options["save_every"])
    plain = {name: value for name, value in options.items() if name not in (*COURSE, *READING, *UNKEYED)}
    course = Course(**{name: options[name] for name in COURSE}, checkpointing=options["checkpointing"])
    reading = Reading(**{name: options[name] for name in READING if name in options})
    try:
        curve = teach(**plain, device=options["device"], course=course, kept=kept, report=told(report),
                      reading=reading)
    except torch.OutOfMemoryError as problem:
        raise GlueError(f"{options['device']} has too little memory: {one_line(str(problem), 120)}",
                        fix="say  dtype: bfloat16,  teach an adapter (step: lora), or choose another device") from None
    curve.write(folder)
    kept.end()
    return curve.figures()


def anew(figures: Mapping[str, Any]) -> str:
    """What is added to the note of a product whose training could not go on where an earlier run had been."""
    return f"; from its beginning: the state that an earlier run had left was not used, since {figures['unused']}" \
        if figures.get("unused") else ""


def told(report: Any) -> Callable[[int, int, float], None]:
    """A training loop's (step, steps, loss) as progress."""
    return lambda step, steps, loss: report(step, steps, f"loss {loss:.3f}") if report else None
