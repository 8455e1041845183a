"""Runs: a plan turned into members, several tasks at a time where they do not wait for each other.

A finished task is registered at once, so a run that is interrupted or killed goes on where it was. What a task
writes lies in a draft folder until it is complete. Each run leaves a journal in runs/.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from glue.cards import source, told, write_card
from glue.errors import GlueError, RunError
from glue.files import append_line, point, publish, write_aside
from glue.identity import checkpoints, identify, remember
from glue.kinds.device import ELSEWHERE, device_of
from glue.member import FOLDER_NOTE, Member, Origin, Table, canonical
from glue.plan import Plan, Task, make_plan
from glue.preflight.fit import refuse
from glue.recipe import Recipe
from glue.room import free_memory
from glue.spare import DRAFTS, lives
from glue.stamp import stamp
from glue.steps import RUNS, Job, Made, wide
from glue.workers import RECORDED, Workers
from glue.zoo import Zoo

GOES_ON = ".goes-on"  # in a draft that the next run of the same task goes on with
KEPT = 7 * 24 * 3600  # seconds that such a draft outlives runs of other recipes


class Watcher:
    """What a run tells while it works; the command line shows it. Every method may be called from any thread."""

    def planned(self, plan: Plan) -> None:
        """The plan as it is now; it grows when a group becomes known."""

    def started(self, task: Task) -> None:
        """A task has begun."""

    def progress(self, task: Task, done: int, total: int, note: str) -> None:
        """How far a task is."""

    def finished(self, task: Task, member: Member, seconds: float) -> None:
        """A task has left its member."""


def run(recipe: Recipe, zoo: Zoo, workers: Workers, watcher: Watcher | None = None, *, force: bool = False) -> Plan:
    """Make everything a recipe asks for and return its plan, now done.

    force  begin also with what does not fit, as far as can be told
    Raises RunError before any work for what does not fit, and for the first task that fails, after those beside it
    have finished; KeyboardInterrupt passes through. In all cases everything finished is registered and the same call
    goes on from there.
    """
    return _Run(recipe, zoo, workers, watcher or Watcher(), force).all()


class _Run:
    def __init__(self, recipe: Recipe, zoo: Zoo, workers: Workers, watcher: Watcher, force: bool):
        self.recipe, self.zoo, self.workers, self.watcher, self.force = recipe, zoo, workers, watcher, force
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.journal = zoo.file.parent / "runs" / f"{recipe.name}-{stamp}-{os.getpid()}.jsonl"
        self.drafts = zoo.folder / DRAFTS
        self.running: dict[Future, tuple[Task, float]] = {}
        self.looked_at: set[str] = set()  # tasks that are known to fit
        self.memory = None if workers.apart else free_memory()  # here, before there are workers

    def all(self) -> Plan:
        """Plan, start what is ready, wait for something to finish, register it, and again."""
        plan = make_plan(self.recipe, self.zoo)
        self._sweep({task.origin.key[:16] for task in plan if task.origin and task.state != "done"
                     and self._resumes(task)})
        with ThreadPoolExecutor(max(1, self.workers.number)) as threads:
            try:
                while True:
                    self.watcher.planned(plan)
                    self._refuse(plan)
                    self._register_aliases(plan)
                    self._start_ready(plan, threads)
                    if not self.running:
                        break
                    for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                        self._collect(future)
                    plan = make_plan(self.recipe, self.zoo)
            except BaseException as problem:
                if not isinstance(problem, GlueError):  # interrupted: end what runs, keep what is finished
                    self.workers.close(now=True)
                for future in self.running:
                    future.cancel()
                raise
        plan = make_plan(self.recipe, self.zoo)
        assert plan.done, [task.name for task in plan if task.state != "done"]
        return plan

    def _refuse(self, plan: Plan) -> None:
        """Raise where what is yet to be made does not fit; once, and again when more of it is known."""
        names = {task.name for task in plan if task.state in ("ready", "waiting", "deferred")}
        known = {task.name for task in plan if task.state in ("ready", "waiting")}
        if self.force or not names or known <= self.looked_at and self.looked_at:
            return
        self.looked_at |= known
        try:
            refuse(plan, self.workers.number, self.memory)
        except GlueError:
            self._rest()
            raise

    def _register_aliases(self, plan: Plan) -> None:
        for task in plan:
            if task.state == "alias" and task.member is not None:
                self._add(task.member)
                self._note("alias", task, digest=task.member.digest)

    def _start_ready(self, plan: Plan, threads: ThreadPoolExecutor) -> None:
        under_way = {task.origin.key for task, _ in self.running.values() if task.origin}
        for task in plan:
            if task.state == "ready" and task.origin and task.origin.key not in under_way:
                under_way.add(task.origin.key)
                self.running[threads.submit(self._make, task)] = task, time.monotonic()
                self._note("started", task)
                self.watcher.started(task)

    def _collect(self, future: Future) -> None:
        task, began = self.running.pop(future)
        try:
            member = future.result()
        except GlueError as error:
            self._note("failed", task, error=str(error))
            self._rest()
            raise RunError(f"{task.name}: {error.what}", fix=error.fix, place=task.line.place("as")) from error
        except Exception as error:
            self._note("failed", task, error=traceback.format_exc())
            self._rest()
            raise RunError(f"{task.name} failed: {type(error).__name__}: {error}",
                           fix=f"the whole story is in {self.journal}", place=task.line.place("as")) from error
        self._add(member)
        seconds = time.monotonic() - began
        self._note("done", task, digest=member.digest, seconds=round(seconds, 2))
        self.watcher.finished(task, member, seconds)

    def _rest(self) -> None:
        """Register what finishes beside a task that failed."""
        for future in list(self.running):
            task, _ = self.running.pop(future)
            if future.cancel():
                continue
            try:
                self._add(future.result())
            except Exception as error:  # the first failure is the one that is told
                self._note("failed", task, error=str(error))

    def _add(self, member: Member) -> None:
        """Register a member, and let zoo/<its name> point to its folder; a group's name holds its elements.

        What a step found inside of another product, and the zoo does not know yet, is registered with its group.
        """
        for part in (one for item in member.elements for one in item.members if one.origin):
            if part.digest not in {known.digest for known in self.zoo.versions(part.name)}:
                self._add(part)
        self.zoo.add(member)
        if member.kind != "group" and not member.path.startswith("hub:"):
            link = self.zoo.folder / member.name
            self._make_room(link)
            point(link, Path(member.path))

    def _make_room(self, path: Path) -> None:
        """Where a name was a member's and is now a group's, the link that it was must not lead into that member."""
        for above in path.parents:
            if above.is_symlink() and self.zoo.folder in above.parents:
                above.unlink()

    def _make(self, task: Task) -> Member:
        """Run one step into a draft folder and publish it."""
        assert task.origin is not None
        final = task.folder(self.zoo)
        if (left := self._left(task, final)) is not None:
            return left
        draft = self._draft(task)
        if self._resumes(task):
            write_aside(draft / GOES_ON, "")
        made = self._made(task, draft)
        (draft / GOES_ON).unlink(missing_ok=True)
        if made.told:
            self._note("told", task, **made.told)
        origin = replace(task.origin, made_with=made_with(self.workers, _device(task)))
        seen = frozenset().union(made.seen, *(member.seen for member in task.inputs))
        if made.same is not None:
            member = replace(made.same, name=task.name, tags=frozenset(task.line.tags), origin=origin, seen=seen,
                             note=made.note)
        else:
            if made.kind in RUNS:
                write_card(draft, task.name, origin, task.inputs, made.note, made.kind)
            for checkpoint in checkpoints(draft).values():
                stamp(checkpoint)
            fingerprint, digest = identify(draft)
            member = self.zoo.with_base(Member(
                task.name, made.kind, str(final), frozenset(task.line.tags), made.base, origin, fingerprint, digest,
                _licence(task.inputs), seen, made.elements, made.note))
        asked = {"evaluation": _asked(draft)} if made.kind == "table" and made.same is None else {}
        write_aside(draft / FOLDER_NOTE, canonical({**_told(member, task.inputs), **asked}))
        self._make_room(final)
        if made.same is None and final.exists() and self._is(final, digest):
            shutil.rmtree(draft)  # another run has made it meanwhile, or this one was killed before it could say so
        else:
            if made.same is None:
                remember(final, self.zoo.digests, fingerprint, digest, files=draft)
            if kept := publish(draft, final):
                self._note("kept", task, folder=kept.name)  # what had been changed by hand there
        return member

    def _left(self, task: Task, final: Path) -> Member | None:
        """What was published of this very task and is not registered, as after a kill between the two.

        None where there is nothing, where it is not what its note says, and for groups, which know their elements.
        """
        assert task.origin is not None
        try:
            note = json.loads((final / FOLDER_NOTE).read_bytes())
            if note["key"] != task.origin.key or note["kind"] == "group":
                return None
            known = {"name": task.name, "tags": frozenset(task.line.tags), "seen": frozenset(note["seen"]),
                     "origin": replace(task.origin, made_with=note["origin"]["made_with"]), "note": note["note"]}
            alike = [member for member in task.inputs if member.digest == note["digest"]]
            if alike and not checkpoints(final):  # the folder is only a record
                return replace(alike[0], **known)
            base = self.zoo[note["base"]] if note["base"] else None
            fingerprint, digest = identify(final, self.zoo.digests)
            found = self.zoo.with_base(Member(kind=note["kind"], path=str(final), base=base, fingerprint=fingerprint,
                                              digest=digest, licence=note["licence"], **known))
        except (OSError, ValueError, KeyError, TypeError, GlueError):
            return None
        return found if found.digest == note["digest"] else None

    def _draft(self, task: Task) -> Path:
        """An empty folder; or what a killed run has left of this very task, where its step can go on from that."""
        assert task.origin is not None
        draft = self.drafts / f"{task.origin.key[:16]}-{os.getpid()}"
        shutil.rmtree(draft, ignore_errors=True)
        for left in sorted(self.drafts.glob(f"{task.origin.key[:16]}-*")):
            if not lives(left):
                with suppress(OSError):  # another run was faster
                    left.rename(draft)
                    return draft
        draft.mkdir(parents=True)
        return draft

    @staticmethod
    def _resumes(task: Task) -> bool:
        return task.choice is not None and bool(task.choice.method.traits.get("resumes"))

    def _is(self, folder: Path, digest: str) -> bool:
        try:
            return identify(folder, self.zoo.digests)[1] == digest
        except GlueError:
            return False

    def _made(self, task: Task, draft: Path) -> Made:
        if task.choice is None:  # a group of what a mapped line has left
            made = Made("group", elements=task.elements, note=f"{len(task.elements)} members")
        else:
            job = Job(task.name, draft, task.line.seed, self.workers, self.zoo.folder,
                      lambda done, total, note: self.watcher.progress(task, done, total, note))
            made = task.choice(job, **task.arguments)
        if made.kind == "group":
            made = with_identity(made, self.zoo)
            write_elements(made, draft)
        return made

    def _sweep(self, kept: set[str]) -> None:
        """Remove the drafts of runs that are no longer there, but for those that can be gone on with.

        Those of other recipes, or of this one with another seed, can be too; they are kept for a week.
        """
        for draft in self.drafts.glob("*-*") if self.drafts.exists() else ():
            with suppress(OSError):
                if time.time() - (draft / GOES_ON).stat().st_mtime < KEPT:
                    continue
            if draft.name.rsplit("-", 1)[0] not in kept and not lives(draft):
                shutil.rmtree(draft, ignore_errors=True)

    def _note(self, event: str, task: Task, **more: object) -> None:
        record = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, "task": task.name,
                  "origin": task.origin.key if task.origin else None, **more}
        append_line(self.journal, canonical(record))


def with_identity(made: Made, zoo: Zoo) -> Made:
    """A group whose members all have an identity; a step gives none to those that it found inside of a product."""
    def known(member: Member) -> Member:
        if member.digest:
            return member
        fingerprint, digest = identify(member.folder, zoo.digests)
        return zoo.with_base(replace(member, fingerprint=fingerprint, digest=digest))

    return replace(made, elements=tuple(replace(item, members=tuple(map(known, item.members)))
                                        for item in made.elements))


def write_elements(made: Made, folder: Path) -> None:
    """Put the elements of a group into its folder, by what they contain; its digest is that of this file."""
    said = [{"name": item.name, "root": item.root and item.root.digest,
             "members": [member.digest for member in item.members]} for item in made.elements]
    (folder / "elements.json").write_text(canonical(said))


def _told(member: Member, inputs: tuple[Member, ...]) -> dict[str, object]:
    """What a product's folder says of itself."""
    origin: Origin = member.origin  # type: ignore[assignment]
    return {"name": member.name, "kind": member.kind, "digest": member.digest, "fingerprint": member.fingerprint,
            "base": member.base.version if member.base else None, "licence": member.licence,
            "seen": sorted(member.seen), "note": member.note, "origin": origin.as_dict(), "key": origin.key,
            "inputs": told(origin, inputs)}


def _asked(folder: Path) -> list[dict[str, object]]:
    """Each task of a table once: its items by their digest, the harness with its version, and how it asked."""
    rows = {(row.suite, row.task, row.metric, row.split, row.how): len(row.results)
            for row in Table.read(Member("", "table", str(folder))).rows}
    return [{"suite": suite, "task": task, "metric": metric, "items": items, "split": split,
             "how": json.loads(how)}
            for (suite, task, metric, split, how), items in rows.items()]


def _licence(inputs: tuple[Member, ...]) -> str:
    """Every licence of the inputs once, those that their cards say too."""
    return ", ".join(sorted(set(filter(None, ", ".join(source(member).licence for member in inputs).split(", ")))))


def made_with(workers: Workers, device: str = "cpu") -> dict[str, str]:
    """Versions of what computes here, and the machine; the device where it is not the processor."""
    elsewhere = device if os.environ.get(ELSEWHERE) else device_of(device)
    return {**{name: version(name) for name in RECORDED}, "python": platform.python_version(),
            "machine": platform.machine(), "processor": _processor(), "threads": str(workers.threads),
            **({} if elsewhere == "cpu" else {"device": elsewhere})}


def _device(task: Task) -> str:
    """The word for where a task calculates."""
    word = wide(task.choice.method).get("device") if task.choice else None
    return task.choice.params[word] if task.choice and word else "cpu"


def _processor() -> str:
    """What the system calls the processor, on which the last bits of a sum may depend."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
