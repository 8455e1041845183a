"""One plain training loop: AdamW, warm-up and a schedule, clipping, and a lighter loss on questions than on answers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glue.errors import GlueError
from glue.tune.curve import Curve
from glue.tune.items import Item
from glue.tune.kept import Kept, State

Report = Callable[[int, int, float], None]  # step, of how many, loss
Loss = Callable[[list[Item], Tensor, Tensor], Tensor]  # see `surprise`
Schedule = Literal["cosine", "linear", "constant"]
TrainsIn = Literal["auto", "float32", "bfloat16"]  # auto: bfloat16 where the base's files hold 16 bits a number
WARM_UP, FLOOR = 0.05, 0.05  # share of the steps; share of the learning rate at the end
BETAS, CLIP = (0.9, 0.98), 1.0
PIECES = 2  # a batch is sorted by length and cut, so that short items are not padded to the longest
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight


@dataclass(frozen=True)
class Course:
    """How a training goes, whatever it learns.

    accumulation   pieces of a batch that are read one after the other, their gradients summed; where memory runs out,
                   they are halved
    schedule       of the learning rate after the warm-up: down to a twentieth, or constant
    warm_up        share of the steps in which the learning rate rises
    bfloat16       layers calculate in bfloat16; what trains, its gradients and its moments stay in fp32
    checkpointing  what a layer gives is calculated again where its gradient is, and not held until then
    """

    accumulation: int = PIECES
    schedule: Schedule = "cosine"
    warm_up: float = WARM_UP
    bfloat16: bool = False
    checkpointing: bool = False


def surprise(items: list[Item], tokens: Tensor, logits: Tensor) -> Tensor:
    """The loss of each next token: how unlikely it was. tokens [b, s + 1], logits [b, s, v] -> [b, s]"""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(tokens[:, 1:].shape)


def train(model: nn.Module, batches: Iterator[list[Item]], *, steps: int, learning_rate: float,
          weight_decay: float, prompt_weight: float, report: Report, loss: Loss = surprise,
          course: Course = Course(), seed: int = 0, kept: Kept | None = None) -> Curve:  # noqa: B008 - frozen
    """Train the parameters of `model` that require a gradient, in place.

    batches        the same from their beginning, also where a state is gone on with
    weight_decay   on matrices only
    prompt_weight  loss of a question's token, where one of an answer counts 1
    loss           what is made small, place by place
    seed           of dropout, where the model has any
    kept           where the state is kept meanwhile; one that is there is gone on with

    The same bits for the same batches where torch runs on one thread, killed in between or not. Raises GlueError where
    the loss, or its gradient, is no number, and where one item alone is too much for the memory of a device.
    """
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = [parameter for parameter in learned.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in learned.values() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=learning_rate, betas=BETAS, fused=True)
    device = next(model.parameters()).device
    curve = Curve(pieces=course.accumulation)
    model.train()
    with _drawing(seed, device), _recalculated(model, course.checkpointing):
        done = _gone_on(kept, learned, optimizer, device, curve) if kept else 0
        for _ in islice(batches, done):
            pass
        began = time.monotonic()
        for step in range(done + 1, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * share_of_rate(step, steps, course.schedule, course.warm_up)
            batch = next(batches)
            lost = _backward(model, batch, prompt_weight, loss, course.bfloat16, curve)
            norm = float(nn.utils.clip_grad_norm_(learned.values(), CLIP))
            if not math.isfinite(lost + norm):
                raise GlueError(f"the training diverged at step {step} of {steps}: loss {lost:.4g}, "
                                f"gradient norm {norm:.4g}", fix=f"lower learning_rate ({learning_rate})")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            curve.loss.append(lost)
            curve.tokens.append(sum(len(item.tokens) for item in batch))
            if kept and step < steps and kept.due:
                kept.keep(State(step, _held(learned, optimizer, device), {
                    "loss": curve.loss, "tokens": curve.tokens, "pieces": curve.pieces}))
            report(step, steps, lost)
        curve.seconds = time.monotonic() - began
    model.eval()
    if curve.pieces == course.accumulation:
        curve.pieces = 0
    return curve


def share_of_rate(step: int, steps: int, schedule: Schedule = "cosine", warm_up: float = WARM_UP) -> float:
    """Share of the learning rate at a step (from 1): linear in the warm-up, then as the schedule says."""
    warm = max(1, round(warm_up * steps))
    if step <= warm:
        return step / warm
    done = (step - warm) / max(1, steps - warm)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return FLOOR + (1 - FLOOR) * (1 - done)
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2


def _backward(model: nn.Module, batch: list[Item], prompt_weight: float, loss: Loss, bfloat16: bool,
              curve: Curve) -> float:
    """Add the gradient of the batch's mean loss, and return that loss.

    Where a device's memory runs out, the gradients so far are dropped and the batch is read again in twice as many
    pieces; so are those that follow.
    """
    while True:
        lost = _in_pieces(model, batch, curve.pieces, prompt_weight, loss, bfloat16)
        if lost is not None:
            return lost
        if curve.pieces >= len(batch):
            longest = max(len(item.tokens) for item in batch)
            raise GlueError(f"one item of {longest} tokens does not fit into the device's memory beside what trains",
                            fix="say  checkpointing: true,  dtype: bfloat16,  a smaller max_length,  or teach an "
                                "adapter (step: lora)")
        model.zero_grad(set_to_none=True)
        curve.pieces = min(2 * curve.pieces, len(batch))


def _in_pieces(model: nn.Module, batch: list[Item], count: int, prompt_weight: float, loss: Loss,
               bfloat16: bool) -> float | None:
    """The batch's mean loss, its gradient added; None where memory ran out, and nothing of it is held any more."""
    ordered = sorted(batch, key=lambda item: len(item.tokens))
    size = math.ceil(len(ordered) / count)
    pieces = [(some, *pad(some, prompt_weight)) for some in (ordered[k:k + size] for k in range(0, len(ordered), size))]
    whole = sum(float(weights.sum()) for _, _, weights in pieces)
    device = next(model.parameters()).device
    lost = 0.0
    try:
        for some, tokens, weights in pieces:
            tokens, weights = tokens.to(device), weights.to(device)
            with _calculating(device, bfloat16):
                logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            piece = (loss(some, tokens, logits.float()).flatten() * weights.flatten()).sum() / whole
            piece.backward()
            lost += piece.item()
    except torch.OutOfMemoryError:
        return None
    return lost


def pad(items: list[Item], prompt_weight: float) -> tuple[Tensor, Tensor]:
    """Items as tokens [b, s], filled up on the right with the last token, and weights [b, s - 1] of the next tokens.

    A filled place has weight 0; no mask is needed, since no earlier token sees it.
    """
    longest = max(len(item.tokens) for item in items)
    tokens = torch.tensor([item.tokens + item.tokens[-1:] * (longest - len(item.tokens)) for item in items])
    weights = torch.tensor([item.weights(prompt_weight) + [0.0] * (longest - len(item.tokens)) for item in items])
    return tokens, weights


def _calculating(device: torch.device, bfloat16: bool) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from a seed of their own; those of the caller are put back."""
    beside = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(beside, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


@contextmanager
def _recalculated(model: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing, layer by layer, as transformers has it."""
    if not wanted:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise GlueError(f"checkpointing is not known of {type(model).__name__}", fix="remove  checkpointing: true")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # the other way needs an input with a gradient
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


# --- states -----------------------------------------------------------------------------------------------------------

def _held(learned: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer,
          device: torch.device) -> dict[str, Tensor]:
    """All tensors of a state, under the names that `_gone_on` knows."""
    held: dict[str, Tensor] = {"random/cpu": torch.get_rng_state()}
    if device.type != "cpu":
        held[f"random/{device.type}"] = torch.get_device_module(device).get_rng_state(device)
    for name, parameter in learned.items():
        held[f"weight/{name}"] = parameter
        moments = optimizer.state.get(parameter, {})
        held |= {f"{moment}/{name}": moments[moment] for moment in MOMENTS if moment in moments}
    return held


def _gone_on(kept: Kept, learned: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device,
             curve: Curve) -> int:
    """Put everything as an earlier run has left it, and return how many of its steps count."""
    found = kept.found()
    if found is not None and {name: tuple(parameter.shape) for name, parameter in learned.items()} != {
            name.removeprefix("weight/"): tuple(found.tensors[name].shape) for name in found.tensors
            if name.startswith("weight/")}:
        kept.unused, found = "it is of other weights", None
    curve.unused = kept.unused
    if found is None:
        return 0
    tensors = found.tensors
    with torch.no_grad():
        for name, parameter in learned.items():
            parameter.copy_(tensors[f"weight/{name}"])
            if all(f"{moment}/{name}" in tensors for moment in MOMENTS):
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(found.step), dtype=torch.float32, device=parameter.device),
                    **{moment: tensors[f"{moment}/{name}"].to(parameter.device, copy=True) for moment in MOMENTS}}
    torch.set_rng_state(tensors["random/cpu"].clone())
    if (name := f"random/{device.type}") in tensors and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(tensors[name].clone(), device)
    curve.loss, curve.tokens = list(found.told["loss"]), list(found.told["tokens"])
    curve.pieces, curve.resumed = found.told["pieces"], found.step
    return found.step
