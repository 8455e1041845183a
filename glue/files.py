"""Files that are never half written: written aside, synced, renamed; appended to under a lock."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

ASIDE = re.compile(r"\..+\.[0-9]+\.[0-9]{9,}")  # what `write_aside` calls a file until it is whole
BLOCK = 65536  # bytes that are read at once in search of the end of a line


def write_aside(file: Path, text: str | bytes) -> None:
    """Write a whole file so that a reader sees the old one or the new one, never a part."""
    data = text.encode() if isinstance(text, str) else text
    draft = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(draft, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


REPLACED = ".replaced-"


def point(link: Path, folder: Path) -> None:
    """Let a name point to a folder, whatever it pointed to before. Does nothing where the name is a folder itself."""
    if link.is_dir() and not link.is_symlink():
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    draft = link.with_name(f".{link.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(os.path.relpath(folder, link.parent))
    os.replace(draft, link)


def publish(draft: Path, final: Path) -> Path | None:
    """Rename a finished folder into place, every file synced first.

    What a killed process was writing aside is no part of it and is removed.
    What stood there is never deleted, since it may have been changed by hand: it is kept as `<name>.replaced-<n>`,
    which is returned. `glue zoo gc` lists it.
    """
    for file in list(draft.rglob("*")):
        if ASIDE.fullmatch(file.name):
            file.unlink(missing_ok=True)
        elif file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        elif file.is_dir():
            sync_folder(file)
    sync_folder(draft)
    final.parent.mkdir(parents=True, exist_ok=True)
    kept = _set_aside(final)
    while not _renamed(draft, final):  # another process has published here in the meantime
        kept = _set_aside(final) or kept
    sync_folder(final.parent)
    return kept


def _set_aside(final: Path) -> Path | None:
    n = 1
    while os.path.lexists(final):
        kept = final.with_name(f"{final.name}{REPLACED}{n}")
        with suppress(FileNotFoundError):  # another process was faster
            if not os.path.lexists(kept) and _renamed(final, kept):
                return kept
        n += 1
    return None


def _renamed(old: Path, new: Path) -> bool:
    """Rename a folder; False if there is something under the new name already."""
    try:
        os.rename(old, new)
    except OSError as problem:
        if problem.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock that belongs to `file`; other processes wait."""
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        yield


def append_line(file: Path, line: str, *, heading: str = "") -> None:
    """Append one line under the lock, synced; a torn last line left by a crash is cut off first.

    heading  the first line of a new file
    """
    assert "\n" not in line + heading, "a record is one line"
    with locked(file):
        new = not file.exists()
        with open(file, "ab+") as stream:
            stream.truncate(_whole(stream))
            text = f"{heading}\n{line}\n" if heading and not stream.seek(0, os.SEEK_END) else f"{line}\n"
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
        if new:
            sync_folder(file.parent)


def _whole(stream: BinaryIO) -> int:
    """How many bytes of the file are whole lines; reads backwards from its end, no further than it must."""
    end = stream.seek(0, os.SEEK_END)
    size = 1  # the usual case: the last byte ends a line
    while end:
        start = max(0, end - size)
        stream.seek(start)
        found = stream.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end, size = start, BLOCK
    return 0


def whole_lines(file: Path) -> list[str]:
    """The lines of an append-only file; a torn last line is left out. Bytes that are no UTF-8 become surrogates."""
    if not file.exists():
        return []
    text = file.read_bytes().decode(errors="surrogateescape")
    return text.split("\n")[:-1]  # not splitlines, which breaks at characters that JSON leaves as they are
