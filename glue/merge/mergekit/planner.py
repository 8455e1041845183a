"""The planner: makes targets of tensors one by one, and keeps what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch

from glue.checkpoint import Header
from glue.errors import GlueError, RecipeError
from glue.merge.engine import OUTPUTS
from glue.merge.leaf import Source as Merged
from glue.merge.mergekit.architecture import Architecture, Weight
from glue.merge.mergekit.binding import Binding
from glue.merge.mergekit.layout import Stretch
from glue.merge.mergekit.nouns import Config, Model, ModelRef, Source
from glue.merge.target import Input, Target


@dataclass
class Planner:
    """Plans the tensors of one config: `targets` by name, `missing` those that some models lack, `wrong`, `notes`."""

    config: Config
    opened: Mapping[ModelRef, Model]
    architecture: Architecture
    untie: bool
    targets: dict[str, Target] = field(default_factory=dict)
    wrong: list[GlueError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[tuple[str, list[Source]]] = field(default_factory=list)
    untied: bool = False

    def __post_init__(self) -> None:
        self.binding = Binding(self.config)
        self.merged = {ref: Merged(model.name, model.weights) for ref, model in self.opened.items()}

    def plan(self, made: Weight, weights: list[Weight], stretch: Stretch) -> None:
        """Make one tensor of the result a target, or say why it cannot be."""
        if made.name in self.targets:
            return
        own = [self._found(source, weight.names) for source, weight in zip(stretch.sources, weights, strict=True)]
        if made.optional and not any(own):
            return
        shared = [self._found(source, weight.tied) for source, weight in zip(stretch.sources, weights, strict=True)]
        names = [name or other for name, other in zip(own, shared, strict=True)]
        if not all(own) and any(own) and any(other for name, other in zip(own, shared, strict=True) if not name):
            self._tied(made, stretch.sources, own)
        lacking = [source for source, name in zip(stretch.sources, names, strict=True) if not name]
        if lacking and not made.optional:
            self.missing.append((made.name, lacking))
            return
        present = [(source, weight, name) for source, weight, name in zip(stretch.sources, weights, names, strict=True)
                   if name]
        if lacking:
            self.notes.append(f"'{made.name}' is not in {', '.join(str(source.model) for source in lacking)}; it is "
                              f"made of the others")
        inputs = {source.model: Input(self.merged[source.model], name) for source, _, name in present if name}
        if not self._alike(made, stretch, inputs):
            return
        try:
            bound = self.binding.bound(made.name, [(source.model, weight.name) for source, weight, _ in present],
                                       stretch, lacking=bool(lacking))
        except RecipeError as error:
            if error.place not in [known.place for known in self.wrong]:  # a wrong setting is wrong for many tensors
                self.wrong.append(error)
            return
        if bound is None:
            self.notes.append(f"'{made.name}' is left out: too few of the models have it")
            return
        choice, members, base = bound
        header = self._header(inputs)
        self.targets[made.name] = Target(made.name, header, choice, tuple(inputs[ref] for ref in members),
                                         inputs[base] if base else None)

    def converted(self) -> str:
        """Tensors that are missing: the reason to go through mergekit where transformers knows them by other names.

        All others become mistakes.
        """
        every = set(self.config.referenced())
        for name, lacking in self.missing:
            holders = [ref for ref in every if ref not in {source.model for source in lacking}]
            if not holders and self.architecture.name and not self.architecture.inferred and \
                    any(self._fused(name, self.opened[source.model]) for source in lacking):
                return (f"'{name}' of {self.architecture.name} is under other names in these files, and transformers "
                        f"has to convert them")
        for name, lacking in self.missing[:1]:
            more = f" ({len(self.missing)} tensors are missing)" if len(self.missing) > 1 else ""
            self.wrong.append(RecipeError(f"'{name}' is not in '{lacking[0].model}'{more}",
                                          place=self.config.place(*lacking[0].loc, "model"),
                                          fix="only models with the same tensors can be merged; drop the odd one"))
        return ""

    def _fused(self, name: str, model: Model) -> bool:
        """Whether experts are held one by one, or together, in a file where the list says otherwise."""
        return ".experts." in name and any(".experts." in other for other in model.weights.headers)

    def _found(self, source: Source, names: tuple[str, ...]) -> str | None:
        headers = self.opened[source.model].weights.headers
        return next((name for name in names if name in headers), None)

    def _tied(self, made: Weight, sources: tuple[Source, ...], own: list[str | None]) -> None:
        if self.untie:
            self.untied = True
            self.notes.append(f"'{made.name}' is read from the embedding where a model shares the two")
            return
        one = next(source for source, name in zip(sources, own, strict=True) if not name)
        other = next(source for source, name in zip(sources, own, strict=True) if name)
        self.wrong.append(RecipeError(f"'{one.model}' shares '{made.name}' with its embedding, and '{other.model}' has "
                                      f"one of its own", place=self.config.place(*one.loc, "model"), fix="merge models "
                                      "that are alike in this, or untie them with  --untie"))

    def _alike(self, made: Weight, stretch: Stretch, inputs: Mapping[ModelRef, Input]) -> bool:
        """Whether the inputs have one shape and one kind of numbers; says so where not."""
        (first, one), *others = inputs.items()
        for ref, other in [(first, one), *others]:
            loc = next((source.loc for source in stretch.sources if source.model == ref), ())
            problem = _unlike(one.header, other.header)
            if not problem:
                continue
            if problem == "shape" and self.config.tokenizer and made.vocabulary is not None:
                return True
            shapes = f"has the shape {one.header.shape} in '{first}' and {other.header.shape} in '{ref}'"
            rows = len(one.header.shape) == len(other.header.shape) and one.header.shape[1:] == other.header.shape[1:]
            if problem == "shape" and rows and (made.vocabulary == 0 or self._counts_tokens(ref, other)):
                what, fix = f"{shapes}: their vocabularies differ", "add  tokenizer: {source: union}  (or base)"
            elif problem == "shape":
                what, fix = shapes, "only models of one shape can be merged; drop the odd one"
            elif problem == "kind":
                what = f"holds {one.header.dtype} in '{first}' and {other.header.dtype} in '{ref}'"
                fix = "whole numbers are not averaged; drop the odd model"
            else:
                what = f"of '{ref}' is stored as {other.header.dtype}, whose scales stand elsewhere"
                fix = f"store it as {' or '.join(OUTPUTS)}"
            error = RecipeError(f"'{made.name}' {what}", place=self.config.place(*loc, "model"), fix=fix)
            if not any(known.place == error.place for known in self.wrong):
                self.wrong.append(error)
            return False
        return True

    def _counts_tokens(self, ref: ModelRef, one: Input) -> bool:
        """Whether a tensor has a row for each token of its model, for architectures without a list."""
        config = self.opened[ref].config
        return self.architecture.inferred and one.header.shape[0] == config.get(self.architecture.vocabulary_key)

    def _header(self, inputs: Mapping[ModelRef, Input]) -> Header:
        """The type that is asked for, or else one that holds every input; whole numbers stay what they are."""
        headers = [each.header for each in inputs.values()]
        dtype = reduce(torch.promote_types, (header.dtype for header in headers))
        asked = self.config.out_dtype or self.config.dtype
        return Header(OUTPUTS[asked] if asked and dtype.is_floating_point else dtype, headers[0].shape)


def _unlike(one: Header, other: Header) -> str:
    if other.dtype.is_floating_point and other.dtype not in OUTPUTS.values():
        return "scales"
    if one.shape != other.shape:
        return "shape"
    whole = not (one.dtype.is_floating_point and other.dtype.is_floating_point)
    return "kind" if whole and one.dtype != other.dtype else ""
