"""A model taught more: every weight of it, or a LoRA adapter beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from glue.errors import GlueError, did_you_mean
from glue.tune.items import draw_batches, read_items
from glue.tune.loop import Report, train
from glue.tune.pretrain import readable, save

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def finetune(out: Path, *, base: Path, data: Sequence[tuple[Path, float]], steps: int, learning_rate: float,
             report: Report, batch_size: int = 64, weight_decay: float = 0.05, prompt_weight: float = 0.05,
             seed: int = 0, lora: Mapping[str, Any] | None = None, below: Path | None = None,
             device: str = "cpu") -> None:
    """Train the model in `base` on more data, and write the result into `out`.

    data   dataset folders and how much of the training is theirs, in any scale
    lora   None trains every weight and writes a Hugging Face folder with its tokenizer; {"r", "alpha", "targets"}
           trains an adapter of rank r, scaled by alpha / r, on the named layers, and writes a PEFT folder over `base`.
           With "shared": seed, its A begins with numbers that all who have this seed share, up to their rank; with
           "frozen": true they stay as they are
    below  a PEFT folder that is added to the base first, and is no part of the result

    Raises GlueError for an empty dataset, an item that is too long, an unknown layer, a loss that is no number.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False,
                                                 local_files_only=True)
    if below is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, below).merge_and_unload()  # type: ignore[assignment, operator]
    model.to(device)  # type: ignore[arg-type]
    datasets = [read_items(folder, tokenizer, model.config.max_position_embeddings) for folder, _ in data]
    batches = draw_batches(datasets, [weight for _, weight in data], batch_size, random.Random(seed))
    trained: Any = model if lora is None else with_adapter(model, lora, seed)
    train(trained, batches, steps=steps, learning_rate=learning_rate, weight_decay=weight_decay,
          prompt_weight=prompt_weight, report=report)
    if lora is None:
        save(model, tokenizer, out)
        return
    config: Any = trained.peft_config["default"]
    config.base_model_name_or_path = str(base)
    config.target_modules = sorted(config.target_modules)  # peft keeps a set, whose order differs between processes
    # Asking whether embeddings were resized would look for the base's configuration on the hub.
    trained.save_pretrained(str(out), save_embedding_layers=False)
    readable(out)


def with_adapter(model: PreTrainedModel, lora: Mapping[str, Any], seed: int) -> PeftModel:
    """The model with an adapter in it that changes nothing yet and is all that trains; `lora` as in `finetune`."""
    from peft import LoraConfig, get_peft_model

    layers = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in lora["targets"]:
        if target not in layers:
            raise GlueError(f"the base has no layer '{target}' to adapt{did_you_mean(target, layers)}",
                            fix="name linear layers, such as q_proj and v_proj")
    config = LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], target_modules=list(lora["targets"]),
                        lora_dropout=0.0, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted: Any = get_peft_model(model, config)
    if "shared" in lora:
        _share(adapted, lora["shared"], trains=not lora.get("frozen"))
    return adapted


def _share(adapted: PeftModel, seed: int, *, trains: bool) -> None:
    """Set every A to rows that depend on seed, layer and place alone, so that a lower rank has the first of them."""
    for name, parameter in adapted.named_parameters():
        if ".lora_A." in name:
            rank, width = parameter.shape
            drawn = np.random.default_rng([seed, *name.encode()]).uniform(-1, 1, (rank, width)) / math.sqrt(width)
            parameter.data.copy_(torch.from_numpy(drawn))
            parameter.requires_grad_(trains)
