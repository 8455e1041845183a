"""Which of eight classes a made-up thing belongs to: a fact with one key, asked in words that were not trained."""

from __future__ import annotations

from typing import Annotated

from glue.family import Field, Share
from glue.skills import Draw, Example, Split, teaching
from glue.skills._words import THINGS, dealt, first

CLASSES = ["tool", "metal", "fruit", "dance", "stone", "river", "cloth", "spice"]
CLASS = {thing: CLASSES[k % 8] for k, thing in enumerate(dealt(*THINGS, by="class"))}
PHRASES = ["kind : {} =", "what kind is {} ?", "{} is one kind of", "every {} is a", "give the class of {} :",
           "{} , class :", "sort of {} =", "people call {} a"]
HELD_OUT = 4  # phrases of each thing that train never uses
SPLIT: dict[str, Split] = {thing: ("dev", "test")[k % 2] for k, thing in enumerate(THINGS)}


def phrases(thing: str, split: Split) -> list[str]:
    """The phrases that `split` may use for a thing: dev and test share the held-out ones, by thing."""
    order = dealt(*PHRASES, by=f"phrase of {thing}")
    return order[HELD_OUT:] if split == "train" else order[:HELD_OUT] if split == SPLIT[thing] else []


def right(example: Example) -> bool:
    """Recomputed from the side of the class: the only listed thing that the question names is among its things."""
    things = {thing for thing, kind in CLASS.items() if kind == example.answer}
    named = set(example.question.split()) & set(THINGS)
    return len(named) == 1 and named <= things and set(example.distractors) < set(CLASSES) - {example.answer}


@teaching.add("kind", check=right, chance=0.25)
def kind(draw: Draw, *, known: Share = 1.0, things: Annotated[int, Field(ge=2, le=len(THINGS))] = 104) -> Example:
    """The class of a thing. `things` is how many there are, `known` the share of them that train speaks of."""
    world = THINGS[:things]
    if draw.split == "train":
        thing = draw.rng.choice(first(known, world))
    else:
        thing = draw.rng.choice([thing for thing in world if SPLIT[thing] == draw.split])
    answer = CLASS[thing]
    question = draw.rng.choice(phrases(thing, draw.split)).format(thing)
    return Example(question, answer, tuple(draw.rng.sample([word for word in CLASSES if word != answer], 3)))
