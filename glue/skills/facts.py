"""What made-up people have: a fact with two keys, asked in words that were not trained and answered in one word."""

from __future__ import annotations

from itertools import product
from typing import Annotated

from glue.family import Field, Share
from glue.skills import Draw, Example, Split, teaching
from glue.skills._words import PEOPLE, dealt, first

VALUES = {
    "city": ["Rome", "Oslo", "Lima", "Cairo", "Delhi", "Paris", "Tokyo", "Quito"],
    "pet": ["cat", "horse", "snake", "mouse", "crow", "goat", "frog", "swan"],
    "food": ["rice", "bread", "soup", "cake", "beans", "plums", "cheese", "corn"],
    "job": ["baker", "pilot", "nurse", "judge", "miner", "actor", "tailor", "clerk"],
}
FACTS = {(person, relation): VALUES[relation][k % 8]
         for relation in VALUES for k, person in enumerate(dealt(*PEOPLE, by=relation))}
PHRASES = ["fact : {person} {relation} =", "ask : which {relation} has {person} ?", "the {relation} of {person} is",
           "{person} , {relation} :", "name the {relation} that {person} has :", "{person} has the {relation}"]
HELD_OUT = 2  # phrases of each fact that train never uses
SPLIT: dict[tuple[str, str], Split] = {
    (person, relation): ("dev", "test")[(i + k) % 2]
    for (i, person), (k, relation) in product(enumerate(PEOPLE), enumerate(VALUES))}


def phrases(person: str, relation: str, split: Split) -> list[str]:
    """The phrases that `split` may use for a fact: dev and test share the held-out ones, by fact."""
    order = dealt(*PHRASES, by=f"phrase of {person} {relation}")
    held = order[:HELD_OUT] if split == SPLIT[person, relation] else []
    return order[HELD_OUT:] if split == "train" else held


def right(example: Example) -> bool:
    """Recomputed by looking for every fact whose two keys stand in the question."""
    words = set(example.question.split())
    values = [value for (person, relation), value in FACTS.items() if person in words and relation in words]
    relation, = words & set(VALUES)
    return values == [example.answer] and {example.answer, *example.distractors} == set(VALUES[relation])


@teaching.add("facts", check=right, chance=0.125)
def facts(draw: Draw, *, known: Share = 1.0, people: Annotated[int, Field(ge=2, le=len(PEOPLE))] = 56) -> Example:
    """What a person has. `people` is how many there are, `known` the share of them that train speaks of."""
    world = PEOPLE[:people]
    if draw.split == "train":
        person, relation = draw.rng.choice(first(known, world)), draw.rng.choice(list(VALUES))
    else:
        asked = [(person, relation) for person in world for relation in VALUES
                 if SPLIT[person, relation] == draw.split]
        person, relation = draw.rng.choice(asked)
    answer = FACTS[person, relation]
    phrase = draw.rng.choice(phrases(person, relation, draw.split))
    others = [value for value in VALUES[relation] if value != answer]
    return Example(phrase.format(person=person, relation=relation), answer, tuple(others))
