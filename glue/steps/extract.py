"""`step: extract`: what a model changes of its base, as a LoRA adapter over that base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from glue.errors import MethodError, did_you_mean
from glue.family import Count, Share, families
from glue.files import write_aside
from glue.member import Member
from glue.steps import Job, Made, One, Tunable, steps
from glue.steps.merge import cut_to, source_of, sources_of, told_base
from glue.workers import Report

if TYPE_CHECKING:
    from glue.merge.factors import Factors, Keep

NAMED = 3  # of the tensors that are left out, in the note


def sensible(rank: int | None = None, energy: float | None = None, error: float | None = None, **_: Any) -> None:
    """Something has to be said of how much is kept."""
    if rank is None and energy is None and error is None:
        raise MethodError("nothing says how much of the change is kept",
                          fix="add  rank: 16,  or  energy: 0.99,  or  error: 0.05")


def of_one_shape(model: Member, base: Member, targets: list[str] | None = None, **_: Any) -> None:
    """The same tensors in both, and layers of these names; from headers alone."""
    from glue.merge.engine import check

    check(families("merging")["linear"].bind(), sources_of([model, base]))
    names = source_of(base).weights.headers  # type: ignore[union-attr]
    layers = {name.removesuffix(".weight") for name, header in names.items()
              if name.endswith(".weight") and len(header.shape) == 2}
    for target in targets or ():
        if not any(meant(layer, [target]) for layer in layers):
            known = {layer.rsplit(".", 1)[-1] for layer in layers}
            raise MethodError(f"'{base.name}' has no layer '{target}'{did_you_mean(target, known)}",
                              fix="name linear layers, such as q_proj and v_proj, or leave targets out for all")


@steps.add("extract", makes="adapter", writes="one", holds="matrices", words=sensible, check=of_one_shape,
           source="arXiv:2106.09685")
def extract(job: Job, *, model: One, base: Tunable, rank: Count | None = None, energy: Share | None = None,
            error: Share | None = None, targets: list[str] | None = None,
            dtype: Literal["float32", "bfloat16", "float16"] = "float32") -> Made:
    """A LoRA adapter over `base` that makes of it what `model` is, as nearly as its rank allows.

    rank     the most of each layer
    energy   the least share of the squared singular values of each layer's change that is kept
    error    the most that may be lost of each layer's change, in units of its Frobenius norm
    targets  linear layers, by their names or the ends of these; all but the head unless given
    dtype    of the factors
    """
    from glue.merge.engine import OUTPUTS
    from glue.merge.factors import Keep
    from glue.merge.lora_folder import NOTE, About, write_folder

    layers = job.workers.call("glue.steps.extract:linear", base)
    if not layers:
        raise MethodError(f"'{base.name}' has no linear layers that a LoRA could change: its architecture has other "
                          f"ones, or its files call them by other names", fix="keep the model as it is")
    chosen = [layer for layer in layers if targets is None or meant(layer, targets)]
    if lacking := [target for target in targets or () if not any(meant(layer, [target]) for layer in layers)]:
        raise MethodError(f"'{lacking[0]}' is no linear layer of '{base.name}', so no LoRA can change it",
                          fix=f"leave it out; linear are {', '.join(sorted({end(layer) for layer in layers}))}")
    done = 0

    def one_more(*_: object) -> None:
        nonlocal done
        done += 1
        job.report(done, len(chosen), "layers")

    shapes = {layer: source_of(base).weights.headers[f"{layer}.weight"].shape  # type: ignore[union-attr]
              for layer in chosen}
    hands = deal(shapes, max(1, job.workers.number))
    found = {layer: one for part in job.workers.map("glue.steps.extract:cut", [
        (model, base, hand, Keep(rank, energy, error), dtype) for hand in hands], report=one_more)
        for layer, one in part.items()}
    changes = {layer: (found[layer],) for layer in chosen if layer in found}
    if not changes:
        raise MethodError(f"'{model.name}' changes nothing of '{base.name}' in the layers that are asked for",
                          fix="name other targets, or the base that it was tuned from")
    left = job.workers.call("glue.steps.extract:left_out", model, base, [f"{layer}.weight" for layer in changes])
    short = sorted({end(layer) for layer in changes})
    whole = set(changes) == {layer for layer in layers if end(layer) in short}
    folder, revision = told_base(base)
    write_folder(job.folder, changes, About(folder, revision, short if whole else ()), dtype=OUTPUTS[dtype])
    note = job.folder / NOTE
    write_aside(note, json.dumps({**json.loads(note.read_text()), "left_out": left}, indent=1))
    return Made("adapter", base=base, note=f"{model.short} as a change of {base.short}{told(note)}")


def told(note: Path) -> str:
    """How much of the change is kept, and what is left out, in words."""
    found = json.loads(note.read_text())
    left = found["left_out"]
    missing = sqrt(sum(away**2 for away in left.values()))
    total = found["norm"]**2 + missing**2
    kept = 1 - (found["error"]**2 + missing**2) / total
    words = f", {cut_to(found)}, keeps {kept:.2%} of its squared norm"
    if left:
        names = ", ".join(sorted(left, key=lambda name: (-left[name], name))[:NAMED])
        words += (f"; left out: {len(left)} tensors with {missing**2 / total:.2%} of it ({names}"
                  f"{', ...' if len(left) > NAMED else ''})")
    return words


def end(layer: str) -> str:
    """The last part of a layer's name."""
    return layer.rsplit(".", 1)[-1]


def meant(layer: str, targets: list[str]) -> bool:
    """Whether one of these words is the layer's name, or the end of it, as peft takes them."""
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def linear(base: Member) -> list[str]:
    """In a worker: the linear layers of a model whose weights are in its files under their own names."""
    from glue.kinds import weights
    from glue.kinds.lora import linear_layers

    headers = weights(base).headers
    return [layer for layer in linear_layers(base) if f"{layer}.weight" in headers]


def deal(shapes: Mapping[str, tuple[int, ...]], workers: int) -> list[list[str]]:
    """Layers in parts that are gone through at once: as many as there are workers, or as have room in memory."""
    from glue.merge.extract import HELD, held

    number = max(1, min(workers, len(shapes), HELD // max(held((m, n)) for m, n in shapes.values())))
    return [list(shapes)[k::number] for k in range(number)]


def cut(model: Member, base: Member, layers: list[str], keep: Keep, dtype: str,
        report: Report = lambda done, total, note: None) -> dict[str, Factors]:
    """In a worker: the changes of some layers, rounded to the type in which they are written; none of what is equal."""
    from dataclasses import replace

    from glue.kinds import weights
    from glue.merge.engine import OUTPUTS
    from glue.merge.extract import change

    made = {}
    for k, layer in enumerate(layers):
        # opened anew for each, so that its pages go with it
        found = change(weights(model), weights(base), layer, keep)
        if found is not None:
            made[layer] = replace(found, a=found.a.to(OUTPUTS[dtype]), b=found.b.to(OUTPUTS[dtype]))
        report(k + 1, len(layers), layer)
    return made


def left_out(model: Member, base: Member, taken: list[str]) -> dict[str, float]:
    """In a worker: the norm of the change of every other tensor that has one."""
    from glue.kinds import weights
    from glue.merge.extract import changed

    below = weights(base)
    return changed(weights(model), below, [name for name, header in below.headers.items()
                                           if name not in taken and header.dtype.is_floating_point])
