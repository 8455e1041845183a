"""The card of a model that was made of others: what the hub reads of it, and what people need to make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from glue import __version__
from glue.errors import one_line
from glue.kinds.licence import agreed, front_matter

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
SEEN = " \\*"  # an asterisk that is no markup
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$^])")


@dataclass(frozen=True)
class Source:
    """A model that went in.

    name    its id on the hub, or the name of its local folder; `hub` says which
    digest  of everything in its folder that counts
    above   of one that is not on the hub: the ids of the nearest there that it comes from
    """

    name: str
    hub: bool = False
    revision: str = ""
    digest: str = ""
    licence: str = ""
    above: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """What was measured on one task, or the mean of the tasks of a suite: shares of 1.

    low, high  ends of the 95 % interval     chance  what guessing scores
    seen       whether a search of its lineage has looked at these items
    """

    suite: str
    task: str
    metric: str
    value: float
    low: float
    high: float
    items: int
    chance: float = 0.0
    seen: bool = False


@dataclass(frozen=True)
class Alike:
    """How alike the models are that went in.

    cosines  [n][n] of their weights, within -1 and 1; None where two have no shape in common
    how      exact or estimated, and from where
    """

    names: tuple[str, ...]
    cosines: tuple[tuple[float | None, ...], ...]
    how: str


@dataclass(frozen=True)
class Card:
    """What the card of a merge says; or of something else, where `part` and `about` say so.

    models       in the order of the configuration; the base is told apart if it is one of them
    config       the YAML as it was given, kept beside the card as `config_file`
    command      what makes the model again, run in a copy of the folder
    relation     to its models, as the hub has it: merge, adapter or finetune; nothing leaves it to guess
    loads        the package that loads it
    part         what was done, as a heading
    data         datasets that it was taught, or chosen by
    needs        what the command has to find
    results      as far as they are known by now; those that a search has seen are no claims
    lineage      all it comes from, as a tree, a line each
    licence      of its own; without one, what its models agree on
    published    base_model names what is on the hub alone, since others would find nothing, or something else, there
    """

    name: str
    method: str
    models: tuple[Source, ...]
    config: str
    base: Source | None = None
    seed: int = 0
    command: str = "glue merge mergekit_config.yml out"
    config_file: str = "mergekit_config.yml"
    tags: tuple[str, ...] = ("mergekit", "merge")
    relation: str = ""
    loads: str = "transformers"
    about: str = "A merge of pre-trained language models"
    part: str = "Merge"
    data: tuple[Source, ...] = ()
    needs: str = "the models above under the names that the configuration gives them"
    results: tuple[Result, ...] = ()
    alike: Alike | None = None
    lineage: tuple[str, ...] = ()
    licence: str = ""
    published: bool = False


def card_text(card: Card) -> str:
    """The card as Markdown with YAML front matter; nothing in names or configuration can break out of its place."""
    sources = [*([card.base] if card.base else []), *card.models]
    listed = list(dict.fromkeys(sources))
    names = list(dict.fromkeys(one_line(name) for source in listed for name in _named(source, card.published)))
    below = ["base_model:", *(f"- {_quoted(name)}" for name in names)] if names else []
    relation = [f"base_model_relation: {card.relation}"] if names and card.relation else []
    licence = agreed([card.licence] if card.licence else [source.licence for source in listed])
    front = ["---", *below, *relation, *([f"library_name: {card.loads}"] if card.loads else []),
             *front_matter(licence), "tags:", *(f"- {tag}" for tag in card.tags), *_model_index(card), "---"]
    rows = [_row(source, " (base)" if source == card.base else "") for source in listed]
    based = f" over the base {_linked(card.base)}" if card.base else ""
    return "\n".join([
        *front, f"# {_plain(card.name)}", "",
        f"{card.about}, {f'made with glue {__version__}' if card.method else 'from a zoo of glue'}.", "",
        *([f"## {card.part} Details", "", f"### {card.part} Method", "",
           f"{_plain(card.method)}{based}, with seed {card.seed}.", ""] if card.method else []),
        *(_table("Models Merged" if card.part == "Merge" else "Models", rows) if rows else []),
        *(_table("Data", [_row(source) for source in dict.fromkeys(card.data)]) if card.data else []),
        *(_measured(card.results) if card.results else []), *(_likeness(card.alike) if card.alike else []),
        *(["### Lineage", "", *_fenced("\n".join(map(one_line, card.lineage)), "text"), ""] if card.lineage else []),
        *_made_again(card)])


def _made_again(card: Card) -> list[str]:
    """The configuration and what to do with it; nothing of what was not made here."""
    if not card.config:
        return []
    return ["### Configuration", "", f"As it was given, also in `{card.config_file}`:", "",
            *_fenced(card.config, "yaml"), "", "### Making it again", "", f"With glue {__version__}, and {card.needs}:",
            "", *_fenced(card.command, "sh"), ""]


def _named(source: Source, published: bool) -> tuple[str, ...]:
    return (source.name,) if source.hub or not published else source.above


def _model_index(card: Card) -> list[str]:
    """Results as the hub keeps them, one a line; what a search has seen shows nothing, so it is left out."""
    lines = [json.dumps({  # type, config and split tell results apart there
        "task": {"type": "text-generation"},
        "dataset": {"name": f"{one.suite} {one.task}", "type": one.suite.partition(":")[0], "config": one.task,
                    "split": one.suite.partition(":")[2] or "test"},
        "metrics": [{"type": one.metric, "value": round(one.value, 4), "name": f"{one.metric}, share of 1",
                     "args": {"items": one.items, "low_95": round(one.low, 4), "high_95": round(one.high, 4)}}]},
        ensure_ascii=False) for one in card.results if not one.seen and one.task]
    name = _quoted(one_line(card.name))
    return ["model-index:", f"- name: {name}", "  results:", *(f"  - {line}" for line in lines)] if lines else []


def _measured(results: Sequence[Result]) -> list[str]:
    """Results as a table, in points."""
    rows = [f"| {_plain(one.suite)}{SEEN if one.seen else ''} | {_plain(one.task) or '**mean of tasks**'} | "
            f"{_plain(one.metric)} | {one.value * 100:.1f} [{one.low * 100:.1f}, {one.high * 100:.1f}] | "
            f"{one.chance * 100:.0f} | {one.items} |" for one in results]
    below = [f"{SEEN.strip()} A search has chosen by these items: they say nothing about others.", ""]
    return ["### Results", "", "| suite | task | metric | points, 95 % interval | chance | items |",
            "|---|---|---|---|---|---|", *rows, "", *(below if any(one.seen for one in results) else [])]


def _likeness(alike: Alike) -> list[str]:
    """Cosines as a table."""
    names = [_plain(name) for name in alike.names]
    cells = [["-" if value is None else f"{value:.4f}" for value in row] for row in alike.cosines]
    return ["### Similarity", "", f"Cosines of the weights of what went in, {_plain(alike.how)}.", "",
            f"| | {' | '.join(names)} |", f"|---{'|---' * len(names)}|",
            *(f"| {name} | {' | '.join(row)} |" for name, row in zip(names, cells, strict=True)), ""]


def _table(heading: str, rows: Sequence[str]) -> list[str]:
    return [f"### {heading}", "", "| name | revision | content digest | licence |" if heading == "Data" else
            "| model | revision | content digest | licence |", "|---|---|---|---|", *rows, ""]


def _row(source: Source, more: str = "") -> str:
    return (f"| {_linked(source)}{more} | {_plain(source.revision) or '-'} | {_plain(source.digest) or '-'} | "
            f"{_plain(source.licence) or 'not stated'} |")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # a string of JSON is one of YAML


def _linked(source: Source) -> str:
    name = _plain(source.name)
    return f"[{name}](https://huggingface.co/{source.name})" if source.hub and HUB_ID.fullmatch(source.name) else name


def _plain(text: str) -> str:
    """Text of others as text: on one line, with nothing that Markdown or HTML would take for markup."""
    return _MARKUP.sub(r"\\\1", one_line(text))


def _fenced(text: str, language: str) -> list[str]:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + language, text.rstrip("\r\n"), fence]
