"""Distillation: a student comes to say what its teacher says, whatever that is, and stays as it is where it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from glue.errors import MethodError
from glue.family import families
from glue.kinds import load, weights
from glue.member import Member
from glue.mix.levels import model as level
from glue.mix.parts import Dev, Parts
from glue.mix.site import gates
from glue.proxy.pair import write
from glue.tune.distill import agreeing, asked, distill
from glue.tune.items import Item, read_items
from glue.tune.loop import pad
from tests.test_proxy import an_adapter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def dataset(tmp_path) -> Path:
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({
        "question": " ".join(f"w{3 + (k * j) % 30}" for j in range(1, 3 + k % 3)),
        "answer": f"w{4 + k} w{30 - k}"}) + "\n" for k in range(12)))
    return folder


def taught(out: Path, dataset: Path, teacher: Member, student: Member, **changed: Any) -> list[float]:
    """The loss of every step; the result is in `out`."""
    found: list[float] = []
    distill(out, teacher=teacher, student=student, data=[(dataset, 1.0)], **{
        "steps": 30, "learning_rate": 5e-3, "batch_size": 12, "report": lambda step, steps, loss: found.append(loss),
        **changed})
    return found


def apart(teacher: Member, student: Member, dataset: Path) -> float:
    """KL(teacher || student) in nats, the mean over the places of answers."""
    one, other = load(teacher), load(student)
    tokens, places = pad(read_items(dataset, one.tokenizer, 64), 0.0)
    with torch.no_grad():
        p, q = (running.model(tokens[:, :-1]).logits.double().log_softmax(-1) for running in (one, other))
    return float(((p.exp() * (p - q)).sum(-1) * places).sum() / places.sum())


def test_a_student_comes_nearer_to_a_larger_teacher_and_is_a_model_that_can_be_merged(tiny, tmp_path, dataset):
    teacher, student = tiny("teacher", seed=1, hidden_size=48), tiny("student", seed=2)
    losses = taught(tmp_path / "out", dataset, teacher, student)
    made = Member("out", "model", str(tmp_path / "out"))
    before, after = apart(teacher, student, dataset), apart(teacher, made, dataset)
    assert after < before / 4 and losses[-1] < losses[0] / 4
    assert weights(made).headers.keys() == weights(student).headers.keys()
    assert load(made).tokenizer.get_vocab() == load(student).tokenizer.get_vocab()


@pytest.mark.parametrize("through", ["itself", "proxy"])
def test_a_student_that_agrees_already_does_not_move_by_a_bit(tiny, tmp_path, dataset, through):
    student, small = tiny("student", seed=2), tiny("small", seed=3)
    teacher = student
    if through == "proxy":  # with alpha 0
        tuned = an_adapter(small, tmp_path / "tuned")
        write(tmp_path / "p", large=student, tuned=tuned, small=small, alpha=0.0)
        teacher = Member("p", "proxy", str(tmp_path / "p"), base=student)
    losses = taught(tmp_path / "out", dataset, teacher, student, steps=5)
    assert losses == [0.0] * 5
    now, before = weights(Member("out", "model", str(tmp_path / "out"))), weights(student)
    assert all(torch.equal(now[name], before[name]) for name in before.headers)


def test_a_proxy_is_taught_back_into_the_small_model_it_was_made_with(tiny, tmp_path, dataset):
    large, small = tiny("large", seed=1, hidden_size=48), tiny("small", seed=3)
    write(tmp_path / "p", large=large, tuned=an_adapter(small, tmp_path / "tuned"), small=small, alpha=1.0)
    teacher = Member("p", "proxy", str(tmp_path / "p"), base=large)
    taught(tmp_path / "out", dataset, teacher, small)
    made = Member("out", "model", str(tmp_path / "out"))
    assert apart(teacher, made, dataset) < apart(teacher, small, dataset) / 4


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_its_loss_and_gradient_are_those_of_torch_s_divergence(temperature):
    draw = torch.Generator().manual_seed(0)
    said, logits = (torch.randn(2, 3, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(2, 3, generator=draw, dtype=torch.float64)
    tokens = torch.zeros(2, 4, dtype=torch.long)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    # two rows of the heads are no tokens
    found = agreeing(lambda items, tokens: said, 7, temperature)([], tokens, ours)
    wanted = F.kl_div((theirs[..., :7] / temperature).log_softmax(-1), (said[..., :7] / temperature).log_softmax(-1),
                      log_target=True, reduction="none").sum(-1)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    assert float((found - wanted).detach().abs().max()) < 1e-12
    assert float((ours.grad - theirs.grad).abs().max()) < 1e-12 and not bool(ours.grad[..., 7:].any())


def test_temperature_and_the_weight_of_questions_change_what_is_learnt(tiny, tmp_path, dataset):
    teacher, student = tiny("teacher", seed=1), tiny("student", seed=2)
    plain = taught(tmp_path / "1", dataset, teacher, student, steps=1)
    warm = taught(tmp_path / "2", dataset, teacher, student, steps=1, temperature=4.0)
    answers = taught(tmp_path / "3", dataset, teacher, student, steps=1, prompt_weight=0.0)
    assert warm[0] < plain[0] / 4  # what is divided by 4 is nearer to even
    assert answers[0] == pytest.approx(apart(teacher, student, dataset), rel=1e-4)
    assert abs(answers[0] - plain[0]) > 1e-4


def test_a_mixture_teaches_by_the_expert_that_the_question_chooses(tiny, tmp_path):
    experts = tiny("one", seed=11), tiny("two", seed=12)
    parts = Parts(experts, None, experts[0])
    sites = level.sites(parts, Dev(["w5", "w30"], torch.eye(2), torch.tensor([0, 1])))
    level.write(tmp_path / "mix", parts, gates(families("routing").choose("linear"), sites))
    running = load(Member("mix", "mixture", str(tmp_path / "mix")))
    items = [Item([1, k, 17, 4, 2], 2) for k in range(3, 40)]
    tokens = torch.tensor([item.tokens for item in items])
    routes = running.route([item.tokens[:2] for item in items])
    with torch.no_grad():
        found = asked(running)(items, tokens)
        alone = [load(expert).model(tokens).logits for expert in experts]
    assert set(routes) == {0, 1}
    for k, route in enumerate(routes):
        assert float((found[k] - alone[route][k]).abs().max()) < 1e-5


def test_a_teacher_of_other_tokens_is_refused_before_anything_is_loaded(tiny, tmp_path, dataset):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{k}": 42 - k for k in range(3, 40)}}
    teacher, student = tiny("odd", seed=1, words=words), tiny("student", seed=2)
    (teacher.folder / "model.safetensors").unlink()
    with pytest.raises(MethodError, match="'odd' has 40 tokens and 'student' 40, and their numbers mean other tokens"):
        taught(tmp_path / "out", dataset, teacher, student)
    with pytest.raises(MethodError, match="their numbers mean other tokens"):
        families("steps")["distill"].traits["check"](teacher=teacher, student=student)
