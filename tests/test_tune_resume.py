"""Trainings that were ended in the middle: what is kept of them, what is gone on with, and what is not trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glue.identity import identify
from glue.tune import reading
from glue.tune.distill import distill
from glue.tune.finetune import finetune
from glue.tune.kept import STATE, Kept, State
from glue.tune.loop import Course
from glue.tune.pretrain import pretrain
from glue.tune.reading import Reading
from tests.crashes import Crash, crashing

STEPS, ENDED = 9, 4
LORA = {"r": 2, "alpha": 4, "targets": ["q_proj", "up_proj"]}
WAYS: dict[str, dict[str, Any]] = {
    "full": {}, "lora": {"lora": LORA}, "dropout": {"lora": {**LORA, "dropout": 0.3}},
    "bfloat16": {"dtype": "bfloat16"}, "lora in bfloat16": {"lora": LORA, "dtype": "bfloat16"},
    "by length": {"reading": Reading(group_by_length=True)},
    "recalculated": {"course": Course(checkpointing=True, accumulation=3, schedule="linear", warm_up=0.3)}}


class Ended(Exception):
    """Something in the middle of a training."""


def ending(after: int):
    def report(step: int, steps: int, loss: float) -> None:
        if step == after:
            raise Ended
    return report


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
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(
        json.dumps({"question": " ".join(f"w{3 + (k * j) % 30}" for j in range(1, 2 + k % 7)), "answer": f"w{4 + k}",
                    "choices": [], "gold": 0}) + "\n" for k in range(20)))
    return folder


@pytest.fixture
def teach(tiny, dataset):
    base = tiny("base", seed=3)

    def run(out: Path, report=quiet, **more):
        return finetune(out, base=base.folder, data=[(dataset, 1.0)], steps=STEPS, learning_rate=1e-2, batch_size=6,
                        seed=5, report=report, **more)
    return run


@pytest.mark.parametrize("way", WAYS)
def test_a_training_that_was_ended_goes_on_to_the_same_bits(tmp_path, teach, way):
    calm = teach(tmp_path / "calm", **WAYS[way])
    with pytest.raises(Ended):
        teach(tmp_path / "struck", ending(ENDED), kept=Kept(tmp_path / "state", "key", 0), **WAYS[way])
    again = teach(tmp_path / "struck", kept=Kept(tmp_path / "state", "key", 0), **WAYS[way])
    assert (again.resumed, again.unused) == (ENDED, "")
    assert (again.loss, again.tokens) == (calm.loss, calm.tokens) and len(calm.loss) == STEPS
    assert identify(tmp_path / "struck") == identify(tmp_path / "calm")


def test_a_training_that_is_ended_again_and_again_goes_on_every_time(tmp_path, teach):
    calm = teach(tmp_path / "calm")
    for after in (2, 5, 8):
        with pytest.raises(Ended):
            teach(tmp_path / "struck", ending(after), kept=Kept(tmp_path / "state", "key", 0))
    again = teach(tmp_path / "struck", kept=Kept(tmp_path / "state", "key", 0))
    assert again.resumed == 8 and again.loss == calm.loss
    assert identify(tmp_path / "struck") == identify(tmp_path / "calm")


def test_dropout_draws_from_the_seed_and_leaves_the_numbers_of_the_caller_alone(tmp_path, teach):
    torch.manual_seed(0)
    expected = torch.rand(3)
    found = []
    for out in ("one", "two"):
        torch.manual_seed(0)
        teach(tmp_path / out, lora={**LORA, "dropout": 0.5})
        found.append(identify(tmp_path / out))
        assert torch.equal(torch.rand(3), expected)
    teach(tmp_path / "none", lora=LORA)
    assert found[0] == found[1] != identify(tmp_path / "none")


def _no_key(folder: Path) -> str:
    return "other"


def _other_bytes(folder: Path) -> str:
    file, = folder.glob("*/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(bytes(data))
    return "key"


def _cut_off(folder: Path) -> str:
    file, = folder.glob("*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    return "key"


def _other_step(folder: Path) -> str:
    note = folder / STATE
    note.write_text(note.read_text().replace(f"{ENDED:09d}", f"{2:09d}"))
    return "key"


def _no_tensors(folder: Path) -> str:
    file, = folder.glob("*/model.safetensors")
    file.unlink()
    return "key"


@pytest.mark.parametrize(("damage", "said"), [
    (_no_key, "other data or settings"), (_other_bytes, "its tensors are damaged"), (_cut_off, "it is damaged: "),
    (_other_step, "state.json is damaged"), (_no_tensors, "it is damaged: ")])
def test_a_state_that_is_damaged_or_of_another_training_is_told_and_not_used(tmp_path, teach, damage, said):
    calm = teach(tmp_path / "calm")
    with pytest.raises(Ended):
        teach(tmp_path / "struck", ending(ENDED), kept=Kept(tmp_path / "state", "key", 0))
    key = damage(tmp_path / "state")
    again = teach(tmp_path / "struck", kept=Kept(tmp_path / "state", key, 1e9))
    assert said in again.unused and again.resumed == 0 and again.loss == calm.loss
    assert said in again.figures()["unused"]
    assert identify(tmp_path / "struck") == identify(tmp_path / "calm")


def test_a_state_of_other_weights_is_not_used(tmp_path, teach):
    with pytest.raises(Ended):
        teach(tmp_path / "out", ending(ENDED), kept=Kept(tmp_path / "state", "key", 0), lora=LORA)
    again = teach(tmp_path / "out", kept=Kept(tmp_path / "state", "key", 1e9), lora={**LORA, "r": 3})
    assert (again.resumed, again.unused) == (0, "it is of other weights")


def test_a_kill_while_a_state_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    kept = Kept(tmp_path / "state", "key", 0)
    kept.keep(State(1, {"a": torch.arange(4000.0)}, {"loss": [0.1]}))
    monkeypatch.setattr("os.pwrite", crashing(9000))
    with pytest.raises(Crash):
        kept.keep(State(2, {"a": -torch.arange(4000.0)}, {"loss": [0.1, 0.2]}))
    monkeypatch.undo()
    found = Kept(tmp_path / "state", "key", 0).found()
    assert found is not None and found.step == 1 and found.told == {"loss": [0.1]}
    assert torch.equal(found.tensors["a"], torch.arange(4000.0))
    kept.keep(State(2, {"a": -torch.arange(4000.0)}, {"loss": [0.1, 0.2]}))
    assert sorted(file.name for file in (tmp_path / "state").iterdir()) == ["000000002", STATE]
    kept.end()
    assert not (tmp_path / "state").exists()


def test_states_are_kept_as_often_as_is_said(tmp_path, teach):
    teach(tmp_path / "out", kept=Kept(tmp_path / "state", "key", 1e9))
    assert not (tmp_path / "state").exists(), "a training that is shorter than that writes none"


def test_tokens_that_took_long_to_make_are_not_made_again(tmp_path, teach, monkeypatch):
    monkeypatch.setattr(reading, "LONG", -1.0)
    more = {"reading": Reading(max_length=7, too_long="cut")}
    calm = teach(tmp_path / "calm", **more)
    with pytest.raises(Ended):
        teach(tmp_path / "struck", ending(ENDED), kept=Kept(tmp_path / "state", "key", 0), **more)
    with monkeypatch.context() as patched:
        patched.setattr(reading, "read_items", None)
        again = teach(tmp_path / "struck", kept=Kept(tmp_path / "state", "key", 0), **more)
    assert (again.resumed, again.loss, again.left_out, again.cut) == (ENDED, calm.loss, calm.left_out, calm.cut)
    assert calm.left_out and calm.cut and identify(tmp_path / "struck") == identify(tmp_path / "calm")
    file, = (tmp_path / "state/read").iterdir()
    file.write_bytes(file.read_bytes()[:-50])
    damaged = teach(tmp_path / "struck", kept=Kept(tmp_path / "state", "key", 0), **more)
    assert damaged.loss == calm.loss and damaged.unused == "", "tokens that are damaged are made again"


def test_a_student_and_a_new_model_go_on_too(tmp_path, tiny, dataset):
    teacher, student = tiny("teacher", seed=1), tiny("student", seed=2)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}

    def taught(out: Path, report=quiet, kept: Kept | None = None):
        return distill(out, teacher=teacher, student=student, data=[(dataset, 1.0)], steps=STEPS, learning_rate=1e-2,
                       batch_size=6, report=report, kept=kept)

    def begun(out: Path, report=quiet, kept: Kept | None = None):
        return pretrain(out, data=[(dataset, 1.0)], vocabulary=[dataset], architecture=shape, steps=STEPS,
                        learning_rate=1e-2, batch_size=6, report=report, kept=kept)

    for make in (taught, begun):
        place = tmp_path / make.__name__
        make(place / "calm")
        with pytest.raises(Ended):
            make(place / "struck", ending(ENDED), Kept(place / "state", "key", 0))
        assert make(place / "struck", kept=Kept(place / "state", "key", 0)).resumed == ENDED
        assert identify(place / "struck") == identify(place / "calm")


def test_the_state_is_no_part_of_a_product(tmp_path, teach):
    """Even where a kill comes between the product and the end of its state."""
    teach(tmp_path / "calm")
    teach(tmp_path / "out", kept=Kept(tmp_path / "out" / "state", "key", 0))
    assert (tmp_path / "out" / "state" / STATE).is_file()
    assert identify(tmp_path / "out") == identify(tmp_path / "calm")
