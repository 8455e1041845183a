"""Two datasets of few words, a suite that asks both, and the zoo that they are in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

WORDS = {"ones": "a", "twos": "b"}


def word_zoo(folder: Path, answers: Callable[[int, str], tuple[str, str]], suite: str, recipe: str) -> Path:
    """Write it all, with the recipe as t.yaml.

    answers  (k, word of the dataset) -> the right answer of its k-th item, and a wrong one
    suite    the tasks of the suite `words`
    """
    for name, word in WORDS.items():
        (folder / name).mkdir()
        for split, count in (("train", 40), ("dev", 8), ("test", 8)):
            (folder / name / f"{split}.jsonl").write_text("".join(
                json.dumps({"question": f"{word} {k % 7} {k % 5} =", "answer": choices[0], "gold": 0,
                            "choices": list(choices)}) + "\n"
                for k, choices in ((k, answers(k, word)) for k in range(count))))
    (folder / "benchmarks/suites").mkdir(parents=True)
    (folder / "benchmarks/suites/words.yaml").write_text(suite)
    (folder / "zoo.yaml").write_text("members:\n  ones: {path: ones, kind: dataset}\n"
                                     "  twos: {path: twos, kind: dataset}\ninclude: zoo/members.yaml\n")
    (folder / "t.yaml").write_text(recipe)
    return folder
