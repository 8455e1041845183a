"""Folding client adapters into one: seconds, and private memory against the number of clients.

Beside glue stands the plain way: every client's tensors loaded, then stacked. Each run is a process of its own, with
the files in the page cache; seconds are without imports. `idle` is a process that has imported the same and does
nothing, so that what a fold itself takes can be told from what torch takes.

    python -m benchmarks.speed.fold side METHOD OUT FOLDER ...     one run, as a line of JSON
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.speed import measure, probe
from benchmarks.speed.machine import commit, machine
from benchmarks.speed.pairs import ROOT, environment, recorded
from benchmarks.speed.shapes import SHAPES, Shape
from glue.files import write_aside

RANK, TARGETS = 16, ("self_attn.q_proj", "self_attn.v_proj")
IDLE, LOADED = "idle", "loaded"
METHODS: Mapping[str, dict[str, Any]] = {
    "flora": {}, "fedit": {}, "flora to rank 16": {"rank": 16}, "flora to 99 %": {"energy": 0.99}}


def main(given: argparse.Namespace) -> int:
    """Measure every method for each number of clients, write down each at once, and print the page."""
    shape, sizes = SHAPES[given.shape], sorted(int(word) for word in given.clients.split(","))
    folders = clients(given.folder / f"fold-{given.shape}", shape, max(sizes))
    results = recorded(given.json, {"shape": given.shape, "machine": machine(given.folder),
                                    "bytes": _size(folders[0])})
    for n in sizes:
        probe.read([file for folder in folders[:n] for file in folder.glob("*.safetensors")], threads=2)
        for method in (IDLE, *METHODS, LOADED):
            print(f"{method}, {n} clients ...", file=sys.stderr, flush=True)
            runs = [_run(method, folders[:n], given.folder / "fold-out") for _ in range(given.rounds)]
            results["rows"][f"{method}|{n}"] = {"method": method, "clients": n, "runs": runs, "commit": commit(ROOT),
                                                "date": datetime.now(UTC).isoformat(timespec="seconds")}
            if given.json:
                write_aside(given.json, json.dumps(results, indent=1) + "\n")
    print(page(results))
    return 0


def clients(place: Path, shape: Shape, n: int) -> list[Path]:
    """Adapters of rank 16 on queries and values, whose numbers are random; made where they are not there yet."""
    import torch
    from safetensors.torch import save_file

    found = []
    for k in range(n):
        folder = place / f"client-{k}"
        found.append(folder)
        if (folder / "adapter_config.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rng, tensors = torch.Generator().manual_seed(k), {}
        for name, header in shape.headers().items():
            if name.removesuffix(".weight").endswith(TARGETS):
                m, width = header.shape
                module = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, width, generator=rng) / width**0.5
                tensors[f"{module}.lora_B.weight"] = torch.randn(m, RANK, generator=rng) / 100
        save_file(tensors, folder / "adapter_model.safetensors")
        write_aside(folder / "adapter_config.json", json.dumps({
            "peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM",
            "target_modules": [target.rsplit(".", 1)[-1] for target in TARGETS]}))
    return found


def side(method: str, out: str, *folders: str) -> dict[str, Any]:
    """One fold; seconds, and the digest of what was written."""
    from glue.kinds.lora import Adapter
    from glue.merge import merging
    from glue.merge.adapters import Update, combine

    updates = [Update(Path(folder).name, Adapter(Path(folder))) for folder in folders]
    choice = merging["fedit" if method == "fedit" else "flora"].bind(METHODS.get(method, {}))
    start = time.perf_counter()
    digest = ""
    if method == LOADED:
        _loaded(folders, Path(out))
    elif method != IDLE:
        digest = combine(choice, updates, Path(out), base="base")
    return {"seconds": time.perf_counter() - start, "digest": digest}


def _loaded(folders: Sequence[str], out: Path) -> None:
    """All clients in memory, then stacked."""
    import torch
    from safetensors.torch import load_file, save_file

    held = [load_file(f"{folder}/adapter_model.safetensors") for folder in folders]
    scale = 2.0 / len(held)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.cat([one[name] * scale for one in held]) if "lora_A" in name else
               torch.cat([one[name] for one in held], dim=1).contiguous() for name in held[0]},
              out / "adapter_model.safetensors")


def page(results: Mapping[str, Any]) -> str:
    """Markdown of what was measured."""
    rows = list(results["rows"].values())
    sizes = sorted({row["clients"] for row in rows})
    lines = [f"Clients of rank {RANK} on queries and values, shape {results['shape']}, {results['bytes'] / 1e6:.1f} MB "
             f"each, folded into one adapter; {results['machine']['cpu']}, one thread. Private memory at its peak, "
             "less that of an idle process; the lowest of the runs.", "",
             "| method | " + " | ".join(f"{n} clients: MB | s" for n in sizes) + " |",
             "|---|" + "---|---|" * len(sizes)]
    idle = {row["clients"]: _least(row, "private") for row in rows if row["method"] == IDLE}
    for method in (*METHODS, LOADED):
        cells = []
        for n in sizes:
            row = next((row for row in rows if (row["method"], row["clients"]) == (method, n)), None)
            cells += [f"{(_least(row, 'private') - idle[n]) / 1e6:.0f}", f"{_least(row, 'seconds'):.2f}"] if row else \
                ["", ""]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"An idle process has {min(idle.values()) / 1e6:.0f} MB."])


def _least(row: Mapping[str, Any], key: str) -> float:
    return min(run[key] for run in row["runs"])


def _run(method: str, folders: Sequence[Path], out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.speed.fold", "side", method, str(out), *map(str, folders)]
    try:
        ran = measure.run(command, folder=ROOT, environment={**environment(), "OMP_NUM_THREADS": "1"})
    finally:
        shutil.rmtree(out, ignore_errors=True)
    told = json.loads(ran.output)
    return {"seconds": told["seconds"], "digest": told["digest"], "wall": ran.wall, "cpu": ran.cpu,
            "others": ran.others, "private": ran.private, "resident": ran.resident}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    print(json.dumps(side(*sys.argv[2:])))
