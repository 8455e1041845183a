"""The atlas of a zoo: which members belong together, what each family comes from, and which pairs can be merged.

Told from weights, configurations and declared lineage alone; nothing is run, nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, isnan
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import xxhash

from glue.checkpoint import Weights
from glue.cluster.build import Build, differences
from glue.cluster.linkage import Linkage
from glue.cluster.linkage import families as linked
from glue.cluster.similarity import Part, Similarities, compatible, matrices, similarities, similarity
from glue.cluster.twins import FOUND, Heads, Permuted, alignment, best_match
from glue.cluster.verdict import NAN, ROUNDED, UNRELATED, WORDS, Facts, Verdict, shown, verdict
from glue.errors import CheckpointError, GlueError, ZooError, did_you_mean, one_line
from glue.hub import locate
from glue.kinds import weights
from glue.kinds.frame import config_json, framed
from glue.member import Member
from glue.steps import MODELS
from glue.zoo import Zoo

Progress = Callable[[list[str]], Iterable[str]]
LOOK = ("twin", "copy", "opposed", "against", "signs", "uneven", "build", "far")  # causes that people should look at
CAUTION = "Weights tell what can be averaged, not what is good: measure before you trust a member."
GAIN = 0.1  # of the cosine by which an order must bring two members nearer for them to be twins


@dataclass(frozen=True)
class Family:
    """Members whose weights are alike.

    root      what they come from, which need not be among them; where nothing tells, the one in the middle
    why       how that is known
    ancestor  whether something told
    """

    root: str
    why: str
    members: tuple[str, ...]
    ancestor: bool = False


@dataclass(frozen=True)
class Pair:
    """Two members, what is known of them, and the verdict."""

    one: str
    other: str
    facts: Facts
    verdict: Verdict


@dataclass(frozen=True)
class Atlas:
    """What is known of a zoo.

    similarity  [n, n] in the order of `names`; NaN between members of other shapes
    parts       that of each part: all, attention, mlp
    joinable    the same with NaN also where two could not be merged as they are; what the families come from
    left_out    name -> why it could not be looked at
    notes       what does not belong to a single pair
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    similarity: np.ndarray
    joinable: np.ndarray
    parts: Mapping[Part, np.ndarray]
    families: tuple[Family, ...]
    pairs: tuple[Pair, ...]
    part: Part
    linkage: Linkage
    threshold: float
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """How many pairs have each verdict."""
        found = Counter(pair.verdict.word for pair in self.pairs)
        return {word: found[word] for word in WORDS}

    def worth_a_look(self) -> list[Pair]:
        """Pairs that are not simply near or unrelated: twins and copies first, then what asks for care.

        Of several copies the first stands for all.
        """
        copies = [pair for pair in self.pairs if pair.verdict.cause == "copy"]
        others = {pair.other for pair in copies}
        told = [pair for pair in self.pairs if pair.verdict.cause in LOOK and pair.one not in others
                and (pair.other not in others or pair.verdict.cause == "copy")
                and (pair.verdict.cause != "build" or pair.verdict.word == "merge with care")]
        return sorted(told, key=lambda pair: (LOOK.index(pair.verdict.cause), -pair.facts.cosine))

    def remarks(self) -> list[str]:
        """Notes, and who was left out, in lines for people."""
        left = [f"left out: {name}: {why}" for name, why in self.left_out.items()]
        more = [f"left out: {len(left) - 3} more; --json says which and why"] if len(left) > 3 else []
        return [*(f"note: {note}" for note in self.notes), *left[:3], *more, CAUTION]

    def data(self) -> dict[str, Any]:
        """All of it as plain data; null for what is not known."""
        return {"members": [{"name": name, "kind": kind} for name, kind in zip(self.names, self.kinds, strict=True)],
                "part": self.part, "linkage": self.linkage, "threshold": self.threshold,
                "similarity": {part: [[_told(float(value)) for value in row] for row in rows]
                               for part, rows in self.parts.items()},
                "families": [asdict(family) for family in self.families], "verdicts": self.counts(),
                "pairs": [{"one": pair.one, "other": pair.other, **asdict(pair.verdict),
                           **{key: _told(value) for key, value in asdict(pair.facts).items()}} for pair in self.pairs],
                "notes": list(self.notes), "left_out": dict(self.left_out)}


@dataclass(frozen=True)
class Sight:
    """A member as it is looked at."""

    member: Member
    weights: Weights
    build: Build

    @property
    def name(self) -> str:
        """Of the member."""
        return self.member.name

    @property
    def heads(self) -> Heads:
        """Of its attention. Raises CheckpointError where its configuration does not say."""
        query = self.build.config.get("num_attention_heads")
        if not isinstance(query, int):
            raise CheckpointError(f"the configuration of '{self.name}' does not say how many heads it has")
        return Heads(query, self.build.config.get("num_key_value_heads") or query)


def atlas(zoo: Zoo, selector: str | None = None, *, base: str | None = None, threshold: float = 0.95,
          linkage: Linkage = "average", part: Part = "all", twins: bool = False, progress: Progress = iter) -> Atlas:
    """Look at all models and adapters of a zoo, or at those that a name, a group or `tag:x` selects.

    base       what changes are measured from; without it, each family's ancestor where that is looked at too
    threshold  of the cosine, for families and for what counts as near
    twins      also look for models that are the same but for the order of their neurons: minutes for large ones
    progress   wraps the names of the tensors of each pass
    Raises ZooError where fewer than two members can be looked at, and for words and numbers that mean nothing.
    """
    known_word("linkage", linkage, get_args(Linkage))
    known_word("part", part, get_args(Part))
    if not -1 <= threshold < 1:
        raise ZooError(f"a threshold of {threshold:g} separates nothing: cosines lie between -1 and 1",
                       fix="the paper's is 0.95")
    if base is not None:
        weights(zoo[base])  # raises where there is no such member, before anything is read
    sights, left_out, notes = looked_at(zoo, selector, part)
    if len(sights) < 2:
        told = "".join(f"\n  {name}: {why}" for name, why in left_out.items())
        raise ZooError(f"an atlas needs two models or adapters, and {len(sights)} can be read{told}",
                       fix="glue zoo list  shows what there is")
    found = similarities([sight.weights for sight in sights], progress=progress)
    alike = found.cosine[part]
    apart, joinable = _builds(sights, alike)
    keys = [f"{sight.weights.fingerprint}|{sight.name}" for sight in sights]  # so that no order of the zoo counts
    groups, middles = zip(*linked(joinable, keys, threshold, linkage), strict=True)
    families = [_family(sights, alike, group, middle) for group, middle in zip(groups, middles, strict=True)]
    changes = _changes(zoo, sights, groups, families, base, progress)
    pairs = []
    for (i, j), (hard, soft) in apart.items():
        facts = _facts(sights[i], sights[j], base, float(alike[i, j]), hard, soft)
        if (i, j) in changes:
            facts = _with_change(facts, *changes[i, j], part)
        if twins and not hard and facts.cosine <= threshold:
            facts = replace(facts, aligned=_aligned(sights[i], sights[j], facts.cosine, part))
        pairs.append(Pair(sights[i].name, sights[j].name, facts, verdict(facts, threshold=threshold)))
    return Atlas(tuple(sight.name for sight in sights), tuple(sight.member.kind for sight in sights), alike,
                 joinable, found.cosine, tuple(families), tuple(pairs), part, linkage, threshold, left_out,
                 (*notes, *_doubts(sights, alike)))


def known_word(what: str, word: str, known: Sequence[str]) -> None:
    """Raise ZooError for a word that is not one of those known."""
    if word not in known:
        raise ZooError(f"there is no {what} '{one_line(word)}'{did_you_mean(word, known)}")


# --- what is there ----------------------------------------------------------------------------------------------------

def sight(member: Member, known: dict[str, Mapping[str, int]] | None = None) -> Sight:
    """Open a member. Raises GlueError where it cannot be read.

    known  digest of a tokenizer file -> its tokens, so that members with one tokenizer share one
    """
    found = weights(member)
    folder = locate(framed(member).path)
    shapes = {name: header.shape for name, header in found.headers.items()}
    return Sight(member, found, Build(config_json(folder, member.name), shapes, _tokens(folder, known or {})))


def looked_at(zoo: Zoo, selector: str | None, part: Part) -> tuple[list[Sight], dict[str, str], list[str]]:
    """(members that can be compared, name -> why another cannot, notes)."""
    chosen: list[Member] = []
    for member in zoo.select(selector) if selector else zoo:
        chosen += [one for item in member.elements for one in item.members] if selector else []
        chosen += [member] if member.kind in MODELS else []
    found: dict[str, Sight] = {}
    left_out: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    known: dict[str, Mapping[str, int]] = {}
    for member in chosen:
        names.setdefault(member.path, []).append(member.name)
        if member.path in found:
            continue
        try:
            seen = sight(member, known)
            matrices(seen.weights, part, f"'{member.name}'")  # raises where there is nothing to compare
            found[member.path] = seen
        except GlueError as problem:
            left_out[member.name] = problem.what
    notes = [f"{first} is also called {', '.join(others)}" for path, called in names.items() if path in found
             for first, *others in [list(dict.fromkeys(called))] if others]
    return list(found.values()), left_out, notes


def _tokens(folder: Path, known: dict[str, Mapping[str, int]]) -> Mapping[str, int]:
    """Token -> number, from tokenizer.json; nothing where that is not there or says it in a way of its own."""
    import json

    try:
        data = (folder / "tokenizer.json").read_bytes()
        key = xxhash.xxh3_128(data).hexdigest()
        if key not in known:
            told = json.loads(data)
            listed = told["model"]["vocab"]
            tokens = dict(listed) if isinstance(listed, dict) else {each[0]: k for k, each in enumerate(listed)}
            known[key] = tokens | {each["content"]: each["id"] for each in told.get("added_tokens", ())}
        return known[key]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


# --- pairs ------------------------------------------------------------------------------------------------------------

def _builds(sights: Sequence[Sight], alike: np.ndarray) -> tuple[dict[tuple[int, int], tuple[str, tuple[str, ...]]],
                                                                   np.ndarray]:
    """(pair -> differences in build, similarities with NaN where no merge is possible as things are)."""
    joinable, told = alike.copy(), {}
    for i, one in enumerate(sights):
        for j, other in enumerate(sights[i + 1:], start=i + 1):
            hard, soft = told[i, j] = differences(one.build, other.build)
            if hard or compatible(one.weights, other.weights):
                joinable[i, j] = joinable[j, i] = np.nan
    return told, joinable


def _facts(one: Sight, other: Sight, base: str | None, cosine: float, apart: str, differs: tuple[str, ...]) -> Facts:
    """What is known of a pair, all but their changes from a base."""
    bases = [framed(sight.member).name for sight in (one, other) if sight.member.kind == "adapter"]
    if len(set(bases)) == 2:
        differs = (*differs, f"adapters over different bases ({bases[0]} and {bases[1]}): merge them as whole models, "
                             "their factors do not add up")
    types = [{header.dtype for header in sight.weights.headers.values()} for sight in (one, other)]
    above = {each.name for sight in (one, other) for each in sight.member.lineage()} | {base}
    is_base = next((name for name in (one.name, other.name) if name in above), "")
    return Facts(cosine, apart, differs, not apart and cosine > ROUNDED and _equal(one.weights, other.weights),
                 types[0] != types[1], is_base=is_base)


def _equal(one: Weights, other: Weights) -> bool:
    """Whether all weights are the same. Most that are not part at the first tensor."""
    return not compatible(one, other) and all(
        one.headers[name].dtype == other.headers[name].dtype and torch.equal(one[name], other[name]) for name in one)


def _changes(zoo: Zoo, sights: Sequence[Sight], groups: Sequence[Sequence[int]], families: Sequence[Family],
             base: str | None, progress: Progress) -> dict[tuple[int, int], tuple[str, Similarities, tuple[int, int]]]:
    """Pair -> (the base that they share, how alike changes from it are, their places in that)."""
    names = [sight.name for sight in sights]
    below: dict[str, list[int]] = {base: list(range(len(sights)))} if base is not None else {}
    for family, group in zip(families, groups, strict=True) if base is None else ():
        if family.ancestor and family.root in names:
            below.setdefault(family.root, []).extend(group)  # two families may come from one root
    told: dict[tuple[int, int], tuple[str, Similarities, tuple[int, int]]] = {}
    for name, members in below.items():
        others = sorted(k for k in members if names[k] != name)
        if len(others) > 1:
            source = sights[names.index(name)].weights if name in names else weights(zoo[name])
            found = similarities([sights[k].weights for k in others], base=source, progress=progress)
            told |= {(others[a], others[b]): (name, found, (a, b))
                     for a in range(len(others)) for b in range(a + 1, len(others))}
    return told


def _with_change(facts: Facts, base: str, found: Similarities, at: tuple[int, int], part: Part) -> Facts:
    """The facts with what is known of their changes from a base; as they were where these cannot be compared."""
    change, ratio = float(found.cosine[part][at]), float(found.ratio[at])
    if isnan(change) or found.agreement is None:
        return facts
    return replace(facts, base=base, change=change, agree=float(found.agreement[at]),
                   uneven=1 / ratio if ratio else float("inf"))


def _aligned(one: Sight, other: Sight, cosine: float, part: Part) -> float:
    """The cosine of hidden twins once one is in the order of the other; NaN where they are no twins."""
    try:
        if best_match(one.weights, other.weights) < FOUND:
            return NAN
        order = alignment(one.weights, other.weights, one.heads)
    except CheckpointError:  # not arranged as a Llama: there is nothing to look for
        return NAN
    found = float(similarity([one.weights, Permuted(other.weights, order)], part=part)[0, 1])
    return found if found > cosine + GAIN else NAN


# --- families ---------------------------------------------------------------------------------------------------------

def _family(sights: Sequence[Sight], alike: np.ndarray, group: Sequence[int], middle: int) -> Family:
    """A family with the member it likely comes from: declared, or nearest to all the others, or in the middle."""
    members = tuple(sights[k].name for k in group)
    if len(group) == 1:
        return Family(members[0], "alone", members)
    votes: Counter[str] = Counter()
    depths: dict[str, int] = {}
    for k in group:
        for depth, above in enumerate([sights[k].member, *sights[k].member.lineage()]):
            votes[above.name] += 1
            depths[above.name] = min(depth, depths.get(above.name, depth))
    name = min(votes, key=lambda name: (-votes[name], depths[name], name))
    if votes[name] > 1:
        inside = name in members
        central = inside and _nearest_to_all(alike, group, group[members.index(name)])
        told = f"declared by {votes[name] - inside} of the {len(group) - inside} " + (
            "others" if inside else "members, and not among them")
        return Family(name, told + (", and nearest to each of them" if central else ""), members, True)
    for k in group:
        if len(group) > 2 and _nearest_to_all(alike, group, k):
            return Family(sights[k].name, "nearest to each of the others, as an ancestor is", members, True)
    return Family(sights[middle].name, "in the middle: nearest to the others on average", members)


def _nearest_to_all(alike: np.ndarray, group: Sequence[int], centre: int) -> bool:
    """Whether every other member of a family is nearer to one than to anything else in it."""
    others = [k for k in group if k != centre]
    return all(alike[k, centre] > alike[k, j] for k in others for j in others if j != k)


def _doubts(sights: Sequence[Sight], alike: np.ndarray) -> list[str]:
    """Declared bases that the weights contradict."""
    names = [sight.name for sight in sights]
    told = []
    for i, sight in enumerate(sights):
        base = sight.member.base
        if base is not None and base.name in names and not alike[i, j := names.index(base.name)] >= UNRELATED:
            found = "other shapes" if isnan(alike[i, j]) else f"a cosine of {shown(float(alike[i, j]))}"
            told.append(f"{sight.name} declares {base.name} as its base, and their weights have {found}")
    return told


def _told(value: Any) -> Any:
    return None if isinstance(value, float) and not isfinite(value) else value
