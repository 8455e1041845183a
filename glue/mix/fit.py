"""Fitting a router to dev items: raise the gate's weight on the experts that answer each item well.

Nothing is left to be set by hand: how strongly weights are held back, and how sure the gate may be of its choice, are
judged on dev items that it was not fitted to. Letters: k items on which experts differ, h features, e experts, w width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from glue.errors import MethodError
from glue.mix.site import NEVER, Gate, Site, carrier

FOLDS = 5  # parts of the dev prompts; the temperature is judged on each part by a gate that has not seen it
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # on half the sum of squares of all weights
TEMPERATURES = sorted((10 ** (k / 30) for k in range(-60, 121)), key=lambda at: abs(math.log(at)))  # 1 first


def standardisation(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature; a feature that never changes is divided by 1. [m, h] -> [h], [h]"""
    mean, spread = hidden.mean(0), hidden.std(0, correction=0)
    return mean, torch.where(spread > 1e-6 * (1 + mean.abs()), spread, 1.0)


def telling(site: Site) -> Tensor:
    """The items on which the experts differ, which alone tell anything about routing. [k] indices

    Raises MethodError where there are none.
    """
    rows = (site.wins.amax(1) > site.wins.amin(1)).nonzero()[:, 0]
    if not len(rows):
        raise MethodError(f"the experts score the same on each of the {len(set(site.prompts))} dev items, so there is "
                          f"nothing to learn from", fix="use the router uniform, or mix members that differ")
    return rows


def trained(site: Site, *, width: int, top_k: int) -> Gate:
    """The gate of the penalty that misses least on items it was not fitted to; width 0 is a linear gate."""
    return calibrated(site, partial(fitted, width=width, top_k=top_k))


def fitted(site: Site, *, width: int, top_k: int, penalties: Sequence[float] = PENALTIES) -> list[Gate]:
    """A gate for each penalty, fitted to all items at once: `missed` plus the penalty, as low as L-BFGS gets it.

    An item that several experts answer is content with any of them. Where the site is not affine the gate is fitted as
    it will be applied, without mean and bias. Raises MethodError where the experts differ nowhere.
    """
    if width and not site.affine:
        raise MethodError(f"a gate with a hidden layer has no room at {site.where}, which holds one matrix",
                          fix="use the router linear")
    rows = telling(site)
    mean, scale = standardisation(site.hidden.double())
    # what the bias is multiplied with: 1, or the one nearly constant thing that a matrix without a bias can see
    state = site.hidden.double()[rows] / scale
    one = torch.ones(len(rows), dtype=torch.float64) if site.affine else state @ carrier(site.hidden, mean, scale)
    state = (state - torch.outer(one, mean / scale)) / len(mean) ** 0.5
    # the weights that fit best lie in the span of the states, which has few dimensions where there are few items
    basis, state = _span(state)
    drawn = torch.randn(width, len(mean), dtype=torch.float64, generator=site.generator("hidden layer")) @ basis
    back = basis.T / len(mean) ** 0.5
    # sums in an order of their own: a hidden layer would make much of the last bit
    order = sorted(range(len(site.names)), key=site.names.__getitem__)
    place = torch.tensor(order).argsort()
    share = log_share(site.wins[rows])[:, order]
    gates = []
    for penalty in penalties:
        found = _lowest(state, one, share, drawn, penalty)
        found[:2] = found[0][place], found[1][place]
        if width:
            weight, bias, inner, shift = (tensor.float() for tensor in (*found[:2], found[2] @ back, found[3]))
            gates.append(Gate(weight, bias, mean.float(), scale.float(), (inner, shift), top_k=top_k))
        else:
            gates.append(site.gate(found[0] @ back, found[1], mean, scale, top_k=top_k))
    return gates


def _span(state: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal directions [h, r] that hold all rows of `state`, and the rows in terms of them [k, r]."""
    if len(state) >= state.shape[1]:
        return torch.eye(state.shape[1], dtype=state.dtype), state
    basis, rows = torch.linalg.qr(state.T)
    return basis, rows.T


@torch.enable_grad()
def _lowest(state: Tensor, one: Tensor, share: Tensor, drawn: Tensor, penalty: float) -> list[Tensor]:
    """Weight and bias of the last layer, then of the hidden one, if there is one.

    state [k, r]; one [k], what the last bias is multiplied with; share [k, e] logarithms; drawn [w, r] to begin with
    In fp64, so that little depends on the machine. The last layer begins at 0: no expert begins ahead of another.
    """
    width = len(drawn)
    weights = [torch.zeros(share.shape[1], width or state.shape[1], dtype=torch.float64), *([drawn] if width else [])]
    biases = [torch.zeros(len(weight), dtype=torch.float64) for weight in weights]
    parameters = [tensor.clone().requires_grad_() for pair in zip(weights, biases, strict=True) for tensor in pair]
    # with a hidden layer there are many lowest points, none worth finding exactly
    steps, enough = (60, 1e-6) if width else (200, 1e-10)
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, tolerance_grad=1e-8, tolerance_change=enough,
                                  history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        seen = (state @ parameters[2].T + parameters[3]).relu() if width else state
        logits = seen @ parameters[0].T + torch.outer(one, parameters[1])
        value = missed(logits, share).mean() + penalty / 2 * sum(weight.square().sum() for weight in parameters[::2])
        value.backward()
        return value

    optimizer.step(loss)
    return [parameter.detach() for parameter in parameters]


def log_share(wins: Tensor) -> Tensor:
    """The logarithm of each result as a share of the best of its item. [k, e] -> [k, e] fp64"""
    return (wins.double() / wins.double().amax(1, keepdim=True)).log()


def missed(logits: Tensor, share: Tensor) -> Tensor:
    """-log of the share of the best result that an item can expect, by the gate's probabilities. [k, e] x 2 -> [k]

    It is 0 when all weight lies on the best experts, whichever of them that is. share  from `log_share`
    """
    return -(logits.log_softmax(1) + share).logsumexp(1)


def calibrated(site: Site, fit: Callable[[Site], list[Gate]]) -> Gate:
    """The gate of `fit` that misses least on prompts it has not seen, with the temperature that suits these.

    Each fold of the telling items is judged by gates that were fitted without it; prompts of one text stay in one fold.
    The temperature never changes which expert is first, only how much the others count. Where there are not two texts
    to tell apart, the first gate stands as it is.
    """
    gates, rows = fit(site), telling(site)
    texts = list(dict.fromkeys(site.prompts[j] for j in rows.tolist()))
    if len(texts) < 2:
        return gates[0]
    order = torch.randperm(len(texts), generator=site.generator("folds")) % FOLDS
    fold = dict(zip(texts, order.tolist(), strict=True))
    number = torch.tensor([fold.get(text, -1) for text in site.prompts])
    logits = torch.zeros(len(gates), *site.wins.shape, dtype=torch.float64)
    for k in sorted(set(fold.values())):
        held = number == k
        for i, gate in enumerate(fit(site.only((~held).nonzero()[:, 0]))):
            logits[i, held] = gate.logits(site.hidden[held]).double()
    judged = [temperature(part[rows], site.wins[rows]) for part in logits]
    best = min(range(len(gates)), key=lambda i: judged[i][1])
    return gates[best].cooled(judged[best][0], site.affine)


def temperature(logits: Tensor, wins: Tensor) -> tuple[float, float]:
    """What to divide these logits by so that their softmax misses least, and what it misses then, summed over items.

    One of 181 values from 0.01 to 10 000, of equals the one nearest to 1. An imagined item more, for which any expert
    is as likely the right one, keeps a gate that made no mistake from being certain. logits [k, e], wins [k, e] in 0..1
    """
    share = log_share(wins)
    free = logits > NEVER / 2  # no temperature brings an expert back that a gate has barred
    possible = ((wins > 0) & free).any(1)
    if not possible.any():
        return 1.0, 0.0
    logits, share, free = logits[possible].double(), share[possible], free[possible]

    def loss(at: float) -> float:
        scaled = logits / at
        return float(missed(scaled, share).sum() - scaled.log_softmax(1)[free].mean())

    best = min(TEMPERATURES, key=loss)
    return best, loss(best)
