"""The answers of /v1/score as bytes and as JSON, written by whoever serves and read by whoever asks.

Bytes are little-endian: one header, then every place in the same number of bytes. A place tells either all tokens in
their order, or k of them by number. JSON tells the same at full width, whatever `bits` says.

What the bits of a log-probability cost: 32 nothing that counts; 16 half a unit of its last place, 0.008 nats at most
where it lies above -32; 8 at most STEP / 2 = 0.04 nats, of what lies within RANGE nats of the largest of its place.
What lies lower is told as RANGE below it. The numbers that come back are not normalised again.

Letters: p places, k tokens told of each place, v vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch

from glue.errors import RunError, one_line
from glue.kinds.source import Scored

Bits = Literal[32, 16, 8]
BINARY = "application/octet-stream"
SESSION, HELD = "x-glue-session", "x-glue-held"  # headers of an answer in bytes, for what JSON says in its fields
HEADER = struct.Struct("<4sBBHIII")  # mark, version, bits, nothing, p, k, v
MARK, VERSION = b"GLSC", 1
RANGE, CODES = 20.0, 255  # nats that 8 bits span; the code of what lies there or lower
STEP = RANGE / CODES
SLACK = 1e-2  # how far rounding may carry a probability above 1, in nats
_TYPES = {32: "<f4", 16: "<f2", 8: "u1"}


def size(p: int, k: int, v: int, bits: int) -> int:
    """Bytes of an answer; k = 0 means all tokens."""
    numbers = (k or v) * bits // 8 + (4 if bits == 8 else 0)
    return HEADER.size + p * (numbers + (k * _width(v) + 8 if k else 0))


def encode(scored: Scored, v: int, bits: Bits = 32) -> bytes:
    """What a source says, as bytes."""
    logs = scored.logs.detach().cpu().numpy()
    p, n = logs.shape
    k = 0 if scored.tokens is None else n
    assert n and (k or n == v), f"{n} tokens are told of {v}"
    places = np.zeros(p, _place(k, v, bits))
    if scored.tokens is not None:
        places["ids"] = scored.tokens.cpu().numpy()  # -1 becomes the largest number that fits
        places["tail"], places["floor"] = _up(scored.tail), _up(scored.floor)
    if bits == 8:
        top = logs.max(1, keepdims=True)
        with np.errstate(invalid="ignore"):  # of -inf, which lies as low as anything may
            below = np.where(np.isfinite(logs), top - logs, RANGE)
        places["top"] = top[:, 0]
        places["logs"] = np.minimum(np.rint(below / STEP), CODES)
    else:
        with np.errstate(over="ignore"):  # what is too small for the type is no probability that counts
            places["logs"] = logs
    return HEADER.pack(MARK, VERSION, bits, 0, p, k, v) + places.tobytes()


def decode(data: bytes, *, places: int, v: int) -> Scored:
    """What `encode` made bytes of, in fp32. Raises RunError for anything else, before any memory is taken for it.

    places  p, as it was asked for     v  as the vocabulary has it
    """
    if len(data) < HEADER.size:
        raise _wrong(f"{len(data)} bytes are no answer")
    mark, version, bits, nothing, p, k, told = HEADER.unpack_from(data)
    if mark != MARK or version != VERSION or bits not in _TYPES or nothing:
        raise _wrong(f"its header is {data[:8]!r}")
    if (p, told) != (places, v) or k > v:
        raise _wrong(f"it tells {k or 'all'} of {told} tokens at {p} places; asked were {places} places of {v} tokens")
    if len(data) != size(p, k, v, bits):
        raise _wrong(f"it has {len(data)} bytes, and {size(p, k, v, bits)} would be right")
    read = np.frombuffer(data, _place(k, v, bits), p, HEADER.size)
    if bits == 8:
        logs = read["top"][:, None] - np.float32(STEP) * read["logs"].astype(np.float32)
    else:
        logs = read["logs"].astype(np.float32)
    if not k:
        return _checked(logs, None, np.zeros(p), np.zeros(p), v)
    ids = read["ids"].astype(np.int64)
    ids[ids == np.iinfo(read["ids"].dtype).max] = -1
    return _checked(logs, ids, read["tail"], read["floor"], v)


def as_json(scored: Scored, start: int) -> dict[str, Any]:
    """What a source says of the places from `start` on, as plain data; null is the logarithm of 0."""
    logs = [[log if log > -np.inf else None for log in row] for row in scored.logs.tolist()]
    ids = None if scored.tokens is None else scored.tokens.tolist()
    if ids is not None:
        logs = [[log for log, token in zip(row, some, strict=True) if token >= 0]
                for row, some in zip(logs, ids, strict=True)]
        ids = [[token for token in some if token >= 0] for some in ids]
    return {"from_pos": start, "ids": ids, "logprobs": logs, "tail_mass": scored.tail.tolist(),
            "floor": scored.floor.tolist()}


def from_json(told: Mapping[str, Any], *, places: int, v: int) -> Scored:
    """What `as_json` made plain data of. Raises RunError for anything else."""
    try:
        logs, ids = told["logprobs"], told["ids"]
        tail, floor = (np.array([1.0 * mass for mass in told[name]]) for name in ("tail_mass", "floor"))
        counts = [len(row) for row in logs]
        if len(logs) != places or (ids is None and counts != [v] * places) or max(counts, default=0) > v:
            raise _wrong(f"it tells {len(logs)} places; asked were {places} of {v} tokens")
        if ids is not None and counts != [len(row) for row in ids]:
            raise _wrong("it has not one log-probability for each token")
        wide = np.full((places, max(counts, default=0)), -np.inf)
        tokens = np.full(wide.shape, -1, dtype=np.int64)
        for k, row in enumerate(logs):
            wide[k, :len(row)] = [-np.inf if log is None else log for log in row]
            if ids is not None:
                if not all(type(token) is int and 0 <= token < v for token in ids[k]):
                    raise _wrong(f"a token is none of {v}")
                tokens[k, :len(row)] = ids[k]
        if tail.shape != (places,) or floor.shape != (places,):
            raise _wrong("it has not one tail and one floor for each place")
    except (KeyError, TypeError, ValueError, OverflowError) as problem:
        raise _wrong(f"{type(problem).__name__}: {problem}") from None
    return _checked(wide.astype(np.float32), None if ids is None else tokens, tail, floor, v)


def _checked(logs: np.ndarray, ids: np.ndarray | None, tail: np.ndarray, floor: np.ndarray, v: int) -> Scored:
    """These numbers, if they can be probabilities of tokens."""
    if np.isnan(logs).any() or (logs > SLACK).any():
        raise _wrong("a log-probability is above 0, or no number")
    for name, mass in (("tail", tail), ("floor", floor)):
        if not ((mass >= 0) & (mass <= 1 + SLACK)).all():  # which a NaN is not either
            raise _wrong(f"a {name} is no probability")
    if ids is not None:
        if ((ids < -1) | (ids >= v)).any():
            raise _wrong(f"a token is none of {v}")
        ordered = np.sort(ids, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise _wrong("it tells a token twice")
        logs = np.where(ids >= 0, logs, -np.inf)
    return Scored(torch.from_numpy(logs.astype(np.float32)), None if ids is None else torch.from_numpy(ids),
                  *(torch.from_numpy(mass.astype(np.float32)) for mass in (tail, floor)))


def _place(k: int, v: int, bits: int) -> np.dtype:
    """One place, packed."""
    ids: list[Any] = [("ids", f"<u{_width(v)}", (k,))] if k else []
    largest: list[Any] = [("top", "<f4")] if bits == 8 else []
    masses: list[Any] = [("tail", "<f4"), ("floor", "<f4")] if k else []
    return np.dtype([*ids, *largest, ("logs", _TYPES[bits], (k or v,)), *masses])


def _width(v: int) -> int:
    """Bytes of a token's number; the largest that fits is kept for places that tell of fewer than k."""
    return 2 if v <= 0xFFFF else 4


def _up(mass: torch.Tensor) -> np.ndarray:
    """In fp32, never rounded down: a bound must stay one."""
    wide = mass.detach().cpu().double().numpy()
    near = wide.astype(np.float32)
    return np.where(near < wide, np.nextafter(near, np.float32(np.inf)), near)


def _wrong(why: str) -> RunError:
    return RunError(f"an answer to /v1/score cannot be read: {one_line(why)}",
                    fix="see that a glue server of this version answers there")
