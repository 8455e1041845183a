"""Reproduction: a product made again from what its folder says of it, and compared digest by digest."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from glue.checkpoint import tensor_digest
from glue.errors import GlueError, RunError, ZooError, one_line
from glue.identity import checkpoints, identify, parts
from glue.kinds.device import usable
from glue.member import CHANGES, FOLDER_NOTE, Member, Origin, Table
from glue.recorded import Lost, bound, inputs, raised
from glue.run import made_with, with_identity, write_elements
from glue.steps import Job, Made, wide
from glue.workers import Workers
from glue.zoo import Zoo

CHOICE = "search.json"  # in the folder of what a search found


@dataclass(frozen=True)
class Compared:
    """One tensor or file that is not the same. Digests; nothing where it is not there at all."""

    what: str
    was: str
    again: str


@dataclass(frozen=True)
class Reproduction:
    """A product, and what came out when it was made again.

    digest   as it was recorded              now       of its folder as it lies there
    again    of what was made; nothing where it was not made, because inputs are `lost`
    same     how many tensors and files are equal; `differ` are those that are not, against the folder as it is
    reasons  why there may be a difference, as far as it is known: versions, machine, or a folder changed since
    how      as it was made the first time, or by the choice that a search recorded
    """

    name: str
    kind: str
    step: str
    folder: str
    digest: str
    now: str
    again: str = ""
    how: str = ""
    lost: tuple[Lost, ...] = ()
    same: int = 0
    differ: tuple[Compared, ...] = ()
    reasons: tuple[str, ...] = ()
    made_with: Mapping[str, str] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether it came out as it was recorded, to the bit, and the folder still holds that."""
        return self.again == self.digest == self.now

    def as_data(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {**asdict(self), "equal": self.equal}


def reproduce(what: str, zoo: Zoo, workers: Workers, *, search: bool = False, device: str = "",
              report: Callable[[int, int, str], None] = lambda done, total, note: None) -> Reproduction:
    """Make a product again from its folder's note and the inputs that it names, beside it, and compare.

    what    a folder, or a member of the zoo
    search  search again, and do not take the choice that was recorded
    device  where it is made, of steps that can be told; "" for the processor. What it ran in is part of the origin
    Nothing is made where an input is not what it was. What is made is removed again. Raises GlueError for what has no
    origin, and for what cannot be made at all.
    """
    folder, note = _noted(what, zoo)
    origin = Origin.from_dict(note["origin"])
    if origin.key != note["key"]:
        raise ZooError(f"{folder / FOLDER_NOTE} has been changed: its origin is not that of its key",
                       fix="put it there again from a backup, or run the recipe again")
    here = made_with(workers, device or "cpu")
    found, lost = inputs(origin, zoo)
    told = {"name": note["name"], "kind": note["kind"], "step": origin.step, "folder": str(folder),
            "digest": note["digest"], "made_with": here}
    if lost:
        return Reproduction(**told, now=_now(folder, note, found, zoo), lost=tuple(_located(lost, note)))
    choice, arguments = bound(origin, found, _suite_of(folder, note))
    if device and (word := wide(choice.method).get("device")):
        usable(device)
        choice = replace(choice, params={**choice.params, word: device})
    recorded = folder / CHOICE
    with tempfile.TemporaryDirectory(dir=_beside(folder), prefix=f".{folder.name}.again-") as place:
        job = Job(note["name"], Path(place) / "made", origin.seed, workers, Path(place) / "shared", report)
        job.folder.mkdir()
        if recorded.is_file() and not search:
            how, made = "by the choice that was recorded", _chosen(job, recorded, choice.params, arguments)
        else:
            how, made = "as it was made", choice(job, **arguments)
        if made.kind == "group":
            write_elements(with_identity(made, zoo), job.folder)
        same, differ = 0, tuple[Compared, ...]()
        if made.same is not None:
            again = made.same.digest
        else:
            again = zoo.with_base(Member(note["name"], made.kind, str(job.folder), base=made.base,
                                         digest=identify(job.folder)[1])).digest
            same, differ = compared(folder, job.folder)
        now = note["digest"] if made.same is not None else _now(folder, note, found, zoo)
    reasons = () if again == note["digest"] == now else _reasons(origin, here, note["digest"], now, again)
    return Reproduction(**told, now=now, again=again, how=how, same=same, differ=differ, reasons=reasons)


def _noted(what: str, zoo: Zoo) -> tuple[Path, dict[str, Any]]:
    """The folder that a word means, and what it says of itself. Raises ZooError."""
    folder = Path(what)
    if not (folder / FOLDER_NOTE).is_file():
        member = zoo[what]
        if member.origin is None:
            raise ZooError(f"'{member.name}' was not made here: nothing says how it came about",
                           fix="name a product, or a folder that holds glue.json")
        own = zoo.folder / f"{member.name}-{member.origin.key[:8]}"  # holds the choice, where it is another member
        folder = own if (own / FOLDER_NOTE).is_file() else member.folder
    folder = folder.resolve()
    try:
        note = json.loads((folder / FOLDER_NOTE).read_bytes())
        if "order" in note:
            raise ZooError(f"{folder} was made by  glue merge , not by a step",
                           fix="its README.md says how it is made again")
        if not {"name", "kind", "digest", "key", "origin"} <= set(note):
            raise ValueError("it does not tell the origin")
    except (OSError, ValueError, TypeError) as problem:
        raise ZooError(f"{folder / FOLDER_NOTE} cannot be read: {one_line(str(problem))}",
                       fix="name the folder of a product") from None
    return folder, note


def _located(lost: list[Lost], note: Mapping[str, Any]) -> Iterator[Lost]:
    """With the commit of the hub that was read, where it was one: there it still is what it was."""
    commits = {one["digest"]: f"{one['hub']} at {one['revision']}" for one in note.get("inputs", ()) if one["hub"]}
    for one in lost:
        yield replace(one, why=f"{one.why}; it was {commits[one.was]}") if one.was in commits else one


def _now(folder: Path, note: Mapping[str, Any], found: Mapping[str, list[Member]], zoo: Zoo) -> str:
    """The digest of a product's folder as it is now; nothing where it cannot be read."""
    try:
        base = next((one if role in ("base", "large") else one.base  # adapters that are merged know what they sit on
                     for role in ("base", "large", "of", "members") for one in found.get(role, [])), None)
        if note["kind"] in CHANGES and base is None:
            return ""  # its digest is that of both
        return zoo.with_base(Member(note["name"], note["kind"], str(folder), base=base,
                                    digest=identify(folder)[1])).digest
    except GlueError:
        return ""


def _suite_of(folder: Path, note: Mapping[str, Any]) -> str:
    """The name of the suite, which a table says in every row; the choice of a search or a router does not need it."""
    if note["kind"] != "table":
        return "recorded"
    return Table.read(Member(note["name"], "table", str(folder))).rows[0].suite.rpartition(":")[0]


def _beside(folder: Path) -> Path | None:
    """Where a temporary folder may lie: on the same disk if that can be written to."""
    return folder.parent if os.access(folder.parent, os.W_OK) else None


def _chosen(job: Job, file: Path, params: Mapping[str, Any], arguments: Mapping[str, Any]) -> Made:
    """What a search found, merged again without measuring anything."""
    from glue.search.candidate import Candidate
    from glue.steps._candidates import Ground, layers_of
    from glue.steps.search import write_candidate

    try:
        candidate = Candidate.unspelled(json.loads(file.read_bytes())["candidate"])
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise RunError(f"{file} does not say what the search chose ({one_line(str(problem))})",
                       fix="add --search, which searches again") from None
    members, base = arguments["members"], arguments.get("base")
    ground = Ground("", tuple(members), base, params["merge"], params["dtype"], arguments["suite"], job.seed,
                    layers_of(members[0]), job.place(params["device"], params["runs_in"]))
    if not candidate.merged:
        member = ground.member(candidate.names[0])
        return Made(member.kind, same=member)
    write_candidate(job, ground, candidate)
    return Made("model", base=ground.frame)


def compared(folder: Path, again: Path) -> tuple[int, tuple[Compared, ...]]:
    """How many tensors and files two folders have in common, and which they do not."""
    was, now = _digests(folder), _digests(again)
    names = sorted({*was, *now})
    differ = tuple(Compared(name, was.get(name, ""), now.get(name, "")) for name in names
                   if was.get(name) != now.get(name))
    return len(names) - len(differ), differ


def _digests(folder: Path) -> dict[str, str]:
    """File or tensor -> digest, of all that counts; nothing of a folder whose weights are damaged."""
    try:
        found = parts(folder)
        for place, checkpoint in checkpoints(folder).items():
            above = place.removesuffix("weights")
            found |= {f"{above}{name}": tensor_digest(name, checkpoint[name]) for name in checkpoint}
    except GlueError:
        return {}
    return found


def _reasons(origin: Origin, here: Mapping[str, str], digest: str, now: str, again: str) -> tuple[str, ...]:
    """Why it did not come out as it was recorded."""
    found = ["its folder has been changed since it was made"] if now != digest else []
    if again != digest:
        found += raised(origin)
        found += [f"{word} was {was}, and is {here.get(word, 'not there')}" for word, was in origin.made_with.items()
                  if here.get(word) != was]
    return tuple(found) or ("nothing that is recorded is different: the step, or a library below it, does not do the "
                            "same twice on this machine",)
