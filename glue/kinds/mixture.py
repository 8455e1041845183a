"""Kind "mixture": several models behind a router, in one folder."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glue.errors import MethodError
from glue.hub import locate
from glue.kinds import QUANTISED, Dtype, Running, kinds, modelling
from glue.kinds.batches import Room
from glue.kinds.compressed import AS_CHANGES
from glue.kinds.device import settled
from glue.kinds.frame import config_json, tokenizer_of
from glue.kinds.model import model_of
from glue.kinds.text_mixture import MODEL_TYPE, by_text
from glue.member import Member

KNOWN = 20_000  # contexts whose routes are remembered: those of a suite, not all that a server was ever asked
BATCH_TOKENS = 16_384  # padded tokens that the reader of a mixture sees at once


@kinds.add("mixture")
def mixture(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """A mixture with its tokenizer; one that decides by prompt also tells the route of a context and can be pinned."""
    kind = config_json(locate(member.path), member.name).get("model_type")
    if kind == MODEL_TYPE:
        return by_text(member, device=device, dtype=dtype)
    register()
    loaded: Any = model_of(member, device, dtype) if kind != AS_CHANGES else _restored(member, device, dtype)
    tokenizer = tokenizer_of(member)
    if not hasattr(loaded, "gate"):
        return Running(member, loaded, tokenizer)  # decides token by token, inside: an ordinary model to everyone else
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    running = Running(member, loaded, tokenizer, None, loaded.pinned)
    running.route = routes_of(loaded, start or 0, lambda: running.room)
    return running


def _restored(member: Member, device: str, dtype: Dtype) -> Any:
    """A mixture that is stored as changes of one model: put together in the processor's memory, then moved."""
    if dtype in QUANTISED:
        raise MethodError(f"'{member.name}' is put together in memory, and {dtype} is for weights in files",
                          fix="say dtype: bfloat16, or mix without compress")
    return settled(model_of(member, "cpu", dtype), device)


def register() -> None:
    """Teach transformers' auto classes the mixtures in glue/kinds/modelling. Harmless when repeated."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    for file in sorted(Path(modelling.__path__[0]).glob("*_mixture.py")):
        module = import_module(f"{modelling.__name__}.{file.stem}")
        own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
        config, = (each for each in own if issubclass(each, PretrainedConfig))
        model, = (each for each in own if "config_class" in vars(each))
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def routes_of(model: Any, empty: int, room: Callable[[], Room]) -> Callable[[list[list[int]]], list[Hashable]]:
    """The function from contexts to routes: an expert index, or with several experts a prompt the tuple of weights.

    empty  the token that stands for a context of none
    room   tells how much is read at once
    """
    known: dict[tuple[int, ...], Hashable] = {}

    def route(contexts: list[list[int]]) -> list[Hashable]:
        asked = [tuple(context) or (empty,) for context in contexts]
        if len(known) > KNOWN:
            known.clear()
        new = [context for context in dict.fromkeys(asked) if context not in known]
        for k, row in left_read(room(), new, lambda ids, mask: model.gate(ids.to(model.device),
                                                                          mask.to(model.device)).cpu()):
            single = row.dim() == 1 and model.config.experts_per_prompt == 1
            known[new[k]] = int(row.argmax()) if single else tuple(row.flatten().tolist())
        return [known[context] for context in asked]

    return route


def left_read(room: Room, rows: Sequence[Sequence[int]], read: Callable[[Tensor, Tensor], Tensor],
              tokens: int = BATCH_TOKENS) -> Iterator[tuple[int, Tensor]]:
    """(place, what is read of it) of each row, in batches of rows of like length.

    read    token ids [b, s], mask [b, s] -> [b, ...]
    tokens  that a batch may have at most, padding included; fewer where there is room for less
    """
    for places, ids, mask in left_padded(rows, lambda: room.of(tokens)):
        found = room.read(range(len(places)), lambda some: list(read(ids[list(some)], mask[list(some)])))  # noqa: B023
        yield from zip(places, found, strict=True)


def left_padded(rows: Sequence[Sequence[int]],
                tokens: Callable[[], int] = lambda: BATCH_TOKENS) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batches of rows of like length: (places of these rows, token ids [b, s], mask [b, s]), padded on the left.

    tokens  tells how many the next batch may have, padding included
    """
    order = sorted(range(len(rows)), key=lambda k: -len(rows[k]))
    while order:
        longest = len(rows[order[0]])
        count = max(1, tokens() // longest)
        places, order = order[:count], order[count:]
        ids, mask = torch.zeros(2, len(places), longest, dtype=torch.long)
        for line, k in enumerate(places):
            ids[line, longest - len(rows[k]):] = torch.tensor(rows[k])
            mask[line, longest - len(rows[k]):] = 1
        yield places, ids, mask
