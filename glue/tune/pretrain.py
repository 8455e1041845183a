"""A new Llama model from nothing but datasets: its tokenizer, its first weights, its training."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glue.errors import GlueError, did_you_mean
from glue.tune.bpe import train_tokenizer
from glue.tune.items import draw_batches, read_items, read_pairs
from glue.tune.loop import Report, train

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

BY_TOKENIZER = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}


def pretrain(out: Path, *, data: Sequence[tuple[Path, float]], vocabulary: Sequence[Path],
             architecture: Mapping[str, Any], steps: int, learning_rate: float, report: Report, batch_size: int = 64,
             weight_decay: float = 0.05, prompt_weight: float = 0.05, seed: int = 0, device: str = "cpu") -> None:
    """Write a trained model with its tokenizer into `out`, an ordinary Hugging Face folder.

    data          dataset folders and how much of the training is theirs, in any scale
    vocabulary    dataset folders whose words become tokens; members that shall be merged need the same ones
    architecture  fields of LlamaConfig; those of the tokenizer are set here

    Raises GlueError for an unknown field, an empty dataset, an item that is too long, a loss that is no number.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    config = _config(architecture)
    train_tokenizer((f"{question} {answer}" for folder in vocabulary for question, answer in read_pairs(folder)), out)
    # without the word, what the environment says of the hub would be written into the tokenizer's configuration
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    datasets = [read_items(folder, tokenizer, config.max_position_embeddings) for folder, _ in data]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(device)  # type: ignore[arg-type]
    batches = draw_batches(datasets, [weight for _, weight in data], batch_size, random.Random(seed))
    train(model, batches, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay,
          prompt_weight=prompt_weight, report=report)
    save(model, tokenizer, out)


def _config(architecture: Mapping[str, Any]) -> LlamaConfig:
    from transformers import LlamaConfig

    known = {name for name, field in inspect.signature(LlamaConfig).parameters.items()
             if field.kind is field.KEYWORD_ONLY} - BY_TOKENIZER
    for field in architecture:
        if field in BY_TOKENIZER:
            raise GlueError(f"the architecture sets '{field}', which follows from the tokenizer", fix=f"remove {field}")
        if field not in known:
            raise GlueError(f"the architecture has no field '{field}'{did_you_mean(field, known)}",
                            fix="fields are those of transformers' LlamaConfig, such as hidden_size")
    return LlamaConfig(**{"max_position_embeddings": 256, **architecture})


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write weights, configuration and tokenizer, readable by everyone."""
    model.to("cpu")  # type: ignore[arg-type]
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    readable(out)


def readable(out: Path) -> None:
    """Undo the file mode of safetensors' writer, which lets only the owner read."""
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)
