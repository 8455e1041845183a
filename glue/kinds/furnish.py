"""Furnishing: what a model folder needs beside its weights, put there from a donor's folder by plain edits of JSON.

Only files with known names are taken, byte for byte, and never code: a donor whose architecture is not part of
transformers keeps its configuration and has to bring its code itself. Nothing here imports transformers.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from glue.errors import MethodError, ZooError, did_you_mean, one_line
from glue.files import write_aside
from glue.kinds.card import Card, card_text

CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
TOKENIZER_CONFIG, CARD = "tokenizer_config.json", "README.md"
TOKENIZER = (TOKENIZER_CONFIG, "tokenizer.json", "tokenizer.*.json", "*.model", "*.tiktoken", "tekken.json",
             "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt")
OLD_TEMPLATE = "chat_template.json"  # how processors had it; they still prefer it
MORE_TEMPLATES = "additional_chat_templates"  # a folder of <name>.jinja, beside the one that is the default
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
NAMED = "mergekit._data.chat_templates"  # where mergekit keeps the templates it knows by name; importing it is cheap
Kept = Literal["config", "tokenizer"]
SIZE_LIMIT = 500_000_000  # bytes of one file; the largest tokenizers have a tenth of it
STALE = ("_name_or_path",)  # where the donor was loaded from, which is not where this model is


def furnish(folder: Path, donor: Path, card: Card, *, changes: Mapping[str, Any] | None = None,
            layers: Mapping[str, Sequence[int]] | None = None, chat_template: str | None = None,
            members: Sequence[Path] = (), keep: Collection[Kept] = ()) -> None:
    """Put configuration, generation settings, tokenizer and card beside the weights in `folder`.

    donor          the base, or without one the first member
    changes        key of config.json, dotted where it is nested, -> value; `dtype` is set wherever a type is named
    layers         key of the number of layers -> which layer of the donor each layer is like, where layers were stacked
    chat_template  a word or a text, see `template_text`
    members        folders whose chat templates `auto` counts
    keep           what `folder` has of its own, to be edited and not replaced
    All files get the mode that the umask gives. The same call again, after a crash, gives the same folder. Raises
    ZooError for a donor whose files are not what they should be, MethodError for the chat template.
    """
    template = template_text(chat_template, members)
    config = changed(_json((folder if "config" in keep else donor) / CONFIG), changes or {}, layers)
    holder = folder if "tokenizer" in keep else donor
    if template is not None and not (holder / TOKENIZER_CONFIG).is_file():
        raise MethodError(f"a chat template is asked for, and {holder} has no {TOKENIZER_CONFIG} to put it into",
                          fix="add the tokenizer to that folder, or leave chat_template out")
    taken = _found(donor, (GENERATION, *PROCESSORS))
    if "tokenizer" not in keep:
        taken += _found(donor, (*TOKENIZER, TEMPLATE, OLD_TEMPLATE, f"{MORE_TEMPLATES}/*.jinja"))
    for file in taken:
        place = folder / file.relative_to(donor)
        place.parent.mkdir(exist_ok=True)
        write_aside(place, _bytes(file))
    if template is not None:
        _set_template(folder, template)
    write_aside(folder / CONFIG, _written(config))
    write_aside(folder / card.config_file, card.config)
    write_aside(folder / CARD, card_text(card))
    follow_umask(folder)


def changed(told: Mapping[str, Any], changes: Mapping[str, Any],
            layers: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """A configuration with other values; raises ZooError where a key is nested in what is not there.

    With `layers`, lists beside the number of layers that say something of each layer (`layer_types`) follow it.
    """
    config: dict[str, Any] = json.loads(json.dumps({key: said for key, said in told.items() if key not in STALE}))
    _drop_code(config)
    for key, like in (layers or {}).items():
        inner, word = _inside(config, key)
        for name, value in inner.items():
            if "layer" in name and isinstance(value, list) and len(value) == inner.get(word):
                inner[name] = [value[k] for k in like]
        inner[word] = len(like)
    for key, value in changes.items():
        if key == "dtype":
            _set_dtype(config, str(value).removeprefix("torch."))
        else:
            inner, word = _inside(config, key)
            inner[word] = value
    return config


def _inside(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds the last word of a dotted key, and that word."""
    *above, word = key.split(".")
    for part in above:
        if not isinstance(config.get(part), dict):
            raise ZooError(f"'{key}' is to be set in config.json, which has no mapping '{part}'",
                           fix="see the config.json of the base model")
        config = config[part]
    return config, word


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """transformers 5 writes `dtype`, what came before `torch_dtype`; whoever reads one of the two finds it changed."""
    for part in _mappings(config):
        for key in {"dtype", "torch_dtype"} & set(part):
            part[key] = name
    if not {"dtype", "torch_dtype"} & set(config):
        config["torch_dtype"] = name  # every version reads it


def _mappings(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those of its parts, such as text_config."""
    yield config
    for key, value in config.items():
        if key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            yield from _mappings(value)


def _drop_code(config: dict[str, Any]) -> None:
    """Forget code that lies beside the donor's configuration, since it is not brought along."""
    told = config.get("auto_map")
    kept = {key: value for key, value in told.items() if "--" in str(value)} if isinstance(told, dict) else {}
    config.pop("auto_map", None)
    if kept:  # code that lies in a repository of the hub is found from everywhere
        config["auto_map"] = kept


# --- chat templates ---------------------------------------------------------------------------------------------------

def template_text(said: str | None, members: Sequence[Path] = ()) -> str | None:
    """The chat template that a merge asks for; None where that is to leave the donor's as it is.

    said  auto (the one that most members have, the first of them where it is a tie), the name of a known one, or its
          text. Raises MethodError for anything else; reads nothing of the weights, so it can be asked beforehand.
    """
    if said is None:
        return None
    if said == "auto":
        found = Counter(text for text in map(template_of, members) if text)
        return found.most_common(1)[0][0] if found else None
    shipped = {file.name.removesuffix(".jinja"): file for file in resources.files(NAMED).iterdir()
               if file.name.endswith(".jinja")}
    if said in shipped:
        return shipped[said].read_text(encoding="utf-8")
    if "{" not in said or len(said) < 20:
        raise MethodError(f"'{one_line(said, 60)}' is no chat template{did_you_mean(said, ('auto', *shipped))}",
                          fix=f"write auto, one of {', '.join(sorted(shipped))}, or the text of a Jinja template")
    return said


def template_of(folder: Path) -> str | None:
    """The chat template in a model folder, from where transformers reads it; None where it has none."""
    if (folder / TEMPLATE).is_file():
        return _bytes(folder / TEMPLATE).decode(errors="replace").strip() or None
    if not (folder / TOKENIZER_CONFIG).is_file():
        return None
    told = _json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(told, list):  # several, each with a name
        told = next((each.get("template") for each in told if isinstance(each, dict) and each.get("name") == "default"),
                    None)
    return (told.strip() or None) if isinstance(told, str) else None


def _set_template(folder: Path, text: str) -> None:
    """Both places say the same: transformers 5 reads the file, older ones and other programs the configuration."""
    settings = _json(folder / TOKENIZER_CONFIG)
    write_aside(folder / TOKENIZER_CONFIG, _written({**settings, "chat_template": text}))
    write_aside(folder / TEMPLATE, text)
    for other in _found(folder, (OLD_TEMPLATE, f"{MORE_TEMPLATES}/*.jinja")):
        other.unlink()  # else processors would take the one, and a call with tools the other


# --- files ------------------------------------------------------------------------------------------------------------

def _found(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of these names, none of them hidden; links are followed, as the cache of the hub needs it."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not file.name.startswith("."))


def follow_umask(folder: Path) -> None:
    """Give every file of a folder the mode of a file that is newly made; the writer of safetensors leaves 0600."""
    probe = folder / f".mode.{os.getpid()}"
    probe.write_bytes(b"")
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def _bytes(file: Path) -> bytes:
    if file.stat().st_size > SIZE_LIMIT:
        raise ZooError(f"{file} has more than {SIZE_LIMIT:,} bytes, too many for what it should be",
                       fix="download or write it again")
    return file.read_bytes()


def _json(file: Path) -> dict[str, Any]:
    try:
        told = json.loads(_bytes(file))
    except FileNotFoundError:
        raise ZooError(f"there is no {file}", fix="name a Hugging Face model folder") from None
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{file} is not JSON ({one_line(str(error))})", fix="download or write it again") from None
    if not isinstance(told, dict):
        raise ZooError(f"{file} is not a mapping", fix="download or write it again")
    return told


def _written(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
