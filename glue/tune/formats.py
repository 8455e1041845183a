"""Formats of datasets that others have written: what a record has to say, and the items that it makes.

    alpaca      instruction, input (may be left out or empty), output
    sharegpt    conversations: a list of turns, each with from (human or user, gpt or assistant, system) and value
    messages    messages: a list of turns, each with role (the same words) and content
    completion  prompt, completion
    text        text
    items       question, answer, choices (may be left out): what glue's own datasets hold

An item is a question and an answer; a model sees `question + " " + answer`. So an input stands on the line after its
instruction, and the question of a text is its first word. Of a conversation every answer makes an item, whose question
is all that came before it: what the system says, then a line for each turn that opens with `User:` or `Assistant:`,
then `Assistant:`. What is said last and stays without an answer is left out. No model's own chat template is used,
since a dataset is made once and may teach several. Or a conversation stays one item, with its turns beside it, so that
whoever is taught by it renders them as its own template has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from glue.errors import SuiteError, did_you_mean, one_line

Format = Literal["alpaca", "sharegpt", "messages", "completion", "text", "items"]
Turns = Literal["part", "keep"]
ROLES: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"), "sharegpt": ("conversations", "from", "value"),
    "messages": ("messages", "role", "content"),
    "completion": ("prompt", "completion"), "text": ("text",), "items": ("question", "answer", "choices")}
TALKS = ("sharegpt", "messages")  # formats of conversations
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
OPENS = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
LONGEST = 1_000_000  # characters of an item


class Pair(NamedTuple):
    """One item, and what it has in common with others that must not be parted from it.

    kin    the question; of a conversation how it begins, up to its first answer
    turns  of a conversation that is kept: (user, assistant or system, what is said) up to its last answer
    """

    question: str
    answer: str
    choices: tuple[str, ...]
    kin: str
    turns: tuple[tuple[str, str], ...] = ()


def check_fields(format: Format, fields: Mapping[str, str]) -> None:
    """Raise SuiteError for a role that the format does not have."""
    for role in fields:
        if role not in ROLES[format]:
            raise SuiteError(f"a record of format '{format}' has no '{one_line(role)}'"
                             f"{did_you_mean(role, ROLES[format])}",
                             fix="fields say under which key a record has what:  fields: {output: response}")


def pairs(record: Any, format: Format, fields: Mapping[str, str], turns: Turns = "part") -> list[Pair]:
    """The items that a record makes.

    fields  role -> the key under which records have it, where that is not its own name
    turns   part: every answer of a conversation is an item; keep: a conversation is one, whose answer is the last
    Raises SuiteError for a record that does not say what its format asks for, or has no answer.
    """
    if not isinstance(record, dict):
        raise SuiteError(f"a record is an object with keys, and this is {_short(record)}")
    key = {role: fields.get(role, role) for role in ROLES[format]}
    if format in TALKS:
        return _conversation(record, [key[role] for role in ROLES[format]], turns)
    if format == "text":
        first, space, rest = _text(record, key["text"]).partition(" ")
        if not space:
            raise SuiteError("a text of one word has nothing that could be learnt from it", fix="take it out")
        return [_pair(first, rest)]
    asked, answered = {"alpaca": ("instruction", "output"), "completion": ("prompt", "completion"),
                       "items": ("question", "answer")}[format]
    question, answer = _text(record, key[asked]), _text(record, key[answered])
    if format == "alpaca" and record.get(key["input"]) not in (None, ""):
        question += f"\n{_text(record, key['input'])}"
    return [_pair(question, answer, _choices(record.get(key.get("choices", "")), answer) if format == "items" else ())]


def _pair(question: str, answer: str, choices: tuple[str, ...] = ()) -> Pair:
    question, answer = question.strip(), answer.strip()
    for what, text in (("question", question), ("answer", answer)):
        if not text:
            raise SuiteError(f"the {what} is empty", fix="write one, or take the record out")
    if len(question) + len(answer) > LONGEST:
        raise SuiteError(f"the item has {len(question) + len(answer):,} characters, and may have {LONGEST:,}",
                         fix="cut it into several")
    return Pair(question, answer, choices, question)


def _text(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        raise SuiteError(f"the record has no '{one_line(key)}'{did_you_mean(key, map(str, record))}",
                         fix="say under which key it stands with  fields,  or choose another format")
    text = record[key]
    if not isinstance(text, str):
        raise SuiteError(f"'{one_line(key)}' is text, not {_short(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        raise SuiteError(f"'{one_line(key)}' holds half a character, which no file can hold",
                         fix="write the whole character") from None
    if not text.strip():
        raise SuiteError(f"'{one_line(key)}' is empty", fix="write something there, or take the record out")
    return text.strip()


def _choices(told: Any, answer: str) -> tuple[str, ...]:
    if told is None or told == []:
        return ()
    if not isinstance(told, list) or not all(isinstance(one, str) and one.strip() == one != "" for one in told):
        raise SuiteError(f"'choices' is a list of words with no space around them, not {_short(told)}")
    if len(set(told)) < len(told) or answer not in told:
        raise SuiteError(f"the answer {_short(answer)} stands {'not ' * (answer not in told)}among the choices "
                         f"{_short(told)}, of which none may come twice", fix="name each choice once, the answer too")
    return tuple(told)


def answers(turns: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Every answer of a conversation, with all that came before it as its question."""
    said: list[str] = []
    for role, text in turns:
        if role == "assistant":
            yield "\n".join([*said, "Assistant:"]), text
        said.append(OPENS[role] + text)


def _conversation(record: Mapping[str, Any], key: Sequence[str], kept: Turns) -> list[Pair]:
    name, who, what = key
    turns = record.get(name)
    if isinstance(turns, dict) and set(turns) >= {who, what}:  # columns, as tables hold lists of rows
        columns = turns[who], turns[what]
        if all(isinstance(one, list) for one in columns) and len(columns[0]) == len(columns[1]):
            turns = [dict(zip((who, what), row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise SuiteError(f"'{one_line(name)}' is a list of turns, not {_short(turns)}"
                         if name in record else f"the record has no '{one_line(name)}'"
                         f"{did_you_mean(name, map(str, record))}",
                         fix="write  [{from: human, value: ...}, {from: gpt, value: ...}],  or  format: messages  for "
                             "[{role: user, content: ...}, ...],  or say under which keys these stand with  fields")
    said = list(_said(turns, who, what))
    found = [_pair(question, answer) for question, answer in answers(said)]
    if not found:
        raise SuiteError("nobody answers in this conversation", fix="take the record out")
    kin = found[0].question
    if kept == "part":
        return [pair._replace(kin=kin) for pair in found]
    end = max(k for k, (role, _) in enumerate(said) if role == "assistant")
    return [found[-1]._replace(kin=kin, turns=tuple(said[:end + 1]))]


def _said(turns: Sequence[Mapping[str, Any]], who: str, what: str) -> Iterator[tuple[str, str]]:
    """(role, text) of every turn; a turn that answers comes after one that asks."""
    before: list[str] = []
    for k, turn in enumerate(turns, start=1):
        speaker = turn.get(who)
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise SuiteError(f"turn {k} is said by {_short(speaker)}; speakers are {', '.join(SPEAKERS)}")
        try:
            text = _text(turn, what)
        except SuiteError as wrong:
            raise SuiteError(f"turn {k}: {wrong.what}", fix=wrong.fix) from None
        role = SPEAKERS[speaker]
        if role == "assistant" and not any(line.startswith("User: ") for line in before):
            raise SuiteError(f"turn {k} answers, and nothing was asked before it",
                             fix="begin with what a human says, or take the record out")
        before.append(OPENS[role] + text)
        yield role, text


def _short(value: Any) -> str:
    return one_line(repr(value), 60)
