"""Training items: datasets read and tokenized once, then drawn in batches by weight."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from glue.errors import GlueError
from glue.tune.formats import TALKS, answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "plain", "chat"]
TooLong = Literal["refuse", "cut", "drop"]
AT_ONCE = 1000  # lines that are held as text


class Item(NamedTuple):
    """One text in tokens: the question, the answer behind it, and the end-of-text token; or a whole conversation.

    question  how many of the tokens are the question, or come before the first answer
    answers   of a conversation: where each answer begins and ends; nothing else of it counts
    """

    tokens: list[int]
    question: int
    answers: tuple[tuple[int, int], ...] = ()

    def weights(self, prompt_weight: float) -> list[float]:
        """How much the loss of each token but the first counts."""
        if not self.answers:
            return [prompt_weight] * (self.question - 1) + [1.0] * (len(self.tokens) - self.question)
        counted = [0.0] * len(self.tokens)
        for start, end in self.answers:
            counted[start:end] = [1.0] * (end - start)
        return counted[1:]

    def cut(self, length: int) -> Item | None:
        """Its first tokens; None where no answer begins among them."""
        ends = tuple((start, min(end, length)) for start, end in self.answers if start < length)
        return Item(self.tokens[:length], self.question, ends) if self.question < length else None


class Items(Sequence[Item]):
    """Items one after the other in one array: four bytes a token, where a list takes ten times as many.

    left_out  how many were too long to be taken; shortened: of how many only the beginning was
    """

    def __init__(self) -> None:
        self.left_out = self.shortened = 0
        self._tokens, self._ends, self._questions = array("i"), array("q", [0]), array("i")
        self._answers: dict[int, tuple[tuple[int, int], ...]] = {}

    def add(self, item: Item) -> None:
        """Put one behind the others."""
        if item.answers:
            self._answers[len(self)] = item.answers
        self._tokens.extend(item.tokens)
        self._ends.append(len(self._tokens))
        self._questions.append(item.question)

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors, of which `of` makes the same again."""
        spans = [(k, start, end) for k, some in self._answers.items() for start, end in some]
        return {"tokens": torch.tensor(self._tokens, dtype=torch.int32),
                "ends": torch.tensor(self._ends, dtype=torch.int64),
                "questions": torch.tensor(self._questions, dtype=torch.int32),
                "answers": torch.tensor(spans, dtype=torch.int64).reshape(-1, 3),
                "apart": torch.tensor([self.left_out, self.shortened])}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Items:
        """What these tensors were made of."""
        found = Items()
        found.left_out, found.shortened = tensors["apart"].tolist()
        found._tokens, found._questions = (array("i", tensors[name].numpy().tobytes())
                                           for name in ("tokens", "questions"))
        found._ends = array("q", tensors["ends"].numpy().tobytes())
        for k, start, end in tensors["answers"].tolist():
            found._answers[k] = (*found._answers.get(k, ()), (start, end))
        return found

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[each] for each in range(*k.indices(len(self)))]
        k = range(len(self))[k]
        return Item(self._tokens[self._ends[k]:self._ends[k + 1]].tolist(), self._questions[k],
                    self._answers.get(k, ()))


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """Question and answer of every train item of a dataset folder. Raises GlueError where there are none."""
    return list(chain.from_iterable(_plain(record) for _, record in _records(folder)))


def read_items(folder: Path, tokenizer: PreTrainedTokenizerBase, limit: int, *, template: Template = "plain",
               too_long: TooLong = "refuse") -> Items:
    """The train items of a dataset folder in tokens; of any number of them, only a thousand are held as text at once.

    limit     the most tokens that an item may have, with its end-of-text token
    template  chat: an item is a conversation as the tokenizer's chat template renders it; auto: those that have turns
              are, where there is a template; plain: a question ends where the tokens of question and answer together
              leave those of the question alone, and every answer of a conversation is an item
    too_long  refuse: an item of more tokens is an error; cut: its beginning is taken, if an answer begins in it;
              drop: it is left out

    Raises GlueError for an empty dataset, one of which nothing is left, an item that is too long, and what a template
    does not render.
    """
    from glue.tune.chat import rendered, templated

    found, chats = Items(), templated(folder, tokenizer, template)
    lines = _records(folder)
    while some := list(islice(lines, AT_ONCE)):
        for line, item in (rendered(some, folder, tokenizer, every=template == "chat") if chats else []):
            _take(found, item, line, folder, limit, too_long)
        plain = [(line, pair) for line, record in some if not (chats and (template == "chat" or "messages" in record))
                 for pair in _plain(record)]
        for line, item in _tokenized(plain, tokenizer):
            _take(found, item, line, folder, limit, too_long)
    if not found:
        raise GlueError(f"no item of {folder / 'train.jsonl'} has {limit} tokens or fewer",
                        fix="say a larger max_length, or  too_long: cut")
    return found


def _take(found: Items, item: Item, line: int, folder: Path, limit: int, too_long: TooLong) -> None:
    """Add an item, or deal with it as is said where it is too long."""
    if len(item.tokens) <= limit:
        found.add(item)
        return
    if too_long == "refuse":
        raise GlueError(f"{folder / 'train.jsonl'}:{line} is {len(item.tokens)} tokens long with its end token; "
                        f"the model takes {limit}",
                        fix="shorten the item, say  too_long: cut  or  drop,  or give the model a larger "
                            "max_position_embeddings")
    short = item.cut(limit) if too_long == "cut" else None
    if short is None:
        found.left_out += 1
        return
    found.shortened += 1
    found.add(short)


def _tokenized(pairs: Sequence[tuple[int, tuple[str, str]]],
               tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, Item]]:
    if not pairs:
        return
    questions = tokenizer([question for _, (question, _) in pairs])["input_ids"]
    texts = tokenizer([f"{question} {answer}" for _, (question, answer) in pairs])["input_ids"]
    for (line, _), question, text in zip(pairs, questions, texts, strict=True):
        shared = next((k for k, pair in enumerate(zip(question, text, strict=False)) if pair[0] != pair[1]),
                      min(len(question), len(text)))
        yield line, Item([*text, tokenizer.eos_token_id], shared)


def _plain(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Questions and answers of a line: one, or of a conversation every one."""
    if "messages" in record:
        yield from answers((turn["role"], turn["content"]) for turn in record["messages"])
    else:
        yield record["question"], record["answer"]


def _records(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every train item as it stands in its file, with its line. Raises GlueError where there are none."""
    file, any_ = folder / "train.jsonl", False
    if file.is_file():
        with open(file, "rb") as stream:  # bytes end a line at \n alone: U+2028 may stand inside a question
            for line, text in enumerate(stream, start=1):
                if text.strip():
                    any_ = True
                    yield line, json.loads(text)
    if not any_:
        raise GlueError(f"{file} holds no items to train on", fix="make the dataset with  train: 1  or more")


def parted_talks(folder: Path) -> bool:
    """Whether a dataset holds conversations that were parted into questions and answers when they were imported."""
    try:
        told = json.loads((folder / "dataset.json").read_bytes())
        return told.get("format") in TALKS and told.get("turns", "part") == "part"
    except (OSError, ValueError, AttributeError):
        return False


def draw_batches(datasets: Sequence[Sequence[Item]], weights: Sequence[float], batch_size: int,
                 rng: random.Random) -> Iterator[list[Item]]:
    """Endless batches: each item from a dataset chosen by weight, every item of it once before any comes again."""
    orders: list[list[int]] = [[] for _ in datasets]
    while True:
        batch = []
        for k in rng.choices(range(len(datasets)), weights, k=batch_size):
            if not orders[k]:
                orders[k] = rng.sample(range(len(datasets[k])), len(datasets[k]))
            batch.append(datasets[k][orders[k].pop()])
        yield batch


def by_length(batches: Iterator[list[Item]], steps: int, together: int, rng: random.Random) -> Iterator[list[Item]]:
    """The items of the first `steps` batches, in as many batches, each of items of like lengths.

    together  how many batches share their items; how these are sorted does not show in the order of the new ones
    """
    while steps > 0:
        some = list(islice(batches, min(together, steps)))
        steps -= len(some)
        items = iter(sorted(chain.from_iterable(some), key=lambda item: len(item.tokens)))
        alike = [list(islice(items, len(batch))) for batch in some]
        rng.shuffle(alike)
        yield from alike
