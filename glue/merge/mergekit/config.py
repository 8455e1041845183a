"""Reading a merge config: YAML to Config, with every mistake of a file told at once, each with its place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from glue.document import Document, read_all
from glue.errors import GlueError, Mistakes, RecipeError, did_you_mean, one_line
from glue.merge.mergekit.contract import contract
from glue.merge.mergekit.nouns import Config, Loc, ModelRef, Module, Slice, Source, Tokenizer
from glue.merge.mergekit.reading import Reading
from glue.merge.mergekit.words import Dialect

__all__ = ["Config", "Dialect", "ModelRef", "Module", "Slice", "Source", "Tokenizer", "read_configs"]
LINES = 8  # of all mistakes that are shown
DTYPES = ("bfloat16", "float16", "float32", "float64")
TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
TOP = ("name", "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype",
       "tokenizer", "tokenizer_source", "chat_template")


def read_configs(file: Path, *, lenient: bool = False) -> list[Config]:
    """The merges that a file describes, one a document, in an order in which each comes after those it uses.

    lenient  unknown words are notes and not mistakes

    Raises RecipeError for one mistake, and Mistakes, whose errors are RecipeErrors, for several.
    """
    documents = read_all(file, RecipeError)
    if not documents:
        raise RecipeError(f"{file} holds no config", fix="write  merge_method: ...  and  models: [...]")
    configs, wrong = [], []
    for document in documents:
        found, mistakes = _read(document, lenient)
        configs += [found] if found else []
        wrong += mistakes
    wrong += [] if wrong else _names(configs)
    if wrong:
        raise gathered(wrong)
    return _in_order(configs)


def gathered(wrong: Sequence[GlueError]) -> GlueError:
    """One error of many: at most eight lines of them are shown, and how many more there are."""
    if len(wrong) == 1:
        return wrong[0]
    shown: list[GlueError] = []
    lines = 0
    for error in wrong:
        lines += str(error).count("\n") + 1
        if lines > LINES - (error is not wrong[-1]):
            break
        shown.append(error)
    more = len(wrong) - len(shown)
    result = Mistakes([*shown, *([RecipeError(f"{more} more mistake{'s' * (more > 1)}")] if more else [])])
    result.errors = list(wrong)
    return result


def _read(document: Document, lenient: bool) -> tuple[Config | None, list[RecipeError]]:
    reading = Reading(document, lenient)
    value = document.value
    if not isinstance(value, dict):
        reading.wrong((), "a config is a mapping with the key 'merge_method'", "write  merge_method: ...  first")
        return None, reading.mistakes
    reading.known(value, (), TOP)
    method = _method(reading, value)
    shapes = [word for word in ("models", "slices", "modules") if value.get(word) is not None]
    if len(shapes) != 1:
        said = f"{' and '.join(repr(word) for word in shapes)} are given" if shapes else "none is given"
        last = max(([word] for word in shapes), key=lambda loc: document.place(*loc), default=())
        reading.wrong(last, f"a config has exactly one of 'models', 'slices' and 'modules', and {said}",
                      "keep one of them" if shapes else "add  models: [{model: ...}, ...]")
    config = Config(
        name=reading.text(value, "name"), document=document, merge_method=method.method.name if method else "",
        base_model=reading.model(value["base_model"], ("base_model",)) if value.get("base_model") is not None else None,
        dtype=_dtype(reading, value, "dtype"), out_dtype=_dtype(reading, value, "out_dtype"),
        models=reading.models(value.get("models"), ("models",), ("model", "parameters")),
        slices=reading.slices(value.get("slices"), ("slices",)), modules=reading.modules(value.get("modules")),
        settings=reading.settings(value, ()), tokenizer=_tokenizer(reading, value),
        chat_template=_template(reading, value), notes=())
    if method and not reading.mistakes:
        contract(reading, config, method)
    reading.mistakes.sort(key=lambda error: error.place or (document.file, 0, 0))
    return replace(config, notes=tuple(dict.fromkeys(reading.notes))), reading.mistakes


def _method(reading: Reading, value: dict[str, Any]) -> Dialect | None:
    name = value.get("merge_method")
    if not isinstance(name, str):
        reading.wrong(("merge_method",), "a config names its 'merge_method'" if name is None else
                      "'merge_method' is the name of a method", "add  merge_method: linear  (or another)")
        return None
    try:
        reading.method = Dialect.of(name)
    except GlueError as error:
        reading.wrong(("merge_method",), error.what, error.fix)
    return reading.method


def _dtype(reading: Reading, value: dict[str, Any], word: str) -> str:
    name = reading.text(value, word).removeprefix("torch.")
    if name and name not in DTYPES:
        reading.wrong((word,), f"'{word}' cannot be '{one_line(name, 60)}'{did_you_mean(name, DTYPES)}")
    return name


def _template(reading: Reading, value: dict[str, Any]) -> str:
    text = reading.text(value, "chat_template")
    if text and text not in TEMPLATES and (len(text) < 20 or "{" not in text):
        reading.wrong(("chat_template",), f"there is no chat template '{one_line(text, 60)}'"
                      f"{did_you_mean(text, TEMPLATES)}", "give one of these names, or the text of a Jinja template")
    return text


def _tokenizer(reading: Reading, value: dict[str, Any]) -> Tokenizer | None:
    block, legacy = value.get("tokenizer"), value.get("tokenizer_source")
    if block is not None and legacy is not None:
        reading.wrong(("tokenizer_source",), "'tokenizer' and 'tokenizer_source' are both given",
                      "keep  tokenizer: {source: ...}")
        return None
    if legacy is not None:
        return Tokenizer(_tokens_from(reading, legacy, ("tokenizer_source",)), loc=("tokenizer_source",))
    if block is None:
        return None
    if not isinstance(block, dict):
        reading.wrong(("tokenizer",), "'tokenizer' is a mapping", "write  tokenizer: {source: union}")
        return None
    reading.known(block, ("tokenizer",), ("source", "tokens", "pad_to_multiple_of"))
    pad = block.get("pad_to_multiple_of")
    if pad is not None and (not isinstance(pad, int) or isinstance(pad, bool) or pad < 1):
        reading.wrong(("tokenizer", "pad_to_multiple_of"), "'pad_to_multiple_of' is a whole number from 1",
                      "write  pad_to_multiple_of: 64")
    source = block.get("source")
    return Tokenizer("union" if source is None else _tokens_from(reading, source, ("tokenizer", "source")),
                     _tokens(reading, block.get("tokens"), ("tokenizer", "tokens")), pad, ("tokenizer",))


def _tokens_from(reading: Reading, value: Any, loc: Loc) -> str | ModelRef:
    return value if value in ("union", "base") else reading.model(value, loc) or ""


def _tokens(reading: Reading, tokens: Any, loc: Loc) -> dict[str, Any] | None:
    """Where the embeddings of single tokens come from; mergekit does the work, so only the words are checked."""
    if tokens is None:
        return None
    if not isinstance(tokens, dict):
        reading.wrong(loc, "'tokens' is a mapping from tokens", "write  tokens: {\"<tok>\": {source: ...}}")
        return None
    for token, entry in tokens.items():
        here = (*loc, token)
        if not isinstance(entry, dict):
            reading.wrong(here, f"'{one_line(token, 40)}' is a mapping", "write  {source: <model>, force: false}")
            continue
        reading.known(entry, here, ("source", "force"))
        source = entry.get("source")
        if isinstance(source, dict) and "kind" in source:
            reading.known(source, (*here, "source"), ("kind", "model", "token", "token_id"))
            if source["kind"] not in ("zero", "model_token"):
                reading.wrong((*here, "source", "kind"), f"there is no kind '{source['kind']}'"
                              f"{did_you_mean(source['kind'], ('zero', 'model_token'))}")
            elif source["kind"] == "model_token":
                reading.model(source.get("model"), (*here, "source"))
                if (source.get("token") is None) == (source.get("token_id") is None):
                    reading.wrong((*here, "source"), "a model_token has either 'token' or 'token_id'", "give one")
        elif source is not None:
            reading.model(source, (*here, "source"))
    return tokens


def _names(configs: list[Config]) -> list[RecipeError]:
    """What is wrong with the names of several merges in one file."""
    wrong, names = [], [config.name for config in configs]
    for k, config in enumerate(configs):
        if config.name in names[:k]:
            what = f"two merges are called '{config.name}'" if config.name else "two merges have no name"
            wrong.append(RecipeError(what, place=config.place("name"), fix="give each document a name of its own; one, "
                                     "the last merge, may have none"))
    return wrong


def _in_order(configs: list[Config]) -> list[Config]:
    """The same configs, each behind those whose results it uses."""
    done: list[Config] = []
    waiting = list(configs)
    while waiting:
        names = {config.name for config in waiting} - {""}
        ready = [config for config in waiting if not _uses(config, names)]
        if not ready:
            first = next(config for config in waiting if config.name)
            used = " and ".join(f"'{name}'" for name in _uses(first, names))
            raise RecipeError(f"'{first.name}' needs the result of {used}: these merges use each other in a circle",
                              place=first.place("name"), fix="break the circle")
        done.append(ready[0])
        waiting.remove(ready[0])
    return done


def _uses(config: Config, names: Iterable[str]) -> list[str]:
    return [ref.path for ref in config.referenced() if ref.path in set(names)]
