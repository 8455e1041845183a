"""The report of a finished plan as one HTML file that needs nothing else and asks for nothing.

Names and notes are other people's words: all text is escaped, and the page's own policy forbids every request and
every script but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from math import isnan
from typing import Any

from glue.atlas import Atlas
from glue.board import Leaderboard, Row, costs, leaderboard
from glue.cluster.verdict import shown
from glue.evaluate.comparisons import Rank
from glue.evaluate.statistics import Interval
from glue.plan import Plan
from glue.report import atlas as atlas_picture
from glue.report import charts, drawing, routing
from glue.report.gathered import Node, Walk, atlases, lineage, routes, trainings, walks
from glue.report.look import SCRIPT, STYLE
from glue.tune.curve import Curve

SCALE = 1.3  # pixels of the page for a point of a drawing


def report(plan: Plan) -> str:
    """The page about everything that a finished plan has left. Reads, never runs.

    Raises RecipeError where the recipe asks for no board.
    """
    board = leaderboard(plan)
    made_with = next((task.member.origin.made_with for task in reversed(plan.tasks)
                      if task.member and task.member.origin and task.member.origin.made_with), {})
    told = ", ".join(f"{name} {version}" for name, version in sorted(made_with.items()))
    return page(board, clusters=atlases(plan), searches=walks(plan), trained=trainings(plan), routed=routes(plan),
                nodes=lineage(plan, board), about=plan.recipe.about,
                foot=f"Recipe {plan.recipe.name}, seed {plan.recipe.seed}." + (f" Made with {told}." if told else ""))


def page(board: Leaderboard, *, clusters: Sequence[tuple[str, Atlas]] = (), searches: Sequence[Walk] = (),
         trained: Sequence[tuple[str, Curve]] = (), routed: Sequence[tuple[str, Sequence[routing.Report]]] = (),
         nodes: Sequence[Node] = (), about: str = "", foot: str = "") -> str:
    """A board and what belongs to it as HTML; a section for each part that there is."""
    parts = [("board", "Leaderboard", _board(board, nodes)), ("tasks", "Tasks", _tasks(board))]
    if board.claims:
        parts.insert(1, ("claims", "Differences", _claims(board)))
    if clusters:
        parts.append(("similarity", "Similarity", "".join(_cluster(*each) for each in clusters)))
    if searches:
        parts.append(("searches", "Searches", _searches(searches, board)))
    if trained:
        parts.append(("training", "Training", _trainings(trained)))
    if routed:
        parts.append(("routing", "Routing", "".join(_routes(*each) for each in routed)))
    if nodes:
        parts.append(("lineage", "Lineage", _lineage(nodes, board)))
    name, _, suite = board.title.partition(": ")
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in parts)
    body = "\n".join(f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{heading}</h2>\n{text}</section>'
                     for key, heading, text in parts)
    lead = f'<p class="headline">{_e(board.headline)}</p>' if board.headline else ""
    policy = (f"default-src 'none'; script-src '{_hash(SCRIPT)}'; style-src 'unsafe-inline'; img-src data:; "
              "base-uri 'none'; form-action 'none'")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{_e(board.title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#board">To the leaderboard</a>
<div class="top"><div class="wrap"><b>{_e(name)}</b><nav aria-label="Sections">{links}</nav>
<button id="theme" type="button">Theme: auto</button></div></div>
<div class="wrap"><header class="lead"><h1>{_e(about[:1].upper() + about[1:] if about else name)}</h1>
<p class="about">{_e(suite)}{"; " if suite else ""}{len(board.rows)} different ones, {board.items:,} items each</p>
{lead}</header>
<main>
{body}
</main>
<footer>{_e(foot)}</footer></div>
<div id="tip" role="tooltip"></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _e(text: object) -> str:
    return escape(str(text))


def _hash(script: str) -> str:
    """What a policy calls a script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# --- board ------------------------------------------------------------------------------------------------------------

def _board(board: Leaderboard, nodes: Sequence[Node]) -> str:
    tasks, more = list(board.rows[0].tasks), costs(board)
    sure = str(board.sure) if board.sure else ""
    sure = f"{_e(sure[:1].upper() + sure[1:])}." + " Beside a rank stands its 95 % interval." if sure else ""
    left = "".join(f"<p>{_e(note)}.</p>" for note in board.notes)
    heads = [_head("#", "rank", "n", "ascending"), _head("member", "who", "", "ascending", "text"),
             _head("type", "kind", "", "ascending", "text"), _head("mean", "n", "n", sort="descending"),
             '<th class="ci" scope="col">95 %</th>', '<th scope="col" aria-label="mean with interval"></th>',
             *(_head(_e(task), "t n", "n") for task in tasks),
             *(_head(heading, "cost n", "n") for heading in more)]
    best = {task: max(row.tasks[task] for row in board.rows) for task in tasks}
    places = {node.rank: k for k, node in enumerate(nodes) if node.rank is not None}
    rows = "\n".join(_row(rank, row, board, best, places.get(rank))
                     for rank, row in enumerate(board.rows, start=1))
    seen = ("<p>Greyed: a search of its lineage has seen these items.</p>" if any(row.seen for row in board.rows)
            else "")
    number = f"{board.scale.about[:1].upper()}{board.scale.about[1:]}"
    return f"""<p>{_e(number)}, each task with equal weight, and its 95 % interval. Headings sort; a name
opens what else is known. {sure}</p>{seen}{left}
<div class="card wide" tabindex="0" role="region" aria-label="leaderboard"><table class="board">
<thead><tr>{"".join(heads)}</tr></thead>
{rows}
</table></div><p id="sorted" class="sub-note" role="status" aria-live="polite"></p>
"""


def _head(text: str, name: str, align: str = "", first: str = "descending", kind: str = "number",
          sort: str = "") -> str:
    said = f' aria-sort="{sort}"' if sort else ""
    return (f'<th class="{name} {align}" scope="col" data-first="{first}" data-kind="{kind}"{said}>'
            f'<button type="button">{text}</button></th>')


def _row(rank: int, row: Row, board: Leaderboard, best: dict[str, float], place: int | None) -> str:
    mean, more, within = row.mean, costs(board), row.rank
    others = f" <small>= {_e(row.others[0])}{f' and {len(row.others) - 1} more' if row.others[1:] else ''}</small>" \
        if row.others else ""
    seen = '<span class="tag">seen by a search</span>' if row.seen else ""
    span = f"<small>{_ends(within)}</small>" if within else ""
    cells = [f'<td class="rank n" data-v="{rank}">{rank}{span}</td>',
             f'<td class="who" data-v="{_e(row.member)}"><button type="button" aria-expanded="false" '
             f'aria-controls="more-{rank}">{_e(row.member)}</button>{others}{seen}</td>',
             f'<td class="kind" data-v="{_e(row.kind)}">{_e(row.kind)}</td>',
             f'<td class="mean n" data-v="{mean.value!r}">{_percent(mean.value)}</td>',
             f'<td class="ci num">{_percent(mean.low)} – {_percent(mean.high)}</td>',
             f'<td class="plot">{_bar(row.member, mean)}</td>']
    cells += [f'<td class="t n{" best" if row.tasks[task] == best[task] else ""}" data-v="{row.tasks[task]!r}" '
              f'style="--v:{row.tasks[task] * 100:.2f}">{row.tasks[task] * 100:.0f}</td>' for task in best]
    numbers = {"parameters": row.size and row.size.whole, "active": row.size and row.size.active, "tokens/s": row.pace,
               "bits a byte": row.loss and row.loss.value}
    cells += [f'<td class="cost n" data-v="{numbers.get(heading) or ""}">{_e(tell(row))}</td>'
              for heading, tell in more.items()]
    facts = [("interval", f"{_percent(mean.value)} [{_percent(mean.low)}, {_percent(mean.high)}]"),
             *((("rank", f"{within.value}, 95 % interval {_ends(within)}"),) if within else ()),
             *((("also called", ", ".join(row.others)),) if row.others else ()),
             *((("type", row.kind),) if row.kind else ()),
             *((heading, tell(row)) for heading, tell in more.items() if tell(row))]
    listed = "".join(f"<dt>{_e(word)}</dt><dd>{_e(text)}</dd>" for word, text in facts)
    link = f'<dt>made</dt><dd><a href="#origin-{place}">its origin</a></dd>' if place is not None else ""
    mini = "".join(_line(task, row.interval(task), f"{row.member}, {task}") for task in row.tasks)
    return (f'<tbody data-m="{_e(row.member)}"{" class=seen" if row.seen else ""}><tr class="row">{"".join(cells)}</tr>'
            f'<tr class="more" id="more-{rank}" hidden><td colspan="{len(cells)}"><div class="facts"><dl>{listed}{link}'
            f'</dl><ul class="mini">{mini}</ul></div></td></tr></tbody>')


def _bar(name: str, score: Interval) -> str:
    """A score from 0 to 100 with its interval as whiskers."""
    tip = f"{name}\n{_percent(score.value)} [{_percent(score.low)}, {_percent(score.high)}]"
    return (f'<div class="track" data-tip="{_e(tip)}"><i class="fill" style="--v:{score.value * 100:.2f}"></i>'
            f'<i class="whisk" style="--l:{score.low * 100:.2f};--h:{score.high * 100:.2f}"></i></div>')


def _line(label: str, score: Interval, name: str, attributes: str = "") -> str:
    return (f'<li{attributes}><span>{_e(label)}</span>{_bar(name, score)}'
            f'<span class="v">{_percent(score.value)}</span></li>')


def _ends(rank: Rank) -> str:
    return f"{rank.best}" if rank.best == rank.worst else f"{rank.best}–{rank.worst}"


def _percent(share: float) -> str:
    return f"{share * 100:.1f}"


def _claims(board: Leaderboard) -> str:
    gaps = [claim.gap for claim in board.claims if claim.gap]
    wide = max((abs(end) for gap in gaps for end in gap), default=0.0) or 1.0
    lines = "".join(f'<li><span class="{"ok" if claim.holds else "no"}">{"✓ holds" if claim.holds else "✗ not shown"}'
                    f'</span><span>{_e(claim.text)}</span>{_gap(claim.gap, wide) if claim.gap else ""}</li>'
                    for claim in board.claims)
    return ("<p>What the recipe claims, on the same items, in points with paired 95 % intervals. A difference holds "
            f'where its whole interval lies above 0.</p><ul class="card claims">{lines}</ul>\n')


def _gap(gap: Interval, wide: float) -> str:
    """A difference with its interval as whiskers, from -wide to wide; the line in the middle is no difference."""
    low, high, value = ((end / wide + 1) * 50 for end in (gap.low, gap.high, gap.value))
    return (f'<span class="gap" aria-hidden="true"><i class="whisk" style="--l:{low:.2f};--h:{high:.2f}"></i>'
            f'<i class="dot" style="--v:{value:.2f}"></i></span>')


def _tasks(board: Leaderboard) -> str:
    figures = []
    for task in board.rows[0].tasks:
        rows = sorted(board.rows, key=lambda row: -row.tasks[task])
        lines = "".join(_line(row.member, row.interval(task), f"{row.member}, {task}",
                              f' data-m="{_e(row.member)}"{" class=seen" if row.seen else ""}') for row in rows)
        figures.append(f'<figure class="card task"><figcaption>{_e(task)}<small>{len(rows[0].results[task]):,} items'
                       f'</small></figcaption><ol>{lines}</ol></figure>')
    return ("<p>Each task from best to worst, with 95 % intervals. Rest on a member to "
            f'find it everywhere.</p><div class="panels">{"".join(figures)}</div>\n')


# --- clusters, searches, routes ---------------------------------------------------------------------------------------

def _cluster(name: str, atlas: Atlas) -> str:
    rows = [(pair.one, pair.other, "–" if isnan(pair.facts.cosine) else shown(pair.facts.cosine), pair.verdict.word,
             pair.verdict.reason) for pair in atlas.pairs]
    return ("<p>How alike the weights are: a heat map in the order of the tree beside it, and what to do with each "
            "pair. Rest on a cell, or tap it, for the reason.</p>"
            f'<div class="card">{_drawn(atlas_picture.picture(atlas), f"similarity heat map of {name}")}'
            f'{_folded("All pairs as a table", ("one", "other", "cosine", "verdict", "why"), rows)}</div>\n')


def _searches(searches: Sequence[Walk], board: Leaderboard) -> str:
    values = [each.value for walk in searches for each in walk.tries]
    low, high = max(0.0, min(values) - 0.03), min(1.0, max(values) + 0.03)
    here = {search.name: search.mean for search in board.searches}
    figures = []
    for walk in searches:
        mean = here.get(walk.name)
        asked = walk.tries[-1].asked if walk.tries else 0
        told = f"{walk.candidates} candidates, {asked:,} answers; found {_percent(walk.value)} where it searched" + \
            (f", {_percent(mean.value)} [{_percent(mean.low)}, {_percent(mean.high)}] here" if mean else "")
        told += f": {walk.found}" if walk.found else ""
        figures.append(f'<figure class="card"><figcaption>{_e(walk.name)}</figcaption>'
                       f'{charts.search(walk, low, high)}<div class="sub-note">{_e(told)}</div></figure>')
    return ("<p>Scores of candidates on the items that were searched, against the answers asked for so far; the line "
            "is the best so far. Hollow dots have not answered everything.</p>"
            f'<div class="panels">{"".join(figures)}</div>\n')


def _trainings(trained: Sequence[tuple[str, Curve]]) -> str:
    figures = [f'<figure class="card"><figcaption>{_e(name)}</figcaption>{charts.training(name, curve)}'
               f'<div class="sub-note">{_e(curve.sentence())}</div></figure>' for name, curve in trained]
    return ("<p>The loss of each training against its steps, question tokens counting as little as they did there.</p>"
            f'<div class="panels">{"".join(figures)}</div>\n')


def _routes(name: str, reports: Sequence[routing.Report]) -> str:
    tables = [_folded("Scores as a table", *routing.summary(reports)),
              *(_folded(f"Shares of {report.mixture}", *routing.shares(report)) for report in reports)]
    return (f"<p>{_e(name)}: whom each mixture asks for what, and what a better choice would score.</p>"
            f'<div class="card">{_drawn(routing.picture(reports), f"routes of {name}")}{"".join(tables)}</div>\n')


def _drawn(picture: drawing.Drawing, label: str) -> str:
    """A drawing inside the page, as wide as it is; where the window is narrower it scrolls by itself."""
    svg = drawing.svg(picture)
    inside = svg[svg.index(">") + 1:]
    inside = inside[inside.index("/>") + 2:]  # without the white page it is drawn on
    wide, high = (f"{side:.2f}" for side in (picture.width, picture.height))
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{_e(label)}"><svg class="drawn" role="img" '
            f'aria-label="{_e(label)}" width="{picture.width * SCALE:.0f}" height="{picture.height * SCALE:.0f}" '
            f'viewBox="0 0 {wide} {high}" font-family="{drawing.FONT}">{inside.rstrip()}</div>')


def _folded(title: str, headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{_e(heading)}</th>' for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (f'<details><summary>{_e(title)}</summary><div class="scroll" tabindex="0" role="region" '
            f'aria-label="{_e(title)}"><table class="plain"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
            f"</div></details>")


# --- lineage ----------------------------------------------------------------------------------------------------------

def _lineage(nodes: Sequence[Node], board: Leaderboard) -> str:
    kinds = list(dict.fromkeys(node.member.kind for node in nodes))
    key = "".join(f'<span class="kind-{_e(kind)}"><i style="background:var(--{_e(kind)},var(--model))"></i>'
                  f"{_e(kind)}</span>" for kind in kinds if kind.isidentifier())
    cards = "".join(_origin(k, node) for k, node in enumerate(nodes))
    graph = charts.lineage(nodes, [row.mean.value for row in board.rows])
    return ("<p>What every member was made from, from left to right. Rest on one to see all above and below it; open "
            "it for its origin with every setting. Numbers are means on this board.</p>"
            f'<div class="card"><div class="key">{key}</div><div class="scroll" tabindex="0" role="region" '
            f'aria-label="lineage graph">{graph}</div></div><div class="origins">{cards}</div>\n')


def _origin(k: int, node: Node) -> str:
    member = node.member
    facts: list[tuple[str, str]] = []
    if node.names[1:]:
        facts.append(("also called", _e(", ".join(node.names[1:]))))
    if member.note:
        facts.append(("note", _e(member.note)))
    roles = list(dict.fromkeys(role for role, _, _ in node.above))
    for role in roles:
        links = [f'<a href="#origin-{place}">{_e(name)}</a>' if place is not None else _e(name)
                 for word, name, place in node.above if word == role]
        facts.append((_e(role), ", ".join(links)))
    if member.origin is not None:
        facts.append(("settings", f"<pre>{_e(chr(10).join(_settings(member.origin.params)))}</pre>"))
        facts.append(("seed", _e(member.origin.seed)))
    else:
        facts.append(("path", _e(member.path)))
    facts += [(word, _e(text)) for word, text in (("licence", member.licence), ("tags", ", ".join(sorted(member.tags))),
                                                  ("digest", member.digest)) if text]
    listed = "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in facts)
    return (f'<details id="origin-{k}"><summary><b>{_e(node.names[0])}</b> <small>{_e(member.kind)}, '
            f"{_e(charts.made(node))}</small></summary><dl>{listed}</dl></details>")


def _settings(params: Any, before: str = "") -> Iterator[str]:
    """Every parameter on a line of its own; a method with what it takes."""
    if isinstance(params, list) and params and all(isinstance(each, dict) for each in params):
        for each in params:
            yield f"{before}: " + ", ".join(f"{key} {value}" for key, value in each.items())
        return
    if not isinstance(params, dict):
        yield f"{before}: {json.dumps(params, ensure_ascii=False)}"
        return
    if {"family", "name", "params"} <= set(params):
        yield f"{before}: {params['name']}"
        params = params["params"]
    for key, value in params.items():
        yield from _settings(value, f"{before}.{key}" if before else str(key))
