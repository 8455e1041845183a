"""What is joined into a mixture, and what its routers may learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from glue.checkpoint import Weights
from glue.kinds import Place
from glue.kinds.device import device_of
from glue.member import Member


@dataclass(frozen=True)
class Parts:
    """What is joined.

    experts  models or adapters, in the order of the recipe
    trunk    what all experts share: embeddings, norms, attention at ffn level, the first `dense` layers, the head; or
             what they were tuned from, where only changes are stored. None where they share nothing
    frame    whose configuration, tokenizer and generation settings are taken over
    dense    the first so many layers are the trunk's alone
    place    where what is looked at is calculated; layers that are read one by one are in fp32 whatever it says
    """

    experts: tuple[Member, ...]
    trunk: Weights | None
    frame: Member
    dense: int = 0
    place: Place = Place()

    @property
    def device(self) -> str:
        """Of this process, as torch calls it."""
        return device_of(self.place.device)


@dataclass(frozen=True)
class Dev:
    """What a router may learn from. Letters: m dev prompts, e experts.

    prompts  [m] the texts of the questions
    wins     [m, e] in 0..1, what each expert scored on each dev item
    tasks    [m] number of the task that each item is of
    seed     of everything a router draws
    """

    prompts: Sequence[str]
    wins: Tensor
    tasks: Tensor
    seed: int = 0
