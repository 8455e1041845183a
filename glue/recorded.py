"""What an origin records, bound again: the step, its parameters and its inputs, without the recipe.

Inputs are found by what they contain. Their bytes are read anew, since a digest that somebody noted proves nothing
about the files that lie there now.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glue.errors import GlueError, RunError
from glue.family import Choice, families, marks
from glue.find import files
from glue.identity import identify
from glue.member import Member, Origin
from glue.snapshot import whole
from glue.steps import Configured, Measured, Takes, steps
from glue.zoo import Zoo

NAMES = "names"  # beside the parameters of steps whose result holds the names of its inputs


@dataclass(frozen=True)
class Lost:
    """An input that is not what it was.

    role  the parameter that named it      was  its digest when it was used
    now   its digest as it is, or nothing where it cannot be read; `why` says which
    """

    role: str
    name: str
    was: str
    now: str
    why: str


def inputs(origin: Origin, zoo: Zoo) -> tuple[dict[str, list[Member]], list[Lost]]:
    """Role -> members that have the recorded content, under the names they had; and those that are not there."""
    read = _Reader(zoo)
    found: dict[str, list[Member]] = {}
    lost: list[Lost] = []
    for role, digests in origin.inputs.items():
        names = origin.names.get(role, digests)
        if _how(origin, role) == "files":
            one = _read(zoo, origin, role, *names, *digests)
            (lost if isinstance(one, Lost) else found.setdefault(role, [])).append(one)  # type: ignore[arg-type]
            continue
        for name, digest in zip(names, digests, strict=True):
            one = read.found(role, name, digest)
            if isinstance(one, Lost):
                lost.append(one)
            else:
                found.setdefault(role, []).append(one.named(name))
    return found, list(dict.fromkeys(lost))


def _how(origin: Origin, role: str) -> str:
    """How a recorded step takes what has this role; nothing where there is no such step any more."""
    with suppress(GlueError, KeyError):
        info = steps[origin.step.partition("/")[0]].parameters[role]
        return next((mark.how for mark in marks(info) if isinstance(mark, Takes)), "")
    return ""


def _read(zoo: Zoo, origin: Origin, role: str, name: str, digest: str) -> Member | Lost:
    """Files that a dataset was read from, where they are still what they were."""
    try:
        one = files(zoo, zoo.file.parent, name, origin.params.get("split"))
    except GlueError as error:
        return Lost(role, name, digest, "", f"it cannot be read: {error.what}")
    return one if one.digest == digest else Lost(role, name, digest, one.digest, "its content has changed")


class _Reader:
    """Members by what their files contain now; each is read once."""

    def __init__(self, zoo: Zoo):
        self.zoo = zoo
        self._known: dict[tuple[str, str], str | GlueError] = {}

    def found(self, role: str, name: str, digest: str) -> Member | Lost:
        """The member with this content, or why there is none: the one called `name` tells."""
        for member in self._candidates(name, digest):
            if self.now(member) == digest:
                return replace(member, digest=digest)
        if name not in self.zoo:
            return Lost(role, name, digest, "", "nothing in the zoo has this name or this content")
        member = next((one for one in self.zoo.versions(name) if one.digest == digest), self.zoo[name])
        now = self.now(member)
        if isinstance(now, GlueError):
            return Lost(role, name, digest, "", f"it cannot be read: {now.what}")
        if member.changes and member.base and self.now(member.base) != member.base.digest != "":
            return Lost(role, name, digest, now, f"its base {member.base.name} has changed")
        return Lost(role, name, digest, now, "its content has changed")

    def _candidates(self, name: str, digest: str) -> Iterator[Member]:
        """Likely ones first; last the hand-written ones of other names, whose digests are known from a cache."""
        every = [one for newest in self.zoo for one in self.zoo.versions(newest.name)]
        yield from (one for one in every if one.digest == digest)
        yield from (one for one in every if one.name == name and one.digest != digest)
        for one in every:
            if not one.digest and one.name != name:
                with suppress(GlueError):
                    if self.zoo.identified(one).digest == digest:
                        yield one

    def now(self, member: Member) -> str | GlueError:
        """The digest of a member's files, an adapter's with that of its base; an error where they cannot be read."""
        key = member.kind, member.path
        if key not in self._known:
            try:
                digest = identify(whole(member.path, member.kind))[1]
                if member.changes and member.base is not None:
                    below = self.now(member.base)
                    if isinstance(below, GlueError):
                        raise below
                    base = replace(member.base, digest=below, origin=member.base.origin or Origin("", {}, {}, 0))
                    digest = self.zoo.with_base(replace(member, digest=digest, base=base)).digest
                self._known[key] = digest
            except GlueError as error:
                self._known[key] = error
        return self._known[key]


def bound(origin: Origin, members: Mapping[str, list[Member]], suite: str) -> tuple[Choice, dict[str, Any]]:
    """The step's method with the recorded parameters, and the arguments that are members.

    suite  how the suite was called, which only tables tell
    Raises MethodError where the step has no such parameters any more, RunError where there is no such step.
    """
    step = origin.step.partition("/")[0]
    if step == "group":
        raise RunError("a mapped line leaves a list of what it made, which nothing computes",
                       fix="reproduce what it lists; glue zoo show names them")
    method = steps[step]
    given = dict(origin.params)
    if method.traits.get("named"):
        given.pop(NAMES, None)
    arguments: dict[str, Any] = {}
    for name, info in method.parameters.items():
        if name in origin.inputs:
            takes = next(mark for mark in marks(info) if isinstance(mark, Takes))
            given[name], arguments[name] = _resolved(takes.how, given.get(name), members.get(name, []), suite)
    return Choice.unspelled({"family": "steps", "name": step, "params": given}), arguments


def _resolved(how: str, told: Any, members: list[Member], suite: str) -> tuple[Any, Any]:
    """What a recipe would have said of a parameter that names members, and what the step is given."""
    names = [member.name for member in members]
    if how in ("one", "files"):
        return names[0], members[0]
    if how == "many":
        return names, members
    if how == "shares":
        return dict(zip(names, told, strict=True)), dict(zip(members, told, strict=True))
    if how == "suite":
        from glue.evaluate.suite import recorded

        asked, sources = recorded(told, suite, names), dict[str, str]()
        if asked.named:
            from glue.evaluate.lm_eval import check_named

            sources = check_named(asked, told["split"])
        return f"{suite}:{told['split']}", Measured(asked, told["split"], dict(zip(names, members, strict=True)),
                                                    sources)
    assert how == "config", how
    from glue.merge.mergekit.config import read_configs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recorded.yaml"
        file.write_text(told, encoding="utf-8")
        config = read_configs(file)[0]
    return file.name, Configured(config, dict(zip(config.referenced(), members, strict=True)))


def raised(origin: Origin) -> list[str]:
    """What has had its version raised since, in words: its results are other ones now, as its author says."""
    step, _, version = origin.step.partition("/")
    spelled = [{"family": "steps", "name": step, "version": int(version)}, *_choices(origin.params)]
    found = []
    for one in spelled:
        family = families(one["family"])
        now = family[one["name"]].version
        if now != one["version"]:
            found.append(f"{family.noun} '{one['name']}' had version {one['version']}, and has {now}")
    return found


def _choices(value: Any) -> Iterator[dict[str, Any]]:
    """Every spelled choice in recorded parameters, at any depth."""
    if isinstance(value, dict):
        if {"family", "name", "version"} <= set(value):
            yield value
        for item in value.values():
            yield from _choices(item)
    elif isinstance(value, list):
        for item in value:
            yield from _choices(item)
