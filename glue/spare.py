"""Spare: what lies in a zoo's folder and nobody needs - products, drafts of runs that have ended, notes in caches."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glue.errors import GlueError
from glue.files import REPLACED
from glue.identity import forgotten
from glue.member import FOLDER_NOTE, Member
from glue.zoo import Zoo

DRAFTS, ANSWERED = ".drafts", "answered"  # in a zoo's folder


@dataclass(frozen=True)
class Stale:
    """Something that may go.

    path    a file or a folder      size  in bytes
    why     nobody needs it, in a few words
    """

    path: Path
    size: int
    why: str


def unreferenced(zoo: Zoo, *, delete: bool) -> list[tuple[str, int]]:
    """(folder, bytes) of every product folder that no member needs: removed ones, and replaced versions.

    A replaced version is kept as long as the newest version of some member was made from it. A folder without a note
    of ours, or whose note cannot be read, is left alone; so is whatever a member's path leads to.
    """
    needed = _needed(zoo)
    paths = {Path(member.path).resolve() for member in needed if not member.path.startswith("hub:")}
    keys = {member.origin.key for member in needed if member.origin}
    found = []
    for folder, key in _products(zoo.folder):
        aside = REPLACED in folder.name  # of what was put aside by `publish`, another folder has taken the place
        used = any(path == folder or folder in path.parents or path in folder.parents for path in paths)
        if not used and (aside or key not in keys):
            found.append((str(folder), size_of(folder)))
            if delete:
                shutil.rmtree(folder)
    return found


def _needed(zoo: Zoo) -> list[Member]:
    """The newest version of each member, the versions those were made from, and all that these stand on."""
    newest = list(zoo)
    digests = {digest for member in newest if member.origin for inputs in member.origin.inputs.values()
               for digest in inputs}
    waiting = newest + [member for one in newest for member in zoo.versions(one.name) if member.digest in digests]
    found: list[Member] = []
    while waiting:
        member = waiting.pop()
        found.append(member)
        waiting += [member.base] if member.base else []
        waiting += [one for item in member.elements for one in (item.root, *item.members) if one]
    return found


def _products(zoo: Path) -> Iterator[tuple[Path, str]]:
    """Every folder below the zoo's that a step has left, with the key of its origin; links are not followed."""
    for place, folders, files in os.walk(zoo.resolve()):
        folders[:] = sorted(name for name in folders if name != DRAFTS)
        if FOLDER_NOTE in files:
            with suppress(OSError, ValueError, KeyError, TypeError):
                yield Path(place), str(json.loads((Path(place) / FOLDER_NOTE).read_bytes())["key"])


def products(zoo: Zoo) -> tuple[int, int]:
    """(how many product folders lie in a zoo, their bytes together), with what `gc` would delete."""
    sizes = [size_of(folder) for folder, _ in _products(zoo.folder)]
    return len(sizes), sum(sizes)


def size_of(place: Path) -> int:
    """Bytes of a file, or of all files below a folder; those of a file with several names once."""
    if place.is_file():
        return place.stat().st_size
    found: dict[tuple[int, int], int] = {}
    for file in place.rglob("*"):
        with suppress(OSError):  # gone meanwhile
            stat = file.lstat()
            if file.is_file() and not file.is_symlink():
                found[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(found.values())


def stale(zoo: Zoo, *, delete: bool) -> list[Stale]:
    """Drafts of runs that have ended, and answers of evaluations whose member is not in the zoo any more.

    Some steps would go on from such a draft if their recipe were run again. What a living run writes is left alone.
    """
    drafts = zoo.folder / DRAFTS
    found = [Stale(draft, size_of(draft), "draft of a run that has ended")
             for draft in sorted(drafts.glob("*-*")) if not lives(draft)]
    left = sorted((zoo.folder / ANSWERED).glob("*.jsonl"))
    known = _digests(zoo, {file.name.split("-")[0] for file in left})
    found += [Stale(file, file.stat().st_size, "answers of a member that is gone")
              for file in left if known is not None and file.name.split("-")[0] not in known]
    if delete:
        for one in found:
            shutil.rmtree(one.path) if one.path.is_dir() else one.path.unlink(missing_ok=True)
    return found


def _digests(zoo: Zoo, wanted: set[str]) -> set[str] | None:
    """Digests of all members, as far as it takes to find those that are wanted; None where some cannot be told, since
    what is wanted may be theirs."""
    found = {one.digest for newest in zoo for one in zoo.versions(newest.name)}
    try:
        for member in (one for one in zoo if not one.digest and wanted - found):
            found.add(zoo.identified(member).digest)
    except GlueError:  # it is not on this machine
        return None
    return found


def lives(draft: Path) -> bool:
    """Whether the run that made a draft is still there, as its name tells."""
    process = draft.name.rsplit("-", 1)[1]
    return not process.isdecimal() or running(int(process))


def running(process: int) -> bool:
    """Whether there is a process with this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def pruned(zoo: Zoo, *, delete: bool) -> int:
    """How many folders the zoo knows digests of that are not there any more; they are forgotten with `delete`."""
    return forgotten(zoo.digests, delete=delete)
