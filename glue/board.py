"""Boards: scores as a leaderboard with intervals, of a recipe, of a table or of a suite. Reads, never runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np

from glue.errors import GlueError, RecipeError, SuiteError, did_you_mean
from glue.evaluate.comparisons import Rank, apart, detectable, leaders, ranks
from glue.evaluate.statistics import Interval, Weights, average, difference, proportion, unbounded
from glue.evaluate.suite import Suite, counting, parse, points, read_suite, recorded
from glue.files import whole_lines
from glue.kinds.size import Size, size
from glue.member import Member, Score, Table
from glue.plan import Plan
from glue.steps.evaluate import LOSS_NOTE, SPEED_NOTE
from glue.steps.search import SEARCH_NOTE
from glue.zoo import Zoo


@dataclass(frozen=True)
class Scale:
    """How the tasks of a suite come to one number: the plain mean; or as the suite says, which may count points above
    chance, and parts of a task before tasks."""

    suite: Suite | None = None

    @staticmethod
    def of(suite: Suite) -> Scale:
        """The plain mean where the suite comes to that."""
        counts, _ = counting(suite)
        return Scale(suite if suite.normalised or len(set(counts.values())) > 1 else None)

    @property
    def about(self) -> str:
        """What the number is."""
        if self.suite is None:
            return "mean of tasks"
        return f"mean of tasks, parts of each first{', in points above chance' if self.suite.normalised else ''}"

    @property
    def weights(self) -> Weights:
        """Task -> what its mean counts for."""
        return counting(self.suite)[0] if self.suite else None

    def mean(self, results: Mapping[str, np.ndarray]) -> Interval:
        """The number of a member; task -> [items]."""
        if self.suite is None:
            return average(results)
        counts, less = counting(self.suite)
        found = average(results, weights=counts)
        value = points(self.suite, {task: float(some.mean()) for task, some in results.items()}) / 100
        low, high = (min(1.0, max(0.0, end - less)) for end in found[1:])
        return Interval(value, min(value, low), max(value, high))

    def gap(self, better: Row, than: Row) -> Interval:
        """How much better one member is, on the same items."""
        return difference(better.results, than.results, weights=self.weights)


@dataclass(frozen=True)
class Row:
    """One member on a board.

    tasks   shares of 1 by task          mean  theirs with its interval, see Scale
    rank    within the ranks that it could have; None where other rows have other items
    seen    whether a search of its lineage has seen some of the items
    others  further names of the same member: what a search found may be a member as it is
    loss    bits a byte of right answers, the mean of tasks, where the table was made with  loss: true
    size    its parameters, and pace, tokens a second, where the table was made with  speed: true
    """

    member: str
    others: tuple[str, ...]
    kind: str
    mean: Interval
    tasks: dict[str, float]
    seen: bool
    results: dict[str, np.ndarray]
    size: Size | None = None
    pace: float | None = None
    loss: Interval | None = None
    rank: Rank | None = None

    def interval(self, task: str) -> Interval:
        """The score of one task with its interval."""
        return proportion(self.results[task])


@dataclass(frozen=True)
class Claim:
    """A sentence about two members, and whether it holds: the 95 % interval of the difference lies above 0.

    gap  the difference; None where the claim is that a search took something in or did not
    """

    text: str
    holds: bool
    gap: Interval | None = None


@dataclass(frozen=True)
class Sure:
    """What the items can tell about all members at a time; claims over all pairs are corrected (Holm).

    leaders  members that no other is shown to be better than, best first; one alone is a winner
    least    the smallest difference that is found four times out of five, as a share of 1
    """

    leaders: tuple[str, ...]
    least: float

    def __str__(self) -> str:
        first = ", ".join(self.leaders[:6]) + (f" and {len(self.leaders) - 6} more" if self.leaders[6:] else "")
        return (f"no member is shown to be better than {first}; "
                f"a difference of {self.least * 100:.1f} points is found four times out of five")


@dataclass(frozen=True)
class Searched:
    """What a search came to for what it cost.

    items  how many answers it asked for, over all of its candidates
    found  what its result scored where it searched; `mean` is what that scores on the board
    """

    name: str
    items: int
    candidates: int
    found: float
    mean: Interval


@dataclass(frozen=True)
class Leaderboard:
    """Rows from best to worst, the claims of the recipe, one closing line, and its searches, the cheapest first.

    sure   None of one member alone, and where members have other items and cannot be compared one by one
    notes  what was left out, and why
    """

    title: str
    items: int
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    headline: str
    searches: tuple[Searched, ...] = ()
    sure: Sure | None = None
    notes: tuple[str, ...] = ()
    scale: Scale = Scale()

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)


def leaderboard(plan: Plan) -> Leaderboard:
    """The board that a recipe asks for, from the table it has made. Raises RecipeError where it asks for none."""
    asked = plan.recipe.board
    if asked is None:
        raise RecipeError(f"{plan.recipe.file} shows no board", fix="add  board: {table: NAME of an evaluate line}")
    table = plan[asked.table]
    scale = _scale(table)
    rows = rows_of(table, plan)
    by_name = {name: row for row in rows for name in (row.member, *row.others)}
    claims = tuple(_claim(plan, claim, by_name, scale) for claim in asked.claims)
    first = next((claim for claim in asked.claims if claim.get("better") == asked.headline), None)
    headline = ""
    if first is not None:
        better, than = _row(plan, first["better"], by_name), _row(plan, first["than"], by_name)
        gap = scale.gap(better, than)
        of = f" ({than.member})" if first["than"] != than.member else ""
        verb, by = ("beats", " by") if gap.low > 0 else ("does not clearly beat", ":")
        headline = (f"{first['better']} {verb} {first['than']}{of}{by} {_points(gap)} points: "
                    f"{better.mean.value:.1%} against {than.mean.value:.1%} on {_items(better)} items")
    title = f"{plan.recipe.name}: {table.note}"
    return _ranked(Leaderboard(title, _items(rows[0]), rows, claims, headline, _searches(plan, by_name),
                               scale=scale))


def plain(plan: Plan, table: Member) -> Leaderboard:
    """The rows of a table that no recipe says anything about."""
    rows = rows_of(table, plan)
    return _ranked(Leaderboard(table.note, _items(rows[0]), rows, (), "", scale=_scale(table)))


def _scale(table: Member) -> Scale:
    """As the suite says that a table was made on."""
    told = table.origin.params.get("suite") if table.origin else None
    return Scale.of(recorded(told)) if isinstance(told, dict) else Scale()


def of_suite(zoo: Zoo, suite: str) -> Leaderboard:
    """Everyone in the zoo that was measured on a suite and split ('tiny:test'), whatever recipe it was for.

    Only like is compared with like: for each task the items and the way of asking that most members share, and the
    tasks that most members have. Who lacks one of them is left out, and the notes say so. Raises SuiteError.
    """
    store = zoo.folder / "scores.jsonl"
    every = [Score.from_dict(json.loads(line)) for line in whole_lines(store)]
    scores = [score for score in every if score.suite == suite]
    if not scores:
        raise SuiteError(f"nobody was measured on '{suite}'{did_you_mean(suite, {score.suite for score in every})}",
                         fix=f"glue eval MEMBERS --suite {suite}")
    kept, notes = _alike(scores)
    members: dict[str, list[Member]] = {}
    for newest in zoo:
        for one in zoo.versions(newest.name):
            members.setdefault(one.digest, []).append(one)
    scale = _scale_of(zoo, suite, {score.task for some in kept.values() for score in some})
    rows = []
    for digest, some in kept.items():
        found = members.get(digest, [])
        names = list(dict.fromkeys(member.name for member in found)) or [f"{some[0].member}@{digest[:8]}"]
        if any(zoo[name].digest != digest for name in names if name in zoo):  # an older version of that name
            names = [name if zoo[name].digest == digest else f"{name}@{digest[:8]}" for name in names]
        looked = frozenset().union(*(member.seen for member in found))
        seen = [replace(score, seen_by_search=score.split in looked) for score in some]
        rows.append(_row_of(names, seen, found[0] if found else None, scale))
    best = _sorted(rows)
    ran = {dtype_of(score.how) for some in kept.values() for score in some} - {"float32"}
    title = f"{suite}: {len(rows)} member{'s' * (len(rows) > 1)}" + f" in {', '.join(sorted(ran))}" * bool(ran)
    return _ranked(Leaderboard(title, _items(best[0]), best, (), "", notes=tuple(notes), scale=scale))


def _scale_of(zoo: Zoo, name: str, tasks: set[str]) -> Scale:
    """As the suite's file says, where there is one and all of its tasks were measured."""
    file = zoo.file.parent / "benchmarks" / "suites" / f"{parse(name)[0]}.yaml"
    suite = read_suite(file) if file.exists() else None
    return Scale.of(suite) if suite and {task.name for task in suite.every} == tasks else Scale()


def _alike(scores: Sequence[Score]) -> tuple[dict[str, list[Score]], list[str]]:
    """digest -> its scores on the same tasks, items and settings as all the others; and what was left out."""
    by_way: dict[str, dict[tuple[str, str], dict[str, Score]]] = {}
    for score in scores:
        by_way.setdefault(score.task, {}).setdefault((score.split, score.how), {})[score.digest] = score
    names = {score.digest: score.member for score in scores}
    by_task = {}
    notes = []
    for task, ways in by_way.items():
        by_task[task] = max(reversed(ways.values()), key=len)  # of equally many the newest
        apart_ = {digest for way in ways.values() for digest in way} - set(by_task[task])
        if apart_:
            other = {dtype_of(how) for (_, how), some in ways.items() if apart_ & set(some)}
            other -= {dtype_of(score.how) for score in by_task[task].values()}
            notes.append(f"{task}: {_some(names, apart_)} left out, measured on other items or in another way"
                         + f" (in {', '.join(sorted(other))})" * bool(other))
    most = max(len(some) for some in by_task.values())
    tasks = [task for task, some in by_task.items() if len(some) == most]
    everyone = set.intersection(*(set(by_task[task]) for task in tasks))
    if not everyone:  # each task has others: the first alone
        tasks, everyone = tasks[:1], set(by_task[tasks[0]])
    if len(tasks) < len(by_task):
        notes.append(f"tasks left out, which fewer members have: {', '.join(sorted(set(by_task) - set(tasks)))}")
    if lacking := set(names) - everyone:
        notes.append(f"{_some(names, lacking)} left out, not measured on all tasks")
    return {digest: [by_task[task][digest] for task in tasks] for digest in names if digest in everyone}, notes


def dtype_of(how: str) -> str:
    """What members ran in when a score was measured so; fp32 where it does not say."""
    with suppress(ValueError, AttributeError):
        return str(json.loads(how).get("dtype", "float32"))
    return "float32"


def _some(names: Mapping[str, str], digests: Iterable[str]) -> str:
    told = sorted(names[digest] for digest in digests)
    return ", ".join(told[:3]) + (f" and {len(told) - 3} more" if told[3:] else "")


def rows_of(table: Member, plan: Plan) -> tuple[Row, ...]:
    """Scores as rows, best first; the same member under several names is one row."""
    by_digest: dict[str, dict[str, list[Score]]] = {}
    paces, lost = (json.loads(note.read_text()) if note.exists() else {}
                   for note in (table.folder / SPEED_NOTE, table.folder / LOSS_NOTE))
    for score in Table.read(table).rows:
        by_digest.setdefault(score.digest, {}).setdefault(score.member, []).append(score)
    known = {member.name: member for member in plan.zoo}
    scale = _scale(table)
    rows = []
    for digest, by_name in by_digest.items():
        # its own name is the one from outside this recipe, where it has one
        names = sorted(by_name, key=lambda name: name.startswith(f"{plan.recipe.name}/"))
        seen = any(score.seen_by_search for some in by_name.values() for score in some)
        scores = [replace(score, seen_by_search=seen) for score in by_name[names[0]]]
        member = known.get(names[0])
        row = _row_of([shown(name, plan) for name in names], scores, member, scale)
        rows.append(replace(row, size=_size(member) if paces and member else None, pace=paces.get(digest),
                            loss=unbounded(lost[digest]) if digest in lost else None))
    return _sorted(rows)


def _row_of(names: Sequence[str], scores: Sequence[Score], member: Member | None, scale: Scale) -> Row:
    results = {score.task: np.asarray(score.results) for score in scores}
    return Row(names[0], tuple(names[1:]), member.kind if member else "", scale.mean(results),
               {score.task: score.value for score in scores}, any(score.seen_by_search for score in scores), results)


def _sorted(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: (-row.mean.value, row.member)))


def _ranked(board: Leaderboard) -> Leaderboard:
    """The board with ranks and what is sure; as it is where members were not measured on the same items."""
    if len(board.rows) < 2:
        return board
    results = {row.member: row.results for row in board.rows}
    try:
        weights = board.scale.weights
        within, first = ranks(results, weights=weights), leaders(results, weights=weights)
    except SuiteError:
        return board
    items = {task: len(some) for task, some in board.rows[0].results.items()}
    least = detectable(items, apart(results), weights=weights)
    rows = tuple(replace(row, rank=within[row.member]) for row in board.rows)
    return replace(board, rows=rows, sure=Sure(tuple(first), least))


def _size(member: Member) -> Size | None:
    """How large a member is; None where its files are gone."""
    with suppress(GlueError):
        return size(member)
    return None


def _searches(plan: Plan, rows: dict[str, Row]) -> tuple[Searched, ...]:
    """The searches of a plan whose results are on its board."""
    found = []
    for task in plan:
        name = shown(task.name, plan)
        note = task.folder(plan.zoo) / SEARCH_NOTE if task.step == "search" and task.origin else None
        if note is not None and name in rows and note.exists():  # a family of one was not searched
            told = json.loads(note.read_text())
            if "items" in told:  # else it was made before they were counted
                found.append(Searched(name, told["items"], told["evaluated"], told["value"], rows[name].mean))
    return tuple(sorted(found, key=lambda search: (search.items, -search.mean.value)))


def _claim(plan: Plan, claim: dict[str, str], rows: dict[str, Row], scale: Scale) -> Claim:
    if "refused" in claim:
        refused, by = plan[claim["refused"]], plan[claim["by"]]
        # what a search found may be a member as it is, in whose folder another search has left its note
        log = next((task.folder(plan.zoo) / SEARCH_NOTE for task in plan if task.name == by.name and task.origin),
                   by.folder / SEARCH_NOTE)
        taken = refused.name in json.loads(log.read_text())["weights"] if log.exists() else refused.digest == by.digest
        verb = "took in" if taken else "refused"
        return Claim(f"{shown(by.name, plan)} {verb} {shown(refused.name, plan)}", not taken)
    better, than = _row(plan, claim["better"], rows), _row(plan, claim["than"], rows)
    gap = scale.gap(better, than)
    return Claim(f"{claim['better']} - {claim['than']}: {_points(gap)}", gap.low > 0, gap)


def _row(plan: Plan, word: str, rows: dict[str, Row]) -> Row:
    name = shown(plan[word].name, plan)
    if name not in rows:
        asked = plan.recipe.board
        assert asked is not None
        raise RecipeError(f"the board has no row '{name}'", place=asked.place,
                          fix=f"add {word} to the members of the line '{asked.table}'")
    return rows[name]


def shown(name: str, plan: Plan) -> str:
    """A name without the recipe it comes from, as the lines of this recipe write it."""
    recipe, _, short = name.partition("/")
    recipes = {line.recipe for line in plan.recipe.lines}
    taken = [line for line in plan.recipe.lines if line.name == short and line.recipe != recipe]
    return short if recipe in recipes and not taken else name


def _points(gap: Interval) -> str:
    return f"{gap.value * 100:+.1f} [{gap.low * 100:+.1f}, {gap.high * 100:+.1f}]"


def _items(row: Row) -> int:
    return sum(len(results) for results in row.results.values())


def costs(board: Leaderboard) -> dict[str, Callable[[Row], str]]:
    """Columns about losses and what members cost, where that was measured: heading -> what a row says."""
    found: dict[str, Callable[[Row], str]] = {}
    if any(row.loss for row in board.rows):
        found["bits a byte"] = lambda row: "{:.2f} [{:.2f}, {:.2f}]".format(*row.loss) if row.loss else ""
    if any(row.size for row in board.rows):
        found["parameters"] = lambda row: f"{row.size.whole / 1e6:,.1f}M" if row.size else ""
        found["active"] = lambda row: f"{row.size.active / 1e6:,.1f}M" if row.size else ""
    if any(row.pace for row in board.rows):
        found["tokens/s"] = lambda row: f"{row.pace:,.0f}" if row.pace else ""
    return found
