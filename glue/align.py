"""Aligning: a member whose neurons lie in another order than its twin's, written out in that twin's order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from glue.atlas import sight
from glue.cluster.build import differences
from glue.cluster.similarity import similarity
from glue.cluster.twins import FOUND, Permuted, alignment, best_match
from glue.errors import ZooError
from glue.files import publish, write_aside
from glue.kinds.frame import copy_frame
from glue.member import FOLDER_NOTE
from glue.writer import Writer
from glue.zoo import Zoo


def align(zoo: Zoo, name: str, to: str, out: Path) -> dict[str, Any]:
    """Write member `name` into a new folder with its neurons and heads in the order of member `to`.

    The same numbers in other places: what it computes stays. An adapter comes out as a model. Returns what was done as
    plain data. Raises ZooError where the two are no twins or the folder is there, CheckpointError for what is no Llama.
    """
    one, other = zoo.identified(zoo[to]), zoo.identified(zoo[name])
    ours, theirs = sight(one), sight(other)
    hard, _ = differences(ours.build, theirs.build)
    if hard:
        raise ZooError(f"'{name}' cannot be aligned to '{to}': {hard}",
                       fix="only models of one build can be twins;  glue zoo atlas --twins  finds those that are")
    if out.exists():
        raise ZooError(f"{out} is there already", fix="choose another folder")
    match = best_match(ours.weights, theirs.weights)
    if match < FOUND:
        raise ZooError(f"'{name}' is no twin of '{to}': its neurons resemble theirs by {match:.2f}, no more than a "
                       "stranger's do", fix="glue zoo atlas --twins  finds those that are")
    turned = Permuted(theirs.weights, alignment(ours.weights, theirs.weights, ours.heads))
    before, after = (float(similarity([ours.weights, each])[0, 1]) for each in (theirs.weights, turned))
    draft = out.absolute().with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        with Writer(draft, turned.headers) as writer:
            for tensor in turned:
                writer.write(tensor, turned[tensor])
            digest = writer.close()
        copy_frame(other, draft)
        told = {"kind": "model", "aligned": other.version, "to": one.version, "weights": digest}
        write_aside(draft / FOLDER_NOTE, json.dumps(told, indent=1))
        publish(draft, out.absolute())
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return {"out": str(out), "aligned": name, "to": to, "cosine_before": before, "cosine_after": after,
            "reordered": len(turned.order), "weights": digest}
