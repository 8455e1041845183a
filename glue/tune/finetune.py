"""A model taught more: every weight of it, or a LoRA adapter beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from glue.checkpoint import Checkpoint
from glue.errors import GlueError, did_you_mean
from glue.kinds.device import settled
from glue.tune.curve import Curve
from glue.tune.kept import Kept
from glue.tune.loop import Course, Report, TrainsIn, train
from glue.tune.pretrain import readable, save
from glue.tune.reading import Reading, Steps, read

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

EVERY = "all-linear"  # in place of names of layers: all that are linear but the head


def finetune(out: Path, *, base: Path, data: Sequence[tuple[Path, float]], steps: Steps, learning_rate: float,
             report: Report, batch_size: int = 64, weight_decay: float = 0.05, prompt_weight: float = 0.05,
             seed: int = 0, lora: Mapping[str, Any] | None = None, below: Path | None = None, device: str = "cpu",
             dtype: TrainsIn = "float32", course: Course = Course(),  # noqa: B008 - frozen, as the next one
             reading: Reading = Reading(), kept: Kept | None = None) -> Curve:  # noqa: B008
    """Train the model in `base` on more data, and write the result into `out`.

    data   dataset folders and how much of the training is theirs, in any scale
    lora   None trains every weight and writes a Hugging Face folder with its tokenizer; {"r", "alpha", "targets"}
           trains an adapter of rank r, scaled by alpha / r, on the named layers, and writes a PEFT folder over `base`.
           With "dropout", of what goes into it; with "rslora", scaled by alpha / sqrt(r). With "shared": seed, its A
           begins with numbers that all who have this seed share, up to their rank; with "frozen": true they stay so
    below  a PEFT folder that is added to the base first, and is no part of the result
    dtype  bfloat16: layers calculate in it, an adapter's base is held in it, and a model is written in it; what trains
           is held in fp32 all the same
    device  a word of glue/kinds/device.py: a model that is too large for one GPU is spread over all
    kept   where the state is kept meanwhile

    Raises GlueError for an empty dataset, an item that is too long, an unknown layer, a loss that is no number.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False, local_files_only=True)
    half = in_half(base, dtype)
    held = torch.bfloat16 if half and lora is not None else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=held, trust_remote_code=False, local_files_only=True)
    if below is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, below).merge_and_unload()  # type: ignore[assignment, operator]
    model = settled(model, device, times=4 if lora is None else 1)
    found = read(data, tokenizer, model.config.max_position_embeddings, steps=steps, batch_size=batch_size, seed=seed,
                 reading=reading, kept=kept)
    trained: Any = model if lora is None else with_adapter(model, lora, seed)
    curve = train(trained, found.batches, steps=found.steps, learning_rate=learning_rate, weight_decay=weight_decay,
                  prompt_weight=prompt_weight, report=report, course=replace(course, bfloat16=half), seed=seed,
                  kept=kept)
    curve.left_out, curve.cut = found.left_out, found.cut
    if lora is None:
        save(model, tokenizer, out, half=half)
        return curve
    config: Any = trained.peft_config["default"]
    config.base_model_name_or_path = str(base)
    config.target_modules = sorted(config.target_modules)  # peft keeps a set, whose order differs between processes
    # Asking whether embeddings were resized would look for the base's configuration on the hub.
    trained.save_pretrained(str(out), save_embedding_layers=False)
    readable(out)
    return curve


def in_half(base: Path, dtype: TrainsIn) -> bool:
    """Whether layers calculate in bfloat16: as is said, or `auto` where the base's files hold 16 bits a number."""
    if dtype != "auto":
        return dtype == "bfloat16"
    kinds = [header.dtype for header in Checkpoint(base).headers.values() if header.dtype.is_floating_point]
    return all(kind in (torch.bfloat16, torch.float16) for kind in kinds)


def with_adapter(model: PreTrainedModel, lora: Mapping[str, Any], seed: int) -> PeftModel:
    """The model with an adapter in it that changes nothing yet and is all that trains; `lora` as in `finetune`."""
    from peft import LoraConfig, get_peft_model

    linear = {name.rsplit(".", 1)[-1]: module for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear)}
    targets, layers = list(lora["targets"]), list(linear)
    if targets == [EVERY]:
        targets = sorted(name for name, module in linear.items() if module is not model.get_output_embeddings())
    for target in targets:
        if target not in layers:
            raise GlueError(f"the base has no layer '{target}' to adapt{did_you_mean(target, layers)}",
                            fix=f"name linear layers, such as q_proj and v_proj, or say  targets: [{EVERY}]")
    config = LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora.get("dropout", 0.0),
                        use_rslora=lora.get("rslora", False), target_modules=targets, task_type="CAUSAL_LM")
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
