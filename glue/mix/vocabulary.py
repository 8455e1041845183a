"""Vocabulary: experts that answer one prompt have to read the same tokens in it."""

from __future__ import annotations

import filecmp
from collections.abc import Sequence

from glue.errors import MethodError
from glue.hub import locate
from glue.kinds.frame import config_of, framed, tokenizer_of
from glue.member import Member


def check(experts: Sequence[Member]) -> None:
    """Raise MethodError unless all experts have one vocabulary, token by token."""
    first, vocabulary = experts[0], None
    rows = config_of(first).vocab_size
    for expert in experts[1:]:
        if config_of(expert).vocab_size == rows and _same_file(first, expert):
            continue
        vocabulary = vocabulary or tokenizer_of(first).get_vocab()
        other = tokenizer_of(expert).get_vocab()
        if other != vocabulary or config_of(expert).vocab_size != rows:
            odd = sorted(set(vocabulary.items()) ^ set(other.items()), key=lambda item: (item[1], item[0]))
            said = f", e.g. {odd[0][0]!r} is token {odd[0][1]} of one of them" if odd else ""
            raise MethodError(f"'{first.name}' and '{expert.name}' have different vocabularies ({rows} and "
                              f"{config_of(expert).vocab_size} rows{said}), so one text is different tokens to them",
                              fix="mix members of one tokenizer, or use level: text")


def _same_file(one: Member, other: Member) -> bool:
    """Whether both have byte for byte the same tokenizer, which spares loading it."""
    first, second = (locate(framed(member).path) / "tokenizer.json" for member in (one, other))
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)
