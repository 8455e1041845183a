"""Results of the speed benchmark as Markdown: times and ratios; memory and agreement; what they were made on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed.pairs import OURS, PEER, steady
from glue.errors import GlueError

START, END = "<!-- speed: made by `python -m benchmarks.speed table` -->", "<!-- end of speed -->"
WARM = 1e8  # bytes from the disk that are no matter
AIMED = "1b1"  # the shape that aims are for
Row = Mapping[str, Any]
Pair = Mapping[str, Any]


def markdown(files: Sequence[Path]) -> str:
    """The tables of some files of results, one after the other."""
    return "\n\n".join(_page(json.loads(file.read_text())) for file in files)


def _page(results: Mapping[str, Any]) -> str:
    """The tables of some results: those of merges, or of what steps take at a size."""
    if results.get("measures") == "size":
        from benchmarks.speed.size import page

        return page(results)
    return "\n".join(_tables(results))


def put(page: Path, files: Sequence[Path]) -> str:
    """The text of a page with its tables made anew. Raises GlueError where the page has lost its markers."""
    before, start, rest = page.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise GlueError(f"{page} has no place for the tables of speed", fix=f"put back the lines {START} and {END}")
    return f"{before}{START}\n{markdown(files)}\n{END}{after}"


def stage(run: Mapping[str, float]) -> float:
    """Seconds of the merge itself, its planning included: mergekit's run_merge plans too."""
    return run["plan"] + run["merge"]


def process(run: Mapping[str, float]) -> float:
    """Seconds of the whole process."""
    return run["wall"]


def kept(row: Row) -> list[Pair]:
    """The pairs that count."""
    return [pair for pair, counts in zip(row["pairs"], steady(row["pairs"]), strict=True) if counts]


def ratios(row: Row, seconds: Callable[[Any], float]) -> list[float]:
    """How many times longer mergekit took, pair by pair."""
    return [seconds(pair[PEER]) / seconds(pair[OURS]) for pair in kept(row) if PEER in pair and OURS in pair]


def limit(row: Row) -> float | None:
    """Seconds below which no merge can be here: reading as often as is needed, beside writing; None without a probe."""
    pairs = [pair for pair in kept(row) if "read" in pair]
    if not pairs:
        return None
    return max(row["reads"] * row["passes"] / median(pair["read"] for pair in pairs),
               row["writes"] / median(pair["write"] for pair in pairs))


def _tables(results: Mapping[str, Any]) -> Iterator[str]:
    rows = results["rows"].values()
    if any("read" in pair for row in rows for pair in row["pairs"]):
        yield "| | stage, s: glue / mergekit | ratio (range) | aim | process, s | ratio (range) | aim | " \
              "limit, s | stage / limit | n |"
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for name, row in results["rows"].items():
            row = row if results["shape"] == AIMED else {**row, "floor": None, "near": None}
            aims = row["floor"] or (None, None)
            yield _line(_named(name, row), _both(row, stage), *_times(row, stage, aims[0]), _both(row, process),
                        *_times(row, process, aims[1]), *_limits(row), _count(row))
        yield ""
    yield "| | private memory, GB: glue / mergekit | resident, GB | processor, s | read, written by glue, GB | " \
          "entries that differ | by more than an ulp |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in results["rows"].items():
        yield _line(_named(name, row), _both(row, lambda run: run["private"] / 1e9, close=True),
                    _both(row, lambda run: run["resident"] / 1e9), _both(row, lambda run: run["cpu"], digits=1),
                    _bytes(row), *_agreement(row))
    yield ""
    yield _caption(results)


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _named(name: str, row: Row) -> str:
    told = [f"{row['members']} models", *([row["settings"]] if row["settings"] else [])]
    return f"**{name}** ({', '.join(told)})"


def _middle(row: Row, side: str, figure: Callable[[Any], float], close: bool = False) -> float | None:
    runs = [] if close and side in row["memory"] else [pair[side] for pair in kept(row) if side in pair]
    runs = runs or [run for name, run in row["memory"].items() if name == side]
    return median(figure(run) for run in runs) if runs else None


def _both(row: Row, figure: Callable[[Any], float], *, close: bool = False, digits: int = 2) -> str:
    """A figure of both sides; `close` is of the run that was watched closely, if there was one."""
    found = [_middle(row, side, figure, close) for side in (OURS, PEER)]
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in found)


def _times(row: Row, seconds: Callable[[Any], float], aim: float | None) -> tuple[str, str]:
    """A ratio with its range, and what was aimed at; a miss is said."""
    found = ratios(row, seconds)
    if not found:
        return "-", f"{aim:g}x" if aim else "-"
    told = f"**{median(found):.1f}x** ({min(found):.1f}-{max(found):.1f})"
    return told, "-" if aim is None else f"{aim:g}x" + (" missed" if median(found) < aim else "")


def _limits(row: Row) -> tuple[str, str]:
    least, ours = limit(row), _middle(row, OURS, stage)
    if least is None:
        return "-", "-"
    if ours is None:
        return f"{least:.2f}", "-"
    over = ours / least
    aim = f" (aim {row['near']:g}{', missed' if over > row['near'] else ''})" if row["near"] else ""
    return f"{least:.2f}", f"{over:.1f}{aim}"


def _count(row: Row) -> str:
    out = len(row["pairs"]) - len(kept(row))
    return f"{len(kept(row))}" + (f", {out} left out" if out else "")


def _bytes(row: Row) -> str:
    runs = [run for pair in [*kept(row), row["memory"]] for side, run in pair.items() if side == OURS]
    return f"{runs[0]['bytes_read'] / 1e9:.2f}, {runs[0]['bytes_written'] / 1e9:.2f}" if runs else "-"


def _agreement(row: Row) -> tuple[str, str]:
    found = row.get("agreement")
    if not found:
        return "-", "-"
    if "rms" in found:
        return f"random: rms of the change {found['rms']:.3e} / {found['rms_peer']:.3e}", "-"
    return f"{found['differ']:.3%}", f"{found['beyond']:.4%}, at most {found['ulps']:.3g} ulp ({found['apart']:.2g})"


def _caption(results: Mapping[str, Any]) -> str:
    """What the figures are, and what they were measured on."""
    made, rows = results["machine"], list(results["rows"].values())
    runs = [pair[side] for row in rows for pair in row["pairs"] for side in (OURS, PEER) if side in pair]
    cold = sum(run["cold"] > WARM for run in runs)
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    days, commits = (sorted({row[key][:10] for row in rows}) for key in ("date", "commit"))
    told = (f"Shape {results['shape']}, {results['bytes'] / 1e9:.2f} GB a model in bf16. {made['cpu']}, "
            f"{made['cores']} cores, {made['ram'] / 2**30:.0f} GiB, {made['files']}, Linux {made['kernel']}; Python "
            f"{made['python']}, {versions}; {', '.join(days)}, commit {', '.join(commits)}.")
    if not runs:
        return f"{told} Memory alone was measured, while the runs were slowed down for it."
    lost = f"; {cold} of {len(runs)} runs found inputs gone from the cache" if cold else ""
    busy = median(run["others"] for run in runs)
    return (f"{told} Other work kept {busy:.1f} cores busy{lost}.\nMedians; ratios are taken pair by pair. Stage: "
            "the merge and its planning (of mergekit: run_merge); process: from start to exit. Limit: reading the "
            "inputs as often as the method must, or writing the output, whichever takes longer at the bandwidths "
            "probed with each pair. glue's result is on the disk when the clock stops; mergekit's only in the row "
            "that says fsync.")
