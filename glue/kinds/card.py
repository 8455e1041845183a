"""The model card of a merge: what the hub reads of it, and what people need to make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glue import __version__
from glue.errors import one_line

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as the hub names them: apache-2.0
_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+!|~&$^])")
_HEAD = 65536  # bytes of a card in which its front matter is looked for


@dataclass(frozen=True)
class Source:
    """A model that went in.

    name    its id on the hub, or the name of its local folder; `hub` says which
    digest  of everything in its folder that counts
    """

    name: str
    hub: bool = False
    revision: str = ""
    digest: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Card:
    """What the card of a merge says.

    models       in the order of the configuration; the base is told apart if it is one of them
    config       the YAML as it was given, kept beside the card as `config_file`
    command      what makes the model again, run in a copy of the folder
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


def card_text(card: Card) -> str:
    """The card as Markdown with YAML front matter; nothing in names or configuration can break out of its place."""
    sources = [*([card.base] if card.base else []), *card.models]
    listed = list(dict.fromkeys(sources))
    names = list(dict.fromkeys(one_line(source.name) for source in listed))
    licence = agreed([source.licence for source in listed])
    front = ["---", "base_model:", *(f"- {_quoted(name)}" for name in names), "library_name: transformers",
             *([f"license: {_quoted(licence)}"] if licence else []), "tags:", *(f"- {tag}" for tag in card.tags), "---"]
    rows = [f"| {_linked(source)}{' (base)' if source == card.base else ''} | {_plain(source.revision) or '-'} | "
            f"{_plain(source.digest) or '-'} | {_plain(source.licence) or 'not stated'} |" for source in listed]
    based = f" over the base {_linked(card.base)}" if card.base else ""
    return "\n".join([
        *front, f"# {_plain(card.name)}", "",
        f"A merge of pre-trained language models, made with glue {__version__}.", "",
        "## Merge Details", "", "### Merge Method", "",
        f"{_plain(card.method)}{based}, with seed {card.seed}.", "",
        "### Models Merged", "", "| model | revision | content digest | licence |", "|---|---|---|---|", *rows, "",
        "### Configuration", "", f"As it was given, also in `{card.config_file}`:", "", *_fenced(card.config, "yaml"),
        "", "### Making it again", "",
        f"With glue {__version__}, and the models above under the names that the configuration gives them:", "",
        *_fenced(card.command, "sh"), ""])


def agreed(licences: Sequence[str]) -> str:
    """The licence that all models have; nothing where they differ, or where one does not say."""
    found = set(licences)
    return licences[0] if len(found) == 1 and LICENCE.fullmatch(licences[0]) else ""


def licence_of(folder: Path) -> str:
    """The licence that the card in a model folder names; nothing where there is none, or several."""
    try:
        with open(folder / "README.md", "rb") as stream:
            text = stream.read(_HEAD).decode(errors="replace")
    except OSError:
        return ""
    front = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t\r]*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else ""


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
