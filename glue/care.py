"""Care of a zoo: start one, add members, check their bytes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from glue.errors import SuiteError, ZooError, did_you_mean, one_line
from glue.evaluate.imported import IMPORTED, add_scores
from glue.evaluate.suite import parse
from glue.files import write_aside
from glue.hub import address
from glue.identity import identify
from glue.member import CHANGES, Member, with_article
from glue.snapshot import blob_name, is_blob, whole
from glue.zoo import KINDS, NAME, NAME_RULE, Zoo

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
ZOO_YAML = """\
# Members written by hand. glue reads this file and never rewrites it; products are registered in zoo/members.yaml.
members:
  # my-model: {path: /models/my-model, tags: [mine]}
  # llama:    {path: hub:meta-llama/Llama-2-7b-hf, licence: llama2}
include: zoo/members.yaml
"""
RECIPE = """\
about: average of everything tagged 'mine'
steps:
  - {as: average, step: merge, members: [tag:mine], method: linear}
"""


def start(folder: Path) -> Iterator[Path]:
    """Write zoo.yaml, a first recipe and a .gitignore where they do not exist; yields what it wrote."""
    files = {"zoo.yaml": ZOO_YAML, "recipes/average.yaml": RECIPE, ".gitignore": "zoo/\nruns/\n"}
    if (folder / "zoo.yaml").exists():
        raise ZooError(f"{folder / 'zoo.yaml'} is there already", fix="choose another folder")
    for name, text in files.items():
        file = folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_aside(file, text)
            yield file


def added(zoo: Zoo, path: str, name: str | None, kind: str, base: str | None, tags: set[str], licence: str) -> Member:
    """Register a folder, or a model of the hub that is on this machine: hub:owner/name, or owner/name where no folder
    is called so. Raises ZooError where it is not there."""
    if kind not in KINDS:
        raise ZooError(f"there is no kind '{kind}'{did_you_mean(kind, KINDS)}")
    if kind in CHANGES and base is None:
        raise ZooError(f"{with_article(kind)} needs its base", fix="add  --base NAME")
    if HUB_NAME.fullmatch(path) and not Path(path).exists():
        path = f"hub:{path}"
    place = path if path.startswith("hub:") else str(Path(path).resolve())
    folder = whole(place, kind)
    if kind == "model" and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ZooError(f"{folder} holds an adapter", fix="add  --kind adapter --base NAME")
    told = path.removeprefix("hub:").partition("@")[0] if path.startswith("hub:") else Path(path).absolute().name
    called = name or told.rsplit("/", 1)[-1] or folder.name
    if not NAME.fullmatch(called):
        raise ZooError(f"'{one_line(called)}' cannot be a name: {NAME_RULE}", fix="choose one with --name")
    if called in zoo:
        raise ZooError(f"the zoo has a member '{called}' already", fix="choose another with --name")
    member = Member(called, kind, place, frozenset(tags), zoo[base] if base else None, licence=licence)
    return zoo.add(zoo.identified(member))


def imported(zoo: Zoo, words: Sequence[str], folder: Path, suite: str = "") -> str:
    """Take what lm-eval's own command has left in a folder as scores of one member; the suite they go by.

    Raises ZooError where the words do not name one member, SuiteError where the folder cannot be read, or where the
    suite is one of ours: its scores are known to be asked as its file says, and these are not.
    """
    found = [member for word in words for member in zoo.select(word)]
    if len(found) != 1:
        raise ZooError(f"the results are of one model, and {len(found)} members are named",
                       fix="name the member that lm-eval has measured")
    suite = suite or IMPORTED
    name, _ = parse(suite)
    if (zoo.file.parent / "benchmarks" / "suites" / f"{name}.yaml").exists():
        raise SuiteError(f"'{name}' is a suite that glue asks itself",
                         fix=f"choose another name, or leave out --suite, which stands for {IMPORTED}")
    add_scores(folder, zoo.identified(found[0]), zoo.folder / "scores.jsonl", suite)
    return suite


def verified(zoo: Zoo, name: str) -> Iterator[str]:
    """Every file of a member with its sha256, then its digest, computed anew. Raises ZooError on a difference.

    What lies in the cache of the hub is held against the sums that its blobs are called after, too.
    """
    member, damaged = zoo[name], list[Path]()
    folder = whole(member.path, member.kind)
    for file in [folder] if folder.is_file() else sorted(folder.rglob("*")):
        if file.is_file():
            shown = file.name if file == folder else file.relative_to(folder)
            with open(file, "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
            if (blob := blob_name(file)) and not is_blob(file, blob, sha256):
                damaged.append(file)
            yield f"{sha256}  {shown}"
    if damaged:
        blobs = " ".join(str(file.resolve()) for file in damaged)
        names = ", ".join(file.name for file in damaged)
        raise ZooError(f"'{name}' is damaged: {names} no longer holds what the hub has sent",
                       fix=f"rm {blobs} , then  {address(member.path, member.kind).ours}")
    _, digest = identify(folder)
    now = zoo.with_base(Member(name, member.kind, member.path, base=member.base, digest=digest)).digest
    if member.digest and now != member.digest:
        raise ZooError(f"'{name}' has changed: its digest is {now}, registered is {member.digest}",
                       fix="run its recipe again, which makes it anew, or remove it from the zoo")
    yield f"{now}  digest{' as registered' if member.digest else ''}"
