"""One side of the similarity benchmark, in a process of its own; prints what it took and found as one line of JSON.

    python -m benchmarks.speed.similar_side ours|reference FOLDER ...      all pairs of these models
    python -m benchmarks.speed.similar_side sketch FOLDER OUT ROUNDS       reading a model's files beside sketching it
    python -m benchmarks.speed.similar_side fleet FOLDER SKETCH ...        one new model against the sketches of others

The reference is the published procedure without its mistakes: for each pair both models are loaded whole in fp32, by
safetensors, and torch takes the cosine of columns of every attention and MLP matrix.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 20  # bytes


def ours(folders: Sequence[str]) -> dict[str, Any]:
    """All scores of all pairs by glue."""
    from glue.checkpoint import Checkpoint
    from glue.cluster.similarity import similarities

    start = time.perf_counter()
    found = similarities([Checkpoint(folder) for folder in folders])
    return {"seconds": time.perf_counter() - start, "cosine": found.cosine["all"].tolist()}


def reference(folders: Sequence[str]) -> dict[str, Any]:
    """The score of all pairs, pair by pair."""
    start = time.perf_counter()
    found = np.eye(len(folders))
    for i, j in combinations(range(len(folders)), 2):
        one, other = _loaded(folders[i]), _loaded(folders[j])
        cosines = [torch.cosine_similarity(one[name], other[name], dim=0).mean()
                   for name in one if "self_attn" in name or "mlp" in name]
        found[i, j] = found[j, i] = torch.stack(cosines).mean()
    return {"seconds": time.perf_counter() - start, "cosine": found.tolist()}


def sketch(folder: str, out: str, rounds: str) -> dict[str, Any]:
    """Seconds of reading all files into one small buffer, and of sketching from them, one after the other."""
    from glue.checkpoint import Checkpoint
    from glue.cluster.sketch import sketch

    reads, sketches = [], []
    for _ in range(int(rounds)):
        start = time.perf_counter()
        for file in sorted(Path(folder).glob("*.safetensors")):
            _read(file)
        middle = time.perf_counter()
        sketch(Checkpoint(folder)).save(Path(out))
        reads.append(middle - start)
        sketches.append(time.perf_counter() - middle)
    return {"reads": reads, "sketches": sketches, "bytes": Path(out).stat().st_size}


def fleet(folder: str, files: Sequence[str]) -> dict[str, Any]:
    """Seconds of sketching a model, and of opening all sketches and comparing it with them."""
    from glue.checkpoint import Checkpoint
    from glue.cluster.sketch import Sketch, compare_one, sketch

    start = time.perf_counter()
    new = sketch(Checkpoint(folder))
    middle = time.perf_counter()
    cosine, error = compare_one(new, [Sketch.load(Path(file)) for file in files])
    return {"seconds": time.perf_counter() - middle, "sketch": middle - start, "cosine": cosine.tolist(),
            "error": error.tolist()}


def _loaded(folder: str) -> dict[str, Tensor]:
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            found |= {name: opened.get_tensor(name).to(torch.float32) for name in opened.keys()}  # noqa: SIM118
    return found


def _read(file: Path) -> None:
    buffer, handle = [bytearray(BLOCK)], os.open(file, os.O_RDONLY)
    try:
        while os.readv(handle, buffer):
            pass
    finally:
        os.close(handle)


def main(what: str, *words: str) -> None:
    """Run one side."""
    if what == "sketch":
        told = sketch(*words)
    elif what == "fleet":
        told = fleet(words[0], words[1:])
    else:
        told = {"ours": ours, "reference": reference}[what](words)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
