"""Letters reversed, sorted, or moved round by one: a skill that is a procedure, not a memory."""

from __future__ import annotations

from glue.family import Share
from glue.skills import Draw, Example, teaching
from glue.skills._words import split_of

LETTERS = "abcdefghijkl"


def right(example: Example) -> bool:
    """Recomputed from what an operation leaves: places mirrored, neighbours in order, the first behind the last."""
    operation, _, *letters, _ = example.question.split()
    answer, n = example.answer.split(), len(letters)
    told = {"rev": all(answer[k] == letters[n - 1 - k] for k in range(n)),
            "sort": all(a < b for a, b in zip(answer, answer[1:], strict=False)),
            "rot": [answer[-1], *answer[:-1]] == letters}[operation]
    return told and set(answer) == set(letters) and example.answer not in example.distractors


@teaching.add("strings", check=right, chance=0.25)
def strings(draw: Draw, *, known: Share = 1.0) -> Example:
    """Four or five letters and what to do with them. Of train, the share `known` asks for any operation and the
    others for `rev` alone."""
    rest = draw.split == "train" and draw.rng.random() >= known
    operation = "rev" if rest else draw.rng.choice(["rev", "sort", "rot"])
    while True:
        letters = draw.rng.sample(LETTERS, draw.rng.choice([4, 5]))
        question = f"{operation} : {' '.join(letters)} ="
        if split_of(question) == draw.split:
            break
    answer = {"rev": letters[::-1], "sort": sorted(letters), "rot": letters[1:] + letters[:1]}[operation]
    wrong: dict[str, None] = {}
    while len(wrong) < 3:
        other = list(answer)
        for _ in range(draw.rng.choice([1, 2])):
            k = draw.rng.randrange(len(other) - 1)
            other[k], other[k + 1] = other[k + 1], other[k]
        if other != answer:
            wrong[" ".join(other)] = None
    return Example(question, " ".join(answer), tuple(wrong))
