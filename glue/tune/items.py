"""Training items: datasets read and tokenized once, then drawn in batches by weight."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from glue.errors import GlueError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Item(NamedTuple):
    """One text in tokens: the question, the answer behind it, and the end-of-text token."""

    tokens: list[int]
    question: int  # how many of them are the question


def read_pairs(folder: Path) -> list[tuple[str, str]]:
    """Question and answer of every train item of a dataset folder. Raises GlueError where there are none."""
    file = folder / "train.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []  # U+2028 may stand inside a question
    told = [json.loads(line) for line in lines if line]
    if not told:
        raise GlueError(f"{file} holds no items to train on", fix="make the dataset with  train: 1  or more")
    return [(line["question"], line["answer"]) for line in told]


def read_items(folder: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Item]:
    """The train items of a dataset folder in tokens. Raises GlueError for an item of more than `limit` tokens.

    A question ends where the tokens of question and answer together leave those of the question alone.
    """
    pairs = read_pairs(folder)
    questions = tokenizer([question for question, _ in pairs])["input_ids"]
    texts = tokenizer([f"{question} {answer}" for question, answer in pairs])["input_ids"]
    items = []
    for line, (question, text) in enumerate(zip(questions, texts, strict=True), start=1):
        shared = next((k for k, pair in enumerate(zip(question, text, strict=False)) if pair[0] != pair[1]),
                      min(len(question), len(text)))
        items.append(Item([*text, tokenizer.eos_token_id], shared))
        if len(text) >= limit:
            raise GlueError(f"{folder / 'train.jsonl'}:{line} is {len(text) + 1} tokens long with its end token; "
                            f"the model takes {limit}",
                            fix="shorten the item, or give the model a larger max_position_embeddings")
    return items


def draw_batches(datasets: Sequence[Sequence[Item]], weights: Sequence[float], batch_size: int,
                 rng: random.Random) -> Iterator[list[Item]]:
    """Endless batches: each item from a dataset chosen by weight, every item of it once before any comes again."""
    orders: list[list[Item]] = [[] for _ in datasets]
    while True:
        batch = []
        for k in rng.choices(range(len(datasets)), weights, k=batch_size):
            if not orders[k]:
                orders[k] = rng.sample(datasets[k], len(datasets[k]))
            batch.append(orders[k].pop())
        yield batch
