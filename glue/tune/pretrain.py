"""A new Llama model from nothing but datasets: its tokenizer, its first weights, its training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from glue.errors import GlueError, did_you_mean
from glue.kinds.device import device_of
from glue.tune.bpe import train_tokenizer
from glue.tune.curve import Curve
from glue.tune.items import read_pairs
from glue.tune.kept import Kept
from glue.tune.loop import Course, Report, TrainsIn, train
from glue.tune.reading import Reading, Steps, read

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

BY_TOKENIZER = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}


def pretrain(out: Path, *, data: Sequence[tuple[Path, float]], vocabulary: Sequence[Path],
             architecture: Mapping[str, Any], steps: Steps, learning_rate: float, report: Report, batch_size: int = 64,
             weight_decay: float = 0.05, prompt_weight: float = 0.05, seed: int = 0, device: str = "cpu",
             dtype: TrainsIn = "float32", course: Course = Course(),  # noqa: B008 - frozen, as the next one
             reading: Reading = Reading(), kept: Kept | None = None) -> Curve:  # noqa: B008
    """Write a trained model with its tokenizer into `out`, an ordinary Hugging Face folder.

    data          dataset folders and how much of the training is theirs, in any scale
    vocabulary    dataset folders whose words become tokens; members that shall be merged need the same ones
    architecture  fields of LlamaConfig; those of the tokenizer are set here
    dtype         bfloat16: layers calculate in it and it is written, while what trains is held in fp32
    kept          where the state is kept meanwhile

    Raises GlueError for an unknown field, an empty dataset, an item that is too long, a loss that is no number.
    """
    from transformers import AutoTokenizer, LlamaForCausalLM

    config = _config(architecture)
    train_tokenizer((f"{question} {answer}" for folder in vocabulary for question, answer in read_pairs(folder)), out)
    # without the word, what the environment says of the hub would be written into the tokenizer's configuration
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    found = read(data, tokenizer, config.max_position_embeddings, steps=steps, batch_size=batch_size, seed=seed,
                 reading=reading, kept=kept)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(device_of(device))  # type: ignore[arg-type]
    half = dtype == "bfloat16"
    curve = train(model, found.batches, steps=found.steps, learning_rate=learning_rate, weight_decay=weight_decay,
                  prompt_weight=prompt_weight, report=report, course=replace(course, bfloat16=half), seed=seed,
                  kept=kept)
    curve.left_out, curve.cut = found.left_out, found.cut
    save(model, tokenizer, out, half=half)
    return curve


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


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, *, half: bool = False) -> None:
    """Write weights (in bfloat16 where `half`), configuration and tokenizer, readable by everyone."""
    model.to("cpu")  # type: ignore[arg-type]
    if half:
        model.bfloat16()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    readable(out)


def readable(out: Path) -> None:
    """Undo the file mode of safetensors' writer, which lets only the owner read."""
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)
