"""The benchmark of mixtures asks both sides the same and tells what it measured; nothing here looks at how long."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks is no part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks.speed import mixture_side  # noqa: E402
from benchmarks.speed.mixtures import LEVELS, asked, furnished, page, prompts, timed  # noqa: E402
from benchmarks.speed.shapes import SHAPES, made  # noqa: E402
from glue.checkpoint import Checkpoint  # noqa: E402
from glue.kinds import load  # noqa: E402
from glue.member import Member  # noqa: E402

TINY = SHAPES["tiny"]
GIVEN = Namespace(shape="tiny", prompt=12, new=3, rounds=2, dtype="float32", experts=2)


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return furnished(made(folder, TINY, 2), folder / "mixtures", TINY)


def test_texts_of_the_tokenizer_are_the_tokens_of_the_prompts(places):
    rows = prompts(TINY, 4, 9)
    tokenizer = load(Member("m0", "model", str(places[1]))).tokenizer
    assert [tokenizer(" ".join(f"w{token}" for token in row))["input_ids"] for row in rows.tolist()] == rows.tolist()


@pytest.mark.parametrize("row", LEVELS)
def test_every_level_is_built_and_asked_beside_its_peer(places, tmp_path, capsys, row):
    folders = [str(place) for place in places]
    mixture_side.main("nothing", row, "12", str(tmp_path / "out"), *folders)
    mixture_side.main("taught", row, "12", str(tmp_path / "out"), *folders)
    nothing, told = map(json.loads, capsys.readouterr().out.splitlines())
    assert nothing["bytes"] == 0 and told["bytes"] > Checkpoint(tmp_path / "out").nbytes > 0
    one, eight = timed(row, places, tmp_path / "out", GIVEN)
    assert (one[0], eight[0]) == (f"{row}, batch 1", f"{row}, batch 8")
    for _, found in (one, eight):
        assert len(found["rounds"]) == 2
        assert all(speed > 0 for each in found["rounds"] for side in each.values() for speed in side.values())
    assert set(eight[1]["rounds"][0]) - set(one[1]["rounds"][0]) == (set() if row == "ffn" else {"peer in parts"})
    if row == "ffn":
        assert eight[1]["routes"] is None
    else:
        decisions = eight[1]["routes"]
        assert sum(decisions) == 8 * (1 if row == "model" else TINY.layers) and min(decisions) == max(decisions)


def test_what_is_written_with_the_cache_is_what_the_model_writes_without(places):
    model = load(Member("m0", "model", str(places[1]))).model
    ids, seen = prompts(TINY, 2, 7), []
    whole = model.forward

    def listening(**given):
        seen.append(given["input_ids"])
        return whole(**given)

    model.forward = listening
    speeds = asked(model, ids, 4)
    model.forward = whole
    text = ids
    with torch.no_grad():
        for token in seen[1:]:
            assert torch.equal(token, model(text).logits[:, -1].argmax(-1, keepdim=True))
            text = torch.cat([text, token], 1)
    assert len(seen) == 5 and set(speeds) == {"prefill", "decode"}


def test_the_page_tells_ratios_by_rounds_and_what_was_missed():
    def row(level: str, ours: float, peer: float) -> dict:
        rounds = [{"ours": {"prefill": ours * k, "decode": ours * k}, "peer": {"prefill": peer * k, "decode": peer * k}}
                  for k in (1, 2, 3)]
        if level == "model":
            rounds = [one | {"peer in parts": {"prefill": peer * k / 2, "decode": peer * k / 2}}
                      for k, one in enumerate(rounds, 1)]
        return {"level": level, "batch": 8, "rounds": rounds, "routes": [3, 5] if level == "model" else None}

    told = {"private": 700e6, "empty": 3e8, "resident": 2e9, "largest": 131e6, "bytes": 6.6e9, "seconds": 12.0}
    results = {"shape": "160m", "experts": 2, "dtype": "auto", "prompt": 128, "new": 32, "threads": 4,
               "machine": {"cpu": "a processor", "cores": 4},
               "rows": {"model, batch 8": row("model", 90, 100), "ffn, batch 8": row("ffn", 90, 100),
                        "build model": told}}
    text = page(results)
    speed = "180 / 200 | 0.90 (0.90-0.90)"
    assert f"| **model, batch 8** | 3 + 5 | {speed} | {speed} | 0.8 | 1.80, 1.80 | 3 |" in text
    assert "| **ffn, batch 8** | by token |" in text and "| 1 missed | - | 3 |" in text
    assert "| **build model** | 6.60 | 12.0 | 700 | 300 | 631 missed | 2000 |" in text
