"""Lineage: everything a member was made from, as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from glue.errors import GlueError
from glue.hub import address
from glue.member import Member
from glue.zoo import Zoo

DERIVES = "derives from"  # the role of a base that no origin names, since people wrote it down


@dataclass(frozen=True)
class Ancestor:
    """A member and what it was made from.

    roles    what it was to the one above: members, base, suite ...; nothing at the top
    kind     as in the zoo, or `gone` where the zoo has nothing of this content any more
    hub      of what is on the hub: owner/name@commit, which has this content
    parents  nothing where `again`: then they were told further up, if there are any (`more`)
    """

    name: str
    kind: str
    digest: str
    step: str
    licence: str
    roles: tuple[str, ...] = ()
    parents: tuple[Ancestor, ...] = ()
    again: bool = False
    more: bool = False
    hub: str = ""

    def __iter__(self) -> Iterator[Ancestor]:
        """It and all above it, each content once."""
        yield self
        for parent in self.parents:
            yield from (one for one in parent if not one.again)

    def as_data(self) -> dict[str, Any]:
        """The tree as plain data."""
        return {"name": self.name, "kind": self.kind, "digest": self.digest, "step": self.step,
                "licence": self.licence, "roles": list(self.roles), "again": self.again, "hub": self.hub,
                "parents": [parent.as_data() for parent in self.parents]}

    def lines(self) -> Iterator[str]:
        """The tree as text, one member a line."""
        yield self._told()
        for k, parent in enumerate(self.parents):
            last = k == len(self.parents) - 1
            first, *more = parent.lines()
            yield f"{'└─ ' if last else '├─ '}{first}"
            yield from (f"{'   ' if last else '│  '}{line}" for line in more)

    def _told(self) -> str:
        name, _, commit = self.hub.partition("@")
        hub = f"{name} at {commit[:12]}" if commit else ""
        about = ", ".join(filter(None, (self.kind, self.step, self.digest[:8], self.licence, hub)))
        return f"{self.name}  ({about})" + (f"  as {', '.join(self.roles)}" if self.roles else "") + \
            ("  see above" if self.again and self.more else "")


def lineage(zoo: Zoo, name: str, *, data: bool = False) -> Ancestor:
    """What a member was made from, by origin and by base.

    data  also the datasets that were trained, searched and measured on
    """
    return _Tree(zoo, data).of(zoo.identified(zoo[name]), ())


class _Tree:
    def __init__(self, zoo: Zoo, data: bool):
        self.zoo, self.data = zoo, data
        self.told: dict[tuple[str, str], bool] = {}  # content and step -> whether it has parents
        self.by_digest: dict[str, list[Member]] = {}
        for newest in zoo:
            for one in zoo.versions(newest.name):
                self.by_digest.setdefault(one.digest, []).append(one)

    def of(self, member: Member, roles: tuple[str, ...]) -> Ancestor:
        step = member.origin.step if member.origin else ""
        found = Ancestor(member.name, member.kind, member.digest, step, member.licence, roles, hub=_on_hub(member))
        key = member.digest, step
        if key in self.told:
            return replace(found, again=True, more=self.told[key])
        self.told[key] = False
        parents = tuple(self._parents(member))
        self.told[key] = bool(parents)
        return replace(found, parents=parents, more=bool(parents))

    def _parents(self, member: Member) -> Iterator[Ancestor]:
        """In the order of the origin; one that went in under several roles is one parent."""
        roles: dict[tuple[str, str], list[str]] = {}
        if member.origin:
            for role, digests in member.origin.inputs.items():
                for name, digest in zip(member.origin.names.get(role, digests), digests, strict=True):
                    roles.setdefault((name, digest), []).append(role)
        elif member.base:
            roles[member.base.name, self.zoo.identified(member.base).digest] = [DERIVES]
        for (name, digest), some in roles.items():
            one = self._found(name, digest)
            if one is None:
                read = member.origin is not None and member.origin.step.startswith("import/")
                yield Ancestor(name, "files" if read else "gone", digest, "", "", tuple(some))
            elif self.data or one.kind != "dataset":
                yield self.of(one, tuple(some))

    def _found(self, name: str, digest: str) -> Member | None:
        """The member of this content, the one with the name it had first."""
        same = sorted(self.by_digest.get(digest, ()), key=lambda one: one.name != name)
        if same:
            return same[0]
        if name in self.zoo and not self.zoo[name].digest:  # hand-written: its content is what its files are now
            with suppress(GlueError):
                known = self.zoo.identified(self.zoo[name])
                return known if known.digest == digest else None
        return None


def _on_hub(member: Member) -> str:
    """owner/name@commit of a member that is on the hub, as far as it is known which commit that is."""
    if not member.path.startswith("hub:"):
        return ""
    found = address(member.path, member.kind)
    return f"{found.name}@{found.commit}" if found.commit else found.name
