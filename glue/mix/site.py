"""What a router is made from, and what it is: prompts as a model sees them, and who answered them well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glue.kinds import Dtype, Running, load
from glue.member import Member


@dataclass(frozen=True)
class Site:
    """All that a router may look at. Letters: m dev prompts, e experts, h hidden size of the reader.

    names          of the experts, in their order
    hidden         [m, h] fp32, the reader's pooled state of each dev prompt
    wins           [m, e] in 0..1, what each expert scored on each dev item
    tasks          [m] number of the task that each item is of
    prompts        [m] the texts
    prompt_states  texts -> their pooled states [p, h], for routers that bring texts of their own
    reader, layer  which expert reads, and which of its layers; see GlueModelMixtureConfig
    seed           of everything a router draws
    """

    names: tuple[str, ...]
    hidden: Tensor
    wins: Tensor
    tasks: Tensor
    prompts: Sequence[str]
    prompt_states: Callable[[list[str]], Tensor]
    reader: int = 0
    layer: int = -1
    seed: int = 0

    def __post_init__(self):
        m, e = len(self.prompts), len(self.names)
        assert self.hidden.dim() == 2 and len(self.hidden) == m and self.tasks.shape == (m,), "one row a prompt"
        assert self.wins.shape == (m, e), f"wins are {tuple(self.wins.shape)}, of {m} prompts and {e} experts"

    def generator(self) -> torch.Generator:
        """A fresh stream of random numbers, the same for the same seed."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Gate:
    """A finished router: states -> (state - mean) / scale -> one hidden layer, if it has one -> logits of experts.

    weight  [e, h], or [e, w] behind a hidden layer of width w; bias [e]
    mean    [h]; scale [h]
    inner   weight [w, h] and bias [w] of the hidden layer
    top_k   how many experts answer a prompt
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    inner: tuple[Tensor, Tensor] | None = None
    temperature: float = 1.0
    top_k: int = 1

    def logits(self, hidden: Tensor) -> Tensor:
        """[m, h] -> [m, e]"""
        state = (hidden - self.mean) / self.scale
        if self.inner is not None:
            state = (state @ self.inner[0].T + self.inner[1]).relu()
        return (state @ self.weight.T + self.bias) / self.temperature


def survey(experts: Sequence[Member], prompts: Sequence[str], wins: Tensor, tasks: Tensor, *, reader: int = 0,
           layer: int = -1, seed: int = 0, device: str = "cpu", dtype: Dtype = "float32") -> Site:
    """Load the reader and let it read the dev prompts. wins [m, e] and tasks [m] as in Site."""
    running = load(experts[reader], device=device, dtype=dtype)

    def states(texts: Sequence[str]) -> Tensor:
        return pooled_states(running, texts, layer)

    return Site(tuple(expert.name for expert in experts), states(prompts), torch.as_tensor(wins, dtype=torch.float32),
                torch.as_tensor(tasks), list(prompts), states, reader, layer, seed)


@torch.no_grad()
def pooled_states(running: Running, prompts: Sequence[str], layer: int = -1) -> Tensor:
    """What the router of a mixture will see of each prompt when `running` is its reader. [m, h] fp32"""
    from glue.kinds.mixture import left_padded
    from glue.kinds.modelling.model_mixture import pooled

    rows = [running.tokenizer(prompt)["input_ids"] for prompt in prompts]
    states = torch.empty(len(rows), running.model.config.hidden_size)
    for places, ids, mask in left_padded(rows):
        device = running.model.device
        states[places] = pooled(running.model, ids.to(device), mask.to(device), layer).cpu()
    return states
