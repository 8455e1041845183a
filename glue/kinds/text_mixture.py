"""Mixtures by text: members of any architecture and tokenizer, of which the text of a question chooses one to answer.

The folder holds config.json, the gate (model.safetensors, none for the router that goes by loss), and below experts/
one ordinary model folder for each expert, with its own tokenizer. Nothing in it points out of it, and nothing is code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, overload

import torch

from glue.checkpoint import Checkpoint
from glue.errors import CheckpointError, ZooError, one_line
from glue.hub import locate
from glue.kinds import Dtype, Running, load
from glue.kinds.batches import Room
from glue.kinds.features import DEFINITION, text_features
from glue.kinds.frame import config_json
from glue.kinds.text import losses
from glue.member import Member

MODEL_TYPE = "glue_text_mixture"
EXPERTS = "experts"  # the folder below which each expert has its own
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*", re.ASCII)  # what an expert's folder may be called
Router = Literal["features", "loss"]  # a gate over text features, or the least loss of the prompt
BROKEN = "take the folder as it was written, or mix again"


@dataclass(frozen=True)
class TextMixture:
    """What config.json of a mixture by text says: the folders of its experts in their order, and who chooses."""

    experts: tuple[str, ...]
    router: Router

    def as_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        told = {"model_type": MODEL_TYPE, "experts": list(self.experts), "router": self.router}
        return {**told, "features": DEFINITION} if self.router == "features" else told

    @staticmethod
    def read(folder: Path, name: str) -> TextMixture:
        """What `as_dict` wrote. Raises CheckpointError for names that are no plain names, and unknown words."""
        told = config_json(folder, name)
        experts, router = told.get("experts"), cast(Router, told.get("router"))
        if not isinstance(experts, list) or len(experts) < 1 or len({str(expert) for expert in experts}) < len(experts):
            raise CheckpointError(f"{folder}: config.json does not list the experts, each once", fix=BROKEN)
        for expert in experts:
            if not isinstance(expert, str) or not PLAIN.fullmatch(expert):
                raise CheckpointError(f"{folder}: config.json names an expert {one_line(repr(expert))}, which cannot "
                                      f"be a folder below {EXPERTS}/", fix="do not trust this mixture")
        if router not in get_args(Router):
            raise CheckpointError(f"{folder}: config.json has the router {one_line(repr(router))}; known are "
                                  f"{', '.join(get_args(Router))}", fix=BROKEN)
        if router == "features" and told.get("features") != DEFINITION:
            raise CheckpointError(f"{folder} was made for the text features {one_line(repr(told.get('features')))}; "
                                  f"this glue has {DEFINITION}", fix="use the glue that made it, or mix again")
        return TextMixture(tuple(experts), router)


def by_text(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """A mixture by text, with everything checked that files tell; each expert is loaded when it is first asked.

    Raises CheckpointError or ZooError for a folder that is not as it was written.
    """
    folder = locate(member.path)
    told = TextMixture.read(folder, member.name)
    for name in told.experts:
        place = folder / EXPERTS / name
        config_json(place, f"{member.name}: {name}")
        Checkpoint(place)
    experts = Experts(member, folder, told.experts, device, dtype)
    nobody: Any = _Nobody(member.name)
    choose = _by_loss(experts) if told.router == "loss" else _by_features(folder, len(experts))
    return Running(member, nobody, nobody, choose=choose, experts=experts)


class Experts(Sequence[Running]):
    """The experts of a mixture by text, each loaded when it is first asked for: one answer needs one of them.

    room  what all of them share, where the mixture has been told how much is read at once
    """

    room: Room | None = None

    def __init__(self, member: Member, folder: Path, names: Sequence[str], device: str, dtype: Dtype):
        self.members = [Member(f"{member.name}/{name}", "model", str(folder / EXPERTS / name)) for name in names]
        self._device, self._dtype = device, dtype
        self._loaded: dict[int, Running] = {}

    @overload
    def __getitem__(self, i: int) -> Running: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Running]: ...

    def __getitem__(self, i: int | slice) -> Running | Sequence[Running]:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        k = range(len(self))[i]
        if k not in self._loaded:
            self._loaded[k] = load(self.members[k], device=self._device, dtype=self._dtype)
            if self.room is not None:
                self._loaded[k].room = self.room
        return self._loaded[k]

    def __len__(self) -> int:
        return len(self.members)


def _by_features(folder: Path, e: int) -> Callable[[Sequence[str]], list[int]]:
    """The gate in a folder: a text -> the expert of the largest logit, the first of equals."""
    file, h = Checkpoint(folder), DEFINITION["width"]
    inner = file.headers.get("router.inner.bias")
    w = inner.shape[0] if inner and len(inner.shape) == 1 else 0
    wanted = {"mean": (h,), "scale": (h,), "outer.weight": (e, w or h), "outer.bias": (e,)}
    wanted |= {"inner.weight": (w, h), "inner.bias": (w,)} if w else {}
    found = {name.removeprefix("router."): header.shape for name, header in file.headers.items()}
    if found != wanted:
        raise CheckpointError(f"{folder}: its gate has {found}, {e} experts ask for {wanted}", fix=BROKEN)
    gate = {name: file[f"router.{name}"].double() for name in wanted}
    if any(bool(tensor.isnan().any()) for tensor in gate.values()) or not bool((gate["scale"] > 0).all()):
        raise CheckpointError(f"{folder}: its gate holds NaN, or a scale that is not above 0", fix=BROKEN)

    def expert_of(text: str) -> int:
        state = (text_features([text])[0].double() - gate["mean"]) / gate["scale"]
        if w:
            state = (gate["inner.weight"] @ state + gate["inner.bias"]).relu()
        return int((gate["outer.weight"] @ state + gate["outer.bias"]).argmax())

    # one by one: in a batch sums may be rounded otherwise, and no text may choose by its company
    return lambda texts: [expert_of(text) for text in texts]


def _by_loss(experts: Experts) -> Callable[[Sequence[str]], list[int]]:
    """Every expert reads a text; who knows it best answers, the first of equals."""
    def choose(texts: Sequence[str]) -> list[int]:
        return torch.stack([losses(expert, texts) for expert in experts], dim=1).argmin(1).tolist()

    return choose


class _Nobody:
    """Stands where others have their one model or tokenizer, and says so to whoever asks it anything."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, word: str) -> Any:
        if word.startswith("__"):  # what Python itself looks for
            raise AttributeError(word)
        raise ZooError(f"'{self._name}' is a mixture by text: it has no one model and no one tokenizer that has "
                       f"'{word}'", fix="ask the expert of a text, running.answering(text)")
