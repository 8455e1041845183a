"""Speculative proxy-tuning: the tuned small model drafts on the device, and the mixture judges what it drafted.

    draft    y_1 .. y_g from q, the tuned model's own distribution
    ask      the large model, once, for its log-probabilities at all g + 1 places; the untuned small one likewise
    judge    y_j stays with chance min(1, pi(y_j) / q(y_j)); at the first that does not, the token is drawn from
             (pi - q)+ instead; when all stay, one more is drawn from pi          (arXiv:2211.17192)

What is written has the distribution pi, whatever q is. Where nothing is drawn, pi and q have all weight on one token,
and the same rule keeps y_j where it is the likeliest by pi. The numbers of the judging call are the definition: those
of many places at once and of one place alone may differ in their last bits.

This is protocol A: the device judges, and only numbers of tokens go up. Caches are the sessions' own business: each
call gives the whole text, and what two texts have in common is not read again.

Letters: g drafted tokens, p = g + 1 places, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypedDict

import numpy as np
from torch import Tensor

from glue.errors import GlueError
from glue.kinds.source import Session, Source
from glue.proxy.asking import Told, Truncation
from glue.proxy.draft import Draft, drafted
from glue.proxy.ledger import Ledger
from glue.proxy.lengths import Costs, Gamma
from glue.proxy.mixing import GREEDY, Sampling, drawn
from glue.proxy.quantised import Bits
from glue.proxy.writing import Verdict, Written, write


class Sessions(TypedDict):
    """The three texts that `generate` asks about."""

    large: Session
    tuned: Session
    small: Session


@contextmanager
def opened(large: Source, tuned: Source, small: Source) -> Iterator[Sessions]:
    """A text of each of three sources:  with opened(...) as sessions: generate(prompt, **sessions, alpha=1.0).

    Raises GlueError for vocabularies that differ, and for a small source that does not tell everything.
    """
    for name, source in (("tuned", tuned), ("untuned", small)):
        if source.vocabulary.digest != large.vocabulary.digest:
            raise GlueError(f"the {name} small model has another vocabulary than the large one: "
                            f"{source.vocabulary.size} and {large.vocabulary.size} tokens, or other words for them",
                            fix="probabilities of one token can only be mixed where it means the same to all")
        if source.tells != "full":
            raise GlueError(f"the {name} small model tells only some of its probabilities ({source.tells})",
                            fix="run both small models on the device; only the large one may be far away")
    with ExitStack() as stack:
        yield Sessions(large=stack.enter_context(large.open()), tuned=stack.enter_context(tuned.open()),
                       small=stack.enter_context(small.open()))


def generate(prompt: Sequence[int], *, large: Session, tuned: Session, small: Session, alpha: float = 1.0,
             sampling: Sampling = GREEDY, gamma: Gamma = 4, new: int = 64, longest: int = 2**31,
             ends: Collection[int] = (), stop: Callable[[list[int]], bool] = lambda written: False,
             truncation: Truncation | None = None, bits: Bits = 64, costs: Costs = Costs(),  # noqa: B008 (frozen)
             rng: np.random.Generator | None = None) -> Written:
    """Write up to `new` tokens after a prompt, judging on the device (protocol A).

    gamma       tokens of a draft; 0: none, which is plain proxy-tuning; auto: 1 to 8, by acceptance and `costs`
    longest     tokens of a text that all three can see
    ends        tokens that end a text; the one that does is written
    stop        given the tokens written so far: whether the last one ends the text
    truncation  what the large model tells at each place; None: everything
    bits        of its log-probabilities as they are told; 64: not rounded
    rng         of this request; drafts and judgements get a stream each, so that either may be drawn elsewhere
    Raises GlueError for a prompt that leaves no room, and for drawing without a generator.
    """
    drafting, judging = streams(rng, sampling)
    ledger = Ledger()

    def verdict(text: list[int], draft: Draft) -> Verdict:
        told = Told(large, text, draft, sampling, truncation, bits, ledger)
        accepted, token = judge(draft.ids, draft.q, told.target, judging)
        return Verdict(accepted, token, told.bound, told.lacking)

    def draft(text: list[int], length: int) -> Draft:
        return drafted(text, length, tuned, small, alpha, sampling, drafting, ends)

    return write(prompt, draft, verdict, ledger, gamma=gamma, new=new, longest=longest, ends=ends, stop=stop,
                 costs=costs, budget=truncation.budget if truncation else 0.0)


def streams(rng: np.random.Generator | None, sampling: Sampling) -> tuple[np.random.Generator, np.random.Generator]:
    """Two generators of one request: what drafts are drawn with, and what they are judged with."""
    if rng is None and not sampling.greedy:
        raise GlueError(f"tokens are drawn at temperature {sampling.temperature:g}, and no generator was given",
                        fix="give rng=numpy.random.default_rng(...) with a seed of this request, or temperature 0")
    first, second = (rng or np.random.default_rng(0)).spawn(2)
    return first, second


def judge(ids: Sequence[int], q: Tensor, target: Callable[[int], Tensor], rng: np.random.Generator) -> tuple[int, int]:
    """How many of the drafted tokens stay, and the token after them.

    q       [g or more, v] what each was drawn from
    target  a place -> pi [v] there; places are asked for in order, and only while drafts stay
    """
    for place, token in enumerate(ids):
        pi, was = target(place), q[place]
        if rng.random() * float(was[token]) < float(pi[token]):
            continue
        left = (pi - was).clamp(min=0)
        return place, drawn(left if bool(left.any()) else pi, rng.random())
    return len(ids), drawn(target(len(ids)), rng.random())
