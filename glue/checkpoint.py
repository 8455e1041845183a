"""Checkpoints: tensors by name, read lazily from safetensors shards.

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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import xxhash
from torch import Tensor

from glue.errors import CheckpointError, did_you_mean

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors library too
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, HISTORY = "adapter_model.safetensors", "seed_history.safetensors"  # changes of a base
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
        lost = sorted(set(indexed(self.path)) - set(self.headers))
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

    def __getstate__(self) -> dict[str, Any]:  # another process maps the files itself
        return {**self.__dict__, "_maps": {}}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.headers.values())

    @property
    def fingerprint(self) -> str:
        """See `fingerprint`."""
        self._fingerprint = self._fingerprint or fingerprint(self, self._samples())
        return self._fingerprint

    def _samples(self) -> Iterator[bytes]:
        """Those of each tensor, by name. They are read, not mapped: around what is mapped the system reads megabytes,
        and a few bytes here and there would bring in the whole file."""
        files: dict[Path, int] = {}
        try:
            for name in sorted(self.headers):
                header = self.headers[name]
                assert header.file is not None
                if header.file not in files:
                    files[header.file] = os.open(header.file, os.O_RDONLY)
                    if hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(files[header.file], 0, 0, os.POSIX_FADV_RANDOM)
                found = [os.pread(files[header.file], stop - start, header.start + start)
                         for start, stop in _sampled(header.nbytes)]
                if sum(map(len, found)) < sum(stop - start for start, stop in _sampled(header.nbytes)):
                    raise CheckpointError(f"{header.file} has become shorter since it was opened", fix="write it again")
                yield b"".join(found)
        finally:
            for file in files.values():
                os.close(file)


def _shards(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".safetensors":
        return [path]
    names = sorted(set(indexed(path).values()))
    if names:
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(f"{path} has no {missing[0]} ({len(missing)} of {len(names)} shards are missing)",
                                  fix="download or write the checkpoint again")
        return [path / name for name in names]
    found = [path / name for name in (SINGLE, ADAPTER, HISTORY) if (path / name).is_file()]
    if found:
        return found[:1]
    pickled = sorted(file.name for file in path.glob("*.bin")) if path.is_dir() else []
    if pickled:
        raise CheckpointError(f"{path} holds pickled weights ({pickled[0]}), which can run code when they are loaded",
                              fix="convert them to safetensors first")
    raise CheckpointError(f"{path} holds no safetensors weights",
                          fix="give a model folder with model.safetensors, or a .safetensors file")


def indexed(path: Path) -> dict[str, str]:
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


def fingerprint(weights: Weights, samples: Iterable[bytes] | None = None) -> str:
    """sha256 over the sorted headers and 16 fixed samples of 64 bytes of each tensor: fast, and not a proof.

    samples  of each tensor, by name, where they are known
    """
    total, known = hashlib.sha256(), iter(samples) if samples is not None else None
    for name in sorted(weights.headers):
        header = weights.headers[name]
        total.update(f"{name}|{DTYPE_NAMES[header.dtype]}|{list(header.shape)}\n".encode())
        if known is not None:
            total.update(next(known))
            continue
        data = as_bytes(weights[name])
        for start, stop in _sampled(len(data)):
            total.update(data[start:stop])
    return total.hexdigest()


def _sampled(nbytes: int) -> list[tuple[int, int]]:
    """Where the samples of a tensor of so many bytes begin and end."""
    last = max(0, nbytes - SAMPLE_BYTES)
    starts = [last * k // (SAMPLES - 1) for k in range(SAMPLES)]
    return [(start, min(nbytes, start + SAMPLE_BYTES)) for start in starts]


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def tensor_digest(name: str, tensor: Tensor) -> str:
    """xxh3_128 over name, type, shape and bytes."""
    total = opened_digest(name, Header(tensor.dtype, tuple(tensor.shape)))
    total.update(as_bytes(tensor))
    return total.hexdigest()


def opened_digest(name: str, header: Header) -> xxhash.xxh3_128:
    """A digest of one tensor that has yet to see its bytes."""
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
