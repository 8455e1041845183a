"""Conversations: what an import keeps of them, how a template renders them, and which of their tokens count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glue.errors import GlueError, Mistakes
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.tune.bpe import train_tokenizer
from glue.tune.chat import conversation
from glue.tune.finetune import finetune
from glue.tune.formats import pairs
from glue.tune.items import Item, read_items, read_pairs
from glue.tune.loop import pad
from glue.tune.reading import Reading
from glue.workers import Workers
from glue.zoo import Zoo

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
MARKED = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
          "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
          "{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
INST = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}")
FORGETS = CHATML.replace("m['content'] +", "(m['content'] if loop.last or m['role'] != 'assistant' else 'cut') +")
TURNS = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who is red?"},
         {"role": "assistant", "content": "Ann."}, {"role": "user", "content": "And blue?"},
         {"role": "assistant", "content": "Bo, I think."}]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], "system"), "value": turn["content"]}
            for turn in TURNS]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tokenizer of bytes and a few words, with the tokens of ChatML."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Be short. Who is red? Ann. And blue? Bo, I think. user assistant system"] * 3, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chatting(made) -> Callable[[str], Any]:
    """The tokenizer with a template; "" takes it away."""
    def make(template: str) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(made)
        tokenizer.chat_template = template or None
        return tokenizer
    return make


def said(item: Item, tokenizer: Any) -> list[str]:
    """The text of every token that counts, run by run."""
    return [tokenizer.decode(item.tokens[start:end]) for start, end in item.answers]


def written(folder: Path, *records: dict[str, Any], **about: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if about:
        (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def kept(turns: list[dict[str, str]] = TURNS) -> dict[str, Any]:
    return {"question": "q", "choices": [], "gold": 0, "answer": "a", "messages": turns}


# -- what a template renders --

@pytest.mark.parametrize(("template", "wanted"), [
    (CHATML, ["Ann.<|im_end|>", "Bo, I think.<|im_end|>"]), (MARKED, ["Ann.<|im_end|>", "Bo, I think.<|im_end|>"]),
    (INST, [" Ann.</s>", " Bo, I think.</s>"])], ids=["differences", "marks", "inst"])
def test_every_answer_counts_up_to_the_token_that_ends_it_and_nothing_else(chatting, template, wanted):
    tokenizer = chatting(template)
    turns = TURNS if template != INST else TURNS[1:]
    item = conversation(turns, tokenizer)
    assert item.tokens == tokenizer.apply_chat_template(turns)["input_ids"]
    assert said(item, tokenizer) == wanted
    assert item.question == item.answers[0][0]
    _, weights = pad([item], 0.5)
    counted = {k for start, end in item.answers for k in range(start, end)}
    assert weights[0].tolist() == [float(k in counted) for k in range(1, len(item.tokens))]


def test_marks_and_differences_find_the_same_tokens(chatting):
    assert conversation(TURNS, chatting(CHATML)) == conversation(TURNS, chatting(MARKED))


def test_a_loss_on_a_chat_is_that_of_its_answers(tmp_path, tiny, chatting):
    from glue.kinds import load
    from glue.tune.loop import train

    tokenizer = chatting(CHATML)
    item = conversation(TURNS, tokenizer)
    model = load(tiny("base", vocab_size=len(tokenizer), max_position_embeddings=128)).model
    curve = train(model, iter([[item, item]]), steps=1, learning_rate=0.0, weight_decay=0.0, prompt_weight=0.7,
                  report=lambda step, steps, loss: None)
    tokens = torch.tensor([item.tokens])
    logs = model.double()(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]
    places = [k - 1 for start, end in item.answers for k in range(start, end)]
    assert curve.loss[0] == pytest.approx(-logs[places].mean().item(), rel=1e-5)


def test_a_template_that_renders_a_beginning_otherwise_is_refused_with_the_line(tmp_path, chatting):
    folder = written(tmp_path / "d", kept(TURNS[:3]), kept())
    with pytest.raises(GlueError, match=r"train.jsonl:2: the base's chat template does not render turns 1 to 3") as no:
        read_items(folder, chatting(FORGETS), 128, template="chat")
    assert "{% generation %}" in no.value.fix
    asking = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>' }}")
    with pytest.raises(GlueError, match="does not render turns 1 to 3"):
        conversation(TURNS, chatting(asking))


@pytest.mark.parametrize(("template", "message"), [
    ("{{ raise_exception('roles must alternate') }}", "template fails: TemplateError: roles must alternate"),
    ("{{ 1 // 0 }}", "template fails: ZeroDivisionError"),
    ("{% for %}", "template fails: TemplateSyntaxError"),
    ("{{ messages[0]['content'].__class__.__mro__ }}", "template fails: SecurityError"),
    ("{{ strftime_now('%d') }}" + CHATML, "says today's date"),
    ("nothing{% generation %}{% endgeneration %}", "renders nothing that the assistant says")])
def test_a_template_that_fails_or_reaches_out_is_told(chatting, template, message):
    with pytest.raises(GlueError, match=message) as wrong:
        conversation(TURNS, chatting(template))
    assert wrong.value.fix


def test_the_date_in_a_template_is_the_same_every_day(chatting):
    template = ("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
                "{{ 'Today is ' + date_string }}" + CHATML)
    tokenizer = chatting(template)
    assert tokenizer.decode(conversation(TURNS, tokenizer).tokens).startswith("Today is 26 Jul 2024")


# -- which template is used --

def test_turns_are_rendered_where_there_is_a_template_and_parted_where_there_is_none(tmp_path, chatting):
    folder = written(tmp_path / "d", kept(), {"question": "Who is red?", "answer": "Ann."})
    bare, chats = chatting(""), chatting(CHATML)
    parted = read_items(folder, bare, 128, template="plain")
    assert list(read_items(folder, bare, 128, template="auto")) == list(parted) == list(
        read_items(folder, chats, 128, template="plain")) and len(parted) == 3
    auto, chat = (read_items(folder, chats, 128, template=word) for word in ("auto", "chat"))
    assert [said(item, chats) for item in auto] == [["Ann.<|im_end|>", "Bo, I think.<|im_end|>"], []]
    assert auto[1] == parted[2], "a plain question and answer stay what they were"
    assert [said(item, chats) for item in chat] == [["Ann.<|im_end|>", "Bo, I think.<|im_end|>"], ["Ann.<|im_end|>"]]
    with pytest.raises(GlueError, match="tokenizer has no chat template"):
        read_items(folder, bare, 128, template="chat")


def test_conversations_that_were_parted_are_not_rendered_as_if_a_user_had_said_them(tmp_path, chatting):
    record = {"question": "User: Who?\nAssistant:", "answer": "Ann."}
    parted = written(tmp_path / "a", record, format="sharegpt", counts={})
    with pytest.raises(GlueError, match="parted into questions and answers") as wrong:
        read_items(parted, chatting(CHATML), 128, template="chat")
    assert "turns: keep" in wrong.value.fix
    assert len(read_items(parted, chatting(CHATML), 128, template="auto")) == 1
    others = written(tmp_path / "b", record, format="alpaca")
    assert len(read_items(others, chatting(CHATML), 128, template="chat")) == 1


def test_a_chat_that_is_too_long_is_cut_behind_an_answer_or_left_out(tmp_path, chatting):
    tokenizer = chatting(CHATML)
    whole = conversation(TURNS, tokenizer)
    (_, first), (second, _) = whole.answers
    folder = written(tmp_path / "d", kept())
    short, = read_items(folder, tokenizer, second + 1, template="chat", too_long="cut")
    assert short.tokens == whole.tokens[:second + 1] and short.answers == (whole.answers[0], (second, second + 1))
    short, = read_items(folder, tokenizer, first + 1, template="chat", too_long="cut")
    assert short.answers == whole.answers[:1]
    with pytest.raises(GlueError, match="no item of"):
        read_items(folder, tokenizer, whole.question, template="chat", too_long="cut")


# -- imports --

def test_a_conversation_that_is_kept_reads_plainly_as_if_it_had_been_parted():
    record = {"conversations": [*SHAREGPT, {"from": "human", "value": "Thanks"}]}
    parted = pairs(record, "sharegpt", {})
    whole, = pairs(record, "sharegpt", {}, "keep")
    assert (whole.question, whole.answer, whole.kin) == (parted[-1].question, parted[-1].answer, parted[0].kin)
    assert [{"role": role, "content": text} for role, text in whole.turns] == TURNS
    assert pairs({"messages": TURNS}, "messages", {}, "keep") == [whole]
    assert pairs({"messages": TURNS}, "messages", {}) == parted


RECIPE = """
steps:
  - {{as: talks, step: import, path: ../raw/talks.jsonl, format: messages, dev: 2, test: 2{turns}}}
  - {{as: taught, step: lora, base: base, data: {{talks: 1}}, steps: {{epochs: 2}}, learning_rate: 1e-2, batch_size: 4,
     targets: [q_proj, v_proj]{template}}}
"""


@pytest.fixture
def place(tmp_path, tiny, chatting) -> Callable[..., Path]:
    """A zoo with a base that chats, and a file of twelve conversations."""
    def make(turns: str = "", template: str = "") -> Path:
        if not (tmp_path / "zoo.yaml").exists():
            tokenizer = chatting(CHATML)
            base = tiny("base", vocab_size=len(tokenizer), max_position_embeddings=128)
            tokenizer.save_pretrained(base.folder)
            (tmp_path / "zoo.yaml").write_text("members:\n  base: {path: base}\n")
            (tmp_path / "raw").mkdir()
            (tmp_path / "raw/talks.jsonl").write_text("".join(json.dumps({"messages": [
                *TURNS[:1], {"role": "user", "content": f"Who is {k}?"}, *TURNS[2:]]}) + "\n" for k in range(12)))
            (tmp_path / "recipes").mkdir()
        (tmp_path / "recipes/r.yaml").write_text(RECIPE.format(turns=turns, template=template))
        return tmp_path
    return make


def ran(place: Path) -> Any:
    with Workers(0) as workers:
        return run(read_recipe(place / "recipes/r.yaml"), Zoo(place / "zoo.yaml"), workers)


def test_an_import_keeps_turns_in_what_teaches_and_not_in_what_is_asked(place):
    from glue.evaluate.suite import read_items as asked

    folder = ran(place(", turns: keep"))["talks"].folder
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(len(line["messages"]) == 5 for line in lines)
    assert len(asked(folder / "dev.jsonl")) == len(asked(folder / "test.jsonl")) == 2
    whole = read_pairs(folder)
    parted = ran(place())["talks"].folder
    assert set(whole) < set(read_pairs(parted)) and (len(whole), len(read_pairs(parted))) == (16, 20)
    assert "messages" not in (parted / "train.jsonl").read_text()


def test_a_recipe_teaches_a_base_that_chats_the_answers_of_conversations(place):
    plan = ran(place(", turns: keep"))
    told = json.loads((plan["taught"].folder / "training.json").read_text())
    assert len(told["loss"]) == 4, "8 conversations, twice, by 4"
    origin = plan["taught"].origin
    plain = ran(place(", turns: keep", ", template: plain"))
    other = json.loads((plain["taught"].folder / "training.json").read_text())
    assert len(other["loss"]) == 8 and plain["taught"].digest != plan["taught"].digest
    assert "template" not in origin.params and plain["taught"].origin.params["template"] == "plain"


def test_turns_are_kept_of_conversations_only(place):
    folder = place(", turns: keep")
    file = folder / "recipes/r.yaml"
    file.write_text(file.read_text().replace("format: messages", "format: alpaca"))
    with pytest.raises(Mistakes, match="'alpaca' has no turns that could be kept"):
        make_plan(read_recipe(file), Zoo(folder / "zoo.yaml"))


def test_a_tuned_model_keeps_the_template_it_was_taught_by(place, tmp_path):
    folder = place()
    data = written(tmp_path / "d", kept())
    finetune(tmp_path / "out", base=folder / "base", data=[(data, 1.0)], steps=1, learning_rate=1e-3, batch_size=2,
             report=lambda step, steps, loss: None, reading=Reading(template="chat"))
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML
