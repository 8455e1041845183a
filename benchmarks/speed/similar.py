"""Similarity of all pairs by glue beside the published procedure, pair by pair; and sketches beside reading and exact.

Every run is a process of its own, in alternating order, with the models in the page cache and OMP_WAIT_POLICY=PASSIVE
on both sides. Seconds are without imports.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed import measure, probe
from benchmarks.speed.machine import commit, machine
from benchmarks.speed.pairs import OURS, ROOT, environment, recorded
from benchmarks.speed.shapes import SHAPES, made
from glue.files import write_aside

REFERENCE = "reference"
MANY = 500   # sketches that a new member is compared with
ROUNDS = 5   # of reading and sketching


def main(given: argparse.Namespace) -> int:
    """Measure all pairs for each number of members, then sketches, write down each at once, and print the page."""
    shape, folder = SHAPES[given.shape], given.folder / given.shape
    sizes = sorted(int(word) for word in given.members.split(","))
    base, *models = made(folder, shape, max(3, *sizes), 0).values()
    results = recorded(given.json, {"shape": given.shape, "bytes": shape.nbytes, "machine": machine(folder)})
    sides = (OURS,) if given.no_peer else (OURS, REFERENCE)
    for n in [*sizes, 0]:
        print(f"{n} members ..." if n else "sketches ...", file=sys.stderr, flush=True)
        results["rows"][str(n) if n else "sketch"] = \
            all_pairs(models[:n], given.pairs, sides) if n else sketches([base, *models[:max(3, sizes[0])]], folder)
        if given.json:
            write_aside(given.json, json.dumps(results, indent=1) + "\n")
    print(page(results))
    return 0


def all_pairs(folders: Sequence[Path], pairs: int, sides: Sequence[str] = (OURS, REFERENCE)) -> dict[str, Any]:
    """Both sides on the same members, `pairs` times in alternating order."""
    probe.read([file for folder in folders for file in folder.glob("*.safetensors")], threads=2)
    found: dict[str, Any] = {"members": len(folders), "pairs": [], **_made()}
    for k in range(pairs):
        order = list(sides) if k % 2 == 0 else list(reversed(sides))
        row: dict[str, Any] = {"order": order}
        scores: dict[str, np.ndarray] = {}
        for side in order:
            row[side], told = _run(side, folders)
            scores[side] = np.array(told["cosine"])
        if len(scores) == 2:
            row["apart"] = float(np.abs(scores[OURS] - scores[REFERENCE]).max())
        found["pairs"].append(row)
    return found


def sketches(folders: Sequence[Path], place: Path) -> dict[str, Any]:
    """Sketching beside reading; estimates for all but the first beside exact scores; one model beside MANY sketches."""
    from glue.checkpoint import Checkpoint
    from glue.cluster.similarity import similarity
    from glue.cluster.sketch import SURE, Sketch, compare

    work = place / "sketches"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        files = [work / f"{folder.name}.safetensors" for folder in folders]
        each = [_run("sketch", [folder, file, str(ROUNDS)])[1] for folder, file in zip(folders, files, strict=True)]
        found: dict[str, Any] = {**_made(), **each[0], "many": MANY}
        base, *others = [Checkpoint(folder) for folder in folders]
        known = [Sketch.load(file) for file in files]
        for word, below in (("raw", None), ("delta", known[0])):
            cosine, error = compare(known[1:], base=below)
            apart = np.abs(cosine - similarity(others, base=base if below else None))
            found[word] = {"apart": float(apart.max()), "error": float(error.max()),
                           "within": float((apart <= SURE * error + 1e-6).mean())}
        copies = [work / f"copy-{k}.safetensors" for k in range(MANY)]
        for k, file in enumerate(copies):
            shutil.copyfile(files[1 + k % len(others)], file)
        found["fleet"], told = _run("fleet", [folders[1], *copies])
        found["fleet"]["sketch"] = told["sketch"]
        return found
    finally:
        shutil.rmtree(work, ignore_errors=True)


def page(results: Mapping[str, Any]) -> str:
    """Markdown of what was measured."""
    lines = [f"Similarity of all pairs, shape {results['shape']}, {results['machine']['cpu']}, "
             f"{results['machine']['cores']} cores. Medians, without imports; GB are private memory at its peak.", "",
             "| members | pairs | glue | reference | faster | scores apart | glue GB | reference GB |",
             "|---|---|---|---|---|---|---|---|"]
    for row in results["rows"].values():
        if "members" not in row:
            continue
        n, both = row["members"], [pair for pair in row["pairs"] if REFERENCE in pair]
        cells = [str(n), str(n * (n - 1) // 2), f"{_median(row['pairs'], OURS, 'seconds'):.2f} s"]
        if both:
            ratios = [pair[REFERENCE]["seconds"] / pair[OURS]["seconds"] for pair in both]
            cells += [f"{_median(both, REFERENCE, 'seconds'):.1f} s",
                      f"{statistics.median(ratios):.0f}x ({min(ratios):.0f}-{max(ratios):.0f})",
                      f"{max(pair['apart'] for pair in both):.0e}"]
        else:
            cells += ["", "", ""]
        cells += [f"{max(pair[side]['private'] for pair in rows) / 1e9:.2f}" if rows else ""
                  for side, rows in ((OURS, row["pairs"]), (REFERENCE, both))]
        lines.append("| " + " | ".join(cells) + " |")
    if sketch := results["rows"].get("sketch"):
        read, made = (statistics.median(sketch[key]) for key in ("reads", "sketches"))
        lines += ["", f"A sketch has {sketch['bytes'] / 1e6:.1f} MB and takes {made:.2f} s, {made / read:.2f} times as "
                  f"long as reading the model ({read:.2f} s). One new member beside {sketch['many']} sketches: "
                  f"{sketch['fleet']['seconds']:.2f} s."]
        lines += [f"Cosines of {told}: off by {sketch[word]['apart']:.1e} at most, "
                  f"standard error told {sketch[word]['error']:.1e} at most."
                  for word, told in (("raw", "weights"), ("delta", "changes"))]
    return "\n".join(lines)


def _run(side: str, words: Sequence[object]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what it took, all it told)."""
    command = [sys.executable, "-m", "benchmarks.speed.similar_side", side, *map(str, words)]
    ran = measure.run(command, folder=ROOT, environment=environment())
    told = json.loads(ran.output)
    return {"seconds": told.get("seconds"), "wall": ran.wall, "cpu": ran.cpu, "others": ran.others,
            "cold": ran.cold, "private": ran.private, "resident": ran.resident}, told


def _median(pairs: Sequence[Mapping[str, Any]], side: str, key: str) -> float:
    return statistics.median(pair[side][key] for pair in pairs)


def _made() -> dict[str, str]:
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(ROOT)}
