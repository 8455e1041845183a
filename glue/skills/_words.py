"""The made-up words that skills speak of, and how questions are dealt out to the splits."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import product

from glue.skills import Split


def lot(*parts: object) -> int:
    """A number that is fixed for `parts` in every process; the built-in hash of text is not."""
    return int.from_bytes(blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def dealt(*names: str, by: str) -> list[str]:
    """The same names in an order that is fixed for `by`, and has nothing to do with that for another."""
    return sorted(names, key=lambda name: lot(by, name))


def split_of(question: str) -> Split:
    """The one split that a question may stand in: one in ten for dev, one for test, the others train."""
    return {0: "dev", 1: "test"}.get(lot("split", question) % 10, "train")  # type: ignore[return-value]


def first(known: float, words: Sequence[str]) -> list[str]:
    """The leading share of the words, two at least."""
    return list(words[:max(2, round(known * len(words)))])


_SYLLABLES = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
# One order of all words, cut in pieces: no word can stand in two of them.
_WORDS = dealt(*("".join(pair) for pair in product(_SYLLABLES, _SYLLABLES)), by="words")
LEXICON = _WORDS[:20]
PEOPLE = [word.capitalize() for word in _WORDS[20:76]]
THINGS = _WORDS[76:180]
