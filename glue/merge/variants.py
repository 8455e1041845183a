"""Variants: merges of the same members that differ in their parameters, tensor by tensor where that is wanted.

Members are opened and checked once. A member that is given no weight takes no part, as if it were not there; where no
member takes part, the base is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from glue.errors import MethodError
from glue.family import Choice
from glue.member import canonical
from glue.merge import merging
from glue.merge.engine import Merge, in_one_order, prepared, tried
from glue.merge.leaf import Source
from glue.merge.parameters import by_member
from glue.merge.target import Input, Target

Setting = Mapping[str, Any]  # parameter -> its value, or a value by member: those that it names take part


class Variants:
    """One method over the same members, base and output type, ready for any parameters."""

    def __init__(self, method: Choice, members: Sequence[Source], base: Source | None = None, *, seed: int = 0,
                 out_dtype: str | None = None, device: str = "cpu"):
        self.whole = prepared(method, members, base, seed=seed, out_dtype=out_dtype, device=device)
        self.method, self.members, self.base = method, {source.name: source for source in members}, base
        names = list(self.members)
        self._rows = {word: dict(zip(names, row, strict=True)) for word, row in by_member(method, names).items()}

    def merge(self, setting: Callable[[str], Setting]) -> Merge:
        """The merge with the parameters that each tensor is given by its name; the others are as the method has them.

        Raises MethodError for settings that the method refuses.
        """
        made: dict[str, tuple[Choice, tuple[Source, ...]]] = {}

        def target(name: str, whole: Target) -> Target:
            told = setting(name)
            key = canonical(told)
            if key not in made:
                made[key] = self._ordered(*self._settled(told), whole)
            choice, sources = made[key]
            # by identity: a member may be the base under its own name, and weights are not compared in passing
            below = Input(self.base, name) if self.base and sources[0] is not self.base else None
            return Target(name, whole.header, choice, tuple(Input(source, name) for source in sources), below)

        return replace(self.whole, targets={name: target(name, whole) for name, whole in self.whole.targets.items()})

    def _settled(self, told: Setting) -> tuple[Choice, list[Source]]:
        """A method with its parameters, and what it works on."""
        by_name = {word: value for word, value in told.items() if isinstance(value, Mapping)}
        taking = [name for name in self.members if all(name in value for value in by_name.values())]
        if not taking:
            if self.base is None:
                raise MethodError("nothing is merged where no member has a weight", fix="give one of them a weight")
            return merging["linear"].bind(), [self.base]  # of one: it goes through unchanged
        rows = {word: [float(row[name]) for name in taking] for word, row in {**self._rows, **by_name}.items()}
        choice = Choice(self.method.method, {**self.method.params, **told, **rows})
        tried(choice, taking)
        return choice, [self.members[name] for name in taking]

    @staticmethod
    def _ordered(choice: Choice, sources: Sequence[Source], like: Target) -> tuple[Choice, tuple[Source, ...]]:
        """In the order in which they are summed: one for all tensors that are made alike."""
        inputs = tuple(Input(source, like.name) for source in sources)
        ordered = in_one_order([replace(like, choice=choice, inputs=inputs)])[like.name]
        return ordered.choice, tuple(each.source for each in ordered.inputs)


def marks(merge: Merge) -> dict[str, str]:
    """For each tensor, what tells it from the same tensor of other variants of one merge."""
    known: dict[int, str] = {}

    def mark(target: Target) -> str:
        choice = target.choice
        known[id(choice)] = known.get(id(choice)) or canonical(choice.spelled())
        return f"{known[id(choice)]}|{'|'.join(target.names)}"

    return {name: mark(target) for name, target in merge.targets.items()}
