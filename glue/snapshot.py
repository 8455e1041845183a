"""Snapshots: what a member needs of a repository on the hub, whether all of it lies in the cache, and undamaged.

Needed are configurations, tokenizer, cards, and one set of safetensors weights; of a dataset its records. Pickles,
weights for other frameworks and code are not. Blobs in the cache are called after their content: a large file by its
sha256, a small one by the sum that git has for it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath

from glue.checkpoint import ADAPTER, HISTORY, INDEX, SINGLE, indexed
from glue.errors import NotHere, ZooError
from glue.hub import address, locate
from glue.member import FOLDER_NOTE

RECORDS = {".parquet", ".jsonl", ".ndjson", ".json"}  # of datasets; .arrow too where `datasets` has saved them
TEXTS = {".json", ".jsonl", ".jinja", ".txt", ".md", ".model", ".parquet", ".yaml", ".yml"}  # beside a model's weights
OTHERS = re.compile(r".*\.index\.json")  # which are chosen with the weights that they are of
TERMS = re.compile(r"(licen[cs]e|notice|copying|use_policy|readme)[^/.]*(\.(md|txt|rst))?", re.I)
PART = re.compile(r"(?:experts|pair)/[^/]+")  # models within a mixture by text, or a proxy
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt"}
BLOCK = 1 << 20  # bytes that are read at once
Shards = Callable[[str], Collection[str]]  # folder of an index -> the shards that it names


def needed(names: Collection[str], kind: str, shards: Shards, inner: str = "") -> list[str]:
    """Those files of a repository that a member of this kind needs, sorted.

    names  of all its files, with slashes
    inner  of a dataset, the folder or file that is meant; what tells its terms comes too
    """
    there = {name for name in names if not any(part.startswith(".") for part in name.split("/"))}
    return sorted(_records(there, inner) if kind == "dataset" else _model(there, kind, shards))


def _records(there: Collection[str], inner: str) -> Iterator[str]:
    saved = {str(PurePosixPath(name).parent) for name in there if PurePosixPath(name).name == "state.json"}
    for name in there:
        path = PurePosixPath(name)
        meant = not inner or name == inner or name.startswith(f"{inner}/")
        kind = path.suffix in RECORDS or path.suffix == ".arrow" and str(path.parent) in saved
        if meant and kind or TERMS.fullmatch(name):
            yield name


def _model(there: Collection[str], kind: str, shards: Shards) -> Iterator[str]:
    for place in dict.fromkeys(["", *sorted(str(PurePosixPath(name).parent) for name in there)]):
        if place and not PART.fullmatch(place):
            continue
        names = {name.removeprefix(f"{place}/") for name in there if str(PurePosixPath(name).parent) == (place or ".")}
        chosen = {name for name in names if TERMS.fullmatch(name)
                  or PurePosixPath(name).suffix in TEXTS and not OTHERS.fullmatch(name)}
        if FOLDER_NOTE in names:  # of ours, where everything counts
            chosen |= {name for name in names if name.endswith(".safetensors")}
        elif kind == "adapter" and ADAPTER in names:
            chosen |= {ADAPTER}
        else:
            chosen |= names & {SINGLE, ADAPTER, HISTORY}
        if INDEX in names and SINGLE not in names and not (kind == "adapter" and ADAPTER in names):
            chosen |= {INDEX, *shards(place)}  # also those that are not there, which somebody has to tell
        yield from (f"{place}/{name}" if place else name for name in chosen)


def whole(path: str, kind: str = "model") -> Path:
    """The local folder of a member's path, of which nothing is lacking that the member needs.

    A folder of this machine is taken as it is. Raises ZooError, and NotHere that says which file is missing.
    """
    folder = locate(path, kind)
    if path.startswith("hub:") and (lost := lacking(folder, kind)):
        found = address(path, kind)
        more = f" and {len(lost) - 1} files more" if len(lost) > 1 else ""
        raise NotHere(str(found), found.ours, part=f"{lost[0]}{more}")
    return folder


def lacking(folder: Path, kind: str = "model") -> list[str]:
    """What a member needs and this folder of the cache does not have, as far as its own files tell."""
    if not folder.is_dir():
        return []
    names = [str(PurePosixPath(Path(place).relative_to(folder), name)) for place, _, found in os.walk(folder)
             for name in found]
    want = needed(names, kind, lambda place: _shards(folder / place))
    lost = [name for name in want if not (folder / name).is_file()]
    holds = RECORDS if kind == "dataset" else WEIGHTS
    if not lost and not any(PurePosixPath(name).suffix in holds for name in names):
        return ["any file of records" if kind == "dataset" else "any file of weights"]
    return sorted(lost, key=lambda name: (PurePosixPath(name).suffix != ".safetensors", name))  # weights first


def _shards(folder: Path) -> tuple[str, ...]:
    try:
        stat = (folder / INDEX).stat()
    except OSError:
        return ()  # a link to nothing, which is told as missing itself
    return _named(folder, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)  # a plan is made again whenever a step of its run is done
def _named(folder: Path, *_: int) -> tuple[str, ...]:
    return tuple(sorted(set(indexed(folder).values())))


# what blobs are called


def blob_name(file: Path) -> str:
    """What the blob is called that a file of a snapshot is a link to; nothing for any other file."""
    if not file.is_symlink():
        return ""
    target = Path(os.readlink(file))  # one step: a blob may itself be a link, to a store that several caches share
    known = target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", target.name)
    return target.name if known else ""


def sha256_of(file: Path) -> str:
    """The sha256 of a file: in the cache of the hub that is the name of a large one, and nothing has to be read."""
    name = blob_name(file)
    return name if len(name) == 64 else _read_sha256(file)


def _read_sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_blob(file: Path, name: str, sha256: str = "") -> bool:
    """Whether the bytes of a file are those of the blob of this name. sha256: of the file, where that is known."""
    if len(name) == 64:
        return (sha256 or _read_sha256(file)) == name
    total = hashlib.sha1(b"blob %d\0" % file.stat().st_size)
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            total.update(block)
    return total.hexdigest() == name


def refuse_strange(names: Iterable[str], whose: str) -> None:
    """Raise ZooError for a name that leads out of the folder, or could be taken for one that does."""
    for name in names:
        if any(part in ("", ".", "..") for part in re.split(r"[/\\]", name)) or not name.isprintable() or ":" in name:
            raise ZooError(f"{whose} names the file {name!r}, which could lead out of its folder",
                           fix="do not trust this repository")
