"""Proposals and verdicts of protocol B as bytes.

Little-endian. A proposal: header, new tokens of the text [u32], draft [g, u32], log w [g + 1, v], and q [g, v] where
tokens are drawn. A verdict: how many drafted tokens stay and the token after them (both u32), and two numbers (f32) for
each place from which a token is written: the bound, and what of it is due to tokens that the server was not told.

Letters: g drafted tokens, v vocabulary.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glue.errors import GlueError, RunError, one_line
from glue.proxy.mixing import Sampling
from glue.proxy.writing import Verdict

HEADER = struct.Struct("<4sBBHIIIIddI")  # mark, version, bits, nothing, keep, new, g, v, temperature, top_p, top_k
ANSWER = struct.Struct("<II")
MARK, VERSION = b"GLPV", 1
_TYPES = {64: "<f8", 32: "<f4", 16: "<f2"}


@dataclass(frozen=True)
class Proposal:
    """What a device asks a server to judge.

    keep, new  the text before the draft is the first `keep` tokens of what the server has read, then `new`
    log_w      [g + 1, v]      q  [g, v], None where nothing is drawn; both as they travel
    """

    keep: int
    new: list[int]
    ids: list[int]
    log_w: Tensor
    q: Tensor | None
    sampling: Sampling


def proposal_size(new: int, g: int, v: int, bits: int, *, greedy: bool) -> int:
    """Bytes of a proposal."""
    return HEADER.size + 4 * (new + g) + (g + 1 + (0 if greedy else g)) * v * bits // 8


def verdict_size(accepted: int) -> int:
    """Bytes of a verdict."""
    return ANSWER.size + 8 * (accepted + 1)


def pack(proposal: Proposal) -> bytes:
    """A proposal as bytes."""
    bits, sampling = 8 * proposal.log_w.element_size(), proposal.sampling
    head = HEADER.pack(MARK, VERSION, bits, 0, proposal.keep, len(proposal.new), len(proposal.ids),
                       proposal.log_w.shape[-1], sampling.temperature, sampling.top_p, sampling.top_k)
    ids = np.array([*proposal.new, *proposal.ids], dtype="<u4")
    numbers = [part.numpy().astype(_TYPES[bits]).tobytes() for part in (proposal.log_w, proposal.q) if part is not None]
    return head + ids.tobytes() + b"".join(numbers)


def unpack(data: bytes, v: int) -> Proposal:
    """What `pack` made bytes of. Raises RunError for anything else, and for another vocabulary than one of v tokens."""
    if len(data) < HEADER.size:
        raise _wrong(f"{len(data)} bytes are no proposal")
    mark, version, bits, nothing, keep, new, g, size, temperature, top_p, top_k = HEADER.unpack_from(data)
    if (mark, version, nothing, size) != (MARK, VERSION, 0, v) or bits not in _TYPES:
        raise _wrong(f"its header is {data[:HEADER.size]!r}")
    try:
        sampling = Sampling(temperature, top_p, top_k)
    except GlueError as problem:
        raise _wrong(problem.what) from None
    if len(data) != proposal_size(new, g, v, bits, greedy=sampling.greedy):
        raise _wrong(f"it has {len(data)} bytes, which are not {new} tokens and a draft of {g}")
    ids = np.frombuffer(data, "<u4", new + g, HEADER.size)
    numbers = np.frombuffer(data, _TYPES[bits], -1, HEADER.size + 4 * (new + g)).reshape(-1, v)
    rows = torch.from_numpy(numbers.astype(_TYPES[bits][1:]))
    log_w, q = rows[:g + 1], None if sampling.greedy else rows[g + 1:]
    if (ids >= v).any() or bool((log_w.isnan() | (log_w == math.inf)).any()) or not log_w.isfinite().any(-1).all():
        raise _wrong("a token is none of the vocabulary's, or a number is none")
    if q is not None and not bool(((q >= 0) & q.isfinite()).all() & (q.double().sum(-1) > 0).all()):
        raise _wrong("what it was drawn from are no probabilities")
    return Proposal(keep, ids[:new].tolist(), ids[new:].tolist(), log_w, q, sampling)


def pack_verdict(verdict: Verdict) -> bytes:
    """A verdict as bytes."""
    pairs = np.array([verdict.bound, verdict.lacking], dtype="<f4").T
    return ANSWER.pack(verdict.accepted, verdict.token) + pairs.tobytes()


def unpack_verdict(data: bytes, g: int, v: int) -> Verdict:
    """What `pack_verdict` made bytes of, about a draft of g tokens of v. Raises RunError for anything else."""
    if len(data) < ANSWER.size:
        raise _wrong(f"{len(data)} bytes are no verdict")
    accepted, token = ANSWER.unpack_from(data)
    if accepted > g or token >= v or len(data) != verdict_size(accepted):
        raise _wrong(f"{accepted} of {g} tokens stay, and token {token} of {v} follows")
    bound, lacking = np.frombuffer(data, "<f4", -1, ANSWER.size).reshape(-1, 2).T.tolist()
    return Verdict(accepted, token, bound, lacking)


def _wrong(why: str) -> RunError:
    return RunError(f"what came for /v1/verify cannot be read: {one_line(why)}",
                    fix="see that both ends are glue of one version")
