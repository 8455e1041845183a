"""docs/reproduction.md: every claim of every paper, what was measured, and the verdict that follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from benchmarks.reproduction.claims import Claim, Paper, Show
from benchmarks.reproduction.results import Part, Parts, Results, parts
from benchmarks.reproduction.verdict import VERDICTS, Verdict, opposed, verdict
from glue.evaluate.statistics import Interval

HEAD = """\
# What papers claim, and what is shown here

Made by `python -m benchmarks.reproduction table` from what recipes have measured; do not edit. Claims are in our words.

Everything was measured on the embedded zoo: a dozen models of about a million parameters, with skills that were made
up so that merging has something to find. Where a claim holds here, its mechanism works in this code; how much is gained
says nothing about models of 7 billion parameters. Where it is not shown here, it may still be true of those.

The verdict follows from the intervals and from nothing else:

- **holds**: at every seed, the 95 % interval of everything that is measured lies above 0.
- **holds in direction**: at every seed all of it is above 0, but some interval reaches 0.
- **not shown**: anything else, and claims without a recipe.
- **cannot be shown here**: the reason is given.

Numbers with an interval are differences in points of the mean over tasks, paired item by item, on test items that no
search has seen. Answers and bytes saved, members left out, gaps in cosine and errors of sums were counted or read off
what was made: they have no interval, and count as a number does that lies above 0 or not.

A claim's last word is how it is known: *read* in the paper's abstract or opening or in its authors' repository; from
their *code*; *second hand*, from a summary; or *recalled* and not looked up. The papers' tables of results were not at
hand, so no number of theirs is compared with."""
_SAID = {"scores": "{} - {}", "answers": "answers saved by {} beside {}", "choice": "{} left out by {}",
         "families": "{}: the gap in cosine between lineages",
         "errors": "{}: nearer the exact mean than {}, in its norm",
         "traffic": "bytes saved by {} beside {}"}


def markdown(papers: Sequence[Paper], results: Results) -> str:
    """The whole page."""
    return "\n".join([HEAD, "", *_counts(papers, results), "", *_foot(results), "",
                      *(line for paper in papers for line in _paper(paper, results))])


def verdict_of(claim: Claim, results: Results) -> Verdict:
    """The verdict on one claim, from what was measured."""
    if claim.why_not:
        return "cannot be shown here"
    return verdict(_intervals(parts(results, claim)))


def _counts(papers: Sequence[Paper], results: Results) -> Iterator[str]:
    """How many claims got which verdict, paper by paper."""
    yield f"| paper | {' | '.join(VERDICTS)} |"
    yield f"|---|{'---|' * len(VERDICTS)}"
    total: Counter[Verdict] = Counter()
    for paper in papers:
        if paper.claims:
            found = Counter(verdict_of(claim, results) for claim in paper.claims)
            total += found
            yield f"| {paper.title} | {' | '.join(str(found[word] or '') for word in VERDICTS)} |"
    yield f"| all | {' | '.join(str(total[word]) for word in VERDICTS)} |"


def _foot(results: Results) -> Iterator[str]:
    """When, and with what, the newest of the results was measured."""
    entries = [entry for found in results.values() for entry in found.values()]
    if entries:
        last = max(entries, key=lambda entry: entry["date"])
        versions = ", ".join(f"{name} {version}" for name, version in sorted(last["made"].items()))
        yield f"Last measured {last['date']}, with {versions}."


def _paper(paper: Paper, results: Results) -> Iterator[str]:
    yield f"## {paper.title}"
    yield ""
    code = f"; code: [{paper.code}](https://github.com/{paper.code})" if paper.code else ""
    yield _link(paper.source) + code + "." + (f" {paper.none}" if paper.none else "")
    yield ""
    if not paper.claims:
        return
    seeds = sorted({seed for claim in paper.claims for seed in parts(results, claim)})
    shown = any(claim.shows for claim in paper.claims)
    middle = ["recipe and what is compared", *(f"seed {seed}" for seed in seeds)] if shown else ["why"]
    yield f"| {' | '.join(['claim', *middle, 'verdict'])} |"
    yield f"|{'---|' * (len(middle) + 2)}"
    for claim in paper.claims:
        yield _row(claim, results, seeds, shown)
    yield ""


def _row(claim: Claim, results: Results, seeds: Sequence[int], shown: bool) -> str:
    found = parts(results, claim)
    says = f"{claim.says} *{claim.known}*"
    reason = claim.why_not or (f"no recipe yet, for want of {claim.waits_for}" if claim.waits_for else "")
    what = reason or "<br>".join([*map(_said, claim.shows), *([claim.note] if claim.note else [])])
    cells = ["<br>".join(_number(show, part) for show, part in zip(claim.shows, found[seed], strict=True))
             if seed in found else "" for seed in seeds] if shown else []
    word = verdict_of(claim, results)
    other = opposed(_intervals(found))
    more = f"; clearly the other way at {other} of {len(found)} seeds" if other else ""
    more = "; not measured yet" if claim.shows and not found else more
    return f"| {' | '.join([says, what, *cells, f'**{word}**{more}'])} |"


def _said(show: Show) -> str:
    """What is compared, with a link to the recipe."""
    words = [" and ".join(f"`{word}`" for word in words) for words in show.words]
    if show.measure == "scores" and len(show.words[1]) > 1:
        words[1] = f"the mean of {words[1]}"
    return f"[{show.recipe}](../recipes/{show.recipe}.yaml): {_SAID[show.measure].format(*words)}"


def _number(show: Show, part: Part) -> str:
    found = part.found
    if show.measure == "scores" and part.same:
        return "0: the same member"
    if show.measure == "scores":
        return f"{found.value * 100:+.1f} [{found.low * 100:+.1f}, {found.high * 100:+.1f}]"
    if show.measure == "choice":
        return "yes" if found.value else "no"
    if show.measure == "traffic":
        return f"{found.value:.2%}"
    return f"{found.value:.0%}" if show.measure == "answers" else f"{found.value:+.2f}"


def _intervals(found: Parts) -> dict[int, list[Interval]]:
    return {seed: [part.found for part in some] for seed, some in found.items()}


def _link(source: str) -> str:
    kind, _, number = source.partition(":")
    return f"[{source}](https://arxiv.org/abs/{number})" if kind == "arXiv" else f"[{source}](https://github.com/{source})"
