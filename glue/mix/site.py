"""The place of a gate: what a router may look at there, and what it leaves there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glue.errors import MethodError
from glue.family import Choice
from glue.kinds import Running

NEVER = -1e9  # the logit of an expert that is to answer nothing; a finite one, so that no file holds infinities


@dataclass(frozen=True)
class Site:
    """All that a router may look at. Letters: m dev prompts, e experts, h features of a state.

    Where a gate judges token by token, a row is a token of a dev prompt, which then stands there several times with its
    wins and its task: what is fitted is never judged on a prompt that any of its rows came from.

    names          of the experts, in their order
    hidden         [m, h] fp32, the state of each dev prompt as the gate will see it: pooled hidden states of the
                   reader, those of a token, or at level text glue.kinds.features.text_features
    wins           [m, e] in 0..1, what each expert scored on each dev item
    tasks          [m] number of the task that each item is of
    prompts        [m] the texts
    prompt_states  texts -> their states [p, h], for routers that bring texts of their own
    reader, layer  which expert reads, and which of its layers; see GlueModelMixtureConfig
    seed           of everything a router draws
    affine         whether the gate may have a mean and a bias; where it is False the place holds one matrix [e, h] and
                   no more: Gate.weight is that matrix, its mean and bias are 0, its scale and temperature 1
    where          the gate is applied, in words for people: "the prompt", "layer 3"
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
    affine: bool = True
    where: str = "the prompt"

    def __post_init__(self):
        m, e = len(self.prompts), len(self.names)
        assert self.hidden.dim() == 2 and len(self.hidden) == m and self.tasks.shape == (m,), "one row a prompt"
        assert self.wins.shape == (m, e), f"wins are {tuple(self.wins.shape)}, of {m} prompts and {e} experts"

    def generator(self, word: str = "") -> torch.Generator:
        """A fresh stream of random numbers, the same for the same seed, place and word."""
        key = hashlib.sha256(f"{self.seed}/{self.where}/{word}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))

    def only(self, rows: Tensor) -> Site:
        """The same place with these dev prompts alone. rows [k] indices"""
        return replace(self, hidden=self.hidden[rows], wins=self.wins[rows], tasks=self.tasks[rows],
                       prompts=[self.prompts[j] for j in rows.tolist()])

    def gate(self, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, *, barred: Sequence[int] = (),
             temperature: float = 1.0, top_k: int = 1) -> Gate:
        """The gate that scores a state with weight @ ((state - mean) / scale) + bias, as this place can hold it.

        barred  experts that are never to be first

        Where the place is not affine, mean and bias ride on the direction of the mean, see `carrier`: the logits are
        exact for states whose part along the mean is that of the mean itself, and the scale is part of the weight. An
        expert is barred there by the mean of the other rows, which is never the largest of them.
        """
        weight, bias, others = weight.double(), bias.double(), [i for i in range(len(bias)) if i not in barred]
        if self.affine or len(others) < 2:
            bias = bias.index_fill(0, torch.tensor(barred, dtype=torch.long), NEVER if self.affine else -1.0)
        else:
            for i in barred:
                weight, bias = weight.clone(), bias.clone()
                weight[i], bias[i] = weight[others].mean(0), bias[others].mean()
        if self.affine:
            return Gate(weight.float(), bias.float(), mean.float(), scale.float(), None, temperature, top_k)
        scale = scale.double()
        shift = bias - weight @ (mean.double() / scale)
        matrix = (weight + torch.outer(shift, carrier(self.hidden, mean, scale))) / scale / temperature
        return plain(matrix.float(), top_k)


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

    def matrix(self) -> tuple[Tensor, Tensor]:
        """The same logits as matrix @ state + bias: mean, scale and temperature folded in. [e, h], [e] fp32

        The bias is exactly 0 for a gate that was made where Site.affine is False. Raises MethodError for a gate with a
        hidden layer, which is no matrix.
        """
        if self.inner is not None:
            raise MethodError("a gate with a hidden layer cannot be stored as one matrix",
                              fix="use a router of form linear here")
        weight = self.weight.double() / self.scale.double() / self.temperature
        bias = self.bias.double() / self.temperature - weight @ self.mean.double()
        return weight.float(), bias.float() + 0.0  # no negative zeros

    def cooled(self, temperature: float, affine: bool) -> Gate:
        """The same choices, with weights as even as `temperature` makes them; where not affine it is in the matrix."""
        if affine:
            return replace(self, temperature=self.temperature * temperature)
        return replace(self, weight=self.weight / temperature)


@dataclass(frozen=True)
class LossGate:
    """A router without numbers of its own: the expert to which the text itself is least surprising answers it.

    Only level text can hold it: every expert has to read the prompt before one of them answers. Experts may cut a text
    into different tokens, so what is compared is nats per byte of the text, not per token.
    """

    top_k: int = 1

    def logits(self, losses: Tensor) -> Tensor:
        """losses  [m, e] nats per byte of each text under each expert -> [m, e]"""
        return -losses


def plain(matrix: Tensor, top_k: int = 1) -> Gate:
    """A gate that is one matrix [e, h] and nothing else."""
    e, h = matrix.shape
    return Gate(matrix, torch.zeros(e), torch.zeros(h), torch.ones(h), top_k=top_k)


def carrier(hidden: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The vector u along the mean for which u @ (state / scale) is nearest to 1 over the states. [m, h] -> [h] fp64

    A matrix without a bias has nothing constant to hold on to but this. It is 0 where the mean is.
    """
    along = mean.double() / scale.double()
    size = (hidden.double() / scale.double()) @ along
    square = size.square().mean()
    return along * (size.mean() / square) if float(square) > 0 else torch.zeros_like(along)


def gates(router: Choice, sites: Iterable[Site]) -> list[Gate | LossGate]:
    """The gates that a router makes for the sites of a mixture, in their order, each checked against its place.

    sites  a list, or a generator that is sent each gate before it tells of the next place
    Raises MethodError.
    """
    made: list[Gate | LossGate] = []
    if isinstance(sites, Generator):
        site = next(sites, None)
        while site is not None:
            made.append(_sound(router, site))
            try:
                site = sites.send(made[-1])
            except StopIteration:
                site = None
        return made
    return [_sound(router, site) for site in sites]


def _sound(router: Choice, site: Site) -> Gate | LossGate:
    gate, e, name = router(site), len(site.names), router.method.name
    if gate.top_k > e:
        raise MethodError(f"router '{name}' would choose {gate.top_k} of {e} experts", fix=f"set top_k to {e} or less")
    if isinstance(gate, Gate):
        assert gate.bias.shape == (e,) and len(gate.weight) == e, f"router '{name}' made no row for each expert"
        simple = gate.inner is None and not (gate.mean.any() or gate.bias.any())
        assert site.affine or simple, f"router '{name}' put more than a matrix at {site.where}"
    return gate


@torch.no_grad()
def pooled_states(running: Running, prompts: Sequence[str], layer: int = -1) -> Tensor:
    """What the router of a mixture will see of each prompt when `running` is its reader. [m, h] fp32"""
    from glue.kinds.mixture import left_read
    from glue.kinds.modelling.model_mixture import pooled

    rows = [running.tokenizer(prompt)["input_ids"] for prompt in prompts]
    states, device = torch.empty(len(rows), running.model.config.hidden_size), running.model.device
    for place, state in left_read(running.room, rows, lambda ids, mask: pooled(running.model, ids.to(device),
                                                                               mask.to(device), layer).cpu()):
        states[place] = state
    return states
