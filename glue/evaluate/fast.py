"""A batched scorer for search: what lm-eval would report for each item, without lm-eval, several times sooner.

choice    summed log-likelihood of " " + choice after the question. Choices that differ in their last token only share
          one pass of the model, since all but the last token are the same input. Others share what the model makes of
          the question: it is read once, and each choice goes on from there.
generate  the text a model writes greedily, cut at the end of the line, compared with the answer. One pass over question
          and answer shows what greedy writing would do for as long as it writes the answer's tokens. Where it leaves
          them, the text so far most often cannot become the answer, which settles the item; the few that may still
          write it otherwise (other tokens for the same text, a special token that is not shown) go on token by token.

Departs from lm-eval where `generation_config` has penalties or other processors: they are not applied here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from glue.errors import SuiteError
from glue.evaluate.routes import by_expert, by_route
from glue.evaluate.suite import Item, Task
from glue.kinds import BatchSize, Running
from glue.kinds.text import longest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
ROWS = 64
SHARED = 4  # a shorter context is read again for each choice: a second pass of the model would cost more


@dataclass(frozen=True)
class _Row:
    """One pass of the model over context + tail.

    lasts       of choice: tokens that may follow; each makes one choice, tail + last
    answer      of generate: the text that is wanted; the tail is a guess of the tokens that the model will write
    sure        of generate: how many tokens of the tail are known to be what it writes
    max_tokens  of generate: how many it may write
    """

    context: Ids
    tail: Ids
    lasts: Ids = ()
    answer: str = ""
    sure: int = 0
    max_tokens: int = 0


@dataclass(frozen=True)
class Prepared:
    """Items of some tasks as tokens: made once for a tokenizer, and asked of any number of candidates.

    places  task -> item -> (row, position in its lasts) of each choice; of one row for generate
    """

    tasks: tuple[Task, ...]
    items: Mapping[str, Sequence[Item]]
    rows: list[_Row]
    places: Mapping[str, list[list[tuple[int, int]]]]


def prepare(tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task], items: Mapping[str, Sequence[Item]]) -> Prepared:
    """Tokenise the items of each task, as lm-eval does: question and answer together, then cut where the question ends.

    items  task name -> items, as `task_items` reads them
    """
    lasts: dict[tuple[Ids, Ids], list[int]] = {}  # (context, tail) of a choice row -> its last tokens
    numbers: dict[tuple[Ids, Ids], int] = {}
    rows: list[_Row] = []
    places: dict[str, list[list[tuple[int, int]]]] = {}
    for task in tasks:
        asked = items[task.name]
        endings = [item.choices if task.output == "choice" else (item.answer,) for item in asked]
        contexts = _encode(tokenizer, [item.question for item in asked])
        whole = iter(_encode(tokenizer, [f"{item.question} {ending}" for item, some in zip(asked, endings, strict=True)
                                         for ending in some]))
        places[task.name] = []
        for item, context, some in zip(asked, contexts, endings, strict=True):
            if not context:
                raise SuiteError(f"task '{task.name}': {item.question!r} has no token, and the model has to read one",
                                 fix="put words before the question, or leave the item out")
            places[task.name].append([])
            for ending in some:
                tokens = next(whole)[len(context):]
                if task.output == "generate":
                    places[task.name][-1].append((len(rows), 0))
                    rows.append(_Row(context, tokens[:task.max_tokens], answer=ending, max_tokens=task.max_tokens))
                    continue
                if not tokens:
                    raise SuiteError(f"task '{task.name}': {ending!r} adds no token to {item.question!r}")
                key = context, tokens[:-1]
                if key not in numbers:
                    numbers[key], lasts[key] = len(rows), []
                    rows.append(_Row(*key))
                places[task.name][-1].append((numbers[key], len(lasts[key])))
                lasts[key].append(tokens[-1])
    for key, number in numbers.items():
        rows[number] = replace(rows[number], lasts=tuple(lasts[key]))
    return Prepared(tuple(tasks), items, rows, places)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Ids]:
    """Token ids with the tokenizer's own special tokens; a text that opens with the first of them gets no more."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    opening = str(tokenizer.decode([first]))
    return [tuple(ids) if not text.startswith(opening) else tuple(tokenizer.encode(text, add_special_tokens=False))
            for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True)]


def ask(running: Running, tasks: Sequence[Task], items: Mapping[str, Sequence[Item]], *,
        batch_size: BatchSize = "auto") -> dict[str, np.ndarray]:
    """`prepare` and `score` in one, also for members whose experts have tokenizers of their own.

    A question chooses its expert by its text, once for all of its choices.
    """
    return _asked(running, tasks, items, lambda answering, prepared: score(answering, prepared, batch_size=batch_size))


def losses(running: Running, tasks: Sequence[Task], items: Mapping[str, Sequence[Item]], *,
           batch_size: BatchSize = "auto") -> dict[str, np.ndarray]:
    """How surprised a member is by each right answer: task -> [items], in bits a byte of the space and the answer.

    The same for members with different tokens, since bytes are counted and not tokens.
    """
    tasks = [replace(task, output="choice", metric="acc") for task in tasks]
    answers = {name: [item._replace(choices=(item.answer,), gold=0) for item in some] for name, some in items.items()}

    def lost(answering: Running, prepared: Prepared) -> dict[str, np.ndarray]:
        heard = _heard(answering, prepared, batch_size)
        return {task.name: np.array([-heard[row][k] / np.log(2) / len(f" {item.answer}".encode())
                                     for item, ((row, k),) in zip(prepared.items[task.name],
                                                                  prepared.places[task.name], strict=True)])
                for task in prepared.tasks}

    return _asked(running, tasks, answers, lost)


def _asked(running: Running, tasks: Sequence[Task], items: Mapping[str, Sequence[Item]],
           told: Callable[[Running, Prepared], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What is told of the items, each by the expert that its question chooses."""
    def run(answering: Running, some: list[tuple[Task, Item]]) -> list[float]:
        apart = {task.name: [item for other, item in some if other is task] for task in tasks}
        asked = [task for task in tasks if apart[task.name]]
        found = told(answering, prepare(answering.tokenizer, asked, apart))
        results = {name: iter(values.tolist()) for name, values in found.items()}
        return [next(results[task.name]) for task, _ in some]

    every = [(task, item) for task in tasks for item in items[task.name]]
    results = iter(by_expert(running, [item.question for _, item in every], every, run))
    return {task.name: np.array([next(results) for _ in items[task.name]]) for task in tasks}


def score(running: Running, prepared: Prepared, *, batch_size: BatchSize = "auto") -> dict[str, np.ndarray]:
    """Results of one member, task -> [items] in the order of the items; the batch size changes speed only."""
    heard, results = _heard(running, prepared, batch_size), dict[str, np.ndarray]()
    for task in prepared.tasks:
        values = [[heard[row][k] for row, k in some] for some in prepared.places[task.name]]
        if task.output == "choice":
            values = [[_right(task, item, some)] for item, some in zip(prepared.items[task.name], values, strict=True)]
        results[task.name] = np.array([some[0] for some in values])
    return results


def _heard(running: Running, prepared: Prepared, batch_size: BatchSize) -> list[list[float]]:
    """What each row came to: the log-likelihood of each of its choices, or whether the right text was written."""
    reader = _Reader(running, batch_size)
    contexts = [row.context for row in prepared.rows]
    return by_route(running, contexts, prepared.rows, reader.judge, reader.longest)


def _right(task: Task, item: Item, likelihoods: list[float]) -> float:
    """1 where the gold choice is the likeliest; of equals, the first counts."""
    lengths = [len(choice) if task.metric == "acc_norm" else 1 for choice in item.choices]
    return float(np.argmax(np.array(likelihoods) / np.array(lengths)) == item.gold)


class _Reader:
    """A model that is asked rows."""

    def __init__(self, running: Running, batch_size: BatchSize):
        self.model, self.tokenizer = running.model.eval(), running.tokenizer
        self.room = running.room
        asked = self.room.size if batch_size == "auto" else batch_size
        self.batch_size = ROWS if asked == "auto" else asked
        self.longest = longest(running.model, running.tokenizer)
        self.slices = "logits_to_keep" in inspect.signature(running.model.forward).parameters
        told = running.model.generation_config.eos_token_id if running.model.generation_config else None
        told = running.tokenizer.eos_token_id if told is None else told
        self.stops = set(told) if isinstance(told, list) else {told}

    def judge(self, rows: list[_Row]) -> list[list[float]]:
        """For each row the log-likelihood of each choice, or 1 or 0 for the text that the model wrote."""
        results = self._read(rows)
        asked = {k: row for k, row in enumerate(rows) if not row.lasts}
        seen = [results[k] for k in asked]
        while asked:
            going_on = {}
            for (k, row), greedy in zip(asked.items(), seen, strict=True):
                sure = row.sure
                while sure < len(row.tail) and greedy[sure] == row.tail[sure]:
                    sure += 1
                written = (*row.tail[:sure], int(greedy[sure]))
                settled = self._settled(row, written)
                if settled is None:
                    going_on[k] = replace(row, tail=written, sure=len(written))
                else:
                    results[k] = [settled]
            asked, seen = going_on, self._read(list(going_on.values()))
        return results

    def _settled(self, row: _Row, written: Ids) -> float | None:
        """1 or 0 once it is sure whether the text will be the answer, else None."""
        end = next((k for k, token in enumerate(written) if token in self.stops), row.max_tokens)
        ended = len(written) > end or len(written) >= row.max_tokens
        text = str(self.tokenizer.decode(list(written[:end + 1][:row.max_tokens]), skip_special_tokens=True))
        for stop in ("\n", self.tokenizer.eos_token or "\n"):
            ended, text = ended or stop in text, text.split(stop)[0]
        if ended:
            return float(text.strip() == row.answer)
        # spaces are left out because decoding may still move them, U+FFFD because it stands for half a character
        so_far = "".join(text.split()).rstrip("\ufffd")
        return None if "".join(row.answer.split()).startswith(so_far) else 0.0

    @torch.inference_mode()
    def _read(self, rows: list[_Row]) -> list[list[float]]:
        """For choice the log-likelihoods of tail + last; for generate the likeliest token at each place of the tail."""
        ids = [self._seen(row) for row in rows]
        results: list[list[float]] = [[]] * len(rows)
        shared = self._sharing(rows, ids)
        for some in self._together(rows, shared):
            for k, result in zip(some, self.room.read(some, lambda part: self._read_shared([rows[k] for k in part])),
                                 strict=True):
                results[k] = result
        once = {k for group in shared for k in group}
        order = sorted((k for k in range(len(rows)) if k not in once), key=lambda k: len(ids[k]))
        while order:
            most = self.room.of(self.batch_size)
            some, order = order[:most], order[most:]
            for k, result in zip(some, self.room.read(some, lambda part: self._read_batch(
                    [rows[k] for k in part], [ids[k] for k in part])), strict=True):
                results[k] = result
        return results

    def _sharing(self, rows: list[_Row], ids: list[Ids]) -> list[list[int]]:
        """Positions of the rows of each context that is worth to be read once; the same whatever the batches."""
        together: dict[Ids, list[int]] = {}
        for k, row in enumerate(rows):
            if row.lasts and len(ids[k]) == len(row.context) + len(row.tail):  # what is cut has a context of its own
                together.setdefault(row.context, []).append(k)
        found = [group for context, group in together.items() if len(group) > 1 and len(context) >= SHARED]
        return sorted(found, key=lambda group: len(rows[group[0]].context)) if found and self._continues else []

    def _together(self, rows: list[_Row], shared: list[list[int]]) -> list[list[int]]:
        """Rows of equally long contexts, as many whole contexts as go into a batch."""
        batches: list[list[int]] = []
        length = -1
        for group in shared:
            now = len(rows[group[0]].context)
            if now != length or len(batches[-1]) + len(group) > self.room.of(self.batch_size):
                batches.append([])
            length = now
            batches[-1] += group
        return batches

    @cached_property
    def _continues(self) -> bool:
        """Whether the model can go on from what it made of a context; not where routes or windows are part of that."""
        if "past_key_values" not in inspect.signature(self.model.forward).parameters:
            return False
        cache: Any = getattr(self.model(self._put([[0]]), use_cache=True), "past_key_values", None)
        parts = cache.slots if type(cache).__name__ == "ProxyCache" else [cache]
        return all(type(part).__name__ in ("DynamicCache", "PromptCache")
                   and {type(x).__name__ for x in part.layers} == {"DynamicLayer"} for part in parts)

    def _seen(self, row: _Row) -> Ids:
        """What of context + tail the model can see: its last tokens, and room left for what it may write."""
        if not row.lasts:
            if row.max_tokens >= self.longest:
                raise SuiteError(f"max_tokens: {row.max_tokens} leaves no room for a question in the {self.longest} "
                                 "tokens that the model can read")
            return row.context[row.max_tokens - self.longest:] + row.tail
        if len(row.tail) >= self.longest:
            raise SuiteError(f"a choice of {len(row.tail) + 1} tokens is more than the {self.longest} "
                             "that the model can read")
        return (row.context + row.tail)[-self.longest:]

    def _read_batch(self, rows: list[_Row], ids: list[Ids]) -> list[list[float]]:
        width = max(len(some) for some in ids)
        padded = np.zeros((len(rows), width), dtype=np.int64)  # on the right, where no token that counts can see it
        for some, line in zip(ids, padded, strict=True):
            line[:len(some)] = some
        counts = [len(row.tail) + 1 for row in rows]  # positions of each row whose logits are needed: its last ones
        starts = [len(some) - n for some, n in zip(ids, counts, strict=True)]
        low = min(starts) if self.slices else 0
        kept: dict[str, Any] = {"logits_to_keep": self._put(range(low, width))} if self.slices else {}
        logits = self.model(self._put(padded), use_cache=False, **kept).logits  # [b, width - low, v]
        return self._told(rows, logits, [start - low for start in starts])

    def _read_shared(self, rows: list[_Row]) -> list[list[float]]:
        """As `_read_batch`, for choices after equally long contexts, each of which is read once."""
        contexts = {context: k for k, context in enumerate(dict.fromkeys(row.context for row in rows))}
        kept: dict[str, Any] = {"logits_to_keep": 1} if self.slices else {}
        read = self.model(self._put(list(contexts)), use_cache=True, **kept)
        owner = self._put([contexts[row.context] for row in rows])
        logits = read.logits[owner, -1:]  # [b, 1, v]
        width = max(len(row.tail) for row in rows)
        if width:
            read.past_key_values.batch_select_indices(owner.cpu())  # layers may lie on several devices
            tails = self._put([row.tail + (0,) * (width - len(row.tail)) for row in rows])
            after = self.model(tails, past_key_values=read.past_key_values, use_cache=True).logits  # [b, width, v]
            logits = torch.cat([logits, after], dim=1)
        return self._told(rows, logits, [0] * len(rows))

    def _told(self, rows: list[_Row], logits: torch.Tensor, starts: list[int]) -> list[list[float]]:
        """What logits [b, positions, v] say about each row, whose own positions begin at starts[b]."""
        counts = [len(row.tail) + 1 for row in rows]
        owner = self._put([k for k, n in enumerate(counts) for _ in range(n)])  # of each position, row after row
        place = self._put([start + j for start, n in zip(starts, counts, strict=True) for j in range(n)])
        logits = logits[owner, place]  # [positions, v]
        greedy, logs = logits.argmax(-1).tolist(), logits.log_softmax(-1)

        ends = list(accumulate(counts))  # of each row among the positions
        tails = self._put([token for row in rows for token in (*row.tail, 0)])
        along = logs.gather(1, tails[:, None])[:, 0].float()
        along[self._put(ends) - 1] = 0  # the last position of a row is for lasts, not for its tail
        sums = torch.zeros(len(rows), device=along.device).index_add_(0, owner, along)
        row_of = self._put([k for k, row in enumerate(rows) for _ in row.lasts])
        lasts = self._put([token for row in rows for token in row.lasts])
        after = logs[self._put(ends)[row_of] - 1, lasts].float()
        likelihoods = iter((sums[row_of] + after).to(logits.dtype).tolist())  # rounded as lm-eval rounds its sums
        return [[next(likelihoods) for _ in row.lasts] if row.lasts else greedy[end - n:end]
                for row, end, n in zip(rows, ends, counts, strict=True)]

    def _put(self, numbers: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(numbers, dtype=np.int64), device=self.model.device)
