"""The zoo: members written by hand in zoo.yaml, and products, which runs append to zoo/members.yaml.

The hand-written file is never rewritten. The register of products is append-only, one record a line, locked and
synced, so that a crash or a second writer loses nothing. `name` is the newest version, `name@digest8` any.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from glue import document
from glue.errors import CheckpointError, GlueError, Mistakes, ZooError, did_you_mean, one_line
from glue.files import append_line, whole_lines
from glue.hub import well_formed
from glue.member import CHANGES, Element, Member, Origin, canonical, with_article
from glue.room import size

_PART = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"
NAME = re.compile(rf"{_PART}(/{_PART})*")
TAG = re.compile(_PART)
NAME_RULE = "a name has parts of letters, digits and . _ + - between slashes; each begins with a letter or digit"
WRITTEN = {"kind": str, "path": str, "tags": list, "base": str, "licence": str, "note": str}
KINDS = ("model", *CHANGES, "mixture", "endpoint", "dataset")  # that people may add; steps also leave tables and groups
TOP = ("members", "include", "budget")
REGISTER = "zoo/members.yaml"
HEADING = "# Products, appended by glue; one record a line. Do not edit: see `glue zoo remove` and `glue zoo tag`."


class Zoo:
    """The members that zoo.yaml names and those that runs have added. Reading is lazy about weights.

    file  zoo.yaml; products lie in the folder `zoo` beside it
    """

    def __init__(self, file: str | Path = "zoo.yaml"):
        self.file = Path(file).resolve()
        self.register = self.file.parent / REGISTER
        self.folder = self.register.parent
        self._versions: dict[str, list[Member]] = {}
        self._written: dict[str, Member] = {}
        self.budget: int | None = None  # bytes that all products together may take
        self.digests = self.folder / "digests.json"  # known identities of folders, a cache
        self._read_written()
        self._read_register()

    # reading

    def _read_written(self) -> None:
        if not self.file.exists():
            raise ZooError(f"there is no file {_shown(self.file)}",
                           fix="glue init  starts a zoo here;  --zoo FILE  names one that is elsewhere")
        doc = document.read(self.file, ZooError, shown=_shown(self.file))
        errors: list[GlueError] = []
        top = doc.value or {}
        entries = top.get("members") or {} if isinstance(top, dict) else None
        if not isinstance(entries, dict):
            raise ZooError("zoo.yaml is a mapping with the key 'members', a mapping from names", place=doc.place())
        for key in top:
            if key not in TOP:
                errors.append(ZooError(f"zoo.yaml has no key '{one_line(key)}'{did_you_mean(key, TOP)}",
                                       place=doc.place(key)))
        if top.get("include", REGISTER) != REGISTER:
            errors.append(ZooError("products are always registered in zoo/members.yaml", place=doc.place("include"),
                                   fix=f"write  include: {REGISTER}"))
        try:
            self.budget = size(str(top["budget"])) if "budget" in top else None
        except GlueError as error:
            errors.append(ZooError(f"'budget' is what products may take of the disk: {error.what}", fix=error.fix,
                                   place=doc.place("budget")))
        for name, entry in entries.items():
            if problem := _problem(name, entry):
                errors.append(problem.at(doc.place("members", name)))
                continue
            path = entry["path"]
            path = path if path.startswith("hub:") else str(self.file.parent / Path(path).expanduser())
            self._written[name] = Member(name, entry.get("kind", "model"), path, frozenset(entry.get("tags", ())),
                                         licence=entry.get("licence", ""), note=entry.get("note", ""))
        bases = {name: entry["base"] for name, entry in entries.items() if name in self._written and "base" in entry}
        for name, base in bases.items():
            place = doc.place("members", name, "base")
            if base not in entries:
                errors.append(ZooError(f"'{name}' names the base '{one_line(base)}', which is not in zoo.yaml"
                                       f"{did_you_mean(base, entries)}", place=place))
            elif name in _above(name, bases):
                errors.append(ZooError(f"'{name}' is its own base, by way of '{base}'", place=place,
                                       fix="remove one of the two bases"))
        if errors:
            raise Mistakes(errors)
        for name in sorted(bases, key=lambda name: len(_above(name, bases))):  # what stands below all others first
            self._written[name] = replace(self._written[name], base=self._written[bases[name]])
        self._versions = {name: [member] for name, member in self._written.items()}

    def _read_register(self) -> None:
        for number, line in enumerate(whole_lines(self.register), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                if not line.startswith("- "):
                    raise ValueError("it does not begin with '- '")
                self._apply(json.loads(line[2:].encode()))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
                raise ZooError(f"{_shown(self.register)}:{number}: this record is damaged ({one_line(str(problem))})",
                               fix="remove the line; what it registered is built again by its recipe") from None
        for name in self._written:
            if len(self._versions[name]) > 1:
                raise ZooError(f"'{name}' stands in {_shown(self.file)} and in {_shown(self.register)}",
                               fix="give the one in zoo.yaml another name")

    def _apply(self, record: dict[str, Any]) -> None:
        if "removed" in record:
            self._forget(record["removed"])
        elif "tagged" in record:
            for members in self._versions.values():
                for k, member in enumerate(members):
                    if record["tagged"] in (member.name, member.version):
                        tags = (member.tags | set(record["add"])) - set(record["drop"])
                        members[k] = replace(member, tags=frozenset(tags))
        else:
            self._remember(self._member(record))

    def _member(self, record: Mapping[str, Any]) -> Member:
        elements = tuple(Element(item["name"], self._known(item["root"]), tuple(map(self._known, item["members"])))
                         for item in record.get("elements", ()))
        path = record["path"]
        return Member(record["name"], record["kind"],
                      path if path.startswith(("hub:", "/")) else str(self.file.parent / path),
                      frozenset(record["tags"]), self._known(record["base"]) if record["base"] else None,
                      Origin.from_dict(record["origin"]) if record["origin"] else None, record["fingerprint"],
                      record["digest"], record["licence"], frozenset(record["seen"]), elements, record["note"])

    def _known(self, version: str) -> Member:
        """The member that `name@digest` meant when it was written down; a hand-written one may have changed since."""
        name, _, digest = version.rpartition("@")
        for member in reversed(self._versions.get(name, [])):
            if member.digest in (digest, ""):
                return member if member.digest else replace(member, digest=digest)
        for member in (one for members in self._versions.values() for one in members):
            if digest and member.digest == digest:
                return member
        return Member(name, "model", "/removed", digest=digest)

    def _remember(self, member: Member) -> None:
        versions = self._versions.setdefault(member.name, [])
        versions[:] = [other for other in versions if (other.digest, _key(other)) != (member.digest, _key(member))]
        versions.append(member)

    def _forget(self, version: str) -> None:
        for name, members in list(self._versions.items()):
            members[:] = [member for member in members if version not in (name, member.version) or not member.digest]
            if not members:
                del self._versions[name]

    # finding

    def __getitem__(self, name: str) -> Member:
        bare, at, digest = name.partition("@")
        versions = self._versions.get(bare, [])
        if not at and versions:
            return versions[-1]
        for member in reversed(versions):
            if not member.digest:
                member = self.identified(member)
            if digest and member.digest.startswith(digest):
                return member
        if versions:
            known = ", ".join(member.version for member in versions if member.digest)
            raise ZooError(f"'{bare}' has no version '{one_line(digest)}'" + (f"; known: {known}" if known else ""))
        raise ZooError(f"the zoo has no member '{one_line(name)}'{did_you_mean(bare, self._versions)}")

    def __contains__(self, name: str) -> bool:
        return name in self._versions

    def __iter__(self) -> Iterator[Member]:
        """The newest version of each member, hand-written ones first."""
        return (members[-1] for members in self._versions.values())

    def versions(self, name: str) -> list[Member]:
        """All versions of one name, oldest first."""
        return list(self._versions.get(name, []))

    def select(self, selector: str) -> list[Member]:
        """`tag:x` is every newest member with the tag, in the order of the zoo; anything else is one name."""
        if not selector.startswith("tag:"):
            return [self[selector]]
        return [member for member in self if selector.removeprefix("tag:") in member.tags]

    def is_written(self, member: Member) -> bool:
        """Whether the member stands in zoo.yaml."""
        return member.name in self._written and member.origin is None

    def made(self, origin: Origin, name: str = "") -> Member | None:
        """A member with this origin whose files are there and still what they were; the one called `name` first."""
        same = [member for members in reversed(self._versions.values()) for member in reversed(members)
                if _key(member) == origin.key]
        return next(filter(self._unchanged, sorted(same, key=lambda member: member.name != name)), None)

    def _unchanged(self, member: Member) -> bool:
        try:
            return self._identity(member)[1] == member.digest
        except (ZooError, CheckpointError):  # what is gone or damaged is made again
            return False

    # identity

    def identified(self, member: Member) -> Member:
        """The member with its fingerprint and digest, computed from its files unless they are known for them."""
        if member.digest and member.origin:
            return member
        fingerprint, digest = self._identity(member)
        base = self.identified(member.base) if member.base and member.changes else member.base
        return replace(member, fingerprint=fingerprint, digest=digest, base=base)

    def with_base(self, member: Member) -> Member:
        """A member whose digest covers its own files only, completed: a change is one only with its base."""
        if not member.changes or member.base is None:
            return member
        both = f"{member.digest}{self.identified(member.base).digest}"
        return replace(member, digest=hashlib.sha256(both.encode()).hexdigest()[:32])

    def _identity(self, member: Member) -> tuple[str, str]:
        from glue.identity import identify
        from glue.snapshot import whole

        fingerprint, digest = identify(whole(member.path, member.kind), self.digests)
        return fingerprint, self.with_base(replace(member, digest=digest)).digest

    # changing

    def add(self, member: Member) -> Member:
        """Append a member to the register. Raises ZooError where its name is taken by a hand-written one."""
        if not NAME.fullmatch(member.name):
            raise ZooError(f"'{one_line(member.name)}' cannot be a name: {NAME_RULE}", fix="choose another name")
        _check_tags(member.tags)
        if member.name in self._written:
            raise ZooError(f"'{member.name}' is taken: it stands in {_shown(self.file)}", fix="choose another name")
        self._append({
            "name": member.name, "kind": member.kind, "path": self._relative(member.path), "tags": sorted(member.tags),
            "base": _full(member.base) if member.base else None,
            "origin": asdict(member.origin) if member.origin else None, "fingerprint": member.fingerprint,
            "digest": member.digest, "licence": member.licence, "seen": sorted(member.seen), "note": member.note,
            "elements": [{"name": item.name, "root": _full(item.root) if item.root else "",
                          "members": list(map(_full, item.members))} for item in member.elements]})
        self._remember(member)
        return member

    def remove(self, name: str) -> Member:
        """Take a product or an added member out of the register; its files stay until `gc`."""
        member = self[name]
        if self.is_written(member):
            raise ZooError(f"'{name}' stands in {_shown(self.file)}, which glue does not rewrite",
                           fix="delete its lines there")
        record = {"removed": member.version if "@" in name else member.name}
        self._append(record)
        self._apply(record)
        return member

    def tag(self, name: str, add: set[str], drop: set[str]) -> Member:
        """Add and drop tags of a member; recorded in the register, also for hand-written ones."""
        member = self[name]
        _check_tags(add | drop)
        one = "@" in name and not self.is_written(member)  # a hand-written member has one version
        record = {"tagged": member.version if one else member.name, "add": sorted(add), "drop": sorted(drop)}
        self._append(record)
        self._apply(record)
        return self[name]

    def _append(self, record: dict[str, Any]) -> None:
        append_line(self.register, "- " + canonical(record), heading=HEADING)

    def _relative(self, path: str) -> str:
        try:
            return path if path.startswith("hub:") else str(Path(path).relative_to(self.file.parent))
        except ValueError:
            return path


def _key(member: Member) -> str:
    return member.origin.key if member.origin else ""


def _full(member: Member) -> str:
    return f"{member.name}@{member.digest}"


def _shown(file: Path) -> str:
    """The path as a person would type it here."""
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def _above(name: str, bases: Mapping[str, str]) -> list[str]:
    """The base of a name, its base and so on, each once."""
    found: list[str] = []
    while name in bases and bases[name] not in found:
        name = bases[name]
        found.append(name)
    return found


def _check_tags(tags: Iterable[Any]) -> None:
    for tag in tags:
        if not isinstance(tag, str) or not TAG.fullmatch(tag):
            raise ZooError(f"'{one_line(str(tag))}' cannot be a tag",
                           fix="a tag has letters, digits and . _ + - and begins with a letter or digit")


def _problem(name: str, entry: Any) -> ZooError | None:
    """The first mistake of one entry of zoo.yaml."""
    if not NAME.fullmatch(name):
        return ZooError(f"'{one_line(name)}' cannot be a name: {NAME_RULE}")
    if not isinstance(entry, dict) or "path" not in entry:
        return ZooError(f"'{name}' needs a 'path'", fix="write  {path: folder}  or  {path: hub:owner/name@revision}")
    for key, value in entry.items():
        if key not in WRITTEN:
            return ZooError(f"'{name}' has the unknown key '{one_line(key)}'{did_you_mean(key, WRITTEN)}")
        if not isinstance(value, WRITTEN[key]):
            words = "a list" if WRITTEN[key] is list else "a word"
            return ZooError(f"'{name}': '{key}' must be {words}, not {one_line(json.dumps(value))}")
    try:
        well_formed(entry["path"], entry.get("kind", "model"))
        _check_tags(entry.get("tags", ()))
    except ZooError as problem:
        return problem
    if entry.get("kind", "model") not in KINDS:
        kind = entry["kind"]
        return ZooError(f"'{name}' has the unknown kind '{one_line(kind)}'{did_you_mean(kind, KINDS)}")
    if entry.get("kind") in CHANGES and "base" not in entry:
        return ZooError(f"'{name}' is {with_article(entry['kind'])} and names no base",
                        fix="add  base: the member it sits on")
    return None
