"""The merge engine for adapters: LoRA folders of one base into one, layer by layer, their products never made.

Methods in the space of factors see one linear layer of all members. What they read of the files is mapped, not loaded;
a sum that stands side by side is written member by member, so that memory does not grow with the number of members.
Members are put into one order first, so that the result has the same bits whatever order they came in.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.checkpoint import Checkpoint, Header, weights_digest
from glue.errors import CheckpointError, MethodError
from glue.family import Choice
from glue.kinds.lora import Adapter
from glue.member import canonical
from glue.merge.engine import OUTPUTS, check_count
from glue.merge.factors import Factors, distance, gram, norm, stacked, weighted
from glue.merge.leaf import Leaf
from glue.merge.lora_folder import About, Kept, write_folder
from glue.merge.parameters import by_member, settled, whole
from glue.merge.target import PIECE

# Keys of a configuration that a result takes over where all members say the same; together, those that name layers.
WHICH = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
SAID = ("task_type", "bias", "modules_to_save", "fan_in_fan_out")
LAYERS = ".layers"  # in the folder, while it is made: the layers that were computed


@dataclass(frozen=True)
class Update:
    """An adapter as merging sees it: a name, and what is in its folder."""

    name: str
    adapter: Adapter

    def factors(self, module: str, shape: tuple[int, int]) -> Factors:
        """Its change of one layer [m, n], as stored; of rank 0 where it does not change that layer."""
        if module not in self.adapter.modules:
            return Factors(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))
        return Factors(*self.adapter.factors(module), self.adapter.scale(module))

    def check_numbers(self) -> None:
        """Raise CheckpointError where a number is not finite; reads everything."""
        for module in self.adapter.modules:
            for side, tensor in zip("AB", self.adapter.factors(module), strict=True):
                if not tensor.sum(dtype=torch.float64).isfinite():
                    raise CheckpointError(f"'{module}' of '{self.name}' has numbers in its {side} that are not finite",
                                          fix="leave that adapter out, or train it again")


def check(choice: Choice, updates: Sequence[Update]) -> None:
    """Raise MethodError or CheckpointError for whatever would stop this merge; reads headers and no weights."""
    method = choice.method
    if method.traits["space"] != "factors":
        raise MethodError(f"merge method '{method.name}' does not work on factors",
                          fix=f"use {', '.join(_of_factors(method.family))}, or merge the adapters as models")
    check_count(choice, len(updates))
    for update in updates:
        if update.adapter.stretched:
            raise MethodError(f"'{update.name}' is a DoRA adapter: its change is no product of factors, so "
                              f"'{method.name}' cannot add it to others",
                              fix="merge it as a model (linear, ties, ...), or make a LoRA of it first (step: extract)")
    _check_shapes(updates)
    weights = by_member(choice, [update.name for update in updates]).get("weight")
    if weights:
        whole(torch.tensor(weights, dtype=torch.float64))
    tried: set[tuple[int, ...]] = set()
    for module in _modules(updates):  # zeros of the ranks that will come, so that what is refused is refused now
        ranks = tuple(update.adapter.rank(module) if module in update.adapter.modules else 0 for update in updates)
        if ranks not in tried:
            parts = tuple(Factors(torch.zeros(rank, 1), torch.zeros(1, rank)) for rank in ranks)
            _called(choice, [update.name for update in updates], module, parts)
        tried.add(ranks)


def _of_factors(family: str) -> list[str]:
    from glue.family import families

    return [method.name for method in families(family) if method.traits["space"] == "factors"]


def _check_shapes(updates: Sequence[Update]) -> None:
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for update in updates:
        own: dict[str, tuple[int, ...]] = {module: update.adapter.shape(module) for module in update.adapter.modules}
        own |= {name: update.adapter.tensors.headers[stored].shape for name, stored in update.adapter.replaced.items()}
        for name, shape in own.items():
            before, whose = shapes.setdefault(name, (shape, update.name))
            if before != shape:
                raise CheckpointError(f"'{name}' is {before} in '{whose}' and {shape} in '{update.name}'; only "
                                      f"adapters of one base can be merged", fix="drop the odd one")
    first = updates[0]
    for update in updates:
        if update.adapter.transposed != first.adapter.transposed:
            raise CheckpointError(f"'{first.name}' and '{update.name}' disagree on whether weights stand [in, out] "
                                  f"(fan_in_fan_out), so they are not adapters of one base", fix="drop the odd one")
        odd = sorted(set(update.adapter.replaced) ^ set(first.adapter.replaced))
        if odd:
            has, lacks = (update, first) if odd[0] in update.adapter.replaced else (first, update)
            raise CheckpointError(f"'{has.name}' brings its own '{odd[0]}', and '{lacks.name}' does not",
                                  fix="drop the odd one, or merge them as models (linear, ties, ...)")


@dataclass(frozen=True)
class Combination:
    """A merge of adapters that was checked, with its members in the order in which they are summed."""

    choice: Choice
    updates: tuple[Update, ...]

    @property
    def modules(self) -> list[str]:
        """The layers that any member changes, sorted."""
        return _modules(self.updates)

    @property
    def weights(self) -> Tensor:
        """The members' shares of what is averaged, [n], which sum to 1."""
        row = by_member(self.choice, [update.name for update in self.updates]).get("weight", [1.0] * len(self.updates))
        found = torch.tensor(row, dtype=torch.float64)
        return found / whole(found)

    def change(self, module: str) -> tuple[Factors, ...]:
        """The merged change of one layer: several that are meant side by side, or one."""
        parts = changes_of(self.updates, module)
        return _called(self.choice, [update.name for update in self.updates], module, parts)

    def kept(self) -> dict[str, Kept]:
        """What is no factor, biases and saved modules: the weighted mean of the members' own; by name in the file."""
        found = {}
        for name, stored in self.updates[0].adapter.replaced.items():
            headers = [update.adapter.tensors.headers[update.adapter.replaced[name]] for update in self.updates]
            dtype = reduce(torch.promote_types, (header.dtype for header in headers))
            found[stored] = Kept(Header(dtype, headers[0].shape), partial(self._mean, name, dtype))
        return found

    def _mean(self, name: str, dtype: torch.dtype) -> Iterator[Tensor]:
        flat = [update.adapter.tensors[update.adapter.replaced[name]].reshape(-1) for update in self.updates]
        for start in range(0, len(flat[0]), PIECE):
            total = torch.zeros(min(PIECE, len(flat[0]) - start), dtype=torch.float64)
            for tensor, share in zip(flat, self.weights, strict=True):
                total.add_(tensor[start:start + PIECE].double(), alpha=float(share))
            if not total.sum().isfinite():
                raise CheckpointError(f"'{name}' of one of the adapters has numbers that are not finite",
                                      fix="leave that adapter out, or train it again")
            yield total.to(dtype)


def combination(choice: Choice, updates: Sequence[Update]) -> Combination:
    """Check a merge, and put the members of a symmetric method into an order of their own."""
    check(choice, updates)
    rows = by_member(choice, [update.name for update in updates])
    order = list(range(len(updates)))
    if choice.method.traits.get("symmetric"):
        keys = [(update.adapter.fingerprint, *(row[k] for row in rows.values())) for k, update in enumerate(updates)]
        # A fingerprint samples: unlike members can share one, and then only the digest tells them apart.
        ties = [weights_digest(update.adapter.tensors) if keys.count(key) > 1 else ""
                for update, key in zip(updates, keys, strict=True)]
        order.sort(key=lambda k: (keys[k], ties[k]))
    in_order = {word: [row[k] for k in order] for word, row in rows.items()}
    return Combination(Choice(choice.method, {**choice.params, **in_order}), tuple(updates[k] for k in order))


def combine(choice: Choice, updates: Sequence[Update], folder: Path, *, base: str, revision: str | None = None,
            dtype: str = "float32", report: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Merge adapters of one base into one, an ordinary folder of peft's, and return the digest of its weights.

    base   what the configuration names as the model below: an id on the hub, of a revision, or a folder
    dtype  of the factors
    Raises MethodError or CheckpointError for what cannot be merged. The same call goes on from what a killed one has
    written. What was cut off lies in factors.json.
    """
    made = combination(choice, updates)
    for update in updates:  # before anything is held: copies made in passing would leave holes between what is
        update.check_numbers()
    key = hashlib.sha256(canonical([made.choice.spelled(), dtype, [
        weights_digest(update.adapter.tensors) + update.adapter.told for update in made.updates]]).encode()).hexdigest()
    about, place = About(base, revision, more=_said(made.updates)), folder / LAYERS
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        changes = {module: _mapped(made.change(module), OUTPUTS[dtype], place / f"{k}.safetensors")
                   for k, module in enumerate(made.modules)}
        return write_folder(folder, changes, about, dtype=OUTPUTS[dtype], kept=made.kept(), key=key, report=report)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _mapped(parts: tuple[Factors, ...], dtype: torch.dtype, file: Path) -> tuple[Factors, ...]:
    """What stands alone was computed, and waits in a file until all ranks are known; what is many is mapped already."""
    from safetensors.torch import save_file

    if len(parts) > 1:
        return parts
    one, = parts
    save_file({"a": one.a.to(dtype).contiguous(), "b": one.b.to(dtype).contiguous()}, file)
    held = Checkpoint(file)
    return (Factors(held["a"], held["b"], one.scale, one.spectrum),)


def changes_of(updates: Sequence[Update], module: str) -> tuple[Factors, ...]:
    """Every member's change of one layer."""
    shape = next(update.adapter.shape(module) for update in updates if module in update.adapter.modules)
    return tuple(update.factors(module, shape) for update in updates)


def products(updates: Sequence[Update]) -> Tensor:
    """Inner products of the members' whole changes, from which lengths and angles follow: [n, n], fp64."""
    found = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for module in _modules(updates):
        found += gram(changes_of(updates, module))
    return found


def away(found: Adapter, updates: Sequence[Update], weight: Sequence[float]) -> float:
    """How far an adapter is from the exact weighted mean of others, in units of the norm of that mean.

    weight  n numbers; divided by their sum
    """
    shares, one = torch.tensor(weight, dtype=torch.float64), Update("", found)
    apart = size = 0.0
    for module in _modules([one, *updates]):
        ours, *parts = changes_of([one, *updates], module)
        exact = stacked(weighted(parts, shares))
        apart += distance(ours, exact)**2
        size += norm(exact)**2
    return sqrt(apart / size) if size else sqrt(apart)


def _modules(updates: Sequence[Update]) -> list[str]:
    return sorted({module for update in updates for module in update.adapter.modules})


def _called(choice: Choice, names: Sequence[str], module: str, parts: tuple[Factors, ...]) -> tuple[Factors, ...]:
    leaf = Leaf(module, torch.empty(len(parts), 0), shape=parts[0].shape, factors=parts)
    result = choice(leaf, **settled(choice, names, 0, torch.float64))
    return (result,) if isinstance(result, Factors) else tuple(result)


def _said(updates: Sequence[Update]) -> dict[str, Any]:
    """What all members' configurations say alike of themselves, and of which layers they change."""
    told = [{key: sorted(value) if isinstance(value := update.adapter.config.get(key), list) else value
             for key in (*WHICH, *SAID)} for update in updates]
    alike = {key for key in told[0] if all(one[key] == told[0][key] for one in told)}
    kept = (*(WHICH if alike.issuperset(WHICH) else ()), *(key for key in SAID if key in alike))
    return {key: told[0][key] for key in kept if told[0][key] is not None}
