"""Sources: whoever can be asked for the probabilities of next tokens, here or far away, and only for those.

What asks a source knows nothing else of the model behind it: no weights, no layers, no embeddings. A model of this
process is one, as is a server that answers over HTTP.

Letters: p places that are asked for, v vocabulary, k tokens of which the source tells something.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from glue.member import canonical

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tells = Literal["full", "top_k", "given"]


@dataclass(frozen=True)
class Vocabulary:
    """What the numbers of tokens mean. Two sources whose digests differ may not be mixed.

    size  v, one more than the largest number. Heads may have more rows, which are no tokens: a source leaves them out,
          and its probabilities of the v tokens sum to 1
    """

    size: int
    digest: str


@dataclass(frozen=True)
class Scored:
    """What a source says of the next token at each of p places, in nats.

    logs    [p, v] log-probabilities of all tokens, where it tells all of them; else [p, k]
    tokens  [p, k] the tokens meant, each once in its row, with -1 (and -inf) where a row has fewer; None: all, in order
    tail    [p] the probability of all tokens it says nothing of; 0 where it tells all
    floor   [p] the most that any one of these may have: the least of the top k it told; 0 where it tells all
    """

    logs: Tensor
    tokens: Tensor | None
    tail: Tensor
    floor: Tensor


class Session(Protocol):
    """One text, asked about again and again. What was read stays read: only what is new costs anything."""

    def score(self, ids: Sequence[int], start: int, *, top_k: int | None = None,
              extra: Sequence[Sequence[int]] = ()) -> Scored:
        """The next token after ids[:start], ids[:start + 1], ..., ids: p = len(ids) - start + 1 places.

        ids    the whole text so far, always; what it has in common with the last call is not read again
        start  at least 1
        top_k  tell only the likeliest k; None: as much as the source can tell
        extra  tell these tokens too: a list for each place, or nothing
        """
        ...


class Source(Protocol):
    """Who can be asked.

    tells    full: every log-probability; top_k: only the likeliest, at most `most` of them, and what is asked for in
             `extra`; given: only the likeliest and the token that follows, since `extra` is not understood
    longest  tokens of a text that it can see
    """

    vocabulary: Vocabulary
    tells: Tells
    most: int
    longest: int

    def open(self) -> AbstractContextManager[Session]:
        """A text to ask about; what is kept for it is given back when it is left."""
        ...


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Of a tokenizer: the digest is of its tokens and their numbers, and of which are special."""
    known = tokenizer.get_vocab()
    told = canonical({"tokens": known, "special": sorted(tokenizer.all_special_ids)})
    return Vocabulary(max(known.values()) + 1, hashlib.sha256(told.encode(errors="surrogatepass")).hexdigest())
