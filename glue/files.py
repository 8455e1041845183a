"""Files that are never half written: written aside, synced, renamed; appended to under a lock."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_aside(file: Path, text: str | bytes) -> None:
    """Write a whole file so that a reader sees the old one or the new one, never a part."""
    data = text.encode() if isinstance(text, str) else text
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    with open(draft, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, file)
    sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(draft: Path, final: Path) -> None:
    """Rename a finished folder into place, every file synced first; whatever stood there is removed only then."""
    for file in draft.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(draft, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(draft, final)
    sync_folder(final.parent)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock that belongs to `file`; other processes wait."""
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        yield


def append_line(file: Path, line: str) -> None:
    """Append one line under the lock, synced; a torn last line left by a crash is cut off first."""
    assert "\n" not in line, "a record is one line"
    with locked(file):
        new = not file.exists()
        with open(file, "ab+") as stream:
            end = stream.seek(0, os.SEEK_END)
            if end:
                stream.seek(0)
                whole = stream.read().rfind(b"\n") + 1
                if whole < end:
                    stream.truncate(whole)
            stream.seek(0, os.SEEK_END)
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        if new:
            sync_folder(file.parent)


def whole_lines(file: Path) -> list[str]:
    """The lines of an append-only file; a torn last line is left out."""
    if not file.exists():
        return []
    text = file.read_bytes()
    return text[:text.rfind(b"\n") + 1].decode().splitlines()
