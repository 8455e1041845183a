"""Pairs of merges, ours and mergekit's, in alternating order, each with a probe of what the machine can do just then.

Every run is a process of its own, with the inputs in the page cache, nothing waiting to be written, and its output on
the disk of the inputs. Variables that set a number of threads are taken away: each side has its own defaults.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.speed import measure, probe
from benchmarks.speed.compare import compare
from benchmarks.speed.machine import commit
from benchmarks.speed.rows import Row
from glue.errors import GlueError, RunError

ROOT = Path(__file__).parents[2]
OURS, PEER = "ours", "peer"
UNSTEADY = 0.3  # a pair is left out where its probe is further than this share from the median of its row
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Bench:
    """Where and how rows are measured.

    folder    of the checkpoints and outputs, on one disk
    places    checkpoint -> folder
    members   how many are merged, where a method does not say
    pairs     wanted; as many again are tried where some are left out. 0 measures memory alone
    patience  seconds; a peer that takes longer is run once
    sides     who runs; without the peer there is nothing to compare
    probed    whether bandwidths are measured too
    """

    folder: Path
    places: Mapping[str, Path]
    members: int = 4
    pairs: int = 5
    patience: float = 600
    sides: Sequence[str] = (OURS, PEER)
    probed: bool = True

    def row(self, row: Row, *, sync: bool = False) -> dict[str, Any]:
        """One row of the table as plain data: what was merged, every pair as it was measured, and how outputs agree."""
        config = self.folder / "config.yaml"
        config.write_text(row.config(self.places, self.members))
        files = [file for name in row.inputs(self.members) for file in sorted(self.places[name].glob("*.safetensors"))]
        size = sum(file.stat().st_size for file in self.places["m0"].glob("*.safetensors"))
        found: dict[str, Any] = {
            "method": row.method, "settings": row.settings(), "members": len(row.members(self.members)),
            "synced": sync, "passes": row.passes, "reads": sum(file.stat().st_size for file in files), "writes": size,
            "floor": None if sync else row.floor, "near": None if sync else row.near,  # aims are without waiting
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(ROOT), "pairs": []}
        self._clear()
        if self.probed:
            probe.read(files, threads=_cores())  # brings them into the page cache
        pairs = found["pairs"]
        while len(pairs) < 2 * self.pairs and sum(steady(pairs)) < self.pairs and not self._slow(pairs):
            pairs.append(self._pair(len(pairs), config, files, size, sync))
            if len(pairs) == 1 and len(self.sides) == 2:
                base = self.places["base"] if row.random else None
                found["agreement"] = compare(self._out(OURS), self._out(PEER), base)
            self._clear()
        # memory of several processes can be told only by slowing them down, so in a run of its own
        several = [side for side in self.sides if not pairs or pairs[0][side]["processes"] > 1]
        found["memory"] = {side: self._run(side, config, sync, closely=True) for side in several}
        self._clear()
        return found

    def _pair(self, k: int, config: Path, files: list[Path], size: int, sync: bool) -> dict[str, Any]:
        sides = list(self.sides) if k % 2 == 0 else list(reversed(self.sides))
        found: dict[str, Any] = {"order": sides}
        if self.probed:
            file = self.folder / "probe"
            found["read"] = probe.read(files, threads=_cores())
            found["write"] = max(probe.write(file, size, threads=_cores(), sync=sync) for _ in range(2))
        for side in sides:
            found[side] = self._run(side, config, sync)
            if k:  # the first two outputs are compared; a clean one in the cache disturbs nobody
                self._clear()
        return found

    def _run(self, side: str, config: Path, sync: bool, closely: bool = False) -> dict[str, Any]:
        os.sync()
        ran = measure.run(command(side, config, self._out(side), sync), folder=self.folder,
                          environment=environment(), closely=closely)
        told = json.loads(ran.output[ran.output.index("{"):])
        if not told.get("made", True):
            raise RunError(f"{self._out(side)} was there already, so nothing was measured")
        figures = {key: value for key, value in asdict(ran).items() if key != "output"}
        return figures | told.pop("seconds") | {key: told[key] for key in ("bytes_read", "bytes_written", "digest")
                                                if key in told}

    def _slow(self, pairs: list[dict[str, Any]]) -> bool:
        return bool(pairs) and PEER in self.sides and pairs[0][PEER]["wall"] > self.patience

    def _out(self, side: str) -> Path:
        return self.folder / f"out-{side}"

    def _clear(self) -> None:
        """Remove outputs, and drafts of some that was killed: what goes on from a draft would look fast."""
        for path in self.folder.glob("*out-*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def command(side: str, config: Path, out: Path, sync: bool) -> list[str]:
    """The command line of one merge. Ours always waits until everything is on the disk; the peer only where asked."""
    if side == PEER:
        return [sys.executable, "-m", "benchmarks.speed.peer", str(config), str(out), *(["--sync"] if sync else [])]
    return [sys.executable, "-m", "glue.cli", "merge", str(config), str(out), "--quiet", "--json"]


def steady(pairs: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Which pairs count: those whose probe is near the median of all."""
    middle = {key: statistics.median(pair[key] for pair in pairs)
              for key in ("read", "write") if pairs and key in pairs[0]}
    return [all(abs(pair[key] / value - 1) <= UNSTEADY for key, value in middle.items()) for pair in pairs]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in THREADS}
    return kept | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def recorded(file: Path | None, head: Mapping[str, Any]) -> dict[str, Any]:
    """The results to go on with: those of `file`, or new ones. Raises GlueError where they are of something else."""
    if file is None or not file.exists():
        return {**head, "rows": {}}
    old = json.loads(file.read_text())
    changed = [key for key in head if old.get(key) != head[key]]
    if changed:
        raise GlueError(f"{file} holds results with another {' and '.join(changed)}", fix="give another --json FILE")
    return old
