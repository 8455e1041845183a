"""Skills of the embedded tiny zoo: generators of questions with an answer. One skill a file; the file registers it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from glue.errors import MethodError
from glue.family import Choice, Family

Split = Literal["train", "dev", "test"]
TRIES = 200  # draws for each item that is wanted, before a skill counts as exhausted

teaching = Family("teaching", "skill", "glue.skills", first="Draw -> Example", traits=("check", "chance"))


class Draw(NamedTuple):
    """What a skill makes an example from: where its chance comes from, and the split that the example is for."""

    rng: random.Random
    split: Split


@dataclass(frozen=True)
class Example:
    """A question, its answer, and wrong answers of the same form. A model sees `question + " " + answer`."""

    question: str
    answer: str
    distractors: tuple[str, ...]


def write_dataset(folder: Path, skill: Choice, *, train: int, dev: int, test: int, seed: int,
                  shuffle_answers: bool = False) -> None:
    """Write train.jsonl, dev.jsonl and test.jsonl, one item a line, and dataset.json, which says what they hold.

    A line is {"question", "choices", "gold", "answer"}: the answer is choices[gold]. A split of no items has no file.
    Questions of dev and test are unique; those of train may come again. With `shuffle_answers` the train answers
    change places among the questions, which teaches nonsense in the right form.
    Raises MethodError where a skill has fewer questions than are asked for.
    """
    name, params = skill.method.name, skill.spelled()["params"]
    asked: dict[Split, int] = {"train": train, "dev": dev, "test": test}
    counts = {split: count for split, count in asked.items() if count}
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        rng = random.Random(f"{seed}|{name}|{split}")
        drawn = (skill(Draw(rng, split)) for _ in range(count * TRIES))
        examples = list(islice(drawn if split == "train" else _unique(drawn), count))
        if len(examples) < count:
            raise MethodError(f"skill '{name}' has only about {len(examples)} different questions for {split}, "
                              f"{count} are asked for", fix=f"ask for {split}: {len(examples)} or fewer")
        if split == "train" and shuffle_answers:
            examples = _shuffled(examples, rng)
        lines = [json.dumps(_line(example, rng)) + "\n" for example in examples]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    told = {"skill": name, "version": skill.method.version, "params": params, "seed": seed, "counts": counts,
            "shuffle_answers": shuffle_answers, "chance": skill.method.traits["chance"]}
    (folder / "dataset.json").write_text(json.dumps(told, indent=2) + "\n")


def _unique(examples: Iterable[Example]) -> Iterable[Example]:
    seen: set[str] = set()
    for example in examples:
        if example.question not in seen:
            seen.add(example.question)
            yield example


def _shuffled(examples: list[Example], rng: random.Random) -> list[Example]:
    """Each question with the answer, and the distractors, of another one."""
    others = rng.sample(examples, len(examples))
    return [Example(example.question, other.answer, other.distractors)
            for example, other in zip(examples, others, strict=True)]


def _line(example: Example, rng: random.Random) -> dict[str, object]:
    choices = rng.sample([example.answer, *example.distractors], 1 + len(example.distractors))
    return {"question": example.question, "choices": choices, "gold": choices.index(example.answer),
            "answer": example.answer}
