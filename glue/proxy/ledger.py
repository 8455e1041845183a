"""The ledger of a text: what went over the network, what that reveals, and what the certificates add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from glue.kinds.source import Scored
from glue.kinds.wire import size
from glue.proxy.lengths import expected
from glue.proxy.quantised import Bits

ID = 4  # bytes of a token's number on its way up, and of each start, k and length

# What the server can read of the device, by protocol.
TOKENS = "the prompt, every drafted token and so the text: their numbers, nothing else"
TOKENS_AND_ASKED = ("the prompt, every drafted token and so the text, and at each place which tokens tuning raised "
                    "most: their numbers, and nothing of by how much")
CHANGES = ("the prompt, every drafted token and so the text, at each place how much tuning changed the log-probability "
           "of every token, and where tokens are drawn the tuned model's distribution: enough to train a copy of what "
           "was learnt from private data")


@dataclass
class Ledger:
    """Counts of one text.

    calls      round trips; widened: those of them that asked again for more
    places     whose distributions were told or judged
    drafted, judged, accepted  tokens; a draft is judged up to its first rejection
    written    tokens
    up, down   bytes, by formula: see `asked` and `glue.kinds.wire.size`
    asked_for  numbers of tokens asked for beside the draft
    bound      sum over the tokens written of what is certified of their places: at most so far, in total variation,
               is the distribution of this text from the exact one. `truncated` is what of it is due to tokens
               that were not told, and the rest to rounding
    uncertain  tokens written at places over the budget, or where nothing could be certified
    lengths    of drafts -> calls
    revealed   what the server can read, in words
    """

    revealed: str = TOKENS
    calls: int = 0
    widened: int = 0
    places: int = 0
    drafted: int = 0
    judged: int = 0
    accepted: int = 0
    written: int = 0
    up: int = 0
    down: int = 0
    asked_for: int = 0
    bound: float = 0.0
    truncated: float = 0.0
    uncertain: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    _held: list[int] = field(default_factory=list, repr=False)

    def asked(self, ids: Sequence[int], start: int, extra: Sequence[Sequence[int]] = ()) -> None:
        """A question goes up: the tokens that the server has not read, where to start, how many to keep, top_k, and for
        each place that asks for tokens, these and their count; each number in 4 bytes. JSON takes more."""
        new = len(ids) - _common(self._held, ids)
        self._held = list(ids)
        self.calls += 1
        self.places += len(ids) - start + 1
        self.asked_for += sum(len(some) for some in extra)
        if extra and self.revealed == TOKENS:
            self.revealed = TOKENS_AND_ASKED
        self.up += ID * (new + 3 + sum(len(some) + 1 for some in extra))

    def told(self, scored: Scored, v: int, bits: Bits) -> None:
        """An answer comes down; what was not rounded counts as fp32."""
        k = 0 if scored.tokens is None else scored.logs.shape[1]
        self.down += size(len(scored.logs), k, v, min(bits, 32))

    def judged_draft(self, drafted: int, accepted: int) -> None:
        """A draft was judged."""
        self.drafted += drafted
        self.judged += min(accepted + 1, drafted)
        self.accepted += accepted
        self.lengths[drafted] += 1

    def wrote(self, bound: float, lacking: float, budget: float) -> None:
        """A token was written, from a place of which so much is certified."""
        self.written += 1
        self.bound += bound
        self.truncated += lacking
        self.uncertain += bound >= 1 or lacking > budget

    @property
    def acceptance(self) -> float:
        """Share of judged tokens that were accepted; 1 where none was judged."""
        return self.accepted / self.judged if self.judged else 1.0

    @property
    def tokens_per_call(self) -> float:
        """Tokens written for each draft that was judged; asking again for more is counted in `calls` alone."""
        return self.written / max(1, self.lengths.total())

    @property
    def expected_per_call(self) -> float:
        """What drafts of these lengths give at this acceptance, were it the same everywhere."""
        return sum(count * expected(self.acceptance, gamma) for gamma, count in self.lengths.items()) \
            / max(1, self.lengths.total())

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        counts = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "lengths"}
        return counts | {"lengths": {str(gamma): self.lengths[gamma] for gamma in sorted(self.lengths)},
                         "acceptance": self.acceptance, "tokens_per_call": self.tokens_per_call,
                         "expected_per_call": self.expected_per_call}

    def __add__(self, other: Ledger) -> Ledger:
        """Of two texts together; bounds of texts add up too."""
        names = ("calls", "widened", "places", "drafted", "judged", "accepted", "written", "up", "down", "asked_for",
                 "bound", "truncated", "uncertain", "lengths")
        return Ledger(max(self.revealed, other.revealed, key=len),
                      **{name: getattr(self, name) + getattr(other, name) for name in names})


def plain_bytes(tokens: int, v: int, bits: int = 16) -> int:
    """Bytes down of proxy-tuning without drafts: all log-probabilities of one place for each token."""
    return tokens * size(1, 0, v, bits)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginnings."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
