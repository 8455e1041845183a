"""Checkpoints: tensors by name, read lazily from safetensors shards and written as a stream that survives a crash.

Two identities are kept apart. The fingerprint (headers and fixed samples, milliseconds) keys random numbers and
canonical order. The digest (every byte) alone decides that two checkpoints are the same; it does not depend on
shards, header text or padding, and is computed on the bytes as they stream.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash
from torch import Tensor

from glue.errors import CheckpointError, did_you_mean
from glue.files import sync_folder, write_aside

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors library too
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAMPLES, SAMPLE_BYTES = 16, 64


@dataclass(frozen=True)
class Header:
    """What a file says of one tensor, and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path | None = None
    start: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@runtime_checkable
class Weights(Protocol):
    """Tensors by name with headers and a fingerprint, which is taken once: a Checkpoint, an adapter over its base."""

    @property
    def headers(self) -> Mapping[str, Header]: ...
    @property
    def fingerprint(self) -> str: ...
    def __getitem__(self, name: str) -> Tensor: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...


class InMemory(Mapping[str, Tensor]):
    """Weights that are already in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors = dict(tensors)
        self.headers = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}
        self.fingerprint = fingerprint(self)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of one model folder or one .safetensors file, mapped into memory when they are asked for.

    A tensor is a private copy-on-write view of its file: nothing is read before it is used, nothing is written back.
    Raises CheckpointError where a shard is missing, damaged, or not safetensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.headers: dict[str, Header] = {}
        for file in _shards(self.path):
            for name, header in read_header(file).items():
                if name in self.headers:
                    raise CheckpointError(f"{file}: '{name}' is also in {self.headers[name].file}",
                                          fix="every tensor may stand in one shard only; write the checkpoint again")
                self.headers[name] = header
        lost = sorted(set(_indexed(self.path)) - set(self.headers))
        if lost:
            raise CheckpointError(f"{self.path}: the index names '{lost[0]}', which is in none of its shards "
                                  f"({len(lost)} tensors are missing)", fix="download or write the checkpoint again")
        self._maps: dict[Path, mmap.mmap] = {}
        self._fingerprint = ""

    def __getitem__(self, name: str) -> Tensor:
        header = self.headers.get(name)
        if header is None or header.file is None:
            raise CheckpointError(f"{self.path} has no tensor '{name}'{did_you_mean(name, self.headers)}")
        if not header.numel:
            return torch.empty(header.shape, dtype=header.dtype)
        if header.file not in self._maps:
            with open(header.file, "rb") as file:
                self._maps[header.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if header.start + header.nbytes > len(self._maps[header.file]):
            raise CheckpointError(f"{header.file} has become shorter since it was opened", fix="write it again")
        flat = torch.frombuffer(self._maps[header.file], dtype=header.dtype, count=header.numel, offset=header.start)
        return flat.reshape(header.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.headers.values())

    @property
    def fingerprint(self) -> str:
        """See `fingerprint`."""
        self._fingerprint = self._fingerprint or fingerprint(self)
        return self._fingerprint


def _shards(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    names = sorted(set(_indexed(path).values()))
    if names:
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(f"{path} has no {missing[0]} ({len(missing)} of {len(names)} shards are missing)",
                                  fix="download or write the checkpoint again")
        return [path / name for name in names]
    found = [path / name for name in (SINGLE, "adapter_model.safetensors") if (path / name).is_file()]
    if found:
        return found[:1]
    pickled = sorted(file.name for file in path.glob("*.bin")) if path.is_dir() else []
    if pickled:
        raise CheckpointError(f"{path} holds pickled weights ({pickled[0]}), which can run code when they are loaded",
                              fix="convert them to safetensors first")
    raise CheckpointError(f"{path} holds no safetensors weights",
                          fix="give a model folder with model.safetensors, or a .safetensors file")


def _indexed(path: Path) -> dict[str, str]:
    """Tensor -> shard, as the index of a folder says; nothing where there is none, or a single file beside it.

    transformers too takes the single file where both are there, so what is merged is what runs.
    """
    index = path / INDEX
    if not index.is_file() or (path / SINGLE).is_file():
        return {}
    try:
        named = json.loads(index.read_bytes())["weight_map"]
        if not named or not all(isinstance(name, str) and name for name in named.values()):
            raise ValueError("'weight_map' must lead from tensors to files")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of shards ({error})",
                              fix="download or write the checkpoint again") from None
    if any("/" in name or name.startswith(".") or not name.isprintable() for name in named.values()):
        raise CheckpointError(f"{index} names shards outside its folder", fix="do not trust this checkpoint")
    return named


def read_header(file: Path) -> dict[str, Header]:
    """The header of one safetensors file, checked against the length of the file. Raises CheckpointError."""
    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged or not safetensors: {why}", fix="download or write it again")

    size = file.stat().st_size
    with open(file, "rb") as stream:
        lead = stream.read(8)
        length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else -1
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise damaged(f"it has {size} bytes and its header should have {length}")
        try:
            entries = json.loads(stream.read(length), object_pairs_hook=_once_each)
        except (ValueError, RecursionError) as error:
            raise damaged(f"its header is not JSON, or not plain ({error})") from None
    headers: dict[str, Header] = {}
    if not isinstance(entries, dict):
        raise damaged("its header is not a mapping")
    entries.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if not name.isprintable():
            raise damaged(f"the name {name!r} has characters that are not printed")
        try:
            word, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            dtype = DTYPES.get(word)
        except (KeyError, TypeError, ValueError):
            raise damaged(f"its entry for '{name}' is not understood") from None
        if dtype is None:
            raise CheckpointError(f"{file}: '{name}' has the type {word!r}, which is not supported",
                                  fix=f"known types: {', '.join(DTYPES)}")
        if any(type(number) is not int or number < 0 for number in (*shape, start, end)) \
                or prod(extent or 1 for extent in shape) >= 2**63:
            raise damaged(f"the shape or offsets of '{name}' are no counts")
        if end - start != prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise damaged(f"'{name}' should take bytes {start} to {end}, the file has {size - 8 - length}")
        headers[name] = Header(dtype, shape, file, 8 + length + start)
        spans.append((start, end, name))
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached:
            raise damaged(f"'{name}' begins at byte {start}, what stands before it ends at {reached}")
        reached = end
    if 8 + length + reached != size:
        raise damaged(f"{size - 8 - length - reached} bytes at its end belong to no tensor")
    return headers


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def fingerprint(weights: Weights) -> str:
    """sha256 over the sorted headers and 16 fixed samples of 64 bytes of each tensor: fast, and not a proof."""
    total = hashlib.sha256()
    for name in sorted(weights.headers):
        header = weights.headers[name]
        total.update(f"{name}|{DTYPE_NAMES[header.dtype]}|{list(header.shape)}\n".encode())
        data = as_bytes(weights[name])
        last = max(0, len(data) - SAMPLE_BYTES)
        for k in range(SAMPLES):
            start = last * k // (SAMPLES - 1)
            total.update(data[start:start + SAMPLE_BYTES])
    return total.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_digest(name: str, tensor: Tensor) -> str:
    """xxh3_128 over name, type, shape and bytes."""
    total = _opened(name, Header(tensor.dtype, tuple(tensor.shape)))
    total.update(as_bytes(tensor))
    return total.hexdigest()


def _opened(name: str, header: Header) -> xxhash.xxh3_128:
    return xxhash.xxh3_128(f"{name}|{DTYPE_NAMES[header.dtype]}|{list(header.shape)}\n".encode())


def combined(digests: Mapping[str, str]) -> str:
    """One digest of many named ones, in the order of their names."""
    total = xxhash.xxh3_128()
    for name in sorted(digests):
        total.update(f"{name}={digests[name]}\n".encode())
    return total.hexdigest()


def weights_digest(weights: Weights) -> str:
    """The digest of all tensors; reads every byte once."""
    return combined({name: tensor_digest(name, weights[name]) for name in weights})


class Writer:
    """Writes a checkpoint tensor by tensor into a folder, header first, each tensor at its final offset.

    headers     name to Header (dtype and shape), all known beforehand
    shard_size  bytes of tensors a file may hold; a single larger tensor gets a file of its own

    As a context manager it is closed at the end, and aborted where an exception passes. Files get their names in
    `close`, once they are complete and synced, the index last; before that the folder holds no checkpoint.
    """

    def __init__(self, folder: Path, headers: Mapping[str, Header], *, shard_size: int = 5_000_000_000,
                 metadata: Mapping[str, Any] | None = None):
        self.folder, self._metadata = folder, dict(metadata or {})
        self.digests: dict[str, str] = {}
        self._left = set(headers)
        self._open: dict[str, tuple[int, Header, str]] = {}
        self._files: dict[str, FileIO] = {}
        shards = _split(headers, shard_size)
        try:
            for k, names in enumerate(shards):
                file = SINGLE if len(shards) == 1 else f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
                self._start(file, names, headers)
        except BaseException:
            self.abort()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()

    def _start(self, file: str, names: list[str], headers: Mapping[str, Header]) -> None:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in sorted(names, key=lambda name: -headers[name].dtype.itemsize):  # so that each is aligned
            header = headers[name]
            entries[name] = {"dtype": DTYPE_NAMES[header.dtype], "shape": list(header.shape),
                             "data_offsets": [offset, offset + header.nbytes]}
            offset += header.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        stream = FileIO(self._part(file), "w")
        self._files[file] = stream
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)
        for name in names:
            self._open[name] = (8 + len(text) + entries[name]["data_offsets"][0], headers[name], file)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor at its place and take its digest."""
        assert name in self._left, f"'{name}' was not announced, or is written already"
        start, header, file = self._open[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (header.dtype, header.shape), \
            f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}, announced as {header.dtype} {header.shape}"
        data, done = as_bytes(tensor), 0
        while done < len(data):
            done += os.pwrite(self._files[file].fileno(), data[done:], start + done)
        total = _opened(name, header)
        total.update(data)
        self.digests[name] = total.hexdigest()
        self._left.discard(name)

    def close(self) -> str:
        """Sync every file, write the index last, and return the digest of all tensors."""
        if not self._files:
            return combined(self.digests)
        assert not self._left, f"{len(self._left)} tensors were announced and not written, e.g. {sorted(self._left)[0]}"
        for stream in self._files.values():
            os.fsync(stream.fileno())
            stream.close()
        for file in self._files:
            os.replace(self._part(file), self.folder / file)
        sync_folder(self.folder)
        if len(self._files) > 1:
            size = sum(header.nbytes for _, header, _ in self._open.values())
            index = {"metadata": {"total_size": size, **self._metadata},
                     "weight_map": {name: file for name, (_, _, file) in sorted(self._open.items())}}
            write_aside(self.folder / INDEX, json.dumps(index, indent=2))
        self._files = {}
        return combined(self.digests)

    def abort(self) -> None:
        """Give up what is not complete; nothing of it stays behind."""
        for file, stream in self._files.items():
            stream.close()
            self._part(file).unlink(missing_ok=True)
        self._files = {}

    def _part(self, file: str) -> Path:
        return self.folder / f".{file}.part"


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
