"""The merge engine: a method and members in, merged tensors out, a few tensors in memory at a time.

Members of a symmetric method are put into one order, whatever order they came in, and every number is computed in a
type wider than the output and rounded once. So the same seed gives the same bits for any order of members, any number
of threads and any size of piece.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.checkpoint import Header, Writer, weights_digest
from glue.errors import CheckpointError, MethodError, did_you_mean
from glue.family import Choice
from glue.merge.leaf import Leaf, Source, random_key
from glue.merge.parameters import by_member, settled

PIECE = 1 << 18  # entries that are merged at once
OUTPUTS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check(choice: Choice, members: Sequence[Source], base: Source | None = None) -> None:
    """Raise MethodError or CheckpointError for whatever would stop this merge; reads headers and no weights."""
    name, traits = choice.method.name, choice.method.traits
    fewest, most = traits.get("members", (1, None))
    if len(members) < fewest or (most is not None and len(members) > most):
        limit, count = ("exactly", most) if fewest == most else ("at least", fewest) if len(members) < fewest \
            else ("at most", most)
        raise MethodError(f"merge method '{name}' takes {limit} {count} member{'s' * (count != 1)}; "
                          f"{len(members)} are given",
                          fix="change the members, or choose another method")
    if traits["space"] == "delta" and traits.get("base") != "optional" and base is None:
        raise MethodError(f"merge method '{name}' works on differences to a base, and no base is given",
                          fix="add  base: <the member that the others were tuned from>")
    _check_headers([*members, *([base] if base else [])])
    _try(choice, members)


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


def _try(choice: Choice, members: Sequence[Source]) -> None:
    """Merge one entry of zeros, so that settings the method refuses are refused before any work."""
    shape = (1, 1) if choice.method.traits.get("whole") else (1,)
    leaf = Leaf("", torch.zeros(len(members), *shape), torch.zeros(shape), keys=(0,) * len(members))
    names = [member.name for member in members]
    seen = _glanced(choice, names, leaf) if "glance" in choice.method.traits else None
    _called(choice, names, replace(leaf, seen=seen))


def _glanced(choice: Choice, names: Sequence[str], leaf: Leaf) -> Any:
    """What the method's glance finds in a whole tensor; it gets those parameters that it names, in fp64."""
    glance = choice.method.traits["glance"]
    wanted = inspect.signature(glance).parameters
    given = settled(choice, names, leaf.tensors.ndim - 1, torch.float64)
    return glance(leaf, **{word: value for word, value in given.items() if word in wanted})


def _called(choice: Choice, names: Sequence[str], leaf: Leaf) -> Tensor:
    """Merged weights of one leaf."""
    result = choice(leaf, **settled(choice, names, leaf.tensors.ndim - 1, leaf.tensors.dtype))
    assert result.shape == leaf.tensors.shape[1:], \
        f"'{choice.method.name}' made {tuple(result.shape)} of {tuple(leaf.tensors.shape)}"
    return leaf.base + result if choice.method.traits["space"] == "delta" and leaf.base is not None else result


@dataclass(frozen=True)
class Merge:
    """A merge that was checked, with its members in the order in which they are summed.

    headers  what each merged tensor will be, in the order of their names
    """

    choice: Choice
    members: tuple[Source, ...]
    base: Source | None
    seed: int
    headers: dict[str, Header]
    piece: int

    def tensor(self, name: str) -> Tensor:
        """One merged tensor. Whole numbers pass through; raises CheckpointError where they differ."""
        header = self.headers[name]
        if not header.dtype.is_floating_point:
            return self._passed(name)
        flat = [source.weights[name].detach().reshape(-1) for source in self.members]
        base = self.base.weights[name].detach().reshape(-1) if self.base else None
        keys = tuple(random_key(self.seed, source.weights.fingerprint, name) for source in self.members)
        names, traits = [source.name for source in self.members], self.choice.method.traits
        # The wider type: an error of the sums then stays far below half a unit in the last place of the output.
        wide = torch.float32 if header.dtype.itemsize < 4 else torch.float64

        def leaf(start: int, end: int) -> Leaf:
            shape = header.shape if traits.get("whole") else (end - start,)
            values = torch.empty(len(flat), *shape, dtype=wide)
            for row, source in zip(values, flat, strict=True):
                row.copy_(source[start:end].reshape(shape))
            below = base[start:end].to(wide, copy=True).reshape(shape) if base is not None else None
            if below is not None and traits["space"] == "delta":
                values -= below
            return Leaf(name, values, below, start, keys)

        out = torch.empty(header.numel, dtype=header.dtype)
        if header.numel:
            seen = _glanced(self.choice, names, leaf(0, header.numel)) if "glance" in traits else None
            step = header.numel if traits.get("whole") else self.piece
            for start in range(0, header.numel, step):
                part = replace(leaf(start, min(start + step, header.numel)), seen=seen)
                out[start:start + step] = _called(self.choice, names, part).reshape(-1)
                if not out[start:start + step].isfinite().all():
                    raise self._not_finite(name)
        return out.reshape(header.shape)

    def _not_finite(self, name: str) -> CheckpointError:
        for source in [*self.members, *([self.base] if self.base else [])]:
            if not source.weights[name].isfinite().all():
                return CheckpointError(f"'{name}' of '{source.name}' holds numbers that are not finite",
                                       fix="drop that member, or repair its weights")
        return CheckpointError(f"the merged '{name}' has numbers too large for {self.headers[name].dtype}",
                               fix="give smaller weights, or a wider out_dtype")

    def _passed(self, name: str) -> Tensor:
        first = self.members[0].weights[name]
        for source in [*self.members[1:], *([self.base] if self.base else [])]:
            if not torch.equal(source.weights[name], first):
                raise CheckpointError(f"'{name}' holds whole numbers, which are not averaged, and they differ "
                                      f"between '{self.members[0].name}' and '{source.name}'",
                                      fix="drop the odd member")
        return first.clone()


def prepared(choice: Choice, members: Sequence[Source], base: Source | None = None, *, seed: int = 0,
             out_dtype: str | None = None, piece: int = PIECE) -> Merge:
    """Check a merge and settle the order of its members and the types of its tensors.

    out_dtype  float64, float32, float16 or bfloat16; None keeps each tensor's type: the base's, or, without a base,
               the smallest that holds every member's
    """
    if out_dtype is not None and out_dtype not in OUTPUTS:
        raise MethodError(f"weights cannot be written as '{out_dtype}'{did_you_mean(out_dtype, OUTPUTS)}")
    check(choice, members, base)
    headers = {}
    for name in sorted(members[0].weights.headers):
        ours = [source.weights.headers[name] for source in ([base] if base else members)]
        dtype = reduce(torch.promote_types, (header.dtype for header in ours))
        headers[name] = Header(OUTPUTS[out_dtype] if out_dtype and dtype.is_floating_point else dtype, ours[0].shape)
    if choice.method.traits.get("symmetric"):
        choice, members = _in_one_order(choice, members)
    return Merge(choice, tuple(members), base, seed, headers, piece)


def _in_one_order(choice: Choice, members: Sequence[Source]) -> tuple[Choice, list[Source]]:
    """Members, and their parameters with them, sorted by fingerprint and then by parameters."""
    rows = by_member(choice, [member.name for member in members])
    keys = [(member.weights.fingerprint, *(row[k] for row in rows.values())) for k, member in enumerate(members)]
    # A fingerprint samples: unlike members can share one, and then only the digest tells them apart.
    ties = [weights_digest(member.weights) if keys.count(key) > 1 else ""
            for member, key in zip(members, keys, strict=True)]
    order = sorted(range(len(members)), key=lambda k: (keys[k], ties[k]))
    in_order = {word: [row[k] for k in order] for word, row in rows.items()}
    return Choice(choice.method, {**choice.params, **in_order}), [members[k] for k in order]


def merged(choice: Choice, members: Sequence[Source], base: Source | None = None, *, seed: int = 0,
           out_dtype: str | None = None, piece: int = PIECE) -> Iterator[tuple[str, Tensor]]:
    """Merged tensors in the order of their names; see `prepared`. All checks are made before the first is asked for."""
    merge = prepared(choice, members, base, seed=seed, out_dtype=out_dtype, piece=piece)
    return ((name, merge.tensor(name)) for name in merge.headers)


def write(choice: Choice, members: Sequence[Source], base: Source | None, folder: Path, *, seed: int = 0,
          out_dtype: str | None = None, shard_size: int = 5_000_000_000,
          report: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Merge into a folder of safetensors and return the digest of the weights.

    report  called after each tensor with bytes written and bytes in all
    """
    merge = prepared(choice, members, base, seed=seed, out_dtype=out_dtype)
    done, total = 0, sum(header.nbytes for header in merge.headers.values())
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder, merge.headers, shard_size=shard_size) as writer:
        for name, header in merge.headers.items():
            writer.write(name, merge.tensor(name))
            done += header.nbytes
            report(done, total)
        return writer.close()
