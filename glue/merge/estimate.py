"""Estimates: what a merge will read, write, hold in memory and take in time, before it begins."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from glue.checkpoint import Header, InMemory
from glue.merge.engine import Merge
from glue.merge.leaf import Source
from glue.merge.target import PIECE, Input, Target

PROBE = 1 << 26      # bytes that are read and written to see how fast the disk is now
PLANS = 150_000_000  # bytes of the process that plans a merge, before any tensor
FORKED = 12_000_000  # bytes that a worker which is forked from it does not share with it
GLANCE, SAMPLED = 1 << 20, 32  # of a glance at each member: bytes that it collects, and one byte of so many entries


@dataclass(frozen=True)
class Cost:
    """What a merge takes.

    read     bytes of the tensors that go in, each counted once      passes   how often they are gone through
    written  bytes                                                   memory   private bytes of all processes, at most
    seconds  None where the method sees whole tensors, whose time does not grow with their size alone
    """

    read: int
    passes: int
    written: int
    memory: int
    seconds: float | None


def cost(merge: Merge, workers: int, disk: Path) -> Cost:
    """Measure one piece of every method with the numbers of members that occur, and the disk, and count the rest.

    disk  a folder on the disk that will be written to
    """
    inputs = {(id(each.source), each.name): each.header.nbytes for target in merge.targets.values()
              for each in [*target.inputs, *([target.base] if target.base else [])]}
    written = sum(header.nbytes for header in merge.headers.values())
    passes = 1 + any("glance" in target.choice.method.traits for target in merge.targets.values())
    work = work_seconds(merge)
    seconds = None
    if work is not None:
        reading, writing = _probe(merge, disk)
        seconds = max(work / max(1, workers), sum(inputs.values()) / reading, written / writing)
    return Cost(sum(inputs.values()), passes, written, memory(merge, workers), seconds)


def memory(merge: Merge, workers: int) -> int:
    """Private bytes of all processes of a merge from a config, at most."""
    return PLANS + (workers * (FORKED + held(merge)) if workers > 1 else held(merge))


def held(merge: Merge) -> int:
    """Bytes that one worker holds of the largest piece: inputs, base and what a method makes of them."""
    def one(target: Target) -> int:
        size = 8 if target.header.dtype.itemsize >= 4 else 4
        n, numel = len(target.inputs), target.header.numel
        if target.sees == "whole":  # and inner products of its rows and of its columns, in fp64 or in its own type
            rows, columns = numel // max(1, target.header.shape[-1]), target.header.shape[-1]
            return (n + 2) * numel * size + 40 * min(rows, columns) ** 2 + size * max(rows, columns) ** 2
        row = target.header.shape[-1] if target.header.shape else 1
        seen = n * (min(GLANCE, 4 * numel) + numel // SAMPLED) if "glance" in target.choice.method.traits else 0
        return seen + (2 * n + 4) * min(numel, max(PIECE, row if target.sees == "rows" else 0)) * size

    return max((one(target) for target in merge.targets.values()), default=0)


def work_seconds(merge: Merge) -> float | None:
    """What all pieces take on one core, as told by one piece of each kind."""
    kinds: dict[tuple, tuple[Target, int]] = {}
    for target in merge.targets.values():
        if not target.header.dtype.is_floating_point or not target.header.numel:
            continue
        if target.sees == "whole":
            return None
        key = target.choice.method.name, len(target.inputs), target.header.dtype, target.sees
        kinds[key] = target, kinds.get(key, (target, 0))[1] + target.header.numel
    return sum(_piece_seconds(merge, target) * numel / PIECE for target, numel in kinds.values())


def _piece_seconds(merge: Merge, target: Target) -> float:
    rows = (PIECE // 1024, 1024)
    random = torch.Generator().manual_seed(0)
    below = torch.randn(rows, generator=random)

    def like(each: Input, spread: float) -> Input:
        numbers = (below + spread * torch.randn(rows, generator=random)).to(each.header.dtype)
        return Input(Source(each.source.name, InMemory({target.name: numbers})), target.name)

    piece = replace(target, header=Header(target.header.dtype, rows), offset=0,
                    inputs=tuple(like(each, 0.05) for each in target.inputs),
                    base=like(target.base, 0) if target.base else None)
    trial = replace(merge, targets={target.name: piece}, device="cpu").glanced()
    trial.tensor(target.name)
    began = time.perf_counter()
    trial.tensor(target.name)
    return (time.perf_counter() - began) / prod(rows) * PIECE


def _probe(merge: Merge, disk: Path) -> tuple[float, float]:
    """Bytes a second, read and written."""
    files: Sequence[Path | None] = [each.header.file for target in merge.targets.values() for each in target.inputs]
    reading, file = 20e9, next((file for file in files if file), None)
    if file:
        began, seen = time.perf_counter(), 0
        with open(file, "rb", buffering=0) as stream:
            while seen < PROBE and (data := stream.read(1 << 20)):
                seen += len(data)
        reading = max(seen, 1) / max(time.perf_counter() - began, 1e-6)
    trial, block = disk / f".probe-{os.getpid()}", bytes(1 << 20)
    began = time.perf_counter()
    try:
        with open(trial, "wb", buffering=0) as stream:
            for _ in range(PROBE >> 20):
                stream.write(block)
        writing = PROBE / (time.perf_counter() - began)
    finally:
        trial.unlink(missing_ok=True)
    return reading, writing
