"""How large a member is: its parameters, and those that one token goes through."""

from __future__ import annotations

import re
from dataclasses import dataclass

from glue.checkpoint import Checkpoint
from glue.hub import locate
from glue.kinds import prompt, weights
from glue.kinds.compressed import AS_CHANGES, Compressed
from glue.kinds.frame import config_json
from glue.kinds.proxy import members
from glue.kinds.proxy import shared as one_set
from glue.kinds.text_mixture import EXPERTS, MODEL_TYPE
from glue.member import Member

OF_EXPERT = re.compile(r"(?:\bexpert_|\bexperts\.)(\d+)\.")  # what tensors of one expert among several are called
CHOSEN = ("experts_per_prompt", "num_experts_per_tok")  # in a configuration: how many of them answer


@dataclass(frozen=True)
class Size:
    """Numbers of parameters: all, and those that one generated token goes through."""

    whole: int
    active: int


def size(member: Member) -> Size:
    """Of a model, an adapter over its base, a mixture, or a proxy; reads headers only.

    A tied head counts once. An adapter counts with its base, as if merged, and a prompt beside its base. Experts
    that are stored as changes count as the whole models that they are in memory. Of a proxy all parts count; the small
    model counts once where the tuned one is an adapter over it. Raises ZooError for what has no weights,
    CheckpointError for what cannot be read.
    """
    if member.kind == "proxy":
        large, small, tuned = members(member)
        every = [size(part) for part in ((large, small) if one_set(tuned) else (large, small, tuned))]
        return Size(sum(part.whole for part in every), sum(part.active for part in every))
    if member.kind == "prompt" and member.base is not None:
        below, more = size(member.base), prompt.numel(member)
        return Size(below.whole + more, below.active + more)
    if member.kind != "mixture":
        whole = sum(header.numel for header in weights(member).headers.values())
        return Size(whole, whole)
    folder = locate(member.path)
    told = config_json(folder, member.name)
    if told.get("model_type") == MODEL_TYPE:
        parts = [sum(header.numel for header in Checkpoint(folder / EXPERTS / name).headers.values())
                 for name in told["experts"]]
        return Size(sum(parts), max(parts))  # the largest: which one answers, the text decides
    shared, experts = 0, dict[str, int]()
    stored = Checkpoint(folder)
    held = Compressed(stored, len(told["experts"])).headers if told.get("model_type") == AS_CHANGES else stored.headers
    for name, header in held.items():
        if found := OF_EXPERT.search(name):
            experts[found[1]] = experts.get(found[1], 0) + header.numel
        else:
            shared += header.numel
    asked = next((int(told[key]) for key in CHOSEN if key in told), 1)
    largest = sorted(experts.values(), reverse=True)[:asked]
    return Size(shared + sum(experts.values()), shared + sum(largest))
