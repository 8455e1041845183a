"""A pair of models as large as they are: what each step takes, beside what the plan has said that it would take.

Every run is a process of its own with its workers, as anybody would start it. Before it the models are let go from the
page cache, so that what it reads comes from the disk and can be counted; what it makes is removed again. Memory is
anonymous memory of all its processes together, what they share counted once. To look at that holds a run up, so that
its seconds are more than anybody else would wait.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.speed import measure
from benchmarks.speed.machine import commit, machine
from benchmarks.speed.mixtures import furnished
from benchmarks.speed.pairs import ROOT, environment, recorded
from benchmarks.speed.shapes import SHAPES, made
from glue.errors import GlueError, did_you_mean
from glue.files import write_aside

MOST = 2e9  # bytes of private memory that any of these may take
RANK = 16
TARGETS = [f"{k}.{layer}" for k in range(3) for layer in ("self_attn.q_proj", "mlp.down_proj")]  # small and large ones
PLAN = "plan"
LINES: Mapping[str, str] = {
    "similarity": "step: cluster, members: [base, tuned], threshold: 0.9",
    "sketch": "step: cluster, members: [base, tuned], threshold: 0.9, sketch: true",
    "linear": "step: merge, members: [base, tuned], method: linear",
    "ties": "step: merge, members: [tuned], base: base, method: {ties: {density: 0.2}}",
    "extract": f"step: extract, model: tuned, base: base, rank: {RANK}, targets: [TARGETS]"}
MORE: Mapping[str, str] = {  # what holds whole models in fp32, which one of 7 billion numbers has no room for here
    "evaluate": "step: evaluate, members: [base], suite: own.yaml:test",
    "lora": "step: lora, base: base, data: {texts: 1}, steps: 3, learning_rate: 1.0e-4, batch_size: 16, rank: 16, "
            "targets: [q_proj, v_proj]",
    "tune": "step: tune, base: base, data: {texts: 1}, steps: 3, learning_rate: 1.0e-4, batch_size: 16"}
LENGTH = 120  # words of a text
WORDS: Mapping[str, tuple[str, ...]] = {"zoo atlas": ("zoo", "atlas"), "zoo near": ("zoo", "near", "tuned")}
NAMES = (PLAN, *LINES, *MORE, *WORDS)


def main(given: argparse.Namespace) -> int:
    """Measure every row, write down each at once, and print the page; 1 where one takes more than it may."""
    shape = SHAPES[given.shape]
    names = [word.strip() for word in given.rows.split(",")] if given.rows else \
        [name for name in NAMES if name not in MORE or shape.nbytes < MOST]
    for name in names:
        if name not in NAMES:
            raise GlueError(f"there is no row '{name}'{did_you_mean(name, NAMES)}")
    folder = given.folder / given.shape
    originals = made(folder, shape, 1, outputs=1)
    shutil.rmtree(folder / "size" / "models", ignore_errors=True)
    places = dict(zip(originals, furnished(originals, folder / "size" / "models", shape), strict=True))
    results = recorded(given.json, {"measures": "size", "shape": given.shape, "bytes": shape.nbytes,
                                   "machine": machine(folder)})
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        runs = [row(name, folder / "size", places, shape.layers) for _ in range(given.rounds)]
        # a peak of a moment is easily missed: of several runs the one that was seen to take the most
        results["rows"][name] = {**max(runs, key=lambda run: run["private"]), "seen": [run["private"] for run in runs]}
        if given.json:
            write_aside(given.json, json.dumps(results, indent=1) + "\n")
    print(page(results))
    return int(any(run["private"] > MOST for name, run in results["rows"].items() if name not in MORE))


def row(name: str, place: Path, places: Mapping[str, Path], layers: int) -> dict[str, Any]:
    """One run in a zoo of its own; the digests of the models are known from the last plan, unless this is one."""
    lines = {known: line.replace("TARGETS", ", ".join(TARGETS[:2 * layers])) for known, line in LINES.items()}
    os.makedirs(place, exist_ok=True)
    zoo = place / "zoo.yaml"
    zoo.write_text(f"members:\n  base: {{path: {places['base']}}}\n  tuned: {{path: {places['m0']}, base: base}}\n"
                   "  texts: {path: texts, kind: dataset}\n")
    _texts(place)
    for known, line in {**lines, **MORE}.items():
        (place / f"{known}.yaml").write_text(f"steps:\n  - {{as: {known}, {line}}}\n")
    (place / f"{PLAN}.yaml").write_text(
        "steps:\n" + "".join(f"  - {{as: {known}, {line}}}\n" for known, line in lines.items()))
    digests = place / "zoo" / "digests.json"
    if name == PLAN:
        shutil.rmtree(place / "zoo", ignore_errors=True)
    told = {} if name == PLAN or name in WORDS else _planned(name, place)
    for folder in [place / "runs", *(each for each in digests.parent.glob("*") if each.is_dir())]:
        shutil.rmtree(folder, ignore_errors=True)
    for file in ("members.yaml", "scores.jsonl"):
        (place / "zoo" / file).unlink(missing_ok=True)
    _let_go(places)
    words = [*(WORDS.get(name) or (PLAN if name == PLAN else "run", str(place / f"{name}.yaml"))), "--zoo", str(zoo)]
    try:
        ran = measure.run([sys.executable, "-m", "glue.cli", *words, *([] if name == PLAN else ["--quiet"])],
                          folder=place, environment=environment(), closely=True)
        made_bytes = sum(file.stat().st_size for file in (place / "zoo" / "once").rglob("*.safetensors"))
        made_bytes += sum(file.stat().st_size for folder in digests.parent.glob(f"{name}/*-*")
                          for file in folder.rglob("*.safetensors"))
    finally:
        for folder in digests.parent.glob("*"):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
    return {**{key: value for key, value in asdict(ran).items() if key != "output"}, "products": made_bytes,
            "told": told, "commit": commit(ROOT), "date": datetime.now(UTC).isoformat(timespec="seconds")}


def _texts(place: Path) -> None:
    """A dataset of texts that are all equally long, and a suite that asks it."""
    (place / "texts").mkdir(exist_ok=True)
    lines = [json.dumps({"question": " ".join(f"w{3 + (7 * k + j) % 200}" for j in range(LENGTH)), "answer": "w3",
                         "choices": [f"w{3 + j}" for j in range(4)], "gold": 0}) for k in range(64)]
    for split in ("train", "dev", "test"):
        (place / "texts" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (place / "own.yaml").write_text("tasks:\n  next: {data: texts, output: choice, metric: acc, chance: 0.25}\n")


def _planned(name: str, place: Path) -> dict[str, Any]:
    """What `glue plan` says of one recipe."""
    words = [sys.executable, "-m", "glue.cli", "plan", str(place / f"{name}.yaml"), "--zoo", str(place / "zoo.yaml"),
             "--json"]
    ran = measure.run(words, folder=place, environment=environment())
    told = json.loads(ran.output)
    return next(task for task in (told["tasks"] if isinstance(told, dict) else told) if task["name"].endswith(name))


def _let_go(places: Mapping[str, Path]) -> None:
    """Bring what waits to be written to the disk, and the models out of the page cache."""
    os.sync()
    for folder in places.values():
        for file in folder.glob("*.safetensors"):
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def page(results: Mapping[str, Any]) -> str:
    """Markdown of what was measured."""
    lines = ["| | private memory, GB | planned | off | from the disk, GB | written, GB | planned | off | s | planned |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for name in NAMES:
        if found := results["rows"].get(name):
            told = found["told"]
            lines.append("| " + " | ".join([
                f"**{name}**", f"{found['private'] / 1e9:.2f}", *_beside(found["private"], told.get("bytes_peak"), 0),
                f"{found['read'] / 1e9:.1f}", f"{found['products'] / 1e9:.3f}" if found["products"] else "-",
                *_beside(found["products"], told.get("bytes_written"), 2), f"{found['wall']:.0f}",
                "-".join(f"{value:.0f}" for value in told.get("seconds") or ()) or "-"]) + " |")
    made, rows = results["machine"], results["rows"].values()
    days, commits = (sorted({row[key][:10] for row in rows}) for key in ("date", "commit"))
    busy = sum(row["others"] for row in rows) / len(rows)
    more = {"extract": f" extract: rank {RANK} of {len(TARGETS)} layers, small and large ones.",
            "tune": f" evaluate, lora, tune: 64 texts of {LENGTH} tokens, 64 or 16 at once."}
    return "\n".join([*lines, "", (
        f"Two models of shape {results['shape']}, {results['bytes'] / 1e9:.2f} GB each in bf16, random numbers; "
        f"{made['cpu']}, {made['cores']} cores, {made['ram'] / 2**30:.0f} GiB, {made['files']}, Linux "
        f"{made['kernel']}; Python {made['python']}, torch {made['versions']['torch']}; {', '.join(days)}, commit "
        f"{', '.join(commits)}. Four workers, the models out of the page cache before each run; other work kept "
        f"{busy:.1f} cores busy." + "".join(text for name, text in more.items() if name in results["rows"]))])


def _beside(real: int, said: int | None, digits: int) -> tuple[str, str]:
    """What a plan has said, in GB, and how far off that was."""
    if not said or not real:
        return "-", "-"
    return f"{said / 1e9:.{3 if digits else 2}f}", f"{said / real - 1:+.{digits}%}"
