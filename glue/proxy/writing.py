"""The loop of both protocols: draft, have it judged, write what stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from glue.errors import GlueError
from glue.proxy.draft import Draft
from glue.proxy.ledger import Ledger
from glue.proxy.lengths import Costs, Gamma, Lengths

Why = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Written:
    """A text that was written: its new tokens, the ending token among them, why it ended, and what it took."""

    tokens: list[int]
    why: Why
    ledger: Ledger


@dataclass(frozen=True)
class Verdict:
    """What was made of a draft.

    accepted, token  how many of it stay, and the one after them
    bound, lacking   of each place from which a token is written, see `glue.proxy.truncation.Certified`
    """

    accepted: int
    token: int
    bound: Sequence[float]
    lacking: Sequence[float]


def write(prompt: Sequence[int], draft: Callable[[list[int], int], Draft],
          verdict: Callable[[list[int], Draft], Verdict], ledger: Ledger, *, gamma: Gamma, new: int, longest: int,
          ends: Collection[int], stop: Callable[[list[int]], bool], costs: Costs, budget: float = 0.0) -> Written:
    """Write up to `new` tokens; for the words see `glue.proxy.speculative.generate`.

    draft    text, length -> a draft of at most that length
    verdict  text, draft -> what was judged of it
    """
    if not 1 <= len(prompt) <= longest or new < 1:
        raise GlueError(f"{new} tokens cannot be written after {len(prompt)} where {longest} can be seen",
                        fix="give a prompt of at least one token that leaves room, and new of at least 1")
    lengths, text, written = Lengths(gamma, costs), list(prompt), list[int]()
    # the last token need not be read, so a text may become one longer than what can be seen
    while (room := min(new - len(written), longest + 1 - len(text))) > 0:
        found = draft(text, min(lengths.next(), room - 1))
        judged = verdict(text, found)
        lengths.saw(len(found.ids), judged.accepted)
        ledger.judged_draft(len(found.ids), judged.accepted)
        for place, token in enumerate([*found.ids[:judged.accepted], judged.token]):
            text.append(token)
            written.append(token)
            ledger.wrote(judged.bound[place], judged.lacking[place], budget)
            if token in ends:
                return Written(written, "end", ledger)
            if stop(written):
                return Written(written, "stop", ledger)
    return Written(written, "length", ledger)
