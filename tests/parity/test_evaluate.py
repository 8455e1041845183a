"""Our scores against lm-eval's own: item by item in this process, and through its command in one that lacks glue."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from glue.errors import SuiteError
from glue.evaluate.fast import prepare, score
from glue.evaluate.lm_eval import evaluate
from glue.evaluate.suite import Suite, Task, task_items, write_tasks
from glue.kinds import Running
from glue.member import Member

WORDS = ["snake", "owl", "cat", "red fox", "river", "stone", "of cloth", "Zoë"]
SUITE = Suite("small", (Task("kind", "kind", "choice", "acc", 0.25), Task("norm", "kind", "choice", "acc_norm", 0.25),
                        Task("order", "order", "choice", "acc", 0.5),
                        Task("pets", "pets", "generate", "exact_match", 0.0, max_tokens=6)))


def _items(n=24):
    """kind: one fact a name, choices of several lengths; order: sorted letters; pets: the answer is written."""
    rng = random.Random(0)
    names = [f"{a}{b}" for a in ("Gu", "Ze", "Mo", "La") for b in ("bu", "di", "ra", "lo", "pin", "tatata")]
    items = {"kind": [], "order": [], "pets": []}
    for k in range(n):
        choices = rng.sample(WORDS, 4)
        items["kind"].append((f"the kind of {names[k]} is", choices, rng.randrange(4)))
        letters = rng.sample("abcdefgh", 4)
        items["order"].append((f"sort : {' '.join(letters)} =", [" ".join(sorted(letters)),
                                                                     " ".join(sorted(letters)[::-1])], 0))
        items["pets"].append((f"what pet has {names[k]} ?", rng.sample(WORDS, 2), 0))
    return {name: [{"question": question, "choices": choices, "gold": gold, "answer": choices[gold]}
                   for question, choices, gold in some] for name, some in items.items()}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Folder with the datasets, the folders by name, and a tokenizer whose words are often several tokens."""
    folder = tmp_path_factory.mktemp("zoo") / "a zoo [1]*"  # what a file pattern would make of this name is no matter
    texts = []
    for name, items in _items().items():
        (folder / name).mkdir(parents=True)
        (folder / name / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        texts += [f"{item['question']} {item['answer']}" for item in items]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([*texts, *[" snake owl ?"] * 99], trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                        pad_token="</s>", clean_up_tokenization_spaces=False)
    return folder, {name: folder / name for name in _items()}, tokenizer, texts


def _model(zoo, seed, steps=0, positions=64):
    """A small Llama, random or trained for some steps on the test items themselves, so that many are right."""
    _, _, tokenizer, texts = zoo
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=positions, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    rows = [tokenizer(text)["input_ids"] + [2] for text in texts]
    tokens = torch.tensor([row + [2] * (48 - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (48 - len(row)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def _running(model, zoo, **more):
    return Running(Member("m", "model", "/nowhere"), model, zoo[2], **more)


def _both(running, zoo, batch_size=16):
    """Results of the fast scorer and of lm-eval, by task."""
    folder, data, tokenizer, _ = zoo
    names = write_tasks(SUITE, "test", data, folder / "tasks")
    items = {task.name: task_items(task, data[task.data], "test") for task in SUITE.tasks}
    fast = score(running, prepare(tokenizer, SUITE.tasks, items))
    theirs = evaluate(running, folder / "tasks", names, batch_size=batch_size)
    return ({name: some.tolist() for name, some in fast.items()},
            {task.name: theirs[name] for task, name in zip(SUITE.tasks, names, strict=True)})


@pytest.mark.parametrize("seed, steps", [(0, 0), (1, 0), (2, 0), (0, 45), (1, 60)])
def test_the_fast_scorer_agrees_with_lm_eval_on_every_item(zoo, seed, steps):
    fast, theirs = _both(_running(_model(zoo, seed, steps), zoo), zoo)
    assert fast == theirs
    if steps:
        assert all(np.mean(some) > 0 for some in fast.values()), "results that are all 0 would show nothing"
        assert 0 < np.mean(fast["pets"]) < 1 or 0 < np.mean(fast["kind"]) < 1
    else:
        assert 0 < np.mean(fast["kind"]) < 1


def test_questions_longer_than_the_model_can_read_are_cut_as_lm_eval_cuts_them(zoo):
    fast, theirs = _both(_running(_model(zoo, 0, 45, positions=11), zoo), zoo)
    longest = max(len(zoo[2](text)["input_ids"]) for text in zoo[3])
    assert longest > 13 and fast == theirs


def test_choices_agree_with_one_answer_at_a_time_in_double_precision(zoo):
    folder, data, tokenizer, _ = zoo
    model = _model(zoo, 3, 20)
    fast, _ = _both(_running(model, zoo), zoo)
    model = model.double()
    for task in SUITE.tasks[:3]:
        right = []
        for item in task_items(task, data[task.data], "test"):
            values = []
            for choice in item.choices:
                start = len(tokenizer(item.question)["input_ids"])
                tokens = torch.tensor(tokenizer(f"{item.question} {choice}")["input_ids"])
                with torch.no_grad():
                    logs = model(tokens[None]).logits[0].log_softmax(-1)
                value = sum(float(logs[k - 1, tokens[k]]) for k in range(start, len(tokens)))
                values.append(value / (len(choice) if task.metric == "acc_norm" else 1))
            right.append(float(np.argmax(values) == item.gold))
        assert fast[task.name] == right


def _writes(tokenizer, tokens):
    """A real Llama that sees nothing but the last token: after " ?" it writes these tokens one by one, then </s>."""
    chain, size = tokenizer.convert_tokens_to_ids(["Ġ?", *tokens]), len(tokenizer) + len(tokenizer) % 2
    assert None not in chain and len(set(chain)) == len(chain), "each token has one that comes after it"
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(float("norm" in name))
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), size))
        model.lm_head.weight[2] = 0.5
        for now, after in pairwise(chain):
            model.lm_head.weight[after, now] = 1
    return model.eval()


WRITINGS = {  # what a model writes after the question -> whether that is the answer "snake"
    "the answer": (["Ġsnake"], 1), "another word": (["Ġowl"], 0), "nothing": ([], 0),
    "the answer in other tokens": (["Ġ", "s", "n", "a", "k", "e"], 1), "half of it": (["Ġ", "s", "n", "a"], 0),
    "more tokens than it may write": (["Ġ", "s", "n", "a", "k", "<unk>", "e"], 0),
    "the answer without a space": (["s", "n", "a", "k", "e"], 1),
    "a token that is not shown, then the answer": (["<unk>", "Ġsnake"], 1),
    "the answer, a new line, more": (["Ġsnake", "Ċ", "Ġowl"], 1), "a new line, the answer": (["Ċ", "Ġsnake"], 0),
    "the answer and more": (["Ġsnake", "Ġowl"], 0), "the answer and a space": (["Ġsnake", "Ġ"], 1),
    "the answer and a letter": (["Ġsnake", "s"], 0), "half a character": (["Ġsnake", "Ã"], 0),
    "the first letter, then another word": (["Ġ", "s", "Ġowl"], 0)}


@pytest.mark.parametrize("writing", WRITINGS)
def test_a_written_answer_counts_by_its_text_here_and_there(zoo, tmp_path, writing):
    tokens, right = WRITINGS[writing]
    item = {"question": "what pet has Gubu ?", "choices": [], "gold": 0, "answer": "snake"}
    (tmp_path / "test.jsonl").write_text(json.dumps(item) + "\n")
    suite, running = Suite("s", SUITE.tasks[-1:]), _running(_writes(zoo[2], tokens), zoo)
    names = write_tasks(suite, "test", {"pets": tmp_path}, tmp_path / "tasks")
    items = {"pets": task_items(suite.tasks[0], tmp_path, "test")}
    assert score(running, prepare(zoo[2], suite.tasks, items))["pets"].tolist() == [right]
    assert evaluate(running, tmp_path / "tasks", names)[names[0]] == [right]


class _Two(torch.nn.Module):
    """Two models behind one face, which answers only while it is pinned to one of them."""

    def __init__(self, *models):
        super().__init__()
        self.inner, self.at, self.device = torch.nn.ModuleList(models), None, torch.device("cpu")
        self.config, self.generation_config = models[0].config, models[0].generation_config

    def forward(self, input_ids, **more):
        return self.inner[self.at](input_ids, **more)

    def generate(self, *given, **more):
        return self.inner[self.at].generate(*given, **more)

    def tie_weights(self):
        pass

    @contextmanager
    def pinned(self, route):
        assert self.at is None, "routes are pinned one at a time"
        self.at = route
        yield
        self.at = None


def test_a_member_with_routes_gets_from_lm_eval_what_each_expert_would_get(zoo):
    def route(contexts):
        return [sum(context) % 2 for context in contexts]

    experts = [_model(zoo, 0, 45), _model(zoo, 5)]
    two = _Two(*experts)
    fast, theirs = _both(_running(two, zoo, route=route, pinned=two.pinned), zoo)
    alone = [_both(_running(expert, zoo), zoo)[1] for expert in experts]
    for task in SUITE.tasks:
        items = task_items(task, zoo[1][task.data], "test")
        chosen = route([zoo[2](item.question)["input_ids"] for item in items])
        assert set(chosen) == {0, 1}
        assert theirs[task.name] == [alone[expert][task.name][k] for k, expert in enumerate(chosen)]
    assert fast == theirs


def test_the_batch_size_changes_no_result_of_lm_eval(zoo):
    running = _running(_model(zoo, 1, 45), zoo)
    assert _both(running, zoo, batch_size=1)[1] == _both(running, zoo, batch_size=64)[1]


def test_lm_eval_is_quiet_and_leaves_the_seeds_alone(zoo, capfd):
    running = _running(_model(zoo, 0), zoo)
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    evaluate(running, zoo[0] / "tasks", write_tasks(SUITE, "test", zoo[1], zoo[0] / "tasks"))
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before
    assert capfd.readouterr() == ("", "")


def test_a_task_that_has_no_file_is_refused(zoo):
    write_tasks(SUITE, "test", zoo[1], zoo[0] / "tasks")
    with pytest.raises(SuiteError, match="no task 'glue_small_test_kin'.*did you mean 'glue_small_test_kind'"):
        evaluate(_running(_model(zoo, 0), zoo), zoo[0] / "tasks", ["glue_small_test_kin"])


def test_changed_data_are_read_anew(zoo, tmp_path):
    items = _items(8)["order"]
    task = Suite("s", (Task("order", "d", "choice", "acc", 0.5),))
    running, found = _running(_model(zoo, 0, 45), zoo), []
    for some in (items, [{**item, "choices": item["choices"][::-1], "gold": 1} for item in items][:5]):
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in some))
        names = write_tasks(task, "test", {"d": tmp_path}, tmp_path / "tasks")
        found.append(evaluate(running, tmp_path / "tasks", names)[names[0]])
    assert found[1] == found[0][:5] and len(found[0]) == 8


def test_the_command_of_lm_eval_gives_the_same_scores_without_glue(zoo, tmp_path):
    model = _model(zoo, 0, 45)
    model.save_pretrained(tmp_path / "model")
    zoo[2].save_pretrained(tmp_path / "model")
    tasks = Suite("command", SUITE.tasks[1:])
    names = write_tasks(tasks, "test", zoo[1], tmp_path / "tasks")
    ours = evaluate(_running(model, zoo), tmp_path / "tasks", names)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--model_args",
               f"pretrained={tmp_path / 'model'},dtype=float32", "--include_path", str(tmp_path / "tasks"),
               "--tasks", ",".join(names), "--device", "cpu", "--batch_size", "64", "--log_samples",
               "--output_path", str(tmp_path / "out")]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for task, name in zip(tasks.tasks, names, strict=True):
        (samples,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        assert [float(row[task.metric]) for row in rows] == ours[name]
