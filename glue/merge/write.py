"""Writing a merge: its tensors are streamed into shards, by this process or by many, and a killed one goes on."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glue.errors import RunError
from glue.merge.engine import Merge
from glue.writer import SHARD, Layout, Stream, Writer

PARTS = 8  # calls that each worker will get: many, so that none waits long for the last; few, as each is sent the merge
Call = tuple[Merge, Layout, list[str]]
Each = Callable[[int, dict[str, str]], None]
Report = Callable[[int, int], None]


def write(merge: Merge, folder: Path, *, shard_size: int = SHARD, number: int = 1,
          spread: Callable[[Sequence[Call], Each], object] | None = None, apart: bool = False,
          report: Report = lambda done, total: None) -> str:
    """Merge into a folder of safetensors and return the digest of the weights.

    number  of processes that `spread` has; it must not change a bit, and does not
    spread  runs `fill` on many arguments and tells what each returns, in any order; without it all is done here
    apart   whether it does so on other machines too, which see the folder under the same path
    report  called with bytes written and bytes in all
    Raises RunError where the disk is full; the same call goes on from what is written, also after a kill.
    """
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(header.nbytes for header in merge.headers.values())
    free = shutil.disk_usage(folder).free + sum(file.stat().st_blocks * 512 for file in folder.glob(".model*"))
    if total > free:
        raise RunError(f"{folder} needs {total:,} bytes, and its disk has {free:,} left", fix="make room first")
    with Writer(folder, merge.headers, shard_size=shard_size, key=resume_key(merge, shard_size)) as writer:
        left = writer.left
        done = total - sum(merge.headers[name].nbytes for name in left)
        if left:
            merge = merge.glanced()
        layout = replace(writer.layout, synced=apart)
        calls = [_call(merge, layout, names) for names in shares(merge, left, number * PARTS)]

        def each(_: int, digests: dict[str, str]) -> None:
            nonlocal done
            writer.done(digests)
            done += sum(merge.headers[name].nbytes for name in digests)
            report(done, total)

        if spread:
            spread(calls, each)
        else:
            for k, call in enumerate(calls):
                each(k, fill(*call))
        return writer.close()


def fill(merge: Merge, layout: Layout, names: Iterable[str]) -> dict[str, str]:
    """Merge some tensors and write them to their places; returns their digests."""
    digests = {}
    for name in names:
        with Stream(layout, name) as stream:
            for piece in merge.stream(name):
                stream.write(piece)
            digests[name] = stream.close()
    return digests


def _call(merge: Merge, layout: Layout, names: list[str]) -> Call:
    """What one call needs, and no more, since it is sent to another process."""
    return (replace(merge, targets={name: merge.targets[name] for name in names}),
            replace(layout, headers={name: layout.headers[name] for name in names},
                    places={name: layout.places[name] for name in names}), names)


def shares(merge: Merge, names: Iterable[str], number: int) -> list[list[str]]:
    """Names in about `number` parts of like size, the largest first; small tensors stay together."""
    costs = {name: merge.headers[name].numel * (len(merge.targets[name].inputs) + 1) for name in names}
    parts: list[tuple[int, list[str]]] = [(0, []) for _ in range(min(number, len(costs)))]
    for name in sorted(costs, key=lambda name: -costs[name]):
        least = min(range(len(parts)), key=lambda k: parts[k][0])
        parts[least] = parts[least][0] + costs[name], [*parts[least][1], name]
    return [names for _, names in sorted(parts, key=lambda part: -part[0])]


def resume_key(merge: Merge, shard_size: int) -> str:
    """Of everything that the bytes depend on: what is merged how, and the files as they are now."""
    total = hashlib.sha256(f"{merge.seed}|{merge.work}|{merge.allow_nan}|{shard_size}".encode())
    files: dict[Any, str] = {}
    for target in merge.targets.values():
        told = target.choice.spelled() if target.choice else None
        total.update(f"\n{target.name}|{target.header.dtype}|{target.header.shape}|{told}".encode())
        for each in [*target.inputs, *([target.base] if target.base else [])]:
            file = each.header.file
            if file is not None and file not in files:
                state = os.stat(file)
                files[file] = f"{file.resolve()}|{state.st_size}|{state.st_mtime_ns}"
            total.update(f"|{each.source.weights.fingerprint}|{each.name}|{files.get(file, '')}".encode())
    return total.hexdigest()
