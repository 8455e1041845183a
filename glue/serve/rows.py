"""One text that is gone on with: what was asked for, and what has come of it so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glue.kinds import Running
from glue.serve.sampling import Sampling, drawn
from glue.serve.written import Written, cut, safe


@dataclass(frozen=True)
class Told:
    """Of one token its log-probability, None for the first of a text, and the likeliest in its place."""

    token: int
    log: float | None
    top: tuple[tuple[int, float], ...]


@dataclass
class Row:
    """A text and its continuation.

    ids     the prompt, never empty
    most    tokens to write; 0: none, only the prompt is judged
    top     tell so many of the likeliest tokens in each place; None: no log-probabilities
    judged  those of the prompt too
    known   tokens of the vocabulary; a head may have more rows, of which none is ever drawn
    ends    tokens after which nothing comes
    """

    running: Running
    ids: list[int]
    most: int
    sampling: Sampling
    random: np.random.Generator
    known: int
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    top: int | None = None
    judged: bool = False
    job: Any = None

    route: Any = None
    prompt_told: list[Told] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # all that were drawn, the end of text included
    finish: str = ""  # "", then stop or length
    _streamed: tuple[int, int] = (0, 0)  # characters and tokens that a stream has had

    def __post_init__(self) -> None:
        self.written = Written(self.running.tokenizer, self.ids)
        if self.most == 0:
            self.finish = "length"

    @property
    def text(self) -> str:
        """What was written."""
        return self.written.text

    def read(self, logits: Tensor) -> None:
        """Judge the prompt by logits [len(ids), v]."""
        if not self.judged:
            return
        top, ids = self.top or 0, torch.tensor(self.ids[1:], device=logits.device)
        self.prompt_told = [Told(self.ids[0], None, ()), *_told(logits[:-1], ids, top)]

    def take(self, logits: Tensor, likeliest: tuple[float, int]) -> None:
        """Write one more token, by logits [v]. likeliest: the largest of those of known tokens, and its token"""
        token = drawn(logits[:self.known], self.sampling, self.random, likeliest)
        self.tokens.append(token)
        if token in self.ends:
            self._end("stop")
            return
        if self.top is not None:
            self.told += _told(logits[None], torch.tensor([token], device=logits.device), self.top)
        before = len(self.text)
        self.written.add(token)
        if len(self.tokens) == self.most:
            self._end("length", before)
        else:
            self._stop_in_text(before)

    def _end(self, why: str, before: int | None = None) -> None:
        """Nothing comes any more: half characters are shown, and a stop may be found in the last of the text."""
        before = len(self.text) if before is None else before
        self.written.finish()
        self.finish = why
        self._stop_in_text(before)

    def _stop_in_text(self, before: int) -> None:
        place = cut(self.text, self.stops, before)
        if place is None:
            return
        kept, length = 0, 0  # tokens that begin before the stop
        while kept < len(self.written.pieces) and length < place:
            length += len(self.written.pieces[kept])
            kept += 1
        self.written.text, self.finish = self.text[:place], "stop"
        self.written.pieces, self.told = self.written.pieces[:kept], self.told[:kept]

    def news(self) -> News:
        """What a stream can be told now, and has not been told before."""
        characters, tokens = self._streamed
        pieces, length, count = self.written.pieces, characters, tokens
        if self.finish:
            length, count = len(self.text), len(pieces)
        else:
            settled, seen = safe(self.text, self.stops), characters
            for k in range(tokens, len(pieces)):
                seen += len(pieces[k])
                if seen > settled:
                    break
                if pieces[k]:  # what shows nothing may be half a character: it goes with the next that shows something
                    length, count = seen, k + 1
        self._streamed = (length, count)
        return News(self, self.text[characters:length], pieces[tokens:count], self.told[tokens:count], self.finish)

    @property
    def whole(self) -> News:
        """All that was written."""
        return News(self, self.text, self.written.pieces, self.told, self.finish)


@dataclass(frozen=True)
class News:
    """Some of what a row has written, as it was when it was told: text, and the tokens that it is made of.

    told    of each token its log-probability, or () where that was not asked for
    finish  "" while more comes
    """

    row: Row
    text: str
    pieces: Sequence[str]
    told: Sequence[Told]
    finish: str


def _told(logits: Tensor, tokens: Tensor, top: int) -> list[Told]:
    """Of each place the token that stands there and the likeliest. logits [p, v], tokens [p]"""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    norm = wide.logsumexp(-1)
    own = (wide.gather(1, tokens[:, None])[:, 0] - norm).tolist()
    best = wide.topk(min(top, wide.shape[1])) if top else None
    values: list[list[float]] = (best.values - norm[:, None]).tolist() if best else [[]] * len(own)
    places: list[list[int]] = best.indices.tolist() if best else [[]] * len(own)
    return [Told(token, log, tuple(zip(some, logs, strict=True)))
            for token, log, some, logs in zip(tokens.tolist(), own, places, values, strict=True)]
