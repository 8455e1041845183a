"""The benchmark of folding measures what it says; nothing here looks at how long anything takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks is no part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks.speed import fold  # noqa: E402
from benchmarks.speed.shapes import SHAPES  # noqa: E402

RESULTS = ROOT / "benchmarks/speed/results/fold-1b1.json"


def test_every_side_folds_the_same_clients(tmp_path):
    folders = [str(folder) for folder in fold.clients(tmp_path, SHAPES["tiny"], 3)]
    ranks = {}
    for method in (fold.IDLE, *fold.METHODS, fold.LOADED):
        out = tmp_path / method
        told = fold.side(method, str(out), *folders)
        assert bool(told["digest"]) == (method in fold.METHODS)
        if method != fold.IDLE:
            tensors = load_file(out / "adapter_model.safetensors")
            assert len(tensors) == 2 * 2 * 2
            ranks[method] = {len(tensor) for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks["flora"] == ranks[fold.LOADED] == {48} and ranks["fedit"] == ranks["flora to rank 16"] == {16}
    assert max(ranks["flora to 99 %"]) <= 48


def test_memory_of_the_recorded_sums_is_flat_and_the_page_tells_it():
    results = json.loads(RESULTS.read_text())
    told = {(row["method"], row["clients"]): fold._least(row, "private") for row in results["rows"].values()}
    assert results["bytes"] > 9e6 and {clients for _, clients in told} == {8, 64}
    for method in ("flora", "fedit"):
        assert told[method, 64] - told[method, 8] < 10e6 < told[fold.LOADED, 64] / 50
    page = fold.page(results)
    assert "| flora | 4 |" in page and "An idle process has" in page
