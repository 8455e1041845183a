"""Our training loop against transformers' Trainer: the same batches, in pieces, in fp32 and in bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from glue.kinds import load
from glue.member import Member
from glue.tune.finetune import with_adapter
from glue.tune.items import Item
from glue.tune.loop import Course, train

STEPS, BATCH, PIECES, RATE, DECAY = 3, 6, 3, 1e-2, 0.1
LORA = {"r": 4, "alpha": 8, "targets": ["q_proj", "up_proj"]}


def items() -> list[Item]:
    """One after the other as they are read; those of a piece stand together, since both sort by length."""
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 40, (int(length),), generator=rng).tolist()
             for length in torch.randint(4, 12, (STEPS * BATCH,), generator=rng)]
    batches = [sorted(drawn[k:k + BATCH], key=len) for k in range(0, len(drawn), BATCH)]
    return [Item(tokens, 2) for batch in batches for tokens in batch]


def model_of(base: Member, lora: bool, bfloat16: bool = False) -> Any:
    model = load(base, dtype="bfloat16" if lora and bfloat16 else "float32").model
    return with_adapter(model, LORA, 0) if lora else model.requires_grad_(True)


def theirs(model: Any, folder: str, bfloat16: bool) -> tuple[dict[str, Tensor], list[float]]:
    """Trained weights and the loss of each step."""
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainingArguments

    def collated(some: list[Item]) -> dict[str, Tensor]:
        longest = max(len(item.tokens) for item in some)
        left = [longest - len(item.tokens) for item in some]
        return {"input_ids": torch.tensor([item.tokens + [0] * more for item, more in zip(some, left, strict=True)]),
                "attention_mask": torch.tensor([[1] * len(item.tokens) + [0] * more
                                                for item, more in zip(some, left, strict=True)]),
                "labels": torch.tensor([[-100] * item.question + item.tokens[item.question:] + [-100] * more
                                        for item, more in zip(some, left, strict=True)])}

    class InOrder(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(items(), batch_size=BATCH // PIECES, collate_fn=collated)  # type: ignore[arg-type]

    told = TrainingArguments(folder, max_steps=STEPS, per_device_train_batch_size=BATCH // PIECES, bf16=bfloat16,
                             gradient_accumulation_steps=PIECES, learning_rate=RATE, weight_decay=DECAY,
                             adam_beta2=0.98, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
                             report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
                             optim="adamw_torch_fused")
    trainer = InOrder(model, told, train_dataset=items())
    trainer.train()
    return weights(model), [line["loss"] for line in trainer.state.log_history if "loss" in line]


def ours(model: Any, bfloat16: bool) -> tuple[dict[str, Tensor], list[float]]:
    every = items()
    curve = train(model, (every[k:k + BATCH] for k in range(0, len(every), BATCH)), steps=STEPS, learning_rate=RATE,
                  weight_decay=DECAY, prompt_weight=0.0, report=lambda step, steps, loss: None,
                  course=Course(accumulation=PIECES, schedule="constant", warm_up=0.0, bfloat16=bfloat16))
    return weights(model), curve.loss


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().float() for name, parameter in model.named_parameters()
            if parameter.requires_grad}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(("bfloat16", "near"), [(False, 1e-3), (True, 0.15)], ids=["fp32", "bf16"])
def test_three_steps_in_pieces_come_to_what_the_trainer_comes_to(tmp_path, tiny, lora, bfloat16, near):
    """In bfloat16 the two pad differently, and AdamW makes whole steps of gradients that are nearly nothing."""
    base = tiny("base", seed=1)
    start = weights(model_of(base, lora, bfloat16))
    wanted, losses = theirs(model_of(base, lora, bfloat16), str(tmp_path / "out"), bfloat16)
    found, curve = ours(model_of(base, lora, bfloat16), bfloat16)
    assert curve == pytest.approx(losses, rel=1e-4 if not bfloat16 else 5e-3)
    assert set(found) == set(wanted)
    for name in wanted:
        moved = (wanted[name] - start[name]).norm()
        assert moved > 0 or "lora_A" in name or "lora_B" in name
        assert (found[name] - wanted[name]).norm() <= near * moved, name
        assert found[name].dtype == torch.float32


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_gradient_in_bfloat16_is_that_of_torch_s_autocast_and_near_that_of_fp32(tiny, lora):
    base, batch = tiny("base", seed=1), items()[:BATCH]
    rows = torch.tensor([item.tokens + item.tokens[-1:] * (12 - len(item.tokens)) for item in batch])
    counted = torch.tensor([[float(2 <= k < len(item.tokens)) for k in range(1, 12)] for item in batch])

    def gradient(bfloat16: bool) -> dict[str, Tensor]:
        model = model_of(base, lora, bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(input_ids=rows[:, :-1]).logits
        lost = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        ((lost * counted.flatten()).sum() / counted.sum()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    model, held = model_of(base, lora, True), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name: held.__setitem__(name, parameter.grad.clone()))
    train(model, iter([batch]), steps=1, learning_rate=0.0, weight_decay=0.0, prompt_weight=0.0,
          report=lambda step, steps, loss: None, course=Course(accumulation=1, bfloat16=True))
    autocast, exact = gradient(True), gradient(False)
    assert set(held) == set(autocast) == set(exact)
    for name, wanted in autocast.items():
        assert wanted.dtype == torch.float32
        assert (held[name] - wanted).norm() <= 1e-3 * wanted.norm(), name
    assert sum(float((autocast[name] - exact[name]).norm() ** 2) for name in exact) < \
        0.06 ** 2 * sum(float(exact[name].norm() ** 2) for name in exact)
