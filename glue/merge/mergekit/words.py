"""The words of mergekit's methods, and what they are called here.

What a method takes is said once, by its function in `glue/merge/methods`. Here stands what mergekit does otherwise:
which parameters must be given, which defaults differ, which words it reads that mean nothing to us, and what it does
with a tensor that only some models have. A method that mergekit lacks is used with its own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from glue.errors import MethodError
from glue.family import Method, is_per_member, marks
from glue.merge import merging
from glue.merge.mergekit.settings import KINDS, Kind, converted


@dataclass(frozen=True)
class Peer:
    """A method as mergekit has it.

    needs    parameters without a default
    differs  defaults that are not ours
    unread   words that it reads and that change nothing here
    first    whether the base is the first of the models, and not something to take differences to
    alone    which model's tensor is kept as it is where no other model has it; `fewer`: none is, and what too few
             models have is left out
    """

    needs: tuple[str, ...] = ()
    differs: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    first: bool = False
    alone: Literal["", "any", "base", "fewer"] = ""


_WEIGHT, _MASK, _PLAIN, _L1 = ("weight",), ("int8_mask",), {"rescale": "none"}, {"rescale": "l1"}
PEERS = {
    "linear": Peer(_WEIGHT),
    "slerp": Peer(("t",), first=True, alone="any"),
    "nuslerp": Peer(_WEIGHT, alone="any"),
    "multislerp": Peer(_WEIGHT),
    "karcher": Peer(),
    "task_arithmetic": Peer(_WEIGHT, unread=("int8_mask", "density", "rescale")),
    "ties": Peer(_WEIGHT, _PLAIN, _MASK),
    "dare_linear": Peer(_WEIGHT, _L1, _MASK),
    "dare_ties": Peer(_WEIGHT, _L1, _MASK),
    "breadcrumbs": Peer(_WEIGHT, _PLAIN, _MASK),
    "breadcrumbs_ties": Peer(_WEIGHT, _PLAIN, _MASK),
    "della": Peer(_WEIGHT, _L1, _MASK),
    "della_linear": Peer(_WEIGHT, _L1, _MASK),
    "sce": Peer(unread=_MASK),
    "ram": Peer(),
    "ramplus_tl": Peer(),
    "model_stock": Peer(alone="fewer"),
    "nearswap": Peer(("t",), first=True, alone="base"),
    "arcee_fusion": Peer(first=True, alone="any"),
    "passthrough": Peer(),
}
# Every parameter of mergekit's methods: under a method that does not read it, each is accepted and noted.
KNOWN = ("weight", "density", "gamma", "epsilon", "normalize", "rescale", "lambda", "int8_mask", "t", "scale",
         "nuslerp_row_wise", "nuslerp_flatten", "normalize_weights", "eps", "max_iter", "tol", "select_topk", "r",
         "alpha", "filter_wise")


@dataclass(frozen=True)
class Dialect:
    """A merge method in the words of a config."""

    method: Method
    peer: Peer

    @staticmethod
    def of(name: str) -> Dialect:
        """Raises MethodError where there is no such method, or where it merges no models."""
        method = merging[name]
        if method.traits["space"] == "factors":
            raise MethodError(f"merge method '{name}' works on the factors of adapters, and a config merges models",
                              fix="use it in a recipe, in  step: merge")
        return Dialect(method, PEERS.get(name, Peer()))

    @property
    def base(self) -> Literal["needed", "optional", "ignored"]:
        """What the method does with a base model; where it is ignored, it is a model like all others."""
        if self.method.traits["space"] == "weight":
            return "needed" if self.peer.first else "ignored"
        return "optional" if self.method.traits.get("base") == "optional" else "needed"

    @property
    def members(self) -> tuple[int, int | None]:
        """The fewest and the most models, the base counted only where it is the first of them."""
        return self.method.traits.get("members", (1, None))

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The words that are read, and the kind of value of each."""
        return {word: _kind(info) for word, info in self.method.parameters.items()}

    @property
    def unread(self) -> tuple[str, ...]:
        """Words of mergekit's method that change nothing here."""
        return (*self.peer.unread, *(word for word in self.peer.differs if word not in self.kinds))

    @cached_property
    def by_model(self) -> frozenset[str]:
        """The words that every model may have a value of its own for."""
        words = {word for word, info in self.method.parameters.items()
                 if is_per_member(info.annotation, info.metadata)}
        return frozenset(words | ({"scale"} if self.method.name == "passthrough" else set()))

    def value(self, word: str, given: Any) -> Any:
        """One value of a word that is read, in our terms. Raises MethodError where the method refuses it."""
        try:
            ours = self.settled(word, converted(given, self.kind(word, given)))
        except ValueError as problem:
            raise MethodError(f"merge method '{self.method.name}': '{word}' is {KINDS[self.kinds[word]]}, and "
                              f"{problem}") from None
        self.method.bind({word: ours})
        return ours

    def kind(self, word: str, given: Any = None) -> Kind:
        """The kind of value of a word; `rescale` may be true or false, as with mergekit, or one of our words."""
        switch = isinstance(given, bool) or given in (0, 1, "yes", "no", "on", "off", "true", "false")
        return "truth" if word == "rescale" and switch else self.kinds[word]

    def settled(self, word: str, value: Any) -> Any:
        """A value of mergekit's in our terms."""
        return {True: "l1", False: "none"}[value] if word == "rescale" and isinstance(value, bool) else value


def _kind(info: Any) -> Kind:
    parts = marks(info)
    return "truth" if bool in parts else "number" if float in parts else "whole" if int in parts else "word"
