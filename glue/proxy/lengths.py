"""How many tokens to draft: so many that the most tokens are expected for the time of a call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from glue.errors import GlueError

Gamma = int | Literal["auto"]

LONGEST = 8  # the longest draft that `auto` tries
MEMORY = 0.9  # what a call counts for when the next one is in


@dataclass(frozen=True)
class Costs:
    """What things take, in one unit of time, for instance seconds.

    draft  one token of the tuned model        place  one more place that is verified, by the large and the small model
    call   a call with no draft, without its way there and back        trip  that way
    """

    draft: float = 1.0
    place: float = 0.5
    call: float = 4.0
    trip: float = 4.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(cost) and cost >= 0 for cost in (self.draft, self.place, self.call, self.trip)):
            raise GlueError(f"costs {self} are no times", fix="give numbers of 0 or more, in one unit")

    def of(self, gamma: int) -> float:
        """A call with so many drafted tokens; the tuned model is asked once more, for the place after them."""
        return (gamma + 1) * self.draft + gamma * self.place + self.call + self.trip


def expected(acceptance: float, gamma: int) -> float:
    """Tokens that a call is expected to give, 1 + b + ... + b^gamma, where each draft is accepted with chance b."""
    if acceptance >= 1:
        return gamma + 1.0
    return (1 - acceptance ** (gamma + 1)) / (1 - acceptance)


class Lengths:
    """Chooses the length of each draft; the same history always gives the same lengths.

    For `auto` the chance of acceptance is accepted / judged over all calls so far, the older ones counting less and
    less, with two of three accepted to begin with. A length depends only on what was judged before, so that the
    distribution of the text is that of any fixed length.
    """

    def __init__(self, gamma: Gamma, costs: Costs):
        if gamma != "auto" and not 0 <= gamma <= 64:
            raise GlueError(f"drafts of {gamma} tokens", fix="gamma is 0 (no drafts) to 64, or auto (1 to 8)")
        self._gamma, self._costs = gamma, costs
        self._accepted, self._judged = 2.0, 3.0

    def next(self) -> int:
        """The length of the next draft."""
        if self._gamma != "auto":
            return self._gamma
        chance = self._accepted / self._judged
        return max(range(1, LONGEST + 1), key=lambda gamma: expected(chance, gamma) / self._costs.of(gamma))

    def saw(self, drafted: int, accepted: int) -> None:
        """A draft was judged: what comes after its first rejection was not."""
        if not drafted:
            return
        self._accepted = MEMORY * self._accepted + accepted
        self._judged = MEMORY * self._judged + min(accepted + 1, drafted)
