"""Black-box prompt tuning by clients: each tries points of a small space, and all are judged as one generation.

    down  where good points are thought to be: mean, paths and covariance in fp64, 8 (3 d + d (d + 1) / 2) bytes, sigma,
          the generation, and a head
    up    the points that the client has tried and their losses in fp32, 4 popsize (d + 1) bytes a local generation; its
          sigma in each in fp64, 8 bytes; and a head. Points travel as steps from the mean that was sent, in units of
          the sigma that was sent, and what is judged is where these lead

A client goes so many generations of CMA-ES by itself. The server pools generation by generation: all points that
clients have tried in their first are one generation of CMA-ES, and so on. With one client that is CMA-ES as it would
go alone.

From their second generation on, clients draw from distributions of their own, whose means have walked apart. Their
pool is so much wider than sigma:  spread^2 = mean_i (sigma_ig^2 + (1 - 1/m) (sigma_i1^2 + ... + sigma_i(g-1)^2) / mu)
for m clients, where mu points in effect make the mean of one. The sum is the rule of the published code.

Departs from it, in which a client sends one point and its shape is thrown away, in that; and in what is compared:
losses of different data cannot be, so a loss counts as what it is below the mean of its client's generation. There a
sigma below 0.5 is to be raised, and is not; here neither. The paper's loss of spoilt inputs is left out.

Letters: d dimensions of the space, m clients, g local generations, k points of one.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glue.errors import RunError
from glue.federate.evolution import Belief, Pace, taught
from glue.federate.exchange import Ask, Report, exchanged
from glue.federate.rounds import Terms
from glue.federate.spool import Spool
from glue.federate.update import Refused
from glue.files import write_aside
from glue.kinds.draws import drawn

HEAD = struct.Struct("<4sHHIIII16s")  # word, version, form, round, d, k, local generations, digest of what was sent
WORD, VERSION = b"bptm", 1
STATE, REPLY = range(2)  # forms
WIDTH = struct.Struct("<dI")  # of a state: sigma, how often it was taught
FILE = "state.safetensors"
Loss = Callable[[int, np.ndarray], np.ndarray]  # local generation, points [k, d] -> losses [k], lower is better


@dataclass(frozen=True)
class Agreed:
    """What all know before the first round.

    dim          d                popsize  points that a client tries in a generation
    generations  of a client in a round            sigma  in the beginning, around 0
    bound        how many times farther from the mean than is usual a point may lie, and how many times wider than what
                 was sent a client's sigma may be
    """

    seed: int
    dim: int
    popsize: int
    generations: int = 1
    sigma: float = 1.0
    bound: float = 10.0


@dataclass(frozen=True)
class Tried:
    """What a client has tried: points [g, k, d] fp64, losses [g, k] fp32, sigmas [g] fp64."""

    points: np.ndarray
    losses: np.ndarray
    sigmas: np.ndarray


def state_bytes(dim: int) -> int:
    """Of a message down."""
    return HEAD.size + WIDTH.size + 8 * (3 * dim + dim * (dim + 1) // 2)


def reply_bytes(agreed: Agreed) -> int:
    """Of a message up."""
    return HEAD.size + agreed.generations * (8 + 4 * agreed.popsize * (agreed.dim + 1))


def told_state(agreed: Agreed, belief: Belief, round: int) -> bytes:
    """What a client is sent, the same for all."""
    upper = belief.covariance[np.triu_indices(agreed.dim)]
    numbers = np.concatenate([belief.mean, belief.drift, belief.way, upper]).astype("<f8").tobytes()
    body = WIDTH.pack(belief.sigma, belief.generation) + numbers
    return HEAD.pack(WORD, VERSION, STATE, round, agreed.dim, agreed.popsize, agreed.generations,
                     hashlib.sha256(body).digest()[:16]) + body


def heard_state(message: bytes) -> tuple[int, Belief]:
    """The round, and the belief that a client was sent. Raises Refused for what no server would send."""
    head = HEAD.unpack_from(message) if len(message) >= HEAD.size else ()
    if not head or head[:3] != (WORD, VERSION, STATE) or len(message) != state_bytes(head[4]):
        raise Refused("it is no state of a search")
    _, _, _, round, d, _, _, digest = head
    if hashlib.sha256(message[HEAD.size:]).digest()[:16] != digest:
        raise Refused("the state of the search was damaged on its way")
    sigma, generation = WIDTH.unpack_from(message, HEAD.size)
    numbers = np.frombuffer(message, "<f8", -1, HEAD.size + WIDTH.size).astype(np.float64)
    mean, drift, way, upper = np.split(numbers, [d, 2 * d, 3 * d])
    covariance = np.zeros((d, d))
    covariance[np.triu_indices(d)] = upper
    covariance = covariance + np.triu(covariance, 1).T
    return round, Belief(mean, sigma, covariance, drift, way, generation)


def searched(message: bytes, agreed: Agreed, client: str, loss: Loss) -> bytes:
    """A client's answer to what it was sent: so many generations of CMA-ES from there, by losses of its own data."""
    round, sent = heard_state(message)
    belief, tried, sigmas = sent, [], []
    for g in range(agreed.generations):
        points = belief.points(belief.steps(draws(agreed, round, client, g)))
        steps = ((points - sent.mean) / sent.sigma).astype(np.float32)
        points = sent.points(steps)  # what the server will know
        losses = np.asarray(loss(g, points), dtype=np.float32)
        sigmas.append(belief.sigma)
        tried.append(np.column_stack([steps, losses]))
        belief = taught(belief, points, losses)
    return told_reply(message, np.stack(tried), np.asarray(sigmas))


def draws(agreed: Agreed, round: int, client: str, generation: int) -> np.ndarray:
    """Standard normal numbers [k, d] that nobody else draws."""
    z = np.empty(agreed.popsize * agreed.dim, dtype=np.float32)
    return drawn(agreed.seed, round, f"bpt|{client}|{generation}", 0, z).reshape(agreed.popsize, agreed.dim)


def told_reply(message: bytes, tried: np.ndarray, sigmas: np.ndarray) -> bytes:
    """A client's answer: tried [g, k, d + 1], each step with its loss behind it; sigmas [g]."""
    word, version, _, *rest = HEAD.unpack_from(message)
    return HEAD.pack(word, version, REPLY, *rest) + sigmas.astype("<f8").tobytes() + tried.astype("<f4").tobytes()


def heard_reply(reply: bytes, message: bytes, agreed: Agreed) -> Tried:
    """What a client has tried. Raises Refused for anything that is no answer to the message, or none that is taken."""
    asked, head = HEAD.unpack_from(message), HEAD.unpack_from(reply) if len(reply) >= HEAD.size else ()
    if not head or head[:2] != asked[:2] or head[2] != REPLY or head[3:] != asked[3:]:
        raise Refused("it is no answer to what was asked")
    if len(reply) != reply_bytes(agreed):
        raise Refused(f"it has {len(reply)} bytes, and {reply_bytes(agreed)} were agreed on")
    g, k, d = agreed.generations, agreed.popsize, agreed.dim
    sigmas = np.frombuffer(reply, "<f8", g, HEAD.size).astype(np.float64)
    tried = np.frombuffer(reply, "<f4", -1, HEAD.size + 8 * g).astype(np.float32).reshape(g, k, d + 1)
    if not (np.isfinite(sigmas).all() and np.isfinite(tried).all()):
        raise Refused("it holds numbers that are not finite")
    _, belief = heard_state(message)
    if not ((sigmas > 0) & (sigmas <= agreed.bound * belief.sigma)).all():
        raise Refused(f"it holds a sigma of {sigmas[np.argmax(np.abs(sigmas))]:.3g}; {belief.sigma:.3g} was sent")
    steps, usual = tried[:, :, :d], np.sqrt(d) * np.cumsum(sigmas)[:, None] / belief.sigma
    far = belief.lengths(steps) / usual
    if (farthest := far.max()) > agreed.bound:
        raise Refused(f"it holds a point {farthest:.3g} times farther away than is usual; at most {agreed.bound:g} is "
                      "taken")
    return Tried(belief.points(steps), tried[:, :, d], sigmas)


def pooled(belief: Belief, replies: Mapping[str, Tried]) -> Belief:
    """One round further: each local generation of all who answered is one generation, in the order of names."""
    every = [replies[client] for client in sorted(replies)]
    sigmas = np.stack([tried.sigmas for tried in every])  # [m, g]
    generations, (k, d) = sigmas.shape[1], every[0].points.shape[1:]
    apart = (1 - 1 / len(every)) / Pace.of(k, d).chosen
    for g in range(generations):
        spread = float(np.sqrt((sigmas[:, g]**2 + apart * (sigmas[:, :g]**2).sum(1)).mean()))
        losses = [tried.losses[g].astype(np.float64) for tried in every]
        below = np.concatenate([some - some.mean() for some in losses])
        belief = taught(belief, np.concatenate([tried.points[g] for tried in every]), below, spread)
    return belief


def run(clients: Mapping[str, int], terms: Terms, agreed: Agreed, spool: Spool, *, ask: Ask,
        report: Report = lambda done, total, note: None) -> Belief:
    """All rounds that are not done; every reply is kept in the spool, so that nobody who has answered is asked again.

    clients  name -> examples
    ask      see `exchanged`
    Raises RunError where too few answer, and where the search has lost itself.
    """
    belief = Belief.around(np.zeros(agreed.dim), agreed.sigma)
    for round in range(1, terms.rounds + 1):
        if round not in spool.closed():
            message = told_state(agreed, belief, round)
            replies = exchanged(round, dict.fromkeys(terms.asked(round, list(clients)), message), clients, terms, spool,
                                ask=ask, report=report, hear=lambda reply, sent, _: heard_reply(reply, sent, agreed))
            belief = pooled(belief, replies)
            if not (np.isfinite(belief.covariance).all() and np.isfinite(belief.mean).all() and belief.sigma < 1e6):
                raise RunError(f"the search has lost itself in round {round}: sigma {belief.sigma:.3g}",
                               fix="raise popsize, or lower sigma")
            told = np.stack([replies[client].losses for client in sorted(replies)]).astype(np.float64)
            spool.note("judged", round=round, clients=sorted(replies), loss=float(told.mean()),
                       least=float(told.min()), sigma=belief.sigma)
            _write(belief, spool.draft(round))
            spool.close(round, list(replies), hashlib.sha256(told_state(agreed, belief, round)).hexdigest())
        belief = _read(spool.state(round))
    return belief


def _write(belief: Belief, folder: Path) -> None:
    from safetensors.numpy import save

    write_aside(folder / FILE, save({name: np.asarray(value) for name, value in vars(belief).items()}))


def _read(folder: Path) -> Belief:
    from safetensors.numpy import load

    told = load((folder / FILE).read_bytes())
    return Belief(told["mean"], float(told["sigma"]), told["covariance"], told["drift"], told["way"],
                  int(told["generation"]))
