"""Kind "proxy": a model that is never trained, steered by what tuning has changed in a small one.

The folder holds config.json and, below pair/, the small model as it was and as it was tuned; `base` is the large model,
whatever runs. Where the tuned one is an adapter, both are one set of weights. Nothing in the folder points out of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glue.errors import CheckpointError, MethodError, ZooError, one_line
from glue.hub import locate
from glue.kinds import Dtype, Running, kinds, load
from glue.kinds.frame import config_json, framed, tokenizer_of
from glue.kinds.lora import CONFIG, Adapter
from glue.kinds.source import Vocabulary, vocabulary
from glue.kinds.text import longest
from glue.kinds.text_mixture import MODEL_TYPE as BY_TEXT
from glue.member import Member

if TYPE_CHECKING:
    from glue.kinds.modelling.proxied import Switched

MODEL_TYPE = "glue_proxy"
SMALL, TUNED = "pair/small", "pair/tuned"  # folders: the small model untuned, and tuned
BROKEN = "take the folder as it was written, or make the proxy again"


@dataclass(frozen=True)
class Pair:
    """What config.json of a proxy says.

    alpha       how much of what tuning has changed is added to the large model's logits
    vocabulary  digest of the tokens that all parts have
    """

    alpha: float
    vocabulary: str

    def as_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"model_type": MODEL_TYPE, "alpha": self.alpha, "small": SMALL, "tuned": TUNED,
                "vocabulary": self.vocabulary}

    @staticmethod
    def read(folder: Path, name: str) -> Pair:
        """What `as_dict` wrote. Raises CheckpointError for other folders, and for an alpha that is no number."""
        told = config_json(folder, name)
        for word, wanted in (("model_type", MODEL_TYPE), ("small", SMALL), ("tuned", TUNED)):
            if told.get(word) != wanted:
                raise CheckpointError(f"{folder}: config.json has {word}: {one_line(repr(told.get(word)), 80)}, "
                                      f"where a proxy has {wanted}", fix=BROKEN)
        alpha, digest = told.get("alpha"), told.get("vocabulary")
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 <= alpha < math.inf:
            raise CheckpointError(f"{folder}: config.json has alpha: {one_line(repr(alpha), 80)}, where a proxy has a "
                                  f"number of at least 0", fix=BROKEN)
        if not isinstance(digest, str):
            raise CheckpointError(f"{folder}: config.json does not tell the vocabulary", fix=BROKEN)
        return Pair(float(alpha), digest)


def members(proxy: Member) -> tuple[Member, Member, Member]:
    """The parts of a proxy as members: large, small and tuned, the last an adapter over the small one or a model."""
    framed(proxy)  # for its plainer error where nothing says what the large member is
    assert proxy.base is not None
    folder = locate(proxy.path)
    small = Member(f"{proxy.name}/small", "model", str(folder / SMALL))
    kind = "adapter" if (folder / TUNED / CONFIG).is_file() else "model"
    return proxy.base, small, Member(f"{proxy.name}/tuned", kind, str(folder / TUNED), base=small)


def by_text(member: Member) -> bool:
    """Whether a member is a mixture by text, which has no one vocabulary and no logits of its own."""
    return member.kind == "mixture" and config_json(locate(member.path), member.name).get("model_type") == BY_TEXT


def one_vocabulary(some: Sequence[Member]) -> Vocabulary:
    """The tokens that members have in common. Raises MethodError where the numbers of one's tokens mean others.

    Compares what tokenizers know, not what their folders are called; loads tokenizers and nothing else.
    """
    found = {member.name: vocabulary(tokenizer_of(member)) for member in some}
    first, *others = found.items()
    for name, other in others:
        if other.digest != first[1].digest:
            raise MethodError(f"'{first[0]}' has {first[1].size} tokens and '{name}' {other.size}, and their numbers "
                              f"mean other tokens: their logits cannot be added",
                              fix="take members with one tokenizer, such as those of one family")
    return first[1]


@kinds.add("proxy", source="arXiv:2401.08565")
def proxy(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """The large member with the pair around it; tokenizer, routes and generation settings are the large member's.

    Raises CheckpointError for a folder that is not as it was written, and MethodError for a large member whose
    vocabulary is another, or that has several.
    """
    from glue.kinds.modelling.proxied import TAKEN_FROM_LARGE, GlueProxiedForCausalLM, GlueProxyConfig

    told = Pair.read(locate(member.path), member.name)
    below, before, after = members(member)
    if by_text(below):
        raise ZooError(f"'{below.name}' is a mixture by text: it has no one vocabulary, and no logits to add to",
                       fix="make the proxy over a mixture at another level, or over a model")
    running = load(below, device=device, dtype=dtype)
    known = one_vocabulary([below, before, after])
    if known.digest != told.vocabulary:
        raise CheckpointError(f"'{member.name}' was made for a vocabulary with the digest {told.vocabulary[:8]}, and "
                              f"its parts have {known.digest[:8]}", fix=BROKEN)
    small, tuned, switch = pair(before, after, device=device, dtype=dtype)
    parts = [part for part in (running, small, tuned) if part is not None]
    _refuse_short_heads(member, known, parts)
    outer = running.model.config.get_text_config()
    shape: dict[str, Any] = {name: getattr(outer, name, None) for name in TAKEN_FROM_LARGE}
    shape["max_position_embeddings"] = min(longest(part.model, part.tokenizer) for part in parts)
    config = GlueProxyConfig(**shape, vocab_size=known.size)  # type: ignore[call-arg]
    model: Any = GlueProxiedForCausalLM(config, running.model, small.model, tuned.model if tuned else None,
                                        alpha=told.alpha, switch=switch)
    return Running(member, model.eval(), running.tokenizer, running.route, running.pinned)


def pair(small: Member, tuned: Member, *, device: str = "cpu",
         dtype: Dtype = "float32") -> tuple[Running, Running | None, Switched | None]:
    """The small member loaded, and the tuned one; or, where both are one set of weights, what switches between them."""
    from glue.kinds.modelling.proxied import Switched

    below = load(small, device=device, dtype=dtype)
    if not shared(tuned):
        return below, load(tuned, device=device, dtype=dtype), None
    from peft import PeftModel

    there = str(below.model.device)
    return below, None, Switched(PeftModel.from_pretrained(below.model, locate(tuned.path), torch_device=there).eval())


def shared(tuned: Member) -> bool:
    """Whether the tuned member is the small one with something beside it, that can be switched off.

    Biases and saved modules stand in the place of the small one's own; peft does not take them away again.
    """
    return tuned.kind == "adapter" and not Adapter(locate(tuned.path)).replaced


def _refuse_short_heads(member: Member, known: Vocabulary, parts: Sequence[Running]) -> None:
    for part in parts:
        rows = getattr(part.model.config.get_text_config(), "vocab_size", known.size)
        if rows < known.size:
            raise CheckpointError(f"'{member.name}': '{part.member.name}' has logits for {rows} tokens, and its "
                                  f"tokenizer knows {known.size}", fix="resize its head to its tokenizer first")
