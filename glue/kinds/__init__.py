"""Kinds: how each kind of member is loaded and run. One kind a file; the file registers it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glue.checkpoint import Weights
from glue.errors import ZooError
from glue.family import Family, Method
from glue.member import Member, with_article

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from glue.kinds.batches import Room

BatchSize = int | Literal["auto"]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "nf4", "int8"]  # auto: what the files hold
QUANTISED = ("nf4", "int8")  # by bitsandbytes, for members that answer and do not learn

kinds = Family("kinds", "kind of member", "glue.kinds", first="Member -> Running", traits=("weights",))


@dataclass
class Running:
    """A member that is loaded and can be asked.

    route   token ids of contexts -> one route each. Set by kinds that answer through one of several experts: whoever
            scores requests groups them by the route of their context, so that all answers to one question are
            judged by the expert that the question chose. None for all other kinds.
    pinned  a route -> a context manager; inside it every forward of `model` takes that route for all its rows

        for route, requests in grouped.items():
            with running.pinned(route):
                ...

    choose   texts of contexts -> the index of the expert that answers each. Set by kinds whose experts have tokenizers
             of their own: whoever asks them chooses once for a question, and then asks `experts[index]`, which is a
             running member like any other. None for all other kinds.
    experts  those experts, loaded when they are first asked for; `model` and `tokenizer` are then nobody's
    """

    member: Member
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    route: Callable[[list[list[int]]], list[Hashable]] | None = None
    pinned: Callable[[Hashable], AbstractContextManager] | None = None
    choose: Callable[[Sequence[str]], list[int]] | None = None
    experts: Sequence[Running] = ()

    @cached_property
    def room(self) -> Room:
        """How much it reads at once; whoever loads a `Place` has what is remembered of such members."""
        from glue.kinds.batches import Room

        return Room()

    @property
    def spread(self) -> str:
        """Over which devices it is spread, in words; "" where it is in one place."""
        from glue.kinds.device import spread

        return "" if self.choose is not None else spread(self.model)

    def answering(self, text: str) -> Running:
        """Who answers a question: the expert that its text chooses, or this member itself."""
        return self if self.choose is None else self.experts[self.choose([text])[0]]


@dataclass(frozen=True)
class Place:
    """Where members run and in what: the words of a recipe or of options, which every command hands on as they are.

    device, dtype  see `load`
    batch_size     how much is read at once at most; auto: what most likely fits
    notes          the zoo's folder, where it is remembered how much did; None: nowhere
    """

    device: str = "cpu"
    dtype: Dtype = "float32"
    batch_size: BatchSize = "auto"
    notes: Path | None = None

    def load(self, member: Member) -> Running:
        """The member, there and so."""
        return self.settle(load(member, device=self.device, dtype=self.dtype))

    def settle(self, running: Running) -> Running:
        """The same member that was loaded otherwise, with what is remembered of such members here."""
        from glue.kinds.batches import NOTES, Room
        from glue.kinds.device import named
        from glue.kinds.frame import architecture

        file, key = None, ""
        if self.notes is not None:
            shape = sha256(architecture(running.member).encode()).hexdigest()[:12]
            file, key = self.notes / NOTES, f"{running.member.kind} {shape} in {self.dtype} on {named(self.device)}"
        running.room = Room(file, key, self.batch_size)
        if hasattr(running.experts, "room"):
            running.experts.room = running.room
        return running


def load(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """Load a member so that it can be asked. Raises ZooError for kinds that do not run, such as datasets.

    device  a word that `glue.kinds.device` knows: auto, cpu, cuda, cuda:1, mps
    dtype   what it calculates in; of nf4 and int8, what its weights are kept in
    """
    return _kind(member, "it does not run", "name a model, an adapter or a mixture").bind(
        {"device": device, "dtype": dtype})(member)


def weights(member: Member) -> Weights:
    """The weights of a member as one dense model: an adapter is seen through its base. Nothing is loaded yet."""
    lacking = "it has no weights that could be compared or merged"
    method = _kind(member, lacking, "name models and adapters")
    if "weights" not in method.traits:
        raise ZooError(f"'{member.name}' is {with_article(member.kind)}; {lacking}", fix="name models and adapters")
    return method.traits["weights"](member)


def _kind(member: Member, lacking: str, fix: str) -> Method:
    """What is registered for the kind of a member; datasets, tables and groups have nothing that runs."""
    if member.kind not in {method.name for method in kinds}:
        raise ZooError(f"'{member.name}' is {with_article(member.kind)}; {lacking}", fix=fix)
    return kinds[member.kind]
