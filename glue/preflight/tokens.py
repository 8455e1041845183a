"""Tokens: how long the texts are that a task trains on or asks, as the tokenizer of its model counts them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from glue.errors import GlueError
from glue.kinds.frame import tokenizer_of
from glue.member import Member
from glue.plan import Task
from glue.steps import Measured

SAMPLE = 64  # texts that are cut into tokens: the longest, and as many of all


@dataclass(frozen=True)
class Tokens:
    """Of some texts.

    texts    that are read       mean  tokens of one, about
    longest  tokens of the longest, about
    """

    texts: int
    mean: float
    longest: int


def trained(task: Task, model: Member) -> Tokens | None:
    """What a task trains on; None where that is not in train.jsonl of datasets that are here, or is not known yet."""
    data = task.arguments.get("data")
    if not isinstance(data, dict):
        return None
    return _counted((text for member in data for text in _lines(Path(member.path) / "train.jsonl")), model)


def asked(task: Task, model: Member) -> Tokens | None:
    """What a task asks: every question with each of its answers, of datasets that are here; None where there is none.
    """
    suite = task.arguments.get("suite")
    if not isinstance(suite, Measured) or not suite.suite.tasks:
        return None
    try:
        items = [item for some in suite.items().values() for item in some]
    except (GlueError, OSError):
        return None
    texts = [[f"{item.question} {ending}" for ending in item.choices or (item.answer,)] for item in items]
    found = _counted((text for some in texts for text in some), model)
    if found is None:
        return None
    # what differs in its last token only is read once
    ids = [tuple(one[:-1]) for some in texts[:SAMPLE] for one in tokenizer_of(model)(some)["input_ids"]]
    return replace(found, texts=max(1, round(found.texts * len(set(ids)) / len(ids))))


def _lines(file: Path) -> Iterable[str]:
    try:
        for line in file.read_text(encoding="utf-8").split("\n"):
            if line:
                told = json.loads(line)
                yield f"{told['question']} {told['answer']}"
    except (OSError, ValueError, KeyError, TypeError):
        return


def _counted(texts: Iterable[str], model: Member) -> Tokens | None:
    """Lengths by a sample: those with the most characters, and some of all."""
    known = sorted(texts, key=len)
    if not known:
        return None
    try:
        tokenizer = tokenizer_of(model)
    except GlueError:
        return None

    def lengths(some: Sequence[str]) -> list[int]:
        return [len(ids) + 1 for ids in tokenizer(list(some))["input_ids"]]  # and the end of the text

    middle = known[::max(1, len(known) // SAMPLE)]
    return Tokens(len(known), sum(lengths(middle)) / len(middle), max(lengths(known[-SAMPLE:])))
