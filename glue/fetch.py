"""Fetching: what members, tags, recipes and hub paths lack on this machine: told, and then brought."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from glue.checkpoint import INDEX, indexed
from glue.document import read
from glue.download import File, Listing, bring, cache_folder, listed, offline, small
from glue.errors import GlueError, Mistakes, NotHere, RunError, Unreachable, ZooError, did_you_mean, one_line
from glue.hub import HUB, Address, address, locate
from glue.member import Member
from glue.plan import make_plan, present
from glue.recipe import read_recipe
from glue.snapshot import RECORDS, WEIGHTS, needed, whole
from glue.zoo import KINDS, Zoo

CONVERT = "https://huggingface.co/spaces/safetensors/convert"  # opens a pull request that adds safetensors
MARGIN = 64 << 20  # bytes that stay free


@dataclass(frozen=True)
class Asked:
    """A repository that is asked for, and the kind and names of the members that need it."""

    address: Address
    kind: str
    names: tuple[str, ...] = ()

    @property
    def called(self) -> str:
        """The names, or the path where it is no member."""
        return ", ".join(self.names) or self.address.path


@dataclass(frozen=True)
class Bundle:
    """The files of one repository that its members need."""

    asked: Asked
    listing: Listing
    files: tuple[File, ...]
    left: dict[str, int] = field(default_factory=dict)  # name -> bytes that have yet to come, when this was made

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)

    @property
    def coming(self) -> int:
        """Bytes that have yet to come."""
        return sum(self.left.values())

    @property
    def pin(self) -> str:
        """The path that means this commit for ever."""
        found = self.asked.address
        return Address(found.name, self.listing.commit, found.kind, found.inner).path

    def as_data(self) -> dict[str, Any]:
        """All of it as plain data."""
        found = self.asked.address
        return {"members": list(self.asked.names), "repository": found.name, "kind": found.kind,
                "revision": found.revision or "main", "commit": self.listing.commit, "pin": self.pin,
                "moves": found.moves, "folder": str(self.listing.folder), "bytes": self.size,
                "bytes_to_download": self.coming, "files": [
                    {"name": one.name, "bytes": one.size, "bytes_to_download": self.left[one.name],
                     "sha256": one.blob if one.large else ""} for one in self.files]}

    def lines(self) -> Iterator[str]:
        """The same for people."""
        found = self.asked.address
        yield (f"{self.asked.called}: {f'the {found.kind} ' * (found.kind != 'model')}{found.name} at "
               f"{self.listing.commit}" + (f" ({found.revision or 'main'})" if found.moves else ""))
        for one in self.files:
            left = self.left[one.name]
            note = "  here" if not left else f"  {one.size - left:,} of them are here" if left < one.size else ""
            yield f"  {one.size:>16,}  {one.name}{note}"


def asked(words: Sequence[str], zoo: Callable[[], Zoo], kind: str = "model") -> list[Asked]:
    """What these words ask for: names of members, `tag:x`, hub paths (of this kind), and recipes, of which it is what
    their plans lack. Each repository once.

    zoo  opened only where something in it is named
    Raises GlueError for words that mean nothing, and for what can be fetched from nowhere.
    """
    if kind not in KINDS:
        raise ZooError(f"there is no kind '{one_line(kind)}'{did_you_mean(kind, KINDS)}")
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for word in words:
        if word.startswith("hub:"):
            members: Iterable[Member] = [Member("", kind, word)]
        elif word.endswith((".yaml", ".yml")):
            members = _lacked(Path(word), zoo)
        else:
            members = [part for one in zoo().select(word) for part in _parts(one)]
        for member in (one for some in members for one in _below(some)):
            if member.path.startswith("hub:"):
                place = address(member.path, member.kind)
                _, names = found.setdefault((place.path, place.kind), (member.kind, []))
                if member.name and member.name not in names and not member.name.startswith("hub:"):
                    names.append(member.name)
            else:
                locate(member.path)  # raises where it is not here, since nobody knows where it could be got
    return [Asked(address(path, of), of, tuple(names)) for (path, _), (of, names) in found.items()]


def _parts(member: Member) -> list[Member]:
    return [one for item in member.elements for one in item.members] if member.kind == "group" else [member]


def _below(member: Member) -> Iterator[Member]:
    yield member
    if member.changes and member.base:
        yield from _below(member.base)


def _lacked(file: Path, zoo: Callable[[], Zoo]) -> list[Member]:
    """Members of the hub that are not, or not wholly, on this machine, and that a recipe or a merge config names."""
    if not file.is_file():
        raise RunError(f"there is no file {file}", fix="name a recipe, a member, tag:x, or hub:owner/name")
    told = read(file, RunError).value
    if isinstance(told, dict) and "steps" not in told and "include" not in told:
        return list(_configured(file))
    plan = make_plan(read_recipe(file), zoo(), missing=True)
    members = [member for task in plan for member in (*task.lacks, *task.known, *task.inputs)]
    return [one for member in members for one in _below(member)
            if one.path.startswith("hub:") and not present(one)]


def _configured(file: Path) -> Iterator[Member]:
    """Models of a merge config that are neither folders here nor names of one."""
    from glue.merge.mergekit.config import read_configs

    for config in read_configs(file):
        for ref in config.referenced():
            path = f"hub:{ref.path}" + (f"@{ref.revision}" if ref.revision else "")
            if HUB.fullmatch(path) and ref.path.count("/") == 1 and not Path(ref.path).expanduser().exists():
                member = Member("", "model", path)
                if not present(member):
                    yield member


def looked_up(some: Sequence[Asked]) -> list[Bundle]:
    """What the hub has of these, as far as members need it. Fetches no weights.

    Where nothing may be fetched and nothing is missing, the hub is not asked, and there are none.
    Raises one GlueError with everything that stands in the way: what is offline, gated, private, not there, or has no
    weights that are read.
    """
    if offline():
        _refuse_offline(some)
        return []
    found: list[Bundle] = []
    wrong: list[GlueError] = []
    for one in some:
        try:
            found.append(bundle(one, listed(one.address)))
        except Unreachable:
            raise
        except GlueError as problem:
            wrong.append(problem)
    if wrong:
        raise wrong[0] if len(wrong) == 1 else Mistakes(wrong)
    return found


def _refuse_offline(some: Sequence[Asked]) -> None:
    """Raise RunError with what is missing, where nothing may be fetched."""
    lost = []
    for one in some:
        try:
            whole(one.address.path, one.kind)
        except NotHere as problem:
            lost.append(f"{one.called}: {problem.part or 'all of it'}  ({one.address.ours})")
    if lost:
        raise RunError(f"HF_HUB_OFFLINE is set, so nothing is fetched, and {len(lost)} "
                       f"{'repositories are' if len(lost) > 1 else 'repository is'} not wholly on this machine",
                       fix="\n    ".join(["unset it, and run this again; missing:", *lost]))


def bundle(one: Asked, listing: Listing) -> Bundle:
    """The files that a member of this kind needs. Raises ZooError where the repository has nothing that it could read.
    """
    names = {file.name: file for file in listing.files}

    def shards(place: str) -> set[str]:
        with small(listing, str(PurePosixPath(place, INDEX))) as folder:
            return set(indexed(folder).values())

    want = needed(names, one.kind, shards, one.address.inner)
    if lost := [name for name in want if name not in names]:
        raise ZooError(f"the index of {one.address} names {lost[0]}, which the hub does not have",
                       fix="tell its owner, or name another revision")
    if one.kind == "dataset":
        _check_records(one, want)
    elif not any(name.endswith(".safetensors") for name in want):
        _refuse_pickles(one, names)
    files = tuple(names[name] for name in want)
    return Bundle(one, listing, files, {file.name: listing.left(file) for file in files})


def _check_records(one: Asked, want: Sequence[str]) -> None:
    inner = one.address.inner
    if inner and not any(name == inner or name.startswith(f"{inner}/") for name in want):
        raise ZooError(f"{one.address.name} has no records in '{inner}'",
                       fix=f"{one.address.page}/tree/{one.address.revision or 'main'}  lists its folders")
    if not any(PurePosixPath(name).suffix in {*RECORDS, ".arrow"} for name in want):
        raise ZooError(f"{one.address.name} has no file of records that is read (parquet, jsonl, json)",
                       fix=f"the hub may have made some:  hub:{one.address.name}@refs/convert/parquet")


def _refuse_pickles(one: Asked, names: Iterable[str]) -> None:
    other = sorted(name for name in names if PurePosixPath(name).suffix in WEIGHTS)
    safe = [name for name in other if name.endswith(".safetensors")]
    if safe:
        raise ZooError(f"{one.address} has no safetensors weights under a name that is read, but {', '.join(safe[:3])}",
                       fix="a model has model.safetensors or its index, an adapter adapter_model.safetensors")
    if other:
        raise ZooError(f"{one.address} has no safetensors weights, but {', '.join(other[:3])}, which can run code when "
                       f"it is loaded, or is for another framework",
                       fix=f"look in  {one.address.page}/discussions  for one that adds safetensors, or let "
                           f"{CONVERT}  open one; then name it:  hub:{one.address.name}@refs/pr/1")
    raise ZooError(f"{one.address} has no weights", fix="check its name; of a dataset, add  --kind dataset")


def check_room(bundles: Sequence[Bundle]) -> int:
    """Bytes that are free where the cache is. Raises RunError where what has yet to come does not go there."""
    place = cache_folder()
    while not place.exists():
        place = place.parent
    free, coming = shutil.disk_usage(place).free, sum(one.coming for one in bundles)
    if coming and coming + MARGIN > free:
        raise RunError(f"{coming:,} bytes are to be downloaded, and {free:,} are free in {cache_folder()}: "
                       f"{coming + MARGIN - free:,} are lacking",
                       fix="make room there, or set HF_HOME to a folder on a larger disk")
    if coming and not os.access(place, os.W_OK):
        raise RunError(f"{place} may not be written to", fix="set HF_HOME to a folder that may")
    return free


def fetched(bundles: Sequence[Bundle], report: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Bring everything, and check that members find what they need. Raises GlueError; what has come is kept.

    report  (bytes that are here, bytes in all), from any thread
    """
    check_room(bundles)
    total = sum(one.size for one in bundles)
    done, lock = total - sum(one.coming for one in bundles), Lock()

    def count(size: int) -> None:
        nonlocal done
        with lock:
            done += size
        report(done, total)

    count(0)
    for one in bundles:
        bring(one.listing, one.files, count)
        whole(one.asked.address.path, one.asked.kind)
