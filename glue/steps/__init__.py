"""Steps: the words after `step:`. Each takes members and leaves one member; only steps know both zoo and verbs.

A step's keyword-only signature is the schema of its recipe line. Parameters that name members are marked here, and
arrive resolved:

    One         a member                                    -> Member; OneThatRuns need not have weights
    Many        names, `tag:x`, groups                      -> list[Member]
    Shares      members with a number each                  -> dict[Member, float], in the order of the recipe
    OnSuite     `suite:split`; OnDev takes no test split,    -> Measured
                OnAnySuite also tasks that lm-eval has
    OnConfig    a merge config of mergekit                   -> Configured
    DataFiles   a file or folder that others have written    -> Member, which no zoo holds

Three parameters say where and how models run, and may be said once for a whole recipe or on the command line: `Device`,
`RunsIn` (a dtype) and `AtOnce` (a batch size).

Traits: `makes` is the kind of member it leaves; `lone` lets a family of one pass through as it is; `named` says that
names go into the result, so that they belong to its origin; `writes` says how large the result will be: as `one` of
the models that go in, or as `all` of them; `holds` what of them is in memory: one that `runs` or `trains` at a time,
`pieces`, or `matrices`; `resumes` that a draft which a killed run has left goes on where it was; `unkeyed` names
parameters that say how the work is done and not what comes out, and are no part of the origin; `later` those that came
later, and are none at their default, so that what was made before is still known. Two functions raise for what cannot
work, before anything runs: `words` is called with the parameters as they are written, `check` with the members too,
as soon as these are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from glue.family import Count, Family, Method, Positive, marks
from glue.kinds import BatchSize, Dtype, Place
from glue.member import CHANGES, IN_WEIGHTS, Element, Member

if TYPE_CHECKING:
    import numpy as np

    from glue.evaluate.suite import Item, Split, Suite
    from glue.kinds import Running
    from glue.merge.mergekit.nouns import Config, ModelRef
    from glue.workers import Workers

steps = Family("steps", "step", "glue.steps", first="Job -> Made",
               traits=("makes", "lone", "named", "writes", "holds", "resumes", "unkeyed", "later", "words", "check"))


@dataclass(frozen=True)
class Takes:
    """Marks a parameter that names members.

    kinds  what they may be, of a suite its splits; () is anything
    named  whether a suite may have tasks that lm-eval has itself
    """

    how: str
    kinds: tuple[str, ...] = ()
    named: bool = False


MODELS = ("model", *IN_WEIGHTS)
RUNS = ("model", *CHANGES, "mixture", "endpoint")


@dataclass(frozen=True)
class Wide:
    """Marks a parameter for which a recipe, or the command line, may say a value for all lines."""

    word: str


def wide(method: Method) -> dict[str, str]:
    """Word that may be said for all lines -> what a step calls it."""
    return {mark.word: name for name, info in method.parameters.items() for mark in marks(info)
            if isinstance(mark, Wide)}


@dataclass(frozen=True)
class Measured:
    """A suite on one split, with the dataset member behind each of its tasks.

    sources  task that lm-eval has -> digest of the data on this machine that it is asked of
    """

    suite: Suite
    split: Split
    data: dict[str, Member]
    sources: Mapping[str, str] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """What an origin says of it, beside the members."""
        from glue.evaluate.suite import as_told

        return as_told(self.suite, self.split, self.sources)

    def items(self) -> dict[str, list[Item]]:
        """Task -> its items. Raises SuiteError where they cannot be asked as the task says."""
        from glue.evaluate.suite import task_items

        return {task.name: task_items(task, self.data[task.data].folder, self.split) for task in self.suite.tasks}

    def digests(self) -> dict[str, str]:
        """Task -> digest of its items."""
        from glue.evaluate.suite import split_digest

        return {task.name: split_digest(self.data[task.data].folder / f"{self.split}.jsonl")
                for task in self.suite.tasks}

    def ask(self, running: Running) -> dict[str, np.ndarray]:
        """Task -> results [items] of whatever runs, by the fast scorer."""
        from glue.evaluate.fast import ask

        return ask(running, self.suite.tasks, self.items())

    def folders(self) -> dict[str, Path]:
        """Name of a dataset, as the suite says it, -> its folder."""
        return {name: member.folder for name, member in self.data.items()}


@dataclass(frozen=True)
class Configured:
    """A merge config, with the member behind each model that it names."""

    config: Config
    models: dict[ModelRef, Member]


Device = Annotated[str, Wide("device")]  # cpu, cuda, cuda:1, mps; auto: an accelerator where there is one
RunsIn = Annotated[Dtype, Wide("dtype")]
RunsInFloats = Annotated[Literal["float32", "bfloat16", "float16"], Wide("dtype")]  # what is put together in memory
AtOnce = Annotated[Count | Literal["auto"], Wide("batch_size")]


def ran(dtype: str) -> dict[str, str]:
    """What a score says of the numbers it was measured in; nothing of fp32, as those from before there was a choice."""
    return {} if dtype == "float32" else {"dtype": dtype}


if TYPE_CHECKING:  # what a step's function is given
    One = Member
    Tunable = Member
    OneThatRuns = Member
    Many = list[Member]
    ManyThatRun = list[Member]
    Dataset = Member
    Datasets = list[Member]
    Shares = dict[Member, float]
    OnSuite = Measured
    OnAnySuite = Measured
    OnDev = Measured
    OnConfig = Configured
    DataFiles = Member
else:  # what a recipe says
    One = Annotated[str, Takes("one", MODELS)]
    Tunable = Annotated[str, Takes("one", ("model",))]
    OneThatRuns = Annotated[str, Takes("one", RUNS)]
    Many = Annotated[list[Any], Takes("many", MODELS)]
    ManyThatRun = Annotated[list[Any], Takes("many", RUNS)]
    Dataset = Annotated[str, Takes("one", ("dataset",))]
    Datasets = Annotated[list[Any], Takes("many", ("dataset",))]
    Shares = Annotated[dict[str, Positive], Takes("shares", ("dataset",))]
    OnSuite = Annotated[str, Takes("suite", ("dev", "test"))]
    OnAnySuite = Annotated[str, Takes("suite", ("dev", "test"), named=True)]
    OnConfig = Annotated[str, Takes("config", MODELS)]
    DataFiles = Annotated[str, Takes("files")]
    OnDev = Annotated[str, Takes("suite", ("dev",))]  # for whatever chooses by what it measures


@dataclass
class Job:
    """What a step is given besides its parameters.

    folder   empty, to be filled; it is renamed into place when the step returns
    shared   the zoo's folder, for what steps share: generated task files, scores
    report   (done, total, note): progress
    """

    name: str
    folder: Path
    seed: int
    workers: Workers
    shared: Path
    report: Callable[[int, int, str], None] = lambda done, total, note: None

    def place(self, device: str, dtype: Dtype = "float32", batch_size: BatchSize = "auto") -> Place:
        """Where members of this job run; what fits there is remembered in the zoo's folder."""
        return Place(device, dtype, batch_size, self.shared)


@dataclass(frozen=True)
class Made:
    """What a step leaves in its folder.

    base      the member that it derives from; what is `same` as a member has that one's
    seen      digests of the splits that a search looked at, beyond those its inputs carry
    elements  of a group
    same      the member that this is, under a new name: what lies in the folder is then only a record
    note      one line for people
    told      what the journal of the run says of it
    """

    kind: str
    base: Member | None = None
    seen: frozenset[str] = frozenset()
    elements: tuple[Element, ...] = ()
    same: Member | None = None
    note: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)
