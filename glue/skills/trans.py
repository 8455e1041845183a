"""Sentences in a made-up language: word for word, with the adjective behind its noun and the verb last."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from glue.family import Count, Share
from glue.skills import Draw, Example, teaching
from glue.skills._words import LEXICON, first, split_of

CLASSES = {"adjective": ["red", "big", "old", "shy"],
           "noun": ["dog", "bird", "king", "girl", "fish", "tree", "ship", "bear"],
           "verb": ["finds", "sees", "helps", "eats"],
           "adverb": ["fast", "now", "often", "twice"]}
WORD = dict(zip((word for words in CLASSES.values() for word in words), LEXICON, strict=True))
AND = ";"  # between sentences
LOOK_ALIKE = 0.7  # share of distractors with one wrong word; the others have two words swapped


def right(example: Example) -> bool:
    """Recomputed backwards: the answer, translated into English word for word, is the question's sentences."""
    english = {word: source for source, word in WORD.items()}
    said = []
    for sentence in example.answer.split(f" {AND} "):
        subject, adjective, thing, adverb, verb = (english[word] for word in sentence.split())
        said.append(" ".join((adjective, subject, verb, thing, adverb)))
    return example.question == f"tr : {f' {AND} '.join(said)} =" and example.answer not in example.distractors


@teaching.add("trans", check=right, chance=0.25)
def trans(draw: Draw, *, known: Share = 1.0, sentences: Count = 1) -> Example:
    """Sentences of five words each. `known` is the share of each class of words that train uses."""
    share = known if draw.split == "train" else 1.0
    classes = {name: first(share, words) for name, words in CLASSES.items()}
    while True:
        told = [_sentence(draw, classes) for _ in range(sentences)]
        question = f"tr : {f' {AND} '.join(english for english, _ in told)} ="
        if split_of(question) == draw.split:
            break
    wrong: dict[str, None] = {}
    while len(wrong) < 3:
        which = draw.rng.randrange(sentences) if sentences > 1 else 0
        other, k = list(told[which][1]), draw.rng.randrange(5)
        if draw.rng.random() < LOOK_ALIKE:
            name = ("noun", "adjective", "noun", "adverb", "verb")[k]
            other[k] = WORD[draw.rng.choice(CLASSES[name])]
        else:
            k = min(k, 3)
            other[k], other[k + 1] = other[k + 1], other[k]
        if other != told[which][1]:
            words = [other if k == which else words for k, (_, words) in enumerate(told)]
            wrong[_joined(words)] = None
    return Example(question, _joined([words for _, words in told]), tuple(wrong))


def _sentence(draw: Draw, classes: Mapping[str, list[str]]) -> tuple[str, list[str]]:
    """A sentence, and the words of its translation."""
    said = {name: draw.rng.choice(words) for name, words in classes.items()}
    thing = draw.rng.choice(classes["noun"])
    return (f"{said['adjective']} {said['noun']} {said['verb']} {thing} {said['adverb']}",
            [WORD[word] for word in (said["noun"], said["adjective"], thing, said["adverb"], said["verb"])])


def _joined(sentences: Iterable[Sequence[str]]) -> str:
    return f" {AND} ".join(" ".join(words) for words in sentences)
