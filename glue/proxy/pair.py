"""The folder of a proxy: a small model as it was and as it was tuned, copied side by side.

Both are copied, not referred to: a member of the zoo may be replaced, a folder moved or uploaded, and what was measured
has to stay what it was. The large member is not copied; the proxy sits on it. Tensors stream, one at a time.
"""

from __future__ import annotations

import json
from pathlib import Path

from glue.checkpoint import SINGLE, Checkpoint, Weights, combined
from glue.errors import MethodError
from glue.files import write_aside
from glue.hub import locate
from glue.kinds import weights
from glue.kinds.frame import copy_frame
from glue.kinds.lora import CONFIG, WEIGHTS, Adapter
from glue.kinds.proxy import SMALL, TUNED, Pair, by_text, one_vocabulary
from glue.member import Member
from glue.writer import SHARD, Writer

OURS = "../small"  # where the copied adapter's base is, seen from it


def refuse(large: Member, tuned: Member, small: Member) -> None:
    """Raise what keeps these members from being one proxy; loads tokenizers and reads headers, and no weights.

    Raises MethodError for vocabularies that differ, a mixture by text, and an adapter that sits on another small
    member; CheckpointError or ZooError for a member whose files cannot be read.
    """
    if by_text(large):
        raise MethodError(f"'{large.name}' is a mixture by text: it has no one vocabulary, and no logits to add to",
                          fix="make the proxy over a mixture at another level, or over a model")
    if tuned.kind != "model" and (tuned.base is None or not same(tuned.base, small)):
        sits = f"on '{tuned.base.name}'" if tuned.base else "on nothing"
        raise MethodError(f"'{tuned.name}' sits {sits}, and '{small.name}' is named as what it was tuned from",
                          fix="leave small out: it is then what the tuned member sits on")
    if same(tuned, small):
        raise MethodError(f"'{tuned.name}' stands for the tuned member and for the untuned one; they would cancel out",
                          fix="name a tuned member, such as what a federate, lora or tune step leaves")
    for member in (small, tuned):
        if not weights(member).headers:
            raise MethodError(f"'{member.name}' has no tensors", fix="download or write its weights again")
    one_vocabulary([large, small, tuned])


def same(one: Member, other: Member) -> bool:
    """Whether two members are one thing, whatever their names."""
    return one.digest == other.digest if one.digest and other.digest else one.path == other.path


def write(out: Path, *, large: Member, tuned: Member, small: Member, alpha: float, shard_size: int = SHARD) -> str:
    """Write a proxy over `large` into the folder `out`; returns the digest of what is below pair/.

    An adapter stays one; whatever else the tuned member is becomes a model. Raises what `refuse` does, before anything
    is written.
    """
    refuse(large, tuned, small)
    told = Pair(alpha, one_vocabulary([large, small]).digest)
    digests = {SMALL: _copied(small, out / SMALL, shard_size)}
    if tuned.kind == "adapter":
        digests[TUNED] = _copied_adapter(tuned, out / TUNED)
    else:
        digests[TUNED] = _copied(tuned, out / TUNED, shard_size)
    tell(out, told)  # last: where it is, all is
    return combined(digests)


def tell(out: Path, told: Pair) -> None:
    """Put config.json into the folder of a proxy."""
    write_aside(out / "config.json", json.dumps(told.as_dict(), indent=2) + "\n")


def _copied(member: Member, folder: Path, shard_size: int) -> str:
    digest = _streamed(weights(member), folder, shard_size)
    copy_frame(member, folder)
    return digest


def _copied_adapter(member: Member, folder: Path) -> str:
    adapter = Adapter(locate(member.path))
    size = sum(header.nbytes for header in adapter.tensors.headers.values()) + 1  # peft reads one file
    digest = _streamed(Checkpoint(adapter.folder / WEIGHTS), folder, size, single=WEIGHTS)
    told = {**adapter.config, "base_model_name_or_path": OURS, "revision": None}
    write_aside(folder / CONFIG, json.dumps(told, indent=2, sort_keys=True) + "\n")
    return digest


def _streamed(source: Weights, folder: Path, shard_size: int, single: str = SINGLE) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder, source.headers, shard_size=shard_size, single=single) as writer:
        for name in source.headers:
            writer.write(name, source[name])
        return writer.close()
