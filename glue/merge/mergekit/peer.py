"""The peer: mergekit's own code at work, for what this engine does not do itself. The only module that imports it.

mergekit 0.1.5 leaves some things to chance, which are settled here: whose configuration and tokenizer are taken where
no base is named (the first model's), and which numbers the tokens get that a union of tokenizers adds (in the order of
the models and of their numbers there). Its random generator, logs and progress bars belong to the whole process, so one
piece of its work is done at a time.
"""

from __future__ import annotations

import io
import logging
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from glue.checkpoint import Checkpoint
from glue.document import parse
from glue.errors import GlueError, MethodError, RecipeError, did_you_mean, one_line
from glue.kinds.furnish import follow_umask
from glue.writer import SHARD

_ALONE = threading.Lock()


def run_through_mergekit(text: str, out: Path, *, models: Mapping[str, Path], seed: int = 0, shard_size: int = SHARD,
                         dtype: str = "", out_dtype: str = "", device: str = "cpu") -> tuple[str, ...]:
    """Run one merge config through mergekit into the folder `out`; returns what it warned of.

    text    one document, read as our own dialect reads it
    models  every path of the config, `path` or `path@revision`, also of adapters -> its folder, in the order in which
            they are to count; no path is looked for anywhere else
    dtype, out_dtype  take the place of those in the config
    The weights, config.json and a tokenizer are written. The chat template and the card are left to `furnish`, with
    keep=("config", "tokenizer") where the config has a tokenizer block. Raises MethodError with what mergekit said.
    """
    told = dict(parse(text, "config", RecipeError).value)
    told |= {word: said for word, said in {"dtype": dtype, "out_dtype": out_dtype}.items() if said}
    told.pop("chat_template", None)
    folders = {name: Path(folder).resolve() for name, folder in models.items()}
    for folder in folders.values():
        Checkpoint(folder)  # a damaged shard or a pickle is told by name, before any work
    out.mkdir(parents=True, exist_ok=True)
    with _at_work(seed) as warned, TemporaryDirectory(dir=out, prefix=".adapters-") as adapters:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        order = [str(folder) for folder in folders.values()]

        class InOrder(MergeConfiguration):
            def referenced_models(self) -> list[Any]:
                return sorted(super().referenced_models(), key=lambda ref: (order.index(ref.model.path), str(ref)))

        run_merge(_located(InOrder.model_validate(told), folders), str(out), MergeOptions(
            out_shard_size=shard_size, random_seed=seed, device=device, lora_merge_cache=adapters, copy_tokenizer=True,
            async_write=True, write_model_card=False, quiet=True))
    follow_umask(out)
    return tuple(warned)


def run_moe_through_mergekit(config: Mapping[str, Any], out: Path, *, models: Mapping[str, Path], seed: int = 0,
                             device: str = "cpu") -> tuple[str, ...]:
    """Run mergekit-moe into the folder `out`, weights and config.json only; returns what it warned of.

    config  in its words; see `glue.merge.mergekit.moe`, which checks it first
    """
    folders = {name: Path(folder).resolve() for name, folder in models.items()}
    out.mkdir(parents=True, exist_ok=True)
    with _at_work(seed) as warned:
        from mergekit.moe.config import MoEMergeConfig
        from mergekit.options import MergeOptions
        from mergekit.scripts.moe import build

        options = MergeOptions(random_seed=seed, device=device, copy_tokenizer=False, async_write=True, quiet=True)
        build(_located(MoEMergeConfig.model_validate(dict(config)), folders), str(out), options, device=device)
    follow_umask(out)
    return tuple(warned)


def _located(value: Any, folders: Mapping[str, Path]) -> Any:
    """The same settings with a local folder in the place of every model's path."""
    from mergekit.common import ModelPath, ModelReference
    from pydantic import BaseModel

    def place(path: ModelPath | None) -> ModelPath | None:
        if path is not None and str(path) not in folders:
            raise MethodError(f"no folder is known for '{one_line(str(path))}'{did_you_mean(str(path), folders)}")
        return None if path is None else ModelPath(path=str(folders[str(path)]))

    if isinstance(value, ModelReference):
        return ModelReference(model=place(value.model), lora=place(value.lora),
                              override_architecture=value.override_architecture)
    if isinstance(value, BaseModel):
        return value.model_copy(update={word: _located(inner, folders) for word, inner in value})
    if isinstance(value, dict):
        return {word: _located(inner, folders) for word, inner in value.items()}
    return [_located(inner, folders) for inner in value] if isinstance(value, list) else value


@contextmanager
def _at_work(seed: int) -> Iterator[list[str]]:
    """mergekit alone in this process: seeded, silent, its warnings in a list, its failures one MethodError."""
    with _ALONE:
        import numpy
        import torch
        import transformers
        from mergekit.tokenizer import build as tokenizers  # before the streams are turned, since logs keep theirs

        warned: list[str] = []
        failed: list[str] = []

        class Said(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                (failed if record.levelno >= logging.ERROR else warned).append(one_line(record.getMessage()))

        said, root, union = Said(logging.WARNING), logging.getLogger(), tokenizers.build_union_tokenizer
        hints = logging.getLogger("transformers")
        level = hints.level
        before = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        tokenizers.build_union_tokenizer = lambda base, others, **how: union(base, _numbered(others), **how)
        root.addHandler(said)
        hints.setLevel(logging.ERROR)
        try:
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                transformers.set_seed(seed)
                yield warned
            problem = failed[0] if failed else ""
        except GlueError:
            raise
        except SystemExit:
            problem = " ".join([*warned, *failed]) or "it gave up without a word"
        except Exception as error:
            problem = f"{type(error).__name__}: {one_line((str(error).strip() or 'nothing more').splitlines()[0])}"
        finally:
            root.removeHandler(said)
            hints.setLevel(level)
            tokenizers.build_union_tokenizer = union
            random.setstate(before[0])
            numpy.random.set_state(before[1])
            torch.set_rng_state(before[2])
        if problem:
            raise MethodError(f"mergekit could not do it: {problem}",
                              fix="see its documentation, or leave out what only mergekit does")


def _numbered(tokenizers: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """Tokenizers that list their tokens by number, where others have a new order at every call."""
    def listed(tokenizer: Any) -> Any:
        plain = tokenizer.get_vocab
        tokenizer.get_vocab = lambda: dict(sorted(plain().items(), key=lambda item: item[1]))
        return tokenizer

    return {model: listed(tokenizer) for model, tokenizer in tokenizers.items()}
