"""The server of a federation: what it takes of what clients send, how it combines that, how much of it it adds."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from glue.errors import GlueError
from glue.family import Choice
from glue.federate.heterogeneity import Change, compare
from glue.federate.ledger import SLOTS, SUMS
from glue.federate.rounds import Ask, Loop, State, Terms
from glue.federate.spool import Spool
from glue.federate.update import Refused, Update, check
from glue.files import write_aside
from glue.hub import locate
from glue.kinds import Place
from glue.member import Member, canonical
from glue.steps import Measured
from glue.steps._clients import ADAPTER, Asking, Client
from glue.steps.merge import source_of, spread
from glue.workers import Workers

if TYPE_CHECKING:
    from glue.checkpoint import Weights
    from glue.workers import Report

REPORTS = "reports"  # beside the spool: what was found out about each round
Made = Callable[[float, Path], None]  # adds so much of what was combined to the parent, in a folder


@dataclass
class Server:
    """One federation's.

    choice   how updates are combined
    scales   what is tried for the share of the result that is added; of several, the best on the suite
    bound    the largest update that is taken, in units of the norm of the base
    reports  folder for what is found out about each round
    counts   whether clients may have data that the server has not dealt out, so that they say how much themselves
    weight   what updates are weighted by: examples, or what they are worth on the suite in that round
    """

    base: Member
    kind: Literal["lora", "full"]
    clients: Mapping[str, Client]
    targets: Sequence[str]
    choice: Choice
    scales: tuple[float, ...]
    suite: Measured | None
    bound: float
    reports: Path
    workers: Workers
    seed: int
    counts: bool = False
    weight: Literal["examples", "shapley"] = "examples"
    place: Place = Place()

    def __getstate__(self) -> dict[str, Any]:  # a server elsewhere works in its own process
        return {**self.__dict__, "workers": self.workers.threads}

    def __setstate__(self, told: dict[str, Any]) -> None:
        self.__dict__.update(told, workers=Workers(0, told["workers"]))

    @property
    def factors(self) -> bool:
        """Whether adapters are combined as adapters."""
        return self.choice.method.traits["space"] == "factors"

    @property
    def made(self) -> Literal["adapter", "model"]:
        """The kind of what updates are combined to."""
        return "adapter" if self.factors else "model"

    @property
    def sent(self) -> Literal["adapter", "model"]:
        """The kind of an update."""
        return "adapter" if self.kind == "lora" else "model"

    @property
    def revealed(self) -> str:
        """What clients see of each other, see `ledger`."""
        return SLOTS if self.choice.method.name == "flora" and not self._cuts else SUMS

    @property
    def _cuts(self) -> bool:
        return any(self.choice.params.get(word) is not None for word in ("rank", "energy", "error"))

    # what is taken

    def check(self, update: Update, client: str, round: int, parent: State) -> None:
        """Raise Refused for an update that is not what was asked for, or whose numbers are not fit to be combined."""
        asked = self.clients[client]
        if update.rank != asked.rank or (update.examples != asked.examples and not self.counts):
            raise Refused(f"it is of rank {update.rank} and {update.examples} examples, and {asked.rank} and "
                          f"{asked.examples} were agreed on")
        try:
            check(update, client=client, round=round, base=self.base.digest, parent=parent.digest, kind=self.kind,
                  size=lambda one: size(self.changes(one.folder, parent)) / self.base_norm, bound=self.bound)
        except Refused:
            raise
        except GlueError as error:  # files that are damaged, or of another model
            raise Refused(error.what) from None

    @cached_property
    def base_norm(self) -> float:
        """The Frobenius norm of all weights of the base."""
        held = source_of(self.base).weights  # type: ignore[union-attr]
        return math.sqrt(sum(float(held[name].double().square().sum()) for name, header in held.headers.items()
                             if header.dtype.is_floating_point))

    def changes(self, folder: Path, parent: State) -> Mapping[str, Change]:
        """What an update changes, matrix by matrix, read when it is asked for. Raises GlueError where it cannot be."""
        below = source_of(self.member(parent)).weights  # type: ignore[union-attr]
        return _LoraChanges(folder, below) if self.kind == "lora" else _FullChanges(folder, below)

    def member(self, state: State) -> Member:
        """A state as a member; the base where there is none yet."""
        if state.folder is None:
            return self.base
        kind = "adapter" if (state.folder / ADAPTER).is_file() else "model"
        return Member(f"state-{state.folder.name}", kind, str(state.folder), base=self.base, digest=state.digest)

    # how it is combined

    def combine(self, round: int, updates: Sequence[Update], parent: State, out: Path) -> str:
        """Combine the updates of a round over its parent into `out`; returns the digest."""
        from glue.identity import identify

        found = compare([update.client for update in updates],
                        [self.changes(update.folder, parent) for update in updates], self.base_norm).as_data()
        shares, told = {update.client: float(update.examples) for update in updates}, dict[str, Any]()
        if self.weight == "shapley":
            from glue.steps._games import shares_by_worth

            shares, told["weight"] = shares_by_worth(self, round, updates, parent)
        counted = [update for update in updates if shares[update.client] > 0]
        delta = out / ".delta"
        made = self._combined(weighted(self.choice, {update.client: shares[update.client] for update in counted}),
                              counted, parent, delta)
        if self.factors:
            told["aggregation_error"] = self._away(delta, counted, [shares[update.client] for update in counted])
        told |= {"round": round, "clients": [update.client for update in updates],
                 "examples": [update.examples for update in updates], "heterogeneity": found,
                 "combine": self.choice.spelled(), "targets": list(self.targets),
                 "server_scale": self._scaled(made, out, self.made, drop=delta)}
        self.reports.mkdir(exist_ok=True)
        write_aside(self.reports / f"{round}.json", canonical(told))
        return identify(out)[1]

    def fold(self, updates: Sequence[Update], parent: State, out: Path) -> Member:
        """What these updates alone would make of their parent, weighted by examples, all of it added; in `out`."""
        delta = out / ".delta"
        choice = weighted(self.choice, {update.client: update.examples for update in updates})
        self._combined(choice, updates, parent, delta)(1.0, out)
        return Member("fold", self.made, str(out), base=self.base, digest=str(out))

    def _combined(self, choice: Choice, updates: Sequence[Update], parent: State, delta: Path) -> Made:
        """Combine updates into the folder `delta`."""
        delta.parent.mkdir(parents=True, exist_ok=True)
        return (self._adapters if self.factors else self._models)(choice, updates, parent, delta)

    def _away(self, delta: Path, updates: Sequence[Update], shares: Sequence[float]) -> float:
        from glue.kinds.lora import Adapter
        from glue.merge import adapters

        return adapters.away(Adapter(delta), _adapters_of(updates), shares)

    def _adapters(self, choice: Choice, updates: Sequence[Update], parent: State, delta: Path) -> Made:
        from glue.merge import adapters

        adapters.combine(choice, _adapters_of(updates), delta, base=str(locate(self.base.path)))

        def made(scale: float, place: Path) -> None:
            before = [(parent.folder, 1.0)] if parent.folder else []
            if before or scale != 1.0:
                stack([*before, (delta, scale)], self.about(), place)
            else:
                linked(delta, place)

        return made

    def _models(self, choice: Choice, updates: Sequence[Update], parent: State, delta: Path) -> Made:
        from glue.family import families
        from glue.merge.engine import prepared
        from glue.merge.leaf import Source

        below = self.member(parent)
        start = source_of(below)
        assert start is not None
        sources = [Source(update.client, self._weights(update, below)) for update in updates]
        spread(prepared(choice, sources, start, seed=self.seed), delta, self.workers)

        def made(scale: float, place: Path) -> None:
            if scale == 1.0:
                linked(delta, place)
            else:
                from glue.checkpoint import Checkpoint

                some = families("merging").choose({"task_arithmetic": {"weight": scale}})
                spread(prepared(some, [Source("all", Checkpoint(delta))], start), place, self.workers)
            self.workers.call("glue.kinds.frame:copy_frame", self.base, place)

        return made

    def _weights(self, update: Update, below: Member) -> Weights:
        from glue.kinds import weights

        return weights(Member(update.client, self.sent, str(update.folder), base=below))

    def about(self) -> Any:
        """What adapters over the base say of themselves."""
        from glue.merge.lora_folder import About

        return About(str(locate(self.base.path)), more={"target_modules": sorted(self.targets)})

    # how much of it is added

    def _scaled(self, made: Callable[[float, Path], None], out: Path, kind: str, drop: Path) -> dict[str, Any]:
        """Put the best of the scales into `out`; returns what each was worth."""
        worth: dict[float, float] = {}
        if len(self.scales) > 1:
            for scale in self.scales:
                made(scale, place := out / f".scale-{scale:g}")
                member = Member(f"scale {scale:g}", kind, str(place), base=self.base, digest=f"{place}")
                worth[scale] = self.workers.call("glue.steps._server:measured", member, self.suite, self.place)
        best = min(self.scales, key=lambda scale: (-worth.get(scale, 0.0), abs(scale - 1), scale))
        made(best, out)
        for place in (drop, *out.glob(".scale-*")):
            shutil.rmtree(place, ignore_errors=True)
        return {"taken": best, "tried": {f"{scale:g}": value for scale, value in worth.items()}}


@dataclass
class Federation:
    """All that a process needs to run a federation, or to go on with it."""

    spool: Spool
    asking: Asking
    terms: Terms
    server: Server

    def run(self, ask: Ask, report: Report = lambda done, total, note: None) -> State:
        """All rounds that are not done yet."""
        return Loop(list(self.asking.clients), self.terms, self.spool, ask=ask, combine=self.server.combine,
                    check=self.server.check, clock=time.monotonic, report=report).run()

    @property
    def state(self) -> State:
        """What it has come to, once all rounds are done."""
        last = self.spool.closed()[self.terms.rounds]
        return State(self.spool.state(self.terms.rounds), last["digest"])


def measured(member: Member, suite: Measured, place: Place) -> float:
    """In a worker: the macro mean of a member over the tasks of a suite."""
    return float(np.mean([results.mean() for results in suite.ask(place.load(member)).values()]))


def _adapters_of(updates: Sequence[Update]) -> list[Any]:
    from glue.kinds.lora import Adapter
    from glue.merge.adapters import Update

    return [Update(update.client, Adapter(update.folder)) for update in updates]


def weighted(choice: Choice, examples: Mapping[str, float]) -> Choice:
    """The choice with each member's share of all examples as its weight, times what the recipe says, if any."""
    from glue.family import is_per_member

    info = choice.method.parameters.get("weight")
    if info is None or not is_per_member(info.annotation, info.metadata):
        return choice
    total, said = sum(examples.values()), choice.params["weight"]
    rows = {name: said[name] if isinstance(said, dict) else said for name in examples}
    return replace(choice, params={**choice.params, "weight": {
        name: rows[name] * count / total for name, count in examples.items()}})


def stack(parts: Sequence[tuple[Path, float]], about: Any, out: Path) -> None:
    """The sum of adapters, each times a number: exact, at the sum of their ranks, or at one where all share their A."""
    from glue.kinds.lora import Adapter
    from glue.merge.factors import Factors
    from glue.merge.lora_folder import write_folder

    adapters = [(Adapter(folder), times) for folder, times in parts]
    changes = {}
    for module in sorted(set().union(*(adapter.modules for adapter, _ in adapters))):
        found = [Factors(*adapter.factors(module), adapter.scale(module) * times) for adapter, times in adapters
                 if module in adapter.modules]
        if all(torch.equal(part.a, found[0].a) for part in found):
            b = torch.stack([part.b.double() * part.scale for part in found]).sum(0)
            found = [Factors(found[0].a, b.to(found[0].b.dtype))]
        changes[module] = found
    write_folder(out, changes, about)


def linked(folder: Path, place: Path) -> None:
    """The files of a folder in another one too, without copying where the file system can."""
    place.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        if file.is_file():
            (place / file.name).unlink(missing_ok=True)
            try:
                os.link(file, place / file.name)
            except OSError:
                shutil.copy2(file, place / file.name)


def size(changes: Mapping[str, Change]) -> float:
    """The Frobenius norm of all changes together."""
    return math.sqrt(sum(max(0.0, one.square) for one in changes.values()))


class _LoraChanges(Mapping[str, Change]):
    """An adapter's, from its factors. Raises GlueError where it is none of plain LoRA, or not of these weights."""

    def __init__(self, folder: Path, below: Weights):
        from glue.kinds.lora import Adapter

        self._adapter = Adapter(folder)
        if self._adapter.stretched or self._adapter.replaced:
            raise Refused("it is more than plain LoRA, which cannot be stacked")
        for module in self._adapter.modules:
            header = below.headers.get(f"{module}.weight")
            if header is None or header.shape != self._adapter.shape(module):
                raise Refused(f"it changes '{module}', which the base has not, or not in that shape")

    def __getitem__(self, name: str) -> Change:
        a, b = self._adapter.factors(name)
        return Change(b, a, self._adapter.scale(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.modules)

    def __len__(self) -> int:
        return len(self._adapter.modules)


class _FullChanges(Mapping[str, Change]):
    """A model's, as differences to what it began with."""

    def __init__(self, folder: Path, below: Weights):
        from glue.checkpoint import Checkpoint

        self._mine, self._below = Checkpoint(folder), below
        for name in {*self._mine.headers, *below.headers}:
            shapes = [held.headers[name].shape if name in held.headers else None for held in (self._mine, below)]
            if shapes[0] != shapes[1]:
                raise Refused(f"its '{name}' is {shapes[0]}, and that of the base {shapes[1]}")
        self._names = [name for name, header in below.headers.items() if header.dtype.is_floating_point]

    def __getitem__(self, name: str) -> Change:
        delta = (self._mine[name].double() - self._below[name].double()).float()
        return Change(delta.reshape(-1, delta.shape[-1]) if delta.ndim > 1 else delta.reshape(1, -1))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def report_of(folder: Path) -> list[dict[str, Any]]:
    """What was found out about each round, first to last."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"), key=lambda file: int(file.stem))]


