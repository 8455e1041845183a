"""What a search tries: one member as it is, or a merge with weights and other parameters by member and layer group.

Layer groups are blocks of consecutive layers, and one group for everything outside of layers: embeddings, last norm,
head. What is the same in every group is said once, so that equal candidates compare equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

Values = Mapping[str, float] | float  # by member, or one for all
Everywhere = ""  # stands for the member where a parameter has one value for all
Group = tuple[tuple[str, tuple[tuple[str, float], ...]], ...]
WEIGHT = "weight"


def group_of(layer: int | None, layers: int, groups: int) -> int:
    """The group that a layer is in; None is what lies outside of layers. The last block takes the layers left over.

    layers  of the whole model
    groups  of a candidate: 1, or one more than there are blocks
    """
    blocks = groups - 1
    if blocks < 1:
        return 0
    return blocks if layer is None else min(layer // (layers // blocks), blocks - 1)


@dataclass(frozen=True, order=True)
class Candidate:
    """One member as it is, or a merge of members. Equal whatever the order of the members was.

    said    for each group its parameters by name, with (member, value) by member; weights of zero are left out, and
            with them whatever else was said of that member in that group
    merged  whether a merge method makes it
    """

    said: tuple[Group, ...]
    merged: bool

    @staticmethod
    def single(name: str) -> Candidate:
        """The member itself, untouched by any merge method."""
        return Candidate((((WEIGHT, ((name, 1.0),)),),), False)

    @staticmethod
    def merge(weights: Mapping[str, float] | Sequence[Mapping[str, float]],
              others: Mapping[str, Values | Sequence[Values]] | None = None) -> Candidate:
        """The merge of the members with these weights, and with these values of other parameters.

        Whatever is a list has one entry for each group: the blocks from the first layer to the last, then the rest.
        """
        lists = [list(what) for what in (weights, *(others or {}).values()) if isinstance(what, Sequence)]
        groups = len(lists[0]) if lists else 1
        assert all(len(one) == groups for one in lists), "every list has one entry for each group"
        said = tuple(_group({WEIGHT: weights, **(others or {})}, k) for k in range(groups))
        assert any(values for group in said for word, values in group if word == WEIGHT), \
            "a merge has at least one member with a weight"
        return Candidate(said[:1] if len(set(said)) == 1 else said, True)

    @property
    def groups(self) -> int:
        """1 where all layers are treated alike; else one more than there are blocks of layers."""
        return len(self.said)

    @property
    def names(self) -> tuple[str, ...]:
        """The members that have a weight in any group, by name."""
        return tuple(sorted(set(chain.from_iterable(_by(group, WEIGHT) for group in self.said))))

    @property
    def weights(self) -> dict[str, float]:
        """Name to weight, the mean over the groups; 1 for a member as it is."""
        tables = self.tables(self.groups)
        return {name: sum(table.get(name, 0.0) for table in tables) / self.groups for name in self.names}

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """(name, weight) by name."""
        return tuple(self.weights.items())

    def tables(self, groups: int) -> list[dict[str, float]]:
        """Name to weight in each of so many groups; where there is one, it holds for all."""
        assert self.groups in (1, groups), f"a candidate of {self.groups} groups has no {groups}"
        said = self.said * groups if self.groups == 1 else self.said
        return [_by(group, WEIGHT) for group in said]

    def arguments(self, group: int, names: Sequence[str]) -> dict[str, list[float] | float]:
        """What a merge method is called with in a group: lists in the order of the names, numbers where one is for all.

        A member without a weight has weight 0; what else it is given does not matter, so it is that of another.
        """
        found: dict[str, list[float] | float] = {}
        for word, values in self.said[group]:
            told = dict(values)
            if Everywhere in told:
                found[word] = told[Everywhere]
            elif word == WEIGHT:
                found[word] = [told.get(name, 0.0) for name in names]
            else:
                found[word] = [told.get(name, values[0][1] if values else 1.0) for name in names]
        return found

    def spelled(self) -> dict[str, Any]:
        """As plain data, exactly: a mapping from parameters to values for each group."""
        return {"merged": self.merged,
                "groups": [{word: dict(values).get(Everywhere, dict(values)) for word, values in group}
                           for group in self.said]}

    @staticmethod
    def unspelled(data: Mapping[str, Any]) -> Candidate:
        """The candidate that `spelled` wrote down."""
        return Candidate(tuple(_group(group, 0) for group in data["groups"]), data["merged"])

    def __str__(self) -> str:
        if not self.merged:
            return self.names[0]
        return " | ".join(_told(group) for group in self.said)


def _group(given: Mapping[str, Any], k: int) -> Group:
    """The k-th group of what is given by parameter, in canonical order."""
    at = {word: what[k] if isinstance(what, Sequence) else what for word, what in given.items()}
    weighty = {name: float(weight) for name, weight in at[WEIGHT].items() if weight}
    rows = {word: {Everywhere: float(what)} if isinstance(what, float | int) else
            {name: float(what[name]) for name in weighty} for word, what in at.items() if word != WEIGHT}
    return tuple((word, tuple(sorted(row.items()))) for word, row in sorted({**rows, WEIGHT: weighty}.items()))


def _by(group: Group, word: str) -> dict[str, float]:
    return dict(dict(group)[word])


def _told(group: Group) -> str:
    """A group in words: `0.5 a + 0.3 b (density 0.2 a, 0.4 b; lambda 0.9)`."""
    weights = " + ".join(f"{weight:.3g} {name}" for name, weight in _by(group, WEIGHT).items()) or "nothing"
    others = [f"{word} " + ", ".join(f"{value:.3g} {name}".rstrip() for name, value in values)
              for word, values in group if word != WEIGHT]
    return f"{weights} ({'; '.join(others)})" if others else weights
