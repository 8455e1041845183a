"""Formats of datasets that others have written: what a record has to say, and the items that it makes.

    alpaca      instruction, input (may be left out or empty), output
    sharegpt    conversations: a list of turns, each with from (human or user, gpt or assistant, system) and value
    completion  prompt, completion
    text        text
    items       question, answer, choices (may be left out): what glue's own datasets hold

An item is a question and an answer; a model sees `question + " " + answer`. So an input stands on the line after its
instruction, and the question of a text is its first word. Of a conversation every answer makes an item, whose question
is all that came before it: what the system says, then a line for each turn that opens with `User:` or `Assistant:`,
then `Assistant:`. What is said last and stays without an answer is left out. No model's own chat template is used,
since a dataset is made once and may teach several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from glue.errors import SuiteError, did_you_mean, one_line

Format = Literal["alpaca", "sharegpt", "completion", "text", "items"]
ROLES: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"), "sharegpt": ("conversations", "from", "value"),
    "completion": ("prompt", "completion"), "text": ("text",), "items": ("question", "answer", "choices")}
SPEAKERS = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant", "system": ""}
LONGEST = 1_000_000  # characters of an item


class Pair(NamedTuple):
    """One item, and what it has in common with others that must not be parted from it.

    kin  the question; of a conversation how it begins, up to its first answer
    """

    question: str
    answer: str
    choices: tuple[str, ...]
    kin: str


def check_fields(format: Format, fields: Mapping[str, str]) -> None:
    """Raise SuiteError for a role that the format does not have."""
    for role in fields:
        if role not in ROLES[format]:
            raise SuiteError(f"a record of format '{format}' has no '{one_line(role)}'"
                             f"{did_you_mean(role, ROLES[format])}",
                             fix="fields say under which key a record has what:  fields: {output: response}")


def pairs(record: Any, format: Format, fields: Mapping[str, str]) -> list[Pair]:
    """The items that a record makes.

    fields  role -> the key under which records have it, where that is not its own name
    Raises SuiteError for a record that does not say what its format asks for, or has no answer.
    """
    if not isinstance(record, dict):
        raise SuiteError(f"a record is an object with keys, and this is {_short(record)}")
    key = {role: fields.get(role, role) for role in ROLES[format]}
    if format == "sharegpt":
        return list(_conversation(record, key))
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


def _pair(question: str, answer: str, choices: tuple[str, ...] = (), kin: str = "") -> Pair:
    question, answer = question.strip(), answer.strip()
    for what, text in (("question", question), ("answer", answer)):
        if not text:
            raise SuiteError(f"the {what} is empty", fix="write one, or take the record out")
    if len(question) + len(answer) > LONGEST:
        raise SuiteError(f"the item has {len(question) + len(answer):,} characters, and may have {LONGEST:,}",
                         fix="cut it into several")
    return Pair(question, answer, choices, kin or question)


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


def _conversation(record: Mapping[str, Any], key: Mapping[str, str]) -> Iterator[Pair]:
    name = key["conversations"]
    turns = record.get(name)
    if isinstance(turns, dict) and set(turns) >= {key["from"], key["value"]}:  # columns, as tables hold lists of rows
        columns = turns[key["from"]], turns[key["value"]]
        if all(isinstance(one, list) for one in columns) and len(columns[0]) == len(columns[1]):
            turns = [dict(zip((key["from"], key["value"]), row, strict=True)) for row in zip(*columns, strict=True)]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise SuiteError(f"'{one_line(name)}' is a list of turns, not {_short(turns)}"
                         if name in record else f"the record has no '{one_line(name)}'"
                         f"{did_you_mean(name, map(str, record))}",
                         fix="write  [{from: human, value: ...}, {from: gpt, value: ...}],  or say under which keys "
                             "these stand:  fields: {conversations: messages, from: role, value: content}")
    said: list[str] = []
    kin, answers = "", 0
    for k, turn in enumerate(turns, start=1):
        who = turn.get(key["from"])
        if not isinstance(who, str) or who not in SPEAKERS:
            raise SuiteError(f"turn {k} is said by {_short(who)}; speakers are {', '.join(SPEAKERS)}")
        try:
            text = _text(turn, key["value"])
        except SuiteError as wrong:
            raise SuiteError(f"turn {k}: {wrong.what}", fix=wrong.fix) from None
        speaker = SPEAKERS[who]
        if speaker == "Assistant":
            if not any(line.startswith("User: ") for line in said):
                raise SuiteError(f"turn {k} answers, and nothing was asked before it",
                                 fix="begin with what a human says, or take the record out")
            question = "\n".join([*said, "Assistant:"])
            kin, answers = kin or question, answers + 1
            yield _pair(question, text, kin=kin)
        said.append(f"{speaker}: {text}" if speaker else text)
    if not answers:
        raise SuiteError("nobody answers in this conversation", fix="take the record out")


def _short(value: Any) -> str:
    return one_line(repr(value), 60)
