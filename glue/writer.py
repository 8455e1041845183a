"""Writer: a checkpoint written tensor by tensor, or by many processes at once, that survives a crash.

All sizes are known beforehand, so headers come first and every tensor has its place from the start. Files get their
names once they are complete; what is finished is noted in a journal, and a writer with the same key goes on from it.
Each header has room for the digest of all tensors, in every shard the same, which is put there last.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from glue.checkpoint import DTYPE_NAMES, INDEX, SINGLE, Header, as_bytes, combined, opened_digest
from glue.errors import GlueError, RunError
from glue.files import sync_folder, whole_lines, write_aside

SHARD = 5_000_000_000  # bytes of tensors in one file
JOURNAL = ".parts.jsonl"
DIGEST = "glue_digest"   # its key among the metadata of a header
BLOCK = 1 << 22        # bytes that are read at once
DIRECT, PAGE = 1 << 19, 1 << 12  # bytes that go past the page cache at once; what their place and size are whole in
NOTHING = mmap.mmap(-1, 1)
BLANK = b"0" * 32      # where the digest of all tensors will stand


@dataclass(frozen=True)
class Layout:
    """Where the bytes of each tensor go: into which file, which does not yet have its name, and where in it.

    journal  whether what is complete is noted
    synced   whether it is on the disk before that: who writes may be on another machine, and be gone before it is
    """

    folder: Path
    headers: Mapping[str, Header]
    places: Mapping[str, tuple[str, int]]
    journal: bool = False
    synced: bool = False

    def part(self, file: str) -> Path:
        """What a file is called until it is complete."""
        return self.folder / f".{file}.part"


class Stream:
    """One tensor on its way to its place, piece by piece.

    A large one goes past the page cache, where the file system can: what has to be on the disk in the end need not wait
    in memory first, nor drive out of it what is still to be read.
    """

    def __init__(self, layout: Layout, name: str):
        file, self._at = layout.places[name]
        self._layout, self._name, self._header = layout, name, layout.headers[name]
        self._end = self._at + self._header.nbytes
        self._digest = opened_digest(name, self._header)
        self._file = os.open(layout.part(file), os.O_WRONLY)
        self._direct: int | None = None
        self._held, self._buffer, self._other = 0, NOTHING, NOTHING
        self._under_way: Future[None] | None = None
        if self._header.nbytes >= DIRECT and hasattr(os, "O_DIRECT"):
            with suppress(OSError):  # a file system without it
                self._direct = os.open(layout.part(file), os.O_WRONLY | os.O_DIRECT)
                self._buffer, self._other = mmap.mmap(-1, DIRECT), mmap.mmap(-1, DIRECT)  # which begin with a page
                self._beside = ThreadPoolExecutor(1)  # one is written while the other is filled

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._direct is not None:
            self._beside.shutdown()
            os.close(self._direct)
        os.close(self._file)

    def write(self, piece: Tensor) -> None:
        """The next entries. Raises RunError where they cannot be written, for lack of space for instance."""
        assert piece.dtype == self._header.dtype, f"'{self._name}' is {piece.dtype}, announced as {self._header.dtype}"
        data = as_bytes(piece)
        assert self._at + self._held + len(data) <= self._end, f"'{self._name}' is larger than announced"
        self._digest.update(data)
        try:
            while self._direct is not None and len(data):
                data = data[self._taken(data):]
            self._put(self._file, data)
        except OSError as problem:
            raise unwritten(self._layout.folder, problem) from None

    def _taken(self, data: memoryview) -> int:
        """How many bytes were taken: up to the next page as they are, from there on into the buffer."""
        if odd := -self._at % PAGE if not self._held else 0:
            odd = min(odd, len(data))
            self._put(self._file, data[:odd])
            return odd
        count = min(len(data), DIRECT - self._held)
        self._buffer[self._held:self._held + count] = data[:count]
        self._held += count
        if self._held == DIRECT:
            self._wait()
            self._under_way = self._beside.submit(self._past_the_cache, memoryview(self._buffer), self._at)
            self._buffer, self._other = self._other, self._buffer
            self._at, self._held = self._at + DIRECT, 0
        return count

    def _past_the_cache(self, data: memoryview, at: int) -> None:
        try:
            _write(self._direct, data, at)
        except OSError as problem:
            if problem.errno != errno.EINVAL:
                raise
            _write(self._file, data, at)  # a file system that cannot, and says so only now

    def _wait(self) -> None:
        if self._under_way is not None:
            self._under_way.result()
        self._under_way = None

    def _put(self, file: int, data: memoryview) -> None:
        _write(file, data, self._at)
        self._at += len(data)

    def close(self) -> str:
        """The digest of the tensor, now that it is complete; the journal, where there is one, has it too."""
        try:
            self._wait()
            self._put(self._file, memoryview(self._buffer)[:self._held])
            assert self._at == self._end, f"{self._end - self._at} bytes of '{self._name}' are missing"
            digest = self._digest.hexdigest()
            if self._layout.synced:
                os.fsync(self._file)
            if self._layout.journal:
                self._note(digest)
        except OSError as problem:
            raise unwritten(self._layout.folder, problem) from None
        return digest

    def _note(self, digest: str) -> None:
        line = json.dumps({"name": self._name, "digest": digest}) + "\n"
        journal = os.open(self._layout.folder / JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(journal, line.encode())  # one short write to the end of a file is not torn by others
        finally:
            os.close(journal)


class Writer:
    """Writes a checkpoint into a folder, header first, each tensor at its final offset.

    headers     name to Header (dtype and shape), all known beforehand
    shard_size  bytes of tensors a file may hold; a single larger tensor gets a file of its own
    single      what the file is called where one is enough
    key         of what is written; a writer with the key of one that was killed here finds its tensors in `left`
                no more. Without a key nothing is kept

    As a context manager it is closed at the end, and aborted where an exception passes. Files get their names in
    `close`, once they are complete and synced, the index last; before that the folder holds no checkpoint.
    """

    def __init__(self, folder: Path, headers: Mapping[str, Header], *, shard_size: int = SHARD,
                 metadata: Mapping[str, Any] | None = None, key: str = "", single: str = SINGLE):
        self.folder, self._metadata, self._key = folder, dict(metadata or {}), key
        self.digests: dict[str, str] = {}
        shards = _split(headers, shard_size)
        self._heads: dict[str, tuple[bytes, int]] = {}
        places: dict[str, tuple[str, int]] = {}
        for k, names in enumerate(shards):
            file = single if len(shards) == 1 else f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
            self._heads[file] = _head(file, names, headers, places)
        self.layout = Layout(folder, dict(headers), places, bool(key))
        self._open = True
        try:
            if not (key and self._resumed()):
                self._begin()
        except OSError as problem:
            self.abort()
            raise unwritten(folder, problem) from None
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif not self._key or (issubclass(kind, GlueError) and not issubclass(kind, RunError)):
            self.abort()  # what the user must change; after everything else, the same call goes on from here

    @property
    def left(self) -> list[str]:
        """Tensors that are not written yet."""
        return [name for name in self.layout.headers if name not in self.digests]

    def _begin(self) -> None:
        self._clear()
        for file, (head, size) in self._heads.items():
            with open(self.layout.part(file), "wb") as stream:
                stream.write(head)
                stream.truncate(size)
                _reserve(stream.fileno(), size)
        if self._key:
            (self.folder / JOURNAL).write_text(json.dumps({"key": self._key}) + "\n")

    def _resumed(self) -> bool:
        """Find what an earlier writer with this key has finished; its bytes are read again, not trusted."""
        told = []
        for line in whole_lines(self.folder / JOURNAL):
            with suppress(ValueError):  # a line that was torn by a crash, and another behind it
                told.append(json.loads(line))
        if not told or told[0].get("key") != self._key:
            return False
        for file, (head, size) in self._heads.items():
            part = self.layout.part(file)
            if not part.is_file() or part.stat().st_size != size:
                return False
            at, end = head.index(BLANK), head.index(BLANK) + len(BLANK)
            with open(part, "rb") as stream:
                found = stream.read(len(head))
            if found[:at] + BLANK + found[end:] != head:  # one that was killed at its very end has a digest there
                return False
        for record in told[1:]:
            name = record.get("name")
            if name in self.layout.places and self._written(name) == record.get("digest"):
                self.digests[name] = record["digest"]
        return True

    def _written(self, name: str) -> str:
        """The digest of the bytes that stand at a tensor's place."""
        file, at = self.layout.places[name]
        header = self.layout.headers[name]
        digest, left = opened_digest(name, header), header.nbytes
        with open(self.layout.part(file), "rb", buffering=0) as stream:
            stream.seek(at)
            while left and (data := stream.read(min(left, BLOCK))):
                digest.update(data)
                left -= len(data)
        return digest.hexdigest()

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor at its place and take its digest."""
        assert name in self.layout.headers and name not in self.digests, \
            f"'{name}' was not announced, or is written already"
        header = self.layout.headers[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (header.dtype, header.shape), \
            f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}, announced as {header.dtype} {header.shape}"
        with Stream(self.layout, name) as stream:
            stream.write(tensor)
            self.digests[name] = stream.close()

    def done(self, digests: Mapping[str, str]) -> None:
        """Take note of tensors that were streamed to their places, perhaps by other processes."""
        self.digests.update(digests)

    def close(self) -> str:
        """Sync every file, write the index last, and return the digest of all tensors."""
        if not self._open:
            return combined(self.digests)
        assert not self.left, f"{len(self.left)} tensors were announced and not written, e.g. {sorted(self.left)[0]}"
        digest = combined(self.digests)
        try:
            for file, (head, _) in self._heads.items():
                handle = os.open(self.layout.part(file), os.O_WRONLY)
                try:
                    _write(handle, memoryview(digest.encode()), head.index(BLANK))
                    os.fsync(handle)
                finally:
                    os.close(handle)
            for file in self._heads:
                os.replace(self.layout.part(file), self.folder / file)
            sync_folder(self.folder)
            if len(self._heads) > 1:
                size = sum(header.nbytes for header in self.layout.headers.values())
                index = {"metadata": {"total_size": size, **self._metadata},
                         "weight_map": {name: file for name, (file, _) in sorted(self.layout.places.items())}}
                write_aside(self.folder / INDEX, json.dumps(index, indent=2))
            (self.folder / JOURNAL).unlink(missing_ok=True)
        except OSError as problem:
            raise unwritten(self.folder, problem) from None
        self._open = False
        return digest

    def abort(self) -> None:
        """Give up what is not complete; nothing of it stays behind."""
        if self._open:
            self._clear()
        self._open = False

    def _clear(self) -> None:
        for part in self.folder.glob(".*model*.safetensors.part"):
            part.unlink(missing_ok=True)
        (self.folder / JOURNAL).unlink(missing_ok=True)


def packed(entries: Mapping[str, Any]) -> bytes:
    """A header as it stands in a file."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _reserve(file: int, size: int) -> None:
    """Take the space now, where the file system can: a full disk is known at once, and later writes are quicker."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "fallocate") and libc.fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0 \
            and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write(file: int | None, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)  # type: ignore[arg-type]


def unwritten(folder: Path, problem: OSError) -> RunError:
    """What to say where the disk refuses."""
    return RunError(f"{folder} cannot be written to: {problem.strerror or problem}",
                    fix="make room, or choose another place; the same command goes on from what is finished")


def _head(file: str, names: Iterable[str], headers: Mapping[str, Header],
          places: dict[str, tuple[str, int]]) -> tuple[bytes, int]:
    """The first bytes of a file and its size; puts the place of each tensor into `places`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", DIGEST: BLANK.decode()}}
    offset = 0
    for name in sorted(names, key=lambda name: -headers[name].dtype.itemsize):  # so that each is aligned
        header = headers[name]
        entries[name] = {"dtype": DTYPE_NAMES[header.dtype], "shape": list(header.shape),
                         "data_offsets": [offset, offset + header.nbytes]}
        offset += header.nbytes
    head = packed(entries)
    for name in names:
        places[name] = file, len(head) + entries[name]["data_offsets"][0]
    return head, len(head) + offset


def _split(headers: Mapping[str, Header], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, header in headers.items():
        if shards[-1] and size + header.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += header.nbytes
    return shards
