"""Pushing: a member as others shall have it, checked, told anew, and sent to the hub.

What goes is the member's folder without hidden files and journals, byte for byte, but for what names places of this
machine: in cards and notes, and in keys of configurations that are no part of a member, they become names. Where such a
path is part of what a member is, nothing goes. Vocabularies and data are sent as they are and not looked into.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glue.cards import CARD, licence_remark, source
from glue.care import verified
from glue.errors import ZooError, one_line
from glue.hub import Commit, Repository, Said, locate, read_card, repository, upload
from glue.identity import COUNTED, UNCOUNTED_KEYS
from glue.known import readme
from glue.member import Member, Origin, canonical
from glue.private import Places, paths
from glue.zoo import Zoo

KINDS: Mapping[str, Repository] = {"model": "model", "adapter": "model", "seed_history": "model",
                                   "tensor_train": "model", "prompt": "model", "proxy": "model",
                                   "mixture": "model", "dataset": "dataset"}
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}
TEXT = {".md", ".txt", ".json", ".yml", ".yaml", ".toml", ".csv", ".html"}  # of them, what is no part of the member
CODE = {".py", ".sh", ".jinja"}
LEFT = {".journal", ".log", ".pyc"}
MAGIC = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")  # pickles, bare and zipped


@dataclass(frozen=True)
class Sent:
    """One file that goes.

    content  where it lies, or what it is now that it was told anew, as `why` says
    """

    name: str
    size: int
    sha256: str
    content: Path | bytes
    why: str = ""


@dataclass(frozen=True)
class Parcel:
    """What goes to a repository, what the hub will read in its card, and what whoever sends it should know."""

    member: str
    digest: str
    repository: str
    kind: Repository
    files: tuple[Sent, ...]
    said: Said
    remarks: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(file.size for file in self.files)

    def as_data(self) -> dict[str, Any]:
        """All of it but the content, as plain data."""
        told = {**asdict(self.said), "base_model": list(self.said.base_model)}
        return {"member": self.member, "digest": self.digest, "repository": self.repository, "kind": self.kind,
                "bytes": self.size, "card": told, "remarks": list(self.remarks),
                "files": [{"name": one.name, "bytes": one.size, "sha256": one.sha256, "why": one.why}
                          for one in self.files]}

    def lines(self) -> Iterator[str]:
        """The same for people."""
        yield f"{self.member} ({self.digest[:8]}) to the {self.kind} repository {self.repository}"
        for one in self.files:
            yield f"  {one.sha256}  {one.size:>14,}  {one.name}" + (f"  ({one.why})" if one.why else "")
        yield f"  {len(self.files)} files, {self.size:,} bytes"
        yield f"  licence: {self.said.licence or 'not stated'}"
        if self.kind == "model":
            yield f"  base_model: {', '.join(self.said.base_model) or 'none'}"
            yield f"  results in the card: {self.said.results}"
        for remark in self.remarks:
            yield f"  note: {remark}"


def packed(zoo: Zoo, name: str, to: str, *, similarity: bool = False) -> Parcel:
    """Everything of a member that goes, read and checked; needs neither the hub nor a token.

    similarity  compare what went in for the card, where nobody has
    Raises ZooError for what cannot go: bytes that are not what was registered, links that lead out of the folder,
    pickles, paths of this machine in what is part of the member, and a card that the hub would not take.
    """
    repository(to)
    member = zoo[name]
    if member.kind not in KINDS:
        raise ZooError(f"'{name}' is a {member.kind}", fix="push models, adapters, mixtures and datasets")
    if member.path.startswith("hub:") or not locate(member.path).is_dir():
        where = "on the hub already" if member.path.startswith("hub:") else "one file and no folder"
        raise ZooError(f"'{name}' is {where}", fix="push what lies in a folder of its own")
    member, folder = zoo.identified(member), locate(member.path).resolve()
    names = list(_inside(folder, folder))
    sums: dict[str, str] = {}
    for line in verified(zoo, name):  # reads every byte, raises on a change
        sha256, _, file = line.partition("  ")
        sums[file] = sha256
    kind, places = KINDS[member.kind], Places.of(zoo)
    card = readme(zoo, name, similarity=similarity)
    said = read_card(card, kind)
    written = not member.origin and CARD in names
    files = [_sent(CARD, card.encode(), "as written" if written else "told anew, with all that is known by now")]
    files += [_file(folder / each, each, sums, member, places) for each in names if each != CARD]
    return Parcel(member.name, member.digest, to, kind, tuple(sorted(files, key=lambda one: one.name)), said,
                  tuple(_remarks(member, said, kind)))


def push(parcel: Parcel, *, private: bool = False, revision: str = "", message: str = "",
         quiet: bool = False) -> Commit:
    """Send what was packed in one commit. Raises RunError."""
    return upload(parcel.repository, {one.name: one.content for one in parcel.files},
                  {one.name: one.sha256 for one in parcel.files}, kind=parcel.kind, private=private, revision=revision,
                  message=message or f"{parcel.member}@{parcel.digest[:8]}, with glue", quiet=quiet)


def _inside(folder: Path, top: Path) -> Iterator[str]:
    """Names of what goes, sorted. Raises ZooError for links that lead out, and for what could run when it is read."""
    for path in sorted(folder.iterdir()):
        name = path.relative_to(top).as_posix()
        if path.name.startswith(".") or path.suffix in LEFT or path.name == "__pycache__":
            continue
        if path.is_symlink() and (not path.exists() or not path.resolve().is_relative_to(top) or path.is_dir()):
            raise ZooError(f"{path} is a link that leads elsewhere", fix="put there what it leads to, or remove it")
        if path.is_dir():
            yield from _inside(path, top)
        elif not path.is_file():
            raise ZooError(f"{path} is no ordinary file", fix="remove it")
        elif path.suffix in PICKLED or _pickled(path):
            raise ZooError(f"{path} is or may hold a pickle, which can run code when it is read",
                           fix="convert it to safetensors, or move it out of the folder")
        else:
            yield name


def _pickled(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return False
    with open(path, "rb") as stream:
        return stream.read(4).startswith(MAGIC)


def _sent(name: str, data: bytes, why: str) -> Sent:
    return Sent(name, len(data), hashlib.sha256(data).hexdigest(), data, why)


def _file(path: Path, name: str, sums: Mapping[str, str], member: Member, places: Places) -> Sent:
    """One file as it goes."""
    same = Sent(name, path.stat().st_size, sums[name], path)
    counts = any(path.match(pattern) for pattern in COUNTED)
    if path.suffix == ".safetensors":
        _refuse(_metadata(path), path)
    elif path.name.endswith("config.json"):
        told = json.loads(path.read_bytes())
        clean = _freed(told, places, member)
        _refuse(clean, path)
        if clean != told:
            return _sent(name, (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode(), "without local paths")
    elif path.suffix in CODE:
        _refuse(path.read_text(encoding="utf-8", errors="replace"), path)
    elif path.suffix in TEXT and not counts:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        clean = _note(text, places) if path.suffix == ".json" else places.told(text)
        if clean != text:
            return _sent(name, clean.encode(errors="surrogateescape"), "without local paths")
    return same


def _freed(value: Any, places: Places, member: Member) -> Any:
    """A configuration in which keys that are no part of a member name no path; an adapter's base goes by its name."""
    if isinstance(value, list):
        return [_freed(item, places, member) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: places.data(item) if key in UNCOUNTED_KEYS else _freed(item, places, member)
             for key, item in value.items()}
    key = "base_model_name_or_path"
    if member.base is not None and key in value and found[key] != value[key]:
        found[key] = source(member.base).name
    return found


def _note(text: str, places: Places) -> str:
    """JSON without paths, as it was where it had none; a note of ours has the key of what it now says."""
    try:
        told = json.loads(text)
    except ValueError:
        return places.told(text)
    clean = places.data(told)
    if clean == told:
        return text
    if isinstance(clean, dict) and "origin" in clean and "key" in clean:
        clean["key"] = Origin.from_dict(clean["origin"]).key
    return canonical(clean)


def _refuse(value: Any, path: Path) -> None:
    found = next(paths(value), None)
    if found is not None:
        raise ZooError(f"{path} names a path of this machine, {one_line(found)}, where it is part of the member",
                       fix="take it out of there; a member that is changed is another, so make it again")


def _metadata(path: Path) -> Any:
    with open(path, "rb") as stream:
        length, = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length)).get("__metadata__", {})


def _remarks(member: Member, said: Said, kind: Repository) -> Iterator[str]:
    if not said.licence:
        yield "no licence is stated: what it was made of agrees on none, or says none"
    if clash := licence_remark(member.name, [member]):
        yield clash
    if kind == "model" and not said.base_model and (member.base or member.origin and member.origin.inputs):
        yield "nothing that it was made of is on the hub, so base_model is left out"
    if member.kind == "adapter" and member.base and not member.base.path.startswith("hub:"):
        yield f"its base {member.base.name} is not on the hub: nobody can load it there before that is"
