"""Needs: what a plan takes before it runs - downloads, room for products, memory - from headers alone.

What grows with the models is told for one worker: their weights in the type that they run in; gradients and the two
moments of AdamW beside them, where they are trained; the pieces of a merge. `Need.peak` is what all processes of a task
take together. What nothing is recorded of is not guessed at, and told as None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glue.checkpoint import Header, Weights
from glue.errors import GlueError, NotHere, ZooError
from glue.family import families
from glue.hub import locate
from glue.kinds.batches import Cutter
from glue.member import Member
from glue.plan import Plan, Task, present
from glue.preflight.footprint import MANY, WIDTHS, Build, Footprint, compared, extracted, of_layer, sketched
from glue.preflight.headers import TYPES, Recorded, factor_numbers, read_recorded
from glue.preflight.pace import LEAST, Seconds
from glue.preflight.pace import pace as pace_of
from glue.preflight.tokens import Tokens, asked, trained
from glue.snapshot import whole
from glue.tune.loop import PIECES

LARGE = 50_000_000  # numbers of a model below which batches are not looked at: so little is never refused
RUNS, TRAINS = 4, 16  # bytes a number in fp32: the number itself; and its gradient and two moments
MODELS = ("model", "adapter", "mixture")


@dataclass(frozen=True)
class Extent:
    """How large a model is: its numbers, and their bytes as stored."""

    parameters: int
    nbytes: int
    exact: bool = True


@dataclass(frozen=True)
class Need:
    """What one task takes, in bytes; None where that is not known.

    memory  of what grows with the models, one worker: of the host, or of the device where that is one of its own
    each    the line is made once for each element of a group, and this is one of them
    exact   False where it is about so much
    open    something is written, and how much is not known
    hold    all of what it holds in memory
    device  cpu, or where its models run
    takes   about how long, with the workers that were asked for; None too where that would be mostly imports
    """

    read: int | None
    written: int | None
    memory: int | None
    each: bool = False
    exact: bool = True
    open: bool = False
    hold: Footprint | None = None
    device: str = "cpu"
    takes: Seconds | None = None

    def peak(self, workers: int) -> int | None:
        """Bytes of host memory that all processes take together where this task runs alone."""
        if self.hold is None:
            return None
        return self.hold.peak(workers) if self.device == "cpu" else self.hold.times(0).peak(workers)

    def on_device(self, workers: int) -> int:
        """Bytes of the memory of its device; 0 on the host."""
        if self.hold is None or self.device == "cpu":
            return 0
        return sum(self.hold.largest(max(1, workers)))


@dataclass(frozen=True)
class Lacking:
    """What is not on this machine: how it is got, and how large it is."""

    member: Member
    how: str
    extent: Extent | None


@dataclass(frozen=True)
class Needs:
    """Of a whole plan: by task, and what has to be brought first."""

    tasks: Mapping[str, Need]
    lacking: tuple[Lacking, ...]

    @property
    def download(self) -> tuple[int, bool]:
        """(bytes of all that is known, whether that is exactly all)."""
        known = [one.extent for one in self.lacking if one.extent]
        models = [one for one in self.lacking if one.member.kind != "dataset"]
        return sum(extent.nbytes for extent in known), len(known) == len(models) and all(one.exact for one in known)

    @property
    def unknown(self) -> int:
        """How many models nothing is recorded of."""
        return sum(one.extent is None and one.member.kind != "dataset" for one in self.lacking)

    @property
    def memory(self) -> int:
        """The most that one worker holds of models."""
        return max((need.memory or 0 for need in self.tasks.values()), default=0)

    @property
    def written(self) -> tuple[int, bool]:
        """(bytes of products that are yet to be made, whether that is all: no line is open or made for several)."""
        return (sum(need.written or 0 for need in self.tasks.values()),
                not any(need.open or need.each and need.written for need in self.tasks.values()))


def needs(plan: Plan, workers: int = 1, *, timed: bool = False) -> Needs:
    """What a plan takes with so many workers. Reads headers; raises nothing that a run would not tell better.

    timed  also how long, which measures the machine where it is not known yet
    """
    counting = _Counting(read_recorded(plan.zoo.file), workers, plan.zoo.folder if timed else None)
    found = {task.name: counting.need(task) for task in plan if task.state not in ("done", "alias")}
    lacking: dict[str, Lacking] = {}
    for member in (member for task in plan for one in task.lacks for member in _below(one)):
        if not present(replace(member, base=None, kind="dataset" if member.kind == "dataset" else "model")):
            lacking.setdefault(member.path, Lacking(member, _how(member, plan), counting.extent(member)))
    return Needs(found, tuple(sorted(lacking.values(), key=lambda one: one.member.kind == "dataset")))


def _below(member: Member) -> Iterable[Member]:
    yield member
    if member.changes and member.base:
        yield from _below(member.base)


def _how(member: Member, plan: Plan) -> str:
    try:
        whole(member.path, member.kind)
    except NotHere as lacking:
        return lacking.command
    except ZooError:
        pass
    return f"put it into {member.path.removeprefix(f'{plan.zoo.file.parent}/')}"


def _times(task: Task, name: str) -> int:
    """How many elements of a group that is awaited a line names one by one."""
    values = [value for value in task.line.params.values() if isinstance(value, list)]
    words = [word for value in values for word in value if isinstance(word, str)]
    full = [*words, *(f"{task.line.recipe}/{word}" for word in words)]
    return sum(word.startswith(f"{name}/") for word in full) or 1


def _of_each(name: str, level: str, dense: int) -> bool:
    """Whether each expert of a mixture at this level has a tensor of this name, or all have one."""
    found = re.match(r"model\.layers\.(\d+)\.(mlp\.)?", name)
    if found is None:
        return level == "text" or level == "model" and (not dense or "embed_tokens" not in name)
    return level == "text" or int(found[1]) >= dense and (level != "ffn" or bool(found[2]))


def _mixed(member: Member) -> Extent | None:
    """A mixture that is there: its numbers as it runs, and the bytes of its files."""
    from glue.kinds.size import size

    try:
        files = sum(file.stat().st_size for file in locate(member.path).rglob("*.safetensors"))
        return Extent(size(member).whole, files)
    except (GlueError, OSError):
        return None


class _Counting:
    """Goes through the tasks of a plan in order, and remembers how large each product will be."""

    def __init__(self, recorded: Mapping[str, Recorded], workers: int, timed: Path | None):
        self.recorded, self.workers, self.timed = recorded, workers, timed
        self.texts: Tokens | None = None  # of the task that is looked at
        self.work: float | None = None  # seconds of one worker, of the merge that is looked at
        self.opened: dict[tuple[str, str, str], Weights | None] = {}
        self.made: dict[str, list[Extent | None]] = {}

    def need(self, task: Task) -> Need:
        """What one task takes; its product is known from then on."""
        members = [member for member in (task.known or task.inputs) if member.kind in MODELS]
        several = [self.extent(member) for member in members]
        several += [one for name in task.waits_for for one in self.made.get(name, []) * _times(task, name)]
        sizes = [one for one in several if one]
        each, exact = task.state == "deferred", len(sizes) == len(several) and all(one.exact for one in sizes)
        traits = families("steps")[task.step].traits if task.choice else {}
        made = self._makes(task, members, sizes, traits.get("writes"))
        self.made[task.name] = several if task.makes == "group" and not each else [made]
        self.texts = self.work = None
        hold = self._holds(task, members, sizes, traits.get("holds"))
        read = sum(one.nbytes for one in sizes) if sizes and not each else None
        device = str(task.choice.params.get("device") or "cpu") if task.choice else "cpu"
        timed = self.timed and task.state == "ready" and device == "cpu"
        takes = self._takes(task, read, made, sizes) if timed else None
        return Need(read, made.nbytes if made else None, hold.call if hold else None, each, exact,
                    bool(traits.get("writes")) and made is None, hold, device, takes)

    def _takes(self, task: Task, read: int | None, made: Extent | None, sizes: list[Extent]) -> Seconds | None:
        """About how long a task takes that can begin: what it reads, writes and calculates."""
        assert self.timed is not None and task.choice is not None
        written, largest = made.nbytes if made else 0, max((one.parameters for one in sizes), default=0)
        operations = 0.0
        if self.texts is not None:
            params, texts = task.choice.params, self.texts.texts
            if "steps" in params and isinstance(params.get("batch_size"), int):
                texts = params["steps"] * params["batch_size"]
            # each number once forward, once for what goes back, once for its own gradient where it has one
            each = 2 if task.step == "evaluate" else 4 if task.makes == "adapter" else 6
            operations = each * largest * self.texts.mean * texts
        elif self.work is None and task.step != "cluster":
            return None
        if (read or 0) + written < LEAST and operations < 1000 * LEAST or (pace := pace_of(self.timed)) is None:
            return None
        work = operations / pace.flops + (self.work or 0) / max(1, self.workers)
        found = Seconds.of(((read or 0) + written) / pace.read, written / pace.write, work)
        # layers reach half the speed of a plain product, or more
        return replace(found, most=found.most + operations / pace.flops) if found else None

    def _makes(self, task: Task, members: Sequence[Member], sizes: list[Extent], writes: Any) -> Extent | None:
        if task.choice is None or not sizes or not writes:
            return None
        exact = all(one.exact for one in sizes)
        if task.makes == "mixture" and (found := self._mixture(task, members)):
            return replace(found, exact=exact and found.exact)
        if task.makes == "adapter":  # of a federation, how the parts are combined decides
            return self._adapter(task, members) if "combine" not in task.choice.params else None
        parameters = (sum if writes == "all" else max)(one.parameters for one in sizes)
        nbytes = (sum if writes == "all" else max)(one.nbytes for one in sizes)
        dtype = TYPES.get(task.choice.params.get("dtype") or "")
        if task.step == "tune":  # is written as it was trained
            nbytes = parameters * RUNS
        return Extent(parameters, parameters * dtype.itemsize if dtype else nbytes, exact)

    def _mixture(self, task: Task, members: Sequence[Member]) -> Extent | None:
        """What each expert has and what they share, without the gates; None where some experts are yet to be made."""
        assert task.choice is not None
        params = task.choice.params
        experts = [member for member in members if member.name != params["base"]]
        headers = [found.headers for found in map(self.weights, experts) if found is not None]
        awaited = [name for name in task.waits_for if name.split("/", 1)[1] != params["base"]]
        if not headers or len(headers) < len(experts) or awaited:
            return None
        numbers = nbytes = 0
        for name, header in headers[0].items():
            times = len(experts) if _of_each(name, params["level"], params["dense_layers"]) else 1
            numbers, nbytes = numbers + times * header.numel, nbytes + times * header.nbytes
        return Extent(numbers, nbytes, exact=False)

    def _adapter(self, task: Task, members: Sequence[Member]) -> Extent | None:
        """The factors of an adapter at the largest of its ranks: those that are trained in fp32, or are cut out."""
        assert task.choice is not None
        params = task.choice.params
        rank, found = params.get("rank"), self.weights(members[0]) if members else None
        cut = task.step == "extract"
        if found is None or rank is None or not (cut or params.get("targets")):
            return None
        largest = max(rank.values()) if isinstance(rank, dict) else rank
        numbers = factor_numbers(self._layers(task, found), None, largest) if cut else \
            factor_numbers(found.headers, params["targets"], largest)
        exact = not cut or not (params["energy"] or params["error"])  # which are content with less
        return Extent(numbers, numbers * (TYPES[params["dtype"]].itemsize if cut else RUNS), exact)

    def _layers(self, task: Task, found: Weights) -> dict[str, Header]:
        """What an adapter is cut out of, as far as names tell."""
        assert task.choice is not None
        targets = task.choice.params["targets"]
        return {name: header for name, header in found.headers.items() if of_layer(name, header.shape)
                and (not targets or f".{name}".removesuffix(".weight").endswith(tuple(f".{one}" for one in targets)))}

    def _holds(self, task: Task, members: Sequence[Member], sizes: list[Extent], holds: Any) -> Footprint | None:
        if task.choice is None or not sizes:
            return None
        params, largest = task.choice.params, max(one.parameters for one in sizes)
        wide = WIDTHS.get(str(params.get("dtype") or ""), RUNS)
        if holds == "runs":
            number = max(1, len(members) + len(task.waits_for))
            more, exact = self._passes(task, members, largest) if task.step == "evaluate" else (0, False)
            if task.step == "search":  # candidates, which are all alike
                return Footprint(int(largest * wide), MANY, exact=False)
            each = tuple(int(one.parameters * wide) + more for one in sizes)
            return Footprint(max(each), number, exact=exact, sizes=each if number == len(each) else ())
        if holds == "trains":
            factors = self._adapter(task, members) if task.makes == "adapter" else None
            clients = params.get("clients", 1)
            number = clients if isinstance(clients, int) else len(clients)
            more, exact = self._passes(task, members, largest)
            call = int(largest * wide) + factors.parameters * TRAINS if factors else largest * TRAINS
            return Footprint(call + more, number, exact=exact)
        if task.waits_for:
            return None
        if holds == "pieces":
            return self._merged(task, members)
        return self._looked_at(task, members) if holds else None

    def _passes(self, task: Task, members: Sequence[Member], largest: int) -> tuple[int, bool]:
        """(bytes that batches take beside the weights, whether that is known); where little is held, nobody looks."""
        assert task.choice is not None
        model = next((one for one in members if one.kind == "model" and present(one)), None)
        found = self.weights(model) if model else None
        build = Build.of(found.headers) if found else None
        if model is None or build is None or largest < LARGE or task.state != "ready":
            return 0, False
        size = task.choice.params.get("batch_size")
        if task.step == "evaluate":
            tokens = self.texts = asked(task, model)
            rows = Cutter.of(size if isinstance(size, int) else "auto", str(task.choice.params["device"]))
            return (build.asks(min(tokens.texts, rows.rows), tokens.longest), True) if tokens else (0, False)
        tokens = self.texts = trained(task, model)
        if tokens is None or not isinstance(size, int):
            return 0, False
        params = task.choice.params
        length = min(tokens.longest, params.get("max_length") or tokens.longest)
        wide = WIDTHS.get(str(params.get("dtype") or ""), RUNS)
        return build.trains(-(-size // params.get("accumulation", PIECES)), length, wide,
                            again=bool(params.get("checkpointing"))), True

    def _merged(self, task: Task, members: Sequence[Member]) -> Footprint | None:
        """A merge whose members are all known."""
        from glue.merge.engine import prepared
        from glue.merge.estimate import held, work_seconds
        from glue.merge.leaf import Source

        assert task.choice is not None
        method, base = task.choice.params["method"], task.choice.params.get("base")
        if method.method.traits["space"] == "factors":
            return None
        found = {member.name: self.weights(member) for member in members}
        # headers are enough: what is in files is not looked into
        sources = {name: Source(name, Recorded(name, weights.headers)) for name, weights in found.items()
                   if weights is not None}
        below = sources.get(base) if isinstance(base, str) else None
        try:
            merge = prepared(method, [one for name, one in sources.items() if name != base], below)
        except GlueError:
            return None
        if self.timed and task.state == "ready" and sum(header.nbytes for header in merge.headers.values()) > LEAST:
            self.work = work_seconds(merge)
        return Footprint(held(merge), min(MANY, len(merge.targets)))

    def _looked_at(self, task: Task, members: Sequence[Member]) -> Footprint | None:
        """Members whose weights are compared, or taken apart."""
        assert task.choice is not None
        params, known = task.choice.params, [self.weights(member) for member in members]
        sources = [one for one in known if one is not None]
        if len(sources) < len(known) or len(sources) < 2:
            return None
        if task.step == "extract":
            layers = self._layers(task, sources[0])
            return extracted(layers, params["rank"], TYPES[params["dtype"]].itemsize, self.workers) if layers else None
        exact = compared(sources, max(1, self.workers), delta=params["mode"] == "delta")
        both = [exact, sketched(sources, len(sources))] if params["sketch"] else [exact]
        return max(both, key=lambda one: one.peak(self.workers))

    def weights(self, member: Member) -> Weights | None:
        """Headers of a member: those of its files, or recorded ones."""
        key = member.kind, member.name, member.path
        if key not in self.opened:
            self.opened[key] = self._weights(member)
        return self.opened[key]

    def _weights(self, member: Member) -> Weights | None:
        if present(member):
            from glue.kinds import weights

            try:
                return weights(member)
            except GlueError:
                return None
        name = member.path.removeprefix("hub:").partition("@")[0]
        return self.recorded.get(name)

    def extent(self, member: Member) -> Extent | None:
        """How large a member is; None where nothing is known of it."""
        if member.kind == "mixture" and present(member):
            return _mixed(member)
        found = self.weights(member) if member.kind in MODELS else None
        if found is None:
            return None
        headers: Iterable[Header] = found.headers.values()
        numbers, nbytes = (sum(values) for values in zip(*((header.numel, header.nbytes) for header in headers),
                                                         strict=True))
        return Extent(numbers, nbytes, not isinstance(found, Recorded) or found.exact)
