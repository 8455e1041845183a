"""The benchmark of similarity compares what it says; nothing here looks at how long anything takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks is no part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks.speed import similar_side  # noqa: E402
from benchmarks.speed.shapes import SHAPES, made  # noqa: E402
from benchmarks.speed.similar import page  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    return [str(place) for place in made(tmp_path_factory.mktemp("tiny"), SHAPES["tiny"], 3).values()]


def test_both_sides_find_the_same_scores(folders):
    ours, reference = (np.array(side(folders)["cosine"]) for side in (similar_side.ours, similar_side.reference))
    assert np.abs(ours - reference).max() < 1e-6 and 0.9 < ours.min() < ours[0, 1] < 1


def test_sketching_and_comparing_leave_what_the_page_tells(folders, tmp_path, capsys):
    files = [str(tmp_path / f"{k}.safetensors") for k in range(4)]
    for folder, file in zip(folders, files, strict=True):
        similar_side.main("sketch", folder, file, "2")
    told = json.loads(capsys.readouterr().out.splitlines()[0])
    assert len(told["reads"]) == len(told["sketches"]) == 2 and told["bytes"] == Path(files[0]).stat().st_size
    fleet = similar_side.fleet(folders[1], files)
    exact = np.array(similar_side.ours(folders)["cosine"])
    assert np.abs(np.array(fleet["cosine"]) - exact[1]).max() < 1e-6 and max(fleet["error"]) == 0

    run = {"seconds": 2.0, "private": 1.5e9}
    row = {"members": 8, "pairs": [{"ours": {**run, "seconds": 0.5}, "reference": run, "apart": 2e-7}] * 3}
    wide = {"apart": 1e-4, "error": 2e-4, "within": 1.0}
    text = page({"shape": "160m", "machine": {"cpu": "a processor", "cores": 4},
                 "rows": {"8": row, "sketch": {**told, "reads": [1.0], "sketches": [1.2], "many": 500, "raw": wide,
                                               "delta": wide, "fleet": {"seconds": 1.0}}}})
    assert "| 8 | 28 | 0.50 s | 2.0 s | 4x (4-4) | 2e-07 | 1.50 | 1.50 |" in text and "1.20 times as long" in text
