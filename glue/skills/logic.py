"""Chains of T, F, `and` and `or`, read from left to right without precedence."""

from __future__ import annotations

from glue.family import Share
from glue.skills import Draw, Example, teaching
from glue.skills._words import split_of


def right(example: Example) -> bool:
    """Recomputed from the end: the last `and F` or `or T` decides, and where there is none the first value does."""
    terms = example.question.removeprefix("logic : ").removesuffix(" =").split()
    answer = terms[0]
    for k in range(len(terms) - 2, 0, -2):
        if (terms[k], terms[k + 1]) in {("and", "F"), ("or", "T")}:
            answer = terms[k + 1]
            break
    return answer == example.answer and {answer, *example.distractors} == {"T", "F"}


@teaching.add("logic", check=right, chance=0.5)
def logic(draw: Draw, *, known: Share = 1.0) -> Example:
    """Four to six values in a chain, true as often as false. Of train, the share `known` has chains of any length
    and the others have four values."""
    rest = draw.split == "train" and draw.rng.random() >= known
    wanted = draw.rng.choice("TF")
    while True:
        value = draw.rng.choice("TF")
        terms = [value]
        for _ in range(3 if rest else draw.rng.choice([3, 4, 5])):
            join, term = draw.rng.choice(["and", "or"]), draw.rng.choice("TF")
            value = min(value, term) if join == "and" else max(value, term)  # "F" < "T"
            terms += [join, term]
        question = f"logic : {' '.join(terms)} ="
        if value == wanted and split_of(question) == draw.split:
            return Example(question, value, ("F" if value == "T" else "T",))
