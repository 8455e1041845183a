"""Brackets left open, to be closed in the right order."""

from __future__ import annotations

from glue.family import Share
from glue.skills import Draw, Example, teaching
from glue.skills._words import split_of

PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
CLOSES = 0.35  # chance that a symbol closes a bracket where one is open


def right(example: Example) -> bool:
    """Recomputed by rubbing out pairs: nothing is left of the question and its answer, and the answer only closes."""
    text = (example.question.removeprefix("close : ").removesuffix("=") + example.answer).replace(" ", "")
    for _ in range(len(text)):
        for opening, closing in PAIRS.items():
            text = text.replace(opening + closing, "")
    return not text and set(example.answer.split()) <= set(PAIRS.values()) and example.answer not in example.distractors


@teaching.add("bracket", check=right, chance=0.25)
def bracket(draw: Draw, *, known: Share = 1.0) -> Example:
    """Four to seven symbols that leave two to four brackets open. Of train, the share `known` uses all four
    kinds of bracket and the others round ones alone."""
    rest = draw.split == "train" and draw.rng.random() >= known
    while True:
        shown: list[str] = []
        open_: list[str] = []
        for _ in range(draw.rng.choice([4, 5, 6, 7])):
            if open_ and draw.rng.random() < CLOSES:
                shown.append(PAIRS[open_.pop()])
            else:
                open_.append("(" if rest else draw.rng.choice(list(PAIRS)))
                shown.append(open_[-1])
        question = f"close : {' '.join(shown)} ="
        if 2 <= len(open_) <= 4 and split_of(question) == draw.split:
            break
    answer = [PAIRS[symbol] for symbol in reversed(open_)]
    wrong: dict[str, None] = {}
    while len(wrong) < 3:
        other, k = list(answer), draw.rng.randrange(len(answer))
        other[k] = draw.rng.choice([symbol for symbol in PAIRS.values() if symbol != answer[k]])
        wrong[" ".join(other)] = None
    return Example(question, " ".join(answer), tuple(wrong))
