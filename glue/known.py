"""What a zoo knows of a member by now: scores, likeness of what went in and lineage, told in its card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from glue.cards import CARD, DATA, GIVEN, card_from, source, told
from glue.errors import GlueError, ZooError, one_line
from glue.files import whole_lines
from glue.hub import locate
from glue.kinds.card import Alike, Card, Result, Source, card_text
from glue.lineage import Ancestor, lineage
from glue.member import FOLDER_NOTE, Member, Origin, Score
from glue.private import Places, paths
from glue.zoo import Zoo

MOST = 8        # models whose weights are compared where nothing is known of them yet
SHOWN = 16      # models in a table of cosines
ANCESTORS = 60  # lines of a lineage
SCORES = "scores.jsonl"


def readme(zoo: Zoo, name: str, *, similarity: bool = False) -> str:
    """The card of a member as others may read it: with all that is known by now, and no path of this machine.

    similarity  compare the weights of what went in where that was never done; of at most 8 models
    What was not made here keeps the card that people wrote for it. Raises ZooError for what has no card.
    """
    member = zoo[name]
    if member.kind in ("table", "group"):
        raise ZooError(f"'{name}' is a {member.kind}, which has no card", fix="name a model, an adapter or a dataset")
    written = locate(member.path, member.kind) / CARD
    if member.origin is None and written.is_file():
        text = written.read_text(encoding="utf-8", errors="replace")
        front = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        if found := next(paths(front[1]) if front else iter(()), ""):  # a name instead would be somebody else's there
            raise ZooError(f"the front matter of {written} names a path of this machine: {one_line(found)}",
                           fix="write the id it has on the hub, or take the line out")
        return Places.of(zoo).told(text)
    return Places.of(zoo).told(card_text(card_now(zoo, zoo.identified(member), similarity=similarity)))


def card_now(zoo: Zoo, member: Member, *, similarity: bool = False) -> Card:
    """The card of a member with everything the zoo knows about it."""
    tree = lineage(zoo, member.version)
    if member.origin is None:
        relation = "adapter" if member.kind == "adapter" else ""
        card = Card(member.name, "", (source(member.base),) if member.base else (), "", tags=("glue",),
                    relation=relation, licence=source(member).licence,
                    loads={"dataset": "", "adapter": "peft"}.get(member.kind, "transformers"),
                    about="Questions and answers" if member.kind == "dataset" else "A language model")
    else:
        card = card_from(member.name, member.origin, _inputs(zoo, member, member.origin), member.note,
                         member.kind)
        folder = locate(member.path, member.kind)
        if (folder / GIVEN).is_file():
            card = replace(card, config=(folder / GIVEN).read_text(encoding="utf-8"), config_file=GIVEN)
        if (folder / "experts").is_dir():  # a mixture by text is many models, and no library but ours reads it
            card = replace(card, loads="glue")
    above = _above(zoo, tree)
    models = tuple(replace(one, above=above.get(one.digest, ())) for one in card.models)
    base = next((one for one in models if card.base and one.digest == card.base.digest), card.base)
    lines = tuple(tree.lines())
    if len(lines) > ANCESTORS:
        lines = (*lines[:ANCESTORS], f"and {len(lines) - ANCESTORS} lines more;  glue zoo lineage  tells all")
    return replace(card, models=models, base=base, published=True, results=tuple(results(zoo, member)),
                   alike=likeness(zoo, models, similarity=similarity) if card.relation == "merge" else None,
                   lineage=lines if len(lines) > 1 else ())


def _inputs(zoo: Zoo, member: Member, origin: Origin) -> list[dict[str, Any]]:
    """What went in, as the folder of a product tells it; from the zoo where it was made before that was noted."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads((locate(member.path, member.kind) / FOLDER_NOTE).read_bytes())
        if note["key"] == origin.key:  # else the folder is that of another member, which a search found best
            return list(note["inputs"])
    found = [_found(zoo, name, digest) for role, digests in origin.inputs.items()
             for name, digest in zip(origin.names.get(role, digests), digests, strict=True)]
    return told(origin, found)


def _found(zoo: Zoo, name: str, digest: str) -> Member:
    for one in zoo.versions(name):
        with suppress(GlueError):
            if zoo.identified(one).digest == digest:
                return replace(one, digest=digest)
    return Member(name, "model", "/removed", digest=digest)


def _above(zoo: Zoo, tree: Ancestor) -> dict[str, tuple[str, ...]]:
    """Digest of what went in -> the nearest ids of the hub that it comes from, itself counted."""
    nodes = {(node.digest, node.step): node for node in tree if not node.again}

    def ids(node: Ancestor) -> Iterator[str]:
        on_hub = next((one for one in zoo.versions(node.name) if one.path.startswith("hub:")), None)
        if on_hub is not None:
            yield source(on_hub).name
            return
        for parent in nodes.get((node.digest, node.step), node).parents:
            if parent.kind not in DATA:
                yield from ids(parent)

    return {parent.digest: tuple(dict.fromkeys(ids(parent))) for parent in tree.parents}


def results(zoo: Zoo, member: Member) -> Iterator[Result]:
    """Every task that the member was measured on, as it was last measured, and the mean of each suite."""
    import numpy as np

    from glue.evaluate.statistics import average

    newest: dict[str, dict[tuple[str, str], Score]] = {}
    for line in whole_lines(zoo.folder / SCORES):
        if member.digest in line:  # most lines are about others, and long
            score = Score.from_dict(json.loads(line))
            if score.digest == member.digest:
                newest.setdefault(score.suite, {})[score.task, score.metric] = score
    for suite, scores in sorted(newest.items()):
        items = {key: np.asarray(score.results) for key, score in scores.items()}
        for (task, metric), score in sorted(scores.items()):
            found = average({task: items[task, metric]})
            yield Result(suite, task, metric, *found, len(score.results), score.chance, score.split in member.seen)
        tasks, metrics = {task for task, _ in scores}, {metric for _, metric in scores}
        if 1 < len(tasks) == len(scores):
            found = average({task: items[task, metric] for task, metric in scores})
            yield Result(suite, "", metrics.pop() if len(metrics) == 1 else "", *found,
                         sum(map(len, items.values())), float(np.mean([one.chance for one in scores.values()])),
                         any(one.split in member.seen for one in scores.values()))


def likeness(zoo: Zoo, models: Sequence[Source], *, similarity: bool = False) -> Alike | None:
    """How alike models are: from a cluster step that has compared them, or from sketches that are kept.

    similarity  where neither is there, compare their weights now; raises ZooError for more than 8, or where one is gone
    """
    digests = list(dict.fromkeys(one.digest for one in models))
    names = tuple(next(one.name for one in models if one.digest == digest) for digest in digests)
    if not 1 < len(digests) <= SHOWN:
        return None
    found = _compared(zoo, digests) or _sketched(zoo, digests)
    if found is None and similarity:
        found = _compared_now(zoo, names, digests)
    return Alike(names, *found) if found else None


Cosines = tuple[tuple[float | None, ...], ...]


def _compared(zoo: Zoo, digests: Sequence[str]) -> tuple[Cosines, str] | None:
    """From the folder of a cluster step over these and perhaps others; exact ones of whole weights first."""
    known = []
    for group in (one for newest in zoo for one in zoo.versions(newest.name)):
        origin = group.origin
        if group.kind != "group" or origin is None or not origin.step.startswith("cluster/") \
                or not set(digests) <= set(origin.inputs["members"]):
            continue
        with suppress(OSError, ValueError, KeyError, TypeError):
            note = json.loads((group.folder / "similarity.json").read_bytes())
            of = dict(zip(origin.names["members"], origin.inputs["members"], strict=True))
            place = {of[name]: k for k, name in enumerate(note["names"])}
            rows = note.get("cosine", {}).get(note["part"], note["similarity"])
            cosines = tuple(tuple(rows[place[one]][place[other]] for other in digests) for one in digests)
            how = f"of changes from {note['base']}, " if note["mode"] == "delta" else ""
            how += f"{'estimated' if 'error' in note else 'exact'}, as {group.name} compared {note['part']} matrices"
            known.append((note["mode"] == "delta", "error" in note, how, cosines))
    if not known:
        return None
    best = min(known)
    return best[3], best[2]


def _sketched(zoo: Zoo, digests: Sequence[str]) -> tuple[Cosines, str] | None:
    """From sketches, where there is one of each."""
    from glue.cluster.sketch import SURE, Sketch, compare

    files = [zoo.folder / "sketches" / f"{digest[:16]}.safetensors" for digest in digests]
    if not all(file.is_file() for file in files):
        return None
    with suppress(GlueError, OSError):
        cosine, error = compare([Sketch.load(file) for file in files])
        return _rows(cosine), f"estimated from samples, to within {SURE * float(_most(error)):.4f}"
    return None


def _compared_now(zoo: Zoo, names: Sequence[str], digests: Sequence[str]) -> tuple[Cosines, str]:
    from glue.cluster.similarity import similarity
    from glue.kinds import weights

    if len(digests) > MOST:
        raise ZooError(f"{len(digests)} models went in, and weights of at most {MOST} are compared for a card",
                       fix="glue zoo near  or a cluster step compares more, and cards know of it")
    by_digest: Mapping[str, Member] = {one.digest: one for one in map(zoo.identified, _readable(zoo))}
    gone = [name for name, digest in zip(names, digests, strict=True) if digest not in by_digest]
    if gone:
        raise ZooError(f"{gone[0]} is not what it was, or not there, so nothing can be compared with it",
                       fix="leave out --similarity")
    return _rows(similarity([weights(by_digest[digest]) for digest in digests])), "exact, compared for this card"


def _readable(zoo: Zoo) -> Iterator[Member]:
    for one in (one for newest in zoo for one in zoo.versions(newest.name)):
        if one.kind in ("model", "adapter"):
            with suppress(GlueError):
                zoo.identified(one)
                yield one


def _rows(matrix: Any) -> Cosines:
    return tuple(tuple(None if value != value else float(value) for value in row) for row in matrix)


def _most(matrix: Any) -> float:
    import numpy as np

    return float(np.nanmax(matrix))
