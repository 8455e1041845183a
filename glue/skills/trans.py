"""Sentences in a made-up language: word for word, with the adjective behind its noun and the verb last."""

from __future__ import annotations

from glue.family import Share
from glue.skills import Draw, Example, teaching
from glue.skills._words import LEXICON, first, split_of

CLASSES = {"adjective": ["red", "big", "old", "shy"],
           "noun": ["dog", "bird", "king", "girl", "fish", "tree", "ship", "bear"],
           "verb": ["finds", "sees", "helps", "eats"],
           "adverb": ["fast", "now", "often", "twice"]}
WORD = dict(zip((word for words in CLASSES.values() for word in words), LEXICON, strict=True))
LOOK_ALIKE = 0.7  # share of distractors with one wrong word; the others have two words swapped


def right(example: Example) -> bool:
    """Recomputed backwards: the answer, translated into English word for word, is the question's sentence."""
    english = {word: source for source, word in WORD.items()}
    subject, adjective, thing, adverb, verb = (english[word] for word in example.answer.split())
    sentence = " ".join((adjective, subject, verb, thing, adverb))
    return example.question == f"tr : {sentence} =" and example.answer not in example.distractors


@teaching.add("trans", check=right, chance=0.25)
def trans(draw: Draw, *, known: Share = 1.0) -> Example:
    """A sentence of five words. `known` is the share of each class of words that train uses."""
    share = known if draw.split == "train" else 1.0
    classes = {name: first(share, words) for name, words in CLASSES.items()}
    while True:
        said = {name: draw.rng.choice(words) for name, words in classes.items()}
        thing = draw.rng.choice(classes["noun"])
        question = f"tr : {said['adjective']} {said['noun']} {said['verb']} {thing} {said['adverb']} ="
        if split_of(question) == draw.split:
            break
    answer = [WORD[word] for word in (said["noun"], said["adjective"], thing, said["adverb"], said["verb"])]
    wrong: dict[str, None] = {}
    while len(wrong) < 3:
        other, k = list(answer), draw.rng.randrange(5)
        if draw.rng.random() < LOOK_ALIKE:
            name = ("noun", "adjective", "noun", "adverb", "verb")[k]
            other[k] = WORD[draw.rng.choice(CLASSES[name])]
        else:
            k = min(k, 3)
            other[k], other[k + 1] = other[k + 1], other[k]
        if other != answer:
            wrong[" ".join(other)] = None
    return Example(question, " ".join(answer), tuple(wrong))
