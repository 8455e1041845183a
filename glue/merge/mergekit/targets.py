"""Planning a merge config: which tensor of the result is made of which tensors, by which settings of the method.

Meant as mergekit's plan is: a setting of a source goes before one of its slice, of its module, and of the top level;
along the layers of a slice gradients go from t = 0 to 1; what stands before the layers is made as the first slice
says, and what stands behind them as the last does, both at t = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from glue.errors import GlueError, RecipeError
from glue.merge.engine import Merge, in_one_order
from glue.merge.mergekit.config import gathered
from glue.merge.mergekit.layout import architecture_of, changes, laid_out, place_of
from glue.merge.mergekit.nouns import Config, Model, ModelRef
from glue.merge.mergekit.planner import Planner
from glue.merge.target import Target

__all__ = ["Model", "Planned", "merge_of", "planned"]
IN_ORDER = ("linear", "task_arithmetic")  # their sums are mergekit's bit by bit, if they are summed in the same order


@dataclass(frozen=True)
class Planned:
    """A config, ready to be merged.

    targets     the tensors of the result
    through     why the work must go through mergekit itself, or ""; there are no targets then
    work        the type of the numbers, as in Merge; None for one that is wider than the output
    config      what becomes different in the donor's config.json; dots lead to inner keys
    donor       the model whose config, tokenizer and other files the result takes over
    models      all that were opened, in the order of `Config.referenced`
    keeps_order whether the members are summed in the order of the config; where not, `engine.in_one_order` orders them
    tagalong    further files of the donor that belong to its architecture
    """

    targets: list[Target]
    notes: tuple[str, ...]
    through: str
    work: torch.dtype | None
    config: dict[str, Any]
    donor: ModelRef
    models: list[Model]
    keeps_order: bool
    tagalong: tuple[str, ...] = ()


def planned(config: Config, open: Callable[[ModelRef], Model], *, untie: bool = False) -> Planned:
    """The targets of a config; reads headers and no weights.

    open   opens a model that the config names
    untie  where some members have a head of their own and others share it with their embedding, give all their own

    Raises RecipeError, or Mistakes of them, with the place in the config.
    """
    opened = _opened(config, open)
    architecture, notes = architecture_of(config, list(opened.values()))
    stretches = list(laid_out(config, architecture, opened))
    planner = Planner(config, opened, architecture, untie)
    for stretch in stretches:
        for made, weights in stretch.tensors:
            planner.plan(made, weights, stretch)
    through = f"it changes the vocabulary ('{config.tokenizer.loc[0]}')" if config.tokenizer else planner.converted()
    if planner.wrong and not through:
        raise gathered(planner.wrong)
    donor = config.base_model or config.referenced()[0]
    changed = changes(config, architecture, opened, stretches)
    targets = [] if through else list(planner.targets.values())
    if not targets and not through:
        raise RecipeError("nothing is made of these models", place=config.place(), fix="look at the names of their "
                          "tensors; none is that of their architecture")
    if planner.untied:
        changed["tie_word_embeddings"] = False
    dtype = config.out_dtype or config.dtype
    changed[_dtype_key(opened[donor].config)] = dtype or _dtype_of(targets)
    work = {"float32": torch.float32, "float64": torch.float64}.get(config.dtype)
    return Planned(targets, (*config.notes, *notes, *dict.fromkeys(planner.notes)), through, work,
                   {key: value for key, value in changed.items() if value is not None}, donor, list(opened.values()),
                   config.merge_method in IN_ORDER, architecture.tagalong)


def merge_of(plan: Planned, *, seed: int = 0, **how: Any) -> Merge:
    """The merge of a plan; `how` are further fields of Merge."""
    targets = {target.name: target for target in sorted(plan.targets, key=lambda target: target.name)}
    return Merge(targets if plan.keeps_order else in_one_order(plan.targets), seed, work=plan.work, **how)


def _opened(config: Config, open: Callable[[ModelRef], Model]) -> dict[ModelRef, Model]:
    found, wrong = {}, []
    for ref in config.referenced():
        try:
            found[ref] = open(ref)
        except GlueError as error:
            wrong.append(error.at(place_of(config, ref)))
    if wrong:
        raise gathered(wrong)
    return found


def _dtype_key(config: Mapping[str, Any]) -> str:
    return "torch_dtype" if "torch_dtype" in config else "dtype"


def _dtype_of(targets: list[Target]) -> str | None:
    """The type that most numbers of the result have."""
    counts: dict[torch.dtype, int] = {}
    for target in targets:
        if target.header.dtype.is_floating_point:
            counts[target.header.dtype] = counts.get(target.header.dtype, 0) + target.header.numel
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.") if counts else None
