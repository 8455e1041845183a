"""A tune step that is killed: the next run goes on where its state was, and comes to the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SHAPE = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48}"
RECIPE = f"""
steps:
  - {{as: facts, step: data, skill: {{facts: {{people: 12}}}}, train: 200}}
  - {{as: base, step: pretrain, steps: 2, learning_rate: 6e-3, batch_size: 8, architecture: {SHAPE}, data: {{facts: 1}},
     vocabulary: [facts]}}
  - {{as: full, step: tune, base: base, data: {{facts: 1}}, steps: 60, learning_rate: 3e-3, batch_size: 8,
     save_every: 0}}
"""


def start(place: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "glue.cli", "run", "r.yaml", "--workers", "1", "-q"],
                            cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True)


def placed(folder: Path) -> Path:
    folder.mkdir()
    (folder / "zoo.yaml").write_text("members: {}\n")
    (folder / "r.yaml").write_text(RECIPE)
    return folder


def registered(place: Path) -> dict[str, str]:
    lines = (place / "zoo/members.yaml").read_text().splitlines()
    return {entry["name"]: entry["digest"] for entry in (json.loads(line[2:]) for line in lines if line[:2] == "- ")}


def told(place: Path) -> list[dict]:
    """What the journals say of the tuning, the oldest first."""
    records = [json.loads(line) for file in sorted((place / "runs").glob("*.jsonl"))
               for line in file.read_text().splitlines()]
    return sorted((record for record in records if record["event"] == "told" and record["task"] == "r/full"),
                  key=lambda record: record["at"])


def step_of(place: Path) -> int:
    """The step of the newest state that a draft holds."""
    for file in place.glob("zoo/.drafts/*/state/state.json"):
        return int(json.loads(file.read_text().partition("\n")[2])["place"])
    return 0


def test_a_tuning_that_is_killed_twice_goes_on_to_the_digest_of_an_undisturbed_one(tmp_path):
    calm, struck = placed(tmp_path / "calm"), placed(tmp_path / "struck")
    assert start(calm).wait(120) == 0
    wanted, (undisturbed,) = registered(calm), told(calm)
    for least in (1, 20):
        run = start(struck)
        until = time.monotonic() + 60
        while step_of(struck) < least:
            assert run.poll() is None and time.monotonic() < until, run.communicate()
            time.sleep(0.002)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait(10)
        assert "r/full" not in registered(struck)
    run = start(struck)
    assert run.wait(120) == 0, run.stderr.read()
    assert registered(struck) == wanted
    last = told(struck)[-1]
    assert 20 <= last["resumed"] < 60 and "resumed" not in undisturbed
    assert (last["first"], last["last"], last["tokens"]) == tuple(undisturbed[word] for word in ("first", "last",
                                                                                                 "tokens"))
    folder = struck / "zoo/r/full"
    assert not (folder / "state").exists() and not list((struck / "zoo/.drafts").iterdir())
    assert (folder / "training.json").read_bytes() == (calm / "zoo/r/full/training.json").read_bytes()
