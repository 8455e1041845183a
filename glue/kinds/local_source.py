"""A running member as a source: all log-probabilities of its next tokens, each token of a text read once.

A text's cache is cropped to what the next call has in common with it, so that a rejected draft costs nothing but its
own tokens. A window that slides can lose what the last call has read. Where a cache cannot be cropped as far as is
wanted, a text that only grows is still read once; one that goes another way is read again.

A member that chooses experts by prompt takes ids[:start] of a text's first call for its prompt, and keeps that choice
until the text departs from it; drafts have no part in it.

Letters: p places, v vocabulary, k tokens told of a place.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from glue.errors import RunError, ZooError
from glue.kinds import Running
from glue.kinds.source import Scored, Session, Tells, vocabulary
from glue.kinds.text import longest

KEPT = 9  # places whose log-probabilities a text keeps, should more be asked of them: a draft of 8 and the token after


class Local:
    """A member of this process, asked text by text. Any number of threads may ask; its forwards go one at a time.

    lock  who runs the same model elsewhere hands over the lock that it is run under
    Raises ZooError where the member has no one vocabulary, or no logits for some of it.
    """

    tells: Tells = "full"

    def __init__(self, running: Running, lock: Any = None):
        if running.choose is not None:
            raise ZooError(f"the experts of '{running.member.name}' have tokenizers of their own, so that there is no "
                           f"one vocabulary to tell probabilities of", fix="ask one of its experts")
        self.running, self.lock = running, lock or Lock()
        self.vocabulary = vocabulary(running.tokenizer)
        self.most, self.longest = self.vocabulary.size, longest(running.model, running.tokenizer)
        self.slices = "logits_to_keep" in inspect.signature(running.model.forward).parameters

    @contextmanager
    def open(self) -> Iterator[Session]:
        """A text to ask about; its cache goes with it."""
        yield Text(self)


class Text:
    """One text that a model reads; see Session."""

    def __init__(self, source: Local):
        self._source = source
        self._forget()

    def score(self, ids: Sequence[int], start: int, *, top_k: int | None = None,
              extra: Sequence[Sequence[int]] = ()) -> Scored:
        """What follows after ids[:start], ..., ids; see Session. Raises RunError for what cannot be asked."""
        ids, source = list(ids), self._source
        check(ids, start, source.vocabulary.size, source.longest, top_k, extra)
        with source.lock, torch.no_grad():  # not inference_mode: others may learn from what is told
            try:
                logs = self._logs(ids, start)
            except BaseException:
                self._forget()  # who knows how much of it the cache has read
                raise
        return narrowed(logs, top_k, extra)

    def _forget(self) -> None:
        self._read: list[int] = []     # what the cache has read
        self._cache: Any = None
        self._surplus = 0              # how many of these a window that slides can lose
        self._told: Tensor | None = None  # [n, v] of the last places of what was read
        self._prompt: list[int] = []   # what the route was chosen by
        self._route: Hashable = None

    def _logs(self, ids: list[int], start: int) -> Tensor:
        """Log-probabilities after ids[:start], ..., ids. [p, v]"""
        known = common(ids, self._read)
        if known < len(self._prompt):
            self._forget()
            known = 0
        if self._told is not None and len(self._read) - len(self._told) < start <= known:
            told = self._told[start - len(self._read) - 1:][:known - start + 1]
            if known == len(ids):
                return told.clone()
            logs = torch.cat([told, self._after(ids, known, len(ids) - known)])
        else:
            logs = self._after(ids, min(known, start - 1), len(ids) - start + 1)
        self._told = logs[-KEPT:].clone()  # whoever asked may change what is theirs
        return logs

    def _after(self, ids: list[int], known: int, places: int) -> Tensor:
        """Log-probabilities of the last places, by a forward over all but the first `known` tokens. [places, v]"""
        running, size = self._source.running, self._source.vocabulary.size
        self._crop(known)
        if running.route is not None and not self._prompt:
            self._prompt = ids[:len(ids) - places + 1]
            self._route = running.route([self._prompt])[0]
        new = torch.tensor([ids[len(self._read):]], device=running.model.device)
        kept = {"logits_to_keep": places} if self._source.slices else {}
        past = {} if self._cache is None else {"past_key_values": self._cache}
        pinned = nullcontext() if running.pinned is None else running.pinned(self._route)
        with pinned:
            output: Any = running.model(input_ids=new, use_cache=True, **past, **kept)
        before, self._cache = self._cache, getattr(output, "past_key_values", None)
        self._read, self._surplus = ids if self._cache is not None else [], new.shape[1] if before is not None else 0
        if before is None and windows(self._cache):
            self._cache.activate_past_recording()  # from now on it keeps what slides out, until it is cropped
        logits = output.logits[0, -places:]
        if logits.shape[-1] < size:
            raise ZooError(f"'{running.member.name}' has logits for {logits.shape[-1]} tokens, and its tokenizer knows "
                           f"{size}", fix="resize its head to its tokenizer first")
        wide = torch.promote_types(logits.dtype, torch.float32)
        logs = logits[:, :size].to(wide).log_softmax(-1)  # rows of a head beyond the vocabulary are no tokens
        if bool(logs.isnan().any()):
            raise RunError(f"'{running.member.name}' gives no numbers for the next token",
                           fix="see whether its weights are damaged, or take a wider --dtype")
        return logs

    def _crop(self, known: int) -> None:
        """Let the cache have read no more than the first `known` tokens."""
        surplus, sliding = len(self._read) - known, windows(self._cache)
        kept = len(self._read) < min(sliding) or surplus <= self._surplus if sliding else True
        if known and surplus and kept and getattr(self._cache, "is_croppable", False):
            try:
                self._cache.crop(-surplus)
            except RuntimeError:  # of a cache made of several, one of which has a window
                self._read, self._cache = [], None
            self._read = self._read[:known]
        elif surplus or not known:
            self._read, self._cache = [], None
        elif sliding:
            self._cache.crop(0)  # what has slid out is not wanted any more


def windows(cache: Any) -> list[int]:
    """How many tokens each layer of a cache sees that has a window."""
    return [layer.sliding_window for layer in getattr(cache, "layers", ()) if getattr(layer, "is_sliding", False)]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    for k, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return k
    return min(len(one), len(other))


def check(ids: Sequence[int], start: int, v: int, longest: int, top_k: int | None,
          extra: Sequence[Sequence[int]]) -> None:
    """Raise RunError for what no source of v tokens, which sees so many of a text, can be asked."""
    if not 1 <= start <= len(ids):
        raise RunError(f"what follows after {start} of {len(ids)} tokens cannot be told",
                       fix="ask from place 1 on, and no further than the end of the text")
    if len(ids) > longest:
        raise RunError(f"the text has {len(ids)} tokens, and the member sees {longest}", fix="ask about a shorter text")
    if top_k is not None and top_k < 0:
        raise RunError(f"the likeliest {top_k} tokens cannot be told", fix="ask for at least 0, or for all")
    if extra and len(extra) != len(ids) - start + 1:
        raise RunError(f"{len(extra)} lists of tokens for {len(ids) - start + 1} places", fix="give one for each place")
    if any(not 0 <= token < v for some in (ids, *extra) for token in some):
        raise RunError(f"the text has a token that is none of {v}", fix="use the tokenizer that belongs to the member")


def narrowed(logs: Tensor, top_k: int | None, extra: Sequence[Sequence[int]] = ()) -> Scored:
    """Of all log-probabilities [p, v] the likeliest k, and what else was asked for; all of them where k is None."""
    p, v = logs.shape
    if top_k is None or top_k >= v:
        nothing = logs.new_zeros(p)
        return Scored(logs, None, nothing, nothing)
    top = logs.topk(top_k)
    width = max((len(some) for some in extra), default=0)
    asked = torch.full((p, width), -1, dtype=torch.long)
    for k, (some, likely) in enumerate(zip(extra, top.indices.tolist(), strict=False)):  # one list a place, or none
        new = list(dict.fromkeys(token for token in some if token not in likely))
        asked[k, :len(new)] = torch.tensor(new, dtype=torch.long)
    asked = asked[:, :int((asked >= 0).sum(1).max())].to(logs.device) if width else asked.to(logs.device)
    tokens = torch.cat([top.indices, asked], dim=1)
    told = logs.gather(1, tokens.clamp(min=0)).masked_fill(tokens < 0, -torch.inf)
    rest = torch.nn.functional.pad(logs, (0, 1), value=-torch.inf)  # with a column for what stands for no token
    rest = rest.scatter(1, torch.where(tokens < 0, v, tokens), -torch.inf)
    floor = top.values[:, -1].exp() if top_k else logs.new_ones(p)
    return Scored(told, tokens, rest.logsumexp(-1).exp(), floor)
