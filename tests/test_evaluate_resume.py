"""An evaluation that is killed goes on after its last batch, and ends in the same scores."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glue.evaluate.answered import Answered

MEASURED = """
import os
import signal
import sys
from pathlib import Path

from lm_eval.models.huggingface import HFLM

from glue.evaluate.suite import parse, read_suite
from glue.member import Member
from glue.steps import Job, Measured
from glue.steps.evaluate import evaluate
from glue.workers import Workers

left = int(sys.argv[1])

def counted(inner):
    def call(self, tokens, *more, **named):
        global left
        with open("asked", "a") as file:
            print(len(tokens), file=file)
        answers = inner(self, tokens, *more, **named)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)  # the answers are there, and not written down yet
        return answers
    return call

HFLM._model_call = counted(HFLM._model_call)
generate = counted(lambda self, context, **named: drawn(self, context=context, **named))
drawn, HFLM._model_generate = HFLM._model_generate, lambda self, context, **named: generate(self, context, **named)

here = Path.cwd()
members = [Member(name, "model", str(here.parent / name), digest=name * 8) for name in ("m0", "m1")]
data = Member("asked", "dataset", str(here.parent / "data"), digest="d" * 32)
job = Job("scores", here / "table", 0, Workers(0), here / "zoo")
job.folder.mkdir(exist_ok=True)
evaluate(job, members=members, suite=Measured(read_suite(here.parent / "own.yaml"), "test", {"asked": data}))
"""
SUITE = """tasks:
  chosen:  {data: asked, output: choice, metric: acc, chance: 0.3}
  written: {data: asked, output: generate, metric: exact_match, chance: 0.0, max_tokens: 3}
"""
BATCH = 64


@pytest.fixture
def place(tiny, tmp_path):
    """place("here") is a folder beside two models, a suite of two tasks, and 150 questions of several lengths."""
    for k in range(2):
        tiny(f"m{k}", seed=k)
    rng, lines = random.Random(0), []
    for k in range(150):
        choices = [" ".join(f"w{n}" for n in rng.sample(range(3, 40), size)) for size in (1, 2, 3)]
        question = " ".join(f"w{n}" for n in [3 + k % 37, 3 + k // 37, *rng.sample(range(3, 40), rng.randrange(1, 9))])
        lines.append({"question": question, "choices": choices, "gold": k % 3, "answer": choices[k % 3]})
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "own.yaml").write_text(SUITE)
    (tmp_path / "measured.py").write_text(MEASURED)

    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    return make


def measured(folder: Path, killed_at: int = 0) -> int:
    """Run the evaluation in a process of its own; its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HOME": str(folder.parent / "home")}
    ran = subprocess.run([sys.executable, "../measured.py", str(killed_at)], cwd=folder, env=environment, timeout=300,
                         capture_output=True, text=True)
    assert ran.returncode in (0, -signal.SIGKILL), ran.stderr[-2000:]
    return ran.returncode


def asked(folder: Path) -> list[int]:
    """How many rows each call of the model had."""
    return list(map(int, (folder / "asked").read_text().split()))


def test_an_evaluation_that_is_killed_repeats_at_most_one_batch_and_scores_the_same(place):
    calm, struck = place("calm"), place("struck")
    assert measured(calm) == 0
    calls = asked(calm)
    assert len(calls) > 10 and max(calls) == BATCH
    first = random.randrange(1, len(calls) // 2)
    second = random.randrange(2, len(calls) - first)  # so many calls after the first kill
    assert measured(struck, first) == measured(struck, second) == -signal.SIGKILL
    assert (struck / "zoo/answered").is_dir()
    (struck / "zoo/answered/.left.jsonl.lock").touch()  # by a run that was killed before it wrote a line
    assert measured(struck) == 0
    assert len(asked(struck)) <= len(calls) + 2 and sum(asked(struck)) <= sum(calls) + 2 * BATCH, (first, second)
    for file in ("zoo/scores.jsonl", "table/scores.jsonl"):
        assert (struck / file).read_bytes() == (calm / file).read_bytes(), f"killed at {first} and {second}"
    assert not (struck / "zoo/answered").exists(), "a journal ends with its member, and its lock with it"


def test_a_batch_is_known_by_all_its_requests_and_by_who_answers(tmp_path):
    journal, calls = tmp_path / "a.jsonl", []

    def ask(batch):
        calls.append(batch)
        return [k * 0.1 for k in batch]

    for how, requests, batches, times in [
            ("m", "abc", [[2, 0], [1]], 2), ("m", "abc", [[2, 0], [1]], 0), ("m", "abd", [[2, 0], [1]], 1),
            ("m", "abc", [[0, 2], [1]], 1), ("other", "abc", [[2, 0], [1]], 2)]:
        calls.clear()
        told = Answered(journal).each([how], list(requests), lambda places, halved, cut=batches: cut, ask)
        assert told == [0.0, 0.1, 0.2]
        assert len(calls) == times
    with open(journal, "a") as torn:
        torn.write('{"batch": "ha')
    calls.clear()
    Answered(journal).each(["m"], list("xyz"), lambda places, halved: [[0, 1, 2]], ask)
    Answered(journal).each(["m"], list("xyz"), lambda places, halved: [[0, 1, 2]], ask)
    assert len(calls) == 1, "a torn line is no answer, and hides none"


def test_of_two_who_wrote_one_journal_the_first_counts_and_what_is_torn_in_its_middle_does_not(tmp_path):
    """As when a worker is cut off, does not know it, and writes on beside the one that does its work."""
    journal = tmp_path / "a.jsonl"

    def told(answer: float) -> list[float]:
        return Answered(journal).each(["m"], ["x"], lambda places, halved: [[0]], lambda batch: [answer])

    assert told(0.25) == [0.25]
    line = journal.read_text()
    journal.write_text(line[:20] + "\n" + line + line.replace("0.25", "0.75"))
    assert told(0.5) == [0.25]
