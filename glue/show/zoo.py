"""Members, one or many, and the atlas of a zoo."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table as Grid

from glue.hub import Address, address
from glue.member import Member
from glue.room import human
from glue.show.terminal import console
from glue.snapshot import lacking, sha256_of
from glue.tune.curve import read_curve

if TYPE_CHECKING:
    from glue.atlas import Atlas
    from glue.near import Near
    from glue.zoo import Zoo

VERDICTS = {"merge": "green", "merge with care": "yellow", "do not merge": "dim"}
SHOWN = 20  # pairs of an atlas that a terminal shows


def print_members(members: Sequence[Member], as_json: bool) -> None:
    """Members, one a line."""
    if as_json:
        print(json.dumps([as_data(member) for member in members], indent=1))
        return
    grid = Grid(box=None, pad_edge=False)
    for heading in ("name", "kind", "made by", "tags", "note"):
        grid.add_column(heading, overflow="fold")
    for member in members:
        step = member.origin.step if member.origin else ""
        grid.add_row(escape(member.name), member.kind, step, ", ".join(sorted(member.tags)), escape(member.note))
    console().print(grid)


def kept_line(zoo: Zoo) -> str:
    """How many products there are, what they take, and what they may."""
    from glue.spare import products

    number, size = products(zoo)
    of = f" of a budget of {human(zoo.budget)}" if zoo.budget else ""
    return f"{number} products take {human(size)}{of}"


def as_data(member: Member) -> dict[str, Any]:
    """A member as plain data."""
    return {"name": member.name, "kind": member.kind, "path": member.path, "tags": sorted(member.tags),
            "digest": member.digest, "base": member.base.name if member.base else None, "licence": member.licence,
            "note": member.note, "seen": sorted(member.seen),
            "origin": member.origin.as_dict() if member.origin else None,
            "elements": [{"name": item.name, "root": item.root.name if item.root else None,
                          "members": [one.name for one in item.members]} for item in member.elements]}


def print_member(member: Member, versions: Sequence[Member], as_json: bool) -> None:
    """One member with its origin and versions, what its training came to, and which commit of the hub it is."""
    cached, curve = list(_cached(member)), read_curve(Path(member.path))
    if as_json:
        told = {"commit": cached[0], "files": cached[1]} if cached else {}
        told |= {"training": curve.figures()} if curve else {}
        print(json.dumps({**as_data(member), **told, "versions": [one.version for one in versions]}, indent=1))
        return
    out = console()
    out.print(f"[bold]{escape(member.name)}[/]  {member.kind}  [dim]{member.digest}[/]")
    out.print(escape(member.path))
    if cached:
        _print_cached(member, *cached)
    for label, value in (("note", member.note), ("tags", ", ".join(sorted(member.tags))), ("licence", member.licence),
                         ("derives from", " <- ".join(one.name for one in member.lineage()))):
        if value:
            out.print(f"{label}: {escape(value)}")
    if curve:
        out.print(f"trained: {curve.sentence()}")
    for item in member.elements:
        root = f" (root {item.root.name})" if item.root else ""
        out.print(f"  {item.name}{root}: {', '.join(one.name for one in item.members)}")
    if member.origin:
        out.print(f"made by {member.origin.step}, seed {member.origin.seed}, from")
        for role, names in member.origin.names.items():
            out.print(f"  {role}: {escape(', '.join(names))}")
        out.print(f"with {escape(json.dumps(member.origin.params))}")
        out.print(f"[dim]{escape(json.dumps(dict(member.origin.made_with)))}[/]")
    if len(versions) > 1:
        out.print("versions, oldest first: " + ", ".join(one.version for one in versions))


def _cached(member: Member) -> Iterator[Any]:
    """Of a member of the hub: the commit that is on this machine, and its files with their sums; else nothing."""
    if not member.path.startswith("hub:"):
        return
    found = address(member.path, member.kind)
    folder = found.storage / "snapshots" / found.commit
    yield found.commit
    yield [] if not found.commit else [{"name": file.relative_to(folder).as_posix(), "bytes": file.stat().st_size,
            "sha256": sha256_of(file)} for file in sorted(folder.rglob("*")) if file.is_file()]


def _print_cached(member: Member, commit: str, files: Sequence[dict[str, Any]]) -> None:
    found = address(member.path, member.kind)
    if not commit:
        print(f"not on this machine; get it with  {found.ours}")
        return
    moves = f" ({found.revision or 'main'}, which may move; {Address(found.name, commit).path} stays)" * found.moves
    print(f"commit: {commit}{moves}")
    print(f"{len(files)} files, {human(sum(file['bytes'] for file in files))}")
    if lost := lacking(found.storage / "snapshots" / commit, member.kind):
        print(f"missing: {', '.join(lost)}; get them with  {found.ours}")


def print_atlas(found: Atlas, as_json: bool) -> None:
    """Families with their roots, how many pairs have each verdict, and the pairs that are worth a look."""
    if as_json:
        print(json.dumps(found.data(), indent=1))
        return
    out = console()
    grid = Grid(title=f"{len(found.names)} members, families by {found.linkage} linkage above {found.threshold:g}",
                title_justify="left", box=None, pad_edge=False)
    for heading in ("root", "which is", "size", "members"):
        grid.add_column(heading, overflow="fold")
    for family in sorted(found.families, key=lambda family: -len(family.members)):
        grid.add_row(f"[bold]{escape(family.root)}[/]", escape(family.why), str(len(family.members)),
                     escape(", ".join(family.members)))
    out.print(grid)
    out.print("\npairs: " + ", ".join(f"[{VERDICTS[word]}]{word} {count}[/]" for word, count in found.counts().items()))
    look = found.worth_a_look()
    grid = Grid(title="\nworth a look", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "", "cosine", "verdict", "why"):
        grid.add_column(heading, overflow="fold")
    for pair in look[:SHOWN]:
        told = f"[{VERDICTS[pair.verdict.word]}]{pair.verdict.word}[/]", escape(pair.verdict.reason)
        grid.add_row(escape(pair.one), escape(pair.other), f"{pair.facts.cosine:.3f}", *told)
    if look:
        out.print(grid)
    if len(look) > SHOWN:
        print(f"and {len(look) - SHOWN} more; --json tells of every pair")
    print("", *found.remarks(), sep="\n")


def print_near(member: str, found: Sequence[Near], as_json: bool) -> None:
    """Members beside one, the most alike first."""
    if as_json:
        rows = [{"name": one.name, "cosine": None if isnan(one.cosine) else one.cosine,
                 "within": None if isnan(one.cosine) else one.within} for one in found]
        print(json.dumps(rows, indent=1))
        return
    grid = Grid(title=f"as alike to {member}", title_justify="left", box=None, pad_edge=False)
    for heading in ("member", "cosine", "within"):
        grid.add_column(heading, overflow="fold")
    for one in found:
        told = ("", "of other shapes") if isnan(one.cosine) else (f"{one.cosine:.4f}", f"± {one.within:.4f}")
        grid.add_row(escape(one.name), *told)
    console().print(grid)
