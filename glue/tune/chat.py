"""Conversations as a tokenizer's own chat template renders them, with the tokens that are the assistant's.

A template is somebody else's program: transformers runs it in jinja's sandbox, which keeps it from files and from
Python, but not from taking long. What it says of today's date is pinned, so that no day gives other tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glue.errors import GlueError, one_line
from glue.tune.items import Item, Template, parted_talks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that says itself what the assistant says
PINNED: dict[str, Any] = {"date_string": "26 Jul 2024"}  # what templates of Llama say where nobody tells them the date
Turn = dict[str, str]


def templated(folder: Path, tokenizer: PreTrainedTokenizerBase, template: Template) -> bool:
    """Whether conversations of a dataset are rendered by the tokenizer's template; GlueError where they cannot be."""
    if template == "plain" or (template == "auto" and not tokenizer.chat_template):
        return False
    if not tokenizer.chat_template:
        raise GlueError("the base's tokenizer has no chat template",
                        fix="say  template: plain,  or name a base that was taught to chat")
    if template == "chat" and parted_talks(folder):
        raise GlueError(f"{folder} holds conversations that were parted into questions and answers",
                        fix="import them with  turns: keep")
    return True


def rendered(records: Sequence[tuple[int, dict[str, Any]]], folder: Path, tokenizer: PreTrainedTokenizerBase, *,
             every: bool) -> Iterator[tuple[int, Item]]:
    """Conversations among lines of a dataset, in tokens.

    every  a line without turns is a conversation of one question and one answer; else it is left to others
    """
    for line, record in records:
        if "messages" not in record and not every:
            continue
        turns = record.get("messages") or [{"role": "user", "content": record["question"]},
                                           {"role": "assistant", "content": record["answer"]}]
        try:
            yield line, conversation(turns, tokenizer)
        except GlueError as wrong:
            raise GlueError(f"{folder / 'train.jsonl'}:{line}: {wrong.what}", fix=wrong.fix) from None


def conversation(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Item:
    """A conversation in tokens; its answers are what the assistant says, each up to the token that ends it.

    What the assistant says is known from the template's own marks (`{% generation %}`), or else from rendering the
    conversation up to each answer, without and with it. Raises GlueError where the template fails, or renders the
    beginning of a conversation otherwise than the conversation begins.
    """
    if "strftime_now" in str(tokenizer.chat_template) and "date_string" not in str(tokenizer.chat_template):
        raise GlueError("the base's chat template says today's date, so that no two days would teach the same",
                        fix="give the tokenizer a template without strftime_now, or say  template: plain")
    if not tokenizer.is_fast:
        raise GlueError("the base's tokenizer does not tell which letters a token stands for",
                        fix="use its fast tokenizer (tokenizer.json), or say  template: plain")
    whole = _rendered(turns, tokenizer)
    if MARKED.search(str(tokenizer.chat_template)):
        told = _rendered(turns, tokenizer, marked=True)
        tokens, said = list(told["input_ids"]), _runs(told["assistant_masks"])
    else:
        read = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        tokens, places = list(read["input_ids"]), read["offset_mapping"]
        said = []
        for start, end in _answers(turns, whole, tokenizer):
            inside = [k for k, (first, last) in enumerate(places) if last > start and first < end and last > first]
            while len(inside) > 1 and tokens[inside[-2]] in tokenizer.all_special_ids \
                    and whole[slice(*places[inside[-1]])].isspace():
                inside.pop()  # the line break behind the token that ends a turn is not said by anybody
            if inside:
                said.append((inside[0], inside[-1] + 1))
    if not said:
        raise GlueError("the base's chat template renders nothing that the assistant says",
                        fix="say  template: plain,  or repair the template")
    return Item(tokens, said[0][0], tuple(said))


def _answers(turns: Sequence[Turn], whole: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Where each answer begins and ends in the rendered text."""
    for k, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _rendered(turns[:k], tokenizer, asks=True)
        behind = _rendered(turns[:k + 1], tokenizer)
        if not (behind.startswith(before) and whole.startswith(behind)):
            raise GlueError(f"the base's chat template does not render turns 1 to {k + 1} as the whole conversation "
                            f"begins, so that nobody can say which tokens are the assistant's",
                            fix="give the tokenizer a template with {% generation %} marks around what the assistant "
                                "says, or say  template: plain")
        yield len(before), len(behind)


def _rendered(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, asks: bool = False,
              marked: bool = False) -> Any:
    """The text of some turns; or, `marked`, its tokens with a mask of the assistant's."""
    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=marked, add_generation_prompt=asks,
                                             return_dict=marked, return_assistant_tokens_mask=marked, **PINNED)
    except Exception as problem:  # it is a program of others, and may fail in any way
        raise GlueError(f"the base's chat template fails: {type(problem).__name__}: {one_line(str(problem), 120)}",
                        fix="say  template: plain,  or leave such conversations out") from None


def _runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Where each run of ones begins and ends."""
    edges = [k for k in range(len(mask) + 1) if bool(k < len(mask) and mask[k]) != bool(k > 0 and mask[k - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))
