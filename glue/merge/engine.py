"""The merge engine: a method and members in, merged tensors out, a few tensors in memory at a time.

Members of a symmetric method are put into one order, whatever order they came in, and every number is computed in a
type wider than the output and rounded once. So the same seed gives the same bits for any order of members, any number
of threads and any size of piece.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from glue.checkpoint import Header, fingerprint, weights_digest
from glue.errors import CheckpointError, MethodError, did_you_mean
from glue.family import Choice
from glue.kinds.device import device_of
from glue.merge.leaf import Leaf, Source
from glue.merge.parameters import by_member, settled
from glue.merge.target import PIECE, Glimpse, Held, Input, Model, Pieces, Target

OUTPUTS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check(choice: Choice, members: Sequence[Source], base: Source | None = None) -> None:
    """Raise MethodError or CheckpointError for whatever would stop this merge; reads headers and no weights."""
    name, traits = choice.method.name, choice.method.traits
    if traits["space"] == "factors":
        raise MethodError(f"merge method '{name}' works on the factors of adapters, and here whole models are merged",
                          fix="use it in  step: merge  or  step: federate,  or choose a method on models")
    check_count(choice, len(members))
    if traits["space"] == "delta" and traits.get("base") != "optional" and base is None:
        raise MethodError(f"merge method '{name}' works on differences to a base, and no base is given",
                          fix="add  base: <the member that the others were tuned from>")
    _check_headers([*members, *([base] if base else [])])
    tried(choice, [member.name for member in members])


def check_count(choice: Choice, given: int) -> None:
    """Raise MethodError where a method does not take so many members."""
    fewest, most = choice.method.traits.get("members", (1, None))
    if given < fewest or (most is not None and given > most):
        limit, count = ("exactly", most) if fewest == most else ("at least", fewest) if given < fewest \
            else ("at most", most)
        raise MethodError(f"merge method '{choice.method.name}' takes {limit} {count} member{'s' * (count != 1)}; "
                          f"{given} are given", fix="change the members, or choose another method")


def _check_headers(sources: Sequence[Source]) -> None:
    for name in sorted(set().union(*(source.weights.headers for source in sources))):
        without = [source.name for source in sources if name not in source.weights.headers]
        if without:
            holder = next(source.name for source in sources if name in source.weights.headers)
            raise CheckpointError(f"'{name}' is in '{holder}' and not in '{without[0]}'; only members with the same "
                                  f"tensors can be merged", fix="run the cluster step first, or drop the odd member")
        shapes, types = defaultdict(list), defaultdict(list)
        for source in sources:
            header = source.weights.headers[name]
            shapes[header.shape].append(source.name)
            types["fractions" if header.dtype.is_floating_point else str(header.dtype)].append(source.name)
            if header.dtype.is_floating_point and header.dtype not in OUTPUTS.values():
                raise CheckpointError(f"'{name}' of '{source.name}' is stored as {header.dtype}, whose scales stand "
                                      f"elsewhere, so it cannot be merged", fix=f"store it as {' or '.join(OUTPUTS)}")
        if len(shapes) > 1:
            listed = ", ".join(f"{shape} in '{names[0]}'" for shape, names in shapes.items())
            raise CheckpointError(f"'{name}' has shapes {listed}; only members of one shape can be merged",
                                  fix="run the cluster step first, or drop the odd member")
        if len(types) > 1:
            listed = ", ".join(f"{kind} in '{names[0]}'" for kind, names in types.items())
            raise CheckpointError(f"'{name}' holds {listed}; whole numbers are not averaged, so they must be alike",
                                  fix="drop the odd member")


def tried(choice: Choice, names: Sequence[str]) -> None:
    """Merge one entry of zeros, so that settings the method refuses are refused before any work."""
    target = Target("", Header(torch.float32, (1, 1)), choice, ())
    shape = {"pieces": (1,), "rows": (1, 1), "whole": (1, 1)}[target.sees]
    leaf = Leaf("", torch.zeros(len(names), *shape), torch.zeros(shape), keys=(0,) * len(names), shape=(1, 1))
    seen = _glanced(choice, names, Held(leaf)) if "glance" in choice.method.traits else None
    _called(choice, _settled(choice, names, leaf), replace(leaf, seen=seen))


def _glanced(choice: Choice, names: Sequence[str], pieces: Glimpse) -> Any:
    """What the method's glance finds in a whole tensor; it gets those parameters that it names, in fp64."""
    glance = choice.method.traits["glance"]
    wanted = inspect.signature(glance).parameters
    given = settled(choice, names, 1, torch.float64)
    return glance(pieces, **{word: value for word, value in given.items() if word in wanted})


def _settled(choice: Choice, names: Sequence[str], leaf: Leaf) -> dict[str, Any]:
    given = settled(choice, names, leaf.tensors.ndim - 1, leaf.tensors.dtype)
    return {word: value.to(leaf.tensors.device) if isinstance(value, Tensor) else value
            for word, value in given.items()}


def _called(choice: Choice, given: dict[str, Any], leaf: Leaf) -> Tensor:
    """Merged weights of one leaf."""
    result = choice(leaf, **given)
    assert result.shape == leaf.tensors.shape[1:], \
        f"'{choice.method.name}' made {tuple(result.shape)} of {tuple(leaf.tensors.shape)}"
    return leaf.base.add_(result) if choice.method.traits["space"] == "delta" and leaf.base is not None else result


@dataclass(frozen=True)
class Merge:
    """A merge that was checked: what is to be made, with inputs in the order in which they are summed.

    targets    by name, in the order of their names
    work       the type of the numbers; None for one that is wider than the output
    device     the word for where they are calculated; each worker takes a GPU of its own where there are several
    allow_nan  write numbers that are not finite, instead of refusing them
    seen       what was found by a glance at the whole model, by methods whose `scope` is "model"
    """

    targets: dict[str, Target]
    seed: int = 0
    piece: int = PIECE
    work: torch.dtype | None = None
    device: str = "cpu"
    allow_nan: bool = False
    seen: Any = None

    @property
    def place(self) -> str:
        """Where this process calculates, as torch calls it."""
        return device_of(self.device)

    @property
    def headers(self) -> dict[str, Header]:
        """What each merged tensor will be."""
        return {name: target.header for name, target in self.targets.items()}

    @property
    def members(self) -> tuple[Source, ...]:
        """The members of the first tensor, in order."""
        return tuple(each.source for each in next(iter(self.targets.values())).inputs)

    def glanced(self) -> Merge:
        """The same merge after its glance at the whole model, where its method takes one."""
        floating = [target for target in self.targets.values() if target.header.dtype.is_floating_point]
        if self.seen is not None or not floating or floating[0].choice.params.get("scope") != "model":
            return self
        first = floating[0]
        if any(target.choice != first.choice for target in floating):
            raise MethodError(f"merge method '{first.choice.method.name}' with scope: model needs the same parameters "
                              f"for all tensors", fix="leave out gradients and filters, or say  scope: tensor")
        offset, parts = 0, []
        for target in floating:
            parts.append(Pieces(replace(target, offset=offset), self.seed, PIECE, self.work, self.place))
            offset += target.header.numel
        seen = _glanced(first.choice, first.names, Model(parts))
        targets = {**self.targets, **{part.target.name: part.target for part in parts}}
        return replace(self, targets=targets, seen=seen)

    def tensor(self, name: str) -> Tensor:
        """One merged tensor. Whole numbers pass through; raises CheckpointError where they differ."""
        header = self.headers[name]
        out, done = torch.empty(header.numel, dtype=header.dtype), 0
        for part in self.stream(name):
            out[done:done + len(part)] = part
            done += len(part)
        return out.reshape(header.shape)

    def stream(self, name: str) -> Iterator[Tensor]:
        """One merged tensor as flat pieces, first to last. A piece is valid until the next one is asked for."""
        target = self.targets[name]
        if not target.header.dtype.is_floating_point:
            yield self._passed(target).reshape(-1)
            return
        choice, names, traits = target.choice, target.names, target.choice.method.traits
        seen = self.seen
        if "glance" in traits and seen is None and target.header.numel:
            assert choice.params.get("scope") != "model", "a glance at the whole model comes first"
            seen = _glanced(choice, names, Pieces(target, self.seed, PIECE, self.work, self.place))
        given: dict[str, Any] | None = None
        out: Tensor | None = None
        for leaf in Pieces(target, self.seed, self.piece, self.work, self.place):
            given = given if given is not None else _settled(choice, names, leaf)
            result = _called(choice, given, replace(leaf, seen=seen)).reshape(-1)
            out = torch.empty(len(result), dtype=target.header.dtype) if out is None else out[:len(result)]
            out.copy_(result)
            if not self.allow_nan and not _finite(out):
                raise _not_finite(target)
            yield out

    def _passed(self, target: Target) -> Tensor:
        first, *others = [*target.inputs, *([target.base] if target.base else [])]
        tensor = first.source.weights[first.name]
        for other in others:
            if not torch.equal(other.source.weights[other.name], tensor):
                raise CheckpointError(f"'{target.name}' holds whole numbers, which are not averaged, and they differ "
                                      f"between '{first.source.name}' and '{other.source.name}'",
                                      fix="drop the odd member")
        return tensor.detach().clone()


class Result(Mapping[str, Tensor]):
    """What a merge makes, as weights: each tensor is made when it is asked for, and kept by nobody."""

    def __init__(self, merge: Merge):
        self.merge, self.headers = merge.glanced(), merge.headers

    @cached_property
    def fingerprint(self) -> str:
        """Of the merged weights; makes all of them once."""
        return fingerprint(self)

    def __getitem__(self, name: str) -> Tensor:
        return self.merge.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


def _finite(numbers: Tensor) -> bool:
    """Whether all are finite. Their sum tells at once in nearly all cases, twenty times as fast as a look at each."""
    wide = torch.float32 if numbers.dtype.itemsize < 4 else torch.float64
    return bool(numbers.sum(dtype=wide).isfinite()) or bool(numbers.isfinite().all())


def _not_finite(target: Target) -> CheckpointError:
    for each in [*target.inputs, *([target.base] if target.base else [])]:
        if not each.source.weights[each.name].isfinite().all():
            where = f" ({each.header.file})" if each.header.file else ""
            return CheckpointError(f"'{each.name}' of '{each.source.name}'{where} holds numbers that are not finite",
                                   fix="drop that member, repair its weights, or allow it with --allow-nan")
    return CheckpointError(f"the merged '{target.name}' has numbers too large for {target.header.dtype}",
                           fix="give smaller weights, or a wider out_dtype")


def prepared(choice: Choice, members: Sequence[Source], base: Source | None = None, *, seed: int = 0,
             out_dtype: str | None = None, **how: Any) -> Merge:
    """Check a merge and settle the order of its members and the types of its tensors.

    out_dtype  float64, float32, float16 or bfloat16; None keeps each tensor's type: the base's, or, without a base,
               the smallest that holds every member's
    how        fields of Merge
    """
    if out_dtype is not None and out_dtype not in OUTPUTS:
        raise MethodError(f"weights cannot be written as '{out_dtype}'{did_you_mean(out_dtype, OUTPUTS)}")
    check(choice, members, base)
    rows = by_member(choice, [member.name for member in members])
    choice = Choice(choice.method, {**choice.params, **rows})
    targets = []
    for name in sorted(members[0].weights.headers):
        ours = [source.weights.headers[name] for source in ([base] if base else members)]
        dtype = reduce(torch.promote_types, (header.dtype for header in ours))
        header = Header(OUTPUTS[out_dtype] if out_dtype and dtype.is_floating_point else dtype, ours[0].shape)
        targets.append(Target(name, header, choice, tuple(Input(source, name) for source in members),
                              Input(base, name) if base else None))
    return Merge(in_one_order(targets), seed, **how)


def in_one_order(targets: Iterable[Target]) -> dict[str, Target]:
    """Targets by name, with the inputs of symmetric methods, and their parameters with them, in an order of their own.

    It is that of fingerprints and then of parameters, whatever order the inputs came in.
    """
    digests: dict[int, str] = {}

    def ordered(target: Target) -> Target:
        if not target.choice.method.traits.get("symmetric"):
            return target
        rows = by_member(target.choice, target.names)
        keys = [(each.source.weights.fingerprint, each.name, *(row[k] for row in rows.values()))
                for k, each in enumerate(target.inputs)]
        # A fingerprint samples: unlike members can share one, and then only the digest tells them apart.
        ties = [digests.setdefault(id(each.source), "") or _digest(digests, each.source) if keys.count(key) > 1 else ""
                for each, key in zip(target.inputs, keys, strict=True)]
        order = sorted(range(len(keys)), key=lambda k: (keys[k], ties[k]))
        in_order = {word: [row[k] for k in order] for word, row in rows.items()}
        return replace(target, choice=Choice(target.choice.method, {**target.choice.params, **in_order}),
                       inputs=tuple(target.inputs[k] for k in order))

    return {target.name: ordered(target) for target in sorted(targets, key=lambda target: target.name)}


def _digest(known: dict[int, str], source: Source) -> str:
    known[id(source)] = weights_digest(source.weights)
    return known[id(source)]


def merged(choice: Choice, members: Sequence[Source], base: Source | None = None, *, seed: int = 0,
           out_dtype: str | None = None, **how: Any) -> Iterator[tuple[str, Tensor]]:
    """Merged tensors in the order of their names; see `prepared`. All checks are made before the first is asked for."""
    merge = prepared(choice, members, base, seed=seed, out_dtype=out_dtype, **how).glanced()
    return ((name, merge.tensor(name)) for name in merge.targets)
