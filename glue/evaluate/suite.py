"""Suites: which tasks are measured on which data, checked, and written down as task files for lm-eval."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from glue import document
from glue.errors import Place, SuiteError, did_you_mean
from glue.files import write_aside
from glue.member import canonical

Split = Literal["dev", "test"]
SPLITS = ("dev", "test")  # train is never measured on
KEYS = ("about", "tasks", "normalised")
METRICS = {"choice": ("acc", "acc_norm"), "generate": ("exact_match",)}
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d.*)?")  # what the JSON reader under lm-eval takes for a date
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
L = TypeVar("L", bound=BaseModel)


class Item(NamedTuple):
    """One question. A model sees `question + " " + answer`; where there are choices, the answer is choices[gold]."""

    question: str
    choices: tuple[str, ...]
    gold: int
    answer: str


@dataclass(frozen=True)
class Task:
    """What is asked of a model, and what counts.

    data        name of the dataset member that has the items
    output      choice: the likeliest of the choices counts; generate: what the model writes, to the end of the line
    metric      acc, acc_norm (log-likelihood per character) for choice; exact_match for generate
    chance      what guessing scores
    max_tokens  that a model may write; of generate only
    """

    name: str
    data: str
    output: Literal["choice", "generate"]
    metric: str
    chance: float
    max_tokens: int = 32


@dataclass(frozen=True)
class Named:
    """A task that lm-eval itself has, with data of the hub.

    task    a task or a group, as lm-eval calls it
    metric  as lm-eval reports it; filter: through which what was written goes first, "none" for choices
    shots   split -> how many examples stand before a question: dev as a search asks, test as a report does
    under   a task of the board that this one is a part of: parts are averaged before tasks are
    """

    name: str
    task: str
    metric: str
    chance: float
    shots: Mapping[Split, int]
    filter: str = "none"
    under: str = ""


@dataclass(frozen=True)
class Suite:
    """Tasks that are measured together.

    normalised  the suite's number is of points above chance, as `points` counts them, and not of plain values
    """

    name: str
    tasks: tuple[Task, ...]
    about: str = ""
    named: tuple[Named, ...] = ()
    normalised: bool = False

    @property
    def every(self) -> tuple[Task | Named, ...]:
        """All of its tasks, those whose items are members' first."""
        return (*self.tasks, *self.named)


def weights(suite: Suite) -> dict[str, float]:
    """Task -> its share of the suite's number, summing to 1: parts of a task share what that task has."""
    parts: dict[str, list[str]] = {}
    for task in suite.every:
        parts.setdefault((task.under if isinstance(task, Named) else "") or task.name, []).append(task.name)
    return {name: 1 / len(some) / len(parts) for some in parts.values() for name in some}


def points(suite: Suite, values: Mapping[str, float]) -> float:
    """The number of a board, 0 to 100: the mean over tasks, of which those that are parts are averaged first.

    values  task -> what was measured. Where the suite is normalised, chance counts 0 and what lies below it too.
    """
    share, total = weights(suite), 0.0
    for task in suite.every:
        value = values[task.name]
        if suite.normalised:
            value = max(0.0, (value - task.chance) / (1 - task.chance))
        total += share[task.name] * value
    return 100 * total


def counting(suite: Suite) -> tuple[dict[str, float], float]:
    """Task -> what its value counts for in the suite's number as a share of 1, and what is taken from their sum.

    As `points`, but for values below chance, which here count against the number.
    """
    share = weights(suite)
    if not suite.normalised:
        return share, 0.0
    above = {task.name: share[task.name] / (1 - task.chance) for task in suite.every}
    return above, sum(above[task.name] * task.chance for task in suite.every)


def as_told(suite: Suite, split: Split, sources: Mapping[str, str]) -> dict[str, Any]:
    """What an origin says of a suite that was measured; of local tasks their data are named beside it.

    sources  named task -> digest of the data that lm-eval asks it of
    """
    told: dict[str, Any] = {"split": split, "tasks": [
        {key: value for key, value in asdict(task).items() if key != "data"} for task in suite.tasks]}
    if suite.named:
        told["named"] = [{**{key: value for key, value in asdict(task).items() if key != "shots"},
                          "num_fewshot": task.shots[split], "data": sources[task.name]} for task in suite.named]
    return {**told, "normalised": True} if suite.normalised else told


def recorded(told: Mapping[str, Any], name: str = "", data: Sequence[str] = ()) -> Suite:
    """The suite that `as_told` wrote of; data: the names of the datasets, one for each local task.

    For a board:  points(recorded(table.origin.params["suite"]), {row.task: row.value for row in rows of a member})
    """
    tasks = tuple(Task(**{**task, "data": where}) for task, where in
                  zip(told["tasks"], data or [""] * len(told["tasks"]), strict=True))
    named = []
    for line in told.get("named", ()):
        kept = {key: value for key, value in line.items() if key not in ("num_fewshot", "data")}
        named.append(Named(**kept, shots={told["split"]: line["num_fewshot"]}))
    return Suite(name, tasks, "", tuple(named), told.get("normalised", False))


def parse(text: str) -> tuple[str, Split]:
    """Take 'tiny:dev' apart into the name (or file) of the suite and the split. Raises SuiteError."""
    name, colon, split = text.rpartition(":")
    if not colon or not name:
        bare = text.strip(":")
        raise SuiteError(f"'{text}' does not say which split is meant",
                         fix=f"write {bare}:dev, which a search may look at, or {bare}:test, which it may not")
    if split not in SPLITS:
        raise SuiteError(f"'{text}' asks for a split '{split}'{did_you_mean(split, SPLITS)}")
    return name, cast(Split, split)


class _Line(BaseModel):
    """The right side of one task line."""

    model_config = ConfigDict(extra="forbid", strict=True)

    data: str = Field(min_length=1)
    output: Literal["choice", "generate"]
    metric: str
    chance: float = Field(ge=0, lt=1)
    max_tokens: int = Field(default=Task.max_tokens, ge=1)


class _Shots(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dev: int = Field(ge=0)
    test: int = Field(ge=0)


def _both(told: Any) -> Any:
    """One number is that of both splits."""
    return {"dev": told, "test": told} if type(told) is int else told


class _NamedLine(BaseModel):
    """The right side of the line of a task that lm-eval has."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    metric: str = Field(min_length=1)
    chance: float = Field(ge=0, lt=1)
    num_fewshot: Annotated[_Shots, BeforeValidator(_both)]
    filter: str = "none"
    under: str = ""


def read_suite(file: Path) -> Suite:
    """Read a suite; its name is that of the file. Raises SuiteError, which names the line and the column."""
    page = document.read(file, SuiteError)
    if not isinstance(page.value, dict):
        raise SuiteError("a suite is a mapping with the key 'tasks'", place=page.place())
    for key in page.value:
        if key not in KEYS:
            raise SuiteError(f"a suite has no key '{key}'{did_you_mean(key, KEYS)}", place=page.place(key))
    about, tasks = page.value.get("about", ""), page.value.get("tasks")
    if not isinstance(about, str):
        raise SuiteError(f"'about' is a sentence, not {about!r}", place=page.place("about"), fix="put it into quotes")
    if not isinstance(tasks, dict) or not tasks:
        raise SuiteError("'tasks' is a mapping from task names to what each is", place=page.place("tasks"),
                         fix="tasks: {kind: {data: tiny_zoo/kind, output: choice, metric: acc, chance: 0.25}}")
    for name in (file.stem, *tasks):
        if not _NAME.fullmatch(name):
            raise SuiteError(f"'{name}' cannot be a name here; letters, digits, '_' and '-' can",
                             place=page.place("tasks", name))
    normalised = page.value.get("normalised", False)
    if not isinstance(normalised, bool):
        raise SuiteError(f"'normalised' is true or false, not {normalised!r}", place=page.place("normalised"))
    found = [_named(page, name, line) if isinstance(line, dict) and "task" in line else _task(page, name, line)
             for name, line in tasks.items()]
    return Suite(file.stem, tuple(task for task in found if isinstance(task, Task)), about,
                 tuple(task for task in found if isinstance(task, Named)), normalised)


def _named(page: document.Document, name: str, line: dict[str, Any]) -> Named:
    told = _validated(_NamedLine, page, name, line)
    shots: dict[Split, int] = {"dev": told.num_fewshot.dev, "test": told.num_fewshot.test}
    return Named(name, told.task, told.metric, told.chance, shots, told.filter, told.under)


def _task(page: document.Document, name: str, line: Any) -> Task:
    told = _validated(_Line, page, name, line)
    if told.metric not in METRICS[told.output]:
        raise SuiteError(f"metric '{told.metric}' of task '{name}' does not go with output: {told.output}"
                         f"{did_you_mean(told.metric, METRICS[told.output])}",
                         place=page.place("tasks", name, "metric"))
    if told.output == "choice" and "max_tokens" in told.model_fields_set:
        raise SuiteError(f"task '{name}' chooses and writes nothing, so max_tokens has no meaning",
                         place=page.place("tasks", name, "max_tokens"), fix="remove it, or say output: generate")
    return Task(name, **told.model_dump())


def _validated(model: type[L], page: document.Document, name: str, line: Any) -> L:
    try:
        return model.model_validate(line)
    except ValidationError as problem:
        wrong = problem.errors()[0]
        path = [str(part) for part in wrong["loc"]]
        where = page.place("tasks", name, *path)
        if wrong["type"] == "extra_forbidden":
            raise SuiteError(f"task '{name}' has no key '{path[-1]}'{did_you_mean(path[-1], model.model_fields)}",
                             place=where) from None
        if wrong["type"] == "missing":
            raise SuiteError(f"task '{name}' does not say '{path[-1]}'", place=where) from None
        if wrong["type"] == "literal_error":
            raise SuiteError(f"{path[-1]} {wrong['input']!r} of task '{name}' is not known"
                             f"{did_you_mean(wrong['input'], METRICS)}", place=where) from None
        of = f"{path[-1]} of task '{name}'" if path else f"task '{name}'"
        raise SuiteError(f"{of} is {wrong['input']!r}: {wrong['msg'].lower()}", place=where) from None


def read_items(file: Path) -> list[Item]:
    """Read the items of one split, one JSON object a line. Raises SuiteError, which names the line."""
    try:
        text = file.read_bytes().decode()
    except FileNotFoundError:
        raise SuiteError(f"there is no file {file}", fix="make the dataset first, with a step `data`") from None
    except (UnicodeDecodeError, IsADirectoryError):
        raise SuiteError(f"{file} is not a text file in UTF-8") from None
    lines = text.removesuffix("\n").split("\n")  # not splitlines: U+2028 may stand inside a question
    if lines == [""]:
        raise SuiteError(f"{file} has no items", fix="ask the step `data` for at least one")
    items = []
    for number, line in enumerate(lines, start=1):
        try:
            items.append(_item(line))
        except SuiteError as wrong:
            raise wrong.at(Place(str(file), number, 1)) from None
    return items


def _item(line: str) -> Item:
    try:
        told = json.loads(line)
        line.encode(), canonical(told).encode()  # half a surrogate pair, written as \ud800, is no text
    except (ValueError, RecursionError) as problem:
        raise SuiteError(f"this is not JSON: {str(problem)[:80]}") from None
    if not isinstance(told, dict):
        raise SuiteError('an item is an object {"question", "choices", "gold", "answer"}')
    for key in told:
        if key not in Item._fields:
            raise SuiteError(f"an item has no '{key}'{did_you_mean(key, Item._fields)}")
    for key in Item._fields:
        if key not in told:
            raise SuiteError(f"the item does not say '{key}'")
    question, choices, gold, answer = (told[key] for key in Item._fields)
    if not isinstance(choices, list):
        raise SuiteError(f"'choices' is a list of words, not {choices!r}")
    for role, text in (("question", question), ("answer", answer), *(("a choice", choice) for choice in choices)):
        if not isinstance(text, str) or not text or text != text.strip():
            raise SuiteError(f"{role} {text!r} must be text, with no space before or after it",
                             fix="a model sees question, one space, answer")
    if len(set(choices)) < len(choices):
        raise SuiteError(f"a choice stands twice in {choices}", fix="then no answer is the only right one; keep one")
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise SuiteError(f"'gold' is the position of the answer, a whole number, not {gold!r}")
    if choices and not (0 <= gold < len(choices) and choices[gold] == answer):
        raise SuiteError(f"the answer {answer!r} is not choice {gold} of {choices} (they count from 0)")
    return Item(question, tuple(choices), gold, answer)


def split_digest(file: Path) -> str:
    """sha256 of the items of one split: the same for the same items, however the JSON is spaced."""
    return _digest(read_items(file))


def _digest(items: list[Item]) -> str:
    return hashlib.sha256("".join(canonical(list(item)) + "\n" for item in items).encode()).hexdigest()


def task_items(task: Task, folder: Path, split: Split) -> list[Item]:
    """The items of a task from the folder of its dataset. Raises SuiteError where the task cannot be asked of them."""
    file = folder / f"{split}.jsonl"
    items = read_items(file)
    for number, item in enumerate(items, start=1):
        if task.output == "choice" and len(item.choices) < 2:
            raise SuiteError(f"task '{task.name}' chooses, and this item has {len(item.choices)} choices",
                             place=Place(str(file), number, 1), fix="give two or more, or say output: generate")
        if task.output == "generate" and "\n" in item.answer:
            raise SuiteError(f"task '{task.name}' reads one line, and this answer has more",
                             place=Place(str(file), number, 1), fix="write the answer on one line")
    return items


def write_tasks(suite: Suite, split: Split, files: Mapping[str, Path], folder: Path) -> list[str]:
    """Write one lm-eval task file for each task into `folder`, and return the names that lm-eval knows them by.

    files  name of a dataset -> its folder
    The paths inside are absolute, so that `lm_eval --include_path folder --tasks NAMES` works from anywhere. A file is
    written only where it changes. lm-eval keeps its copy of the items beside it, under their digest: never a stale one.
    """
    names: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    for task in suite.tasks:
        if task.data not in files:
            raise SuiteError(f"task '{task.name}' of suite '{suite.name}' needs the dataset '{task.data}'"
                             f"{did_you_mean(task.data, files)}")
        name = re.sub(r"\W", "_", f"glue_{suite.name}_{split}_{task.name}")
        if name in names:
            raise SuiteError(f"two tasks of suite '{suite.name}' would both be called {name}", fix="rename one of them")
        names.append(name)
        data = files[task.data].resolve()
        items = task_items(task, data, split)
        _check_lm_eval_can_read(task, data, items)
        told = _lm_eval_task(name, task, data / f"{split}.jsonl", folder.resolve() / "items" / _digest(items)[:16])
        text, file = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=1000), folder / f"{name}.yaml"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            write_aside(file, text)
    return names


def _check_lm_eval_can_read(task: Task, data: Path, items: list[Item]) -> None:
    if "::" in str(data):
        raise SuiteError(f"lm-eval cannot read {data}: '::' means something else to it", fix="rename the folder")
    texts = {"question": [item.question for item in items], "answer": [item.answer for item in items]}
    if task.output == "choice":
        texts["answer"] = [choice for item in items for choice in item.choices]
    for role, some in texts.items():
        if all(_DATE.fullmatch(text) for text in some):
            raise SuiteError(f"lm-eval would not read each {role} of task '{task.name}' as text but as a date, because "
                             f"all look like one ('{some[0]}')", fix="put a word before or after them")


def _lm_eval_task(name: str, task: Task, file: Path, cache: Path) -> dict[str, Any]:
    told: dict[str, Any] = {
        "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0, "target_delimiter": " ",
        "dataset_kwargs": {"data_files": {"test": glob.escape(str(file))}, "cache_dir": str(cache)},
        "doc_to_text": "question",
        "metric_list": [{"metric": task.metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1}}
    if task.output == "choice":
        return {**told, "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    until = {"until": ["\n"], "max_gen_toks": task.max_tokens, "do_sample": False}  # lm-eval adds the end-of-text token
    strip = {"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
    return {**told, "output_type": "generate_until", "doc_to_target": "answer", "generation_kwargs": until,
            "filter_list": [strip]}
