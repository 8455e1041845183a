"""Federating by seeds: all agree on K directions beforehand, and only numbers travel, one for each of them.

    down  how far each direction has been gone in all: 4 K bytes and a head. From that a client replays the weights
    up    the slope of each step it took, or the sum for each direction where that is shorter, and a head

Which directions a client takes follows from the seed, the round and its name, so both sides know it. With `pro` they
are drawn by how steep each has been so far; only the server knows that, so that what is drawn travels too, at 2 or 4
bytes a step. What is agreed on before the first round (seed, rates, counts) is not in these messages.

Departs from the paper: a direction that nobody has taken counts as one of mean steepness.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glue.federate.exchange import Ask, Report, exchanged
from glue.federate.rounds import Terms
from glue.federate.spool import Spool
from glue.federate.update import Refused
from glue.files import write_aside

HEAD = struct.Struct("<4sHHIII16s")  # word, version, form, round, K, steps, digest of what was sent
WORD, VERSION = b"seed", 1
STATE, SUMS, STEPS, DRAWN = range(4)  # forms: sums of all; sums of a client; its slopes; STATE with drawn directions
FILE = "state.safetensors"


@dataclass(frozen=True)
class Agreed:
    """What all know before the first round.

    seeds  K, how many directions        steps  of a client in a round
    bound  the steepest slope that is taken
    """

    seed: int
    seeds: int
    steps: int
    pro: bool = False
    bound: float = 1e4


@dataclass(frozen=True)
class Gone:
    """Where a federation is.

    accumulators  [K] fp32, how far each direction was gone
    steepness     [K] fp64, sum of the sizes of all slopes found along it        times  [K], how many those were
    """

    accumulators: np.ndarray
    steepness: np.ndarray
    times: np.ndarray

    @staticmethod
    def nowhere(seeds: int) -> Gone:
        """In the beginning."""
        return Gone(np.zeros(seeds, np.float32), np.zeros(seeds), np.zeros(seeds, np.int64))

    @property
    def digest(self) -> bytes:
        """16 bytes of what clients are sent."""
        return hashlib.sha256(self.accumulators.tobytes()).digest()[:16]


def probabilities(gone: Gone) -> np.ndarray:
    """By how steep each direction was on average: softmax of that, stretched to 0..1; uniform at first. [K] fp64"""
    taken = gone.times > 0
    if not taken.any():
        return np.full(len(taken), 1 / len(taken))
    mean = np.full(len(taken), gone.steepness.sum() / gone.times.sum())
    np.divide(gone.steepness, gone.times, out=mean, where=taken)
    span = mean.max() - mean.min()
    weight = np.exp((mean - mean.min()) / span if span else np.zeros_like(mean))
    return weight / weight.sum()


def places(chances: np.ndarray, steps: int, seed: int, round: int, client: str) -> np.ndarray:
    """The directions that a client takes in a round, [steps], each drawn by its chance."""
    key = int.from_bytes(hashlib.sha256(f"{seed}|{round}|{client}".encode()).digest()[:16], "little")
    uniform = (np.random.Philox(key=key).random_raw(steps) >> np.uint64(11)) * 2.0**-53
    return np.minimum(np.searchsorted(np.cumsum(chances), uniform, side="right"), len(chances) - 1)


def told_state(agreed: Agreed, gone: Gone, round: int, client: str) -> bytes:
    """What a client is sent."""
    form, more = STATE, b""
    if agreed.pro:
        form = DRAWN
        drawn = places(probabilities(gone), agreed.steps, agreed.seed, round, client)
        more = drawn.astype(_counting(agreed.seeds)).tobytes()
    head = HEAD.pack(WORD, VERSION, form, round, agreed.seeds, agreed.steps, gone.digest)
    return head + gone.accumulators.astype("<f4").tobytes() + more


def heard_state(message: bytes, agreed: Agreed, client: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Round, accumulators [K] and the directions to take [steps], out of what a client was sent."""
    _, _, form, round, seeds, steps, _ = HEAD.unpack_from(message)
    accumulators = np.frombuffer(message, "<f4", seeds, HEAD.size).astype(np.float32)
    if form == DRAWN:
        return round, accumulators, np.frombuffer(message, _counting(seeds), steps, HEAD.size + 4 * seeds).astype(int)
    return round, accumulators, places(np.full(seeds, 1 / seeds), steps, agreed.seed, round, client)


def told_reply(message: bytes, slopes: np.ndarray, taken: np.ndarray) -> bytes:
    """A client's answer to what it was sent.

    slopes  [steps] fp32        taken  [steps], the directions
    """
    _, _, form, round, seeds, steps, digest = HEAD.unpack_from(message)
    if form == DRAWN or steps <= seeds:
        return HEAD.pack(WORD, VERSION, STEPS, round, seeds, steps, digest) + slopes.astype("<f4").tobytes()
    sums = np.bincount(taken, slopes.astype(np.float64), seeds)
    return HEAD.pack(WORD, VERSION, SUMS, round, seeds, steps, digest) + sums.astype("<f4").tobytes()


def heard_reply(reply: bytes, message: bytes, agreed: Agreed, client: str) -> tuple[np.ndarray, Gone]:
    """Sums for each direction, [K] fp64, and what they add to the steepness. Raises Refused for anything else."""
    asked, head = HEAD.unpack_from(message), HEAD.unpack_from(reply) if len(reply) >= HEAD.size else ()
    if not head or head[:2] != asked[:2] or head[3:] != asked[3:]:
        raise Refused("it is no answer to what was asked")
    form, wanted = head[2], agreed.steps if agreed.pro or agreed.steps <= agreed.seeds else agreed.seeds
    if len(reply) != HEAD.size + 4 * wanted or form != (STEPS if wanted == agreed.steps else SUMS):
        raise Refused(f"it has {len(reply)} bytes, and {HEAD.size + 4 * wanted} were agreed on")
    numbers = np.frombuffer(reply, "<f4", wanted, HEAD.size).astype(np.float64)
    if not np.isfinite(numbers).all():
        raise Refused("it holds numbers that are not finite")
    most = agreed.bound * (1 if form == STEPS else agreed.steps)
    if len(numbers) and (steepest := np.abs(numbers).max()) > most:
        raise Refused(f"it holds a slope of {steepest:.3g}; at most {most:g} is taken")
    if form == SUMS:
        return numbers, Gone.nowhere(agreed.seeds)
    taken = heard_state(message, agreed, client)[2]
    return (np.bincount(taken, numbers, agreed.seeds),
            Gone(np.zeros(0, np.float32), np.bincount(taken, np.abs(numbers), agreed.seeds),
                 np.bincount(taken, minlength=agreed.seeds)))


def combined(gone: Gone, replies: Mapping[str, tuple[np.ndarray, Gone]], examples: Mapping[str, int]) -> Gone:
    """One round further: sums weighted by examples, added in the order of names in fp64, rounded once."""
    total, steepness, times = gone.accumulators.astype(np.float64), gone.steepness.copy(), gone.times.copy()
    every = sum(examples[client] for client in replies)
    for client in sorted(replies):
        sums, more = replies[client]
        total += sums * (examples[client] / every)
        steepness, times = steepness + more.steepness, times + more.times
    return Gone(total.astype(np.float32), steepness, times)


def run(clients: Mapping[str, int], terms: Terms, agreed: Agreed, spool: Spool, *, ask: Ask,
        report: Report = lambda done, total, note: None) -> Gone:
    """All rounds that are not done; every reply is kept in the spool, so that nobody who has answered is asked again.

    clients  name -> examples, which is its weight
    ask      see `exchanged`
    Raises RunError where too few answer.
    """
    gone = Gone.nowhere(agreed.seeds)
    for round in range(1, terms.rounds + 1):
        if round not in spool.closed():
            asked = terms.asked(round, list(clients))
            messages = {client: told_state(agreed, gone, round, client) for client in asked}
            replies = exchanged(round, messages, clients, terms, spool, ask=ask, report=report,
                                hear=lambda reply, sent, client: heard_reply(reply, sent, agreed, client))
            gone = combined(gone, replies, clients)
            _write(gone, spool.draft(round))
            spool.close(round, list(replies), gone.digest.hex())
        gone = _read(spool.state(round))
    return gone


def _write(gone: Gone, folder: Path) -> None:
    from safetensors.numpy import save

    write_aside(folder / FILE, save(dict(vars(gone))))


def _read(folder: Path) -> Gone:
    from safetensors.numpy import load

    return Gone(**load((folder / FILE).read_bytes()))


def _counting(seeds: int) -> str:
    """The type of the number of a direction on its way."""
    return "<u2" if seeds <= 1 << 16 else "<u4"
