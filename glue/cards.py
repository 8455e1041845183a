"""Cards of products: what a step has left, told to people and to the hub from its origin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glue.errors import ZooError
from glue.family import marks
from glue.files import write_aside
from glue.hub import address, locate
from glue.kinds.card import Card, Source, card_text
from glue.kinds.licence import clashing, licence_of
from glue.member import FOLDER_NOTE, Member, Origin
from glue.steps import Takes

if TYPE_CHECKING:
    from glue.plan import Plan, Task

# kind -> the package that loads it, where it is not transformers
LOADS = {"adapter": "peft", "dataset": "", "seed_history": "glue", "tensor_train": "glue", "proxy": "glue",
         "prompt": "peft"}
FACTS = ("revision", "digest", "licence")
DATA = ("dataset", "table")
Terms = Mapping[str, tuple[str, ...]]  # name of a member -> its licences
CARD, GIVEN = "README.md", "mergekit_config.yml"  # where the latter lies, the step has written a card of its own
# step -> (relation that the hub knows, what was done, what it is, tags)
SAID: Mapping[str, tuple[str, str, str, tuple[str, ...]]] = {
    "merge": ("merge", "Merge", "A merge of pre-trained language models", ("merge",)),
    "search": ("merge", "Search", "A merge of some of several language models, as a search chose them on dev items",
               ("merge",)),
    "mix": ("merge", "Mixture", "Language models joined by a router", ("merge", "moe")),
    "tune": ("finetune", "Tuning", "A language model that was taught more", ()),
    "lora": ("adapter", "Tuning", "A LoRA adapter over a language model", ("lora",)),
    "extract": ("adapter", "Extraction", "What a language model changes of its base, as a LoRA adapter", ("lora",)),
    "kseed": ("finetune", "Tuning", "A language model tuned without gradients, as the history of its seeds", ()),
    "bpt": ("adapter", "Tuning", "A soft prompt over a language model, searched by clients with forward passes alone",
            ("prompt-tuning", "federated")),
    "tensor_train": ("adapter", "Conversion", "Changes of a language model, as tensor trains", ()),
    "tt_lora": ("adapter", "Tuning", "An adapter of tensor trains over a language model", ()),
    "federate": ("finetune", "Federation", "What clients that keep their data taught a language model together",
                 ("federated",)),
    "refold": ("finetune", "Federation", "What clients that keep their data taught a language model together",
               ("federated",)),
    "proxy": ("", "Steering", "A large language model steered by what tuning has changed in a small one", ()),
    "distill": ("finetune", "Distillation", "A language model taught to say what another one says", ("distillation",)),
    "pretrain": ("", "Training", "A language model trained from nothing", ()),
    "mergekit": ("merge", "Merge", "A merge of pre-trained language models", ("mergekit", "merge")),
    "import": ("", "Import", "Questions and answers that others have written", ()),
    "data": ("", "Making", "Questions and answers", ())}
OTHERS = ("", "Origin", "A language model", ())


def source(member: Member) -> Source:
    """A member as cards and notes name it: by its id where it is on the hub, with the commit that was read."""
    name, revision, licence = member.name, "", member.licence
    hub = member.path.startswith("hub:")
    found = address(member.path, member.kind) if hub else None
    with suppress(ZooError):  # what was removed since is named all the same
        folder = locate(member.path, member.kind)
        licence = licence or licence_of(folder)
        if found:
            name, revision = found.name, found.commit
    return Source(name, hub, revision, member.digest, licence)


def told(origin: Origin, inputs: Sequence[Member]) -> list[dict[str, Any]]:
    """The inputs of a product as its folder records them, each with the roles that it had."""
    found: list[dict[str, Any]] = []
    for member in dict.fromkeys(inputs):
        roles = [role for role, digests in origin.inputs.items() if member.digest in digests]
        one = source(member)
        found.append({"name": member.name, "kind": member.kind, "roles": roles, "digest": member.digest,
                      "hub": one.name if one.hub else None, "revision": one.revision, "licence": one.licence})
    return found


def licence_remark(name: str, inputs: Sequence[Member]) -> str:
    """What whoever makes this should know about licences; nothing where they go together."""
    return _remark(name, _terms(inputs))


def licence_remarks(plan: Plan) -> list[str]:
    """The same of a whole plan, once where licences come together and not again for what is made of that.

    A task that waits for others stands for what those are made of, and what it names beside them. Nothing is made of
    a group as a whole before some line takes all of it, so a group is no place where licences come together.
    """
    below: dict[str, Terms] = {}
    groups: set[str] = set()
    found = []
    for task in plan:
        if task.makes in DATA:
            continue
        inputs = task.inputs or tuple(_there(task, plan))
        whole = [_terms([member]) for member in inputs if member.kind != "group"]
        whole += [below[word] for word in task.waits_for if word in below and word not in groups]
        parts = [_terms([member]) for member in inputs if member.kind == "group"]
        parts += [below[word] for word in task.waits_for if word in groups]
        below[task.name] = {owner: words for parent in whole + parts for owner, words in parent.items()}
        clash = set(clashing(_words(below[task.name])))
        if task.makes == "group":
            groups.add(task.name)
        elif clash and not any(clash <= set(clashing(_words(parent))) for parent in whole):
            found.append(_remark(task.name, below[task.name]))
    return found


def _there(task: Task, plan: Plan) -> Iterator[Member]:
    """What a task that waits names of what is there already."""
    for name, info in (task.choice.method.parameters if task.choice else {}).items():
        words = task.line.params.get(name) if any(isinstance(mark, Takes) for mark in marks(info)) else None
        for word in [words] if isinstance(words, str) else words or ():  # the keys, where each has a share
            if isinstance(word, str) and (word.startswith("tag:") or word in plan.zoo):
                yield from plan.zoo.select(word)


def _terms(inputs: Sequence[Member]) -> Terms:
    """Name -> its licences, several of a product whose own parents had several; data has no say."""
    named = map(source, dict.fromkeys(member for member in inputs if member.kind not in DATA))
    return {one.name: tuple(one.licence.lower().split(", ")) for one in named if one.licence}


def _words(terms: Terms) -> list[str]:
    return [word for words in terms.values() for word in words]


def _remark(name: str, terms: Terms) -> str:
    clash = clashing(_words(terms))
    if not clash:
        return ""
    whose = [f"{licence} ({', '.join(owner for owner, words in terms.items() if licence in words)})"
             for licence in clash]
    return f"{name}: licences {' and '.join(whose)} bind what is made of them, each with terms of its own; read them"


def write_card(folder: Path, name: str, origin: Origin, inputs: Sequence[Member], note: str, kind: str) -> None:
    """Put a card beside what a step has left, unless the step has done so itself from a config."""
    if not (folder / GIVEN).exists():
        write_aside(folder / CARD, card_text(card_of(name, origin, inputs, note, kind)))


def card_of(name: str, origin: Origin, inputs: Sequence[Member], note: str, kind: str) -> Card:
    """The card of what a step makes of these members: a member of this kind."""
    return card_from(name, origin, told(origin, inputs), note, kind)


def card_from(name: str, origin: Origin, inputs: Sequence[Mapping[str, Any]], note: str, kind: str) -> Card:
    """The card of what a step has made, its inputs as `told` tells them."""
    step = origin.step.partition("/")[0]
    relation, part, about, tags = SAID.get(step, OTHERS)
    if relation == "finetune" and kind == "adapter":
        relation = "adapter"
    sources = [(Source(one["hub"] or one["name"], bool(one["hub"]), *(one[word] for word in FACTS)), one)
               for one in inputs]
    base = next((found for found, one in sources if "base" in one["roles"]), None)
    return Card(name, f"Step {origin.step}: {note}", tuple(found for found, one in sources if one["kind"] not in DATA),
                json.dumps({"step": origin.step, "seed": origin.seed, **origin.params}, indent=1, ensure_ascii=False),
                base=base if relation == "merge" else None, seed=origin.seed,
                command="glue reproduce . --zoo ZOO_YAML", config_file=FOLDER_NOTE, tags=("glue", *tags),
                relation=relation, loads=LOADS.get(kind, "transformers"), about=about, part=part,
                data=tuple(found for found, one in sources if one["kind"] == "dataset"),
                needs="a zoo that holds what is named above, under any name")
