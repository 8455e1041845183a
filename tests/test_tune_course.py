"""How a training goes: pieces of batches, memory that runs out, schedules, lengths, dtypes, and what it tells."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from glue.checkpoint import Checkpoint
from glue.errors import GlueError
from glue.identity import identify
from glue.kinds import load
from glue.tune.curve import NOTE, Curve, read_curve
from glue.tune.finetune import finetune, in_half, with_adapter
from glue.tune.items import Item, Items, by_length, draw_batches, read_items
from glue.tune.loop import Course, share_of_rate, train
from glue.tune.reading import Reading, read

LORA = {"r": 2, "alpha": 4, "targets": ["q_proj", "up_proj"]}


def quiet(step: int, steps: int, loss: float) -> None:
    """Say nothing."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dataset(tmp_path) -> Path:
    """Twenty items of 3 to 10 tokens with their end."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(
        json.dumps({"question": " ".join(f"w{3 + (k * j) % 30}" for j in range(1, 2 + k % 7)), "answer": f"w{4 + k}",
                    "choices": [], "gold": 0}) + "\n" for k in range(20)))
    return folder


@pytest.fixture
def teach(tiny, dataset) -> Callable[..., Curve]:
    base = tiny("base", seed=3)

    def run(out: Path, **more: Any) -> Curve:
        given = {"base": base.folder, "data": [(dataset, 1.0)], "steps": 5, "learning_rate": 1e-2, "batch_size": 8,
                 "seed": 5, "report": quiet}
        return finetune(out, **{**given, **more})
    return run


def drawn(lengths: list[int]) -> list[Item]:
    rng = random.Random(0)
    return [Item([rng.randrange(3, 40) for _ in range(length)], 1) for length in lengths]


# -- pieces --

def test_in_how_many_pieces_a_batch_is_read_changes_no_more_than_rounding(tmp_path, teach):
    whole = teach(tmp_path / "1", course=Course(accumulation=1))
    for pieces in (2, 3, 8, 50):
        assert teach(tmp_path / str(pieces), course=Course(accumulation=pieces)).loss == pytest.approx(whole.loss,
                                                                                                      rel=1e-4)
    assert teach(tmp_path / "plain").loss == teach(tmp_path / "again", course=Course(accumulation=2)).loss


class Small:
    """The memory of a device that has room for some rows at a time; counts how often it ran out."""

    def __init__(self, model: Any, rows: int, *, behind: bool = False):
        self.out = 0
        forward = model.forward

        def limited(input_ids: torch.Tensor, **more: Any) -> Any:
            if len(input_ids) > rows and not behind:
                self.out += 1
                raise torch.OutOfMemoryError("no room")
            found = forward(input_ids=input_ids, **more)
            if len(input_ids) > rows:
                found.logits.register_hook(self.fail)
            return found

        model.forward = limited

    def fail(self, gradient: torch.Tensor) -> None:
        self.out += 1
        raise torch.OutOfMemoryError("no room behind")


@pytest.mark.parametrize("behind", [False, True], ids=["forwards", "backwards"])
def test_a_batch_that_does_not_fit_is_read_in_more_pieces_and_so_are_those_behind_it(tiny, behind):
    batches = [drawn([5, 6, 7, 8, 9, 10, 11, 12]) for _ in range(3)]

    def trained(pieces: int, rows: int) -> tuple[Curve, dict[str, torch.Tensor], int]:
        model = load(tiny("base", seed=3)).model
        memory = Small(model, rows, behind=behind)
        curve = train(model, iter(batches), steps=3, learning_rate=1e-2, weight_decay=0.0, prompt_weight=0.0,
                      report=quiet, course=Course(accumulation=pieces))
        return curve, {name: value.clone() for name, value in model.state_dict().items()}, memory.out

    small, weights, out = trained(1, 2)
    roomy, wanted, never = trained(4, 100)
    assert (out, never) == (2, 0), "it ran out twice, at 8 rows and at 4, and not again in later batches"
    assert (small.pieces, roomy.pieces) == (4, 0) and small.figures()["pieces"] == 4
    assert small.loss == roomy.loss
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_one_item_that_does_not_fit_is_an_error_with_what_would_help(tiny):
    model = load(tiny("base")).model
    Small(model, 0)
    with pytest.raises(GlueError, match=r"one item of 9 tokens does not fit[^\n]*\n  say  checkpointing: true"):
        train(model, iter([drawn([9, 5, 4])]), steps=1, learning_rate=1e-2, weight_decay=0.0, prompt_weight=0.0,
              report=quiet)


# -- memory --

@pytest.mark.parametrize("more", [{}, {"lora": LORA}, {"lora": {**LORA, "dropout": 0.4}}, {"dtype": "bfloat16"}],
                         ids=["full", "lora", "dropout", "bfloat16"])
def test_checkpointing_holds_less_and_changes_no_bit(tmp_path, tiny, teach, monkeypatch, more):
    teach(tmp_path / "held", **more)
    recalculated = []
    from transformers.modeling_layers import GradientCheckpointingLayer
    call = GradientCheckpointingLayer.__call__
    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", lambda self, *args, **kwargs: (
        recalculated.append(self.gradient_checkpointing), call(self, *args, **kwargs))[1])
    teach(tmp_path / "again", course=Course(checkpointing=True), **more)
    assert recalculated and all(recalculated)
    assert identify(tmp_path / "again") == identify(tmp_path / "held")


def test_a_model_that_cannot_recalculate_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(GlueError, match="checkpointing is not known of Linear"):
        train(model, iter([]), steps=1, learning_rate=1e-2, weight_decay=0.0, prompt_weight=0.0, report=quiet,
              course=Course(checkpointing=True))


def test_a_full_tuning_in_bfloat16_trains_in_fp32_and_is_written_in_half_the_bytes(tmp_path, teach):
    plain, half = teach(tmp_path / "plain"), teach(tmp_path / "half", dtype="bfloat16")
    assert half.loss == pytest.approx(plain.loss, rel=0.02) and half.loss != plain.loss
    kinds = {header.dtype for header in Checkpoint(tmp_path / "half").headers.values()}
    assert kinds == {torch.bfloat16} and json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"
    assert {header.dtype for header in Checkpoint(tmp_path / "plain").headers.values()} == {torch.float32}


def test_an_adapter_in_bfloat16_is_fp32_over_a_base_of_half_the_bytes(tmp_path, tiny, teach):
    model: Any = with_adapter(load(tiny("other"), dtype="bfloat16").model, LORA, 0)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    half = teach(tmp_path / "half", dtype="bfloat16", lora=LORA)
    assert half.loss == pytest.approx(teach(tmp_path / "plain", lora=LORA).loss, rel=0.02)
    from safetensors import safe_open

    with safe_open(tmp_path / "half/adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118 - no mapping


def test_auto_means_what_the_files_of_the_base_hold(tiny):
    assert in_half(tiny("half", dtype=torch.bfloat16).folder, "auto")
    assert not in_half(tiny("whole").folder, "auto")
    assert in_half(tiny("other").folder, "bfloat16")
    assert not in_half(tiny("one", dtype=torch.bfloat16).folder, "float32")


# -- adapters --

def test_all_linear_layers_but_the_head_can_be_adapted_at_once(tiny):
    model: Any = with_adapter(load(tiny("base")).model, {**LORA, "targets": ["all-linear"]}, 0)
    adapted = {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}


def test_rslora_scales_by_the_root_of_the_rank(tiny):
    scale = {}
    for rslora in (False, True):
        model: Any = with_adapter(load(tiny("base")).model, {**LORA, "r": 4, "alpha": 8, "rslora": rslora}, 0)
        scale[rslora] = next(module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A"))
    assert scale == {False: 2.0, True: 4.0}


# -- schedules and batches --

def test_schedules_warm_up_alike_and_come_down_to_a_twentieth_or_not_at_all():
    told = {name: [share_of_rate(step, 100, name, 0.1) for step in range(1, 101)]
            for name in ("cosine", "linear", "constant")}
    assert all(rates[:10] == pytest.approx([k / 10 for k in range(1, 11)]) for rates in told.values())
    assert told["constant"][10:] == [1.0] * 90
    assert told["linear"][-1] == told["cosine"][-1] == pytest.approx(0.05)
    assert told["linear"][54] == told["cosine"][54] == pytest.approx(0.525), "half way down both are half way"
    assert told["linear"][30] < told["cosine"][30]
    assert share_of_rate(1, 100, "linear", 0.0) == 1.0


def test_batches_of_like_lengths_have_the_same_items_and_less_padding():
    items = drawn([random.Random(k).randrange(2, 60) for k in range(500)])

    def batches() -> Iterator[list[Item]]:
        return draw_batches([items], [1.0], 8, random.Random(1))

    plain, alike = list(islice(batches(), 50)), list(by_length(batches(), 50, 32, random.Random(2)))
    assert alike == list(by_length(batches(), 50, 32, random.Random(2)))
    assert len(alike) == 50 and {len(batch) for batch in alike} == {8}
    for part in (slice(0, 32), slice(32, 50)):
        tokens = [Counter(tuple(item.tokens) for batch in some[part] for item in batch) for some in (plain, alike)]
        assert tokens[0] == tokens[1]

    def padding(some: list[list[Item]]) -> int:
        return sum(max(len(item.tokens) for item in batch) - len(item.tokens) for batch in some for item in batch)

    assert padding(alike) < 0.2 * padding(plain)
    sums = [sum(len(item.tokens) for item in batch) for batch in alike[:32]]
    assert sums != sorted(sums) and sums != sorted(sums, reverse=True), "short ones do not all come first"


def test_an_epoch_by_length_reads_every_item_once(tiny, dataset):
    tokenizer = AutoTokenizer.from_pretrained(tiny("base").folder)
    found = read([(dataset, 1.0)], tokenizer, 64, steps={"epochs": 2}, batch_size=5, seed=0,
                 reading=Reading(group_by_length=True))
    every = [tuple(item.tokens) for batch in found.batches for item in batch]
    assert found.steps == 8 and set(Counter(every[:20]).values()) == set(Counter(every[20:]).values()) == {1}
    assert len(every) == 40


def test_epochs_are_as_many_steps_as_read_each_item_that_often(tiny, dataset):
    tokenizer = AutoTokenizer.from_pretrained(tiny("base").folder)
    found = read([(dataset, 1.0)], tokenizer, 64, steps={"epochs": 3}, batch_size=10, seed=0, reading=Reading())
    counts = Counter(tuple(item.tokens) for batch in islice(found.batches, found.steps) for item in batch)
    assert found.steps == 6 and set(counts.values()) == {3} and len(counts) == 20
    assert read([(dataset, 1.0)], tokenizer, 64, steps={"epochs": 0.5}, batch_size=8, seed=0,
                reading=Reading()).steps == 2


# -- lengths --

def test_items_that_are_too_long_are_refused_cut_or_dropped_as_is_said(tiny, dataset):
    tokenizer = AutoTokenizer.from_pretrained(tiny("base").folder)
    every = read_items(dataset, tokenizer, 64)
    lengths = [len(item.tokens) for item in every]
    with pytest.raises(GlueError, match=r"train.jsonl:5 is 8 tokens long with its end token; the model takes 7"):
        read_items(dataset, tokenizer, 7)
    short = read_items(dataset, tokenizer, 7, too_long="drop")
    assert [item for item in every if len(item.tokens) <= 7] == list(short)
    assert short.left_out == sum(length > 7 for length in lengths) and short.shortened == 0
    cut = read_items(dataset, tokenizer, 7, too_long="cut")
    assert [item.tokens[:7] for item in every if item.question < 7] == [item.tokens for item in cut]
    assert cut.left_out == sum(item.question >= 7 for item in every) > 0
    assert cut.shortened == sum(len(item.tokens) > 7 and item.question < 7 for item in every) > 0
    assert all(sum(item.weights(0.0)) >= 1 for item in cut), "what is cut still teaches an answer"
    with pytest.raises(GlueError, match="no item of .*train.jsonl has 2 tokens or fewer"):
        read_items(dataset, tokenizer, 2, too_long="drop")


def test_a_max_length_is_a_limit_below_the_model_s_own_and_the_curve_tells_what_was_left_out(tmp_path, teach):
    curve = teach(tmp_path / "out", reading=Reading(max_length=7, too_long="cut"), steps={"epochs": 1})
    assert (curve.left_out, curve.cut) == (5, 3) and max(curve.tokens) <= 7 * 8
    assert curve.figures()["left_out"] == 5 and curve.figures()["steps"] == 2
    with pytest.raises(GlueError, match="takes 64"):
        teach(tmp_path / "no", reading=Reading(max_length=1000), data=[(_long(tmp_path), 1.0)])


def _long(folder: Path) -> Path:
    (folder / "long").mkdir()
    (folder / "long/train.jsonl").write_text(json.dumps({"question": "w3 " * 70, "answer": "w4"}) + "\n")
    return folder / "long"


def test_items_side_by_side_in_one_array_are_what_was_put_there():
    wanted = [Item([1, 2, 3], 1), Item([4], 0), Item([5, 6, 7, 8], 1, ((1, 2), (3, 4))), Item([9, 9], 2)]
    found = Items()
    for item in wanted:
        found.add(item)
    assert list(found) == wanted and found[-1] == wanted[-1] and found[1:3] == wanted[1:3] and len(found) == 4
    with pytest.raises(IndexError):
        found[4]
    found.left_out, found.shortened = 3, 2
    again = Items.of(found.tensors())
    assert list(again) == wanted and (again.left_out, again.shortened) == (3, 2)


# -- the curve --

def test_a_curve_tells_the_loss_and_the_tokens_of_every_step(tmp_path, teach):
    reported: list[float] = []
    curve = teach(tmp_path / "out", report=lambda step, steps, loss: reported.append(loss))
    assert curve.loss == reported and len(curve.tokens) == 5 and min(curve.tokens) > 8 * 3
    told = curve.figures()
    assert (told["first"], told["last"], told["best"]) == tuple(float(f"{value:.6g}") for value in (
        reported[0], reported[-1], min(reported)))
    assert told["tokens"] == sum(curve.tokens) and told["tokens_per_second"] > 0 and "resumed" not in told
    before = identify(tmp_path / "out")
    curve.write(tmp_path / "out")
    assert identify(tmp_path / "out") == before, "it is no part of the product's identity"
    again = read_curve(tmp_path / "out")
    assert again is not None and again.tokens == curve.tokens and again.loss == pytest.approx(curve.loss, rel=1e-5)
    (tmp_path / "out" / NOTE).write_text('{"loss": 3}')
    assert read_curve(tmp_path / "out") is None and read_curve(tmp_path) is None
