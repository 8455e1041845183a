"""Level "text": members of any architecture and tokenizer side by side; the text of a question chooses who answers it.

Experts are copied, not referred to: a member of the zoo may be removed or replaced, a folder may be moved or uploaded,
and what was measured has to stay what it was. Nor are files linked, since what is changed in one place would then
change in both. Tensors stream, so that a copy costs the disk and not the memory, and gets its digest on the way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from glue.checkpoint import Header, combined
from glue.errors import CheckpointError, MethodError, ZooError
from glue.files import write_aside
from glue.hub import locate
from glue.kinds import weights
from glue.kinds.features import text_features
from glue.kinds.frame import config_of, copy_frame, framed, tokenizer_of
from glue.kinds.text_mixture import EXPERTS, TextMixture
from glue.member import Member
from glue.mix.folder import router_tensors
from glue.mix.parts import Dev, Parts
from glue.mix.site import Gate, LossGate, Site
from glue.writer import SHARD, Writer

# one of these holds the tokens; a tokenizer_config.json alone does not
TOKENIZER = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken", "tekken.json")


def refuse(experts: Sequence[Member], dense: int) -> None:
    """Raise what keeps these members from answering side by side; their shapes and vocabularies may differ.

    Looks at configurations, names of files and headers, and loads nothing. Raises MethodError for layers that all
    should share and for what writes no text by itself, and CheckpointError or ZooError for a member without a
    configuration, a tokenizer or weights that can be read.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if dense:
        raise MethodError(f"dense_layers: {dense} would give the experts {dense} layers in common; at level text they "
                          "share nothing, not even the architecture", fix="leave dense_layers out, or choose another "
                                                                          "level")
    for expert in experts:
        config = config_of(expert)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise MethodError(f"'{expert.name}' is a {config.model_type}, which does not continue text",
                              fix="mix causal language models")
        folder = locate(framed(expert).path)
        if not any(file for pattern in TOKENIZER for file in folder.glob(pattern)):
            raise ZooError(f"'{expert.name}' has no tokenizer in {folder}", fix="put its tokenizer files into that "
                                                                                "folder")
        if not weights(expert).headers:
            raise CheckpointError(f"'{expert.name}' has no tensors", fix="download or write its weights again")


def sites(parts: Parts, dev: Dev) -> list[Site]:
    """The one place of a gate: before everything, where there is only text."""
    return [Site(tuple(expert.name for expert in parts.experts), text_features(dev.prompts), dev.wins.float(),
                 dev.tasks, list(dev.prompts), text_features, seed=dev.seed)]


def write(out: Path, parts: Parts, gates: Sequence[Gate | LossGate], *, shard_size: int = SHARD) -> str:
    """Write the experts and the gate into the folder `out`; returns the digest of all their weights.

    Holds one tensor at a time. Raises what `refuse` does, ZooError for a tokenizer that cannot be loaded, and
    MethodError for a gate that does not fit, before anything is written.
    """
    refuse(parts.experts, parts.dense)
    gate, = gates
    tensors = _tensors(gate, len(parts.experts))
    for expert in parts.experts:
        tokenizer_of(expert)
    sources = dict(zip(_folders(parts.experts), parts.experts, strict=True))
    digests = {}
    for name, expert in sources.items():
        folder, taken = out / EXPERTS / name, weights(expert)
        folder.mkdir(parents=True, exist_ok=True)
        with Writer(folder, taken.headers, shard_size=shard_size) as writer:
            for part in taken.headers:
                writer.write(part, taken[part])
            digests[f"{EXPERTS}/{name}"] = writer.close()
        copy_frame(expert, folder)
    if tensors:
        headers = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with Writer(out, headers) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
            digests["gate"] = writer.close()
    told = TextMixture(tuple(sources), "features" if tensors else "loss")  # written last: where it is, all is
    write_aside(out / "config.json", json.dumps(told.as_dict(), indent=2) + "\n")
    return combined(digests)


def _tensors(gate: Gate | LossGate, e: int) -> dict[str, Tensor]:
    """The numbers of a gate over text features, as its file has them; none of one that goes by loss."""
    if gate.top_k != 1:
        raise MethodError(f"{gate.top_k} experts would answer one question together, and at level text they write "
                          "different tokens", fix="set top_k to 1")
    if isinstance(gate, LossGate):
        return {}
    h = text_features([""]).shape[1]
    if len(gate.weight) != e or gate.mean.shape != (h,):
        raise MethodError(f"the gate judges {gate.mean.numel()} features for {len(gate.weight)} experts; a text has "
                          f"{h} and these are {e} experts", fix="make the gate from the site of level text")
    return router_tensors(gate, "router")


def _folders(experts: Sequence[Member]) -> list[str]:
    """A folder for each expert, called after it; no two the same, also where letters have no case."""
    found: list[str] = []
    for expert in experts:
        plain = re.sub(r"[^A-Za-z0-9._+-]", "_", expert.short).lstrip("._+-") or "expert"
        taken, name, n = {other.lower() for other in found}, plain, 1
        while name.lower() in taken:
            n += 1
            name = f"{plain}-{n}"
        found.append(name)
    return found
