"""Members of a zoo, the origin that each product carries, and tables of scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from glue.hub import locate

FOLDER_NOTE = "glue.json"  # the file in a product's folder that says what it is and how it came about
IN_WEIGHTS = ("adapter", "seed_history", "tensor_train")  # kinds that say only how their base's weights are changed
CHANGES = (*IN_WEIGHTS, "prompt", "proxy")  # and those that leave these as they are, and change what the base says


@dataclass(frozen=True)
class Origin:
    """How a member came about. Two equal keys are the same member.

    step       name of the step, with its hand-raised version: "merge/1"
    inputs     role -> digests of the members that went in, in the order that counts
    names      role -> their names, for readers; no part of the key
    params     every parameter with its value, defaults spelled out
    made_with  versions of libraries and hardware; recorded, no part of the key
    """

    step: str
    inputs: Mapping[str, tuple[str, ...]]
    params: Mapping[str, Any]
    seed: int
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    made_with: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """sha256 of step, inputs, parameters and seed."""
        told = {"step": self.step, "inputs": {role: list(digests) for role, digests in sorted(self.inputs.items())},
                "params": self.params, "seed": self.seed}
        return hashlib.sha256(canonical(told).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Origin:
        """The origin that `as_dict` wrote."""
        known = {**data, "inputs": {role: tuple(digests) for role, digests in data["inputs"].items()},
                 "names": {role: tuple(names) for role, names in data.get("names", {}).items()}}
        return Origin(**known)


@dataclass(frozen=True)
class Element:
    """One place of a group: a family, or what a step made of it.

    name     of the root, without the recipe it comes from
    root     the member that the others come from: the declared ancestor, or the medoid
    members  one or more
    """

    name: str
    root: Member | None
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Member:
    """One thing in the zoo. Never changes once added.

    kind         model, adapter, seed_history, tensor_train, prompt, proxy, mixture, endpoint, dataset, table or group
                 (those that run have a module in glue/kinds)
    path         a folder, or hub:owner/name@revision; of a dataset also hub:owner/name/folder@revision
    base         the member it derives from: what a change sits on, what a model was tuned or merged from
    fingerprint  fast identity: headers and samples           digest  every byte that counts
    seen         digests of the dataset splits that a search of its lineage has looked at
    elements     of a group only
    """

    name: str
    kind: str
    path: str
    tags: frozenset[str] = frozenset()
    base: Member | None = None
    origin: Origin | None = None
    fingerprint: str = ""
    digest: str = ""
    licence: str = ""
    seen: frozenset[str] = frozenset()
    elements: tuple[Element, ...] = ()
    note: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.digest))

    @property
    def short(self) -> str:
        """The name without the recipe or owner before it."""
        return self.name.rsplit("/", 1)[-1]

    @property
    def folder(self) -> Path:
        """The local folder, in the cache of the hub for what is from there. Raises NotHere where it is not."""
        return locate(self.path, self.kind) if self.path.startswith("hub:") else Path(self.path)

    @property
    def version(self) -> str:
        """name@digest8, which means this member and no other."""
        return f"{self.name}@{self.digest[:8]}"

    @property
    def changes(self) -> bool:
        """Whether it is nothing without its base, as an adapter is."""
        return self.kind in CHANGES

    def lineage(self) -> Iterator[Member]:
        """What it derives from, nearest first."""
        base = self.base
        while base is not None:
            yield base
            base = base.base

    def named(self, name: str) -> Member:
        """The same thing under another name."""
        return replace(self, name=name)


@dataclass(frozen=True)
class Score:
    """What one member scored on one task; one line of scores.jsonl.

    results  one number per item, in the order of the split: 0/1, or a share
    split    digest of the items, so that only like is compared with like
    how      how it was measured: the task's settings and the harness
    chance   what guessing scores
    """

    member: str
    digest: str
    suite: str
    task: str
    metric: str
    results: tuple[float, ...]
    split: str
    how: str
    chance: float = 0.0
    seen_by_search: bool = False

    @property
    def value(self) -> float:
        """The mean over items."""
        return sum(self.results) / len(self.results)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Score:
        """The score that `as_dict` wrote."""
        return Score(**{**data, "results": tuple(data["results"])})


@dataclass(frozen=True)
class Table:
    """Scores of several members on one suite: what `evaluate` leaves."""

    rows: tuple[Score, ...]

    @staticmethod
    def read(member: Member) -> Table:
        """The rows of a table member."""
        lines = (member.folder / "scores.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        return Table(tuple(Score.from_dict(json.loads(line)) for line in lines))

    def write(self, folder: Path) -> None:
        """Put the rows into `folder`, one a line."""
        text = "".join(canonical(row.as_dict()) + "\n" for row in self.rows)
        (folder / "scores.jsonl").write_text(text, encoding="utf-8")


def with_article(kind: str) -> str:
    """A kind in a sentence: an adapter, a seed_history."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def canonical(data: Any) -> str:
    """JSON with sorted keys and no spaces: the same text for the same data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
