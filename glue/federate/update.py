"""Updates: what a client returns from a round, a folder of safetensors with a note that says what they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from glue.errors import GlueError, one_line
from glue.files import write_aside
from glue.member import canonical

NOTE = "update.json"
STAYS = ("README.md", "factors.json")
Kind = Literal["lora", "full"]


class Refused(GlueError):
    """An update that is not taken. The round goes on without it, and the ledger says why."""


@dataclass(frozen=True)
class Update:
    """One reply of one client.

    base      digest of the member that the federation began with
    parent    digest of the state that the client was sent; "" in the first round
    rank      of its adapter; 0 for full
    examples  how many the client has, which is its weight
    steps     how many it was trained for
    bytes     of the folder, as it was received
    """

    client: str
    round: int
    base: str
    parent: str
    kind: Kind
    rank: int
    examples: int
    steps: int
    seed: int
    bytes: int = 0
    folder: Path = Path()

    def write(self, folder: Path) -> None:
        """Put the note into a folder, last of all files: its presence means complete."""
        told = {key: value for key, value in asdict(self).items() if key not in ("bytes", "folder")}
        write_aside(folder / NOTE, canonical(told))


def read_update(folder: Path) -> Update:
    """The update in a folder. Raises Refused where its note is missing or not understood."""
    try:
        told = json.loads((folder / NOTE).read_bytes())
        update = Update(**told)
    except (OSError, ValueError, TypeError, RecursionError) as problem:
        raise Refused(f"it has no note that is understood ({one_line(str(problem), 120)})") from None
    for key, kind in (("client", str), ("base", str), ("parent", str), ("kind", str), ("round", int), ("rank", int),
                      ("examples", int), ("steps", int), ("seed", int)):
        if type(getattr(update, key)) is not kind:
            raise Refused(f"its note says {key}: {one_line(str(told[key]), 60)}")
    return replace(update, bytes=size_of(folder), folder=folder)


def sent(folder: Path) -> list[Path]:
    """The files of an update or a state that travel, by name; no cards, nor what is known of a state besides."""
    return sorted(file for file in folder.iterdir()
                  if file.is_file() and file.name not in STAYS and not file.name.startswith("."))


def size_of(folder: Path) -> int:
    """Bytes of all files of a folder that travel."""
    return sum(file.stat().st_size for file in sent(folder))


def check(update: Update, *, client: str, round: int, base: str, parent: str, kind: Kind,
          size: Callable[[Update], float], bound: float) -> None:
    """Raise Refused where an update is not the answer to what was asked, or not fit to be combined.

    size   |delta| / |base| of an update; no number where an entry of it is none
    bound  the largest that is taken
    """
    asked: dict[str, Any] = {"client": client, "round": round, "base": base, "parent": parent, "kind": kind}
    for key, wanted in asked.items():
        if (found := getattr(update, key)) != wanted:
            raise Refused(f"it is for {key} {one_line(str(found), 40)!r}, and {wanted!r} was asked for")
    if update.examples < 1:
        raise Refused(f"it was trained on {update.examples} examples")
    found = size(update)
    if not math.isfinite(found):
        raise Refused("it holds numbers that are not finite")
    if found > bound:
        raise Refused(f"it changes the base by {found:.3g} of its norm; at most {bound:g} is taken")
