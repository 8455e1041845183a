"""Paths of this machine in what others will read: each becomes the name of what lies there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from glue.zoo import Zoo

# An absolute path, of any system, that does not stand inside a word, an address or another path
_PATH = re.compile(r"(?<![\w/.@~%\\-])(?:file://)?(?:~/|[A-Za-z]:[\\/]+|/)[^\s\"'`|<>,;()\[\]{}*]+")
_CACHED = re.compile(r"(?:models|datasets)--([^/]+?)(?:--([^/]+))?/snapshots/[^/]+(/.*)?$")  # in the cache of the hub
HOMES = {"home", "Users", "root", "tmp", "var", "mnt", "media", "private", "Volumes", "scratch", "workspace", "content"}
SYSTEM = {"usr", "bin", "sbin", "etc", "dev", "proc", "sys", "lib", "lib64"}  # alike on all machines


class Places:
    """Folders of this machine and what each is called where nobody has them.

    known  folder -> name
    """

    def __init__(self, known: Mapping[str, str]):
        self._known = dict(sorted(known.items(), key=lambda pair: -len(pair[0])))

    @staticmethod
    def of(zoo: Zoo) -> Places:
        """The folders of all members, by their names."""
        known: dict[str, str] = {}
        for member in (one for newest in zoo for one in zoo.versions(newest.name)):
            if not member.path.startswith("hub:"):
                known |= {str(Path(member.path)): member.name, str(Path(member.path).resolve()): member.name}
        return Places(known)

    def told(self, text: str) -> str:
        """The text with names instead of paths."""
        for folder, name in self._known.items():
            if folder in text:
                text = name.join(re.split(rf"(?<![\w/.~-]){re.escape(folder)}(?![\w.-])", text))
        return _PATH.sub(lambda match: self._name(match[0]) if _local(match[0]) else match[0], text)

    def data(self, value: Any) -> Any:
        """Plain data with names instead of paths, in keys too."""
        if isinstance(value, str):  # one that is a path as a whole may hold spaces
            whole = "\n" not in value and "://" not in value and _local(value)
            return self._name(value) if whole else self.told(value)
        if isinstance(value, list):
            return [self.data(item) for item in value]
        return {self.data(key): self.data(item) for key, item in value.items()} if isinstance(value, dict) else value

    def _name(self, path: str) -> str:
        path = path.removeprefix("file://")
        if path in self._known:
            return self._known[path]
        if cached := _CACHED.search(path):
            return "/".join(filter(None, cached.groups()[:2])) + (cached[3] or "")
        return PurePosixPath(path.replace("\\", "/")).name or "..."


def paths(value: Any) -> Iterator[str]:
    """Every path of this machine, or of another like it, in text or plain data."""
    if isinstance(value, str):
        yield from (match[0] for match in _PATH.finditer(value) if _local(match[0]))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from paths(key)
            yield from paths(item)
    elif isinstance(value, list):
        for item in value:
            yield from paths(item)


def _local(path: str) -> bool:
    """Whether what looks like an absolute path leads to a place that is somebody's own."""
    path = path.removeprefix("file://")
    if not path.startswith("/"):
        return bool(re.match(r"~/.|[A-Za-z]:[\\/]+\w", path))
    parts = path.split("/")
    return len(parts) > 2 and bool(parts[2]) and parts[1] not in SYSTEM and (
        parts[1] in HOMES or bool(parts[1]) and Path("/", parts[1]).is_dir())
